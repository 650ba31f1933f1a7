"""Eigenvectors of symmetric 3x3 matrices against LAPACK; axes of a frame that turn with the crystal even where free."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_rotation

from crystalframer_jax.ops.eigen import eigh3, principal_frames

NUMBER = 5000  # matrices of each kind
TOLERANCE = 1e-4  # relative gap below which eigenvalues count as equal
# Errors are relative to the largest eigenvalue. These are 25 and 50 roundings; the largest error measured is 10.
ROUNDING = {np.float32: 3e-6, np.float64: 1e-14}

compiled_eigh3 = jax.jit(eigh3)


@functools.partial(jax.jit, static_argnums=2)
def compiled_frames(matrix, anchor, tolerance, signs):
    """principal_frames of matrices of any trace."""
    trace = jnp.trace(matrix, axis1=-2, axis2=-1)[:, None, None]
    return principal_frames(*eigh3(matrix / jnp.where(trace > 0, trace, 1)), anchor, tolerance, signs)


def symmetric(rng, number):
    matrix = rng.normal(size=(number, 3, 3))
    return matrix + matrix.swapaxes(1, 2)


def with_values(rng, values):
    """Matrices [n, 3, 3] with eigenvalues [n, 3] along random axes."""
    axes, _ = np.linalg.qr(rng.normal(size=(len(values), 3, 3)))
    return (axes * values[:, None, :]) @ axes.swapaxes(1, 2)


def around_the_clock(rng, values):
    """Matrices with the eigenvalues `values` [3] along random axes."""
    return with_values(rng, np.tile(values, (NUMBER, 1)))


def graded(rng):
    """Entries of one matrix over many orders of magnitude."""
    scale = 10.0 ** rng.uniform(-6, 6, (NUMBER, 3))
    return symmetric(rng, NUMBER) * scale[:, :, None] * scale[:, None, :]


def nearly_diagonal(rng):
    """Off-diagonal entries so small that their square is zero, beside equal and different diagonal entries."""
    upper = np.triu(10.0 ** rng.uniform(-35, 0, (NUMBER, 3, 3)), 1)
    return upper + upper.swapaxes(1, 2) + rng.integers(0, 2, (NUMBER, 3, 1)) * np.eye(3)


MATRICES = {
    "random": lambda rng: symmetric(rng, NUMBER),
    "tiny and huge": lambda rng: symmetric(rng, NUMBER) * 10.0 ** rng.uniform(-12, 12, (NUMBER, 1, 1)),
    "graded": graded,
    "wide spectrum": lambda rng: with_values(rng, 10.0 ** rng.uniform(-12, 12, (NUMBER, 3))),
    "diagonal": lambda rng: rng.normal(size=(NUMBER, 3, 1)) * np.eye(3),
    "nearly diagonal": nearly_diagonal,
    "two equal, small": lambda rng: around_the_clock(rng, [1.0, 1.0, 2.0]),
    "two equal, large": lambda rng: around_the_clock(rng, [-1.0, 2.0, 2.0]),
    "nearly equal": lambda rng: around_the_clock(rng, [1.0, 1 + 1e-6, 1 - 1e-12]),
    "rank one": lambda rng: around_the_clock(rng, [0.0, 0.0, 1.0]),
    "opposite": lambda rng: around_the_clock(rng, [-1.0, 0.0, 1.0]),
    "identity": lambda rng: np.eye(3)[None],
    "zero": lambda rng: np.zeros((1, 3, 3)),
    "all ones": lambda rng: np.ones((1, 3, 3)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_eigenvalues_and_eigenvectors_are_those_of_lapack(kind, dtype):
    """Values, residuals and orthogonality; together they fix the eigenvectors as far as the matrix does."""
    matrix = MATRICES[kind](np.random.default_rng(0)).astype(dtype)
    values, axes = (np.asarray(x) for x in compiled_eigh3(matrix))
    assert values.dtype == axes.dtype == dtype
    matrix, values, axes = (x.astype(np.float64) for x in (matrix, values, axes))
    expected = np.linalg.eigvalsh(matrix)
    assert np.all(np.diff(values, axis=-1) >= 0)
    scale = np.where(expected.any(axis=-1), np.abs(expected).max(axis=-1), 1)[:, None]
    np.testing.assert_allclose(values / scale, expected / scale, rtol=0, atol=ROUNDING[dtype])
    residual = (matrix @ axes - axes * values[:, None, :]) / scale[..., None]
    np.testing.assert_allclose(residual, 0, atol=ROUNDING[dtype])
    np.testing.assert_allclose(axes.swapaxes(1, 2) @ axes - np.eye(3), 0, atol=ROUNDING[dtype])


def test_eigenvectors_are_those_of_lapack_up_to_sign(x64):
    matrix = symmetric(np.random.default_rng(1), NUMBER)
    expected_values, expected = np.linalg.eigh(matrix)
    separate = np.diff(expected_values, axis=-1).min(axis=-1) > 1e-2
    assert np.mean(separate) > 0.9
    overlap = np.abs(np.einsum("nxi,nxj->nij", compiled_eigh3(matrix)[1], expected))
    np.testing.assert_allclose(overlap[separate] - np.eye(3), 0, atol=1e-12)


def test_diagonal_matrix_keeps_the_coordinate_axes():
    values, axes = compiled_eigh3(np.diag([3.0, 1.0, 2.0]).astype(np.float32))
    np.testing.assert_array_equal(values, [1, 2, 3])
    np.testing.assert_array_equal(axes, np.eye(3)[:, [1, 2, 0]])
    np.testing.assert_array_equal(compiled_eigh3(np.eye(3, dtype=np.float32))[1], np.eye(3))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 5)])
def test_batch_shapes_and_vmap(shape):
    matrix = symmetric(np.random.default_rng(2), int(np.prod(shape))).reshape(*shape, 3, 3).astype(np.float32)
    values, axes = compiled_eigh3(matrix)
    assert (values.shape, axes.shape) == ((*shape, 3), (*shape, 3, 3))
    if shape:
        mapped = jax.jit(jax.vmap(eigh3))(matrix)
        np.testing.assert_allclose(mapped[0], values, atol=1e-6)
        np.testing.assert_allclose(mapped[1], axes, atol=1e-5)


# Axes of a frame


DEGENERACIES = {
    "none": [0.1, 0.3, 0.6],
    "small pair": [0.2, 0.2, 0.6],
    "large pair": [0.1, 0.45, 0.45],
    "all": [1 / 3, 1 / 3, 1 / 3],
    "one direction": [0.0, 0.0, 1.0],
    "nothing": [0.0, 0.0, 0.0],
    "small pair within the tolerance": [0.2, 0.2 + 0.5 * TOLERANCE, 0.6],
    "large pair within the tolerance": [0.1, 0.45, 0.45 + 0.5 * TOLERANCE],
    "all within the tolerance": [1 / 3, 1 / 3 + 0.3 * TOLERANCE, 1 / 3 + 0.6 * TOLERANCE],
}
PAIRS = {"small pair": [0, 1], "large pair": [1, 2], "one direction": [0, 1]}  # eigenvectors that share an eigenvalue
SIGNS = np.array(list(itertools.product([1.0, -1.0], repeat=2)))
PROPER = np.column_stack([SIGNS, SIGNS.prod(axis=1)])  # of e1, e2, e3


FRAMES = 200  # one compiled program for all tests


def anchors(rng):
    """Right-handed frames, at random to the axes of the matrix."""
    return np.stack([random_rotation(rng) for _ in range(FRAMES)])


def example(degeneracy):
    rng = np.random.default_rng(3)
    matrix = 7.0 * with_values(rng, np.tile(DEGENERACIES[degeneracy], (FRAMES, 1)))
    return rng, matrix, anchors(rng)


@pytest.mark.parametrize("degeneracy", DEGENERACIES)
def test_axes_are_eigenvectors_in_order_and_right_handed(degeneracy, x64):
    _, matrix, anchor = example(degeneracy)
    frames = np.asarray(compiled_frames(matrix, anchor, TOLERANCE, None))
    np.testing.assert_allclose(frames @ frames.swapaxes(1, 2) - np.eye(3), 0, atol=1e-13)
    np.testing.assert_allclose(np.linalg.det(frames), 1, atol=1e-13)
    in_frame = frames @ matrix @ frames.swapaxes(1, 2) / 7
    error = 1e-13 if "tolerance" not in degeneracy else TOLERANCE  # these follow the anchor, not the matrix
    np.testing.assert_allclose(in_frame - np.diag(DEGENERACIES[degeneracy]), 0, atol=error)


@pytest.mark.parametrize("signs", [None, (1, 1), (1, -1), (-1, 1), (-1, -1)], ids=str)
@pytest.mark.parametrize("degeneracy", DEGENERACIES)
def test_axes_turn_with_matrix_and_anchor(degeneracy, signs, x64):
    """Also if the signs are given (drawn): the average over a few draws must not depend on how the crystal lies."""
    rng, matrix, anchor = example(degeneracy)
    signs = None if signs is None else np.tile(np.array(signs, float), (len(matrix), 1))
    frames = np.asarray(compiled_frames(matrix, anchor, TOLERANCE, signs))
    for _ in range(3):
        turn = random_rotation(rng)
        turned = compiled_frames(turn @ matrix @ turn.T, anchor @ turn.T, TOLERANCE, signs)
        np.testing.assert_allclose(turned, frames @ turn.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("degeneracy", ["all", "nothing", "all within the tolerance"])
def test_axes_of_no_preference_are_those_of_the_anchor(degeneracy, x64):
    _, matrix, anchor = example(degeneracy)
    overlap = np.abs(compiled_frames(matrix, anchor, TOLERANCE, None) @ anchor.swapaxes(1, 2))
    np.testing.assert_allclose(overlap - np.eye(3)[::-1], 0, atol=1e-10)


@pytest.mark.parametrize("degeneracy", PAIRS)
def test_a_shared_eigenvalue_leaves_the_choice_to_the_anchor(degeneracy, x64):
    """Another anchor turns the two axes within their plane and nothing else."""
    rng, matrix, anchor = example(degeneracy)
    first, second = (np.asarray(compiled_frames(matrix, x, TOLERANCE, None)) for x in (anchor, anchors(rng)))
    overlap = np.abs(np.einsum("nix,njx->nij", first, second))
    pair = np.array(PAIRS[degeneracy])
    (other,) = {0, 1, 2} - set(PAIRS[degeneracy])
    np.testing.assert_allclose(overlap[:, other, other], 1, atol=1e-12)
    assert np.median(overlap[:, pair, pair]) < 0.9  # uniform angles in the plane: 0.71


def test_without_degeneracy_the_anchor_settles_signs_only(x64):
    rng, matrix, anchor = example("none")
    first, second = (np.asarray(compiled_frames(matrix, x, TOLERANCE, None)) for x in (anchor, anchors(rng)))
    overlap = np.einsum("nix,njx->nij", first, second)
    np.testing.assert_allclose(np.abs(overlap) - np.eye(3), 0, atol=1e-12)
    choices = np.round(np.diagonal(overlap, axis1=1, axis2=2))
    assert {tuple(choice) for choice in choices} == {tuple(choice) for choice in PROPER}


def test_a_gap_of_half_the_tolerance_is_none_and_one_of_twice_the_tolerance_is_one(x64):
    rng = np.random.default_rng(4)
    anchor = anchors(rng)
    for gap, follows_anchor in ((0.5, True), (2.0, False)):
        values = np.tile([0.2, 0.2 + gap * TOLERANCE, 0.6], (FRAMES, 1))
        matrix = with_values(rng, values / values.sum(axis=1, keepdims=True))
        frames = np.asarray(compiled_frames(matrix, anchor, TOLERANCE, None))
        off_diagonal = np.abs((frames @ matrix @ frames.swapaxes(1, 2))[:, 0, 1])
        assert np.all(off_diagonal < 1e-12) != follows_anchor
        assert np.all(off_diagonal < TOLERANCE)


@pytest.mark.parametrize("degeneracy", ["none", "small pair", "all"])
def test_frames_do_not_depend_on_the_signs_and_the_choice_of_the_eigenvectors(degeneracy, x64):
    """Eigenvectors may come from anywhere: LAPACK turns them otherwise than Jacobi rotations do."""
    _, matrix, anchor = example(degeneracy)
    values, axes = np.linalg.eigh(matrix / 7)
    for signs in (None, np.tile([1.0, -1.0], (FRAMES, 1))):
        expected = compiled_frames(matrix, anchor, TOLERANCE, signs)
        frames = jax.jit(principal_frames, static_argnums=3)(values, axes, anchor, TOLERANCE, signs)
        np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("degeneracy", ["none", "small pair", "all"])
def test_given_signs_make_the_four_right_handed_frames(degeneracy, x64):
    _, matrix, anchor = example(degeneracy)
    frames = [np.asarray(compiled_frames(matrix, anchor, TOLERANCE, np.tile(signs, (FRAMES, 1)))) for signs in SIGNS]
    for frame, signs in zip(frames, PROPER, strict=True):
        np.testing.assert_array_equal(frame, frames[0] * signs[:, None])
    of_anchor = np.asarray(compiled_frames(matrix, anchor, TOLERANCE, None))
    distance = np.min([np.abs(frame - of_anchor).max(axis=(1, 2)) for frame in frames], axis=0)
    np.testing.assert_allclose(distance, 0, atol=1e-12)


def test_axes_in_float32_equal_those_in_float64():
    """Also degenerate ones: rounding splits an eigenvalue by far less than the tolerance."""
    for degeneracy in ("none", "small pair", "large pair", "all", "one direction", "nothing"):
        _, matrix, anchor = example(degeneracy)
        with jax.enable_x64(True):
            expected = np.asarray(compiled_frames(matrix, anchor, TOLERANCE, None))
        frames = np.asarray(compiled_frames(matrix.astype(np.float32), anchor.astype(np.float32), TOLERANCE, None))
        assert frames.dtype == np.float32
        error = np.abs(frames - expected).max(axis=(1, 2))
        # Anchors whose projected axes are nearly as wide as high amplify rounding; they are few.
        assert np.quantile(error, 0.9) < 1e-5
        np.testing.assert_allclose(np.linalg.det(frames), 1, atol=1e-5)
