"""Gaussian bases of distances and of direction cosines (paper, section on value encodings)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

EXACT = jax.lax.Precision.HIGHEST  # never TF32 in the lattice sums
MAX_EXPONENT = 40.0  # of each factor below, so that the product of two does not overflow float32 (exp(88))


@dataclasses.dataclass(frozen=True)
class DistanceBasis:
    """D Gaussians of the distance, centres mu_t = t r_max / D (t = 1..D), sigma = width_scale r_max / D (Å)."""

    size: int
    r_max: float
    width_scale: float

    def __call__(self, distance: jax.Array) -> jax.Array:
        """exp(-(d - mu_t)^2 / 2 sigma^2): [..., D] for distances [...] in Å."""
        spacing = self.r_max / self.size
        centers = jnp.asarray(spacing * np.arange(1, self.size + 1), distance.dtype)
        return jnp.exp(-0.5 * ((distance[..., None] - centers) / (self.width_scale * spacing)) ** 2)


@dataclasses.dataclass(frozen=True)
class AngleBasis:
    """D Gaussians of a cosine c, centres evenly spaced from -1 (0 if `cos_abs`) to 1, width in units of the spacing.

    The centres are split into A groups of B neighbors, middle c_a and offsets o_b, so that with any constant c_0

        exp(-s (c - c_a - o_b)^2) = exp(-s (c - c_a)^2) * exp(2 s (c - c_0) o_b) * constant[a, b]

    needs A + B exponentials instead of A * B, and a weighted sum over neighbors is an A x M by M x B product.
    """

    size: int
    width_scale: float
    cos_abs: bool = False

    @property
    def centers(self) -> np.ndarray:
        """The D centres, ascending."""
        return np.linspace(0.0 if self.cos_abs else -1.0, 1.0, self.size)

    @functools.cached_property
    def sharpness(self) -> float:
        """s = 1 / (2 sigma^2)."""
        return 0.5 / (self.width_scale * (self.centers[1] - self.centers[0])) ** 2

    @functools.cached_property
    def group_size(self) -> int:
        """B: the largest divisor of D up to 8 for which no exponent exceeds MAX_EXPONENT."""
        half_range = 0.5 * (self.centers[-1] - self.centers[0])
        spacing = self.centers[1] - self.centers[0]
        largest = 1 + MAX_EXPONENT / (2 * self.sharpness * half_range * 0.5 * spacing)
        return max(size for size in range(1, 9) if self.size % size == 0 and size <= largest)

    @functools.cached_property
    def groups(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Middles c_a [A], offsets o_b [B], and c_0."""
        centers = self.centers.reshape(-1, self.group_size)
        middles = centers.mean(axis=1)
        return middles, centers[0] - middles[0], 0.5 * (self.centers[0] + self.centers[-1])

    def argument(self, cosine: jax.Array) -> jax.Array:
        """What the Gaussians are functions of: c, or |c|."""
        return jnp.abs(cosine) if self.cos_abs else cosine

    def weighted_sum(self, c: jax.Array, weights: jax.Array) -> jax.Array:
        """sum_m weights_m b_t(c_m): [..., M], [..., M] -> [..., D]."""
        first, second = self._factors(c.reshape(-1, c.shape[-1]))
        first = first * weights.reshape(-1, 1, c.shape[-1])
        sums = jnp.einsum("xam,xbm->xab", first, second, precision=EXACT)
        return (sums * jnp.asarray(self.constant, c.dtype)).reshape(*c.shape[:-1], self.size)

    def combination(self, c: jax.Array, coefficients: jax.Array) -> jax.Array:
        """sum_et coefficients_et b_t(c_em), the transpose of `weighted_sum`: [..., E, M], [..., E, D] -> [..., M]."""
        first, second = self._factors(c.reshape(-1, c.shape[-1]))
        grouped = coefficients.reshape(-1, *self.constant.shape) * jnp.asarray(self.constant, c.dtype)
        half = jnp.einsum("xab,xbm->xam", grouped, second, precision=EXACT)
        terms = (half * first).reshape(*c.shape[:-2], -1, c.shape[-1])
        return jnp.sum(terms, axis=-2)  # one reduction over axes and groups: two in a row are slow on a CPU

    def _factors(self, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        """exp(-s (c - c_a)^2) [x, A, M] and exp(2 s (c - c_0) o_b) [x, B, M] for c [x, M]."""
        middles, offsets, origin = self.groups
        first = jnp.exp(-self.sharpness * (c[:, None, :] - jnp.asarray(middles, c.dtype)[:, None]) ** 2)
        second = jnp.exp((c[:, None, :] - origin) * jnp.asarray(2 * self.sharpness * offsets, c.dtype)[:, None])
        return first, second

    @functools.cached_property
    def constant(self) -> np.ndarray:
        """constant[a, b] = exp(-2 s (c_a - c_0) o_b - s o_b^2), [A, B] float64."""
        middles, offsets, origin = self.groups
        return np.exp(-self.sharpness * (2 * np.outer(middles - origin, offsets) + offsets**2))


@dataclasses.dataclass(frozen=True)
class Bases:
    """The value encodings of a block; None where an encoding is switched off."""

    distance: DistanceBasis | None
    angle: AngleBasis | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of distance and of angle Gaussians, 0 for none."""
        return self.distance.size if self.distance else 0, self.angle.size if self.angle else 0
