"""Predictor: a trained model, ready to predict structures."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from crystalframer_jax.batch import BatchShape, pack, shape_for
from crystalframer_jax.config import BatchParts, ConfigError, model_config, neighbor_cutoff
from crystalframer_jax.configs import default
from crystalframer_jax.crystal import Crystal
from crystalframer_jax.data.table import CrystalTable, make_table
from crystalframer_jax.inference.evaluation import Predictions, groups_by_atoms, predict_rows
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.neighbors import neighbor_rows
from crystalframer_jax.structure_files import as_crystals
from crystalframer_jax.training.checkpoint import (
    FOLDER,
    MODEL_FIELDS,
    CheckpointError,
    Checkpoints,
    on_this_device,
    read_json,
)
from crystalframer_jax.training.state import TargetStatistics, Tree
from crystalframer_jax.training.step import make_forward, working_precision

WEIGHTS = ("best", "last", "swa")


class Predictor:
    """Predicts the targets of a trained model for crystals of any size.

    Attributes:
      targets: name, unit, mean and standard deviation of each target.
      cutoff: radius of the neighbour rows, Å.
      weights: which weights these are: "best", "last", "swa", or "given" as arrays.
      step: optimizer step of their checkpoint, 0 if given.
      origin: the same in words.
    """

    def __init__(self, config: ConfigDict, variables: Tree, targets: tuple[TargetStatistics, ...]):
        self.config = config
        self.variables = variables
        self.targets = targets
        self.cutoff = neighbor_cutoff(config)
        self.weights, self.step, self.origin = "given", 0, "given parameters"
        model = model_config(config)
        self.parts, self.uses_frames = model.parts, model.uses_frames
        self.forward = make_forward(CrystalFramer(model))

    @classmethod
    def load(cls, run_dir: str | Path, weights: str | None = None) -> "Predictor":
        """The model of a run directory, or of one of its checkpoints (RUN/checkpoints/STEP).

        `weights`: "best" (smallest validation error), "last" or "swa" (average over the last epochs). Without it,
        those that the finished run selected by validation error, or the best so far.

        Raises CheckpointError if there is no such model.
        """
        workdir, step = Path(run_dir).expanduser(), None
        if workdir.parent.name == FOLDER and workdir.name.isdigit():
            workdir, step = workdir.parent.parent, int(workdir.name)
            if weights == "best":
                raise CheckpointError(
                    f"{run_dir} is one checkpoint: give weights 'last' or 'swa', or its run directory"
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
        if weights == "swa" and all_zero(model["swa_params"]):
            raise CheckpointError(f"{workdir} has no averaged weights (swa_epochs=0, or not reached yet)")
        if weights == "swa" and all_zero(model["swa_batch_stats"]):
            raise CheckpointError(
                f"{workdir}: the averaged weights of step {step} have no BatchNorm statistics, which come at the "
                "end of the training; ask for last or best"
            )
        prefix = "swa_" if weights == "swa" else ""
        variables = {name: model[prefix + name] for name in ("params", "batch_stats")}
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
        is_one = isinstance(structures, str | os.PathLike | Crystal) or any(
            hasattr(structures, name)
            for name in ("lattice", "cell", "species_and_occu")  # pymatgen, ASE
        )
        items: Iterable[Any] = [structures] if is_one else structures
        crystals: list[Crystal] = [crystal for item in items for crystal in as_crystals(item)]
        table = make_table(crystals, [neighbor_rows(crystal, self.cutoff) for crystal in crystals])
        groups = tqdm(groups_by_atoms(table), desc="predicting", unit=" batches", disable=not progress)
        return self.predict_table(table, groups, self.parts, num_frame_samples)

    def predict_table(
        self,
        table: CrystalTable,
        groups: Iterable[np.ndarray],
        shapes: Sequence[BatchShape] | BatchParts,
        num_frame_samples: int | None = None,
    ) -> Predictions:
        """Predictions for groups of rows of a table whose neighbour rows have this predictor's cutoff."""
        with working_precision(self.config):
            return predict_rows(
                self.forward, self.variables, table, groups, self.targets, shapes, self.draws(num_frame_samples)
            )

    def draws(self, num_frame_samples: int | None) -> int:
        """How many draws among equally good frames a prediction averages: as asked for, or as configured.

        1 for models without frames.
        """
        samples = self.config.num_frame_samples if num_frame_samples is None else num_frame_samples
        if samples < 1:
            raise ConfigError(f"num_frame_samples={samples} must be at least 1")
        return samples if self.uses_frames else 1


def read_config(workdir: Path) -> ConfigDict:
    """The configuration that a run was started with."""
    config = default.get_config()
    for key, value in read_json(workdir / "config.json").items():
        if key not in config:
            raise CheckpointError(f"{workdir / 'config.json'}: unknown key {key!r}")
        try:
            config[key] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise CheckpointError(f"{workdir / 'config.json'}: {key}={value!r} is of the wrong type") from error
    return config


def all_zero(tree: Tree) -> bool:
    """Whether there are arrays and nothing but zeros in them."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and not any(np.any(leaf) for leaf in leaves)


def _selected(workdir: Path) -> str:
    """The weights that a finished run selected; the best so far otherwise."""
    file = workdir / "summary.json"
    return read_json(file).get("selected_weights", "best") if file.exists() else "best"


def _abstract_model(config: ConfigDict) -> dict[str, Tree]:
    """Shapes of the model's part of a checkpoint."""
    model, parts = CrystalFramer(model_config(config)), model_config(config).parts
    atom = Crystal(np.array([1]), np.zeros((1, 3)), 3 * np.eye(3))
    table = make_table([atom], [neighbor_rows(atom, 4.0)])
    batch = pack(table, np.array([0]), [shape_for(table, np.array([0]), parts)])
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jax.tree.map(jnp.asarray, batch)))
    fields = {name: variables.get(name.removeprefix("swa_"), {}) for name in MODEL_FIELDS}
    return on_this_device(fields)
