"""Checkpoints of a run: the newest and the best, written in the background and verified when they are read.

A checkpoint is written in checkpoints/unfinished. Only when its files and their checksums are on the disk does it get
its place, checkpoints/STEP, and only then are older ones deleted. So a folder checkpoints/STEP is complete, and a
process that dies at any moment leaves the checkpoints that were there.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from crystalframer_jax.errors import UserError
from crystalframer_jax.files import FileError, read_json
from crystalframer_jax.parallel.devices import Tree
from crystalframer_jax.runs import checksums
from crystalframer_jax.runs.arrays import read_arrays, write_arrays
from crystalframer_jax.runs.metadata import checked

FOLDER = "checkpoints"
DAMAGED_FOLDER = "damaged_checkpoints"
MODEL_FIELDS: tuple[str, ...] = ("params", "calibration", "batch_stats")  # what prediction needs
MODEL_FIELDS += ("swa_params", "swa_batch_stats", "ema_params", "ema_batch_stats")
META_FILE, LOSS_FILE = "meta/metadata", "metrics/metadata"  # where Orbax keeps such JSON


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, does not fit, or could not be written."""


class Checkpoints:
    """The checkpoints below a run directory, numbered by optimizer step.

    `writable`: for the one process that trains; others only read, also while it trains. Kept are the newest
    `keep_last` and the `keep_best` with the smallest validation loss.
    """

    def __init__(self, workdir: Path, writable: bool = False, keep_best: int = 1, keep_last: int = 2):
        self.workdir, self.folder = workdir, workdir.absolute() / FOLDER
        self.writable, self.keep_best, self.keep_last = writable, keep_best, keep_last
        if not writable and not self.folder.is_dir():
            raise CheckpointError(f"{workdir} has no {FOLDER} folder; give the --workdir of a training run")
        self._unfinished = self.folder / "unfinished"
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        if writable:
            self._tidy()

    # Writing

    def save(self, state: Tree, meta: dict[str, Any], validation_loss: float | None) -> None:
        """Writes a checkpoint in the background; `meta` is plain JSON. The arrays may change at once.

        `validation_loss`: None (or not finite) for a checkpoint that cannot be the best, as one inside an epoch. A
        step that is there already is kept, unless it is damaged or only the new one has this loss.

        Raises CheckpointError if this or the previous checkpoint could not be written.
        """
        self._write(int(state.step), _items(state), meta, validation_loss)

    def save_weights(self, step: int, model: dict[str, Any], meta: dict[str, Any]) -> None:
        """Writes MODEL_FIELDS and meta data without the state of a training, and returns when they are on disk."""
        self._write(step, {"model": model}, meta, None)
        self.wait()

    def wait(self) -> None:
        """Returns when everything is on disk; CheckpointError if the last checkpoint could not be written."""
        if self._pending:
            error = self._pending.exception()  # may be interrupted, and then waited for again
            self._pending = None
            if error:
                raise error

    def close(self) -> None:
        """Finishes writing."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, trees: dict[str, Tree], meta: dict[str, Any], loss: float | None) -> None:
        self.wait()
        loss = float(loss) if loss is not None and np.isfinite(loss) else None
        if self._is_stored(step, loss):
            return
        texts = {META_FILE: json.dumps(meta), LOSS_FILE: json.dumps({"validation_loss": loss, "step": step})}
        copies = jax.tree.map(np.array, trees)  # the caller may change them; Orbax refuses those of several processes
        try:
            self._unfinished.mkdir(exist_ok=True)  # a disk that cannot be written is an error at once
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = self._thread.submit(self._finish, step, copies, texts)

    def _finish(self, step: int, trees: dict[str, Tree], texts: dict[str, str]) -> None:
        """Writes files and checksums, puts the checkpoint in its place, deletes older ones; in the background."""
        folder = self._unfinished / str(step)
        try:
            self._discard_unfinished()
            folder.mkdir(parents=True)
            for name, tree in trees.items():
                write_arrays(folder / name, tree)
            for name, text in texts.items():
                (folder / name).parent.mkdir()
                (folder / name).write_text(text)
            checksums.write(folder)
            self._put_in_place(step)
            for old in self._superseded():
                os.rename(self.path(old), self._unfinished / f"deleted-{old}")  # a reader sees all of it or none
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise self._failure(step, error) from error
        finally:
            self._discard_unfinished()  # gives back the space of one that failed

    def _put_in_place(self, step: int) -> None:
        if self.path(step).exists():
            os.rename(self.path(step), self._unfinished / f"replaced-{step}")
        os.rename(self._unfinished / str(step), self.path(step))
        checksums.sync(self.folder)

    def _superseded(self) -> list[int]:
        """Lists the finished steps that are not to be kept."""
        steps, (losses, damaged) = self._finished(), self._losses()
        kept = {*steps[-self.keep_last :], *list(losses)[: self.keep_best], *damaged}
        return [step for step in steps if step not in kept]

    def _is_stored(self, step: int, loss: float | None) -> bool:
        """Tells whether a step is there with this loss; if it is damaged, it is set aside."""
        if not self.path(step).exists():
            return False
        if wrong := self._problem(step):
            self._set_aside({step: wrong}, "it is written again")
            return False
        return loss is None or self._loss(step) == loss

    def _tidy(self) -> None:
        """Makes the folder, and clears away what a killed process left; a checkpoint with checksums is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for step in steps_in(self._unfinished):
            if checksums.problem(self._unfinished / str(step)) is None:
                self._put_in_place(step)
        self._discard_unfinished()
        for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover)

    def _discard_unfinished(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)  # what cannot be deleted now is with the next save

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        intact = self._newest_intact()
        kept = "there is none before it" if intact is None else f"the one of step {intact} is intact"
        return CheckpointError(
            f"checkpoint {self.path(step)} could not be written: {_reason(error)}; {kept}; make space or mend what "
            "it says, and run the same command again: it goes on from the last intact checkpoint"
        )

    # Reading

    def last(self) -> int | None:
        """Gives the newest finished step, if any; a reader gets CheckpointError if there are only unfinished ones."""
        steps = steps_in(self.folder)  # read once: a training may put another in their place meanwhile
        finished = self._finished(steps)
        if steps and not finished and not self.writable:
            self._verify(steps[-1])
        return max(finished, default=None)

    def best(self) -> int | None:
        """Gives the step of the checkpoint with the smallest validation loss; None if none has one.

        In the process that trains, it is verified; damaged ones are set aside with a warning. A reader gets
        CheckpointError if a loss cannot be read.
        """
        self.wait()
        if self.last() is None:
            return None
        losses, damaged = self._losses()
        if not self.writable:
            for step in damaged:
                self._verify(step)
            return next(iter(losses), None)
        best, wrong = self._first_whole(losses)
        then = "there is no other best" if best is None else f"the best checkpoint is that of step {best}"
        self._set_aside(damaged | wrong, then)
        return best

    def losses(self) -> list[float]:
        """Gives the validation losses of the checkpoints that are there, ascending."""
        return list(self._losses()[0].values())

    def restore_latest(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """Reads state and meta data of the newest checkpoint that is whole, for a training that goes on; None if none.

        `like`: structure, shapes and placement. Newer checkpoints that are damaged are moved to damaged_checkpoints,
        with a line on stderr. Raises CheckpointError if none is whole, or if it is of another model than `like`.
        """
        self.wait()
        step, damaged = self._first_whole(reversed(steps_in(self.folder)))
        if step is not None:
            self._set_aside(damaged, f"the training goes on from step {step}")
            return self.restore_state(step, like)
        if damaged:
            what = "; ".join(f"{step}: {wrong}" for step, wrong in damaged.items())
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be used: {what}; put back a copy, or remove them to "
                "train from the start"
            )
        aside = self.workdir / DAMAGED_FOLDER
        if aside.is_dir() and any(aside.iterdir()):
            raise CheckpointError(
                f"all checkpoints of {self.workdir} are in {aside}; remove it to train from the start"
            )
        return None

    def restore_state(self, step: int, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """Reads the training state of a step, with the structure and placement of `like`, and its meta data."""
        with self._reading(step) as folder:
            if not (folder / "training").is_dir():
                raise CheckpointError(
                    f"{folder} has weights only, no training state; train from them with pretrained_model"
                )
            items = {name: read_arrays(folder / name, tree) for name, tree in _items(like).items()}
            state = type(like)(**items["model"], **items["training"])
            if int(state.step) != step:
                raise CheckpointError(f"{folder} is damaged: its state is that of step {int(state.step)}")
            return state, _meta(folder)

    def restore_model(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads MODEL_FIELDS of a step; `like` gives their shapes."""
        with self._reading(step) as folder:
            return read_arrays(folder / "model", like)

    def meta(self, step: int) -> dict[str, Any]:
        """Reads epoch, target statistics and validation errors stored with a step."""
        with self._reading(step) as folder:
            return _meta(folder)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        """Gives the folder of a step, after verifying it.

        Raises CheckpointError, naming the damaged file, what does not fit, or that the step is no longer there.
        """
        self.wait()
        self._verify(step)
        try:
            yield self.path(step)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            self._verify(step)  # a training may have replaced it since
            if isinstance(error, CheckpointError):
                raise
            if isinstance(error, FileError):
                raise CheckpointError(str(error)) from error
            raise CheckpointError(
                f"{self.path(step)} is of another model than config.json ({_reason(error)}); restore that file"
            ) from error

    def _verify(self, step: int) -> None:
        """Raises CheckpointError unless all files of a step are as they were written."""
        wrong = self._problem(step)
        if not self.path(step).is_dir():
            steps = ", ".join(map(str, self._finished())) or "none"
            raise CheckpointError(
                f"{self.path(step)} is not there (any more; a running training replaces its checkpoints): try again, "
                f"or another step (there are: {steps})"
            )
        if wrong:
            other = self._newest_intact(but=step)
            remedy = "there is no other checkpoint" if other is None else f"use another checkpoint: {self.path(other)}"
            raise CheckpointError(f"{self.path(step)} cannot be used: {wrong}; {remedy}")

    def _newest_intact(self, but: int | None = None) -> int | None:
        return self._first_whole(step for step in reversed(self._finished()) if step != but)[0]

    def _first_whole(self, steps: Iterable[int]) -> tuple[int | None, dict[int, str]]:
        """Finds the first of the steps that is whole, and what is wrong with those before it."""
        damaged: dict[int, str] = {}
        for step in steps:
            wrong = self._problem(step)
            if wrong is None:
                return step, damaged
            damaged[step] = wrong
        return None, damaged

    def _losses(self) -> tuple[dict[int, float], dict[int, str]]:
        """Reads the validation losses of finished steps that have one, and what is wrong where it cannot be read.

        The smallest loss comes first; of equal ones the earliest.
        """
        losses, damaged = {}, {}
        for step in self._finished():
            wrong = self._problem(step, LOSS_FILE)
            try:
                loss = None if wrong else self._loss(step)
            except FileError as error:  # deleted since
                loss, wrong = None, str(error)
            if wrong:
                damaged[step] = wrong
            elif loss is not None:
                losses[step] = loss
        return dict(sorted(losses.items(), key=lambda item: (item[1], item[0]))), damaged

    def _problem(self, step: int, under: str = "") -> str | None:
        """Tells what is wrong with a step, as `checksums.problem` does; also if its folder had another name."""
        if wrong := checksums.problem(self.path(step), under):
            return wrong
        try:
            stored = self._scores(step).get("step", step)  # of old ones, the step is not known
        except FileError as error:
            return str(error)
        return None if stored == step else f"it is the checkpoint of step {stored}; give it that name back"

    def _scores(self, step: int) -> dict[str, Any]:
        file = self.path(step) / LOSS_FILE
        return checked(read_json(file), file, "validation_loss")

    def _loss(self, step: int) -> float | None:
        return self._scores(step)["validation_loss"]

    def _set_aside(self, damaged: dict[int, str], then: str) -> None:
        """Moves damaged steps out of the way, with a line each on stderr."""
        for step, wrong in damaged.items():
            aside = self.workdir / DAMAGED_FOLDER
            aside.mkdir(exist_ok=True)
            names = (str(step) if n == 1 else f"{step}-{n}" for n in range(1, sys.maxsize))
            target = next(aside / name for name in names if not (aside / name).exists())
            shutil.move(self.path(step), target)  # also to another disk
            line = f"warning: checkpoint {self.path(step)} cannot be used: {wrong}; moved to {target}; {then}"
            tqdm.write(line, file=sys.stderr)

    def _finished(self, steps: list[int] | None = None) -> list[int]:
        steps = steps_in(self.folder) if steps is None else steps
        return [step for step in steps if (self.path(step) / checksums.NAME).is_file()]

    def path(self, step: int) -> Path:
        """Gives the folder of a step."""
        return self.folder / str(step)


def on_this_device(shapes: Any) -> Any:
    """Gives shapes a placement, as restoring asks for."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def newest_meta(workdir: Path) -> dict[str, Any]:
    """Reads the meta data of the newest checkpoint that still has them as they were written; empty if none has."""
    for step in reversed(steps_in(workdir / FOLDER)):
        folder = workdir / FOLDER / str(step)
        if checksums.problem(folder, META_FILE) is None:
            with contextlib.suppress(FileError):
                return checked(_meta(folder), folder)
    return {}


def _meta(folder: Path) -> dict[str, Any]:
    return read_json(folder / META_FILE)


def _items(state: Tree) -> dict[str, dict[str, Tree]]:
    """Parts a state into the two items of a checkpoint: what prediction needs, and what only the training needs."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    model = {name: value for name, value in fields.items() if name in MODEL_FIELDS}
    return {"model": model, "training": {name: value for name, value in fields.items() if name not in model}}


def steps_in(folder: Path) -> list[int]:
    """Lists the steps that have a folder there, in ascending order; also one that is deleted while they are listed."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:  # not glob, which takes a folder it may not list for empty
        names = [entry.name for entry in entries if entry.is_dir()]  # as the list says, without another look
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _reason(error: Exception) -> str:
    """Finds the words of the operating system in an error, wherever they are; its beginning otherwise."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
    known = (os.strerror(number) for number in numbers)
    text = " ".join(str(error).split()) or type(error).__name__
    return next((words for words in known if words in text), text[:250])
