"""Max frames that the crystal chooses among ties: both implementations against a search in float64.

Frames that see equally much may be taken for each other, if the sums over the neighbors are the same in both.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import SYMMETRIC, batch_of, primitive

from crystalframer_jax.kernels import frames as kernels
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
    """Both of the `found` frames [N, H, 3, 3] are the right ones. Returns the numbers of candidates [N, H]."""
    numbers, rounding = np.zeros(found[0].shape[:2], int), ROUNDING[dtype]
    for (atom, head), _ in np.ndenumerate(numbers):
        mine = [x[atom, head].astype(float) for x in found]
        if rows.count[atom] < 2:
            assert not np.any(mine)
            continue
        vector = rows.vector[atom, : rows.count[atom]].astype(float)
        length = np.linalg.norm(vector, axis=-1, keepdims=True)
        unit = vector / np.where(length > 0, length, 1)
        candidates = all_frames(logits_of(scores, rows, atom, head), unit, tolerance)
        logits = logits_of(seeing, rows, atom, head)
        seen = sees(candidates, logits, unit)
        numbers[atom, head] = len(seen)
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
        return MAX_FRAMES[kind](q, k, a, rows, tolerance, None, Attention(q, k, a) if is_own else Attention(*seeing))

    return jax.jit(frames, static_argnums=4)


def found_frames(scores, seeing, rows, tolerance=TIE_TOLERANCE, dtype=np.float32):
    """Frames of both implementations, for attentions (q, k, a) and rows in float64."""
    with jax.enable_x64(dtype == np.float64):
        is_own = seeing is scores
        scores, seeing = ([x.astype(dtype) for x in attention] for attention in (scores, seeing))
        rows = dataclasses.replace(rows, vector=rows.vector.astype(dtype))
        return [
            np.asarray(compiled(kind, is_own)(*scores, rows, tolerance, None if is_own else seeing))
            for kind in MAX_FRAMES
        ]


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
    numbers = assert_choice(found, scores, seeing, rows, dtype=dtype)
    assert {24, 2} <= set(numbers[:, 0].tolist()) and 0 in numbers  # cubes, a mirror, padding
    assert numbers[:, HEADS.index("flat")].max() > 40
