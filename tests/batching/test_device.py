"""Batches gathered on the device are those packed on the host, to the bit."""

import dataclasses

import jax
import numpy as np
import pytest
from small_sets import open_small
from support import primitive, random_crystal
from tiny import assert_same_bits, assert_same_run, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.batching import device_table as device
from crystalframer_jax.batching.batch import pack
from crystalframer_jax.batching.device_table import Chunk, DeviceTable, device_table_if_it_fits
from crystalframer_jax.batching.shapes import BatchShape, shape_for, shared_out
from crystalframer_jax.batching.table import CrystalTable, make_table
from crystalframer_jax.config import BatchParts, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import neighbor_rows
from crystalframer_jax.training.loop import Options, Run

RADIUS = 4.5  # Å


@pytest.fixture(scope="module")
def table() -> CrystalTable:
    """Forty crystals of 1 to 12 atoms, some far from the origin, some with rows of equal length."""
    rng = np.random.default_rng(41)
    crystals = [random_crystal(rng, int(size)) for size in rng.integers(1, 13, 37)]
    crystals = [dataclasses.replace(c, positions=c.positions + rng.normal(scale=1e3, size=3)) for c in crystals]
    crystals += [primitive(name) for name in ("rock salt", "fcc", "hcp")]
    return make_table(crystals, [neighbor_rows(crystal, RADIUS) for crystal in crystals])


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Two targets, some unknown."""
    rng = np.random.default_rng(42)
    return np.where(rng.random((40, 2)) < 0.2, np.nan, rng.normal(size=(40, 2)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gathered_batches_have_the_bits_of_packed_ones(table, labels, dtype):
    """Of any crystals in any order, also the same one twice; with and without places left over."""
    rng, parts = np.random.default_rng(43), BatchParts(dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        on_device = DeviceTable(table, labels, parts)
        large = BatchShape(160, 96, 20, parts=parts, num_edges=6144)
        for number in (1, 7, 12):
            indices = rng.integers(0, 40, number)
            for shapes in [large], [shape_for(table, indices, parts)]:
                work = shared_out(table, indices, shapes)
                assert_same_bits(on_device.gather(work), pack(table, indices, shapes[0], labels[indices]))
        indices = np.array([39, 0, 38])
        atoms, edges = (int(number[indices].sum()) for number in (table.num_atoms, table.num_edges))
        exact = [BatchShape(atoms, table.longest_row, 3, parts=parts, num_edges=edges)]
        assert_same_bits(
            on_device.gather(shared_out(table, indices, exact)), pack(table, indices, exact[0], labels[indices])
        )


def test_coordinates_do_not_depend_on_the_other_crystals(table, labels, monkeypatch):
    """They are computed for many crystals at a time."""
    expected = DeviceTable(table, labels, BatchParts()).columns
    monkeypatch.setattr(device, "MOST_AT_ONCE", 7)
    assert_same_bits(DeviceTable(table, labels, BatchParts()).columns, expected)


def test_crystals_that_fit_no_shape_are_an_error(table):
    with pytest.raises(ValueError, match="fit none of"):
        shared_out(table, np.arange(40), [BatchShape(32, 96, 40)])


# What is kept on the device


def test_only_what_fits_is_kept(table, labels, monkeypatch):
    """The share of the memory that all columns take, counted by hand."""
    columns = DeviceTable(table, labels, BatchParts()).columns
    size = sum(array.nbytes for array in jax.tree.leaves(columns))

    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    made: list[int] = []
    monkeypatch.setattr(device, "columns_of", lambda *args, make=device.columns_of: made.append(1) or make(*args))
    for stats, fits in [
        (None, False),
        ({"bytes_limit": int(size / 0.4) + 1}, True),
        ({"bytes_limit": int(size / 0.4) - 1}, False),
    ]:
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [Device(stats)])
        assert (device_table_if_it_fits(table, labels, BatchParts()) is not None) == fits
    assert len(made) == 2  # once each time that there is a limit


@pytest.mark.parametrize("part", ["cells", "lattice_frames", "scatter"])
def test_batches_with_more_parts_are_packed_on_the_host(table, labels, part):
    parts = BatchParts(**{part: True})
    assert device_table_if_it_fits(table, labels, parts) is None
    with pytest.raises(ValueError, match="packed on the host"):
        DeviceTable(table, labels, parts)


def test_shared_sites_are_packed_on_the_host(labels):
    occupancies = np.zeros((1, 98))
    occupancies[0, [25, 27]] = 0.5
    crystal = Crystal([26], np.zeros((1, 3)), 2.9 * np.eye(3), occupancies)
    shared = make_table([crystal], [neighbor_rows(crystal, RADIUS)])
    assert not device.serves(shared, BatchParts())


# Training and evaluation


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_batches_are_the_same_on_the_device(tmp_path, dtype):
    dataset, parts = open_small(tmp_path), BatchParts(dtype=dtype)
    with jax.enable_x64(dtype == "float64"):
        host, on_device = (TrainingBatches(dataset, 7, 2, seed=3, parts=parts, on_device=x) for x in (False, True))
        assert host.device_table is None
        batches = list(on_device.iterate(4))
        assert len(batches) == len(host) - 4
        for batch, expected in zip(batches, host.iterate(4), strict=True):
            assert_same_bits(batch, expected)


def test_chunks_hold_the_batches_in_order_and_are_cut_at_changes_of_shape_and_ends_of_epochs(tmp_path):
    """As long as may be otherwise; from the middle of an epoch on."""
    batches = TrainingBatches(open_small(tmp_path), 4, 3, seed=3, on_device=True)
    largest = batches.shapes[-1]
    atoms = [int(batches.dataset.table.num_atoms[batches.rows(step)].sum()) for step in range(36)]
    smaller = dataclasses.replace(largest, num_atoms=int(np.quantile(atoms, 0.8)))
    batches.shapes = [smaller, largest]
    works = list(batches.chunks(7, 3))
    shapes = [smaller if atoms[step] <= smaller.num_atoms else largest for step in range(36)]
    assert len(set(shapes)) == 2
    step = 7
    for work in works:
        length = 3 if isinstance(work, Chunk) else 1
        end = step + length
        assert len(set(shapes[step:end])) == 1 and step // 12 == (end - 1) // 12
        left = next(n for n in range(end, 37) if n % 12 == 0 or shapes[n] != shapes[end - 1]) - step
        assert length == 3 or left < 3
        for place in range(length):
            batch = jax.tree.map(lambda x, place=place: x[place], work.batches) if length == 3 else work
            assert_same_bits(batch, batches[step + place])
        step = end
    assert step == 36 and any(isinstance(work, Chunk) for work in works)


@pytest.mark.slow
def test_training_on_the_device_changes_no_bit(tmp_path):
    """Nor do validation, averaged weights and predictions."""
    with tiny_runs(as_users_do=True):
        config = tiny_config(tmp_path / "data", norm_type="bn")
        for name, on_device in ("host", False), ("device", True):
            options = Options(on_device=on_device, steps_per_dispatch=2)
            run = Run(validate(config), tmp_path / name, open_tiny(config), options)
            run.finish()
            assert (run.batches.device_table is not None) == on_device
        assert_same_run(config, tmp_path / "device", tmp_path / "host")
