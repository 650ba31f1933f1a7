"""Dense layers and normalisations as the transformer blocks and the output layers use them (Flax Linen)."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.config import ModelConfig
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.parallel.devices import psum

Initializer = Callable[..., jax.Array]  # (key, shape, dtype)
ACTIVATIONS = {"relu": nn.relu, "gelu": lambda x: nn.gelu(x, approximate=False)}
BATCH_NORM_MOMENTUM = 0.1  # share of the newest batch in the running averages
EPSILON = 1e-5  # of all normalisations, as in PyTorch


class Dense(nn.Module):
    """x W + b in the type of x; if it `rounds`, from the `rounded_product`."""

    width: int
    kernel_init: Initializer
    bias_init: Initializer
    param_dtype: np.dtype
    rounds: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., width]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.width), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.width,), self.param_dtype)
        product = rounded_product(x, kernel) if self.rounds else jnp.matmul(x, kernel, precision=EXACT)
        return product + bias


@jax.custom_vjp
def rounded_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x W, [N, D] [D, width] -> [N, width], of float32 arrays that are rounded to bfloat16; sums are float32.

    Its gradients are such products as well, with the gradient of the result rounded: JAX's own would mix bfloat16 and
    float32 factors, which GPUs multiply as float32, much slower.
    """
    return _rounded_product(x, w)[0]


def _rounded_product(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    rounded = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return _summed(*rounded), rounded


def _gradients(rounded: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, w), gradient = rounded, gradient.astype(jnp.bfloat16)
    return _summed(gradient, w.T), _summed(x.T, gradient)


def _summed(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=EXACT, preferred_element_type=jnp.float32)


rounded_product.defvjp(_rounded_product, _gradients)


def block_layer(config: ModelConfig, x: jax.Array, width: int, name: str, gain: float) -> jax.Array:
    """A dense layer of a transformer block, in bfloat16 if `precision` says so; initially Xavier uniform * gain."""
    rounds = config.precision == "bfloat16"
    init = nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")
    return Dense(width, init, nn.initializers.zeros, config.dtype, rounds, name=name)(x)


def t_fixup_gain(config: ModelConfig) -> float:
    """Factor of T-Fixup on the initial value, output and feed-forward weights (0.67 L^-1/4); 1 without T-Fixup."""
    return 0.67 * config.num_layers**-0.25 if config.t_fixup_init else 1.0


def head_layer(config: ModelConfig, x: jax.Array, width: int, name: str) -> jax.Array:
    """A dense layer before the output, or the output; initial weights and biases uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(x.shape[-1])

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return Dense(width, init, init, config.dtype, name=name)(x)


def layer_norm(config: ModelConfig, x: jax.Array, name: str, affine: bool = True) -> jax.Array:
    """Layer normalisation over the features; with trained scale and bias if `affine`."""
    layer = nn.LayerNorm(
        epsilon=EPSILON, use_scale=affine, use_bias=affine, param_dtype=config.dtype, use_fast_variance=False, name=name
    )
    return layer(x)


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, as PyTorch's BatchNorm1d but for the running variance.

    `by_batch` mean and variance are those of the `real` rows on all devices of `axis`, else running averages in the
    collection `batch_stats`, whose variance is, as that which is used, the one with divisor n.
    """

    dtype: np.dtype
    by_batch: bool
    axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """x [B, D], real [B] -> [B, D]."""
        width = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width, jnp.float32)
        running_variance = self.variable("batch_stats", "var", jnp.ones, width, jnp.float32)
        mean, variance = running_mean.value, running_variance.value
        if self.by_batch:
            number = psum(jnp.sum(real), self.axis)
            mean = psum(jnp.sum(x, axis=0, where=real[:, None]), self.axis) / number
            variance = psum(jnp.sum((x - mean) ** 2, axis=0, where=real[:, None]), self.axis) / number
            if not self.is_initializing():
                running_mean.value += BATCH_NORM_MOMENTUM * (mean - running_mean.value)
                running_variance.value += BATCH_NORM_MOMENTUM * (variance - running_variance.value)
        scale = self.param("scale", nn.initializers.ones, width, self.dtype)
        bias = self.param("bias", nn.initializers.zeros, width, self.dtype)
        return (x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias


def head_norm(
    config: ModelConfig, x: jax.Array, real: jax.Array, name: str, by_batch: bool, axis: str | None = None
) -> jax.Array:
    """The normalisation `norm_type` of the output layers.

    bn: BatchNorm, over the crystals (or atoms) that are `real` [...] if `by_batch`, else by the running averages in
    the collection `batch_stats`. ln: LayerNorm. in: the same without trained parameters, which is what PyTorch's
    InstanceNorm1d makes of [B, D].
    """
    if config.norm_type == "bn":
        return BatchNorm(config.dtype, by_batch, axis, name=name)(x, real)
    if config.norm_type in ("ln", "in"):
        return layer_norm(config, x, name, affine=config.norm_type == "ln")
    return x
