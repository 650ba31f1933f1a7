"""The order of training batches, and what they hold."""

import itertools

import numpy as np
import pytest
from small_sets import assert_same_batch, open_small

from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.store import Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return open_small(tmp_path_factory.mktemp("data"))


def rows_of(batch, dataset: Dataset) -> list[int]:
    """The crystals of a batch, recognised by their label."""
    labels = dataset.labels[:, 0].astype(np.float32)
    assert len(set(labels.tolist())) == len(labels)
    return [int(np.flatnonzero(labels == target)[0]) for target in batch.targets[batch.target_mask]]


def test_the_order_is_a_function_of_seed_and_epoch(dataset):
    batches, again = (TrainingBatches(dataset, 7, n_epochs=3, seed=5) for _ in range(2))
    again[10], again.order(2)  # what was asked for before does not matter
    for epoch in range(3):
        np.testing.assert_array_equal(batches.order(epoch), again.order(epoch))
        assert sorted(batches.order(epoch)) == sorted(dataset.splits["train"])
    assert not np.array_equal(batches.order(0), batches.order(1))
    assert not np.array_equal(batches.order(0), TrainingBatches(dataset, 7, 3, seed=6).order(0))
    assert not np.array_equal(batches.order(1), TrainingBatches(dataset, 7, 3, seed=6).order(0))


def test_every_epoch_visits_a_crystal_at_most_once_and_drops_the_incomplete_batch(dataset):
    batches = TrainingBatches(dataset, 7, n_epochs=2, seed=0)
    assert (batches.steps_per_epoch, len(batches)) == (6, 12)  # 48 crystals
    for epoch in range(2):
        visited = [rows_of(batches[step], dataset) for step in range(6 * epoch, 6 * epoch + 6)]
        assert [len(rows) for rows in visited] == [7] * 6
        flat = list(itertools.chain(*visited))
        assert len(set(flat)) == 42 and set(flat) <= set(dataset.splits["train"].tolist())
        assert flat == batches.order(epoch)[:42].tolist()


def test_batches_hold_the_atoms_of_their_crystals(dataset):
    batch = TrainingBatches(dataset, 7, n_epochs=1, seed=0)[2]
    table = dataset.table
    for place, row in enumerate(rows_of(batch, dataset)):
        atoms = batch.crystal_of_atom == place
        assert batch.crystal_sizes[place] == atoms.sum() == table.num_atoms[row]
        expected = table.species[slice(*table.atom_offset[row : row + 2])]
        assert batch.species[atoms][np.argsort(batch.atom_in_crystal[atoms])].tolist() == expected.tolist()


@pytest.mark.parametrize("first_step", [0, 5, 11])
def test_iterating_from_a_step_gives_the_batches_by_number(dataset, first_step):
    batches = TrainingBatches(dataset, 7, n_epochs=2, seed=3)
    iterated = list(batches.iterate(first_step))
    assert len(iterated) == len(batches) - first_step
    for step, batch in enumerate(iterated, first_step):
        assert_same_batch(batch, batches[step])


def test_a_batch_size_beyond_the_training_set_takes_all_of_it(dataset):
    batches = TrainingBatches(dataset, 1000, n_epochs=2, seed=3)
    assert (batches.batch_size, batches.steps_per_epoch, len(batches)) == (48, 1, 2)
    assert sorted(rows_of(batches[1], dataset)) == sorted(dataset.splits["train"])


def test_an_iterator_goes_on_from_its_state(dataset):
    """Exactly, also after it has prepared batches ahead."""
    batches = TrainingBatches(dataset, 7, n_epochs=2, seed=3)
    iterator = batches.packed(2)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    rest = list(iterator)
    assert len(rest) == 6
    again = batches.packed(2)
    again.set_state(state)
    for batch, expected in zip(again, rest, strict=True):
        assert_same_batch(batch, expected)


def test_fill_factors_are_means_over_batches(dataset):
    batches = TrainingBatches(dataset, 7, n_epochs=1, seed=0)
    fill, table = batches.fill_factors(3), dataset.table
    chosen = np.concatenate([batches.rows(step) for step in range(3)])
    shape = batches.shapes[0]
    assert all(len(batches[step].species) == shape.num_atoms for step in range(3))
    assert fill.atoms == pytest.approx(table.num_atoms[chosen].sum() / (3 * shape.num_atoms))
    assert fill.edges == pytest.approx(table.num_edges[chosen].sum() / (3 * shape.edges))
    assert 0 < fill.columns <= 1
