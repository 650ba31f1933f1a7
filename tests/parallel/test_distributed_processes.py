"""Several processes of a training on this machine: how they start, and how all end when one fails or is lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from distributed_process import SECONDS
from process_helpers import environment, free_port

from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.model.implementation import ImplementationError
from crystalframer_jax.parallel.processes import DistributedError, failing_together, start
from crystalframer_jax.training import consensus
from crystalframer_jax.training.consensus import agreed_implementation, check_alike

ROOT = Path(__file__).parents[2]
PROCESS = ROOT / "tests" / "distributed_process.py"
HOST = socket.gethostname()
CONTINUES = "; the same command continues from the last checkpoint"

# Starting them


@contextlib.contextmanager
def pairs(*cases: str) -> Iterator[dict[str, list[subprocess.Popen]]]:
    """Both processes of each case, running; none outlives the block."""
    running: dict[str, list[subprocess.Popen]] = {}
    pipe = subprocess.PIPE
    try:
        for case in cases:
            port = str(free_port())
            commands = [[sys.executable, PROCESS, case, str(process), port] for process in range(2)]
            running[case] = [
                subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=pipe, stderr=pipe, text=True)
                for command in commands
            ]
        yield running
    finally:
        for process in (process for pair in running.values() for process in pair):
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status of a process, and what it wrote to stderr without the remarks of gRPC and Gloo."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, "\n".join(line for line in errors.splitlines() if not line.startswith("[Gloo]"))


def assert_one_error(process: subprocess.Popen, *words: str) -> None:
    """One line of ours, the last on stderr, and status 1."""
    status, errors = ended(process)
    ours = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(ours) == 1 and errors.splitlines()[-1] == ours[0], (status, errors)
    assert all(word in ours[0] for word in words), ours[0]


def wait_for_step_5(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        assert any(line == "step 5\n" for line in process.stdout), process.communicate()


# The tests


def test_distributed_ends_that_are_wanted_are_no_failures():
    """Also if one process ends two seconds before the other, and if both are suspended for long meanwhile."""
    with pairs("none", "interrupted", "suspended") as running:
        wait_for_step_5(running["suspended"])
        for process in running["suspended"]:
            process.send_signal(signal.SIGSTOP)
        time.sleep(SECONDS + 2)
        for process in running["suspended"]:
            process.send_signal(signal.SIGCONT)
        for process in running["none"] + running["suspended"]:
            assert ended(process) == (0, "")
        for process in running["interrupted"]:
            status, errors = ended(process)  # whoever called failing_together gets the exception
            assert status == 1 and errors.endswith("TrainingInterrupted: stopped by SIGTERM")
            assert "error: " not in errors and "host" not in errors


def test_distributed_failure_of_one_process_ends_both_with_its_reason():
    with pairs("error 0", "error 1", "bug 0", "exit 1", "ctrl-c 1", "early 0") as running:
        for failing in (0, 1):
            name, reason = f"process {failing} (host {HOST})", "the fifth step is wrong; mend it"
            assert_one_error(running[f"error {failing}"][failing], f"error: {name}: {reason}")
            assert_one_error(running[f"error {failing}"][1 - failing], f"error: {name}: {reason}{CONTINUES}")
        for process in running["early 0"]:
            assert_one_error(process, f"error: process 0 (host {HOST}): too early; wait")
        status, errors = ended(running["bug 0"][0])
        assert status == 1 and errors.endswith("ZeroDivisionError: a bug") and "in happen" in errors
        assert_one_error(running["bug 0"][1], f"process 0 (host {HOST}): ZeroDivisionError: a bug; the same command")
        assert_one_error(running["exit 1"][1], f"error: process 1 (host {HOST}): left")
        assert_one_error(running["exit 1"][0], f"error: process 1 (host {HOST}): left; the same")
        status, errors = ended(running["ctrl-c 1"][1])
        assert status == 130 and errors == f"error: process 1 (host {HOST}): interrupted by Ctrl-C"
        assert_one_error(running["ctrl-c 1"][0], "process 1", "interrupted by Ctrl-C")


def test_distributed_loss_or_standstill_of_one_process_is_told_in_time():
    with pairs("killed 0", "killed 1", "halted 0", "halted 1", "stuck 1") as running:
        for pair in running.values():
            wait_for_step_5(pair)
        begin = time.monotonic()
        lost_ones = {case: pair for case, pair in running.items() if case != "stuck 1"}
        for case, pair in lost_ones.items():
            lost = int(case[-1])
            words = f"error: lost process {lost} (host {HOST}): ", 'last report "step ', CONTINUES
            assert_one_error(pair[1 - lost], *words)
        words = f'error: no progress in process 1 (host {HOST}); last report "step 4", ', ' are at "step 5"', CONTINUES
        for process in running["stuck 1"]:
            assert_one_error(process, *words)
        assert time.monotonic() - begin < SECONDS + 6


def test_distributed_single_process_lets_errors_pass():
    with pytest.raises(ZeroDivisionError), failing_together(1) as watchdog:
        watchdog.report("step 1")
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("host", 2, 0), "the coordinator's address 'host' has no port"),
        (("host:1", 0, 0), "cannot be 0 processes"),
        (("host:1", 2, 2), "no process 2 of 2; number the processes from 0"),
        (("host:1", None, -1), "no process -1"),
        (("host:1", 2, 1), "before"),  # JAX is in use
    ],
)
def test_distributed_start_refuses_what_is_impossible(arguments, words):
    jax.devices()
    with pytest.raises(DistributedError, match=words):
        start(*arguments)


def test_distributed_start_says_what_is_missing_and_who_does_not_come():
    """In a process of its own, outside of any scheduler: the last attempt ends it."""
    code = """
import sys
from crystalframer_jax.config import ConfigError
from crystalframer_jax.configs import default
from crystalframer_jax.parallel.processes import DistributedError, start
taken, free = sys.argv[1:]
for arguments in ((), (free,), (free, 2), (taken, 2, 0), (free, 2, 0, 1)):
    try:
        start(*arguments)
    except DistributedError as error:
        print(error)
"""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::", 0))
        listener.listen()
        addresses = [f"127.0.0.1:{port}" for port in (listener.getsockname()[1], free_port())]
        command = [sys.executable, "-c", code, *addresses]
        run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert run.stdout.count("\n") == 4, run.stderr
    nothing, no_number, no_process, taken = run.stdout.splitlines()
    for line, word in ((nothing, "coordinator_address"), (no_number, "Number"), (no_process, "process id")):
        assert word in line and "cannot be found out here; start the processes by SLURM (srun), Open MPI" in line
    assert taken == f"the port of {addresses[0]} cannot be used: Address already in use; choose another"
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        f"error: process 0 has not met the others at {addresses[1]} within 1 s"
    )


# What they must agree on


@pytest.mark.parametrize(
    ("key", "value", "words"), [("lr", 1e-3, "--config.lr 0.001 there"), ("jax", "0.1", "jax 0.1 there")]
)
def test_distributed_processes_that_differ_are_an_error(monkeypatch, key, value, words):
    config = TrainConfig()
    check_alike(config, {})
    key = key if key == "jax" else f"--config.{key}"
    monkeypatch.setattr(consensus, "json_from_first_process", lambda values: values | {key: value})
    with pytest.raises(ConfigError, match=f"process 0 differs from the first .{words}.*same command"):
        check_alike(config, {})


@pytest.mark.parametrize("fails_here", [False, True])
@pytest.mark.parametrize("fails_elsewhere", [False, True])
def test_distributed_processes_use_kernels_if_all_can(monkeypatch, fails_here, fails_elsewhere):
    def trace(implementation):
        assert implementation == "pallas"
        if fails_here:
            raise ImplementationError("no memory")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(consensus, "largest_of_processes", lambda number: max(number, int(fails_elsewhere)))
    expected = "xla" if fails_here or fails_elsewhere else "auto"
    assert agreed_implementation("auto", trace) == expected
    assert agreed_implementation("xla", trace) == "xla" and agreed_implementation("pallas", trace) == "pallas"


def test_distributed_job_for_slurm_starts_the_processes(tmp_path):
    """The script with its arguments, in the folder it was submitted from; outside of SLURM it says so."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f"PATH={tmp_path}/bin:$PATH\n")
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    variables = {"PATH": os.environ["PATH"], "VENV": str(tmp_path)}
    script = [ROOT / "scripts" / "slurm" / "train.sbatch", "--config=a b.py", "--workdir=w"]
    run = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert run.returncode != 0 and "this script is for sbatch" in run.stderr
    run = subprocess.run(script, env=variables | {"SLURM_SUBMIT_DIR": str(ROOT)}, capture_output=True, text=True)
    arguments = f"{ROOT} --kill-on-bad-exit=1 python scripts/train.py --distributed --config=a b.py --workdir=w\n"
    assert (run.returncode, run.stdout) == (0, arguments), run.stderr
