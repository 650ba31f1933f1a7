"""Trainings that are stopped, killed or run out of time or disk, and continued to the same bits."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Fork
from tiny import assert_same_run, start_training, stored_state, tiny_config, tiny_runs

from crystalframer_jax.errors import UserError
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.training.start import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs():
        yield tmp_path_factory.mktemp("interruptions")


@pytest.fixture(scope="module")
def finished(folder):
    """(configuration, directory) of a run that nothing disturbed."""
    config = tiny_config(folder / "data", ema_decay=0.9)
    train(config, folder / "finished")
    return config, folder / "finished"


def wait_for_training(process: Fork) -> None:
    """Return when the process has told what it will train."""
    for line in process.stdout:
        if "atom slots" in line or "; continuing" in line:
            return
    raise AssertionError(process.communicate())


def steps_of(workdir: Path) -> list[int]:
    """The steps of the checkpoints that are complete."""
    return sorted(int(file.parent.name) for file in (workdir / "checkpoints").glob("*/SHA256SUMS"))


def stop(process: Fork, number: int) -> str:
    """Send a signal; the process must end well, without a word on stderr. Returns what it printed."""
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, ""), errors
    return output


def test_signals_save_within_an_epoch_and_the_run_continues_to_the_same_bits(finished, folder):
    """A signal that comes before the first step of a session finds nothing new to save."""
    config, expected = finished
    workdir = folder / "signals"
    steps = [0]
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGINT, "Ctrl-C")):
        process = start_training(config, workdir, seconds_per_step=1.2)
        wait_for_training(process)
        time.sleep(1.5)
        output = stop(process, number)
        steps.append(steps_of(workdir)[-1])
        assert output.splitlines()[-1].startswith(f"stopped by {name}")
        assert f"saved at step {steps[-1]}; the same command continues {workdir}" in output
        state, meta = stored_state(config, workdir)
        assert int(state.step) == steps[-1] == 3 * (meta["epoch"] + 1) + len(meta["results"])
    assert steps == sorted(steps) and any(step % 3 for step in steps)
    train(config, workdir)
    assert_same_run(config, workdir, expected)


@pytest.mark.slow
def test_the_time_limit_saves_and_stops_in_time(finished, folder):
    config, expected = finished
    workdir = folder / "limited"
    start = time.monotonic()
    process = start_training(config, workdir, "--max_minutes=0.01")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and errors == ""
    assert "stopped by --max_minutes=0.01 in epoch 1, saved at step 1;" in output
    assert time.monotonic() - start < 200
    train(config, workdir)
    assert_same_run(config, workdir, expected)


def kill_and_continue(finished, workdir: Path, kills: int, seed: int) -> None:
    """Kill a run at random moments, from its start to its end, then let it finish."""
    config, expected = finished
    draw = random.Random(seed)
    for _ in range(kills):
        process = start_training(config, workdir, seconds_per_step=0.1)
        wait_for_training(process)
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.communicate()
    train(config, workdir)
    assert_same_run(config, workdir, expected)


def test_killed_at_random_moments_a_run_ends_with_the_same_bits(finished, folder):
    kill_and_continue(finished, folder / "killed", kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_twenty_random_moments(finished, folder, seed):
    kill_and_continue(finished, folder / f"killed-{seed}", kills=5, seed=1 + seed)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_continues(finished, folder, capfd):
    config, expected = finished
    workdir = folder / "damaged"
    shutil.copytree(expected, workdir)
    last = max(steps_of(workdir))
    victim = max(
        (workdir / "checkpoints" / str(last)).glob("**/*"), key=lambda file: file.is_file() and file.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(config, workdir)
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert victim.name in warning and "damaged_checkpoints" in warning
    assert (workdir / "damaged_checkpoints" / str(last)).is_dir()
    assert_same_run(config, workdir, expected)


def test_outside_of_the_steps_a_signal_stops_at_once():
    interruption = Interruption()
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM"), interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_between_safe_moments_a_signal_is_only_noted_and_a_second_ctrl_c_is_obeyed():
    interruption = Interruption()
    with interruption.listening(), interruption.stepping():
        assert interruption.reason() == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason() == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_the_time_limit_leaves_room_for_three_of_the_slowest_steps(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interruption = Interruption(max_minutes=2, start=990.0)
    reasons = []
    for seconds in (0, 20, 5, 5, 5, 5, 5, 5):
        now[0] += seconds
        reasons.append((now[0] - 990, interruption.reason()))
    assert [at for at, reason in reasons if reason] == [60.0]  # 60 s are left, and 3 x 20 + 2 are needed
    assert Interruption().reason() == "" and Interruption(max_minutes=0).reason() == "--max_minutes=0"


def test_in_another_thread_than_the_main_one_trainings_run_without_signals(finished):
    config, workdir = finished
    results = []
    thread = threading.Thread(target=lambda: results.append(train(config, workdir)))
    thread.start()
    thread.join()
    assert results[0]["test"]


@contextlib.contextmanager
def mounted(disk: Path, options: str) -> Iterator[Path]:
    """A disk of its own, in memory; the test is skipped where it cannot be mounted."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    if os.geteuid() or sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(finished, folder):
    """A disk that fills up while the training runs; made free again, it continues to the same bits."""
    config, expected = finished
    with mounted(folder / "disk", "size=8m") as disk:
        workdir = disk / "run"
        first = tiny_config(folder / "data", ema_decay=0.9)
        process = start_training(first, workdir, seconds_per_step=0.5)
        wait_for_training(process)
        while not steps_of(workdir):
            time.sleep(0.02)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ") and "same command" in errors
        assert "No space left" in errors or "disk is full" in errors
        assert steps_of(workdir)
        filler.unlink()
        train(config, workdir)
        assert_same_run(config, workdir, expected)


def test_a_directory_that_cannot_be_written_is_one_clear_error(finished, folder):
    config, _ = finished
    match = r"run cannot be written \(Read-only file system\)"
    with mounted(folder / "readonly", "ro") as disk, pytest.raises(UserError, match=match):
        train(config, disk / "run")
