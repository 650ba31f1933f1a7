"""The choice among tied frames by the crystal itself, for max frames and what they anchor.

Where symmetry leaves several frames (e1, e2, e3) equally good, that one is taken whose marker direction
x = MARKER . (e1, e2, e3) sees the most attention: F(x) = sum_m p_m exp(x . u_m) over the neighbors is largest. Frames
with equal F are related by a rotation of the weighted neighborhood, so that the sums over it are the same whichever is
taken. x has a component along e3, which tells mirror images apart; that is why e1 and e2 are chosen together.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MARKER = (1.0, 1.7, 2.9)
PARALLEL = 0.9999  # |cos| from which a neighbor cannot give the second axis
SMALLEST = 1e-5  # of 1 - |cos| inside the logarithm
AT_ONCE, AT_ONCE_ON_GPU = 64, 4096  # candidates that are compared at once


class Best(NamedTuple):
    """The best candidates so far, of R rows."""

    seen: jax.Array  # [R] F
    frames: jax.Array  # [R, 3, 3]


def tied_with_best(scores: jax.Array, tie_tolerance: float) -> jax.Array:
    """Which columns of rows [..., M] are within the tolerance of the best score; none of a row of -inf."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    return (scores >= best - tie_tolerance) & (scores > -jnp.inf)


def second_scores(scores: jax.Array, cosine: jax.Array) -> jax.Array:
    """The scores for the second axis, from those for the first and e1 . u; -inf for neighbors along e1."""
    parallel = jnp.abs(cosine)
    return jnp.where(parallel < PARALLEL, scores + jnp.log(jnp.maximum(1 - parallel, SMALLEST)), -jnp.inf)


def frame_of(e1: jax.Array, u2: jax.Array) -> jax.Array:
    """The right-handed frame [..., 3, 3] of e1 and a direction, made orthogonal to it; e2 = e3 = 0 if that is 0."""
    e2 = u2 - jnp.sum(u2 * e1, axis=-1, keepdims=True) * e1
    norm = jnp.linalg.norm(e2, axis=-1, keepdims=True)
    e2 = e2 / jnp.where(norm > 0, norm, 1)
    return jnp.stack([e1, e2, jnp.cross(e1, e2)], axis=-2)


def marker_of(frames: jax.Array) -> jax.Array:
    """The marker directions [..., 3] of frames [..., 3, 3]."""
    return MARKER[0] * frames[..., 0, :] + MARKER[1] * frames[..., 1, :] + MARKER[2] * frames[..., 2, :]


def weights_of(logits: jax.Array) -> jax.Array:
    """What attention weights [..., M] are proportional to; the largest is 1. 0 for rows of -inf."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0))


def choose(
    scores: jax.Array,
    tied: jax.Array,
    unit: jax.Array,
    logits: jax.Array,
    tie_tolerance: float,
    frames: jax.Array,
    final: Callable[[jax.Array, jax.Array], jax.Array] = lambda frames, row: frames,
) -> jax.Array:
    """Chooses among the tied frames of a block of n atoms: [n, H, 3, 3].

    scores [n, H, M] are those for the first axis, `tied` [n, H, M] the columns that it may have; rows without any keep
    their `frames` [n, H, 3, 3]. unit [n, M, 3] are the directions of the neighbors (0 for the atom itself, in the first
    column), logits [n, H, M] those of the weights in F; `final(candidates [C, 3, 3], row [C])` the frames that max
    frames of some of the n * H rows stand for, if these only anchor others. The work is in the candidates that there
    are: each takes one pass along its row, each first axis another.
    """
    heads, columns = scores.shape[1:]
    scores, weights = scores.reshape(-1, columns), weights_of(logits.reshape(-1, columns))
    rows, planes = len(scores), jnp.moveaxis(unit, -1, 0)
    firsts = _words(tied.reshape(-1, columns))

    def cosines(e: jax.Array, row: jax.Array) -> jax.Array:
        """e . u of vectors [C, 3] along rows, [C, M]."""
        x, y, z = (plane[row // heads] for plane in planes)
        return e[:, :1] * x + e[:, 1:2] * y + e[:, 2:] * z

    def with_first_axes(chunk: jax.Array, best: Best) -> Best:
        """Compares the candidates of AT_ONCE first axes."""
        row, column, is_real = _listed(firsts, chunk)
        e1 = unit[row // heads, column]
        tied = tied_with_best(second_scores(scores[row], cosines(e1, row)), tie_tolerance)
        seconds = _words(tied & is_real[:, None])
        # Where there is none, e2 = 0 is a candidate: the direction of the atom itself.
        is_lone = is_real & jnp.all(seconds == 0, axis=-1)
        seconds = seconds.at[:, 0].set(jnp.where(is_lone, jnp.uint32(1), seconds[:, 0]))

        def with_second_axes(chunk: jax.Array, best: Best) -> Best:
            item, column, is_real = _listed(seconds, chunk)
            own = row[item]
            candidates = final(frame_of(e1[item], unit[own // heads, column]), own)
            seen = jnp.sum(weights[own] * jnp.exp(cosines(marker_of(candidates), own)), axis=-1)
            return _better(best, own, jnp.where(is_real, seen, -jnp.inf), candidates)

        return jax.lax.fori_loop(0, _chunks(seconds), with_second_axes, best)

    best = Best(jnp.full(rows, -jnp.inf, scores.dtype), frames.reshape(rows, 3, 3))
    return jax.lax.fori_loop(0, _chunks(firsts), with_first_axes, best).frames.reshape(frames.shape)


def _words(mask: jax.Array) -> jax.Array:
    """The bits of a mask [R, M] in words of 32, [R, M / 32]: finding the k-th takes no time then."""
    padded = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % 32))).reshape(len(mask), -1, 32)
    return jnp.sum(padded.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _at_once() -> int:
    return AT_ONCE if jax.default_backend() == "cpu" else AT_ONCE_ON_GPU


def _chunks(words: jax.Array) -> jax.Array:
    """How often AT_ONCE there are as many places as there are bits."""
    return -(-jnp.sum(jax.lax.population_count(words).astype(jnp.int32)) // _at_once())


def _listed(words: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and column of the next AT_ONCE bits, and which of them are real."""
    counts = jax.lax.population_count(words).astype(jnp.int32).reshape(-1)
    ends = jnp.cumsum(counts)
    number = chunk * _at_once() + jnp.arange(_at_once())
    place = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(counts) - 1)
    rank = number - (ends - counts)[place]
    row, column = jnp.divmod(place, words.shape[1])
    word, column = words.reshape(-1)[place], 32 * column
    for half in (16, 8, 4, 2, 1):  # the bit of this rank in its word
        below = jax.lax.population_count(word & jnp.uint32(2**half - 1)).astype(jnp.int32)
        is_above = rank >= below
        word = jnp.where(is_above, word >> half, word)
        rank, column = jnp.where(is_above, rank - below, rank), jnp.where(is_above, column + half, column)
    return row, column, number < ends[-1]


def _better(best: Best, row: jax.Array, seen: jax.Array, candidates: jax.Array) -> Best:
    """The best of each row, some more candidates considered; of equal ones the first."""
    number, highest = len(seen), best.seen.at[row].max(seen)
    place = jnp.where((seen == highest[row]) & (seen > best.seen[row]), jnp.arange(number), number)
    first = jnp.full(len(best.seen), number).at[row].min(place)
    frames = jnp.where((first < number)[:, None, None], candidates[jnp.minimum(first, number - 1)], best.frames)
    return Best(highest, frames)
