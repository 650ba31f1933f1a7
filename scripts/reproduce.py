"""Trains and compares as scripts/reproduce.sh says, which runs this in the environment of the checkout."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.configs.variants import VARIANTS, Benchmark
from crystalframer_jax.data.registry import target_set
from crystalframer_jax.text import table
from crystalframer_jax.training.logging import read_metrics

FOLDED = "matbench_phonons"  # one target, five folds


class Trainer:
    """Runs train.py in a process group of its own: signals, Ctrl-C too, reach it once, through `forward`."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.stopped = False
        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has two of them
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self.forward)

    def forward(self, number: int, frame: Any = None) -> None:
        """Passes a signal on to the training, which saves what it has done and ends."""
        self.stopped = True
        if self.child:
            self.child.send_signal(
                number if number in (signal.SIGINT, getattr(signal, "SIGUSR1", None)) else signal.SIGTERM
            )

    def train(self, *arguments: str) -> int:
        """Trains; returns the exit status as a shell tells it."""
        command = ["python", "scripts/train.py", *arguments]
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
        if self.stopped:
            self.forward(signal.SIGTERM)  # that came before there was a child
        status = self.child.wait()
        return status if status >= 0 else 128 - status


def label_of(benchmark: Benchmark) -> str:
    """Names a target or, of several folds, the fold."""
    return benchmark.target_set.rpartition("-")[2] if benchmark.target_set.startswith(FOLDED) else benchmark.target


def error_of(run: Path, benchmark: Benchmark) -> float | None:
    """Reads the test MAE of a run; None if it is not finished."""
    summary = run / "summary.json"
    return json.loads(summary.read_text())["test"][benchmark.target]["mae"] if summary.exists() else None


def _five(value: float | None) -> str:
    """Writes five decimals, or "-" for what is not known."""
    return "-" if value is None or np.isnan(value) else f"{value:.5f}"


@reporting_errors()
def main() -> None:
    """Trains all targets or folds of a benchmark, or every variant for the timing, and prints a table."""
    parser = argparse.ArgumentParser("reproduce.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", choices=("jarvis", "megnet", "oqmd", FOLDED, "timing"), help="the benchmark")
    arguments, flags = parser.parse_known_args()  # the others are for train.py
    name = arguments.name
    timing, variant = name == "timing", os.environ.get("VARIANT") or "default"
    config = "jarvis" if timing else name
    module = importlib.import_module(f"crystalframer_jax.configs.{config}")
    module.get_config(variant)
    variants, benchmarks = (VARIANTS, module.BENCHMARKS[:1]) if timing else ([variant], module.BENCHMARKS)
    runs = {Path("runs", name, v, label_of(b)): (v, b) for v in variants for b in benchmarks}
    trainer, failed = Trainer(), []
    for run, (variant, benchmark) in runs.items():
        print(f"== {run}", flush=True)
        chosen = [f"--config.target_set={benchmark.target_set}", f"--config.targets={benchmark.target}"]
        chosen += [*(["--config.n_epochs=3", "--config.swa_epochs=0"] if timing else ()), *flags]
        status = trainer.train(f"--config=configs/{config}.py:{variant}", f"--workdir={run}", *chosen)
        print()
        if trainer.stopped or status in (130, 143) or (status == 0 and not (run / "summary.json").exists()):
            return print(f"stopped in {run}; the same command continues there")
        if status:
            failed.append(f"  {run} (exit status {status})")
    if timing:
        speeds = {v: [f"{line['crystals_per_s']:,.1f}" for line in read_metrics(run)] for run, (v, _) in runs.items()}
        epochs = max(map(len, speeds.values()))
        header = ["crystals/s", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
        rows = [[v, *speed, *["-"] * (epochs - len(speed))] for v, speed in speeds.items()]
    else:
        header = [f"{name}, {variant}", "unit", "test MAE", "published"]
        rows, unit = [], ""
        errors = [error_of(run, b) for run, (_, b) in runs.items()]
        for (v, b), error in zip(runs.values(), errors, strict=True):
            unit = target_set(b.target_set).target(b.target).unit
            rows.append([label_of(b), unit, _five(error), str(b.published_mae.get(v, "-"))])
        if name == FOLDED:
            known = np.array([np.nan if error is None else error for error in errors])
            rows.append(["mean of the folds", unit, _five(known.mean()), str(module.PUBLISHED_MEAN)])
            rows.append(["standard deviation", unit, _five(known.std(ddof=1)), "-"])
    print(table(header, rows))
    if failed:
        sys.exit("\n".join(["\nfailed:", *failed]))


if __name__ == "__main__":
    main()
