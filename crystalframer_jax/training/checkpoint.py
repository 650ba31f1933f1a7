"""Checkpoints of a run (Orbax): the last one and the best one, written in the background."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from crystalframer_jax.errors import UserError
from crystalframer_jax.training.state import TrainState

FOLDER = "checkpoints"
MODEL_FIELDS = ("params", "calibration", "swa_params")  # what prediction needs


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing or does not fit."""


class Checkpoints:
    """The checkpoints below a run directory, numbered by optimizer step."""

    def __init__(self, workdir: Path, create: bool = False):
        folder = workdir.absolute() / FOLDER
        if not create and not folder.is_dir():
            raise CheckpointError(f"{workdir} has no {FOLDER} folder; give the --workdir of a training run")
        best = policies.BestN(get_metric_fn=_metric, reverse=True, n=1)  # reverse: the smallest
        options = ocp.CheckpointManagerOptions(
            best_fn=_metric,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            create=create,
            enable_async_checkpointing=True,
        )
        self.workdir = workdir
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, state: TrainState, meta: dict[str, Any], validation_error: float) -> None:
        """Write a checkpoint in the background; `meta` is plain JSON."""
        model = {name: getattr(state, name) for name in MODEL_FIELDS}
        rest = {"step": state.step, "opt_state": state.opt_state, "swa_steps": state.swa_steps}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(meta)
        )
        self.manager.save(int(state.step), args=items, metrics={"validation_error": validation_error})

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
        restored = self.manager.restore(step, args=items)
        return TrainState(**restored["model"], **restored["training"]), restored["meta"]

    def restore_model(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """params, calibration and swa_params of a step; `like` gives their shapes."""
        restored = self.manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(like)))
        return restored["model"]

    def meta(self, step: int) -> dict[str, Any]:
        """Epoch, target statistics and validation errors stored with a step."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def wait(self) -> None:
        """Return when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and let go of the folder."""
        self.manager.close()


def _metric(metrics: dict[str, float]) -> float:
    return metrics["validation_error"]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a run; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged; is {file.parent} a run directory?") from error
