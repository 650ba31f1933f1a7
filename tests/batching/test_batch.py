"""Packing crystals into batches: nothing but the crystals decides what the model makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    AS_USERS_DO,
    atom_places,
    batch_of,
    primitive,
    random_crystal,
    random_rotation,
    random_variables,
    real_crystals,
    rotated,
    small_config,
)

from crystalframer_jax.batching.batch import fill_factors, pack, unpacked
from crystalframer_jax.batching.shapes import (
    ATOM_BLOCK,
    CELL_BLOCK,
    EDGE_BLOCK,
    BatchShape,
    plan_shapes,
    round_up,
    shape_for,
    shared_out,
)
from crystalframer_jax.batching.table import COLUMNS, CrystalTable, make_table, narrowest
from crystalframer_jax.config import NO_PARTS, BatchParts
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER, Crystal
from crystalframer_jax.structures.lattice import lattice_frames
from crystalframer_jax.structures.neighbors import displacements, neighbor_rows

RADIUS = 5.0  # Å: rows below 48
CONFIG = small_config(value_pe_angle_real=16, value_pe_angle_wscale=1.0)
SMALL = BatchShape(64, 64, 4)
SHAPES = {"more atoms and crystals": BatchShape(128, 64, 9), "longer rows": BatchShape(64, 128, 4)}


@functools.cache
def crystals():
    """Four crystals without symmetry; together 34 atoms in rows of 14 to 36 neighbors."""
    rng = np.random.default_rng(21)
    return [random_crystal(rng, size, volume) for size, volume in [(12, 20.0), (1, 30.0), (16, 15.0), (5, 25.0)]]


@functools.cache
def variables(dtype=np.float32):
    return random_variables(CONFIG, dtype=dtype)


def packed_exactly(crystals, shape=SMALL):
    """A batch in float64, of which nothing is lost by rounding."""
    return batch_of(crystals, RADIUS, np.float64, shapes=shape)


@jax.enable_x64(True)
def evaluate(batch, weights):
    """Predictions [B], and gradients of sum(weights * predictions) by all parameters, in float64."""
    return jax.tree.map(np.asarray, predictions_and_gradients(variables(np.float64), batch, np.float64(weights)))


@jax.jit
def predictions_and_gradients(variables, batch, weights):
    def weighted(params):
        predictions = CrystalFramer(CONFIG).apply({**variables, "params": params}, batch)[:, 0]
        return jnp.sum(weights * predictions), predictions

    gradients, predictions = jax.grad(weighted, has_aux=True)(variables["params"])
    return predictions, gradients


@functools.partial(jax.jit, compiler_options=AS_USERS_DO)  # unpacked inside or outside: the same bits
def predict(variables, batch):
    return CrystalFramer(CONFIG).apply(variables, batch)[:, 0]


# Distinct, so that crystals cannot be exchanged unnoticed; those of the crystals in front of the others.
WEIGHTS = 1.0, -0.7, 0.5, 0.3


def evaluate_packed(packed, shape):
    """Predictions and gradients of crystals(), which `packed` begins with."""
    weights = np.zeros(shape.num_crystals)
    weights[:4] = WEIGHTS
    predictions, gradients = evaluate(packed_exactly(packed, shape), weights)
    return predictions[: len(packed)], gradients


@pytest.fixture(scope="module")
def reference():
    return evaluate_packed(crystals(), SMALL)


def assert_same_gradients(actual, expected):
    """To 1e-12 of the largest entry of each parameter (but the biases of keys, whose gradients are zero)."""
    errors = jax.tree.map(lambda a, e: np.abs(a - e).max() / np.abs(e).max(), actual, expected)
    for path, error in jax.tree_util.tree_leaves_with_path(errors):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert name.endswith("k/bias") or error < 1e-12, name


def table_of(packed, radius=RADIUS):
    return make_table(packed, [neighbor_rows(crystal, radius) for crystal in packed])


def packed_of(crystals, shape=None, radius=RADIUS):
    """The batch of crystals as it leaves the host."""
    table, indices = table_of(crystals, radius), np.arange(len(crystals))
    return pack(table, indices, shape or shape_for(table, indices))


# What stands beside a crystal does not change it. Equal bits are not to be had: another shape is another program, which
# sums in another order. Exact are the zeros of padding atoms (test_lattice_sums.py) and the frames (test_frames.py).


@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_no_result(name, reference):
    predictions, gradients = evaluate_packed(crystals(), SHAPES[name])
    np.testing.assert_allclose(predictions, reference[0], rtol=0, atol=1e-12)
    assert_same_gradients(gradients, reference[1])


def test_predictions_differ_between_crystals(reference):
    assert np.diff(np.sort(reference[0])).min() > 0.05


def test_other_crystals_change_no_result(reference):
    """They even change the order of the atoms, which stand by the lengths of their rows."""
    rng = np.random.default_rng(22)
    others = [random_crystal(rng, size, 18.0) for size in (20, 1, 9)]
    packed = crystals() + others
    predictions, gradients = evaluate_packed(packed, SHAPES["more atoms and crystals"])
    np.testing.assert_allclose(predictions[:4], reference[0], rtol=0, atol=1e-12)
    assert_same_gradients(gradients, reference[1])


def test_order_of_crystals_is_kept(reference):
    order = [2, 0, 3, 1]
    predictions, _ = evaluate(packed_exactly([crystals()[i] for i in order]), np.zeros(4))
    np.testing.assert_allclose(predictions, reference[0][order], rtol=0, atol=1e-12)


def test_padding_crystals_get_finite_predictions():
    predictions, gradients = evaluate(packed_exactly(crystals()[:1]), np.ones(4))
    assert np.isfinite(predictions).all()
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


# The arrays of a batch


def test_arrays_describe_the_crystals():
    batch = batch_of(crystals(), RADIUS, shapes=SHAPES["more atoms and crystals"])
    sizes = [crystal.num_atoms for crystal in crystals()]
    places = atom_places(batch)
    np.testing.assert_array_equal(batch.crystal_sizes, [*sizes, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.species[places], np.concatenate([c.species for c in crystals()]))
    np.testing.assert_array_equal(batch.crystal_of_atom[places], np.repeat(np.arange(4), sizes))
    np.testing.assert_array_equal(batch.atom_in_crystal[places], np.concatenate([np.arange(size) for size in sizes]))
    assert batch.occupancies is None
    padding = batch.species == 0
    assert padding.sum() == 128 - sum(sizes)
    np.testing.assert_array_equal(batch.crystal_of_atom[padding], 9)
    np.testing.assert_array_equal(batch.rows.count[padding], 0)


def test_rows_are_those_of_the_crystals():
    batch = batch_of(crystals(), RADIUS, shapes=SMALL)
    places = np.split(atom_places(batch), np.cumsum([crystal.num_atoms for crystal in crystals()])[:-1])
    for crystal, place in zip(crystals(), places, strict=True):
        rows = neighbor_rows(crystal, RADIUS)
        np.testing.assert_array_equal(batch.rows.count[place], rows.count)
        index = np.concatenate([batch.rows.index[p, : batch.rows.count[p]] for p in place])
        vector = np.concatenate([batch.rows.vector[p, : batch.rows.count[p]] for p in place])
        np.testing.assert_array_equal(index, place[rows.index])
        np.testing.assert_allclose(vector, displacements(crystal, rows), rtol=0, atol=1e-6)


def test_reverse_points_back():
    rows = batch_of(crystals(), RADIUS, shapes=SMALL).rows
    center, column = np.nonzero(np.arange(SMALL.row_length) < rows.count[:, None])
    reverse = np.unravel_index(rows.reverse[center, column], rows.index.shape)
    np.testing.assert_array_equal(reverse[0], rows.index[center, column])
    np.testing.assert_array_equal(rows.index[reverse], center)
    np.testing.assert_allclose(rows.vector[reverse], -rows.vector[center, column], rtol=0, atol=1e-6)


# Displacement vectors, which the device computes from integers and coordinates in a reduced basis


RELABELLED = {  # descriptions of one crystal: change of its lattice vectors, images in which its atoms are given
    "as it is": (np.eye(3), np.zeros((12, 3))),
    "oblique": (np.array([[1, 0, 0], [10, 1, 0], [0, 0, 1]]), np.zeros((12, 3))),
    "very oblique": (np.array([[1, 0, 0], [40, 1, 0], [-25, 3, 1]]), np.zeros((12, 3))),
    "left-handed": (np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]), np.zeros((12, 3))),
    "far from the cell": (np.eye(3), np.full((12, 3), [7000, -300, 41])),
    "scattered atoms": (np.eye(3), np.random.default_rng(31).integers(-2000, 2000, (12, 3))),
    "atoms a million cells away": (np.eye(3), 1_000_000 * np.eye(12, 3)),
}


def described(crystal, change, images):
    """Another description of a crystal, and its neighbor rows in the order of those of the crystal."""
    rows, images = neighbor_rows(crystal, RADIUS), images[: crystal.num_atoms].astype(int)
    image = (rows.image - images[rows.index] + images[rows.center]) @ np.rint(np.linalg.inv(change)).astype(int)
    positions = crystal.positions + images @ crystal.lattice
    other = dataclasses.replace(crystal, positions=positions, lattice=change @ crystal.lattice)
    return other, dataclasses.replace(rows, image=image)


def brute_force_vectors(crystal, atom):
    """All vectors from an atom to atoms within RADIUS, [number, 3] float64, by looking at all images in a large box."""
    steps = np.arange(-4, 5)
    images = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3) @ crystal.lattice
    vectors = ((crystal.positions - crystal.positions[atom])[:, None] + images).reshape(-1, 3)
    return vectors[np.linalg.norm(vectors, axis=1) <= RADIUS]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("name", RELABELLED)
def test_vectors_are_exact_however_a_crystal_is_described(name, dtype, tolerance):
    """But for the rounding of large coordinates, which are given in float64."""
    for crystal in (crystals()[0], crystals()[3]):
        other, rows = described(crystal, *RELABELLED[name])
        largest = max(np.abs(other.positions).max(), np.abs(other.lattice).max())
        rounding = 4 * np.finfo(np.float64).eps * largest
        shape = dataclasses.replace(SMALL, parts=BatchParts(dtype=np.dtype(dtype).name))
        with jax.enable_x64(dtype == np.float64):
            batch = jax.jit(unpacked)(pack(make_table([other], [rows]), np.array([0]), shape))
        for atom, place in enumerate(atom_places(batch)):
            actual = np.asarray(batch.rows.vector[place, : batch.rows.count[place]])
            expected = brute_force_vectors(crystal, atom)
            assert actual.dtype == dtype and actual.shape == expected.shape
            distance = np.linalg.norm(actual[:, None] - expected, axis=-1)
            assert sorted(distance.argmin(axis=1)) == list(range(len(expected)))  # the same vectors, each once
            assert distance.min(axis=1).max() <= tolerance + rounding


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_vectors_of_real_crystals(dtype, tolerance):
    """Within 7 Å, the radius of the default model, also in a very flat description of the cell."""
    flat = Crystal([11, 17], np.array([[0, 0, 0], [1.4, 1.2, 3.3]]), np.array([[3.0, 0, 0], [30, 3, 0], [0.5, 0, 7]]))
    for crystal in [*real_crystals(["mp-626708", "mp-1900", "mp-22747"]), primitive("hcp"), flat]:
        rows = neighbor_rows(crystal, 7.0)
        batch = batch_of([crystal], 7.0, dtype)
        place = atom_places(batch)
        vectors = np.concatenate([batch.rows.vector[p, : batch.rows.count[p]] for p in place])
        np.testing.assert_allclose(vectors, displacements(crystal, rows), rtol=0, atol=tolerance)


def test_squares_have_the_same_bits_however_a_crystal_is_described():
    """Rounded once from float64: but for one in very many, which lies between two numbers."""
    crystal, rng = crystals()[3], np.random.default_rng(32)
    expected = neighbor_rows(crystal, RADIUS)
    expected = np.sum(displacements(crystal, expected) ** 2, axis=1).astype(np.float32)
    for change, images in RELABELLED.values():
        if np.abs(images).max() < 100:  # others lose digits
            other = rotated(described(crystal, change, images)[0], random_rotation(rng))
            rows = batch_of([other], RADIUS).rows
            squares = rows.square[np.arange(rows.square.shape[1]) < rows.count[:, None]]
            np.testing.assert_array_equal(np.sort(squares), np.sort(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_are_the_negatives_of_their_reverse(dtype):
    """To the bit; padding is zero and refers to the atom itself."""
    rows = batch_of(crystals(), RADIUS, dtype, SMALL).rows
    is_real = np.arange(SMALL.row_length) < rows.count[:, None]
    reverse = rows.vector.reshape(-1, 3)[rows.reverse]
    np.testing.assert_array_equal(reverse[is_real], -rows.vector[is_real])
    for array in (rows.vector, rows.square, rows.reverse):
        np.testing.assert_array_equal(array[~is_real], 0)
    np.testing.assert_array_equal(rows.index[~is_real], np.nonzero(~is_real)[0])


def test_neighbors_take_few_bytes():
    table = table_of(crystals())
    assert (table.image.dtype, table.reverse.dtype, table.count.dtype) == (np.int8, np.uint16, np.uint16)
    assert table.image.nbytes + table.reverse.nbytes == 5 * len(table.image)
    rows = packed_of(crystals()).rows
    assert (rows.image.dtype, rows.reverse.dtype) == (np.int8, np.uint16)


def test_wide_values_take_wide_types():
    """Atoms far apart have large images; the type of a column is the narrowest that holds it."""
    for cells, kind in (10, np.int8), (300, np.int16), (40_000, np.int32):
        crystal, rows = described(crystals()[0], np.eye(3), cells * np.eye(12, 3))
        assert make_table([crystal], [rows]).image.dtype == kind
    assert [narrowest("image", low, high) for low, high in [(-128, 127), (-129, 0), (0, 128), (0, 2**15)]] == [
        np.int8, np.int16, np.int16, np.int32,
    ]  # fmt: skip
    assert [narrowest(column, 0, 2**16 + x) for column in ("count", "reverse") for x in (-1, 0)] == [
        np.uint16, np.uint32, np.uint16, np.uint32,
    ]  # fmt: skip
    with pytest.raises(OverflowError, match="image: values from 0 to 2147483648 do not fit int32"):
        narrowest("image", 0, 2**31)


def test_unpacking_twice_changes_nothing():
    batch = jax.jit(unpacked)(packed_of(crystals()))
    assert unpacked(batch) is batch


def test_the_model_takes_packed_batches_too():
    packed = packed_of(crystals(), SMALL)
    np.testing.assert_array_equal(predict(variables(), packed), predict(variables(), jax.jit(unpacked)(packed)))


def test_atom_itself_is_exactly_at_zero():
    """The lattice sums know it by its distance."""
    rows = batch_of(crystals(), RADIUS, shapes=SMALL).rows
    np.testing.assert_array_equal(rows.vector[:, 0], 0)
    is_real = np.arange(1, SMALL.row_length) < rows.count[:, None]
    assert (np.linalg.norm(rows.vector[:, 1:], axis=-1)[is_real] > 0.1).all()


def test_atoms_stand_by_the_length_of_their_rows():
    assert (np.diff(batch_of(crystals(), RADIUS, shapes=SMALL).rows.count) <= 0).all()


def test_targets_and_their_mask():
    targets = np.array([[1.5, np.nan], [np.nan, np.nan], [np.inf, -2.0]])
    batch = batch_of(crystals()[:3], RADIUS, shapes=SMALL, targets=targets, num_targets=2)
    np.testing.assert_array_equal(batch.target_mask, [[True, False], [False, False], [False, True], [False, False]])
    np.testing.assert_array_equal(batch.targets, [[1.5, 0], [0, 0], [0, -2], [0, 0]])


def test_without_targets_none_is_known():
    batch = batch_of(crystals()[:3], RADIUS, shapes=SMALL, num_targets=2)
    assert batch.target_mask.shape == batch.targets.shape == (4, 2)
    assert not batch.target_mask.any()


# Parts that only some models need: cells, lattice frames, scatter, float64

ALL_PARTS = BatchParts(cells=True, lattice_frames=True, scatter=True)


def described_otherwise(crystal):
    """The same crystal in a left-handed cell, with every atom in some other cell."""
    shifts = np.random.default_rng(25).integers(-3, 4, (crystal.num_atoms, 3))
    lattice = crystal.lattice[[1, 0, 2]]
    return dataclasses.replace(crystal, positions=crystal.positions + shifts @ lattice, lattice=lattice)


@functools.cache
def other_crystals():
    return [described_otherwise(crystals()[0]), *crystals()[1:]]


def places_of_crystals(batch):
    """Places of the atoms of crystals(), crystal by crystal."""
    return np.split(atom_places(batch), np.cumsum([crystal.num_atoms for crystal in crystals()])[:-1])


@pytest.mark.parametrize("asked", ["nothing", "cells", "lattice_frames", "scatter"])
def test_parts_that_no_model_asked_for_are_absent(asked):
    parts = NO_PARTS if asked == "nothing" else BatchParts(**{asked: True})
    batch = batch_of(crystals(), RADIUS, shapes=SMALL, parts=parts)
    for part in ("cells", "lattice_frames", "scatter"):
        assert (getattr(batch, part) is not None) == (part == asked)
    expected = batch_of(crystals(), RADIUS, shapes=SMALL, parts=ALL_PARTS)
    jax.tree.map(np.testing.assert_array_equal, batch.rows, expected.rows)
    np.testing.assert_array_equal(batch.species, expected.species)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cells_are_the_atoms_of_the_crystal_in_their_order(dtype):
    """Fractional differences of all pairs, reduced to at most half a cell, and the metric of the reciprocal lattice."""
    batch = batch_of(other_crystals(), RADIUS, dtype, SHAPES["more atoms and crystals"], parts=ALL_PARTS)
    cells = batch.cells
    tolerance = 1e-14 if dtype == np.float64 else 1e-7
    for crystal, place in zip(other_crystals(), places_of_crystals(batch), strict=True):
        size = crystal.num_atoms
        np.testing.assert_array_equal(cells.count[place], size)
        np.testing.assert_array_equal(cells.index[place, :size], np.tile(place, (size, 1)))
        vector = cells.vector[place, :size].astype(np.float64)
        assert np.abs(vector).max() <= 0.5
        np.testing.assert_array_equal(vector[np.arange(size), np.arange(size)], 0)
        difference = crystal.positions[None, :] - crystal.positions[:, None]
        images = np.linalg.solve(crystal.lattice.T, difference.reshape(-1, 3).T).T.reshape(size, size, 3) - vector
        np.testing.assert_allclose(images, np.rint(images), rtol=0, atol=20 * tolerance)
        reciprocal = 2 * np.pi * np.linalg.inv(crystal.lattice).T
        np.testing.assert_allclose(cells.metric[place[0]], reciprocal @ reciprocal.T, rtol=0, atol=10 * tolerance)
        assert (cells.metric[place] == cells.metric[place[0]]).all()


def test_moved_atoms_have_the_same_cells():
    """Where an atom stands in multiples of the cell is left out of the differences."""
    crystal = crystals()[2]
    shifts = np.random.default_rng(26).integers(-3, 4, (crystal.num_atoms, 3))
    moved = dataclasses.replace(crystal, positions=crystal.positions + shifts @ crystal.lattice)
    first, second = (batch_of([c], RADIUS, np.float64, parts=ALL_PARTS).cells for c in (crystal, moved))
    np.testing.assert_allclose(second.vector, first.vector, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(second.metric, first.metric)


def test_reverse_of_cells_points_back():
    batch = batch_of(other_crystals(), RADIUS, np.float64, SHAPES["more atoms and crystals"], parts=ALL_PARTS)
    cells = batch.cells
    center, column = np.nonzero(np.arange(cells.index.shape[1]) < cells.count[:, None])
    assert len(center) == sum(crystal.num_atoms**2 for crystal in crystals())
    back, back_column = np.unravel_index(cells.reverse[center, column], cells.index.shape)
    np.testing.assert_array_equal(back, cells.index[center, column])
    np.testing.assert_array_equal(cells.index[back, back_column], center)
    halves = np.abs(np.abs(cells.vector[center, column]) - 0.5) < 1e-9  # +1/2 and -1/2 are the same place
    sums = cells.vector[back, back_column] + cells.vector[center, column]
    np.testing.assert_allclose(np.where(halves, 0, sums), 0, atol=1e-13)


def test_half_a_cell_is_reduced_too():
    """Differences of 1/2, and those that rounding puts beyond, stay within [-1/2, 1/2]."""
    cells = batch_of([primitive("rock salt"), primitive("perovskite")], RADIUS, np.float64, parts=ALL_PARTS).cells
    assert np.abs(cells.vector).max() <= 0.5
    np.testing.assert_allclose(np.unique(np.round(np.abs(cells.vector), 12)), [0, 0.5])


def test_padding_of_cells():
    batch = batch_of(crystals(), RADIUS, shapes=SHAPES["more atoms and crystals"], parts=ALL_PARTS)
    assert batch.cells.index.shape == (128, 16)  # the largest of the four cells has 16 atoms
    padding = batch.species == 0
    for array in (batch.cells.count, batch.cells.metric, batch.cells.vector, batch.cells.index, batch.cells.reverse):
        np.testing.assert_array_equal(array[padding], 0)
    beyond = np.arange(16) >= batch.cells.count[:, None]
    np.testing.assert_array_equal(batch.cells.vector[beyond], 0)


def test_shapes_with_cells_hold_the_largest_cell():
    table, indices = table_of(crystals()), np.arange(4)
    shape = shape_for(table, indices, ALL_PARTS)
    assert shape.parts == ALL_PARTS and shape.cell_length == 16
    assert shape_for(table, np.array([1]), ALL_PARTS).cell_length == CELL_BLOCK
    assert shape_for(table, indices).cell_length == 0
    assert all(s.cell_length == 16 and s.parts == ALL_PARTS for s in plan_shapes(table, indices, 2, 48, ALL_PARTS))
    short = dataclasses.replace(shape, cell_length=15)
    with pytest.raises(ValueError, match="fit none"):
        pack(table, indices, short)
    assert pack(table, indices, shared_out(table, indices, [short, shape]).shape).cells.index.shape[1] == 16
    assert pack(table, indices, dataclasses.replace(short, parts=NO_PARTS)).cells is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scatter_is_that_of_the_atoms_as_given(dtype):
    """Eigenvalues, relative to their sum, and eigenvectors of the centred positions, which are not reduced."""
    scatter = batch_of(other_crystals(), RADIUS, dtype, SHAPES["more atoms and crystals"], parts=ALL_PARTS).scatter
    assert scatter.values.shape == (9, 3) and scatter.axes.shape == (9, 3, 3)
    for crystal, values, axes in zip(other_crystals(), scatter.values, scatter.axes, strict=False):
        expected = np.cov(crystal.positions.T, ddof=0) if crystal.num_atoms > 1 else np.zeros((3, 3))
        expected /= max(np.trace(expected), 1e-3)
        tolerance = 1e-13 if dtype == np.float64 else 1e-6
        np.testing.assert_allclose((axes * values) @ axes.T, expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), rtol=0, atol=tolerance)
        assert (np.diff(values) >= 0).all()
    np.testing.assert_array_equal(scatter.values[1], 0)  # one atom
    assert np.abs(scatter.values[[0, 2, 3]].sum(axis=1) - 1).max() < 1e-6
    np.testing.assert_array_equal(scatter.values[4:], 0)
    np.testing.assert_array_equal(scatter.axes[4:], 0)


def test_scatter_of_far_positions_keeps_its_precision():
    """The centre is subtracted in float64."""
    crystal = crystals()[3]
    far = dataclasses.replace(crystal, positions=crystal.positions + 1e6)
    near, moved = (batch_of([c], RADIUS, parts=ALL_PARTS).scatter for c in (crystal, far))
    np.testing.assert_allclose(moved.values, near.values, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.abs(moved.axes), np.abs(near.axes), rtol=0, atol=1e-6)


def test_scatter_of_equal_places_is_none():
    """One atom anywhere: what rounding leaves is no direction."""
    crystal = dataclasses.replace(crystals()[1], positions=np.array([[1e3 + 1 / 3, -77.7, 0.1]]))
    np.testing.assert_array_equal(batch_of([crystal], RADIUS, parts=ALL_PARTS).scatter.values, 0)


def test_lattice_frames_are_those_of_each_crystal():
    batch = batch_of(other_crystals(), RADIUS, np.float64, SHAPES["more atoms and crystals"], parts=ALL_PARTS)
    packed, shares = batch.lattice_frames.frames, batch.lattice_frames.shares
    for crystal, own, share in zip(other_crystals(), packed, shares, strict=False):
        frames, expected = lattice_frames(crystal.lattice, 1e-4)
        np.testing.assert_array_equal(own[: len(frames)], frames)
        np.testing.assert_array_equal(share[: len(frames)], expected)
        assert not own[len(frames) :].any() and not share[len(frames) :].any()
    assert not packed[4:].any()


@pytest.mark.parametrize("name", ["random", "mp-626708", "fcc", "hcp"])
def test_the_first_axis_is_along_a_shortest_lattice_vector(name):
    """Also of cells whose own vectors are almost parallel."""
    if name == "random":
        crystal = crystals()[0]
    else:
        crystal = real_crystals([name])[0] if name.startswith("mp") else primitive(name)
    grid = np.stack(np.meshgrid(*[np.arange(-12, 13)] * 3), -1).reshape(-1, 3) @ crystal.lattice
    length = np.linalg.norm(grid, axis=1)
    shortest = grid[(length > 0) & (length < length[length > 0].min() + 1e-4)]
    for lattice in (crystal.lattice, np.array([[1, 3, -2], [0, 1, 4], [0, 0, 1]]) @ crystal.lattice):
        first = lattice_frames(lattice, 1e-4)[0][:, 0]
        unit = shortest / np.linalg.norm(shortest, axis=1, keepdims=True)
        np.testing.assert_allclose((first @ unit.T).max(axis=1), 1, atol=1e-9)


def test_batches_in_float64_are_not_rounded():
    single, double = (batch_of(crystals(), RADIUS, d, SMALL, parts=ALL_PARTS) for d in (np.float32, np.float64))
    targets = np.full((4, 1), 1 / 3)
    pairs = [
        (single.scatter.values, double.scatter.values),
        (single.scatter.axes, double.scatter.axes),
        (single.cells.vector, double.cells.vector),
        (single.cells.metric, double.cells.metric),
        (single.lattice_frames.frames, double.lattice_frames.frames),
    ]
    for rounded, exact in pairs:
        assert rounded.dtype == np.float32 and exact.dtype == np.float64
        np.testing.assert_array_equal(rounded, exact.astype(np.float32))
        assert (rounded != exact).any()
    assert batch_of(crystals(), RADIUS, np.float64, SMALL, targets).targets[0, 0] == 1 / 3
    assert batch_of(crystals(), RADIUS, np.float32, SMALL, targets).targets[0, 0] == np.float32(1 / 3)
    places = places_of_crystals(double)
    for crystal, place in zip(crystals(), places, strict=True):
        vectors = np.concatenate([double.rows.vector[p, : double.rows.count[p]] for p in place])
        np.testing.assert_allclose(vectors, displacements(crystal, neighbor_rows(crystal, RADIUS)), rtol=0, atol=1e-12)


# Disordered crystals


def occupied(crystal, shares):
    """The crystal with occupancies: those of `shares` {site: {atomic number: share}}, one atom on all other sites."""
    occupancies = np.eye(MAX_ATOMIC_NUMBER)[crystal.species - 1]
    for site, elements in shares.items():
        occupancies[site] = 0
        for number, share in elements.items():
            occupancies[site, number - 1] = share
    return dataclasses.replace(crystal, species=occupancies.argmax(axis=1) + 1, occupancies=occupancies)


def test_occupancies_of_one_are_an_ordered_crystal():
    ordered = batch_of(crystals(), RADIUS, shapes=SMALL)
    batch = batch_of([occupied(crystal, {}) for crystal in crystals()], RADIUS, shapes=SMALL)
    assert jax.tree.structure(batch) == jax.tree.structure(ordered)
    jax.tree.map(np.testing.assert_array_equal, batch, ordered)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_occupancies_have_the_type_of_the_batch(dtype):
    shared = [occupied(crystals()[0], {2: {8: 0.25, 26: 0.5}}), *crystals()[1:]]
    batch = batch_of(shared, RADIUS, dtype, SMALL)
    assert batch.occupancies.dtype == dtype
    row = batch.occupancies[atom_places(batch)[2]]
    assert (row[7], row[25], row.sum()) == (0.25, 0.5, 0.75)


def test_shared_sites_get_the_average_embedding():
    """Two sites are shared; an ordered crystal of an element with that average embedding gives the same prediction.

    The ordered crystals of the batch stay what they are, although the whole batch now has occupancies.
    """
    stand_ins = 97, 98  # berkelium and californium, which no crystal here contains
    shares = {2: {8: 0.3, 26: 0.7}}, {0: {11: 0.6}}
    assert all(not np.isin(stand_ins, crystal.species).any() for crystal in crystals())
    shared, ordered = list(crystals()), list(crystals())
    for crystal, stand_in, sites in zip((0, 3), stand_ins, shares, strict=True):
        shared[crystal] = occupied(crystals()[crystal], sites)
        species = crystals()[crystal].species.copy()
        species[list(sites)] = stand_in
        ordered[crystal] = dataclasses.replace(crystals()[crystal], species=species)

    embedding = variables()["params"]["embedding"].copy()
    embedding[96] = 0.3 * embedding[7] + 0.7 * embedding[25]
    embedding[97] = 0.6 * embedding[10]
    changed = {**variables(), "params": {**variables()["params"], "embedding": embedding}}
    expected = predict(changed, batch_of(ordered, RADIUS, shapes=SMALL))
    actual = predict(changed, batch_of(shared, RADIUS, shapes=SMALL))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert np.abs(expected - predict(changed, batch_of(crystals(), RADIUS, shapes=SMALL)))[[0, 3]].min() > 1e-3


# Shapes


@pytest.mark.parametrize("field", ["num_atoms", "row_length", "num_crystals", "num_edges"])
def test_batch_that_fits_no_shape_is_an_error(field):
    table, indices = table_of(crystals()), np.arange(4)
    longest = int(table.count.max())
    exact = BatchShape(num_atoms=34, row_length=longest, num_crystals=4, num_edges=len(table.image))
    packed = pack(table, indices, exact)
    assert packed.species.shape == (34,) and packed.rows.image.shape == (len(table.image), 3)
    too_small = dataclasses.replace(exact, **{field: getattr(exact, field) - 1})
    with pytest.raises(ValueError, match=f"34 atoms, {len(table.image)} neighbors and rows up to {longest} fit none"):
        pack(table, indices, too_small)


def test_first_shape_that_fits_is_taken():
    table = table_of(crystals())
    shapes = [BatchShape(16, 48, 4), BatchShape(64, 48, 4), BatchShape(64, 96, 8)]
    for indices, expected in (np.array([0, 1]), (16, 48)), (np.array([0, 2]), (64, 48)):
        packed = pack(table, indices, shared_out(table, indices, shapes).shape)
        assert jax.eval_shape(unpacked, packed).rows.index.shape == expected


def test_round_up():
    assert [round_up(value, 32) for value in (1, 32, 33, 48, 49, 64, 65, 97, 128.5)] == [
        32, 32, 48, 48, 64, 64, 96, 128, 192,
    ]  # fmt: skip
    assert [round_up(value, 1) for value in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]


def test_shape_for_holds_what_it_is_for():
    rng = np.random.default_rng(23)
    table = table_of(crystals())
    for _ in range(20):
        indices = rng.integers(0, 4, rng.integers(1, 12))
        batch = pack(table, indices, shape_for(table, indices))
        assert batch.crystal_sizes.sum() == table.num_atoms[indices].sum()
        assert batch.rows.count.sum() == table.num_edges[indices].sum() <= len(batch.rows.center)


def table_of_sizes(sizes, edges):
    """A table that knows nothing but the numbers of atoms and of neighbors."""
    offsets = {
        name: np.concatenate([[0], np.cumsum(x)]) for name, x in (("atom_offset", sizes), ("edge_offset", edges))
    }
    return CrystalTable(**{**{name: np.zeros(0) for name in COLUMNS}, **offsets})


def test_planned_shapes_hold_every_batch():
    """At most two shapes, of whole blocks; the first is rarely too small, the second never."""
    rng = np.random.default_rng(24)
    for _ in range(50):
        sizes = 1 + rng.geometric(1 / rng.uniform(2, 40), rng.integers(1, 300)).astype(np.int64)
        edges = sizes * rng.integers(1, 100, len(sizes))
        table = table_of_sizes(sizes, edges)
        indices = rng.permutation(len(sizes))[: rng.integers(1, len(sizes) + 1)]
        batch_size = int(rng.integers(1, 40))
        longest_row = int(rng.integers(1, 300))
        shapes = plan_shapes(table, indices, batch_size, longest_row)
        assert 1 <= len(shapes) <= 2
        for shape in shapes:
            assert shape.num_atoms % ATOM_BLOCK == shape.num_edges % EDGE_BLOCK == 0
            assert shape.row_length >= longest_row
            assert shape.num_crystals == batch_size
        assert shapes[0].num_atoms <= shapes[-1].num_atoms and shapes[0].num_edges <= shapes[-1].num_edges
        for number, padded, block in (
            (sizes, [shape.num_atoms for shape in shapes], ATOM_BLOCK),
            (edges, [shape.num_edges for shape in shapes], EDGE_BLOCK),
        ):
            largest = np.sort(number[indices])[::-1][:batch_size].sum()
            assert largest <= padded[-1] < largest + block
            if batch_size <= len(indices) and batch_size >= 8:
                drawn = [number[rng.choice(indices, batch_size, replace=False)].sum() for _ in range(100)]
                assert np.mean(np.array(drawn) > padded[0]) < 0.05


def test_fill_factors():
    """By hand: 34 of 64 atoms, in blocks of 32 whose longest rows decide how many columns are visited."""
    batch = packed_of(crystals(), BatchShape(64, 96, 4, num_edges=2048))
    fill, edges = fill_factors(batch), batch.rows.count.sum()
    assert (fill.atoms, fill.edges) == pytest.approx((34 / 64, edges / 2048))
    assert 32 < batch.rows.count[0] <= 64 and 0 < batch.rows.count[32] <= 32
    assert fill.columns == pytest.approx(edges / (32 * 64 + 32 * 32))

    longer = packed_of(crystals(), BatchShape(64, 96, 4), 6.4)
    assert 64 < longer.rows.count[0] <= 96 and 32 < longer.rows.count[32] <= 64
    assert fill_factors(longer).columns == pytest.approx(longer.rows.count.sum() / (32 * 96 + 32 * 64))


def test_fill_factors_of_a_shape_with_half_a_block():
    """`shape_for` makes them: 34 atoms are padded to 48."""
    batch = packed_of(crystals())
    assert len(batch.species) == 48
    assert fill_factors(batch).atoms == pytest.approx(34 / 48)


def test_full_batch_has_fill_factors_of_one():
    """32 crystals of one atom, all alike, in rows of exactly the length of the shape."""
    crystal = Crystal([13], np.zeros((1, 3)), primitive("fcc").lattice)
    length = int(neighbor_rows(crystal, RADIUS).count[0])
    assert fill_factors(packed_of([crystal] * 32, BatchShape(32, length, 32))) == (1.0, 1.0, 1.0)
