"""Frames: three axes for every atom and head, from its neighbors (paper, section on dynamic frames).

Frames carry no gradient. Where symmetry leaves several frames equally good, the crystal chooses (see ties.py) or, given
random seeds, one of them is drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Batch, Rows
from crystalframer_jax.ops import ties
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.ops.blocks import (
    directions,
    first_columns,
    gathered_dots,
    in_words,
    is_neighbor,
    map_blocks,
    weighted_sums,
)
from crystalframer_jax.ops.eigen import eigh3, principal_frames
from crystalframer_jax.ops.random_bits import mix

METHODS = ("max", "max_static", "weighted_pca", "pca", "lattice")


class Attention(NamedTuple):
    """The logits of a block: q . k_j / sqrt(d_k) + a d^2."""

    q: jax.Array  # [N, H, d_k]
    k: jax.Array  # [N, H, d_k]
    a: jax.Array  # [N, H] 1/Å^2


def max_frames(
    scores: Attention,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None,
    seeing: Attention | None,
    anchored: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Max frames: orthonormal and right-handed, [N, H, 3, 3]; zeros for padding.

    e1 points to the neighbor with the largest attention logit; e2 to the one with the largest
    logit + log(1 - abs(e1 . u)), orthogonalized; e3 = e1 x e2. Neighbors within `tie_tolerance` of the best score
    are ties: drawn by `seeds` [N, H] or, without, chosen by the weights of the attention `seeing`, see ops/ties.py;
    it may be the object `scores` itself. Given eigenvalues [N, 1, 3] and axes [N, 1, 3, 3], the frames of these that
    max frames settle are chosen and returned, see `pca_frames`.
    """
    k, is_own = scores.k, seeing is scores

    def block(
        rows: Rows, q: jax.Array, a: jax.Array, seeds: jax.Array | None, of_rows: Any, anchored: Any
    ) -> jax.Array:
        def final(frames: jax.Array, row: jax.Array) -> jax.Array:
            """The frames [R, 3, 3] that max frames of some of the n * H rows stand for."""
            if anchored is None:
                return frames
            values, axes = (x[row // q.shape[1], 0] for x in anchored)
            return pca_frames(values, axes, frames, tie_tolerance, None)

        found = ties.scores_of(rows, a, _relative_logits(q, k, a, rows))
        first = ties.best_of(rows, found, tie_tolerance, seeds)

        def of_seconds(rows: Rows, number: jax.Array) -> jax.Array:
            cosine = jnp.einsum("nhx,nmx->nhm", first.direction, directions(rows), precision=EXACT)
            return ties.second_scores(found.of[number], cosine)

        second = ties.best_of(
            rows, ties.scores_of(rows, a, of_seconds), tie_tolerance, None if seeds is None else mix(seeds)
        )
        frames = ties.frame_of(first.direction, second.direction)
        frames = final(frames.reshape(-1, 3, 3), jnp.arange(q.shape[0] * q.shape[1])).reshape(frames.shape)
        if seeing is None:
            return frames
        several = (first.number > 1) | (second.number > 1)

        def choose() -> jax.Array:
            logits = found
            if not is_own:
                logits = ties.scores_of(rows, a, _relative_logits(of_rows[0], seeing.k, of_rows[1], rows))
            return ties.choose(rows, found, jnp.where(several, first.tied, 0), logits, tie_tolerance, frames, final)

        return jax.lax.cond(jnp.any(several), choose, lambda: frames)

    of_rows = seeing and (seeing.q, seeing.a)
    return map_blocks(block, in_words(rows), scores.q, scores.a, seeds, of_rows, anchored, like=_axes_like(scores.a))


def static_attention(a: jax.Array) -> Attention:
    """That of max_static frames, with weights exp(-d^2), for as many atoms and heads as a [N, H] has."""
    nothing = jnp.zeros((*a.shape, 1), a.dtype)
    return Attention(nothing, nothing, -jnp.ones_like(a))


def weighted_pca_axes(q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues [N, H, 3], axes [N, H, 3, 3] of sum p u u^T over the neighbors (d > 0), p the attention weights."""

    def block(rows: Rows, q: jax.Array, a: jax.Array) -> jax.Array:
        def scatter(rows: Rows, weights: jax.Array) -> jax.Array:
            unit = directions(rows)
            return jnp.einsum("nhm,nmx,nmy->nhxy", weights, unit, unit, precision=EXACT)

        zeros = jnp.zeros((*a.shape, 3, 3), a.dtype)
        return weighted_sums(rows, _relative_logits(q, k, a, rows), scatter, zeros).sums

    matrix = map_blocks(block, rows, q, a, like=_axes_like(a))
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


def lattice_frames(batch: Batch, seeds: jax.Array | None, seeing: Attention | None) -> jax.Array:
    """Frames of three short lattice vectors, not orthogonal, [N, H, 3, 3]: see structures.lattice.lattice_frames.

    Among equally good ones `seeds` [N, H] draw, or the weights of the attention `seeing` choose. Padding atoms get
    finite numbers without meaning.
    """
    if batch.lattice_frames is None:
        raise ValueError("lattice frames need batches with lattice_frames; see ModelConfig.parts")
    frames, shares = (jnp.asarray(x) for x in (batch.lattice_frames.frames, batch.lattice_frames.shares))
    if seeds is not None:
        level = (seeds >> 8).astype(shares.dtype) / 2**24  # uniform in [0, 1)
        ends = jnp.cumsum(shares, axis=-1)[batch.crystal_of_atom]
        number = jnp.sum(level[..., None] * ends[:, None, -1:] >= ends[:, None], axis=-1)
        return frames[batch.crystal_of_atom[:, None], number]
    assert seeing is not None

    def block(rows: Rows, q: jax.Array, a: jax.Array, crystal: jax.Array) -> jax.Array:
        own, are_real = frames[crystal], shares[crystal] > 0

        def choose() -> jax.Array:
            def marked(rows: Rows, weights: jax.Array) -> jax.Array:
                along = jnp.einsum("ncx,nmx->ncm", ties.marker_of(own), directions(rows), precision=EXACT)
                return jnp.einsum("nhm,ncm->nhc", weights, jnp.exp(along), precision=EXACT)

            zeros = jnp.zeros((*a.shape, are_real.shape[1]), a.dtype)
            seen = weighted_sums(rows, _relative_logits(q, seeing.k, a, rows), marked, zeros).sums
            number = jnp.argmax(jnp.where(are_real[:, None], seen, -jnp.inf), axis=-1)
            return jnp.take_along_axis(own, number[..., None, None], axis=1)

        def only() -> jax.Array:
            return jnp.broadcast_to(own[:, :1], (*a.shape, 3, 3))

        return jax.lax.cond(jnp.any(are_real[:, 1]), choose, only)

    return map_blocks(block, batch.rows, seeing.q, seeing.a, batch.crystal_of_atom, like=_axes_like(seeing.a))


def _axes_like(a: jax.Array) -> jax.ShapeDtypeStruct:
    """Three vectors [N, H, 3, 3] for every atom and head of a [N, H]."""
    return jax.ShapeDtypeStruct((*a.shape, 3, 3), a.dtype)


def _relative_logits(q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows) -> Callable[..., jax.Array]:
    """A function of some columns of the rows of a block: their logits, less that of the nearest neighbor of the row.

    [n, H, m], -inf for the atom itself and padding. What is large and common to all cancels before it is rounded.
    """
    nearest = first_columns(rows, 2)
    dots_of_nearest = gathered_dots(q, k, nearest)[..., -1:]

    def logits(columns: Rows, *_: Any) -> jax.Array:
        dots = (gathered_dots(q, k, columns) - dots_of_nearest) * q.shape[-1] ** -0.5
        distant = a[:, :, None] * (columns.square - nearest.square[:, -1:])[:, None, :]
        is_other = is_neighbor(columns) & (columns.square > 0)
        return jnp.where(is_other[:, None, :], dots + distant, -jnp.inf)

    return logits
