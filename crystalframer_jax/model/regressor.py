"""CrystalFramer: embedding of the elements, transformer blocks, pooling over atoms, output layers (Flax Linen)."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystalframer_jax.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.basis import EXACT
from crystalframer_jax.model.encoder import EncoderBlock

NUM_ELEMENTS = 98


class CrystalFramer(nn.Module):
    """Predicts T standardised properties of each crystal of a batch (ICLR 2025; Crystalformer if without frames).

    Collections: `params` (trained), `calibration` (scale and shift of the Gaussian widths of each block, fixed by the
    first training batch) and, if made mutable, `intermediates` (frames [N, H, 3, 3] and exponents a [N, H]).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        batch: Batch,
        frame_key: jax.Array | None = None,
        calibrate: bool = False,
        given_frames: Sequence[jax.Array] | None = None,
    ) -> jax.Array:
        """Standardised predictions [B, T]; 0-atom padding crystals get meaningless finite numbers.

        Args:
          frame_key: draws one of several equally good frames (training); None takes the first (evaluation).
          calibrate: measure and store the calibration on this batch; needs `mutable=["calibration"]`.
          given_frames: frames [N, H, 3, 3] of every block, instead of computing them.
        """
        config = self.config
        x = self._embed(batch)
        for block in range(config.num_layers):
            frames = None if given_frames is None else given_frames[block]
            layer = EncoderBlock(config, block, name=f"block_{block}")
            x = layer(x, batch, frame_key, calibrate, frames)

        widths = list(config.embedding_dim)
        if config.pre_pooling_op.startswith("w"):
            x = _head_layer(x, widths.pop(0), "pre_pooling")
        if config.pre_pooling_op.endswith("relu"):
            x = nn.relu(x)
        x = _pool(x, batch, config.pooling)
        for i, width in enumerate(widths):
            x = nn.relu(_head_layer(x, width, f"dense_{i}"))
        return _head_layer(x, config.num_targets, "output")

    def _embed(self, batch: Batch) -> jax.Array:
        """Sum of the element embeddings weighted by occupancy, [N, D]."""
        config = self.config
        std = config.model_dim**-0.5 * (9 * config.num_layers) ** -0.25
        table = self.param("embedding", nn.initializers.normal(std), (NUM_ELEMENTS, config.model_dim))
        occupancies = batch.occupancies
        if occupancies is None:
            occupancies = jax.nn.one_hot(batch.species - 1, NUM_ELEMENTS)
        return jnp.matmul(occupancies.astype(table.dtype), table, precision=EXACT)


def _head_layer(x: jax.Array, width: int, name: str) -> jax.Array:
    """A dense layer with weights and biases uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(x.shape[-1])

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=init, bias_init=init, precision=EXACT, name=name)(x)


def _pool(x: jax.Array, batch: Batch, how: str) -> jax.Array:
    """Mean ("avr") or maximum ("max") over the atoms of each crystal, [B, D]; 0 for padding crystals."""
    crystals = batch.crystal_sizes.shape[0]
    if how == "max":
        pooled = jax.ops.segment_max(x, batch.crystal_of_atom, crystals)
        return jnp.where(batch.crystal_sizes[:, None] > 0, pooled, 0)
    total = jax.ops.segment_sum(x, batch.crystal_of_atom, crystals)
    return total / jnp.maximum(batch.crystal_sizes, 1)[:, None].astype(x.dtype)
