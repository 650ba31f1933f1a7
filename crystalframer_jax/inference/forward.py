"""The forward pass as a compiled function."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config.hyperparameters import ModelKeys
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw
from crystalframer_jax.parallel.devices import ONE_DEVICE, TO_RUN_OFTEN, TO_RUN_ONCE, Devices, Tree

Forward = Callable[..., jax.Array]


def working_precision(config: ModelKeys) -> contextlib.AbstractContextManager:
    """Switches float64 on in JAX while a model of precision=float64 is at work; nothing else needs to."""
    return jax.enable_x64(True) if config.precision == "float64" else contextlib.nullcontext()


def make_forward(model: CrystalFramer, devices: Devices = ONE_DEVICE, runs_often: bool = True) -> Forward:
    """Compiles forward(variables, batch, sample) -> standardised predictions [B, T]; [devices, B, T] of several.

    Without `sample` the crystal chooses among equally good frames; the number of a sample draws one, the same for the
    same crystal wherever it stands in a batch. What does not run often is compiled in haste on a CPU.
    """

    def forward(variables: Tree, batch: Batch, sample: int | None = None) -> Any:
        seeds = None if sample is None else jnp.broadcast_to(draw(jnp.uint32(1), sample), batch.crystal_sizes.shape)
        predictions = model.apply(variables, batch, seeds)
        return predictions if devices.axis is None else jax.lax.all_gather(predictions, devices.axis)

    return devices.each(forward, split=(1,), for_cpu=TO_RUN_OFTEN if runs_often else TO_RUN_ONCE)
