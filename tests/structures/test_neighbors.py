"""Neighbor rows against a double loop over atoms and images, and their order, symmetry and enlargement."""

import dataclasses
import itertools

import numpy as np
import pytest
from support import SYMMETRIC, primitive, random_crystal, random_rotation, real_crystals, rotated

from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.neighbors import COLLINEAR, STEP, LatticeBox, displacements, neighbor_rows

RADIUS = 6.93  # Å, the default of the model

LOW_SYMMETRY = ["mp-626708", "mp-14983", "mp-541588"]  # P1, P1, P-1
HIGH_SYMMETRY = ["mp-22905", "mp-136", "mp-5827"]  # rock salt LiCl, hcp Fe, perovskite CaTiO3


def left_handed(crystal):
    return dataclasses.replace(crystal, lattice=crystal.lattice[[1, 0, 2]])


def skewed(crystal):
    """The same crystal in a cell whose vectors are almost parallel."""
    change = np.array([[1, 3, -2], [0, 1, 4], [0, 0, 1]])
    return dataclasses.replace(crystal, lattice=change @ crystal.lattice)


def with_atoms_outside(crystal):
    """The same crystal with every atom moved to some other cell."""
    shifts = np.random.default_rng(3).integers(-3, 4, (crystal.num_atoms, 3))
    return dataclasses.replace(crystal, positions=crystal.positions + shifts @ crystal.lattice)


def sample_crystals():
    """Crystals of every kind that the rows must be right for, by name."""
    real = real_crystals(LOW_SYMMETRY + HIGH_SYMMETRY)
    low, high = real[0], real[-1]
    one_atom = random_crystal(np.random.default_rng(1), 1, volume_per_atom=12.0)
    crystals = {crystal.id: crystal for crystal in real} | {name: primitive(name) for name in SYMMETRIC}
    crystals |= {
        "left-handed": left_handed(low),
        "skewed": skewed(low),
        "left-handed and skewed": skewed(left_handed(high)),
    }
    crystals |= {"atoms outside": with_atoms_outside(low), "one atom": one_atom, "one atom, skewed": skewed(one_atom)}
    return crystals


CRYSTALS = sample_crystals()


def brute_force_edges(crystal, radius):
    """Distances of all (i, j, n1, n2, n3) with |p_j + nL - p_i| <= radius, by looking at every image of a box."""
    p, lattice = crystal.positions, crystal.lattice
    inverse = np.linalg.inv(lattice)
    span = np.ptp(p @ inverse, axis=0)
    reach = np.ceil(radius * np.linalg.norm(inverse, axis=0) + span).astype(int)
    axes = [np.arange(-limit, limit + 1) for limit in reach]
    images = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    edges = {}
    for i in range(len(p)):
        for j in range(len(p)):
            distance = np.linalg.norm(p[j] - p[i] + images @ lattice, axis=1)
            for n in np.flatnonzero(distance <= radius):
                edges[i, j, *map(int, images[n])] = distance[n]
    return edges


def edges_of(rows):
    """The rows as a list of (i, j, n1, n2, n3), in their order."""
    return [tuple(map(int, edge)) for edge in np.column_stack([rows.center, rows.index, rows.image])]


def row(rows, atom):
    """Places of the row of an atom among all neighbors."""
    return np.flatnonzero(rows.center == atom)


@pytest.mark.parametrize("name", CRYSTALS)
def test_rows_are_all_images_within_the_cutoff(name):
    edges = edges_of(neighbor_rows(CRYSTALS[name], RADIUS))
    assert len(set(edges)) == len(edges)
    assert set(edges) == set(brute_force_edges(CRYSTALS[name], RADIUS))


@pytest.mark.parametrize("name", CRYSTALS)
def test_displacements_are_the_vectors_to_the_neighbors(name):
    crystal = CRYSTALS[name]
    rows = neighbor_rows(crystal, RADIUS)
    vectors = displacements(crystal, rows)
    expected = brute_force_edges(crystal, RADIUS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [expected[e] for e in edges_of(rows)], atol=1e-9)
    reached = crystal.positions[rows.center] + vectors
    np.testing.assert_allclose(reached, crystal.positions[rows.index] + rows.image @ crystal.lattice, atol=1e-9)


@pytest.mark.parametrize("name", CRYSTALS)
def test_relation_is_symmetric_and_reverse_points_back(name):
    rows = neighbor_rows(CRYSTALS[name], RADIUS)
    assert_reverse_points_back(rows)


def assert_reverse_points_back(rows):
    reverse = rows.reverse
    np.testing.assert_array_equal(rows.center[reverse], rows.index)
    np.testing.assert_array_equal(rows.index[reverse], rows.center)
    np.testing.assert_array_equal(rows.image[reverse], -rows.image)
    np.testing.assert_array_equal(reverse[reverse], np.arange(len(reverse)))


@pytest.mark.parametrize("name", CRYSTALS)
def test_rows_are_ordered_by_distance(name):
    crystal = CRYSTALS[name]
    assert_order(neighbor_rows(crystal, RADIUS), brute_force_edges(crystal, RADIUS))


def assert_order(rows, distances):
    """The atom itself first, then the nearest."""
    edges = edges_of(rows)
    for i in range(len(rows.count)):
        of_atom = [edges[e] for e in row(rows, i)]
        assert of_atom[0] == (i, i, 0, 0, 0)
        assert np.diff([distances[edge] for edge in of_atom]).min() > -1.01 * STEP


@pytest.mark.parametrize("name", CRYSTALS)
def test_order_does_not_change_when_atoms_move_to_other_cells(name):
    """Nor when, by rounding, they cross a face of the cell."""
    crystal = CRYSTALS[name]
    rows = neighbor_rows(crystal, RADIUS)
    for moved in (with_atoms_outside(crystal), dataclasses.replace(crystal, positions=crystal.positions - 1e-12)):
        other = neighbor_rows(moved, RADIUS)
        np.testing.assert_allclose(displacements(moved, other), displacements(crystal, rows), rtol=0, atol=1e-9)
        np.testing.assert_array_equal(other.index, rows.index)


def assert_same_rows_when_turned(crystal, cutoff=RADIUS):
    rows = neighbor_rows(crystal, cutoff)
    rng = np.random.default_rng(0)
    for _ in range(5):
        turned = neighbor_rows(rotated(crystal, random_rotation(rng)), cutoff)
        for field in dataclasses.fields(rows):
            np.testing.assert_array_equal(getattr(turned, field.name), getattr(rows, field.name))


@pytest.mark.parametrize("name", CRYSTALS)
def test_rows_do_not_change_when_the_crystal_turns(name):
    """Down to the order of neighbors at one distance, on which the choice among equal frames rests."""
    assert_same_rows_when_turned(CRYSTALS[name])


def test_symmetric_crystals_have_shells_to_order():
    """Else the tests of order would not test it: rock salt has 6, then 12 neighbors at one distance."""
    crystal = primitive("rock salt")
    rows = neighbor_rows(crystal, RADIUS)
    distance = np.linalg.norm(displacements(crystal, rows), axis=1)[row(rows, 0)]
    np.testing.assert_allclose(distance[:19], [0] + [2.82] * 6 + [2.82 * 2**0.5] * 12)


def test_shell_at_the_cutoff_is_whole_or_absent():
    """Rounding must not decide which neighbors of a shell at the very cutoff belong to the row."""
    crystal = Crystal([55, 17], np.array([[0, 0, 0], [1.5] * 3]), 3 * np.eye(3))
    counts = set()
    rng = np.random.default_rng(0)
    for _ in range(10):
        counts |= set(neighbor_rows(rotated(crystal, random_rotation(rng)), 6.0).count)
    assert len(counts) == 1


# Rows that would not span a frame are enlarged

CHAIN = Crystal([6], np.zeros((1, 3)), np.diag([2.0, 20, 20]), id="chain")
MOLECULE = Crystal([1, 1], np.array([[12.0, 12, 12], [12.74, 12, 12]]), 25 * np.eye(3), id="molecule")
LONE_ATOM = Crystal([10], np.zeros((1, 3)), 15 * np.eye(3), id="lone atom")
SPARSE = {crystal.id: crystal for crystal in (CHAIN, MOLECULE, LONE_ATOM)}


def spans_a_frame(crystal, rows, atom):
    vectors = displacements(crystal, rows)[row(rows, atom)]
    distance = np.linalg.norm(vectors, axis=1)
    unit = vectors[distance > 0] / distance[distance > 0, None]
    return len(unit) > 1 and np.abs(unit @ unit.T).min() < COLLINEAR


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_rows_are_enlarged_until_they_span_a_frame(name):
    crystal = SPARSE[name]
    within = set(brute_force_edges(crystal, RADIUS))
    assert len({edge[1:] for edge in within}) < 9  # the atom itself and a few others on one line
    rows = neighbor_rows(crystal, RADIUS)
    assert within < set(edges_of(rows))
    assert all(spans_a_frame(crystal, rows, atom) for atom in range(crystal.num_atoms))
    assert_reverse_points_back(rows)


@pytest.mark.parametrize(("name", "radius"), [("chain", 20.0), ("lone atom", 15.0)])
def test_enlarged_row_ends_with_the_first_shell_that_spans_a_frame(name, radius):
    """Whole shells: a part of the six neighbors of the lone atom would make its frame an accident."""
    crystal = SPARSE[name]
    assert set(edges_of(neighbor_rows(crystal, RADIUS))) == set(brute_force_edges(crystal, radius + 1e-9))


@pytest.mark.parametrize("name", SPARSE)
def test_enlarged_rows_do_not_change_when_the_crystal_turns(name):
    assert_same_rows_when_turned(SPARSE[name])


def test_only_rows_that_need_it_are_enlarged():
    """A cluster of four atoms and one atom far from it: the others only gain the reverse neighbors."""
    cluster = np.array([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]])
    crystal = Crystal([6, 6, 6, 6, 10], np.vstack([cluster, [[12.0, 1, 1]]]), 40 * np.eye(3))
    within = set(brute_force_edges(crystal, RADIUS))
    rows = neighbor_rows(crystal, RADIUS)
    added = set(edges_of(rows)) - within
    assert within < set(edges_of(rows))
    assert spans_a_frame(crystal, rows, 4)
    assert all(4 in edge[:2] for edge in added)
    assert_reverse_points_back(rows)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_impossible_cutoff_is_an_error(cutoff):
    with pytest.raises(ValueError, match="cutoff"):
        neighbor_rows(LONE_ATOM, cutoff)


# In place of a radius: a box of lattice images


def box_edges(crystal, lattice_range):
    """Distances of all (i, j, n1, n2, n3) with n in the box."""
    p, steps = crystal.positions, range(-lattice_range, lattice_range + 1)
    return {
        (i, j, *n): np.linalg.norm(p[j] - p[i] + np.array(n) @ crystal.lattice)
        for i in range(len(p))
        for j in range(len(p))
        for n in itertools.product(steps, steps, steps)
    }


BOXED = {"1": ["left-handed", "atoms outside", "rock salt", "perovskite", "skewed"], "2": ["one atom, skewed", "hcp"]}


@pytest.mark.parametrize(("lattice_range", "name"), [(int(r), name) for r, names in BOXED.items() for name in names])
def test_rows_of_a_box_are_all_its_images_by_distance(lattice_range, name):
    """Of the positions as given, for every pair of atoms, however far apart."""
    crystal = CRYSTALS[name]
    rows = neighbor_rows(crystal, LatticeBox(lattice_range))
    expected, edges = box_edges(crystal, lattice_range), edges_of(rows)
    assert len(edges) == crystal.num_atoms**2 * (2 * lattice_range + 1) ** 3 == len(expected)
    assert set(edges) == set(expected)
    np.testing.assert_array_equal(rows.count, crystal.num_atoms * (2 * lattice_range + 1) ** 3)
    assert_order(rows, expected)
    assert_reverse_points_back(rows)
    lengths = np.linalg.norm(displacements(crystal, rows), axis=1)
    np.testing.assert_allclose(lengths, [expected[edge] for edge in edges], atol=1e-9)


@pytest.mark.parametrize("name", ["perovskite", "hcp", "left-handed"])
def test_rows_of_a_box_do_not_change_when_the_crystal_turns(name):
    assert_same_rows_when_turned(CRYSTALS[name], LatticeBox(1))


def test_rows_of_a_box_follow_the_cell_and_the_atoms_in_it():
    """Unlike those of a radius, which are the same neighbors in every description."""
    crystal = CRYSTALS["left-handed"]
    for other in (with_atoms_outside(crystal), skewed(crystal)):
        for cutoff, same in ((RADIUS, True), (LatticeBox(1), False)):
            lengths = [
                np.sort(np.linalg.norm(displacements(c, neighbor_rows(c, cutoff)), axis=1)) for c in (crystal, other)
            ]
            assert (lengths[0].shape == lengths[1].shape and np.allclose(*lengths, atol=1e-6)) == same


@pytest.mark.parametrize("name", SPARSE)
def test_rows_of_a_box_are_not_enlarged(name):
    crystal = SPARSE[name]
    assert set(edges_of(neighbor_rows(crystal, LatticeBox(1)))) == set(box_edges(crystal, 1))


def test_images_of_a_box():
    images = LatticeBox(2).images
    assert images.shape == (125, 3)
    assert set(map(tuple, images.tolist())) == set(itertools.product(range(-2, 3), repeat=3))


def test_boxes_that_would_fill_the_memory_are_refused():
    """The square of the number of atoms times the number of cells; the message names the crystal and the way out."""
    crystal = Crystal(np.full(900, 6), 40 * np.random.default_rng(4).random((900, 3)), 40 * np.eye(3), id="large")
    with pytest.raises(CrystalError, match=r"large: 21,870,000 neighbors of 900 atoms in 27 cells.*choose a radius"):
        neighbor_rows(crystal, LatticeBox(1))
