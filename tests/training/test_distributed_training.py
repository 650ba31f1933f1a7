"""Two processes with four devices each train as one process with eight, whatever happens to one of them."""

import os
import signal
import socket
import time
from pathlib import Path

import jax
import pytest
from forks import Fork
from process_helpers import environment, free_port
from test_interruptions import steps_of
from tiny import assert_same_run, start_training, tiny_config, tiny_runs

from crystalframer_jax.training.logging import read_metrics

SECONDS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with tiny_runs():
        yield tmp_path_factory.mktemp("distributed")


@pytest.fixture
def config(folder):
    """Steps can be compared in float64; without frames programs are compiled sooner."""
    return tiny_config(folder / "data", precision="float64", frame_method="no", value_pe_angle_real=0, dropout=0.1)


class Processes:
    """Processes that train together in a directory; none outlives the block."""

    def __init__(self, monkeypatch, config, workdir: Path, number: int, devices: int, seconds_per_step: float = 0.0):
        for name in set(os.environ) - set(environment()):
            monkeypatch.delenv(name)
        monkeypatch.setenv("XLA_FLAGS", environment(devices)["XLA_FLAGS"])
        together = [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={number}"]
        self.all = [
            start_training(
                config,
                workdir,
                *([*together, f"--process_id={process}", f"--watchdog_minutes={SECONDS / 60}"] if number > 1 else []),
                seconds_per_step=seconds_per_step,
            )
            for process in range(number)
        ]

    def __enter__(self) -> list[Fork]:
        return self.all

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.communicate()


def outcome(process: Fork) -> tuple[int, str, list[str]]:
    """Exit status, standard output, and the lines of standard error without the remarks of Gloo."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, [line for line in errors.splitlines() if "connected" not in line]


def wait_for(process: Fork, beginning: str) -> str:
    """Wait for a line that begins so, and return all that came before it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError((lines, process.stderr.read()))


@pytest.fixture
def one_process(monkeypatch, folder, config) -> Path:
    """A run of one process on eight devices."""
    workdir = folder / "one"
    if not workdir.exists():
        with Processes(monkeypatch, config, workdir, 1, devices=8) as (alone,):
            status, output, errors = outcome(alone)
            assert (status, errors) == (
                0,
                [],
            ) and "batches of 16 crystals, shared by 8 devices: 2 crystals each in" in output
    return workdir


def test_distributed_training_survives_the_end_of_a_process_to_the_bit(monkeypatch, folder, config, one_process):
    """A request to stop to one process, then the sudden end of one, then the rest: as one process without all that."""
    workdir = folder / "two"
    with Processes(monkeypatch, config, workdir, 2, devices=4, seconds_per_step=0.5) as (first, second):
        wait_for(first, "batches of 16 crystals, shared by 8 devices of 2 processes")
        second.send_signal(signal.SIGTERM)
        status, output, errors = outcome(first)
        assert (status, errors) == (0, []) and "stopped by a request to another process" in output
        status, output, errors = outcome(second)
        assert (status, errors) == (0, []) and "epoch" not in output
    (step,) = steps_of(workdir)
    assert 0 < step < 9

    with Processes(monkeypatch, config, workdir, 2, devices=4, seconds_per_step=0.5) as (first, second):
        assert f"continuing {workdir} after {step} of 9 steps" in wait_for(first, "epoch")
        second.kill()
        begin = time.monotonic()
        status, _, errors = outcome(first)
        assert status == 1 and time.monotonic() - begin < SECONDS + 10
        assert errors[-1].startswith(f"error: lost process 1 (host {socket.gethostname()})")
        assert errors[-1].endswith("the same command continues from the last checkpoint")

    with Processes(monkeypatch, config, workdir, 2, devices=4) as (first, second):
        status, output, errors = outcome(first)
        assert (status, errors) == (0, []) and f"continuing {workdir} after" in output and "predictor" in output
        status, output, errors = outcome(second)
        assert (status, errors) == (0, []) and "epoch" not in output
    with jax.enable_x64(True):
        assert_same_run(config, workdir, one_process)


def test_distributed_errors_that_all_processes_find_are_told_once(monkeypatch, folder, config):
    """And those of the first process, the only one to look into the run directory, are told by the others too."""
    (folder / "ensemble" / "member_0").mkdir(parents=True)
    config.n_epochs = 0
    with Processes(monkeypatch, config, folder / "none", 2, devices=1) as pair:
        (status, _, first), (other, _, second) = map(outcome, pair)
    assert (status, other) == (1, 1)
    (line,) = first + second
    assert "n_epochs=0" in line
    config.update(n_epochs=1, swa_epochs=0)
    with Processes(monkeypatch, config, folder / "ensemble", 2, devices=1) as pair:
        (status, _, first), (other, _, second) = map(outcome, pair)
    assert (status, other) == (1, 1) and "holds an ensemble; choose another" in first[-1]
    assert second[-1] == first[-1] + "; the same command continues from the last checkpoint"


def test_distributed_processes_with_one_device_each(monkeypatch, folder, config, one_process):
    """As SLURM starts them: the first epoch of eight devices, up to rounding."""
    config.update(n_epochs=1, swa_epochs=0)
    workdir = folder / "one-device-each"
    with Processes(monkeypatch, config, workdir, 2, devices=1) as pair:
        assert [(status, errors) for status, _, errors in map(outcome, pair)] == 2 * [(0, [])]
    (line,), (expected, *_) = read_metrics(workdir), read_metrics(one_process)
    for name in ("loss", "grad_norm", "val_loss"):
        assert line[name] == pytest.approx(expected[name], rel=1e-9)
