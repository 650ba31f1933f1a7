"""The choice among tied frames by the crystal itself, for max frames and what they anchor.

Where symmetry leaves several frames (e1, e2, e3) equally good, that one is taken whose marker direction
x = MARKER . (e1, e2, e3) sees the most attention: F(x) = sum_m p_m exp(x . u_m) over the neighbors is largest. Frames
with equal F are related by a rotation of the weighted neighborhood, so that the sums over it are the same whichever is
taken. x has a component along e3, which tells mirror images apart; that is why e1 and e2 are chosen together.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.ops.blocks import WORD, directions, exp_relative, over_columns
from crystalframer_jax.ops.random_bits import draw

MARKER = (1.0, 1.7, 2.9)
PARALLEL = 0.9999  # |cos| from which a neighbor cannot give the second axis
SMALLEST = 1e-5  # of 1 - |cos| inside the logarithm
AT_ONCE, AT_ONCE_ON_GPU = 64, 4096  # candidates that are compared at once


class Scores(NamedTuple):
    """What neighbors of a block score, -inf where there is none; C words of WORD neighbors."""

    of: jax.Array  # [C, n, H, WORD]
    highest: jax.Array  # [n, H]


class First(NamedTuple):
    """The best neighbor of every row of a block, and its ties."""

    direction: jax.Array  # [n, H, 3] of the one that was drawn, or the first; 0 if there is none
    tied: jax.Array  # [C, n, H] uint32, the bits of the ties in words of WORD neighbors
    number: jax.Array  # [n, H] how many there are


class Best(NamedTuple):
    """The best candidates so far, of R rows."""

    seen: jax.Array  # [R] F
    frames: jax.Array  # [R, 3, 3]


def scores_of(rows: Rows, like: jax.Array, scores: Callable[[Rows, jax.Array], jax.Array]) -> Scores:
    """Collects `scores(columns, number of their word)` [n, H, WORD], of the type of `like` [n, H]."""

    def put(columns: Rows, first: jax.Array, found: jax.Array) -> jax.Array:
        word = first // WORD
        return jax.lax.dynamic_update_index_in_dim(found, scores(columns, word), word, 0)

    empty = jnp.full((rows.index.shape[1] // WORD, *like.shape, WORD), -jnp.inf, like.dtype)
    found = over_columns(put, rows, empty, WORD)
    # Of what is stored: computed again, in the same loop, it may be rounded otherwise, and no score as high as it.
    return Scores(found, jnp.max(found, axis=(0, -1)))


def best_of(rows: Rows, scores: Scores, tie_tolerance: float, seeds: jax.Array | None) -> First:
    """The best neighbors: drawn among the ties by `seeds` [n, H], or the first."""

    def look(columns: Rows, first: jax.Array, so_far: tuple) -> tuple:
        direction, priority, tied, number = so_far
        word = first // WORD
        are_tied = _are_tied(scores.of[word], scores.highest, tie_tolerance)
        bits = picked = _words(are_tied)
        highest = bits  # of those that are not drawn, the first word with any is as good as others
        if seeds is not None:
            drawn = draw(seeds[..., None], (first + jnp.arange(WORD)).astype(jnp.uint32))
            drawn = jnp.where(are_tied, drawn | 1, 0)
            highest = jnp.max(drawn, axis=-1)
            picked = _words(are_tied & (drawn == highest[..., None]))
        is_better = highest > priority if seeds is not None else (highest > 0) & (priority == 0)
        there = jnp.take_along_axis(directions(columns), _lowest(picked)[..., None], axis=1, mode="clip")
        direction = jnp.where(is_better[..., None], there, direction)
        tied = jax.lax.dynamic_update_index_in_dim(tied, bits, word, 0)
        return direction, jnp.where(is_better, highest, priority), tied, number + _ones(bits)

    shape = scores.highest.shape
    start: tuple = jnp.zeros((*shape, 3), scores.of.dtype), jnp.zeros(shape, jnp.uint32)
    start += jnp.zeros((len(scores.of), *shape), jnp.uint32), jnp.zeros(shape, jnp.int32)
    direction, _, tied, number = over_columns(look, rows, start, WORD)
    return First(direction, tied, number)


def _are_tied(scores: jax.Array, highest: jax.Array, tie_tolerance: float) -> jax.Array:
    """Which columns of rows [..., M] are within the tolerance of the highest score [...]; none of a row of -inf."""
    return (scores >= highest[..., None] - tie_tolerance) & (scores > -jnp.inf)


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


def choose(
    rows: Rows,
    scores: Scores,
    tied: jax.Array,
    logits: Scores,
    tie_tolerance: float,
    frames: jax.Array,
    final: Callable[[jax.Array, jax.Array], jax.Array] = lambda frames, row: frames,
) -> jax.Array:
    """Chooses among the tied frames of a block of n atoms: [n, H, 3, 3].

    `scores` are those for the first axis, `tied` [C, n, H] the columns that it may have (bits); rows without any keep
    their `frames` [n, H, 3, 3]. `logits` are those of the weights in F; `final(candidates [R, 3, 3], row [R])` the
    frames that max frames of some of the n * H rows stand for, if these only anchor others. The work is in the
    candidates that there are: each takes one pass along its row, each first axis another.
    """
    words, atoms, heads, _ = scores.of.shape
    used = -(-jnp.max(rows.count) // WORD)
    over_words = functools.partial(jax.lax.fori_loop, 0, used)
    by_row = scores.of.reshape(words, atoms * heads, WORD)
    unit = directions(rows)
    planes = jnp.moveaxis(unit.reshape(atoms, words, WORD, 3), (1, 3), (0, 1))  # [C, 3, n, WORD]
    firsts = tied.reshape(words, atoms * heads).T
    weights = over_words(
        lambda word, found: found.at[word].set(exp_relative(logits.of[word], logits.highest[..., None])),
        jnp.zeros_like(logits.of),
    ).reshape(by_row.shape)

    def cosines(e: jax.Array, row: jax.Array, word: jax.Array) -> jax.Array:
        """e . u of vectors [R, 3] and the columns of a word of rows, [R, WORD]."""
        x, y, z = planes[word][:, row // heads]
        return e[:, :1] * x + e[:, 1:2] * y + e[:, 2:] * z

    def with_first_axes(chunk: jax.Array, best: Best) -> Best:
        """Compares the candidates of AT_ONCE first axes."""
        row, column, is_real = _listed(firsts, chunk)
        e1 = unit[row // heads, column]

        def score(word: jax.Array, found: jax.Array) -> jax.Array:
            return found.at[word].set(second_scores(by_row[word, row], cosines(e1, row, word)))

        def tie(word: jax.Array, found: jax.Array) -> jax.Array:
            return found.at[:, word].set(_words(_are_tied(second[word], highest, tie_tolerance) & is_real[:, None]))

        nothing = jnp.full((words, len(row), WORD), -jnp.inf, by_row.dtype)
        second = over_words(score, nothing)
        highest = jnp.max(second, axis=(0, -1))  # see scores_of
        seconds = over_words(tie, jnp.zeros((len(row), words), jnp.uint32))
        # Where there is none, e2 = 0 is a candidate: the direction of the atom itself.
        is_lone = is_real & jnp.all(seconds == 0, axis=-1)
        seconds = seconds.at[:, 0].set(jnp.where(is_lone, jnp.uint32(1), seconds[:, 0]))

        def with_second_axes(chunk: jax.Array, best: Best) -> Best:
            item, column, is_real = _listed(seconds, chunk)
            own = row[item]
            candidates = final(frame_of(e1[item], unit[own // heads, column]), own)
            marker = marker_of(candidates)

            def see(word: jax.Array, seen: jax.Array) -> jax.Array:
                return seen + jnp.sum(weights[word, own] * jnp.exp(cosines(marker, own, word)), axis=-1)

            seen = over_words(see, jnp.zeros(len(own), by_row.dtype))
            return _better(best, own, jnp.where(is_real, seen, -jnp.inf), candidates)

        return jax.lax.fori_loop(0, _chunks(seconds), with_second_axes, best)

    best = Best(jnp.full(atoms * heads, -jnp.inf, by_row.dtype), frames.reshape(-1, 3, 3))
    return jax.lax.fori_loop(0, _chunks(firsts), with_first_axes, best).frames.reshape(frames.shape)


def _words(mask: jax.Array) -> jax.Array:
    """The bits of a mask [..., WORD] in a word each: finding the k-th takes no time then."""
    return jnp.sum(mask.astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _ones(words: jax.Array) -> jax.Array:
    """How many bits of words are set, int32."""
    return jax.lax.population_count(words).astype(jnp.int32)


def _lowest(words: jax.Array) -> jax.Array:
    """The number of the lowest bit that is set; of words without any 32, which stands for the last."""
    return _ones(~words & (words - 1))


def _at_once() -> int:
    return AT_ONCE if jax.default_backend() == "cpu" else AT_ONCE_ON_GPU


def _chunks(words: jax.Array) -> jax.Array:
    """How often AT_ONCE there are as many places as there are bits."""
    return -(-jnp.sum(_ones(words)) // _at_once())


def _listed(words: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and column of the next AT_ONCE bits, and which of them are real."""
    counts = _ones(words)
    of_row = jnp.sum(counts, axis=1)
    ends = jnp.cumsum(of_row)
    number = chunk * _at_once() + jnp.arange(_at_once())
    row = jnp.minimum(jnp.searchsorted(ends, number, side="right"), len(ends) - 1)
    rank = number - (ends - of_row)[row]
    before = jnp.cumsum(counts[row], axis=1) - counts[row]  # in the words to the left
    place = jnp.sum(before <= rank[:, None], axis=1) - 1
    word, column = words[row, place], WORD * place
    rank -= jnp.take_along_axis(before, place[:, None], axis=1)[:, 0]
    for half in (16, 8, 4, 2, 1):  # the bit of this rank in its word
        below = _ones(word & jnp.uint32(2**half - 1))
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
