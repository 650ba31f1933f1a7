"""Scaling over devices: the documented formula, the arithmetic of speed-up, fit and check, tables and arguments."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from benchmarking import devices, report, timing
from benchmarking.devices import Line, Setting, check, device_counts, fit, series, step_record
from benchmarking.timing import Program, Timing, take_turns

# The model on paper


def documented_tables():
    """Rows of numbers of the table in docs/distributed.md, by the series that it names."""
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text[text.index("| GPUs |") :].split("\n\n")[0].splitlines()[2:]]
    tables = {}
    for first, *others in rows:
        if first.startswith("**"):
            tables[first.strip("*")] = found = []
        else:
            found.append([float(x.strip(" %").replace(",", "")) for x in (first, *others)])
    return tables


def predicted(gpus, crystals, balance, sharing):
    """The formula of docs/distributed.md: MB sent, and compute, sum on three networks, packing and sharing in ms."""
    S, g, nodes = 3.807e6, min(gpus, 8), -(-gpus // 8)
    compute = 0.8 + crystals / gpus * balance * 1.8 / 256
    sums = []
    for W, between in ((50e9, 4), (10e9, 4), (3e9, 30)):
        slowest = 450e9 if nodes == 1 else W
        to_all = 10 + (gpus - 1) + 1e6 * max((g - 1) * S / gpus / 450e9, (gpus - g) * S / gpus / W)
        gather = 10 + (gpus - nodes) * 1.9 + (nodes - 1) * between + 1e6 * (gpus - 1) * S / gpus / slowest
        sums.append((to_all + gather) / 1e3 if gpus > 1 else 0.0)
    packing = 1e3 * crystals / gpus / (450 * 256)
    return 2 * (gpus - 1) / gpus * S / 1e6, compute, sums, sharing + packing


def test_the_documented_table_follows_from_the_documented_formula():
    """Within the digits that the table has: balance (1/100) and time for sharing out (1/10 ms) are taken from it."""
    tables = documented_tables()
    assert {title: [row[0] for row in rows] for title, rows in tables.items()} == {
        "strong, 256 in all": [1, 2, 4, 8, 16, 64],
        "strong, 2,048 in all": [1, 2, 4, 8, 16, 64, 256, 1024],
        "weak, 32 for each GPU": [1, 2, 4, 8, 16, 64, 256, 1024],
        "weak, 256 for each GPU": [1, 2, 4, 8, 16, 64, 256, 1024],
    }
    for rows in tables.values():
        each = rows[0][1]
        single = each / predicted(1, each, 1.0, 0.0)[1]
        for n, crystals, balance, compute, sent, *sums, in_400, in_80, in_25, sharing, step, rate, own, packed in rows:
            expected_sent, busy, expected_sums, host = predicted(n, crystals, balance, sharing)
            of_balance = 0.005 * 1.8 / 256 * crystals / n  # ms that its last digit stands for
            assert sent == pytest.approx(expected_sent, abs=0.051)
            assert compute == pytest.approx(busy, abs=0.0051 + of_balance)
            assert sums == pytest.approx(expected_sums, abs=0.0051)
            efficiency = 100 * crystals / n / single
            shares = [efficiency / (busy + taken) for taken in expected_sums]
            assert [in_400, in_80, in_25] == pytest.approx(shares, abs=1)
            expected_step = max(busy + expected_sums[0], sharing)
            assert step == pytest.approx(expected_step, abs=0.051)
            assert rate == pytest.approx(1e3 * crystals / step, rel=0.006)
            assert own == pytest.approx(efficiency / expected_step, abs=1)
            assert packed == pytest.approx(efficiency / max(busy + expected_sums[0], host), abs=2)


# Fit and check


def fitted(crystals, seconds):
    return fit([{"series": "one device", "crystals": b, "median_s": t} for b, t in zip(crystals, seconds, strict=True)])


def test_the_fit_finds_the_line_and_has_no_negative_part():
    crystals = [32, 128, 256]
    found = fitted(crystals, [0.1 + 2e-3 * b for b in crystals])
    assert found.fixed == pytest.approx(0.1) and found.per_crystal == pytest.approx(2e-3)
    steeper = fitted(crystals, [1e-3 * (b - 8) for b in crystals])
    assert steeper.fixed == 0 and steeper.per_crystal == pytest.approx(0.9e-3, rel=0.1)
    falling = fitted(crystals, [3.0, 2.0, 1.0])
    assert falling.per_crystal == 0 and 1.0 < falling.fixed < 3.0
    assert fitted([32], [0.64]) == Line(0.0, pytest.approx(0.02))


def test_devices_that_share_cores_wait_for_each_other():
    """By hand: 1 s of work each, 2 cores, and a sum of 0.25 s."""
    second = Line(0.5, 0.5 / 32)

    def predicted_here(number, cores_of_one, cores):
        common = {"core_s": None, "balance": 1.0, "median_s": 1.0}
        one = common | {"series": "one device", "devices": 1, "sum_s": 0.25, "cores_busy": cores_of_one}
        steps = [one | {"crystals": b, "median_s": second.at(b)} for b in (32, 256)]
        steps.append(one | {"series": "weak", "devices": number, "crystals": 32 * number})
        return check(steps, cores)[-1]["predicted_s"]

    assert [predicted_here(n, 1.0, 2) for n in (1, 2, 4, 8)] == pytest.approx([1.25, 1.25, 2.25, 4.25])
    assert predicted_here(4, 2.0, 2) == pytest.approx(4.25)
    assert predicted_here(8, 1.0, 0) == pytest.approx(1.25)  # machines of their own


def test_speed_up_and_efficiency_are_of_crystals_per_second():
    timings = {
        Setting(1, 256): Timing([4.0, 8.0], [6.0, 6.0]),
        Setting(4, 256): Timing([2.0, 4.0], [8.0, 8.0]),
        Setting(1, 32): Timing([1.0, 1.0], [1.0, 1.0]),
        Setting(4, 128): Timing([2.0, 2.0], [5.0, 5.0]),
    }
    strong = step_record("strong", Setting(4, 256), timings, cores=2)
    assert strong["speed_up"] == 2.0 and strong["efficiency"] == 0.5 and strong["efficiency_of_cores"] == 1.0
    assert strong["crystals_per_s"] == 256 / 3.0
    assert strong["cores_busy"] == 8.0 / 3.0 and strong["efficiency_of_core_s"] == 0.75
    assert step_record("weak", Setting(4, 128), timings, 2)["efficiency_of_core_s"] == 0.8
    weak = step_record("weak", Setting(4, 128), timings)
    assert weak["speed_up"] == 2.0 and weak["efficiency"] == 0.5
    assert weak["efficiency_of_cores"] is None and weak["core_s"] is None


def records(line, sums, cores=0):
    """Steps that are as the model says they are, on machines of their own."""
    found = []
    for name, settings in series([1, 2, 4, 8]).items():
        for setting in settings:
            seconds = line.at(setting.batch / setting.devices * 1.25) + sums[setting.devices]
            alone = {Setting(1, batch): line.at(batch) for batch in {32, 256, setting.batch}}
            taken = alone | ({setting: seconds} if setting.devices > 1 else {})
            timings = {one: Timing([taken[one]], [one.devices * taken[one]]) for one in taken}
            record = step_record(name, setting, timings, cores)
            record |= {"sum_s": sums[setting.devices], "atoms_filled": 0.8, "neighbors_filled": 0.9}
            found.append(record | {"balance": 1.25 if setting.devices > 1 else 1.0})
    return found


def test_steps_that_follow_the_model_are_predicted():
    line, sums = Line(0.1, 2e-3), {1: 0.0, 2: 0.01, 4: 0.02, 8: 0.03}
    steps = records(line, sums)
    checked = check(steps, cores=0)
    assert len(checked) == len(steps) == 11
    assert [row["predicted_to_measured"] for row in checked] == pytest.approx([1.0] * 11)
    slower = [record | {"median_s": 2 * record["median_s"]} if record["devices"] == 8 else record for record in steps]
    ratios = [row["predicted_to_measured"] for row in check(slower, 0) if row["devices"] == 8]
    assert ratios == pytest.approx([0.5, 0.5])


def test_a_step_that_failed_is_left_out_of_fit_and_check():
    steps = records(Line(1e-3, 1e-5), dict.fromkeys((1, 2, 4, 8), 0.0))
    failed = [record | {"median_s": None} if record["crystals"] == 256 else record for record in steps]
    assert len(check(failed, 0)) == sum(record["crystals"] != 256 for record in steps)
    nothing = [record | {"median_s": None} for record in steps]
    assert fit(nothing) is None and check(nothing, 0) == []


def test_core_seconds_are_those_of_one_device_for_each():
    """Machines of their own, counted as if they shared cores: every device uses one core for as long as its step."""
    line = Line(0.1, 2e-3)
    checked = check(records(line, dict.fromkeys((1, 2, 4, 8), 0.0), cores=8), cores=8)
    assert [row["predicted_to_measured_core_s"] for row in checked] == pytest.approx([1.0] * 11)
    (row,) = (row for row in checked if (row["series"], row["devices"]) == ("weak", 8))
    assert row["predicted_core_s"] == pytest.approx(8 * line.at(32 * 1.25))


def test_all_devices_are_used_even_if_their_number_is_no_power_of_two():
    assert [device_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_setting_of_two_series_is_measured_once():
    chosen = series([1, 2, 4, 8])
    assert len({setting for one in chosen.values() for setting in one}) == 8
    assert all(one[0].devices == 1 for one in chosen.values())


def test_cores_are_counted_for_each_program_without_its_first_run(monkeypatch):
    now = itertools.accumulate(itertools.chain([0, 90, 0, 5], itertools.cycle([0, 2, 0, 1])))
    monkeypatch.setattr(timing.time, "process_time", lambda: float(next(now)))
    double = jax.jit(lambda x: 2 * x)
    both = take_turns([Program(double, lambda: (1.0,)), Program(double, lambda: (1.0,))], rounds=2)
    assert [one.core_seconds for one in both] == [[2.0, 2.0], [1.0, 1.0]]
    assert [one.core_median for one in both] == [2.0, 1.0] and Timing().core_median is None


def test_the_batch_that_is_measured_is_of_mean_size():
    class Loader(list):
        rows = list.__getitem__

    loader = Loader([np.arange(10), np.arange(5), np.arange(7)])
    loader.batch_size, loader.devices = 7, SimpleNamespace(count=1)
    loader.dataset = SimpleNamespace(table=SimpleNamespace(num_edges=np.full(100, 10)))
    assert devices.typical_batch(loader) is loader[2]


def test_the_sum_of_one_device_is_measured_in_the_shapes_of_the_weights():
    variant = SimpleNamespace(state=SimpleNamespace(params={"w": np.ones((3, 2), np.float32), "b": np.ones(2)}))
    (found,) = take_turns([devices.sum_program(variant, 1)], rounds=1)
    assert not found.failure and found.seconds
    assert devices.gradient_bytes(variant) == 6 * 4 + 2 * 8


# Tables and arguments


@pytest.fixture
def results():
    steps = records(Line(0.1, 2e-3), {1: 0.0, 2: 0.01, 4: 0.02, 8: 0.03}, cores=2)
    steps[3] |= {"median_s": None, "crystals_per_s": None, "speed_up": None, "failure": "no memory"}
    return {
        "variant": "default",
        "implementation": "xla",
        "forced_cpu_devices": 8,
        "shared_cores": 2,
        "gradient_bytes": 3.8e6,
        "steps": steps,
        "fit": fit(steps)._asdict(),
        "check": check(steps, 2),
    }


def test_tables_say_what_forced_devices_cannot_show(results, capsys):
    report.print_devices(json.loads(json.dumps(results)))
    out = capsys.readouterr().out
    assert "8 forced CPU devices share 2 cores: no speed-up beyond 2 can show" in out
    assert "failed: 8 devices, 256 crystals: no memory" in out and "/ min(devices, cores)" in out
    for title in ("strong scaling: ", "weak scaling: ", "steps predicted from that", "predicted / measured"):
        assert title in out
    report.print_devices(results | {"forced_cpu_devices": 0, "shared_cores": 0})
    out = capsys.readouterr().out
    assert "/ min(" not in out and "core s" not in out


def test_scaling_makes_cpu_devices_before_jax_looks_for_any_and_measures_nothing_else(
    script, results, tmp_path, monkeypatch, capsys
):
    calls = []
    monkeypatch.setattr(jax.config, "update", lambda *given: calls.append(given))
    monkeypatch.setattr(jax, "devices", lambda: calls.append("looked for") or [SimpleNamespace(device_kind="cpu")])
    monkeypatch.setattr(script, "measure_devices", lambda *given, **named: calls.append((given, named)) or results)
    file = tmp_path / "results.json"
    script.main(["--scaling", "--variant=lightweight", "--rounds=3", f"--json={file}"])
    made, looked_for, ((variant, implementation, rounds), _) = calls
    assert made == ("jax_num_cpu_devices", 8) and looked_for == "looked for"
    assert (variant.name, implementation, rounds) == ("lightweight", "xla", 3)
    written = json.loads(file.read_text())
    assert set(written) == {"device", "cores", "jax", "date", "devices"}
    assert written["devices"]["check"] and "strong scaling" in capsys.readouterr().out


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
