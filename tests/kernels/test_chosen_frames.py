"""Max frames that the crystal chooses among ties: both implementations against a search in float64.

Frames that see equally much may be taken for each other, if the sums over the neighbors are the same in both.
"""

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import SYMMETRIC, batch_of, primitive, rows_from, rows_with

from crystalframer_jax.kernels import frames as kernels
from crystalframer_jax.model.implementation import check_rows
from crystalframer_jax.ops import frames as operations
from crystalframer_jax.ops.frames import Attention
from crystalframer_jax.structures.crystal import Crystal

MAX_FRAMES = {"xla": operations.max_frames, "pallas": kernels.max_frames}
TIE_TOLERANCE = 1e-4
ROUNDING = {np.float32: 1e-5, np.float64: 1e-12}  # of F, relative to the largest, and of frames
RADIUS = 5.0  # Å
FLAT = -1e-7  # 1/Å^2, so wide a Gaussian that all neighbors tie
HEADS = ("by distance", "by species", "flat")


# What is to be found


def second_scores(scores, unit, e1):
    cosine = np.abs(unit @ e1)
    return np.where(cosine < 0.9999, scores + np.log(np.maximum(1 - cosine, 1e-5)), -np.inf)


def ties(scores, tolerance):
    """Columns within the tolerance of the best; none may be so near the limit that rounding would decide."""
    behind = scores.max() - scores if np.isfinite(scores.max()) else np.full(len(scores), np.inf)
    assert not np.any((behind > tolerance / 1.9) & (behind < 1.9 * tolerance))
    return np.flatnonzero(behind < tolerance)


def all_frames(scores, unit, tolerance):
    """The frames [C, 3, 3] that ties leave open for scores [M] and directions [M, 3]."""
    found = []
    for e1 in unit[ties(scores, tolerance)]:
        seconds = ties(second_scores(scores, unit, e1), tolerance)
        for u in unit[seconds] if len(seconds) else np.zeros((1, 3)):
            e2 = u - (u @ e1) * e1
            e2 /= np.linalg.norm(e2) or 1
            found.append([e1, e2, np.cross(e1, e2)])
    return np.array(found)


def logits_of(attention, rows, atom, head):
    """[M] of the neighbors of an atom, -inf for the atom itself."""
    q, k, a = (np.asarray(x, np.float64)[:, head] for x in attention)
    square = np.sum(rows.vector[atom, : rows.count[atom]].astype(float) ** 2, axis=-1)
    logits = k[rows.index[atom, : rows.count[atom]]] @ q[atom] / np.sqrt(q.shape[-1]) + a[atom] * square
    return np.where(square > 0, logits, -np.inf)


def sees(frames, logits, unit):
    """F of frames [C, 3, 3]."""
    marker = np.array([1.0, 1.7, 2.9]) @ frames
    return np.exp(marker @ unit.T) @ np.exp(logits - logits.max())


def sums(frame, logits, unit):
    """Means over the neighbors of several functions of the angle to each axis, [3, 5]."""
    weights = np.exp(logits - logits.max())
    angles = frame @ unit.T
    functions = (angles, angles**2, angles**3, np.exp(2 * angles), np.exp(-8 * (angles - 0.6) ** 2))
    return np.stack([f @ weights / weights.sum() for f in functions], axis=-1)


def assert_choice(found, scores, seeing, rows, tolerance=TIE_TOLERANCE, dtype=np.float32):
    """The `found` frames [N, H, 3, 3] are the right ones. Returns the numbers of first axes and of frames [2, N, H]."""
    numbers, rounding = np.zeros((2, *found["xla"].shape[:2]), int), ROUNDING[dtype]
    for atom, head in np.ndindex(*numbers.shape[1:]):
        mine = [x[atom, head].astype(float) for x in found.values()]
        if rows.count[atom] < 2:
            assert not np.any(mine)
            continue
        vector = rows.vector[atom, : rows.count[atom]].astype(float)
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        unit = vector / np.where(length > 0, length, 1)
        of_first = logits_of(scores, rows, atom, head)
        candidates = all_frames(of_first, unit, tolerance)
        numbers[:, atom, head] = len(ties(of_first, tolerance)), len(candidates)
        logits = logits_of(seeing, rows, atom, head)
        seen = sees(candidates, logits, unit)
        behind = 1 - seen / seen.max()
        assert not np.any((behind > rounding / 2) & (behind < 10 * rounding)), np.sort(behind)[:20]
        equal = candidates[behind < rounding]
        for frame in mine:
            assert np.abs(equal - frame).max(axis=(1, 2)).min() < 10 * rounding, (atom, head)
        if np.ptp(equal, axis=0).max() < rounding:
            np.testing.assert_allclose(*mine, rtol=0, atol=10 * rounding)
        else:
            np.testing.assert_allclose(*(sums(x, logits, unit) for x in mine), rtol=0, atol=10 * rounding)
    return numbers


# What finds it


@functools.cache
def compiled(kind, is_own):
    def frames(q, k, a, rows, tolerance, seeing):
        scores = Attention(q, k, a)
        return MAX_FRAMES[kind](scores, rows, tolerance, None, scores if is_own else Attention(*seeing))

    return jax.jit(frames, static_argnums=4)


def found_frames(scores, seeing, rows, tolerance=TIE_TOLERANCE, dtype=np.float32):
    """Frames of each implementation, for attentions (q, k, a) and rows in float64."""
    with jax.enable_x64(dtype == np.float64):
        is_own = seeing is scores
        scores, seeing = ([x.astype(dtype) for x in attention] for attention in (scores, seeing))
        rows = dataclasses.replace(rows, vector=rows.vector.astype(dtype), square=rows.square.astype(dtype))
        seeing = None if is_own else seeing
        return {kind: np.asarray(compiled(kind, is_own)(*scores, rows, tolerance, seeing)) for kind in MAX_FRAMES}


def crystals():
    """Textbook crystals, a body-centred cubic one, atoms with no symmetry but a mirror, and chains far apart."""
    cubic = Crystal([84], np.zeros((1, 3)), 0.5 * 3.6 * (np.ones((3, 3)) - 2 * np.eye(3)), id="bcc")
    cell = np.array([[4.1, 0, 0], [0, 4.6, 0], [-0.9, 0, 5.2]])
    places = np.array([[0, 0, 0], [0.31, 0.27, 0.12], [0.31, -0.27, 0.12], [0.62, 0.5, 0.43]])
    mirror = Crystal([11, 8, 8, 16], places @ cell, cell, id="mirror")
    chain = Crystal([3, 9, 17], np.array([[0, 0, 0], [0, 0, 1.5], [0, 0, 3.0]]), np.diag([20.0, 20, 4.5]), id="chain")
    alike = Crystal([3], np.zeros((1, 3)), np.diag([20.0, 20, 2.1]), id="chain of one")
    return [primitive(name) for name in SYMMETRIC] + [cubic, mirror, chain, alike]


@functools.cache
def inputs():
    """Rows of the crystals, scores with a head each of HEADS, and another attention of wider queries, in float64."""
    with jax.enable_x64(True):
        batch = batch_of(crystals(), RADIUS, np.float64)
    near = np.sum(np.linalg.norm(batch.rows.vector, axis=-1) < 10, axis=1)  # no other chains
    rows = dataclasses.replace(batch.rows, count=np.minimum(batch.rows.count, near).astype(np.int32))
    rng = np.random.default_rng(31)

    def by_species(size):
        return rng.normal(size=(99, len(HEADS), size))[batch.species]

    q, k = by_species(2), by_species(2)
    q[:, HEADS.index("by distance")] = 1
    k[:, HEADS.index("by distance")] = 1
    q[:, HEADS.index("flat")] = 0
    a = np.broadcast_to([-0.25, -0.4, FLAT], q.shape[:2])
    other = by_species(5), by_species(5), -rng.uniform(0.1, 0.5, (99, len(HEADS)))[batch.species]
    return rows, (q, k, a), other


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_own", [True, False])
def test_the_crystal_chooses_the_frame(is_own, dtype):
    rows, scores, other = inputs()
    seeing = scores if is_own else other
    found = found_frames(scores, seeing, rows, dtype=dtype)
    firsts, numbers = assert_choice(found, scores, seeing, rows, dtype=dtype)
    assert {24, 2, 0} <= set(numbers[:, 0].tolist())  # cubes, a mirror, padding
    assert firsts[:, HEADS.index("flat")].max() > 40


def grid_rows():
    """Atoms of a cubic grid at random: with ties, hardly a symmetry, neighbors at one place, short and empty rows."""
    return check_rows(np.dtype(np.float64), on_grid=True)


def alike(rows, a=-0.25):
    """The attention of two heads to neighbors that are all alike."""
    q, k = np.ones((2, len(rows.count), 2, 2))
    return q, k, np.full(q.shape[:2], a)


def random_attention(rows):
    rng = np.random.default_rng(33)
    q, k = rng.normal(size=(2, len(rows.count), 2, 3))
    return q, k, -rng.uniform(0.1, 0.5, q.shape[:2])


@pytest.mark.parametrize("gap", [0.5, 2.0])
def test_the_tolerance_decides_what_is_a_tie(gap):
    """Some neighbors are nearer than others, by what makes their scores better by `gap` tolerances."""
    rows, tolerance = grid_rows(), 1e-3
    scores = alike(rows)
    square = np.sum(rows.vector**2, axis=-1)
    better = np.random.default_rng(34).random(square.shape) < 0.3
    nearer = np.sqrt(np.where(square > 0, 1 - better * gap * tolerance / (0.25 * np.maximum(square, 1)), 1))
    moved = rows_with(rows, rows.vector * nearer[..., None])
    seeing = random_attention(rows)
    before, after = (
        assert_choice(found_frames(scores, seeing, x, tolerance), scores, seeing, x, tolerance)[1]
        for x in (rows, moved)
    )
    if gap < 1:
        np.testing.assert_array_equal(after, before)
    else:
        assert np.sum(after < before) > 40


def test_attention_that_sees_what_scores_do_not():
    """Two neighbors on a line, equally far: the attention that sees takes the one with the larger weight."""
    vector = np.zeros((3, 3, 3))
    vector[0, 1:] = [[0, 0, 2], [0, 0, -2]]
    index = np.array([[0, 1, 2]] + [[1, 1, 1]] * 2, np.int32)
    rows = rows_from(index, vector, np.zeros_like(index), np.array([3, 0, 0], np.int32))
    scores = alike(rows)
    for sign in (1, -1):
        k = sign * np.array([0.0, -1, 1])[:, None, None] * np.ones((3, 2, 1))
        seeing = np.ones_like(k), k, scores[2]
        for frames in found_frames(scores, seeing, rows).values():
            np.testing.assert_array_equal(frames[0], np.broadcast_to([[0, 0, -sign], [0, 0, 0], [0, 0, 0]], (2, 3, 3)))
        assert np.all(assert_choice(found_frames(scores, seeing, rows), scores, seeing, rows)[:, 0] == 2)


@pytest.mark.parametrize("is_own", [True, False])
def test_what_stands_in_the_padding_does_not_matter(is_own):
    rows = inputs()[0]
    padding = np.arange(rows.index.shape[1]) >= rows.count[:, None]
    index = np.where(padding, len(padding) - 1, rows.index).astype(np.int32)
    scrambled = rows_with(rows, np.where(padding[..., None], 1e3, rows.vector), index=index)
    _, scores, other = inputs()
    before, after = (found_frames(scores, scores if is_own else other, x)["pallas"] for x in (rows, scrambled))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("is_own", [True, False])
def test_rows_with_one_frame_take_four_passes(is_own, monkeypatch):
    """Others take one more for each first axis and for each frame, and one if another attention sees."""
    passes, along = collections.Counter(), kernels._along

    def counted(row, step, start):
        jax.debug.callback(lambda atom, head: passes.update([(int(atom), int(head))]), *row.at)
        return along(row, step, start)

    monkeypatch.setattr(kernels, "_along", counted)
    rows, scores, other = inputs()
    seeing = scores if is_own else other
    compiled.cache_clear()
    firsts, numbers = assert_choice(found_frames(scores, seeing, rows), scores, seeing, rows)
    jax.effects_barrier()
    compiled.cache_clear()
    expected = 4 + np.where(numbers > 1, firsts + numbers + (not is_own), 0)
    counts = np.array([[passes[atom, head] for head in range(expected.shape[1])] for atom in range(len(expected))])
    np.testing.assert_array_equal(counts, expected)
    assert {4, 34 + (not is_own)} <= set(counts[:, 0].tolist())  # in rock salt 6 first axes and 24 frames
