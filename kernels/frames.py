"""Kernel for max frames, see crystalframer_jax.ops.frames: one program for the frame of one atom and head.

It goes along the row four times: for the best score and the choice among those within the tolerance, once for each of
the two axes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.kernels.backend import load, run, store
from crystalframer_jax.kernels.rows import Chunk, Inputs, Place, gathered, logits_of, over_chunks, place, vector_of
from crystalframer_jax.ops.random_bits import draw, mix
from crystalframer_jax.ops.ties import PARALLEL, SMALLEST

END = 2**31 - 1  # beyond all columns
Vector = tuple[jax.Array, jax.Array, jax.Array]


def max_frames(
    q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows, tie_tolerance: float, seeds: jax.Array | None
) -> jax.Array:
    """What crystalframer_jax.ops.frames.max_frames returns, by a kernel: [N, H, 3, 3]."""
    shape = jax.ShapeDtypeStruct((*a.shape, 3, 3), q.dtype)
    kernel = functools.partial(frames_kernel, tie_tolerance)
    return run(kernel, a.size, shape, Inputs(q, k, None, a, rows, None, seeds))


def frames_kernel(tie_tolerance: float, inputs: Inputs, frames: Any) -> None:
    """The frame of one atom and head."""
    at = place(inputs.a.shape[1])
    q, a, scale = vector_of(inputs.q, at), load(inputs.a, tuple(at)), inputs.q.shape[-1] ** -0.5

    def scores(chunk: Chunk) -> jax.Array:
        logits = logits_of(q, gathered(inputs.k, chunk, at.head), a, scale, chunk)
        return jnp.where(chunk.square > 0, logits, -jnp.inf)

    seed = None if inputs.seeds is None else load(inputs.seeds, tuple(at))
    e1 = _direction(inputs.rows, at, _best(scores, inputs.rows, at, tie_tolerance, seed))

    def second_scores(chunk: Chunk) -> jax.Array:
        distance = jnp.sqrt(chunk.square)
        parallel = jnp.abs(_dot(e1, chunk.vector) / jnp.where(distance > 0, distance, 1))
        damped = scores(chunk) + jnp.log(jnp.maximum(1 - parallel, SMALLEST))
        return jnp.where(parallel < PARALLEL, damped, -jnp.inf)

    seed = None if seed is None else mix(seed)
    e2 = _direction(inputs.rows, at, _best(second_scores, inputs.rows, at, tie_tolerance, seed))
    along = _dot(e1, e2)
    e2 = e2[0] - along * e1[0], e2[1] - along * e1[1], e2[2] - along * e1[2]
    e2 = _divided(e2, jnp.sqrt(_dot(e2, e2)))
    e3 = (e1[1] * e2[2] - e1[2] * e2[1], e1[2] * e2[0] - e1[0] * e2[2], e1[0] * e2[1] - e1[1] * e2[0])
    for axis, e in enumerate((e1, e2, e3)):
        for x in range(3):
            store(frames, (at.atom, at.head, axis, x), e[x])


def _best(
    scores: Callable[[Chunk], jax.Array], rows: Rows, at: Place, tie_tolerance: float, seed: jax.Array | None
) -> jax.Array:
    """Column of the best score of the row; among ties the first or, given a seed, a random one. 0 if there is none."""
    dtype = rows.vector.dtype

    def largest(chunk: Chunk, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        here = scores(chunk)
        highest = jnp.max(here, axis=0)
        first = jnp.min(jnp.where(here == highest, chunk.column, END), axis=0)
        is_better = highest > found[0]
        return jnp.where(is_better, highest, found[0]), jnp.where(is_better, first, found[1])

    # Its column counts as a tie whatever happens: scores are computed once more, and might be rounded otherwise.
    best, column = over_chunks(rows, at.atom, largest, (jnp.asarray(-jnp.inf, dtype), jnp.int32(0)))

    def choose(chunk: Chunk, chosen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = scores(chunk)
        tied = (found >= best - tie_tolerance) & (found > -jnp.inf) | (chunk.column == column) & (best > -jnp.inf)
        priority = jnp.ones_like(chunk.column, jnp.uint32)
        if seed is not None:
            priority = draw(seed, chunk.column) | jnp.uint32(1)
        priority = jnp.where(tied, priority, jnp.uint32(0))
        highest = jnp.max(priority, axis=0)
        first = jnp.min(jnp.where(priority == highest, chunk.column, END), axis=0)
        is_better = highest > chosen[0]
        return jnp.where(is_better, highest, chosen[0]), jnp.where(is_better, first, chosen[1])

    return over_chunks(rows, at.atom, choose, (jnp.uint32(0), jnp.int32(0)))[1]


def _direction(rows: Rows, at: Place, column: jax.Array) -> Vector:
    """Unit vector to a neighbor; zeros for an empty row."""
    is_real = column < load(rows.count, (at.atom,))
    x, y, z = (jnp.where(is_real, load(rows.vector, (at.atom, column, axis)), 0) for axis in range(3))
    return _divided((x, y, z), jnp.sqrt(_dot((x, y, z), (x, y, z))))


def _divided(vector: Vector, length: jax.Array) -> Vector:
    """vector / length, 0 if the length is."""
    x, y, z = (component / jnp.where(length > 0, length, 1) for component in vector)
    return x, y, z


def _dot(x: Vector, y: Vector) -> jax.Array:
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]
