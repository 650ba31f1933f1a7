"""Writes about a run: progress on the terminal, metrics.jsonl, TensorBoard events, Weights & Biases."""

import contextlib
import functools
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.batching.device_table import Chunk
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import FileError, append_line, json_text, parse_json, read_bytes, replacing
from crystalframer_jax.parallel.processes import is_first_process
from crystalframer_jax.reporting.metrics import metrics_for
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_directory import warn
from crystalframer_jax.text import escaped

LARGEST_LOG = 2**30  # bytes of metrics.jsonl: millions of epochs


class MetricsLog:
    """Writes a JSON line, TensorBoard scalars and, if asked for, a Weights & Biases record per epoch.

    A resumed run continues after the epochs it keeps. TensorBoard and Weights & Biases show what metrics.jsonl has: if
    they fail, the training goes on without them, with a line on stderr.
    """

    def __init__(self, workdir: Path, first_epoch: int, first_step: int, wandb_project: str = "", config: Any = None):
        self.file = workdir / "metrics.jsonl"
        lines = _lines_of(self.file)
        if self.file.exists():
            with replacing(self.file) as temporary:  # a line that cannot be read is kept as it is
                kept = [line for line, content in lines if content is None or content["epoch"] < first_epoch]
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self.wandb = _start_wandb(workdir, wandb_project, config) if wandb_project else None
        self.writer: Any = None
        with self._optional("TensorBoard"):
            from tensorboardX import SummaryWriter  # imports PyTorch where that is installed

            folder = workdir / "tensorboard"  # a queue without limit: it does not wait for a thread that has failed
            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1, max_queue=0, write_to_disk=True)

    def write(self, metrics: dict[str, Any]) -> None:
        """Appends the metrics of an epoch: numbers, or dictionaries of numbers."""
        append_line(self.file, json_text(metrics).rstrip("\n"), sync=True)  # as safe as the checkpoint that follows
        flat: dict[str, Any] = {}
        for name, value in metrics.items():
            flat |= {f"{name}/{part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
        if self.writer:
            with self._optional("TensorBoard"):
                if not self.writer.file_writer.event_writer._worker.is_alive():
                    raise OSError("its thread has ended")
                for name, number in flat.items():
                    self.writer.add_scalar(name, number, metrics["step"])
                self.writer.flush()
        if self.wandb:
            with self._optional("Weights & Biases"):
                self.wandb.log(flat, step=metrics["step"])

    def close(self) -> None:
        """Finishes writing."""
        if self.writer:
            with self._optional("TensorBoard"):
                self.writer.close()
        if self.wandb:
            with self._optional("Weights & Biases"):
                self.wandb.finish(exit_code=1 if sys.exc_info()[0] else 0)

    @contextlib.contextmanager
    def _optional(self, name: str) -> Iterator[None]:
        """Makes a failure of what only shows the metrics a warning, and goes on without it."""
        try:
            yield
        except Exception as error:  # of many kinds: disk, network
            if name == "TensorBoard":
                self.writer = None
            else:
                self.wandb = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            warn(f"{self.file.parent} is no longer shown by {name} ({reason}); metrics.jsonl has all epochs")


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
        with replacing(file) as temporary:
            temporary.write_text(secrets.token_hex(6))
    try:
        id = read_bytes(file, 1000).decode()
        return wandb.init(project=project, name=str(workdir), id=id, resume="allow", dir=str(workdir), config=config)
    except Exception as error:  # of many kinds: network, login, project
        raise UserError(f"--wandb={project}: {' '.join(str(error).split())}; leave it out to train without") from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the metrics of every epoch of a run; the torn last line of a killed one is dropped.

    A line on stderr tells of any other that is damaged and left out.
    """
    return [content for _, content in _lines_of(workdir / "metrics.jsonl") if content]


def _lines_of(file: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Reads the whole lines of metrics.jsonl, and what each says; None for one that is damaged."""
    lines: list[tuple[bytes, dict[str, Any] | None]] = []
    for number, line in enumerate(read_bytes(file, LARGEST_LOG).split(b"\n")[:-1] if file.exists() else [], 1):
        content, what = None, f"{file}, line {number},"
        try:
            content = checked(parse_json(line, what), what, "epoch")
        except FileError as error:
            warn(f"{error}; it is left out")
        lines.append((line, content))
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
        judged = metrics_for(tuple(statistics))
        found = metrics[f"val_{judged.followed}"]
        errors = ", ".join(f"{s.name} {found[s.name]:.4f} {s.unit}".rstrip() for s in statistics)
        followed = f"val {judged.titles[judged.followed]} {escaped(errors)}"
        number = f"{metrics['epoch'] + 1:>{len(str(self._n_epochs))}}/{self._n_epochs}"
        waited = f"  waited {metrics['waiting_share']:.0%} for data" if metrics["waiting_share"] >= 0.01 else ""
        say(
            f"epoch {number}  loss {metrics['loss']:.4f}  {followed}  lr {metrics['lr']:.2e}  "
            f"{metrics['crystals_per_s']:.0f} crystals/s{waited}"
        )


def say(text: str) -> None:
    """Prints a line above a progress bar, at once, also into a file; of several processes the first does."""
    if is_first_process():
        tqdm.write(text)
        sys.stdout.flush()


def announced(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function of (weights or state, batch or chunk, ...) which says when it needs a new program."""
    known: set[Any] = set()

    def call(first: Any, work: Batch | Chunk, *rest: Any, **options: Any) -> Any:
        batch, several = (work.batches, "chunks of ") if isinstance(work, Chunk) else (work, "")
        shape = batch.species.shape, batch.rows.center.shape
        kind = shape, tuple(x is None for x in rest), tuple(options.items())
        if kind not in known:
            known.add(kind)
            atoms, edges = shape[0][-1], shape[1][-1]
            say(f"compiling {what} for {several}batches of up to {atoms:,} atoms and {edges:,} neighbors ...")
        return function(first, work, *rest, **options)

    return call
