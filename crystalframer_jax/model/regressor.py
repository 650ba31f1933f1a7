"""CrystalFramer: embedding of the elements, transformer blocks, pooling over atoms, output layers (Flax Linen)."""

import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Batch, unpacked
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.encoder import EncoderBlock
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.layers import head_layer, head_norm, layer_norm
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.ops.random_bits import draw
from crystalframer_jax.parallel.devices import psum

NUM_ELEMENTS = 98


class CrystalFramer(nn.Module):
    """Predicts T standardised properties of each crystal of a batch (ICLR 2025; Crystalformer if without frames).

    Collections: `params` (trained), `calibration` (scale and shift of the Gaussian widths of each block, fixed by the
    first training batch; only with normalize_gauss), `batch_stats` (running averages; only with norm_type=bn) and, if
    made mutable, `intermediates` (frames [N, H, 3, 3] and exponents a [N, H]).

    `implementation` of the attention, see `framed_attention`; it changes results by rounding only. `axis` names the
    devices among which a training batch is shared, see `parallel.Devices`: what is measured on the batch is then
    measured on all of it.
    """

    config: ModelConfig
    implementation: Implementation = "auto"
    axis: str | None = None

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        frame_seeds: jax.Array | None = None,
        calibrate: bool = False,
        given_frames: Sequence[jax.Array] | None = None,
        train: bool = False,
        freeze_norm: bool = False,
        only_vectors: bool = False,
        dropout_seeds: jax.Array | None = None,
    ) -> Any:
        """Standardised predictions [B, T]; 0-atom padding crystals get meaningless finite numbers.

        Args:
          frame_seeds: random numbers [B] uint32 that draw one of several equally good frames (training); None: the
            crystal chooses (evaluation).
          calibrate: measure and store the calibration on this batch; needs `mutable=["calibration"]`.
          given_frames: frames [N, H, 3, 3] of every block, instead of computing them.
          train: dropout (needs `dropout_seeds`) and BatchNorm by this batch (needs `mutable=["batch_stats"]`).
          freeze_norm: BatchNorm by its running averages all the same.
          only_vectors: return what the output layers read, the vectors of the atoms [N, D] and pooled ones [B, D].
          dropout_seeds: random numbers [B] uint32 that draw what is dropped in training.
        """
        batch = unpacked(batch)
        config, by_batch = self.config, train and not freeze_norm
        if not (train and config.dropout):
            dropout_seeds = None
        elif dropout_seeds is None:
            raise ValueError("dropout in training needs dropout_seeds")
        x = self._embed(batch, train)
        x = self._blocks(x, batch, frame_seeds, calibrate, given_frames, dropout_seeds)
        if not config.t_fixup_init:
            x = layer_norm(config, x, "norm")

        widths = list(config.embedding_dim)
        if config.pre_pooling_op.startswith("w"):
            x = head_layer(config, x, widths.pop(0), "pre_pooling")
        if config.pre_pooling_op == "w+bn+relu":
            x = head_norm(config, x, batch.species > 0, "pre_pooling_norm", by_batch, self.axis)
        if config.pre_pooling_op.endswith("relu"):
            x = nn.relu(x)
        atoms = x
        x = _pool(x, batch, config.pooling)
        if only_vectors:
            return atoms, x
        for i, width in enumerate(widths):
            x = head_layer(config, x, width, f"dense_{i}")
            x = nn.relu(head_norm(config, x, batch.crystal_sizes > 0, f"dense_{i}_norm", by_batch, self.axis))
        return head_layer(config, x, config.num_targets, "output")

    def _blocks(
        self,
        x: jax.Array,
        batch: Batch,
        frame_seeds: jax.Array | None,
        calibrate: bool,
        given_frames: Sequence[jax.Array] | None,
        dropout_seeds: jax.Array | None,
    ) -> jax.Array:
        """The transformer blocks, [N, D] -> [N, D]. Blocks of equal settings share one compiled body, in a loop.

        Where `intermediates` are asked for, and for the initial weights, they come one after the other.
        """
        config, number_of_blocks, period = self.config, self.config.num_layers, self.config.period_of_blocks
        names = [f"block_{number}" for number in range(number_of_blocks)]
        frames_of_blocks = [None] * number_of_blocks if given_frames is None else given_frames

        def block(number: int, **others: Any) -> EncoderBlock:
            return EncoderBlock(config, number, self.implementation, self.axis, **others)

        def given(number: Any, frames: jax.Array | None) -> dict[str, Any]:
            """The arguments of a block."""
            seeds = {"frame_seeds": frame_seeds, "dropout_seeds": dropout_seeds}
            seeds = {name: None if all_seeds is None else draw(all_seeds, number) for name, all_seeds in seeds.items()}
            return {**seeds, "given_frames": frames, "calibrate": calibrate}

        asks_for_each = self.is_initializing() or self.is_mutable_collection("intermediates")
        if asks_for_each or period == number_of_blocks:
            for number, (name, frames) in enumerate(zip(names, frames_of_blocks, strict=True)):
                x = block(number, name=name)(x, batch, **given(number, frames))
            return x

        def one_turn(x: jax.Array, of_turn: tuple) -> tuple[jax.Array, list[Any]]:
            updates = []
            for place, (variables, number, frames) in enumerate(zip(*of_turn, strict=True)):
                x, update = block(place, parent=None).apply(
                    variables, x, batch, mutable=["calibration"] if calibrate else [], **given(number, frames)
                )
                updates.append(update)
            return x, updates

        def of(name: str) -> dict[str, Any]:
            return {kind: found[name] for kind, found in self.variables.items() if name in found}

        def by_place(values: Sequence[Any]) -> list[Any]:
            """Stacks what belongs to the blocks of the same place in every turn."""
            return [jax.tree.map(lambda *x: jnp.stack(x), *values[place::period]) for place in range(period)]

        together = [of(f"blocks_{place}") for place in range(period)]  # in a training step, see training.layout
        variables = together if together[0] else by_place([of(name) for name in names])
        turns = variables, by_place(range(number_of_blocks)), by_place(frames_of_blocks)
        x, updates = jax.lax.scan(one_turn, x, turns)
        for number, name in enumerate(names):
            turn, place = divmod(number, period)
            for kind, update in updates[place].items():
                self.put_variable(kind, name, jax.tree.map(operator.itemgetter(turn), update))
        return x

    def _embed(self, batch: Batch, train: bool) -> jax.Array:
        """Sum of the element embeddings weighted by occupancy, [N, D]."""
        config = self.config
        std = config.model_dim**-0.5
        if config.t_fixup_init:
            std *= (9 * config.num_layers) ** -0.25
        shape = (NUM_ELEMENTS, config.model_dim)
        table = self.param("embedding", nn.initializers.normal(std), shape, config.dtype)
        occupancies = batch.occupancies
        if occupancies is None:
            occupancies = jax.nn.one_hot(batch.species - 1, NUM_ELEMENTS)
        occupancies = occupancies.astype(table.dtype)
        x = jnp.matmul(occupancies, table, precision=EXACT)
        if config.scale_grad and train:
            factor = rarity(occupancies, batch, config.scale_grad, self.axis)[:, None]
            x = x + (factor - 1) * (x - jax.lax.stop_gradient(x))  # x itself, with a gradient times `factor`
        return x


def rarity(occupancies: jax.Array, batch: Batch, largest: float, axis: str | None = None) -> jax.Array:
    """Factors [N] that raise the gradients of rare elements (scale_grad), at most `largest`.

    Inverse of the mean share of the element in the crystals of the batch, divided by its mean over the atoms.
    """
    crystals = psum(jnp.sum(batch.crystal_sizes > 0), axis)
    share = psum(jnp.sum(_pool(occupancies, batch, "avr"), axis=0), axis) / crystals
    frequency = jnp.matmul(occupancies, share, precision=EXACT)
    real = frequency > 0
    inverse = jnp.where(real, 1 / jnp.where(real, frequency, 1), 0)
    mean = psum(jnp.sum(inverse), axis) / jnp.maximum(psum(jnp.sum(real), axis), 1)
    return jnp.minimum(inverse / jnp.where(mean > 0, mean, 1), largest)


def _pool(x: jax.Array, batch: Batch, how: str) -> jax.Array:
    """Mean ("avr") or maximum ("max") over the atoms of each crystal, [B, D]; 0 for padding crystals."""
    crystals = batch.crystal_sizes.shape[0]
    if how == "max":
        # The gradient finds the largest by comparison: without the barrier XLA may compute x twice, rounded otherwise.
        x = jax.lax.optimization_barrier(x)
        pooled = jax.ops.segment_max(x, batch.crystal_of_atom, crystals)
        return jnp.where(batch.crystal_sizes[:, None] > 0, pooled, 0)
    # A product, because sums by index (scatter) come out in any order on a GPU, other bits every time. What is not
    # finite is taken out of it, 0 * NaN being NaN: it belongs to its own crystal alone.
    is_of_crystal = batch.crystal_of_atom == jnp.arange(crystals)[:, None]
    finite = jnp.all(jnp.isfinite(x), axis=1)
    total = jnp.matmul(is_of_crystal.astype(x.dtype), jnp.where(finite[:, None], x, 0), precision=EXACT)
    total = jnp.where(jnp.any(is_of_crystal & ~finite, axis=1)[:, None], jnp.nan, total)
    return total / jnp.maximum(batch.crystal_sizes, 1)[:, None].astype(x.dtype)
