"""Few shapes that random batches fill well, against brute force and on the spread of the Materials Project."""

import itertools

import numpy as np
import pytest
from test_batch import table_of_sizes

from crystalframer_jax.batching.planning import best_sizes, random_needs
from crystalframer_jax.batching.shapes import MOST_SHAPES, plan_shapes, shared_as_planned, shared_out
from crystalframer_jax.batching.table import COLUMNS, CrystalTable, edges_and_atoms
from crystalframer_jax.parallel.devices import Shares

MANY = 10**6  # batches: a training so long that compiling costs nothing


def spread(count: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """Atoms and neighbors like those of the Materials Project: 1 to 200 atoms, mean 26, about 95 neighbors each."""
    rng = np.random.default_rng(3)
    sizes = np.clip(rng.lognormal(2.9, 0.85, count), 1, 200).astype(np.int64)
    return sizes, (sizes * np.clip(rng.normal(95, 35, count), 20, 300)).astype(np.int64)


def padding(needs: np.ndarray, sizes: np.ndarray) -> float:
    """Places over those that are needed, mean of atoms and neighbors; every batch takes the first that holds it."""
    first = [next(size for size in sizes if (need <= size).all()) for need in needs]
    return float(np.mean(np.mean(first, axis=0) / needs.mean(axis=0)))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_best_sizes_are_those_that_brute_force_finds(number):
    rng = np.random.default_rng(number)
    for _ in range(20 if number < 4 else 6):  # of four sizes there are 40,000 chains
        needs = np.stack([rng.integers(1, 40, 7), rng.integers(1, 40, 7)], axis=1)
        last = needs.max(axis=0) + rng.integers(0, 5, 2)
        cost, sizes = best_sizes(needs, last, np.array([1, 1]), number)[number - 1]
        assert cost == pytest.approx(padding(needs, sizes)) and len(sizes) <= number
        points = list(itertools.product(*({*column.tolist(), end} for column, end in zip(needs.T, last, strict=True))))
        chains = (sorted((*chosen, tuple(last))) for chosen in itertools.combinations(points, number - 1))
        ascending = (np.array(chain) for chain in chains if (np.diff(chain, axis=0) >= 0).all())
        assert cost == pytest.approx(min(padding(needs, chain) for chain in ascending))


def test_random_needs_are_those_of_epochs():
    """Every crystal comes once in each; of several devices it is the one with most that counts."""
    numbers = np.stack([np.arange(1, 13), 10 * np.arange(1, 13)], axis=1)
    needs = random_needs(numbers, 4, 5, 1, Shares)
    assert needs.shape == (6, 2) and needs.reshape(2, 3, 2).sum(axis=1).tolist() == [[78, 780]] * 2
    np.testing.assert_array_equal(needs, random_needs(numbers, 4, 5, 1, Shares))
    shared = random_needs(numbers, 4, 5, 2, Shares)
    assert (shared >= needs / 2).all() and (shared < needs).all()


@pytest.mark.parametrize(("batch_size", "goal"), [(64, 0.85), (256, 0.9)])
@pytest.mark.parametrize("epochs", [1, 500])
def test_batches_of_crystals_of_all_sizes_fill_few_shapes(batch_size, goal, epochs):
    sizes, edges = spread()
    table, everything, batches = table_of_sizes(sizes, edges), np.arange(len(sizes)), epochs * 30_000 // batch_size
    assert len(sizes) == 5000 and sizes.min() < 3 and sizes.max() == 200 and 24 < sizes.mean() < 28
    shapes = plan_shapes(table, everything, batch_size, 300, batches=batches)
    rng, used, needed = np.random.default_rng(4), [], []
    for _ in range(2000):
        rows = rng.choice(everything, batch_size, replace=False)
        needed.append([sizes[rows].sum(), edges[rows].sum()])
        used.append(next(s for s in shapes if needed[-1][0] <= s.num_atoms and needed[-1][1] <= s.edges))
    fill = np.sum(needed, axis=0) / np.sum([[shape.num_atoms, shape.edges] for shape in used], axis=0)
    assert (fill > goal).all()
    assert len(set(used) - {shapes[-1]}) <= 4
    assert used.count(shapes[-1]) <= (0 if epochs > 1 else 10)  # of 2,000: the largest possible one


def test_a_shape_must_be_worth_its_program():
    """Few batches, or such as hardly differ, have one shape; never are there more than MOST_SHAPES and the largest."""
    sizes, edges = spread()
    everything = np.arange(len(sizes))
    table, alike = table_of_sizes(sizes, edges), table_of_sizes(np.full(5000, 20), np.full(5000, 1800))
    numbers = [len(plan_shapes(table, everything, 64, 300, batches=n)) for n in (1, 10, 100, 1000, MANY)]
    assert numbers[:2] == [2, 2] and numbers == sorted(numbers) and 3 <= numbers[-1] <= MOST_SHAPES + 1
    assert len(plan_shapes(alike, everything, 64, 300, batches=MANY)) == 1
    assert all(len(plan_shapes(table, everything, b, 300, batches=MANY)) <= MOST_SHAPES + 1 for b in (1, 2, 7, 4096))


def test_sizes_add_up():
    """Neighbors and atoms of crystals together, more than 32 bits of them."""
    edges, atoms = np.array([3, 0, 5, 2**33]), np.array([1, 2, 2**27, 7])
    table = CrystalTable(**dict.fromkeys(COLUMNS) | {"edge_offset": offsets(edges), "atom_offset": offsets(atoms)})
    assert [x.tolist() for x in edges_and_atoms(table.sizes)] == [edges.tolist(), atoms.tolist()]
    assert edges_and_atoms(table.sizes.sum()) == (edges.sum(), atoms.sum())


def offsets(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum([0, *lengths])


def test_crystals_of_all_sizes_are_shared_out_evenly():
    """32 for each of 64 devices, among them some with twenty times the mean number of neighbors."""
    _, edges = spread()
    rng = np.random.default_rng(6)
    loads = np.array([Shares(rng.choice(edges, 32 * 64), 64).loads for _ in range(20)])
    assert (loads.max(axis=1) / loads.mean(axis=1)).mean() < 1.02


def test_shapes_of_shares_hold_them():
    sizes, edges = spread(600)
    table, everything = table_of_sizes(sizes, edges), np.arange(600)
    table = table.__class__(**{**vars(table), "count": np.zeros(sizes.sum(), np.int64)})
    rng, shapes = np.random.default_rng(5), plan_shapes(table, everything, 64, 300, devices=4, batches=MANY)
    works = [shared_out(table, rng.choice(everything, 64, replace=False), shapes, 4) for _ in range(200)]
    assert all(work.shape != shapes[-1] for work in works) and len(shapes) > 2
    loads = np.array([[max(x[w.rows[s]].sum() for s in w.shares) for x in (sizes, edges)] for w in works])
    for work in works:
        planned = shared_as_planned(work.rows, table.sizes[work.rows], shapes, 4)
        assert planned.shape == work.shape and all(map(np.array_equal, planned.shares, work.shares))
    assert (loads <= [[work.shape.num_atoms, work.shape.edges] for work in works]).all()
