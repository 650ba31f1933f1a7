"""Predictor: a trained model, ready to predict structures."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from crystalframer_jax.batching.batch import pack
from crystalframer_jax.batching.coverage import Coverage
from crystalframer_jax.batching.shapes import BatchShape, request_shapes
from crystalframer_jax.batching.table import CrystalTable, table_of
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import BatchParts, ConfigError, ModelConfig, TrainConfig
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.inference.compilation import keep_compiled_programs
from crystalframer_jax.inference.embedding import Vectors, vectors_of
from crystalframer_jax.inference.evaluation import Predictions, frame_draws, groups_by_atoms, groups_of, predict_rows
from crystalframer_jax.inference.forward import Forward, make_forward, working_precision
from crystalframer_jax.inference.given import crystals_of, predict_usable
from crystalframer_jax.inference.shipped import is_model_name, read_model
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.cores import use_cores
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, Tree
from crystalframer_jax.runs.checkpoints import FOLDER, MODEL_FIELDS, CheckpointError, Checkpoints, on_this_device
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_directory import CONFIG_FILE, read_config, read_summary, warn
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.text import brief

AVERAGES = {"swa": "swa_epochs", "ema": "ema_decay"}  # averaged weights, and what switches them on
WEIGHTS = ("best", "last", *AVERAGES)
PRECISIONS = ("float32", "float64")  # to predict with


class Predictor:
    """Predicts the targets of a trained model for crystals of any size.

    Attributes:
      targets: name, unit, mean and standard deviation of each target.
      cutoff: radius of the neighbor rows, Å.
      devices: that share the work, all of this process; a few crystals are left to one.
      weights: which weights these are: "best", "last", "swa", "ema", or "given" as arrays.
      step: optimizer step of their checkpoint, 0 if given.
      origin: the same in words.
      data_digest: of the data that it was trained on; empty if that is not told.
      coverage: what these data held; None if that is not told.
      name: of a model of the package; empty for others.
      card: what there is to know about it, text.
      precision: that it computes with. Models of float32 predict in float64 on a CPU: how a crystal is written down
        then makes no difference, and reading files takes longer than predicting all the same.
      model: hyperparameters of the model, of this precision.
    """

    name, card = "", ""

    def __init__(
        self,
        config: TrainConfig,
        variables: Tree,
        targets: tuple[TargetStatistics, ...],
        weights: str = "given",
        step: int = 0,
        origin: str = "given parameters",
        data_digest: str = "",
        coverage: Coverage | None = None,
        precision: str | None = None,
    ):
        """Raises ConfigError for a precision that is none of PRECISIONS."""
        self.config, self.variables, self.targets = config, variables, targets
        self.weights, self.step, self.origin, self.data_digest = weights, step, origin, data_digest
        self.coverage, self.cutoff = coverage, config.cutoff
        self.precision = _precision(config.precision, precision)
        self.model = dataclasses.replace(config.model, precision=self.precision)
        self.parts = self.model.parts
        self.devices = Devices.of_this_process()
        keep_compiled_programs()

    @classmethod
    def load(cls, run_dir: str | Path, weights: str | None = None, precision: str | None = None) -> "Predictor":
        """Loads the model of a run directory, of one of its checkpoints (RUN/checkpoints/STEP), or of the package.

        Models of the package are asked for by name, see `shipped.model_names`; a directory of that name comes first.

        `weights`: "best" (smallest validation loss), "last", "swa" (average over the last epochs) or "ema" (exponential
        moving average). Without it, those that the finished run selected by validation loss, or the best so far.
        `precision` to compute with: one of PRECISIONS; without it float64 on a CPU, on a GPU that of the training.

        Raises CheckpointError if there is no such model, ConfigError for an unknown precision.
        """
        use_cores()
        if is_model_name(run_dir):
            if weights:
                raise CheckpointError(f"{run_dir} has one set of weights; leave weights={weights!r} out")
            return cls._of_package(str(run_dir), precision)
        workdir, step = run_and_step(run_dir)
        if step is not None and weights == "best":
            raise CheckpointError(
                f"{run_dir} is one checkpoint: give weights 'last', 'swa' or 'ema', or its run directory"
            )
        checkpoints, summary = Checkpoints(workdir), read_summary(workdir)
        weights = weights or ("last" if step is not None else summary.get("selected_weights", "best"))
        if weights not in WEIGHTS:
            raise CheckpointError(f"weights={brief(weights)} do not exist; allowed: {', '.join(WEIGHTS)}")
        if step is None:
            step = _step_with(weights, checkpoints)
        meta = checked(checkpoints.meta(step), checkpoints.path(step), "targets")
        config = _with_draws(read_config(workdir, meta), workdir, meta, summary)
        if tuple(target["name"] for target in meta["targets"]) != config.targets:
            raise CheckpointError(f"{checkpoints.path(step)} has no statistics of the targets {config.targets}")
        with working_precision(config):
            fields = checkpoints.restore_model(step, _abstract_model(config))
        _check_average(weights, fields, config, workdir, step)
        origin = f"{weights} weights of {workdir}, step {step}"
        return cls._as_told(config, variables_in(fields, weights), meta, weights, step, origin, precision)

    @classmethod
    def _of_package(cls, name: str, precision: str | None) -> "Predictor":
        """Loads a model that comes with the package."""
        config, variables, meta, card, _ = read_model(name)
        expected = jax.tree.map(lambda x: x.shape, {k: v for k, v in _abstract_model(config).items() if k in variables})
        if jax.tree.map(np.shape, variables) != expected:
            raise CheckpointError(f"{name} is of another model than its configuration; install the package again")
        origin = f"the model {name} of the package"
        predictor = cls._as_told(config, variables, meta, "given", meta.get("step", 0), origin, precision)
        predictor.name, predictor.card = name, card
        return predictor

    @classmethod
    def _as_told(
        cls,
        config: TrainConfig,
        variables: Tree,
        meta: dict[str, Any],
        weights: str,
        step: int,
        origin: str,
        precision: str | None,
    ) -> "Predictor":
        """Makes one with what the meta data of a checkpoint tell of targets and training data."""
        targets = tuple(TargetStatistics(**target) for target in meta["targets"])
        digest = meta.get("data", {}).get("digest", "")
        coverage = Coverage.from_json(meta["training_set"]) if "training_set" in meta else None
        return cls(config, variables, targets, weights, step, origin, digest, coverage, precision)

    @functools.cached_property
    def weights_at_work(self) -> Tree:
        """The variables in the precision that it computes with."""
        with working_precision(self.model):
            return jax.tree.map(lambda x: jnp.asarray(x, self.model.dtype), self.variables)

    def predict(
        self,
        structures: Iterable[Any] | Any,
        num_frame_samples: int | None = None,
        progress: bool = False,
        return_std: bool = False,
    ) -> Any:
        """Predicts [B, T] in label units (`targets` names T and their units), in the order given.

        `structures`: pymatgen Structures, ASE Atoms, Crystals or paths of structure files, one or a list; a file
        with several structures gives as many rows. `num_frame_samples`: how many draws among equally good frames are
        averaged (1: none is drawn, the crystal chooses; None: as configured). Raises CrystalError naming the
        first structure that cannot be used; one among others of its file is a warning and a row of NaN instead. A
        PredictionWarning tells of crystals unlike all of the training set, see `inference.doubts`. With `return_std`
        the result is a pair: the second is the standard deviation over draws of frames, None if there are none to draw.
        """
        found = self.predict_with_spread(structures, num_frame_samples, progress)
        return found.pair(self.spread_over(num_frame_samples)) if return_std else found.value

    def predict_with_spread(
        self, structures: Iterable[Any] | Any, num_frame_samples: int | None = None, progress: bool = False
    ) -> Predictions:
        """Predicts as `predict`, with the standard deviation over draws of frames: value and spread, both [B, T]."""

        def predict(crystals: list[Crystal]) -> Predictions:
            return self.predict_all(table_of(crystals, self.cutoff), num_frame_samples, progress)

        return predict_usable(self, structures, predict)

    def predict_all(
        self, table: CrystalTable, num_frame_samples: int | None, progress: bool, title: str = "predicting"
    ) -> Predictions:
        """Predicts all rows of a table with this predictor's cutoff, with a progress bar if wanted.

        One device is enough if it can take all crystals at once, and their program is compiled in haste.
        """
        groups, devices = groups_by_atoms(table), ONE_DEVICE
        if len(groups) > 1:
            groups, devices = groups_by_atoms(table, self.devices.count), self.devices
        shapes = request_shapes(table, groups, self.parts, devices.count)
        shown = tqdm(groups, desc=title, unit=" batches", disable=not progress)
        return self.predict_table(table, shown, shapes, num_frame_samples, devices, len(groups) > 1)

    def predict_dataset(self, dataset: Dataset, rows: np.ndarray, num_frame_samples: int | None = None) -> Predictions:
        """Predicts rows of a data set with this predictor's cutoff, in batches as in training."""
        from crystalframer_jax.data.loader import batch_shapes  # imports Grain, which others do not need

        size = max(1, self.config.batch_size)
        shapes = batch_shapes(dataset, size, self.parts, self.devices.count)
        return self.predict_table(dataset.table, groups_of(rows, size), shapes, num_frame_samples)

    def predict_table(
        self,
        table: CrystalTable,
        groups: Iterable[np.ndarray],
        shapes: Sequence[BatchShape] | BatchParts,
        num_frame_samples: int | None = None,
        devices: Devices | None = None,
        runs_often: bool = True,
    ) -> Predictions:
        """Predicts groups of rows of a table whose neighbor rows have this predictor's cutoff.

        Each group is shared by all `devices` (default: those of the predictor); `runs_often`: see `make_forward`.
        """
        devices = devices or self.devices
        with working_precision(self.model):
            return predict_rows(
                _forward_of(self.model, devices, runs_often),
                self.weights_at_work,
                table,
                groups,
                self.targets,
                shapes,
                frame_draws(self.config, num_frame_samples),
                devices=devices,
            )

    def embed(
        self, structures: Iterable[Any] | Any, atoms: bool = False, progress: bool = False
    ) -> np.ndarray | tuple[np.ndarray, list[np.ndarray]]:
        """Returns the vectors [B, D] that the output layers read, a row for each structure; see `predict` for these.

        With `atoms` also those of the atoms of each structure, B arrays [n, D] in the order of its sites; their mean
        (or maximum, by `pooling`) is that of the structure. Raises CrystalError for a structure that cannot be used.
        """
        found = crystals_of(structures)
        for item in found:
            if isinstance(item, CrystalError):
                raise item
        vectors = self.embed_table(
            table_of([item for item in found if isinstance(item, Crystal)], self.cutoff), progress
        )
        if not atoms:
            return vectors.crystals
        ends = np.cumsum([crystal.num_atoms for crystal in found if isinstance(crystal, Crystal)])
        return vectors.crystals, np.split(vectors.atoms, ends[:-1])

    def embed_table(self, table: CrystalTable, progress: bool = False) -> Vectors:
        """Computes the vectors of all rows of a table with this predictor's cutoff."""
        groups = groups_by_atoms(table)
        shapes = request_shapes(table, groups, self.parts, 1)
        shown = tqdm(groups, desc="embedding", unit=" batches", disable=not progress)
        with working_precision(self.model):
            return vectors_of(self.model, self.weights_at_work, table, shown, shapes)

    def spread_over(self, num_frame_samples: int | None = None) -> str:
        """Tells what the spread of predictions is over, such as "16 draws"; empty without draws, where it is 0."""
        draws = frame_draws(self.config, num_frame_samples)
        return f"{draws} draws" if draws > 1 else ""


@functools.lru_cache(maxsize=8)
def _forward_of(model: ModelConfig, devices: Devices, runs_often: bool) -> Forward:
    """Compiles the forward pass of a model, once for all predictors of the same hyperparameters."""
    return make_forward(CrystalFramer(model), devices, runs_often)


def _precision(trained: str, asked: str | None) -> str:
    """Chooses what to compute with; a model trained in bfloat16 is another one without its rounding."""
    if asked is not None and asked not in PRECISIONS:
        raise ConfigError(f"precision={brief(asked)} does not exist; allowed: {', '.join(PRECISIONS)}")
    if asked is None and trained == "float32" and jax.default_backend() == "cpu":
        return "float64"
    return asked or trained


def run_and_step(path: str | Path) -> tuple[Path, int | None]:
    """Splits RUN/checkpoints/STEP into the run directory and the step; None if the path is that of a run."""
    path = Path(path).expanduser()
    is_checkpoint = path.parent.name == FOLDER and re.fullmatch("[0-9]{1,18}", path.name)
    return (path.parent.parent, int(path.name)) if is_checkpoint else (path, None)


def all_zero(tree: Tree) -> bool:
    """Tells whether there are arrays and nothing but zeros in them."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and not any(np.any(leaf) for leaf in leaves)


def _with_draws(config: TrainConfig, workdir: Path, meta: dict[str, Any], summary: dict[str, Any]) -> TrainConfig:
    """Gives a configuration the draws of frames that the summary tells or, before there is one, the checkpoint.

    They may change within a run, so config.json alone would not be noticed to be damaged.
    """
    told = meta.get("config", {}).get("num_frame_samples", config.num_frame_samples)
    draws = summary.get("num_frame_samples", told)
    if draws != config.num_frame_samples:
        warn(f"{workdir / CONFIG_FILE} has num_frame_samples={config.num_frame_samples}; the run was made with {draws}")
    return dataclasses.replace(config, num_frame_samples=draws)


def _step_with(weights: str, checkpoints: Checkpoints) -> int:
    """Finds the checkpoint of a run that has these weights."""
    last = checkpoints.last()
    step = checkpoints.best() if weights == "best" else last
    if step is None and last is not None:
        raise CheckpointError(
            f"{checkpoints.workdir} has no validation errors to choose the best weights by; ask for last or swa"
        )
    if step is None:
        raise CheckpointError(f"{checkpoints.workdir} has no checkpoint yet; let the training finish an epoch")
    return step


def _check_average(weights: str, fields: dict[str, Tree], config: TrainConfig, workdir: Path, step: int) -> None:
    """Raises CheckpointError if averaged weights are asked for that are not there, or not complete."""
    if weights not in AVERAGES:
        return
    variables = variables_in(fields, weights)
    if not variables["params"] or all_zero(variables["params"]):
        key = AVERAGES[weights]
        raise CheckpointError(f"{workdir} has no {weights} weights ({key}={getattr(config, key)}, or not reached yet)")
    if all_zero(variables["batch_stats"]):
        raise CheckpointError(
            f"{workdir}: the {weights} weights of step {step} have no BatchNorm statistics, which come at the "
            "end of the training; ask for last or best"
        )


def variables_in(fields: dict[str, Tree], weights: str) -> Tree:
    """Returns the variables of a model with certain weights from the MODEL_FIELDS of a checkpoint."""
    prefix = f"{weights}_" if weights in AVERAGES else ""
    return {
        "params": fields[f"{prefix}params"],
        "calibration": fields["calibration"],
        "batch_stats": fields[f"{prefix}batch_stats"],
    }


@functools.lru_cache(maxsize=8)
def _abstract_model(config: TrainConfig) -> dict[str, Tree]:
    """Returns the shapes of the model's part of a checkpoint; JAX would remember every trace of it for ever."""
    model = config.model
    padding = pack(table_of([], config.cutoff), np.arange(0), BatchShape(1, 1, 1, 1, model.parts))
    variables = jax.eval_shape(CrystalFramer(model).init, jax.random.key(0), padding)
    return on_this_device(stored_fields(config, variables))


def stored_fields(config: TrainConfig, variables: Tree) -> dict[str, Tree]:
    """Arranges MODEL_FIELDS as a checkpoint of this model has them; averages look like what they average."""
    absent = () if config.ema_decay else ("ema_params", "ema_batch_stats")
    likes = {name: name.removeprefix("swa_").removeprefix("ema_") for name in MODEL_FIELDS}
    return {name: {} if name in absent else variables.get(like, {}) for name, like in likes.items()}
