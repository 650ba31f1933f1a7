"""Writes about a run: progress on the terminal, metrics.jsonl, TensorBoard events, Weights & Biases."""

import contextlib
import functools
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import json_text, replacing
from crystalframer_jax.parallel.processes import is_first_process


class MetricsLog:
    """Writes a JSON line, TensorBoard scalars and, if asked for, a Weights & Biases record per epoch.

    A resumed run continues after the epochs it keeps.
    """

    def __init__(self, workdir: Path, first_epoch: int, first_step: int, wandb_project: str = "", config: Any = None):
        from tensorboardX import SummaryWriter  # imports PyTorch where that is installed

        self.file = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["epoch"] < first_epoch]
        if self.file.exists():
            with replacing(self.file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1, write_to_disk=True)
        self.wandb = _start_wandb(workdir, wandb_project, config) if wandb_project else None

    def write(self, metrics: dict[str, Any]) -> None:
        """Appends the metrics of an epoch: numbers, or dictionaries of numbers."""
        with self.file.open("a") as stream:
            stream.write(json_text(metrics))
            stream.flush()
            os.fsync(stream.fileno())  # as safe as the checkpoint that follows
        flat: dict[str, Any] = {}
        for name, value in metrics.items():
            flat |= {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        for name, number in flat.items():
            self.writer.add_scalar(name, number, metrics["step"])
        self.writer.flush()
        if self.wandb:
            self.wandb.log(flat, step=metrics["step"])

    def close(self) -> None:
        """Finishes writing."""
        self.writer.close()
        if self.wandb:
            self.wandb.finish(exit_code=1 if sys.exc_info()[0] else 0)


def _start_wandb(workdir: Path, project: str, config: Any) -> Any:
    """Starts the Weights & Biases run of a run directory, or continues it."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "--wandb needs the package wandb: pip install 'crystalframer-jax[wandb]', or leave it out"
        ) from error
    file = workdir / "wandb_id.txt"
    if not file.exists():
        file.write_text(secrets.token_hex(6))
    try:
        return wandb.init(
            project=project, name=str(workdir), id=file.read_text(), resume="allow", dir=str(workdir), config=config
        )
    except Exception as error:  # of many kinds: network, login, project
        raise UserError(f"--wandb={project}: {' '.join(str(error).split())}; leave it out to train without") from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the metrics of every epoch of a run; the torn last line of a killed one is dropped."""
    file, lines = workdir / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Logbook(contextlib.AbstractContextManager):
    """Writes and shows a training epoch by epoch: metrics, a line for each, progress bars.

    The bars are silent where the output is no terminal, and in all processes but the first.
    """

    def __init__(
        self, workdir: Path, batches: TrainingBatches, first_epoch: int, wandb_project: str = "", config: Any = None
    ):
        """`config` is told to Weights & Biases."""
        self._n_epochs, self._batch_size, self._metrics = batches.n_epochs, batches.batch_size, None
        if is_first_process():
            first_step = first_epoch * batches.steps_per_epoch
            self._metrics = MetricsLog(workdir, first_epoch, first_step, wandb_project, config)
        bar = functools.partial(tqdm, dynamic_ncols=True, disable=None if is_first_process() else True)
        self._epochs = bar(total=batches.n_epochs, initial=first_epoch, desc="training", unit="epoch")
        crystals = batches.steps_per_epoch * batches.batch_size
        self._crystals = bar(total=crystals, unit=" crystals", unit_scale=True, position=1, leave=False)

    def __exit__(self, *_: object) -> None:
        self._crystals.close()
        self._epochs.close()
        if self._metrics:
            self._metrics.close()

    def start_epoch(self, epoch: int, steps_done: int) -> None:
        """Sets the bar of an epoch (counted from 0) to the steps that are done already."""
        self._crystals.reset()
        self._crystals.set_description(f"epoch {epoch + 1}", refresh=False)
        self.advance(steps_done, None)

    def advance(self, steps_done: int, loss: float | None) -> None:
        """Moves the bar of the epoch to the steps that are done now; `loss` is that of one of the last ones."""
        if loss is not None:
            self._crystals.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._crystals.update(steps_done * self._batch_size - self._crystals.n)

    def write(self, metrics: dict[str, Any]) -> None:
        """Writes the metrics of an epoch, before the checkpoint that follows."""
        if self._metrics:
            self._metrics.write(metrics)

    def end_epoch(self, metrics: dict[str, Any], statistics: Sequence[TargetStatistics]) -> None:
        """Prints the metrics of an epoch in a line, when all is saved."""
        self._epochs.update()
        errors = ", ".join(f"{s.name} {metrics['val_mae'][s.name]:.4f} {s.unit}" for s in statistics)
        number = f"{metrics['epoch'] + 1:>{len(str(self._n_epochs))}}/{self._n_epochs}"
        waited = f"  waited {metrics['waiting_share']:.0%} for data" if metrics["waiting_share"] >= 0.01 else ""
        say(
            f"epoch {number}  loss {metrics['loss']:.4f}  val MAE {errors}  lr {metrics['lr']:.2e}  "
            f"{metrics['crystals_per_s']:.0f} crystals/s{waited}"
        )


def say(text: str) -> None:
    """Prints a line above a progress bar, at once, also into a file; of several processes the first does."""
    if is_first_process():
        tqdm.write(text)
        sys.stdout.flush()
