"""Frames: three axes for every atom and head, from its neighbours (paper, section on dynamic frames).

Frames carry no gradient. Where symmetry leaves several frames equally good, the first in canonical order is taken or,
given random seeds, one of them at random. The canonical order does not change when the crystal is turned, but among
neighbours at the same distance it follows the order of the atoms and the cell.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batch import Batch, Rows
from crystalframer_jax.kernels import frames as kernels
from crystalframer_jax.model.basis import EXACT
from crystalframer_jax.model.blocks import attention_logits, map_blocks
from crystalframer_jax.model.eigen import eigh3, principal_frames
from crystalframer_jax.model.implementation import (
    Implementation,
    check_arrays,
    check_rows,
    difference,
    uses_kernels,
)
from crystalframer_jax.model.random_bits import draw, mix

PARALLEL = 0.9999  # |cos| from which a neighbour cannot give the second axis
SMALLEST = 1e-5  # of 1 - |cos| inside the logarithm
COPLANAR = 1e-3  # |cos| to the normal up to which a lattice vector lies in the plane of two others
PERPENDICULAR = 1e-4  # |cos| up to which neither sign of a lattice vector is acute

METHODS = ("max", "max_static", "weighted_pca", "pca", "lattice")


def block_frames(
    method: str,
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    batch: Batch,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Frames of one attention block by one of METHODS: [N, H, 3, 3] with rows e1, e2, e3.

    q, k [N, H, d_k] and a [N, H] (1/Å^2) as in `lattice_sums`; `seeds` [N, H] uint32 draw among equally good frames.
    There is a kernel for max and max_static frames, see `framed_attention` for `implementation`.
    """
    q, k, a = jax.lax.stop_gradient((q, k, a))
    if method == "max":
        return max_frames(q, k, a, batch.rows, tie_tolerance, seeds, implementation)
    if method == "max_static":
        frames = max_static_frames(batch.rows, tie_tolerance, seeds, implementation)
    elif method == "weighted_pca":
        return weighted_pca_frames(q, k, a, batch.rows, tie_tolerance, seeds, implementation)
    elif method == "pca":
        frames = pca_frames(batch, tie_tolerance, seeds, implementation)
    elif method == "lattice":
        frames = lattice_frames(batch, tie_tolerance, seeds)
    else:
        raise ValueError(f"frame_method={method!r} does not exist; allowed: {', '.join(METHODS)}")
    return jnp.broadcast_to(frames, (*q.shape[:2], 3, 3))


def max_frames(
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Max frames: orthonormal and right-handed, [N, H, 3, 3]; zeros for padding.

    e1 points to the neighbour with the largest attention logit; e2 to the one with the largest
    logit + log(1 - |e1 . u|), made orthogonal to e1; e3 = e1 x e2. Neighbours within `tie_tolerance` of the best score
    are ties. q, k [N, H, d_k]; a [N, H] in 1/Å^2; seeds [N, H].
    """
    check = functools.partial(_check_kernels, tie_tolerance, q.shape[1:], seeds is not None, q.dtype)
    if uses_kernels(implementation, "frames", check):
        return kernels.max_frames(q, k, a, rows, _limits(tie_tolerance), seeds)

    def block(rows: Rows, q: jax.Array, a: jax.Array, seeds: jax.Array | None) -> jax.Array:
        distance, unit = _directions(rows)
        logits = jnp.where((distance > 0)[:, None, :], attention_logits(q, k, a, rows), -jnp.inf)
        e1 = _take(unit, _pick(logits, tie_tolerance, seeds))  # [n, H, 3]
        parallel = jnp.abs(jnp.einsum("nhd,nmd->nhm", e1, unit, precision=EXACT))
        scores = logits + jnp.log(jnp.maximum(1 - parallel, SMALLEST))
        scores = jnp.where(parallel < PARALLEL, scores, -jnp.inf)
        u2 = _take(unit, _pick(scores, tie_tolerance, None if seeds is None else mix(seeds)))
        e2 = u2 - jnp.sum(u2 * e1, axis=-1, keepdims=True) * e1
        norm = jnp.linalg.norm(e2, axis=-1, keepdims=True)
        e2 = e2 / jnp.where(norm > 0, norm, 1)
        return jnp.stack([e1, e2, jnp.cross(e1, e2)], axis=-2)

    return map_blocks(block, rows, q, a, seeds)


def max_static_frames(
    rows: Rows, tie_tolerance: float, seeds: jax.Array | None = None, implementation: Implementation = "xla"
) -> jax.Array:
    """Max frames with weights exp(-d^2): [N, 1, 3, 3], or [N, H, 3, 3] given seeds [N, H]."""
    atoms, heads = rows.index.shape[0], 1 if seeds is None else seeds.shape[1]
    nothing = jnp.zeros((atoms, heads, 1), rows.vector.dtype)
    return max_frames(nothing, nothing, -jnp.ones_like(nothing[..., 0]), rows, tie_tolerance, seeds, implementation)


def weighted_pca_frames(
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Principal axes of sum p u u^T over the neighbours (d > 0), p the attention weights; [N, H, 3, 3]."""

    def block(rows: Rows, q: jax.Array, a: jax.Array) -> jax.Array:
        distance, unit = _directions(rows)
        logits = jnp.where((distance > 0)[:, None, :], attention_logits(q, k, a, rows), -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)  # the scale of the weights does not change the axes
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))
        return jnp.einsum("nhm,nmx,nmy->nhxy", weights, unit, unit, precision=EXACT)

    matrix = map_blocks(block, rows, q, a)
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)
    values, axes = eigh3(matrix / jnp.where(trace > 0, trace, 1)[..., None, None])
    return _principal_frames(values, axes, rows, tie_tolerance, seeds, implementation)


def pca_frames(
    batch: Batch, tie_tolerance: float, seeds: jax.Array | None = None, implementation: Implementation = "xla"
) -> jax.Array:
    """Principal axes of the scatter of the atoms of the given cell, [N, 1, 3, 3], or [N, H, 3, 3] given seeds [N, H].

    They depend on the choice of the cell and of the atoms in it, as they do in the paper.
    """
    if batch.scatter is None:
        raise ValueError("pca frames need batches with scatter; see ModelConfig.parts")
    values, axes = (jnp.asarray(x)[batch.crystal_of_atom][:, None] for x in (batch.scatter.values, batch.scatter.axes))
    return _principal_frames(values, axes, batch.rows, tie_tolerance, seeds, implementation)


def lattice_frames(batch: Batch, tie_tolerance: float, seeds: jax.Array | None = None) -> jax.Array:
    """Unit vectors along the shortest lattice vectors, not orthogonal: [N, 1, 3, 3], or [N, H, 3, 3] given seeds.

    The shortest; the next shortest that is not collinear, at an acute angle to the first; the next that is not
    coplanar, likewise; all negated if they are left-handed. Padding atoms get finite numbers without meaning.
    """
    if batch.lattice_vectors is None:
        raise ValueError("lattice frames need batches with lattice_vectors; see ModelConfig.parts")
    vectors = jnp.asarray(batch.lattice_vectors)[batch.crystal_of_atom]  # [N, K, 3]
    length = jnp.linalg.norm(vectors, axis=-1)
    unit = vectors / jnp.where(length > 0, length, 1)[..., None]
    score = jnp.broadcast_to(
        -length[:, None, :], (len(length), 1 if seeds is None else seeds.shape[1], length.shape[1])
    )

    def choose(allowed: jax.Array, seeds: jax.Array | None) -> jax.Array:
        return _take(unit, _pick(jnp.where(allowed, score, -jnp.inf), tie_tolerance, seeds))

    second, third = (None, None) if seeds is None else (mix(seeds), mix(mix(seeds)))
    e1 = choose(jnp.full(score.shape, True), seeds)
    cosine = jnp.einsum("nhx,nkx->nhk", e1, unit, precision=EXACT)
    acute = cosine > -PERPENDICULAR
    e2 = choose(acute & (cosine < PARALLEL), second)
    normal = jnp.cross(e1, e2)
    normal /= jnp.maximum(jnp.linalg.norm(normal, axis=-1, keepdims=True), SMALLEST)
    height = jnp.abs(jnp.einsum("nhx,nkx->nhk", normal, unit, precision=EXACT))
    e3 = choose(acute & (height > COPLANAR), third)
    hand = jnp.where(jnp.sum(normal * e3, axis=-1) < 0, -1.0, 1.0)
    return jnp.stack([e1, e2, e3], axis=-2) * hand[..., None, None].astype(e1.dtype)


def _limits(tie_tolerance: float) -> kernels.Limits:
    return kernels.Limits(tie_tolerance, PARALLEL, SMALLEST)


@functools.cache
def _check_kernels(tie_tolerance: float, q_shape: tuple[int, int], drawn: bool, dtype: np.dtype) -> str:
    """Why the kernel cannot be used for q [N, *q_shape], with or without seeds; empty if it can."""
    q, k, a = check_arrays(dtype, q_shape, q_shape, q_shape[:1])
    alike = (np.ones_like(q), np.ones_like(k), np.full_like(a, -0.25)), check_rows(dtype, on_grid=True)
    inputs = ((q, k, -np.abs(a)), check_rows(dtype)), alike
    seeds: Any = np.arange(a.size, dtype=np.uint32).reshape(a.shape) if drawn else None

    def by_kernel(*inputs: Any) -> list[jax.Array]:
        return [kernels.max_frames(q, k, a, rows, _limits(tie_tolerance), seeds) for (q, k, a), rows in inputs]

    def by_xla(*inputs: Any) -> list[jax.Array]:
        return [max_frames(q, k, a, rows, tie_tolerance, seeds, "xla") for (q, k, a), rows in inputs]

    return difference(by_kernel, by_xla, inputs, dtype)


def _principal_frames(
    values: jax.Array,
    axes: jax.Array,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None,
    implementation: Implementation,
) -> jax.Array:
    """Frames of eigenvectors `axes` [N, H or 1, 3, 3]; what the eigenvalues leave open, max_static frames settle."""
    anchor = max_static_frames(rows, tie_tolerance, seeds, implementation)
    signs = None
    if seeds is not None:
        bits = mix(seeds ^ jnp.uint32(0x85EBCA6B))
        signs = 1 - 2 * jnp.stack([bits & 1, (bits >> 1) & 1], axis=-1).astype(axes.dtype)
    axes, anchor = jnp.broadcast_arrays(axes, anchor)
    values = jnp.broadcast_to(values, axes.shape[:-1])
    return principal_frames(values, axes, anchor, tie_tolerance, signs)


def _directions(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Distances [n, M] and unit vectors [n, M, 3] of the neighbours; zeros for the atom itself and padding."""
    distance = jnp.sqrt(jnp.sum(rows.vector**2, axis=-1))
    return distance, rows.vector / jnp.where(distance > 0, distance, 1)[..., None]


def _pick(scores: jax.Array, tie_tolerance: float, seeds: jax.Array | None) -> jax.Array:
    """Column of the best score of every row [n, H, M] -> [n, H]; among ties the first, or a random one."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    tied = (scores >= best - tie_tolerance) & (scores > -jnp.inf)
    if seeds is None:
        return jnp.argmax(tied, axis=-1)
    columns = jnp.arange(scores.shape[-1], dtype=jnp.uint32)
    priority = draw(seeds[..., None], columns)
    return jnp.argmax(jnp.where(tied, priority | 1, 0), axis=-1)


def _take(unit: jax.Array, column: jax.Array) -> jax.Array:
    """unit [n, M, 3] at column [n, H]: [n, H, 3]."""
    return jnp.take_along_axis(unit, column[..., None], axis=1)
