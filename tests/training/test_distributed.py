"""Training and prediction on several devices of one process are those on one device."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from support import primitive, random_crystal
from tiny import StopAt, assert_same_bits, nan_at, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.batching.batch import pack
from crystalframer_jax.batching.device_table import DeviceTable
from crystalframer_jax.batching.shapes import shape_for, shared_out
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.config import BatchParts, ConfigError, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.inference import evaluation
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, Shares, sum_in_order
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.structures.neighbors import neighbor_rows
from crystalframer_jax.training.errors import TrainingError
from crystalframer_jax.training.ledger import LAG
from crystalframer_jax.training.logging import read_metrics
from crystalframer_jax.training.loop import Options, Run
from crystalframer_jax.training.requests import NOTHING, SAVE, STOP, Requests
from crystalframer_jax.training.start import train

COUNTS = (1, 2, 4, 8)


@pytest.fixture(scope="module", autouse=True)
def eight_devices(tmp_path_factory):
    """Eight CPU devices instead of one, for the tests of this file."""
    before = jax.config.jax_num_cpu_devices
    with_new_devices(8)
    assert len(jax.devices()) == 8
    with tiny_runs():
        yield
    with_new_devices(before)


def with_new_devices(number: int) -> None:
    """Let JAX look for devices anew; no array and no program outlives that."""
    jax.clear_caches()
    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


def relative_difference(a, b) -> float:
    """Norm of the difference of two trees, relative to the norm of the first."""
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    squares = [[np.sum((np.asarray(x) - np.asarray(y)) ** 2), np.sum(np.asarray(x) ** 2)] for x, y in leaves]
    return float(np.sqrt(np.divide(*np.sum(squares, axis=0))))


# Shares


def test_shares_have_all_the_work_in_nearly_equal_parts():
    rng = np.random.default_rng(0)
    for number, pieces in itertools.product((2, 3, 8), (5, 8, 61, 256, 5000)):
        work = rng.lognormal(sigma=0.7, size=pieces)
        shares = Shares(work, number)
        assert sorted(np.concatenate(shares)) == list(range(pieces))
        assert all(np.array_equal(share, np.sort(share)) for share in shares)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        if pieces >= 256:
            load = np.array([work[share].sum() for share in shares])
            assert load.max() / load.mean() < 1.02
    assert [share.tolist() for share in Shares(np.array([2.0, 9, 1]), 1)] == [[0, 1, 2]]
    assert [share.tolist() for share in Shares(np.array([2.0, 9, 1]), 4)] == [[1], [0], [2], []]


@pytest.mark.parametrize("sigma", [0, 0.7, 0.9, 1.2])
def test_work_of_any_spread_is_dealt_out_once_and_evenly(sigma):
    """Also nothing at all, fewer pieces than devices, and rounds that are not full."""
    rng = np.random.default_rng(1)
    for number, pieces in itertools.product((1, 2, 7, 64, 300), (0, 1, 5, 150, 300, 301, 2048, 20000)):
        work = np.ceil(100 * rng.lognormal(sigma=sigma, size=pieces)).astype(np.int64)
        shares = Shares(work, number)
        assert len(shares) == number and len(list(shares)) == number
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(pieces))
        assert all((np.diff(share) > 0).all() for share in shares)
        assert {len(share) for share in shares} <= {pieces // number, -(-pieces // number)}
        assert shares.loads.tolist() == [work[share].sum() for share in shares]
        mean, least = shares.loads.mean(), work.max(initial=0)
        if pieces >= 32 * number and least < mean / 2:
            assert shares.loads.max() < 1.02 * mean


def test_every_process_packs_its_part_of_the_same_batch(folder, monkeypatch):
    """Whichever devices belong to it: all crystals once, the same arrays on a device, in the same shape."""
    dataset = open_tiny(tiny_config(folder / "data"))
    batches = TrainingBatches(dataset, 21, 2, seed=0, devices=Devices.of_this_process(8))
    expected = batches.parts_of(1)
    places = [part.crystal_place[part.crystal_sizes > 0] for part in expected]
    assert sorted(np.concatenate(places)) == list(range(21))
    for processes in ([[0, 1, 2], [3], [4, 5, 6, 7]], [[device] for device in range(8)]):
        parts = []
        for devices in processes:
            monkeypatch.setattr(Devices, "of_process", devices)
            parts += batches.parts_of(1)
        assert len(parts) == 8
        for part, other in zip(parts, expected, strict=True):
            assert_same_bits(jax.tree.map(jnp.asarray, part), jax.tree.map(jnp.asarray, other))


@pytest.mark.parametrize("count", COUNTS[1:])
def test_sums_are_added_pair_by_pair_in_the_order_of_the_devices(count):
    """To the bit, of arrays that cannot be divided by the number of devices."""
    devices = Devices.of_this_process(count)
    rng = np.random.default_rng(1)
    tree = {"a": rng.normal(size=(count, 3, 7)).astype(np.float32), "b": rng.normal(size=count).astype(np.float32)}
    found = devices.each(lambda tree: sum_in_order(tree, devices.axis), split=(0,))(devices.put(tree))
    for name, values in tree.items():
        expected = values
        while len(expected) > 1:
            expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
        np.testing.assert_array_equal(np.asarray(found[name]), expected[0])


def test_a_number_of_devices_that_are_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"num_devices=9: this machine has 8 .*choose at most as many, or 0"):
        Devices.of_this_process(9)
    assert Devices.of_this_process(1) == ONE_DEVICE and Devices.of_all_processes().count == 8


# Requests


@pytest.mark.parametrize("asked_at", [0, 3])
def test_a_request_of_one_process_is_done_once_by_all(monkeypatch, asked_at):
    """As repeated by a process until it is done; known a few dispatches later."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    requests = Requests(Interruption(), 1.0, Devices.of_this_process(8))
    monkeypatch.undo()
    agreed, is_done = [], False
    for dispatch in range(9):
        monkeypatch.setattr(requests, "_own", lambda own=SAVE if dispatch >= asked_at and not is_done else NOTHING: own)
        agreed.append(requests.after_dispatch())
        is_done |= agreed[-1] == SAVE
    assert agreed == (asked_at + LAG) * [NOTHING] + [SAVE] + (8 - asked_at - LAG) * [NOTHING]
    assert Requests(StopAt(1), 1.0, ONE_DEVICE).after_dispatch() == STOP


# Steps


MEASURED = "everything that is measured on a batch"
MODELS = {
    "default": dict(n_epochs=8),
    MEASURED: dict(
        n_epochs=8,
        batch_size=13,
        dropout=0.2,
        pre_pooling_op="w+bn+relu",
        norm_type="bn",
        embedding_dim=(16, 16),
        scale_grad=5.0,
        optimizer="sgd",
        lr=0.02,
        clip_norm=0.0,
    ),
}


def twenty_steps(folder: Path, count: int, changes: dict) -> tuple:
    """State after 20 steps in float64 with batches packed on the host, their losses and gradient norms."""
    config = tiny_config(folder / "data", precision="float64", **changes)
    with jax.enable_x64(True):
        devices = Devices.of_this_process(count)
        run = Run(validate(config), folder / f"steps-{count}", open_tiny(config), devices=devices)
        run.checkpoints.close()
        state, results = run.initial_state(), []
        for batch in itertools.islice(run.batches.iterate(0), 20):
            state, result = run.step(state, batch)
            results.append([float(result["loss"]), float(result["grad_norm"])])
        assert int(state.step) == 20
        return jax.tree.map(np.asarray, (state.params, state.calibration, state.batch_stats)), np.array(results)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("default", COUNTS[-1:]), pytest.param("default", COUNTS[1:-1], marks=pytest.mark.slow), (MEASURED, COUNTS[-1:])],
)
def test_twenty_steps_are_the_same_on_any_number_of_devices(folder, name, counts):
    """Weights, widths and running averages to 1e-6; losses and gradients, which Adam would not show, of every step."""
    expected, results = twenty_steps(folder, 1, MODELS[name])
    assert np.isfinite(results).all() and results[0, 0] > results[-1, 0]
    for count in counts:
        found, others = twenty_steps(folder, count, MODELS[name])
        np.testing.assert_allclose(others, results, rtol=1e-9, err_msg=f"{count} devices")
        assert max(relative_difference(a, b) for a, b in zip(expected, found, strict=True) if a) < 1e-6
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-8)


def test_a_batch_smaller_than_the_number_of_devices_leaves_some_without_crystals(folder):
    """Three crystals on eight devices; the calibration too is that of one."""
    changes = dict(n_epochs=2, batch_size=3)
    (expected, results), (found, others) = (twenty_steps(folder, count, changes) for count in (1, 8))
    np.testing.assert_allclose(others, results, rtol=1e-9)
    assert relative_difference(expected[0], found[0]) < 1e-6 and relative_difference(expected[1], found[1]) < 1e-12


# Batches


def test_every_device_gathers_its_share_to_the_bit(folder):
    """Single batches, also with fewer crystals than devices, and chunks."""
    config = tiny_config(folder / "data")
    dataset, devices = open_tiny(config), Devices.of_this_process(4)
    table = DeviceTable(dataset.table, dataset.labels, BatchParts(), devices)
    rows = np.random.default_rng(3).permutation(len(dataset.table))
    for number in (3, 21):
        work = shared_out(dataset.table, rows[:number], BatchParts(), devices.count)
        batch = table.gather(work)
        for device, share in enumerate(work.shares):
            chosen = work.rows[share]
            expected = pack(dataset.table, chosen, work.shape, dataset.labels[chosen], places=share)
            assert_same_bits(jax.tree.map(lambda x, device=device: jnp.asarray(np.asarray(x)[device]), batch), expected)
    packed, gathered = (
        TrainingBatches(dataset, 10, 2, seed=3, on_device=on_device, devices=devices) for on_device in (False, True)
    )
    single = list(packed.iterate(0))
    chunk = next(gathered.chunks(0, 2)).batches
    for step in range(2):
        assert_same_bits(jax.tree.map(lambda x, step=step: jnp.asarray(np.asarray(x)[:, step]), chunk), single[step])


def test_shares_of_a_batch_are_alike_whatever_they_hold():
    """Also those without crystals, and those of crystals without shared sites beside one with."""
    rng, parts = np.random.default_rng(4), BatchParts(cells=True, lattice_frames=True, scatter=True)
    ordered, disordered = random_crystal(rng, 5), primitive("fcc")
    occupancies = np.zeros((1, 98))
    occupancies[0, [12, 30]] = 0.5
    crystals = [ordered, dataclasses.replace(disordered, occupancies=occupancies)]
    table = make_table(crystals, [neighbor_rows(crystal, 4.0) for crystal in crystals])
    work = shared_out(table, np.arange(2), parts, 4)
    packed = [pack(table, work.rows[share], work.shape, places=share) for share in work.shares]
    assert sorted(int(part.crystal_sizes.sum()) for part in packed) == [0, 0, 1, 5]
    for part in packed[1:]:
        assert jax.tree.structure(part) == jax.tree.structure(packed[0])
        assert [x.shape for x in jax.tree.leaves(part)] == [x.shape for x in jax.tree.leaves(packed[0])]


# Runs


def results_of(workdir: Path) -> tuple[np.ndarray, dict]:
    """Losses and validation losses of all epochs, and the summary of a run."""
    lines = read_metrics(workdir)
    return np.array([[line["loss"], line["val_loss"]] for line in lines]), json.loads(
        (workdir / "summary.json").read_text()
    )


@pytest.fixture(scope="module")
def on_one(folder):
    """A run on one device."""
    config = tiny_config(folder / "data", precision="float64", num_devices=1)
    train(config, folder / "one")
    return config, results_of(folder / "one")


def test_a_run_goes_on_with_any_number_of_devices(on_one, folder):
    """Eight, then two, then eight: the same losses, predictions in the same order, summary and weights."""
    config, (losses, summary) = on_one
    workdir = folder / "eight-two-eight"
    for count, question in (8, 2), (2, 3):
        config.num_devices = count
        with pytest.raises(TrainingInterrupted, match="the same command continues"):
            train(config, workdir, interruption=StopAt(question))
    config.num_devices = 8
    train(config, workdir)
    found, other = results_of(workdir)
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    assert other["selected_weights"] == summary["selected_weights"] and other["parameters"] == summary["parameters"]
    assert other["mae"]["swa"]["test"]["e_form"] == pytest.approx(summary["mae"]["swa"]["test"]["e_form"], rel=1e-6)
    files = [run / "predictions_test.csv" for run in (folder / "one", workdir)]
    tables = [np.array([line.split(",") for line in file.read_text().splitlines()]) for file in files]
    assert tables[0][:, 0].tolist() == tables[1][:, 0].tolist()
    np.testing.assert_allclose(*(table[1:, 1:].astype(float) for table in tables), rtol=1e-6)


@pytest.mark.slow
def test_chunks_on_all_devices_are_single_steps(on_one, folder):
    """With the crystals on every device; compiled in haste, the last bit of a loss may differ."""
    config, (losses, _) = on_one
    config.num_devices = 8
    with tiny_runs(as_users_do=True):
        for steps in (1, 2):
            train(config, folder / f"chunk-{steps}", Options(on_device=True, steps_per_dispatch=steps))
    (first, _), (second, _) = (results_of(folder / f"chunk-{steps}") for steps in (1, 2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, losses, rtol=1e-6)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_device_stops_all(on_one, folder, monkeypatch):
    config, _ = on_one
    config.num_devices = 8
    nan_at(monkeypatch, 1)
    with pytest.raises(TrainingError, match=r"not finite at step 1"):
        train(config, folder / "nan")
    report = json.loads((folder / "nan" / "nonfinite_step_1.json").read_text())
    assert len(report["crystals"]) == 16 and report["norms"]["output"]["gradient"] == "nan"


# Predictions


def test_predictions_by_all_devices_come_in_the_order_of_the_crystals(on_one, folder, monkeypatch):
    """Crystals of all sizes, first frames and draws; a few crystals are left to one device."""
    rng = np.random.default_rng(5)
    crystals = [random_crystal(rng, int(size)) for size in rng.integers(1, 13, 41)] + [primitive("rock salt")]
    occupancies = np.zeros((1, 98))
    occupancies[0, [12, 30]] = 0.5
    crystals.append(dataclasses.replace(primitive("fcc"), occupancies=occupancies))
    predictor = Predictor.load(folder / "one")
    assert predictor.devices.count == 8
    expected = {}
    for samples in (1, 3):
        monkeypatch.setattr(predictor, "devices", ONE_DEVICE)
        expected[samples] = predictor.predict_with_spread(crystals, samples)
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "MAX_BATCH_CRYSTALS", 4)
    for samples, (mean, spread) in expected.items():
        found = predictor.predict_with_spread(crystals, samples)
        np.testing.assert_allclose(found.value, mean, rtol=1e-9)
        np.testing.assert_allclose(found.spread, spread, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(predictor.predict(crystals[:3]), expected[1].value[:3], rtol=1e-9)


def test_shapes_for_several_devices_hold_all_their_shares(folder):
    """Common batches in the first shape, any batch in the last, even one of the largest crystals only."""
    dataset = open_tiny(tiny_config(folder / "data"))
    batches = TrainingBatches(dataset, 16, 40, seed=0, devices=Devices.of_this_process(4))
    used = [batches.shared(step).shape for step in range(len(batches))]
    assert used.count(batches.shapes[0]) > 0.9 * len(used)
    largest = np.argsort(-dataset.table.num_edges[dataset.splits["train"]])[:16]
    assert shared_out(dataset.table, dataset.splits["train"][largest], batches.shapes, 4).shape == batches.shapes[-1]
    one = shape_for(dataset.table, batches.rows(0))
    assert dataclasses.replace(one).num_atoms > 2 * batches.shapes[0].num_atoms
