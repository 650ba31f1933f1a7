"""Programs to measure: training steps and predictions of whole models, and the attention of one block alone."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking.cases import TARGET, unit_cell
from benchmarking.timing import Program
from crystalframer_jax.batching.batch import Batch, pack, unpacked
from crystalframer_jax.batching.shapes import shape_for
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ModelConfig, TrainConfig
from crystalframer_jax.inference.forward import make_forward
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.model.encoder import value_bases
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.structures.neighbors import neighbor_rows
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

    @functools.cached_property
    def model(self) -> ModelConfig:
        """Its model."""
        return self.config.model

    @functools.cached_property
    def state(self) -> TrainState:
        """The state that a training starts from, calibrated on one small crystal; takes seconds to compile."""
        cell, indices = unit_cell(), np.array([0])
        table = make_table([cell], [neighbor_rows(cell, SMALL_CUTOFF)])
        shape = shape_for(table, indices, self.model.parts)
        batch = pack(table, indices, [shape], np.zeros((1, self.model.num_targets)))
        recipe = make_recipe(self.config, STEPS_PER_EPOCH)
        return initial_state(CrystalFramer(self.model, "xla"), recipe, batch, jax.random.key(0))


def train_step_program(variant: Variant, batch: Batch, implementation: Implementation) -> Program:
    """The step of a training, from the initial weights on; the state goes from run to run."""
    model, recipe = CrystalFramer(variant.model, implementation), make_recipe(variant.config, STEPS_PER_EPOCH)
    step = make_train_step(recipe, make_loss(model, recipe, STATISTICS, jax.random.key(1)))

    def arguments() -> tuple[TrainState, Batch]:
        return jax.tree.map(jnp.copy, variant.state), jax.device_put(batch)  # runs consume their state

    return Program(step, arguments, advance=lambda given, result: (result[0], given[1]))


def forward_program(variant: Variant, batch: Batch, implementation: Implementation) -> Program:
    """A prediction, from the packed batch to standardised targets [B, T]."""
    forward = make_forward(CrystalFramer(variant.model, implementation))

    def arguments() -> tuple[dict[str, Any], Batch]:
        names = ("params", "calibration", "batch_stats")
        return {name: getattr(variant.state, name) for name in names}, jax.device_put(batch)

    return Program(forward, arguments)


def attention_program(variant: Variant, batch: Batch, implementation: Implementation, backward: bool) -> Program:
    """Frames and attention of one block for random q, k, v and a; with `backward` its gradient too.

    The gradient is that with respect to q, k, v, a and the projections; rows are unpacked beforehand.
    """
    model = variant.model
    forward = functools.partial(_attention, model, implementation)

    def forward_and_backward(
        inputs: dict[str, jax.Array], batch: Batch, gradient: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, transpose = jax.vjp(lambda inputs: forward(inputs, batch), inputs)
        return output, transpose(gradient)[0]

    def arguments() -> tuple:
        rows = jax.jit(unpacked)(batch)
        inputs = random_inputs(model, len(batch.species))
        gradient = random_inputs(model, len(batch.species), seed=1)["v"]
        return (inputs, rows, gradient) if backward else (inputs, rows)

    return Program(jax.jit(forward_and_backward if backward else forward), arguments)


def _attention(
    config: ModelConfig, implementation: Implementation, inputs: dict[str, jax.Array], batch: Batch
) -> jax.Array:
    """[N, H, d_v] from `random_inputs`."""
    q, k, v, a = (inputs[name] for name in "qkva")
    frames = None
    if config.uses_frames:
        frames = block_frames(config.frame_method, q, k, a, batch, config.tie_tolerance, implementation=implementation)
    encoding = ValueEncoding(
        inputs.get("w_dist"),
        inputs.get("w_angle"),
        value_bases(config, 0),
        config.value_pe_dist_coef,
        config.value_pe_angle_coef,
    )
    return framed_attention(q, k, v, a, batch.rows, frames, encoding, implementation)


def random_inputs(config: ModelConfig, num_atoms: int, seed: int = 0) -> dict[str, jax.Array]:
    """q, k [N, H, d_k], v [N, H, d_v], a [N, H] (1/Å^2) and the projections of a block, of the order of one."""
    rng, heads = np.random.default_rng(seed), config.head_num
    distances, angles = value_bases(config, 0).sizes
    shapes: dict[str, tuple[int, ...]] = {name: (num_atoms, heads, config.k_dim) for name in "qk"}
    shapes["v"] = (num_atoms, heads, config.v_dim)
    shapes |= {"w_dist": (heads, config.v_dim, distances), "w_angle": (3, heads, config.v_dim, angles)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items() if math.prod(shape)}
    inputs["a"] = -rng.uniform(0.5, 1.5, (num_atoms, heads)) / (2 * config.scale_of_block(0) ** 2)
    return {name: jnp.asarray(x, config.dtype) for name, x in inputs.items()}
