"""Attention weights in reciprocal space (Crystalformer, ICLR 2024, section on reciprocal space attention)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import CellRows
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.structures.lattice import integer_box

SMALLEST = 1e-6  # of the lattice sum inside the logarithm


@dataclasses.dataclass(frozen=True)
class WaveVectors:
    """The reciprocal lattice vectors k = n B with integer n in [-R, R]^3, R = `lattice_range`."""

    lattice_range: int

    @property
    def half(self) -> tuple[np.ndarray, np.ndarray]:
        """n [K, 3] of one of k and -k each, and how many k each stands for, [K] (1 for k = 0, else 2)."""
        grid = integer_box(self.lattice_range)
        half = grid[len(grid) // 2 :]
        return half, np.where(half.any(axis=1), 2.0, 1.0)

    def log_sums(self, a: jax.Array, cells: CellRows) -> jax.Array:
        """log max(sum_k exp(a |k|^2) cos(k . r_ij), 1e-6) for the atoms j of the cell of each atom i, [n, H, S].

        It is the periodic sum of Gaussians of r_ij up to a factor (-4 pi a)^(3/2) / V, which is the same for all j
        and drops out of the softmax. a [n, H] is negative, Å^2.
        """
        half, multiplicity = self.half
        grid = jnp.asarray(half, a.dtype)
        square = jnp.einsum("ki,nij,kj->nk", grid, cells.metric, grid, precision=EXACT)
        phase = 2 * jnp.pi * jnp.einsum("nsi,ki->nsk", cells.vector, grid, precision=EXACT)
        amplitude = jnp.exp(a[:, :, None] * square[:, None, :]) * jnp.asarray(multiplicity, a.dtype)
        sums = jnp.einsum("nhk,nsk->nhs", amplitude, jnp.cos(phase), precision=EXACT)
        return jnp.log(jnp.maximum(sums, SMALLEST))
