"""Scaling over devices: the model on paper, the arithmetic of speed-up, fit and check, tables and arguments."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from benchmarking import cluster, devices, report
from benchmarking.cluster import NETWORKS, NUMBERS_OF_GPUS, Cluster, Compute, Network, Sharing
from benchmarking.devices import CoreClock, Setting, check, device_counts, fit, series, step_record
from benchmarking.timing import Timing, take_turns

from crystalframer_jax.parallel.devices import share_out

BYTES = 3.8e6
EVEN = Sharing(1.0, 0.0)
COMPUTE = Compute(fixed=1e-3, per_crystal=1e-5)
WITHOUT_LATENCY = Cluster(Network("", 50e9, 0.0), node_hop=0.0, start=0.0, message=0.0)


@dataclasses.dataclass
class Table:
    """Stands in for a CrystalTable: crystals of one atom."""

    num_edges: np.ndarray

    @property
    def longest_row(self):
        return int(self.num_edges.max())

    @property
    def num_atoms(self):
        return np.ones_like(self.num_edges)

    @property
    def atom_offset(self):
        return np.arange(len(self.num_edges) + 1)

    @property
    def edge_offset(self):
        return np.concatenate([[0], np.cumsum(self.num_edges)])

    @property
    def count(self):
        return self.num_edges


@pytest.fixture
def dataset():
    edges = np.random.default_rng(0).integers(20, 200, 100)
    return SimpleNamespace(table=Table(edges), splits={"train": np.arange(100)})


# The model on paper


def test_the_bytes_of_the_sum_are_those_of_its_messages():
    """Counted one by one: each GPU sends n - 1 shares of its own, then n - 1 shares go through it."""
    for gpus in (1, 2, 8, 64):
        messages = 2 * [BYTES / gpus] * (gpus - 1)
        assert cluster.bytes_sent(BYTES, gpus) == pytest.approx(sum(messages))


@pytest.mark.parametrize("gpus", [2, 8])
def test_without_latency_a_node_sums_at_the_speed_of_its_links(gpus):
    assert WITHOUT_LATENCY.sum_seconds(BYTES, gpus) == pytest.approx(cluster.bytes_sent(BYTES, gpus) / 450e9)


def test_without_latency_several_nodes_sum_at_the_speed_of_the_network():
    """By hand for 16: 8 of 15 messages leave the node; all of the ring is as slow as the network."""
    expected = 8 / 16 * BYTES / 50e9 + 15 / 16 * BYTES / 50e9
    assert WITHOUT_LATENCY.sum_seconds(BYTES, 16) == pytest.approx(expected)
    limit = 2 * BYTES / 50e9
    assert 0.98 * limit < WITHOUT_LATENCY.sum_seconds(BYTES, 1024) < limit


def test_a_sum_without_bytes_is_its_latency():
    """By hand for 16 GPUs of two nodes: two starts, 15 messages, 14 hops inside, 1 between."""
    found = Cluster(Network("", 50e9, 4e-6), node_hop=2e-6, start=10e-6, message=1e-6).sum_seconds(0.0, 16)
    assert found == pytest.approx(2 * 10e-6 + 15 * 1e-6 + 14 * 2e-6 + 4e-6)


def test_one_gpu_takes_the_time_of_its_crystals_alone():
    found = cluster.predict("strong", 1, 256, COMPUTE, BYTES, EVEN)
    assert found.bytes == 0 and set(found.sums) == {0.0}
    assert found.step == found.compute == pytest.approx(1e-3 + 256e-5) and found.efficiency(found, found.step) == 1.0


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_more_gpus_are_never_more_efficient(network):
    for name, batch, each in (("strong", 2048, 0), ("weak", 0, 32)):
        rows = [
            cluster.predict(name, n, batch or n * each, COMPUTE, BYTES, EVEN, [Cluster(network)])
            for n in NUMBERS_OF_GPUS
        ]
        efficiency = [row.efficiency(rows[0], row.step) for row in rows]
        assert (np.diff(efficiency) < 0).all() and (np.diff([row.sums[0] for row in rows]) > 0).all()


def test_slower_networks_take_longer_where_there_are_several_nodes():
    sums = np.array([[Cluster(network).sum_seconds(BYTES, n) for network in NETWORKS] for n in (8, 16, 1024)])
    assert len(set(sums[0])) == 1 and (np.diff(sums[1:], axis=1) > 0).all()


def test_the_device_with_most_work_and_the_host_hold_up_all():
    balanced = cluster.predict("weak", 8, 256, COMPUTE, BYTES, EVEN)
    uneven = cluster.predict("weak", 8, 256, COMPUTE, BYTES, Sharing(1.5, 0.0))
    assert uneven.compute - balanced.compute == pytest.approx(0.5 * 32e-5)
    slow_host = cluster.predict("weak", 8, 256, COMPUTE, BYTES, Sharing(1.0, 1.0))
    assert slow_host.step == 1.0 and slow_host.packed_step == pytest.approx(1.0 + 32 / (450 * 256))
    assert balanced.packed_step == balanced.step == balanced.on_gpus[0]  # 32 crystals are packed in less


def test_the_balance_is_that_of_the_shares(dataset):
    edges = dataset.table.num_edges
    found = cluster.sharing(dataset, batch=6, devices=4, batches=1)
    rows = np.random.default_rng(0).permutation(100)[:6]
    loads = [edges[rows[share]].sum() for share in share_out(edges[rows], 4)]
    assert found.balance == pytest.approx(4 * max(loads) / edges[rows].sum()) and found.seconds > 0
    assert cluster.sharing(dataset, 256, 1).balance == 1.0


def test_strong_scaling_ends_where_a_gpu_has_one_crystal(monkeypatch):
    monkeypatch.setattr(cluster, "sharing", lambda *given: EVEN)
    tables = cluster.predictions(None, COMPUTE, BYTES)
    assert [one[0].gpus for one in tables] == [1] * 4
    assert [one[-1].gpus for one in tables] == [64, 1024, 1024, 1024]
    assert all(row.batch == 32 * row.gpus for row in tables[2])


# Fit and check


def test_the_fit_finds_the_line_and_has_no_negative_part():
    crystals = [32, 128, 256]
    found = Compute.fitted(crystals, [0.1 + 2e-3 * b for b in crystals])
    assert found.fixed == pytest.approx(0.1) and found.per_crystal == pytest.approx(2e-3)
    steeper = Compute.fitted(crystals, [1e-3 * (b - 8) for b in crystals])
    assert steeper.fixed == 0 and steeper.per_crystal == pytest.approx(0.9e-3, rel=0.1)
    falling = Compute.fitted(crystals, [3.0, 2.0, 1.0])
    assert falling.per_crystal == 0 and 1.0 < falling.fixed < 3.0
    assert Compute.fitted([32], [0.64]) == Compute(0.0, pytest.approx(0.02))


def test_devices_that_share_cores_wait_for_each_other():
    """By hand: 1 s of work each, 2 cores, and a sum of 0.25 s."""
    second = Compute(0.5, 0.5 / 32)
    alone = [cluster.predict_here(n, 32, second, 0.25, 1.0, cores=2) for n in (1, 2, 4, 8)]
    assert alone == pytest.approx([1.25, 1.25, 2.25, 4.25])
    assert cluster.predict_here(4, 32, second, 0.25, cores_of_one=2.0, cores=2) == pytest.approx(4.25)
    assert cluster.predict_here(8, 32, second, 0.25) == pytest.approx(1.25)  # machines of their own


def test_speed_up_and_efficiency_are_of_crystals_per_second():
    timings = {
        Setting(1, 256): Timing([4.0, 8.0]),
        Setting(4, 256): Timing([2.0, 4.0]),
        Setting(1, 32): Timing([1.0, 1.0]),
        Setting(4, 128): Timing([2.0, 2.0]),
    }
    used = {Setting(1, 256): 6.0, Setting(4, 256): 8.0, Setting(1, 32): 1.0, Setting(4, 128): 5.0}
    strong = step_record("strong", Setting(4, 256), timings, used, cores=2)
    assert strong["speed_up"] == 2.0 and strong["efficiency"] == 0.5 and strong["efficiency_of_cores"] == 1.0
    assert strong["crystals_per_s"] == 256 / 3.0
    assert strong["cores_busy"] == 8.0 / 3.0 and strong["efficiency_of_core_s"] == 0.75
    assert step_record("weak", Setting(4, 128), timings, used, 2)["efficiency_of_core_s"] == 0.8
    weak = step_record("weak", Setting(4, 128), timings, used)
    assert weak["speed_up"] == 2.0 and weak["efficiency"] == 0.5
    assert weak["efficiency_of_cores"] is None and weak["core_s"] is None


def records(line, sums, cores=0):
    """Steps that are as the model says they are, on machines of their own."""
    found = []
    for name, settings in series([1, 2, 4, 8]).items():
        for setting in settings:
            seconds = line.seconds(setting.batch / setting.devices * 1.25) + sums[setting.devices]
            timings = {one: Timing([line.seconds(one.batch)]) for one in (Setting(1, 32), Setting(1, 256))}
            if setting.devices > 1 or setting not in timings:
                timings[setting] = Timing([seconds if setting.devices > 1 else line.seconds(setting.batch)])
            used = {one: one.devices * timing.median for one, timing in timings.items()}
            record = step_record(name, setting, timings, used, cores)
            record |= {"sum_s": sums[setting.devices], "atoms_filled": 0.8, "neighbors_filled": 0.9}
            found.append(record | {"balance": 1.25 if setting.devices > 1 else 1.0})
    return found


def test_steps_that_follow_the_model_are_predicted():
    line, sums = Compute(0.1, 2e-3), {1: 0.0, 2: 0.01, 4: 0.02, 8: 0.03}
    steps = records(line, sums)
    checked = check(steps, cores=0)
    assert len(checked) == len(steps) == 11
    assert [row["predicted_to_measured"] for row in checked] == pytest.approx([1.0] * 11)
    slower = [record | {"median_s": 2 * record["median_s"]} if record["devices"] == 8 else record for record in steps]
    ratios = [row["predicted_to_measured"] for row in check(slower, 0) if row["devices"] == 8]
    assert ratios == pytest.approx([0.5, 0.5])


def test_a_step_that_failed_is_left_out_of_fit_and_check():
    steps = records(COMPUTE, dict.fromkeys((1, 2, 4, 8), 0.0))
    failed = [record | {"median_s": None} if record["crystals"] == 256 else record for record in steps]
    assert len(check(failed, 0)) == sum(record["crystals"] != 256 for record in steps)
    nothing = [record | {"median_s": None} for record in steps]
    assert fit(nothing) is None and check(nothing, 0) == []


def test_core_seconds_are_those_of_one_device_for_each():
    """Machines of their own, counted as if they shared cores: every device uses one core for as long as its step."""
    line = Compute(0.1, 2e-3)
    checked = check(records(line, dict.fromkeys((1, 2, 4, 8), 0.0), cores=8), cores=8)
    assert [row["predicted_to_measured_core_s"] for row in checked] == pytest.approx([1.0] * 11)
    (row,) = (row for row in checked if (row["series"], row["devices"]) == ("weak", 8))
    assert row["predicted_core_s"] == pytest.approx(8 * line.seconds(32 * 1.25))


def test_all_devices_are_used_even_if_their_number_is_no_power_of_two():
    assert [device_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_setting_of_two_series_is_measured_once():
    chosen = series([1, 2, 4, 8])
    assert len({setting for one in chosen.values() for setting in one}) == 8
    assert all(one[0].devices == 1 for one in chosen.values())


def test_cores_are_counted_for_each_program_without_its_first_run(monkeypatch):
    now = iter([0.0, 90.0, 95.0, 97.0, 98.0, 100.0, 101.0])
    monkeypatch.setattr(devices.time, "process_time", lambda: next(now))
    clock = CoreClock()
    for key in "ababab":
        clock.ran(key)
    assert clock.median("a") == 2.0 and clock.median("b") == 1.0 and clock.median("c") is None


def test_the_batch_that_is_measured_is_of_mean_size(dataset):
    class Loader(list):
        rows = list.__getitem__

    loader = Loader([np.arange(10), np.arange(5), np.arange(7)])
    loader.dataset = dataset
    dataset.table.num_edges[:] = 10
    assert devices.typical(loader) == 2


def test_the_sum_of_one_device_is_measured_in_the_shapes_of_the_weights():
    variant = SimpleNamespace(state=SimpleNamespace(params={"w": np.ones((3, 2), np.float32), "b": np.ones(2)}))
    (timing,) = take_turns([devices.sum_program(variant, 1)], rounds=1)
    assert not timing.failure and timing.seconds
    assert devices.gradient_bytes(variant) == 6 * 4 + 2 * 8


# Tables and arguments


@pytest.fixture
def results(monkeypatch):
    monkeypatch.setattr(cluster, "sharing", lambda *given: EVEN)
    variant = SimpleNamespace(state=SimpleNamespace(params=np.zeros(10)))
    steps = records(Compute(0.1, 2e-3), {1: 0.0, 2: 0.01, 4: 0.02, 8: 0.03}, cores=2)
    steps[3] |= {"median_s": None, "crystals_per_s": None, "speed_up": None, "failure": "no memory"}
    return {
        "variant": "default",
        "implementation": "xla",
        "forced_cpu_devices": 8,
        "shared_cores": 2,
        "gradient_bytes": 3.8e6,
        "steps": steps,
        "fit": dataclasses.asdict(fit(steps)),
        "check": check(steps, 2),
        "paper": devices.paper(None, variant, None),
    }


def test_tables_say_what_forced_devices_cannot_show(results, capsys):
    report.print_devices(json.loads(json.dumps(results)))
    out = capsys.readouterr().out
    assert "8 forced CPU devices share 2 cores: no speed-up beyond 2 can show" in out
    assert "failed: 8 devices, 256 crystals: no memory" in out and "/ min(devices, cores)" in out
    for title in (
        "strong scaling: ",
        "weak scaling: ",
        "strong scaling, 2,048 crystals in all",
        "predicted / measured",
    ):
        assert title in out
    report.print_devices(results | {"forced_cpu_devices": 0, "shared_cores": 0})
    out = capsys.readouterr().out
    assert "/ min(" not in out and "core s" not in out


def test_scaling_measures_nothing_else_and_writes_it(script, results, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(script, "make_cpu_devices", lambda: calls.append("devices made"))
    monkeypatch.setattr(script, "measure_devices", lambda *given, **named: calls.append((given, named)) or results)
    file = tmp_path / "results.json"
    script.main(["--scaling", "--variant=lightweight", "--rounds=3", f"--json={file}"])
    made, ((variant, implementation, _, rounds), _) = calls
    assert made == "devices made" and (variant.name, implementation, rounds) == ("lightweight", "xla", 3)
    written = json.loads(file.read_text())
    assert set(written) == {"device", "cores", "jax", "date", "devices"}
    assert written["devices"]["paper"]["rows"] and "strong scaling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part=steps"], "leave --part out"),
        (["--case=bundled-64"], "leave --case out"),
        (["--variant=default", "--variant=lightweight"], "one --variant"),
        (["--implementation=xla", "--implementation=pallas"], "one --implementation"),
    ],
)
def test_what_scaling_has_no_use_for_is_an_error(script, arguments, words, capsys):
    with pytest.raises(SystemExit):
        script.main(["--scaling", *arguments])
    assert words in capsys.readouterr().err


def test_cpu_devices_are_made_before_jax_looks_for_any(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *given: asked.append(given))
    devices.make_cpu_devices()
    assert asked == [("jax_num_cpu_devices", 8)]
