"""Framed attention of one block: lattice sums, then the projection of the summed encodings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import CellRows, Rows
from crystalframer_jax.kernels import sums as kernels
from crystalframer_jax.model.implementation import Implementation, check_arrays, check_rows, difference, uses_kernels
from crystalframer_jax.ops.basis import EXACT, Bases
from crystalframer_jax.ops.lattice_sums import SumOptions, lattice_sums
from crystalframer_jax.ops.reciprocal import WaveVectors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ValueEncoding:
    """Projections of the summed bases of a block, and the bases themselves."""

    w_dist: jax.Array | None  # [H, d_v, D_dist]
    w_angle: jax.Array | None  # [3, H, d_v, D_angle]
    bases: Bases = dataclasses.field(metadata={"static": True})
    dist_coef: float = dataclasses.field(default=1.0, metadata={"static": True})
    angle_coef: float = dataclasses.field(default=1.0, metadata={"static": True})


def framed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    rows: Rows,
    frames: jax.Array | None,
    params: ValueEncoding,
    implementation: Implementation = "auto",
    *,
    dropout: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """Attention of every atom over its periodic neighbors, with distance and frame-angle encodings: [N, H, d_v].

    Per head: sum_m p_m v_j + c_dist W_dist sum_m p_m b_dist + c_angle sum_axis W_axis sum_{m, d>0} p_m b_angle with
    p = softmax over the row of q . k_j / sqrt(d_k) + alpha d^2.

    Args:
      q, k: [N, H, d_k].
      v: [N, H, d_v].
      alpha: [N, H] negative, 1/Å^2 (a = -rho / 2 r0^2).
      rows: neighbor rows [N, M], vectors in Å.
      frames: [N, H, 3, 3] with rows e1, e2, e3; None without angle encoding. They get no gradient.
      params: projections and bases.
      implementation: "xla"; "pallas" for GPU kernels (on a CPU they are interpreted, very slowly); "auto" for
        kernels where they work, else XLA.
      dropout, seeds: share of the pairs of atoms to drop from the sums, drawn from seeds [N, H] uint32.

    Raises:
      ValueError: unknown implementation, or one that does not work; frames and angle basis do not go together.
    """
    if (frames is None) != (params.bases.angle is None):
        raise ValueError("frames must be given exactly when there is an angle basis")
    options = SumOptions(params.bases, dropout=0.0 if seeds is None else dropout)
    check = functools.partial(_check, options, q.shape[1:], v.shape[-1], q.dtype)
    sums = kernels.lattice_sums if uses_kernels(implementation, "attention", check) else lattice_sums
    output, dist_sum, angle_sum = sums(options, q, k, v, alpha, rows, frames, seeds)
    if params.w_dist is not None:
        output += params.dist_coef * jnp.einsum("nht,hdt->nhd", dist_sum, params.w_dist, precision=EXACT)
    if params.w_angle is not None:
        output += params.angle_coef * jnp.einsum("nhet,ehdt->nhd", angle_sum, params.w_angle, precision=EXACT)
    return output


@functools.cache
def _check(options: SumOptions, q_shape: tuple[int, int], v_dim: int, dtype: np.dtype) -> str:
    """Why the kernels cannot be used with these options and q [N, *q_shape]; empty if they can."""
    heads, _ = q_shape
    q, k, v, a, frames = check_arrays(dtype, q_shape, q_shape, (heads, v_dim), (heads,), (heads, 3, 3))
    frames = frames / np.linalg.norm(frames, axis=-1, keepdims=True) if options.bases.angle else None
    seeds: Any = np.arange(a.size, dtype=np.uint32).reshape(a.shape) if options.dropout else None

    def sums_and_gradients(lattice_sums, q, k, v, a):
        sums, pullback = jax.vjp(lambda *x: lattice_sums(options, *x, check_rows(dtype), frames, seeds), q, k, v, a)
        return sums, pullback(tuple(check_arrays(dtype, *(x.shape[1:] for x in sums))))

    return difference(sums_and_gradients, kernels.lattice_sums, lattice_sums, (q, k, v, -np.abs(a)), dtype)


def reciprocal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    cells: CellRows,
    waves: WaveVectors,
    *,
    dropout: float = 0.0,
    seeds: jax.Array | None = None,
) -> jax.Array:
    """Attention of every atom over the atoms j of its cell with weights from reciprocal space: [N, H, d_v].

    Per head: sum_j p_j v_j with p = softmax over j of q . k_j / sqrt(d_k) + z_j, where z_j is the logarithm of the
    periodic sum of Gaussians, evaluated as a sum over wave vectors (`WaveVectors.log_sums`). alpha [N, H] is negative,
    Å^2; the other arguments are those of `framed_attention`.
    """
    return lattice_sums(SumOptions(Bases(None, None), waves, dropout), q, k, v, alpha, cells, None, seeds)[0]
