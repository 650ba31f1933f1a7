"""The transformer block of CrystalFramer and its initialisation (Flax Linen)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from crystalframer_jax.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.model.basis import EXACT, AngleBasis, Bases, DistanceBasis
from crystalframer_jax.model.frames import max_frames, row_seeds

ACTIVATIONS = {"relu": nn.relu, "gelu": lambda x: nn.gelu(x, approximate=False)}


def scaled_xavier(gain: float) -> jax.nn.initializers.Initializer:
    """Xavier uniform initialisation times `gain`."""
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def t_fixup_gain(num_layers: int) -> float:
    """Factor of T-Fixup on the initial value, output and feed-forward weights (0.67 L^-1/4)."""
    return 0.67 * num_layers**-0.25


def value_bases(config: ModelConfig, block: int) -> Bases:
    """Distance and angle bases of a block; lengths in Å."""
    r_max = config.value_pe_dist_max
    r_max = r_max if r_max > 0 else -r_max * config.scale_of_block(block)
    distance = DistanceBasis(config.value_pe_dist_real, r_max, config.value_pe_dist_wscale)
    angle = AngleBasis(config.value_pe_angle_real, config.value_pe_angle_wscale, bool(config.cos_abs))
    return Bases(distance if distance.size else None, angle if angle.size else None)


class SelfAttention(nn.Module):
    """Multi-head attention over the periodic neighbours of every atom."""

    config: ModelConfig
    block: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        batch: Batch,
        frame_key: jax.Array | None,
        calibrate: bool,
        given_frames: jax.Array | None,
    ) -> jax.Array:
        """x [N, D] -> [N, D]; see CrystalFramer for the other arguments."""
        config = self.config
        heads, k_dim, v_dim = config.head_num, config.k_dim, config.v_dim
        fixup = t_fixup_gain(config.num_layers)

        def project(name: str, dim: int, gain: float) -> jax.Array:
            dense = nn.Dense(heads * dim, kernel_init=scaled_xavier(gain), precision=EXACT, name=name)
            return dense(x).reshape(-1, heads, dim)

        q, k, v = project("q", k_dim, 1.0), project("k", k_dim, 1.0), project("v", v_dim, fixup)
        a = self._gaussian_exponents(q, batch, calibrate)
        self.sow("intermediates", "a", a)

        bases = value_bases(config, self.block)
        frames = given_frames
        if frames is None and bases.angle:
            seeds = None
            if frame_key is not None:
                key = jax.random.fold_in(frame_key, self.block)
                seeds = row_seeds(key, batch.crystal_of_atom, batch.atom_in_crystal, heads)
            frames = max_frames(q, k, a, batch.rows, config.tie_tolerance, seeds)
        self.sow("intermediates", "frames", frames)

        encoding = ValueEncoding(
            w_dist=self._encoding_weights("w_dist", 1, bases.sizes[0])[0] if bases.distance else None,
            w_angle=self._encoding_weights("w_angle", 3, bases.sizes[1]) if bases.angle else None,
            bases=bases,
            dist_coef=config.value_pe_dist_coef,
            angle_coef=config.value_pe_angle_coef,
        )
        output = framed_attention(q, k, v, a, batch.rows, frames, encoding)
        output = output.reshape(-1, heads * v_dim)
        return nn.Dense(config.model_dim, kernel_init=scaled_xavier(fixup), precision=EXACT, name="out")(output)

    def _gaussian_exponents(self, q: jax.Array, batch: Batch, calibrate: bool) -> jax.Array:
        """a = -rho / (2 r0^2) [N, H], 1/Å^2: the width of each atom's attention Gaussian, from its query."""
        config = self.config
        w_pos = self.param("w_pos", nn.initializers.normal(config.k_dim**-0.5), q.shape[1:], q.dtype)
        alpha = jnp.einsum("nhd,hd->nh", q, w_pos, precision=EXACT)
        scale = self.variable("calibration", "scale", jnp.ones, (), q.dtype)
        shift = self.variable("calibration", "shift", jnp.zeros, (), q.dtype)
        if calibrate:
            real = (batch.species > 0)[:, None]
            number = jnp.sum(real) * alpha.shape[1]
            mean = jnp.sum(alpha, where=real) / number
            variance = jnp.sum((alpha - mean) ** 2, where=real) / (number - 1)
            scale.value, shift.value = variance**-0.5, -mean
        alpha = (alpha + jax.lax.stop_gradient(shift.value)) * jax.lax.stop_gradient(scale.value)
        span = 1 - config.gauss_lb_real
        rho = span * nn.elu(config.positive_func_beta * alpha / span) + 1
        return -rho / (2 * config.scale_of_block(self.block) ** 2)

    def _encoding_weights(self, name: str, axes: int, size: int) -> jax.Array:
        """[axes, H, d_v, D]: Xavier uniform with gain D^-1/2, each axis as a [H * d_v, D] matrix."""
        heads, v_dim = self.config.head_num, self.config.v_dim

        def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            bound = size**-0.5 * math.sqrt(6 / (heads * v_dim + size))
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return self.param(name, init, (axes, heads, v_dim, size))


class EncoderBlock(nn.Module):
    """x <- x + attention(x); x <- x + W2 act(W1 x + b1) + b2. No layer norms: T-Fixup initialisation."""

    config: ModelConfig
    block: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        batch: Batch,
        frame_key: jax.Array | None = None,
        calibrate: bool = False,
        given_frames: jax.Array | None = None,
    ) -> jax.Array:
        """x [N, D] -> [N, D]."""
        config = self.config
        init = scaled_xavier(t_fixup_gain(config.num_layers))
        x = x + SelfAttention(config, self.block, name="attention")(x, batch, frame_key, calibrate, given_frames)
        hidden = nn.Dense(config.ff_dim, kernel_init=init, precision=EXACT, name="linear1")(x)
        hidden = ACTIVATIONS[config.t_activation](hidden)
        return x + nn.Dense(config.model_dim, kernel_init=init, precision=EXACT, name="linear2")(hidden)
