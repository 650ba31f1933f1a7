"""Frames: three axes for every atom and head, from its neighbors (paper, section on dynamic frames).

Frames carry no gradient. Where symmetry leaves several frames equally good, the first in canonical order is taken or,
given random seeds, one of them at random. The canonical order does not change when the crystal is turned, but among
neighbors at the same distance it follows the order of the atoms and the cell.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Batch, Rows
from crystalframer_jax.ops import ties
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.ops.blocks import attention_logits, map_blocks
from crystalframer_jax.ops.eigen import eigh3, principal_frames
from crystalframer_jax.ops.random_bits import draw, mix

COPLANAR = 1e-3  # |cos| to the normal up to which a lattice vector lies in the plane of two others
PERPENDICULAR = 1e-4  # |cos| up to which neither sign of a lattice vector is acute

METHODS = ("max", "max_static", "weighted_pca", "pca", "lattice")


class Attention(NamedTuple):
    """The logits of a block: q . k_j / sqrt(d_k) + a d^2."""

    q: jax.Array  # [N, H, d_k]
    k: jax.Array  # [N, H, d_k]
    a: jax.Array  # [N, H] 1/Å^2


def max_frames(
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None,
    seeing: Attention | None,
) -> jax.Array:
    """Max frames: orthonormal and right-handed, [N, H, 3, 3]; zeros for padding.

    e1 points to the neighbor with the largest attention logit; e2 to the one with the largest
    logit + log(1 - |e1 . u|), made orthogonal to e1; e3 = e1 x e2. Neighbors within `tie_tolerance` of the best score
    are ties: drawn by `seeds` [N, H] or, without, chosen by the weights of the attention `seeing`, see ops/ties.py.
    q, k [N, H, d_k]; a [N, H] in 1/Å^2.
    """

    def block(rows: Rows, q: jax.Array, a: jax.Array, seeds: jax.Array | None, of_rows: Any) -> jax.Array:
        distance, unit = _directions(rows)
        is_other = (distance > 0)[:, None, :]
        scores = jnp.where(is_other, attention_logits(q, k, a, rows), -jnp.inf)
        tied = ties.tied_with_best(scores, tie_tolerance)
        e1 = _take(unit, _pick(tied, seeds))  # [n, H, 3]
        seconds = ties.tied_with_best(
            ties.second_scores(scores, jnp.einsum("nhx,nmx->nhm", e1, unit, precision=EXACT)), tie_tolerance
        )
        frames = ties.frame_of(e1, _take(unit, _pick(seconds, None if seeds is None else mix(seeds))))
        if seeing is None:
            return frames
        several = (jnp.sum(tied, axis=-1) > 1) | (jnp.sum(seconds, axis=-1) > 1)

        def choose() -> jax.Array:
            logits = scores
            if seeing.k is not k:
                logits = jnp.where(is_other, attention_logits(of_rows[0], seeing.k, of_rows[1], rows), -jnp.inf)
            weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
            return ties.choose(scores, tied & several[..., None], unit, weights, tie_tolerance, frames)

        return jax.lax.cond(jnp.any(several), choose, lambda: frames)

    return map_blocks(block, rows, q, a, seeds, seeing and (seeing.q, seeing.a))


def static_attention(a: jax.Array) -> Attention:
    """That of max_static frames, with weights exp(-d^2), for as many atoms and heads as a [N, H] has."""
    nothing = jnp.zeros((*a.shape, 1), a.dtype)
    return Attention(nothing, nothing, -jnp.ones_like(a))


def weighted_pca_axes(q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [N, H, 3], axes [N, H, 3, 3] of sum p u u^T over the neighbors (d > 0), p the attention weights."""

    def block(rows: Rows, q: jax.Array, a: jax.Array) -> jax.Array:
        distance, unit = _directions(rows)
        logits = jnp.where((distance > 0)[:, None, :], attention_logits(q, k, a, rows), -jnp.inf)
        largest = jnp.max(logits, axis=-1, keepdims=True)  # the scale of the weights does not change the axes
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))
        return jnp.einsum("nhm,nmx,nmy->nhxy", weights, unit, unit, precision=EXACT)

    matrix = map_blocks(block, rows, q, a)
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)
    return eigh3(matrix / jnp.where(trace > 0, trace, 1)[..., None, None])


def pca_axes(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [N, 1, 3] and axes [N, 1, 3, 3] of the scatter of the atoms of the given cell.

    They depend on the choice of the cell and of the atoms in it, as they do in the paper.
    """
    if batch.scatter is None:
        raise ValueError("pca frames need batches with scatter; see ModelConfig.parts")
    values, axes = (jnp.asarray(x)[batch.crystal_of_atom][:, None] for x in (batch.scatter.values, batch.scatter.axes))
    return values, axes


def pca_frames(
    values: jax.Array, axes: jax.Array, static: jax.Array, tie_tolerance: float, seeds: jax.Array | None
) -> jax.Array:
    """Frames [N, H or 1, 3, 3] of principal axes; what the eigenvalues leave open, the max_static frames settle."""
    signs = None
    if seeds is not None:
        bits = mix(seeds ^ jnp.uint32(0x85EBCA6B))
        signs = 1 - 2 * jnp.stack([bits & 1, (bits >> 1) & 1], axis=-1).astype(axes.dtype)
    axes, static = jnp.broadcast_arrays(axes, static)
    values = jnp.broadcast_to(values, axes.shape[:-1])
    return principal_frames(values, axes, static, tie_tolerance, signs)


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
        return _take(unit, _pick(ties.tied_with_best(jnp.where(allowed, score, -jnp.inf), tie_tolerance), seeds))

    second, third = (None, None) if seeds is None else (mix(seeds), mix(mix(seeds)))
    e1 = choose(jnp.full(score.shape, True), seeds)
    cosine = jnp.einsum("nhx,nkx->nhk", e1, unit, precision=EXACT)
    acute = cosine > -PERPENDICULAR
    e2 = choose(acute & (cosine < ties.PARALLEL), second)
    normal = jnp.cross(e1, e2)
    normal /= jnp.maximum(jnp.linalg.norm(normal, axis=-1, keepdims=True), ties.SMALLEST)
    height = jnp.abs(jnp.einsum("nhx,nkx->nhk", normal, unit, precision=EXACT))
    e3 = choose(acute & (height > COPLANAR), third)
    hand = jnp.where(jnp.sum(normal * e3, axis=-1) < 0, -1.0, 1.0)
    return jnp.stack([e1, e2, e3], axis=-2) * hand[..., None, None].astype(e1.dtype)


def _directions(rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Distances [n, M] and unit vectors [n, M, 3] of the neighbors; zeros for the atom itself and padding."""
    distance = jnp.sqrt(jnp.sum(rows.vector**2, axis=-1))
    return distance, rows.vector / jnp.where(distance > 0, distance, 1)[..., None]


def _pick(tied: jax.Array, seeds: jax.Array | None) -> jax.Array:
    """A tied column of every row [n, H, M] -> [n, H]: the first, or a random one; 0 if there is none."""
    if seeds is None:
        return jnp.argmax(tied, axis=-1)
    priority = draw(seeds[..., None], jnp.arange(tied.shape[-1], dtype=jnp.uint32))
    return jnp.argmax(jnp.where(tied, priority | 1, 0), axis=-1)


def _take(unit: jax.Array, column: jax.Array) -> jax.Array:
    """unit [n, M, 3] at column [n, H]: [n, H, 3]."""
    return jnp.take_along_axis(unit, column[..., None], axis=1)
