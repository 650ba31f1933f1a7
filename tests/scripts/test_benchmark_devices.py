"""Scaling over devices: the documented formula, the arithmetic of speed-up, tables and arguments."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from benchmarking import devices, report
from benchmarking.devices import Setting, device_counts, series, step_record

from crystalframer_jax.measuring.timing import Timing, take_turns

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


# Speed-up


def test_speed_up_and_efficiency_are_of_crystals_per_second():
    timings = {
        Setting(1, 256): Timing([4.0, 8.0]),
        Setting(4, 256): Timing([2.0, 4.0]),
        Setting(1, 32): Timing([1.0, 1.0]),
        Setting(4, 128): Timing([2.0, 2.0]),
    }
    strong = step_record("strong", Setting(4, 256), timings, cores=2)
    assert strong["speed_up"] == 2.0 and strong["efficiency"] == 0.5 and strong["efficiency_of_cores"] == 1.0
    assert strong["crystals_per_s"] == 256 / 3.0
    weak = step_record("weak", Setting(4, 128), timings)
    assert weak["speed_up"] == 2.0 and weak["efficiency"] == 0.5
    assert weak["efficiency_of_cores"] is None


def test_all_devices_are_used_even_if_their_number_is_no_power_of_two():
    assert [device_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_setting_of_two_series_is_measured_once():
    chosen = series([1, 2, 4, 8])
    assert len({setting for one in chosen.values() for setting in one}) == 7
    assert all(one[0].devices == 1 for one in chosen.values())


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


# Tables and arguments


@pytest.fixture
def results():
    timings = {
        setting: Timing([1.0 + setting.batch / setting.devices]) for one in series([1, 8]).values() for setting in one
    }
    shares = {"sum_s": 0.01, "balance": 1.25, "atoms_filled": 0.8, "neighbors_filled": 0.9}
    steps = [
        step_record(name, setting, timings, cores=2) | shares
        for name, settings in series([1, 8]).items()
        for setting in settings
    ]
    steps[1] |= {"median_s": None, "crystals_per_s": None, "speed_up": None, "failure": "no memory"}
    return {
        "variant": "default",
        "implementation": "xla",
        "forced_cpu_devices": 8,
        "shared_cores": 2,
        "gradient_bytes": 3.8e6,
        "steps": steps,
    }


def test_tables_say_what_forced_devices_cannot_show(results, capsys):
    report.print_devices(json.loads(json.dumps(results)))
    out = capsys.readouterr().out
    assert "8 forced CPU devices share 2 cores: no speed-up beyond 2 can show" in out
    assert "failed: 8 devices, 256 crystals: no memory" in out and "efficiency of cores" in out
    for title in ("strong scaling: ", "weak scaling: "):
        assert title in out
    report.print_devices(results | {"forced_cpu_devices": 0, "shared_cores": 0})
    out = capsys.readouterr().out
    assert "efficiency of cores" not in out


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
    assert written["devices"]["steps"] and "strong scaling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part=steps"], "no --part; leave it out"),
        (["--case=bundled-64"], "no --case; leave it out"),
        (["--variant=default", "--variant=lightweight"], "one --variant"),
        (["--implementation=xla", "--implementation=pallas"], "one --implementation"),
    ],
)
def test_what_scaling_has_no_use_for_is_an_error(script, arguments, words, capsys):
    with pytest.raises(SystemExit):
        script.main(["--scaling", *arguments])
    assert words in capsys.readouterr().err
