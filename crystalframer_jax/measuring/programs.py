"""Programs to measure: training steps, predictions, and the attention of one block alone."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import Batch, unpacked
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ModelConfig, TrainConfig, validate
from crystalframer_jax.configs import default
from crystalframer_jax.configs.variants import with_variant
from crystalframer_jax.inference.forward import make_forward
from crystalframer_jax.measuring.cases import TARGET, packed, unit_cell
from crystalframer_jax.measuring.timing import Program
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.model.encoder import value_bases
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices
from crystalframer_jax.training.averages import weights_of
from crystalframer_jax.training.layout import for_steps
from crystalframer_jax.training.state import TrainState
from crystalframer_jax.training.step import initial_state, make_loss, make_recipe, make_train_step

STEPS_PER_EPOCH = 10  # nothing depends on it: the averages start long after the last step measured
STATISTICS = (TargetStatistics(TARGET, "eV/atom", 0.0, 1.0),)  # as many operations as with the true ones
SMALL_CUTOFF = 3.0  # Å, of the batch that initial weights are made with: their cost is not measured


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A configuration to measure, by name."""

    name: str
    config: TrainConfig

    @classmethod
    def named(cls, name: str, **changes: Any) -> "Variant":
        """Takes the default configuration with the values of a variant, and of hyperparameters that are changed."""
        config = with_variant(default.get_config(), name)
        config.update(changes)
        return cls(name, validate(config))

    @functools.cached_property
    def state(self) -> TrainState:
        """The state that a training starts from, calibrated on one small crystal; takes seconds to compile."""
        recipe = make_recipe(self.config, STEPS_PER_EPOCH)
        batch = packed(unit_cell(), SMALL_CUTOFF, self.config.model.parts)
        return initial_state(CrystalFramer(self.config.model, "xla"), recipe, batch, jax.random.key(0))


def train_program(
    variant: Variant, implementation: Implementation, batch: Callable[[], Batch], devices: Devices = ONE_DEVICE
) -> Program:
    """Makes the step of a training, from the initial weights on: its state goes from run to run, the batch stays."""
    model, recipe = CrystalFramer(variant.config.model, implementation), make_recipe(variant.config, STEPS_PER_EPOCH)
    loss = make_loss(model, recipe, STATISTICS, 1, devices.axis)
    return Program(
        make_train_step(recipe, loss, devices=devices),  # consumes its state
        lambda: (
            devices.replicate(for_steps(jax.tree.map(jnp.copy, variant.state), variant.config)[0]),
            devices.put(batch()),
        ),
        advance=lambda given, result: (result[0], given[1]),
    )


def forward_program(variant: Variant, implementation: Implementation, batch: Batch) -> Program:
    """Makes a prediction with the initial weights, from the packed batch to standardised targets."""
    forward = make_forward(CrystalFramer(variant.config.model, implementation))
    return Program(forward, lambda: (weights_of(variant.state), jax.device_put(batch)))


def attention_program(config: ModelConfig, implementation: Implementation, batch: Batch, gradient: bool) -> Program:
    """Makes frames and attention of one block for random q, k, v and a, rows unpacked beforehand.

    The gradient is that with respect to these and the projections.
    """
    forward = functools.partial(attention, config, implementation)
    inputs = functools.partial(random_inputs, config, len(batch.species))
    if not gradient:
        return Program(jax.jit(forward), lambda: (inputs(), jax.jit(unpacked)(batch)))

    def with_gradient(inputs: dict, batch: Batch, gradient: jax.Array) -> tuple[jax.Array, dict]:
        output, transpose = jax.vjp(lambda inputs: forward(inputs, batch), inputs)
        return output, transpose(gradient)[0]

    return Program(jax.jit(with_gradient), lambda: (inputs(), jax.jit(unpacked)(batch), inputs(seed=1)["v"]))


def attention(
    config: ModelConfig, implementation: Implementation, inputs: dict, batch: Batch, frames: jax.Array | None = None
) -> jax.Array:
    """Frames, unless they are given, and attention of one block: [N, H, d_v] from `random_inputs`, a batch unpacked."""
    q, k, v, a = (inputs[name] for name in "qkva")
    if config.uses_frames and frames is None:
        frames = block_frames(config.frame_method, q, k, a, batch, config.tie_tolerance, implementation=implementation)
    w_dist, w_angle = inputs.get("w_dist"), inputs.get("w_angle")
    factors = config.value_pe_dist_coef, config.value_pe_angle_coef
    encoding = ValueEncoding(w_dist, w_angle, value_bases(config, 0), *factors)
    return framed_attention(q, k, v, a, batch.rows, frames, encoding, implementation)


def random_inputs(config: ModelConfig, num_atoms: int, seed: int = 0) -> dict[str, jax.Array]:
    """Draws q, k [N, H, d_k], v [N, H, d_v], a [N, H] (1/Å^2) and the projections of a block, of the order of one."""
    rng, heads = np.random.default_rng(seed), config.head_num
    distances, angles = value_bases(config, 0).sizes
    shapes: dict[str, tuple[int, ...]] = {name: (num_atoms, heads, config.k_dim) for name in "qk"}
    shapes["v"] = (num_atoms, heads, config.v_dim)
    shapes |= {"w_dist": (heads, config.v_dim, distances), "w_angle": (3, heads, config.v_dim, angles)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items() if math.prod(shape)}
    inputs["a"] = -rng.uniform(0.5, 1.5, (num_atoms, heads)) / (2 * config.scale_of_block(0) ** 2)
    return {name: jnp.asarray(x, config.dtype) for name, x in inputs.items()}
