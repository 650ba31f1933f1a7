"""Kernel for max frames, see crystalframer_jax.ops.frames: one program for the frame of one atom and head.

It goes along the row four times: for the best score and for a column among those within the tolerance, for each of the
two axes. Where that leaves several frames and the crystal chooses, see crystalframer_jax.ops.ties, it goes on: once for
each of the first axes and once for each frame, and once more if another attention than that of the scores sees.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.kernels.backend import load, run, store
from crystalframer_jax.kernels.rows import Chunk, Inputs, Place, gathered, over_chunks, place, vector_of
from crystalframer_jax.ops.frames import Attention
from crystalframer_jax.ops.random_bits import draw, mix
from crystalframer_jax.ops.ties import MARKER, second_scores

END = 2**31 - 1  # beyond all columns
Vector = tuple[jax.Array, jax.Array, jax.Array]
Scores = Callable[[Chunk], jax.Array]


class Row(NamedTuple):
    """The neighbors of one atom, as one head scores them for the first axis."""

    rows: Rows
    at: Place
    scores: Scores
    tie_tolerance: float


class Best(NamedTuple):
    """The best score so far, and the first column that has it."""

    score: jax.Array
    column: jax.Array


class Found(NamedTuple):
    """F of the frame that sees the most so far, see crystalframer_jax.ops.ties, and the columns of its axes."""

    seen: jax.Array
    first: jax.Array
    second: jax.Array


def max_frames(
    scores: Attention, rows: Rows, tie_tolerance: float, seeds: jax.Array | None, seeing: Attention | None
) -> jax.Array:
    """What crystalframer_jax.ops.frames.max_frames returns, by a kernel: [N, H, 3, 3]."""
    q, k, a = scores
    seeds = None if seeing is not None else seeds
    kernel = functools.partial(frames_kernel, tie_tolerance, seeing is not None)
    shape = jax.ShapeDtypeStruct((*a.shape, 3, 3), q.dtype)
    return run(kernel, a.size, shape, Inputs(q, k, None, a, rows, None, seeds), None if seeing is scores else seeing)


def frames_kernel(
    tie_tolerance: float, crystal_chooses: bool, inputs: Inputs, seeing: Attention | None, frames: Any
) -> None:
    """The frame of one atom and head; `seeing` is None if the scores are the logits of the attention that sees."""
    at = place(inputs.a.shape[1])
    row = Row(inputs.rows, at, _scores(inputs.rows, Attention(inputs.q, inputs.k, inputs.a), at), tie_tolerance)
    seed = None if inputs.seeds is None else load(inputs.seeds, tuple(at))
    best = _best(row, row.scores)
    first, firsts = _pick(row, row.scores, best, seed)
    e1 = _direction(row, first)

    def scores(chunk: Chunk) -> jax.Array:
        return second_scores(row.scores(chunk), _cosine(e1, chunk))

    second, seconds = _pick(row, scores, _best(row, scores), None if seed is None else mix(seed))
    if crystal_chooses:
        first, second = jax.lax.cond(
            (firsts > 1) | (seconds > 1),
            lambda: _chosen(row, best, seeing and _scores(row.rows, seeing, at), first, second),
            lambda: (first, second),
        )
    for axis, e in enumerate(_frame(_direction(row, first), _direction(row, second))):
        for x in range(3):
            store(frames, (at.atom, at.head, axis, x), e[x])


def _scores(rows: Rows, attention: Attention, at: Place) -> Scores:
    """The logits of an attention, less that of the nearest neighbor; -inf for the atom itself and padding."""
    q, a, scale = vector_of(attention.q, at), load(attention.a, tuple(at)), attention.q.shape[-1] ** -0.5
    is_any = load(rows.count, (at.atom,)) > 1
    nearest, square = (load(x, (at.atom, 1), is_any) for x in (rows.index, rows.square))
    dot = jnp.sum(vector_of(attention.k, Place(nearest, at.head)) * q, axis=0)

    def scores(chunk: Chunk) -> jax.Array:
        dots = jnp.sum(gathered(attention.k, chunk, at.head) * q[:, None], axis=0)
        logits = (dots - dot) * scale + a * (chunk.square - square)
        return jnp.where(chunk.square > 0, logits, -jnp.inf)

    return scores


def _best(row: Row, scores: Scores) -> Best:
    """The best score of the row."""
    return _along(row, lambda chunk, best: _better(scores(chunk), chunk, best), _no_score(row))


def _pick(row: Row, scores: Scores, best: Best, seed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Column of a tie, the first or, given a seed, a random one, 0 if there is none; and how many ties there are."""

    def step(chunk: Chunk, carry: tuple[Best, jax.Array]) -> tuple[Best, jax.Array]:
        chosen, number = carry
        tied = _tied(row, scores(chunk), chunk, best)
        priority = jnp.ones_like(chunk.column, jnp.uint32)
        if seed is not None:
            priority = draw(seed, chunk.column) | jnp.uint32(1)
        chosen = _better(jnp.where(tied, priority, jnp.uint32(0)), chunk, chosen)
        return chosen, number + jnp.sum(tied, axis=0, dtype=jnp.int32)

    chosen, number = _along(row, step, (Best(jnp.uint32(0), jnp.int32(0)), jnp.int32(0)))
    return chosen.column, number


def _chosen(
    row: Row, best: Best, seeing: Scores | None, first: jax.Array, second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The columns of the axes of the frame that sees the most, of equal ones the first.

    `best` has the best score for the first axis and `first` is the first of its ties; `seeing` as for `_with_seconds`.
    """
    largest = best.score if seeing is None else _best(row, seeing).score

    def with_first(state: tuple[jax.Array, Found]) -> tuple[jax.Array, Found]:
        """Compares the frames with one first axis; then comes the next."""
        first, found = state
        e1 = _direction(row, first)

        def step(chunk: Chunk, carry: tuple[Best, jax.Array]) -> tuple[Best, jax.Array]:
            best_second, following = carry
            scores = row.scores(chunk)
            tied = _tied(row, scores, chunk, best) & (chunk.column > first)
            best_second = _better(second_scores(scores, _cosine(e1, chunk)), chunk, best_second)
            return best_second, _earliest(tied, chunk, following)

        best_second, following = _along(row, step, (_no_score(row), jnp.int32(END)))
        return following, _with_seconds(row, first, best_second, seeing, largest, found)

    found = Found(_no_score(row).score, first, second)
    _, found = jax.lax.while_loop(lambda state: state[0] < END, with_first, (first, found))
    return found.first, found.second


def _with_seconds(
    row: Row, first: jax.Array, best: Best, seeing: Scores | None, largest: jax.Array, found: Found
) -> Found:
    """Compares what was found with the frames of a first axis.

    `best` has the best score for the second axis; `seeing` are the logits of the weights in F, None if they are the
    scores for the first axis, and `largest` the largest of them.
    """
    e1 = _direction(row, first)

    def with_second(state: tuple[jax.Array, Found]) -> tuple[jax.Array, Found]:
        """Compares one frame; then comes the next: that of the best score, the others from the first to the last."""
        second, found = state
        axes = zip(*_frame(e1, _direction(row, second)), strict=True)
        x, y, z = (MARKER[0] * e1 + MARKER[1] * e2 + MARKER[2] * e3 for e1, e2, e3 in axes)
        last = jnp.where(second == best.column, -1, second)

        def step(chunk: Chunk, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seen, following = carry
            scores = row.scores(chunk)
            logits = scores if seeing is None else seeing(chunk)
            seen += jnp.sum(jnp.exp(logits - largest + _cosine((x, y, z), chunk)), axis=0)
            tied = _tied(row, second_scores(scores, _cosine(e1, chunk)), chunk, best)
            return seen, _earliest(tied & (chunk.column > last) & (chunk.column != best.column), chunk, following)

        seen, following = _along(row, step, (jnp.zeros_like(largest), jnp.int32(END)))
        is_before = (first == found.first) & (second < found.second)
        is_better = (seen > found.seen) | (seen == found.seen) & is_before
        new = Found(seen, first, second)
        return following, Found(*(jnp.where(is_better, x, y) for x, y in zip(new, found, strict=True)))

    return jax.lax.while_loop(lambda state: state[0] < END, with_second, (best.column, found))[1]


def _along(row: Row, step: Callable[[Chunk, Any], Any], start: Any) -> Any:
    """carry = step(chunk, carry) along the row: one pass."""
    return over_chunks(row.rows, row.at.atom, step, start)


def _no_score(row: Row) -> Best:
    return Best(jnp.asarray(-jnp.inf, row.rows.vector.dtype), jnp.int32(0))


def _better(scores: jax.Array, chunk: Chunk, best: Best) -> Best:
    """The best with the scores of another chunk."""
    highest = jnp.max(scores, axis=0)
    first = jnp.min(jnp.where(scores == highest, chunk.column, END), axis=0)
    is_better = highest > best.score
    return Best(jnp.where(is_better, highest, best.score), jnp.where(is_better, first, best.column))


def _earliest(mask: jax.Array, chunk: Chunk, found: jax.Array) -> jax.Array:
    """The first column of a mask, one found before included."""
    return jnp.minimum(found, jnp.min(jnp.where(mask, chunk.column, END), axis=0))


def _tied(row: Row, scores: jax.Array, chunk: Chunk, best: Best) -> jax.Array:
    """Which neighbors of a chunk tie with the best of the row.

    Its column is one of them whatever happens: scores are computed once more, and might be rounded otherwise.
    """
    is_near = (scores >= best.score - row.tie_tolerance) & (scores > -jnp.inf)
    return is_near | (chunk.column == best.column) & (best.score > -jnp.inf)


def _direction(row: Row, column: jax.Array) -> Vector:
    """Unit vector to a neighbor; zeros for the atom itself and an empty row."""
    rows, atom = row.rows, row.at.atom
    is_real = column < load(rows.count, (atom,))
    x, y, z = (jnp.where(is_real, load(rows.vector, (atom, column, axis)), 0) for axis in range(3))
    return _divided((x, y, z), jnp.sqrt(load(rows.square, (atom, column))))


def _frame(e1: Vector, u2: Vector) -> tuple[Vector, Vector, Vector]:
    """The right-handed frame of e1 and a direction, made orthogonal to it; e2 = e3 = 0 if that is 0."""
    along = _dot(e1, u2)
    e2 = u2[0] - along * e1[0], u2[1] - along * e1[1], u2[2] - along * e1[2]
    e2 = _divided(e2, jnp.sqrt(_dot(e2, e2)))
    e3 = (e1[1] * e2[2] - e1[2] * e2[1], e1[2] * e2[0] - e1[0] * e2[2], e1[0] * e2[1] - e1[1] * e2[0])
    return e1, e2, e3


def _cosine(e: Vector, chunk: Chunk) -> jax.Array:
    """e . u for the directions u of the neighbors of a chunk, 0 for the atom itself."""
    distance = jnp.sqrt(chunk.square)
    return _dot(e, chunk.vector) / jnp.where(distance > 0, distance, 1)


def _divided(vector: Vector, length: jax.Array) -> Vector:
    """vector / length, 0 if the length is."""
    x, y, z = (component / jnp.where(length > 0, length, 1) for component in vector)
    return x, y, z


def _dot(x: Vector, y: Vector) -> jax.Array:
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2]
