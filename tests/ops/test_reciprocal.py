"""Attention in reciprocal space: against the brute-force sum, the lattice sum in real space, and finite differences."""

import dataclasses
import functools
from types import SimpleNamespace

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import atom_places, batch_of, random_crystal, random_rotation, rotated

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.config import BatchParts
from crystalframer_jax.model.attention import reciprocal_attention
from crystalframer_jax.ops.basis import Bases
from crystalframer_jax.ops.lattice_sums import SumOptions, lattice_sums
from crystalframer_jax.ops.reciprocal import SMALLEST, WaveVectors

HEADS, K_DIM, V_DIM = 2, 4, 3
CELLS = BatchParts(cells=True)
WAVES = WaveVectors(2)
RADIUS = 5.0  # Å, of neighbor rows, which this attention does not read
SIZES = (12, 1, 49, 7, 1)  # cells of two row lengths that are compiled, 48 and 64
SHAPE = BatchShape(96, 96, 6)  # three blocks of atoms, with padding atoms and a padding crystal
TOLERANCE = {np.float32: 5e-6, np.float64: 1e-11}


def left_handed(crystal):
    return dataclasses.replace(crystal, lattice=crystal.lattice[[1, 0, 2]])


def with_atoms_in_other_cells(crystal):
    shifts = np.random.default_rng(3).integers(-3, 4, (crystal.num_atoms, 3))
    return dataclasses.replace(crystal, positions=crystal.positions + shifts @ crystal.lattice)


@functools.cache
def crystals():
    """Crystals without symmetry in right- and left-handed cells, with atoms inside and outside the cell."""
    rng = np.random.default_rng(31)
    cells = [random_crystal(rng, size, 15.0) for size in SIZES]
    right_handed = [np.linalg.det(cell.lattice) > 0 for cell in cells]
    if right_handed[0] == right_handed[3]:
        cells[3] = left_handed(cells[3])
    cells[0] = with_atoms_in_other_cells(cells[0])
    assert {np.linalg.det(cell.lattice) > 0 for cell in cells} == {True, False}
    return cells


def random_arrays(atoms, exponents=(-3.0, -0.8)):
    """q, k, v, a of this many atoms; the exponents a in Å^2."""
    rng = np.random.default_rng(32)
    return SimpleNamespace(
        q=rng.normal(size=(atoms, HEADS, K_DIM)),
        k=rng.normal(size=(atoms, HEADS, K_DIM)),
        v=rng.normal(size=(atoms, HEADS, V_DIM)),
        a=rng.uniform(*exponents, (atoms, HEADS)),
    )


def packed(cells, arrays, dtype=np.float64, shape=None):
    """The crystals as a batch, and the arrays in its order; padding atoms get random numbers like all others."""
    batch = batch_of(cells, RADIUS, dtype, shape, parts=CELLS)
    places, atoms = atom_places(batch), len(batch.species)
    rng = np.random.default_rng(33)
    in_batch = {}
    for name, value in vars(arrays).items():
        in_batch[name] = -rng.uniform(1, 2, (atoms, *value.shape[1:])).astype(dtype)
        in_batch[name][places] = value
    return batch, SimpleNamespace(**in_batch)


@functools.partial(jax.jit, static_argnums=0)
def attention_and_gradients(waves, q, k, v, a, cells, cotangent):
    """reciprocal_attention, and the gradients of <output, cotangent> with respect to q, k, v, a."""
    output, pullback = jax.vjp(lambda *qkva: reciprocal_attention(*qkva, cells, waves), q, k, v, a)
    return output, pullback(cotangent)


def evaluate(batch, arrays, waves=WAVES):
    rng = np.random.default_rng(34)
    cotangent = rng.normal(size=arrays.v.shape).astype(arrays.v.dtype)
    values = arrays.q, arrays.k, arrays.v, arrays.a
    output, gradients = attention_and_gradients(waves, *values, batch.cells, cotangent)
    return output, gradients, cotangent


def attention(cells, arrays, waves=WAVES):
    """reciprocal_attention of the atoms of the crystals, one crystal after the other, in float64."""
    batch, in_batch = packed(cells, arrays)
    return np.asarray(evaluate(batch, in_batch, waves)[0])[atom_places(batch)]


def by_brute_force(cells, arrays, waves=WAVES):
    ends = np.cumsum([cell.num_atoms for cell in cells])
    outputs = []
    for cell, atoms in zip(cells, np.split(np.arange(ends[-1]), ends[:-1]), strict=True):
        of_cell = [x[atoms] for x in (arrays.q, arrays.k, arrays.v, arrays.a)]
        outputs.append(brute_force.reciprocal_sums(*of_cell, cell.positions, cell.lattice, waves.lattice_range))
    return np.concatenate(outputs)


def sums_by_definition(cell, a, lattice_range=2):
    """sum_k exp(a_i |k|^2) cos(k . r_ij) [n, H, n] over all k of the box, and their derivatives by a_i."""
    steps = np.arange(-lattice_range, lattice_range + 1)
    grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    k = grid @ (2 * np.pi * np.linalg.inv(cell.lattice).T)
    cosines = np.cos((cell.positions[None] - cell.positions[:, None]) @ k.T)  # [i, j, K]
    square = (k**2).sum(-1)
    amplitudes = np.exp(a[..., None] * square)
    return tuple(np.einsum("ihk,ijk->ihj", x, cosines) for x in (amplitudes, amplitudes * square))


def test_setting_is_what_it_claims():
    batch, _ = packed(crystals(), random_arrays(sum(SIZES)), np.float32, SHAPE)
    count = np.asarray(batch.cells.count)
    assert batch.cells.index.shape == (96, 64)
    assert set(count) == {0, 1, 7, 12, 49}
    assert {max(block) for block in np.split(count, 3)} == {49}  # blocks with rows of all lengths


def test_attention_equals_brute_force(dtype):
    arrays = random_arrays(sum(SIZES))
    batch, in_batch = packed(crystals(), arrays, dtype, SHAPE)
    output, _, _ = evaluate(batch, in_batch)
    assert output.dtype == dtype
    expected = by_brute_force(crystals(), arrays)
    np.testing.assert_allclose(output[atom_places(batch)], expected, rtol=0, atol=TOLERANCE[dtype])
    np.testing.assert_array_equal(output[np.asarray(batch.species) == 0], 0)
    # The weights are neither one nor equal nor those without the lattice.
    assert np.abs(expected[: SIZES[0]] - arrays.v[: SIZES[0]]).mean() > 0.1
    assert np.abs(expected[: SIZES[0]] - arrays.v[: SIZES[0]].mean(axis=0)).mean() > 0.1


@pytest.mark.parametrize("lattice_range", [1, 3])
def test_lattice_range_is_the_box_of_wave_vectors(lattice_range, x64):
    """Small exponents, with which the outermost wave vectors count."""
    cells, waves = crystals()[3:], WaveVectors(lattice_range)
    arrays = random_arrays(8, (-0.2, -0.05))
    expected = by_brute_force(cells, arrays, waves)
    np.testing.assert_allclose(attention(cells, arrays, waves), expected, rtol=0, atol=1e-11)
    assert np.abs(expected - by_brute_force(cells, arrays))[:7].max() > 1e-2


def test_one_atom_attends_to_itself(dtype):
    cells, arrays = crystals()[4:], random_arrays(1)
    batch, in_batch = packed(cells, arrays, dtype)
    output, gradients, cotangent = evaluate(batch, in_batch)
    np.testing.assert_array_equal(output[0], in_batch.v[0])
    np.testing.assert_array_equal(gradients[2][0], cotangent[0])
    for gradient in (gradients[0], gradients[1], gradients[3]):
        np.testing.assert_allclose(gradient[0], 0, atol=1e-6 if dtype == np.float32 else 1e-14)


def test_log_sums_equal_their_definition(dtype):
    """Every wave vector of the box counts once, half of them as the others' opposites."""
    cell, a = crystals()[3], random_arrays(7).a
    batch, in_batch = packed([cell], random_arrays(7), dtype)
    actual = np.asarray(WAVES.log_sums(in_batch.a, batch.cells))
    places = atom_places(batch)
    sums, _ = sums_by_definition(cell, a)
    assert sums.min() > 1e-3
    error = {np.float32: 1e-5, np.float64: 1e-12}[dtype] / sums.min()
    np.testing.assert_allclose(actual[places][..., :7], np.log(sums), rtol=0, atol=error)


# Poisson: a sum of Gaussians over the lattice is a sum of waves over the reciprocal lattice


def in_real_space(cell, a):
    """sum_n exp(|p_j - p_i + n L|^2 / 4 a) over enough images, [n, H, n]."""
    steps = np.arange(-8, 9)
    images = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3) @ cell.lattice
    difference = cell.positions[None] - cell.positions[:, None]
    square = ((difference[:, :, None] + images) ** 2).sum(-1)  # [i, j, images]
    return np.exp(square[:, None] / (4 * a[:, :, None, None])).sum(-1)


def test_log_sums_are_periodic_sums_of_gaussians(x64):
    """For many wave vectors, up to the factor (-4 pi a)^(3/2) / V that drops out of the softmax."""
    cell, a = crystals()[3], random_arrays(7, (-1.5, -0.6)).a
    batch, in_batch = packed([cell], random_arrays(7, (-1.5, -0.6)))
    log_sums = np.asarray(WaveVectors(7).log_sums(in_batch.a, batch.cells))[atom_places(batch)][..., :7]
    factor = (-4 * np.pi * a) ** 1.5 / abs(np.linalg.det(cell.lattice))
    np.testing.assert_allclose(np.exp(log_sums) * factor[..., None], in_real_space(cell, a), rtol=1e-9)


def test_attention_equals_that_in_real_space(x64):
    """For many wave vectors and neighbors; a in real space is 1 / 4 a."""
    cells, arrays = crystals()[3:], random_arrays(8, (-0.9, -0.6))
    cells[0] = with_atoms_in_other_cells(cells[0])
    batch = batch_of(cells, 11.0, np.float64, parts=CELLS)
    places, size = atom_places(batch), len(batch.species)
    q, k, v, a = (np.zeros((size, *x.shape[1:])) - 1 for x in (arrays.q, arrays.k, arrays.v, arrays.a))
    for padded, values in zip((q, k, v, a), (arrays.q, arrays.k, arrays.v, arrays.a), strict=True):
        padded[places] = values
    reciprocal = reciprocal_attention(q, k, v, a, batch.cells, WaveVectors(7))
    real = lattice_sums(SumOptions(Bases(None, None)), q, k, v, 1 / (4 * a), batch.rows, None)[0]
    np.testing.assert_allclose(reciprocal[places], real[places], rtol=0, atol=1e-9)


# The floor of the sums


def floored_setting():
    """Exponents so small that the few waves add up to nothing or less for some atoms, not for all."""
    cells, arrays = [crystals()[3]], random_arrays(7, (-0.15, -0.05))
    sums, _ = sums_by_definition(cells[0], arrays.a)
    assert 0.1 < (sums < SMALLEST).mean() < 0.6
    assert np.abs(sums - SMALLEST).min() > 1e-4
    return cells, arrays, sums < SMALLEST


def test_floor_acts_on_the_values(x64):
    cells, arrays, floored = floored_setting()
    batch, in_batch = packed(cells, arrays)
    log_sums = np.asarray(WAVES.log_sums(in_batch.a, batch.cells))[atom_places(batch)][..., :7]
    np.testing.assert_array_equal(log_sums[floored], np.log(1e-6))
    assert (log_sums[~floored] > np.log(1e-4)).all()
    expected = by_brute_force(cells, arrays)
    np.testing.assert_allclose(attention(cells, arrays), expected, rtol=0, atol=1e-11)


def test_floor_has_no_slope(x64):
    """The widths of floored pairs get no gradient; the others get that of their sums."""
    cells, arrays, floored = floored_setting()
    batch, in_batch = packed(cells, arrays)
    places = atom_places(batch)
    slope = jax.jacfwd(lambda shift: WAVES.log_sums(in_batch.a + shift, batch.cells))(0.0)
    slope = np.asarray(slope)[places][..., :7]
    sums, derivatives = sums_by_definition(cells[0], arrays.a)
    assert np.abs(derivatives[floored]).min() > 1e-2
    np.testing.assert_array_equal(slope[floored], 0)
    np.testing.assert_allclose(slope[~floored], (derivatives / sums)[~floored], rtol=1e-9)


# Gradients


def assert_gradients_equal_finite_differences(cells, arrays, shape=None):
    batch, in_batch = packed(cells, arrays, np.float64, shape)
    _, gradients, cotangent = evaluate(batch, in_batch)
    rng = np.random.default_rng(35)
    step = 1e-5
    for name, gradient in zip("qkva", gradients, strict=True):
        value = getattr(in_batch, name)
        assert np.linalg.norm(gradient) > 1e-2
        for _ in range(3):
            direction = rng.normal(size=value.shape)
            ends = []
            for sign in (1, -1):
                changed = SimpleNamespace(**(vars(in_batch) | {name: value + sign * step * direction}))
                ends.append(np.sum(evaluate(batch, changed)[0] * cotangent))
            difference = (ends[0] - ends[1]) / (2 * step)
            assert abs(difference - np.sum(gradient * direction)) < 1e-8 * max(np.linalg.norm(gradient), 1), name


def test_gradients_equal_finite_differences(x64):
    assert_gradients_equal_finite_differences(crystals(), random_arrays(sum(SIZES)), SHAPE)


def test_gradients_at_the_floor_equal_finite_differences(x64):
    cells, arrays, _ = floored_setting()
    assert_gradients_equal_finite_differences(cells, arrays)


def test_gradients_in_float32():
    arrays = random_arrays(sum(SIZES))
    batch, in_batch = packed(crystals(), arrays, np.float32, SHAPE)
    _, gradients, cotangent = evaluate(batch, in_batch)
    with jax.enable_x64(True):
        batch, in_batch = packed(crystals(), arrays, np.float64, SHAPE)
        values = in_batch.q, in_batch.k, in_batch.v, in_batch.a
        _, exact = attention_and_gradients(WAVES, *values, batch.cells, cotangent.astype(np.float64))
        exact = jax.tree.map(np.asarray, exact)
    for actual, expected in zip(gradients, exact, strict=True):
        assert actual.dtype == np.float32
        assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_padding_has_no_influence_and_no_results(dtype):
    """Whatever stands in padding atoms and columns changes no bit."""
    arrays = random_arrays(sum(SIZES))
    batch, in_batch = packed(crystals(), arrays, dtype, SHAPE)
    output, gradients, _ = evaluate(batch, in_batch)
    rng = np.random.default_rng(36)
    padding_atom = np.asarray(batch.species) == 0
    padding_column = np.arange(64) >= np.asarray(batch.cells.count)[:, None]

    def scrambled(array, where, largest):
        array = np.array(array)
        array[where] = rng.uniform(-largest if array.dtype.kind == "f" else 0, largest, array[where].shape)
        return array

    cells = dataclasses.replace(
        batch.cells,
        index=scrambled(batch.cells.index, padding_column, 96),
        reverse=scrambled(batch.cells.reverse, padding_column, 96 * 64),
        vector=scrambled(batch.cells.vector, padding_column, 9),
        metric=batch.cells.metric + 5 * np.eye(3, dtype=dtype) * padding_atom[:, None, None],
    )
    changed = {name: scrambled(value, padding_atom, 1.0) for name, value in vars(in_batch).items()}
    changed["a"] -= 2.0 * padding_atom[:, None].astype(dtype)
    after = evaluate(dataclasses.replace(batch, cells=cells), SimpleNamespace(**changed))
    for actual, expected in zip((after[0], *after[1]), (output, *gradients), strict=True):
        np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(actual[padding_atom], 0)


def test_crystals_do_not_depend_on_each_other(x64):
    arrays = random_arrays(sum(SIZES))
    alone = SimpleNamespace(**{name: value[-8:] for name, value in vars(arrays).items()})
    together = attention(crystals(), arrays)
    np.testing.assert_allclose(attention(crystals()[3:], alone), together[-8:], rtol=0, atol=1e-12)


def test_dropout_drops_whole_atoms(x64):
    """With v_j the unit vector of atom j the output is the weights: those kept are scaled, the others zero."""
    arrays = random_arrays(7)
    batch, in_batch = packed([crystals()[3]], arrays)
    size = len(batch.species)
    v = np.repeat(np.eye(size)[:, None], HEADS, axis=1)
    values = in_batch.q, in_batch.k, v, in_batch.a, batch.cells, WAVES
    weights = np.asarray(reciprocal_attention(*values))
    seeds = np.random.default_rng(37).integers(0, 2**32, (20, size, HEADS), dtype=np.uint32)
    drawn = jax.jit(lambda seeds: jax.lax.map(lambda s: reciprocal_attention(*values, dropout=0.4, seeds=s), seeds))
    factors = np.asarray(drawn(seeds))[:, weights > 1e-12] / weights[weights > 1e-12]
    kept = factors > 0
    np.testing.assert_allclose(factors[kept], 1 / 0.6, rtol=1e-9)
    assert factors.shape == (20, 7 * HEADS * 7)
    assert abs(kept.mean() - 0.6) < 4 * (0.24 / kept.size) ** 0.5


# What describes the same crystal gives the same attention


@functools.cache
def reference():
    return attention([crystals()[3]], random_arrays(7))


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: rotated(cell, random_rotation(np.random.default_rng(38))),
        lambda cell: rotated(cell, -random_rotation(np.random.default_rng(38))),
        lambda cell: dataclasses.replace(cell, positions=cell.positions + np.array([1.7, -40.0, 0.3])),
        with_atoms_in_other_cells,
        left_handed,
        lambda cell: dataclasses.replace(cell, lattice=-cell.lattice),
    ],
    ids=["rotation", "rotation and inversion", "translation", "atoms in other cells", "order of axes", "minus axes"],
)
def test_attention_does_not_depend_on_the_description(change, x64):
    np.testing.assert_allclose(attention([change(crystals()[3])], random_arrays(7)), reference(), rtol=0, atol=1e-11)


def test_attention_follows_a_permutation_of_the_atoms(x64):
    order, cell = np.random.default_rng(39).permutation(7), crystals()[3]
    permuted = dataclasses.replace(cell, species=cell.species[order], positions=cell.positions[order])
    arrays = SimpleNamespace(**{name: value[order] for name, value in vars(random_arrays(7)).items()})
    np.testing.assert_allclose(attention([permuted], arrays), reference()[order], rtol=0, atol=1e-11)


def test_attention_changes_with_the_crystal(x64):
    """Else the tests above would hold for anything."""
    cell = crystals()[3]
    moved = dataclasses.replace(cell, positions=cell.positions + 0.3 * np.eye(3)[np.arange(7) % 3])
    strained = dataclasses.replace(cell, positions=1.1 * cell.positions, lattice=1.1 * cell.lattice)
    for other in (moved, strained):
        assert np.abs(attention([other], random_arrays(7)) - reference()).max() > 1e-2


def test_positions_get_no_gradient():
    batch, in_batch = packed([crystals()[3]], random_arrays(7), np.float32)
    values = [jnp.asarray(x) for x in (in_batch.q, in_batch.k, in_batch.v, in_batch.a)]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(vector, metric):
        cells = dataclasses.replace(batch.cells, vector=vector, metric=metric)
        return jnp.sum(reciprocal_attention(*values, cells, WAVES))

    for gradient in gradients(batch.cells.vector, batch.cells.metric):
        np.testing.assert_array_equal(gradient, 0)
