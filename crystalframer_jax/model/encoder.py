"""The transformer block of CrystalFramer and its initialisation (Flax Linen)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.attention import ValueEncoding, framed_attention, reciprocal_attention
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.layers import ACTIVATIONS, Initializer, block_layer, layer_norm, t_fixup_gain
from crystalframer_jax.ops.basis import EXACT, AngleBasis, Bases, DistanceBasis
from crystalframer_jax.ops.random_bits import draw, row_seeds, thinned
from crystalframer_jax.ops.reciprocal import WaveVectors
from crystalframer_jax.parallel.devices import sum_in_order

NO_SPREAD = 1e-5  # standard deviation of the width logits, relative to their mean, that is rounding only


def value_bases(config: ModelConfig, block: int) -> Bases:
    """Distance and angle bases of a block; lengths in Å."""
    r_max = config.value_pe_dist_max
    r_max = r_max if r_max > 0 else -r_max * config.scale_of_block(block)
    distance = DistanceBasis(config.value_pe_dist_real, r_max, config.value_pe_dist_wscale)
    angle = AngleBasis(config.value_pe_angle_real, config.value_pe_angle_wscale, bool(config.cos_abs))
    return Bases(distance if distance.size else None, angle if angle.size else None)


class SelfAttention(nn.Module):
    """Multi-head attention over the periodic neighbors of every atom, or over its cell in reciprocal space."""

    config: ModelConfig
    block: int
    implementation: Implementation = "auto"
    axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        batch: Batch,
        frame_seeds: jax.Array | None = None,
        calibrate: bool = False,
        given_frames: jax.Array | None = None,
        dropout_seeds: jax.Array | None = None,
    ) -> jax.Array:
        """x [N, D] -> [N, D]; see EncoderBlock for the other arguments."""
        config = self.config
        heads, k_dim, v_dim = config.head_num, config.k_dim, config.v_dim
        gain = t_fixup_gain(config)
        q = block_layer(config, x, heads * k_dim, "q", 1.0).reshape(-1, heads, k_dim)
        k = block_layer(config, x, heads * k_dim, "k", 1.0).reshape(-1, heads, k_dim)
        v = block_layer(config, x, heads * v_dim, "v", gain).reshape(-1, heads, v_dim)
        widths = self._width_logits(x, q, batch, calibrate)

        seeds = None
        if dropout_seeds is not None:
            seeds = row_seeds(dropout_seeds, batch.crystal_of_atom, batch.atom_in_crystal, heads)
        domain = config.domain_of_block(self.block)
        real_heads = {"real": heads, "multihead": heads // 2}.get(domain, 0)
        outputs, exponents = [], []
        for part in (slice(0, real_heads), slice(real_heads, heads)):
            if part.start == part.stop:
                continue
            qkv = q[:, part], k[:, part], v[:, part]
            drops: Any = {"dropout": config.dropout, "seeds": None if seeds is None else seeds[:, part]}
            if part.stop <= real_heads:
                a = -self._rho(widths[:, part], config.gauss_lb_real) / (2 * config.scale_of_block(self.block) ** 2)
                outputs.append(self._real((*qkv, a), batch, frame_seeds, given_frames, drops))
            else:
                if batch.cells is None:
                    raise ValueError("attention in reciprocal space needs batches with cells; see ModelConfig.parts")
                rho = self._rho(widths[:, part], config.gauss_lb_reci)
                rho = 1 / rho if domain == "RECI" else rho
                a = -rho * config.reciprocal_scale_of_block(self.block) ** 2 / 2  # Å^2
                waves = WaveVectors(config.lattice_range)
                outputs.append(
                    qkv[2] if self.is_initializing() else reciprocal_attention(*qkv, a, batch.cells, waves, **drops)
                )
            exponents.append(a)
        self.sow("intermediates", "a", jnp.concatenate(exponents, axis=1))
        output = jnp.concatenate(outputs, axis=1).reshape(-1, heads * v_dim)
        return block_layer(config, output, config.model_dim, "out", gain)

    def _real(
        self, qkva: tuple, batch: Batch, frame_seeds: jax.Array | None, frames: jax.Array | None, drops: Any
    ) -> jax.Array:
        """Attention in real space, with frames if there is an angle basis: [N, H, d_v]; a in 1/Å^2."""
        q, k, v, a = qkva
        config, bases = self.config, value_bases(self.config, self.block)
        if frames is None and bases.angle and not self.is_initializing():
            draws = None
            if frame_seeds is not None:
                draws = row_seeds(frame_seeds, batch.crystal_of_atom, batch.atom_in_crystal, q.shape[1])
            frames = block_frames(config.frame_method, q, k, a, batch, config.tie_tolerance, draws, self.implementation)
        self.sow("intermediates", "frames", frames)
        shape = v.shape[1:]
        encoding = ValueEncoding(
            w_dist=self._encoding_weights("w_dist", (1, *shape, bases.sizes[0]))[0] if bases.distance else None,
            w_angle=self._encoding_weights("w_angle", (3, *shape, bases.sizes[1])) if bases.angle else None,
            bases=bases,
            dist_coef=config.value_pe_dist_coef,
            angle_coef=config.value_pe_angle_coef,
        )
        if self.is_initializing():  # no weight depends on the sums, which take long to trace and to compile
            return v
        return framed_attention(q, k, v, a, batch.rows, frames, encoding, self.implementation, **drops)

    def _width_logits(self, x: jax.Array, q: jax.Array, batch: Batch, calibrate: bool) -> jax.Array:
        """What the widths of the attention Gaussians are functions of, calibrated: [N, H]."""
        config = self.config
        if config.gauss_state.startswith("x"):
            w_pos = self.param("w_pos", width_init(config), (config.head_num, config.model_dim), config.dtype)
            logits = jnp.einsum("nd,hd->nh", x, w_pos, precision=EXACT)
        else:
            w_pos = self.param("w_pos", width_init(config), q.shape[1:], config.dtype)
            state = jnp.ones_like(q) if config.gauss_state == "1" else q
            logits = jnp.einsum("nhd,hd->nh", state, w_pos, precision=EXACT)
        if not config.normalize_gauss:
            return logits
        scale = self.variable("calibration", "scale", jnp.ones, (), config.dtype)
        shift = self.variable("calibration", "shift", jnp.zeros, (), config.dtype)
        if calibrate:
            real = (batch.species > 0)[:, None]
            number = sum_in_order(jnp.sum(real), self.axis) * logits.shape[1]
            mean = sum_in_order(jnp.sum(logits, where=real), self.axis) / number
            variance = sum_in_order(jnp.sum((logits - mean) ** 2, where=real), self.axis) / (number - 1)
            varies = variance > (NO_SPREAD * mean) ** 2  # not so if one value is all there is
            scale.value, shift.value = jnp.where(varies, variance, 1) ** -0.5, -mean
        return (logits + jax.lax.stop_gradient(shift.value)) * jax.lax.stop_gradient(scale.value)

    def _rho(self, logits: jax.Array, lower_bound: float) -> jax.Array:
        """(1 - lb) ELU(beta logit / (1 - lb)) + 1, above lb."""
        span = 1 - lower_bound
        return span * nn.elu(self.config.positive_func_beta * logits / span) + 1

    def _encoding_weights(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """[axes, heads, d_v, D]: Xavier uniform with gain D^-1/2, each axis as a [H * d_v, D] matrix of all H heads."""
        *_, v_dim, size = shape
        heads = self.config.head_num

        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            bound = size**-0.5 * math.sqrt(6 / (heads * v_dim + size))
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return self.param(name, init, shape, self.config.dtype)


def width_init(config: ModelConfig) -> Initializer:
    """Initialisation of w_pos for each `gauss_state`: [H, d_k], or [H, D] where it weighs the layer input, not q."""
    normal = nn.initializers.normal
    heads, k_dim, dim = config.head_num, config.k_dim, config.model_dim
    if config.gauss_state == "x-xn2":

        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            first, second = jax.random.split(key)
            w1 = nn.initializers.xavier_uniform()(first, (heads * k_dim, dim), dtype).reshape(heads, k_dim, dim)
            w2 = normal(k_dim**-0.5)(second, (heads, k_dim), dtype)
            return jnp.einsum("hkd,hk->hd", w1, w2, precision=EXACT)

        return init
    if config.gauss_state == "x-xavier":
        return nn.initializers.xavier_uniform()
    fan_in = {"q-kdim": heads * k_dim, "x": dim, "x-norm": dim}.get(config.gauss_state, k_dim)
    return normal(fan_in**-0.5)


class EncoderBlock(nn.Module):
    """x <- x + attention(x); x <- x + W2 act(W1 x + b1) + b2; each sum layer-normalised unless T-Fixup is used."""

    config: ModelConfig
    block: int
    implementation: Implementation = "auto"
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch, dropout_seeds: jax.Array | None = None, **others: Any) -> jax.Array:
        """x [N, D] -> [N, D]; `others` are arguments of SelfAttention.

        Args:
          dropout_seeds: random numbers [B] uint32 that draw what is dropped in this block; None: nothing.
          frame_seeds: random numbers [B] uint32 of this block, see CrystalFramer; `calibrate`, `given_frames` as there.
        """
        config = self.config

        def normed(x: jax.Array, name: str) -> jax.Array:
            return x if config.t_fixup_init else layer_norm(config, x, name)

        def dropped(x: jax.Array, number: int) -> jax.Array:
            if dropout_seeds is None:
                return x
            seeds = draw(dropout_seeds, number)
            return thinned(x, row_seeds(seeds, batch.crystal_of_atom, batch.atom_in_crystal, 1), config.dropout)

        gain = t_fixup_gain(config)
        attention = SelfAttention(config, self.block, self.implementation, self.axis, name="attention")
        x = normed(x + dropped(attention(x, batch, dropout_seeds=dropout_seeds, **others), 0), "norm1")
        hidden = ACTIVATIONS[config.t_activation](block_layer(config, x, config.ff_dim, "linear1", gain))
        return normed(
            x + dropped(block_layer(config, dropped(hidden, 1), config.model_dim, "linear2", gain), 2), "norm2"
        )
