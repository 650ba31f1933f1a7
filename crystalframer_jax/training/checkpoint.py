"""Checkpoints of a run (Orbax): the last one and the best one, written in the background."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from crystalframer_jax.errors import UserError
from crystalframer_jax.training.state import TrainState

FOLDER = "checkpoints"
MODEL_FIELDS = ("params", "calibration", "batch_stats", "swa_params", "swa_batch_stats")  # what prediction needs


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing or does not fit."""


class Checkpoints:
    """The checkpoints below a run directory, numbered by optimizer step."""

    def __init__(self, workdir: Path, writable: bool = False):
        folder = workdir.absolute() / FOLDER
        if not writable and not folder.is_dir():
            raise CheckpointError(f"{workdir} has no {FOLDER} folder; give the --workdir of a training run")
        best = policies.BestN(get_metric_fn=_metric, reverse=True, n=1)  # reverse: the smallest
        self.workdir = workdir
        with _quiet():
            options = ocp.CheckpointManagerOptions(
                best_fn=_metric,
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
                create=writable,
                read_only=not writable,
                enable_async_checkpointing=writable,
            )
            self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, state: TrainState, meta: dict[str, Any], validation_error: float) -> None:
        """Write a checkpoint in the background; `meta` is plain JSON."""
        model = {name: getattr(state, name) for name in MODEL_FIELDS}
        rest = {"step": state.step, "opt_state": state.opt_state, "swa_steps": state.swa_steps}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(meta)
        )
        self.manager.save(int(state.step), args=items, metrics={"validation_error": validation_error})

    def save_weights(self, step: int, model: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write MODEL_FIELDS and meta data without the state of a training, and return when they are on disk."""
        items = ocp.args.Composite(model=ocp.args.StandardSave(model), meta=ocp.args.JsonSave(meta))
        with _quiet():  # Orbax warns that there is no validation error
            self.manager.save(step, args=items)
            self.wait()

    def last(self) -> int | None:
        """Step of the newest checkpoint."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the smallest validation error."""
        return self.manager.best_step()

    def restore_state(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The training state of a step, with the structure and placement of `like`, and its meta data."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        model = {name: getattr(abstract, name) for name in MODEL_FIELDS}
        rest = {"step": abstract.step, "opt_state": abstract.opt_state, "swa_steps": abstract.swa_steps}
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(model),
            training=ocp.args.StandardRestore(rest),
            meta=ocp.args.JsonRestore(),
        )
        restored = self._restore(step, items)
        return TrainState(**restored["model"], **restored["training"]), restored["meta"]

    def restore_model(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """MODEL_FIELDS of a step; `like` gives their shapes."""
        return self._restore(step, ocp.args.Composite(model=ocp.args.StandardRestore(like)))["model"]

    def meta(self, step: int) -> dict[str, Any]:
        """Epoch, target statistics and validation errors stored with a step."""
        return self._restore(step, ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _restore(self, step: int, items: ocp.args.Composite) -> Any:
        try:
            return self.manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
            folder = self.workdir / FOLDER / str(step)
            reason = str(error).split("\n")[0][:200]
            raise CheckpointError(
                f"{folder} is missing, damaged or of another model than config.json ({reason}); use another checkpoint"
            ) from error

    def wait(self) -> None:
        """Return when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self.manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from warning of what is meant so."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def on_this_device(shapes: Any) -> Any:
    """Shapes with a placement, as restoring asks for."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _metric(metrics: dict[str, float]) -> float:
    return metrics["validation_error"]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a run; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged; is {file.parent} a run directory?") from error
