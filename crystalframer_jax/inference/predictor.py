"""Predictor: a trained model, ready to predict structures."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crystalframer_jax.batching.batch import pack
from crystalframer_jax.batching.shapes import BatchShape, shape_for
from crystalframer_jax.batching.table import CrystalTable, make_table
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import BatchParts, ConfigError, ModelConfig, TrainConfig, validate_model
from crystalframer_jax.inference.evaluation import Predictions, frame_draws, groups_by_atoms, predict_rows
from crystalframer_jax.inference.forward import Forward, make_forward, working_precision
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, Tree
from crystalframer_jax.runs.checkpoints import (
    FOLDER,
    MODEL_FIELDS,
    CheckpointError,
    Checkpoints,
    on_this_device,
    read_json,
)
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.files import as_crystals
from crystalframer_jax.structures.neighbors import LatticeBox, neighbor_rows

AVERAGES = {"swa": "swa_epochs", "ema": "ema_decay"}  # averaged weights, and what switches them on
WEIGHTS = ("best", "last", *AVERAGES)


class Predictor:
    """Predicts the targets of a trained model for crystals of any size.

    Attributes:
      targets: name, unit, mean and standard deviation of each target.
      cutoff: radius of the neighbour rows, Å.
      devices: that share the work, all of this process; a few crystals are left to one.
      weights: which weights these are: "best", "last", "swa", "ema", or "given" as arrays.
      step: optimizer step of their checkpoint, 0 if given.
      origin: the same in words.
    """

    def __init__(self, config: TrainConfig, variables: Tree, targets: tuple[TargetStatistics, ...]):
        self.config = config
        self.variables = variables
        self.targets = targets
        self.cutoff = config.cutoff
        self.weights, self.step, self.origin = "given", 0, "given parameters"
        self.parts = config.model.parts
        self.devices = Devices.of_this_process()

    @classmethod
    def load(cls, run_dir: str | Path, weights: str | None = None) -> "Predictor":
        """The model of a run directory, or of one of its checkpoints (RUN/checkpoints/STEP).

        `weights`: "best" (smallest validation loss), "last", "swa" (average over the last epochs) or "ema" (exponential
        moving average). Without it, those that the finished run selected by validation loss, or the best so far.

        Raises CheckpointError if there is no such model.
        """
        workdir, step = Path(run_dir).expanduser(), None
        if workdir.parent.name == FOLDER and workdir.name.isdigit():
            workdir, step = workdir.parent.parent, int(workdir.name)
            if weights == "best":
                raise CheckpointError(
                    f"{run_dir} is one checkpoint: give weights 'last', 'swa' or 'ema', or its run directory"
                )
            weights = weights or "last"
        config = read_config(workdir)
        checkpoints = Checkpoints(workdir)
        try:
            weights = weights or _selected(workdir)
            if weights not in WEIGHTS:
                raise CheckpointError(f"weights={weights!r} do not exist; allowed: {', '.join(WEIGHTS)}")
            step = step if step is not None else checkpoints.best() if weights == "best" else checkpoints.last()
            if step is None and checkpoints.last() is not None:
                raise CheckpointError(
                    f"{workdir} has no validation errors to choose the best weights by; ask for last or swa"
                )
            if step is None:
                raise CheckpointError(f"{workdir} has no checkpoint yet; let the training finish an epoch")
            with working_precision(config):
                model = checkpoints.restore_model(step, _abstract_model(config))
            targets = tuple(TargetStatistics(**target) for target in checkpoints.meta(step)["targets"])
        finally:
            checkpoints.close()
        prefix = f"{weights}_" if weights in AVERAGES else ""
        variables = {name: model[prefix + name] for name in ("params", "batch_stats")}
        if prefix and (not variables["params"] or all_zero(variables["params"])):
            key = AVERAGES[weights]
            raise CheckpointError(
                f"{workdir} has no {weights} weights ({key}={getattr(config, key)}, or not reached yet)"
            )
        if prefix and all_zero(variables["batch_stats"]):
            raise CheckpointError(
                f"{workdir}: the {weights} weights of step {step} have no BatchNorm statistics, which come at the "
                "end of the training; ask for last or best"
            )
        predictor = cls(config, variables | {"calibration": model["calibration"]}, targets)
        predictor.weights, predictor.step = weights, step
        predictor.origin = f"{weights} weights of {workdir}, step {step}"
        return predictor

    def predict(
        self, structures: Iterable[Any] | Any, num_frame_samples: int | None = None, progress: bool = False
    ) -> np.ndarray:
        """Predictions [B, T] in label units (`targets` names T and their units), in the order given.

        `structures`: pymatgen Structures, ASE Atoms, Crystals or paths of structure files, one or a list; a file
        with several structures gives as many rows. `num_frame_samples`: how many draws among equally good frames are
        averaged (1: the first ones in canonical order are taken; None: as configured). Raises CrystalError naming the
        first structure that cannot be used.
        """
        return self.predict_with_spread(structures, num_frame_samples, progress).mean

    def predict_with_spread(
        self, structures: Iterable[Any] | Any, num_frame_samples: int | None = None, progress: bool = False
    ) -> Predictions:
        """As `predict`, with the standard deviation over the draws of frames: mean and spread, both [B, T]."""
        table = table_of(crystals_of(structures), self.cutoff)
        groups, devices = work_for(table, self.devices)
        shown = tqdm(groups, desc="predicting", unit=" batches", disable=not progress)
        return self.predict_table(table, shown, self.parts, num_frame_samples, devices)

    def predict_table(
        self,
        table: CrystalTable,
        groups: Iterable[np.ndarray],
        shapes: Sequence[BatchShape] | BatchParts,
        num_frame_samples: int | None = None,
        devices: Devices | None = None,
    ) -> Predictions:
        """Predictions for groups of rows of a table whose neighbour rows have this predictor's cutoff.

        Each group is shared by all `devices` (default: those of the predictor).
        """
        devices = devices or self.devices
        with working_precision(self.config):
            return predict_rows(
                _forward_of(self.config.model, devices),
                self.variables,
                table,
                groups,
                self.targets,
                shapes,
                self.draws(num_frame_samples),
                devices=devices,
            )

    def draws(self, num_frame_samples: int | None) -> int:
        """How many draws among equally good frames a prediction averages, see `frame_draws`."""
        return frame_draws(self.config, num_frame_samples)

    def spread_over(self, num_frame_samples: int | None = None) -> str:
        """What the spread of predictions is over, such as "16 draws"; empty without draws, where it is 0."""
        draws = self.draws(num_frame_samples)
        return f"{draws} draws" if draws > 1 else ""


def crystals_of(structures: Iterable[Any] | Any) -> list[Crystal]:
    """The crystals of what `Predictor.predict` takes: one structure or path of a file, or several."""
    is_one = isinstance(structures, str | os.PathLike | Crystal) or any(
        hasattr(structures, name)
        for name in ("lattice", "cell", "species_and_occu")  # pymatgen, ASE
    )
    items: Iterable[Any] = [structures] if is_one else structures
    return [crystal for item in items for crystal in as_crystals(item)]


def table_of(crystals: Sequence[Crystal], cutoff: float | LatticeBox) -> CrystalTable:
    """Crystals with their neighbour rows."""
    return make_table(crystals, [neighbor_rows(crystal, cutoff) for crystal in crystals])


def work_for(table: CrystalTable, devices: Devices) -> tuple[list[np.ndarray], Devices]:
    """Groups of crystals for some devices, or for one alone if it can take all crystals at once."""
    groups = groups_by_atoms(table)
    return (groups_by_atoms(table, devices.count), devices) if len(groups) > 1 else (groups, ONE_DEVICE)


@functools.lru_cache(maxsize=8)
def _forward_of(model: ModelConfig, devices: Devices) -> Forward:
    """The forward pass of a model, compiled once for all predictors of the same hyperparameters."""
    return make_forward(CrystalFramer(model), devices)


def read_config(workdir: Path) -> TrainConfig:
    """The configuration that a run was started with."""
    file = workdir / "config.json"
    values = TrainConfig().as_dict() | read_json(file)  # keys that are new since then had their defaults
    try:
        return validate_model(values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def all_zero(tree: Tree) -> bool:
    """Whether there are arrays and nothing but zeros in them."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and not any(np.any(leaf) for leaf in leaves)


def _selected(workdir: Path) -> str:
    """The weights that a finished run selected; the best so far otherwise."""
    file = workdir / "summary.json"
    return read_json(file).get("selected_weights", "best") if file.exists() else "best"


def _abstract_model(config: TrainConfig) -> dict[str, Tree]:
    """Shapes of the model's part of a checkpoint."""
    model, parts = CrystalFramer(config.model), config.model.parts
    table = table_of([Crystal(np.array([1]), np.zeros((1, 3)), 3 * np.eye(3))], 4.0)
    batch = pack(table, np.array([0]), [shape_for(table, np.array([0]), parts)])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jax.tree.map(jnp.asarray, batch)))
    return on_this_device(stored_fields(config, variables))


def stored_fields(config: TrainConfig, variables: Tree) -> dict[str, Tree]:
    """MODEL_FIELDS as a checkpoint of a run with this model has them; averages look like what they average."""
    absent = () if config.ema_decay else ("ema_params", "ema_batch_stats")
    likes = {name: name.removeprefix("swa_").removeprefix("ema_") for name in MODEL_FIELDS}
    return {name: {} if name in absent else variables.get(like, {}) for name, like in likes.items()}
