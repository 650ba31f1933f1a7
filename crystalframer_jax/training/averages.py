"""Averages of the weights: an equal one over the last epochs (SWA) and an exponential moving one (EMA)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.inference.predictor import variables_in
from crystalframer_jax.model.layers import BATCH_NORM_MOMENTUM
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices
from crystalframer_jax.training.state import TrainState, Tree


def averaged(state: TrainState, params: Tree, swa_first_step: int | None, ema_decay: float) -> dict[str, Any]:
    """Returns the fields of `state` with averages, after the step that has led to `params`.

    The equal average begins with `swa_first_step`; None: there is none. An `ema_decay` of 0 stands for no exponential
    average; this is equal at first, so that it forgets the zeros which it starts from.
    """
    fields: dict[str, Any] = {}
    if swa_first_step is not None:
        steps = state.swa_steps + (state.step >= swa_first_step)
        share = jnp.where(steps > 0, 1 / jnp.maximum(steps, 1), 0)
        fields |= {"swa_steps": steps, "swa_params": _towards(state.swa_params, params, share)}
    if ema_decay:
        share = jnp.maximum(1 - ema_decay, 1 / (state.step + 1 - state.skipped_steps))
        fields["ema_params"] = _towards(state.ema_params, params, share)
    return fields


def ready_for_swa(state: TrainState, swa_first_step: int | None) -> TrainState:
    """Returns a restored state whose equal average is what a training with this `swa_first_step` would have.

    Before that step there is none. Raises ConfigError if the state is beyond it with another average, because
    swa_epochs or n_epochs have changed.
    """
    step, averaged_steps = int(state.step), int(state.swa_steps)
    if swa_first_step is None or step <= swa_first_step:
        fields = {name: getattr(state, name) for name in ("swa_params", "swa_batch_stats", "swa_steps")}
        return dataclasses.replace(state, **jax.tree.map(jnp.zeros_like, fields))
    due = step - swa_first_step
    if not due - int(state.skipped_steps) <= averaged_steps <= due:
        raise ConfigError(
            f"swa_epochs: averaging would have begun with step {swa_first_step:,}, but the run is at step {step:,} "
            f"with an average of {averaged_steps:,} steps; choose swa_epochs so that it begins later, or as before"
        )
    return state


def _towards(average: Tree, new: Tree, share: jax.Array) -> Tree:
    """An average closer to a tree; it may be a vector, see layout.for_steps."""
    if isinstance(average, jax.Array):
        new, _ = ravel_pytree(new)
    return jax.tree.map(lambda mean, x: mean + jnp.asarray(share, x.dtype) * (x - mean), average, new)


def weights_of(state: TrainState, average: str = "") -> Tree:
    """Returns the variables of the model with the last weights, or with those of an average: "swa", "ema"."""
    return variables_in(vars(state), average)


def averages_in(state: TrainState) -> list[str]:
    """Lists the averages that there are: "swa", "ema"."""
    return (["swa"] if int(state.swa_steps) else []) + (["ema"] if state.ema_params else [])


def with_batch_statistics(
    model: CrystalFramer, state: TrainState, batches: TrainingBatches, report: Callable[[str], None]
) -> TrainState:
    """Gives a state the BatchNorm statistics of its averaged weights: means over the batches of the last epoch.

    `report` is called at every batch.
    """
    weights = {name: weights_of(state, name) for name in averages_in(state)}
    if not weights or not jax.tree.leaves(state.batch_stats):
        return state
    statistics, steps = make_batch_statistics(model, batches.devices), batches.steps_per_epoch
    totals = {name: jax.tree.map(jnp.zeros_like, state.batch_stats) for name in weights}
    for number, batch in enumerate(batches.iterate(len(batches) - steps), 1):
        report(f"BatchNorm statistics of averages, batch {number} of {steps}")
        for name in weights:
            totals[name] = jax.tree.map(jnp.add, totals[name], statistics(weights[name], batch))
    means = {f"{name}_batch_stats": jax.tree.map(lambda x: x / steps, total) for name, total in totals.items()}
    return dataclasses.replace(state, **means)


def make_batch_statistics(model: CrystalFramer, devices: Devices = ONE_DEVICE) -> Callable[[Tree, Batch], Tree]:
    """Compiles statistics(variables, batch) -> means and variances that BatchNorm sees in this batch (batch_stats)."""
    model = model.clone(axis=devices.axis)

    def statistics(variables: Tree, batch: Batch) -> Tree:
        start = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        _, changed = model.apply(
            {**variables, "batch_stats": start},
            batch,
            train=True,
            dropout_seeds=draw(jnp.uint32(0), batch.crystal_place),
            mutable=["batch_stats"],
        )
        return jax.tree.map(lambda x: x / BATCH_NORM_MOMENTUM, changed["batch_stats"])

    return devices.each(statistics, split=(1,))
