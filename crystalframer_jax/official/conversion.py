"""Run directories from checkpoints of the official implementation, and such checkpoints from runs."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, TrainConfig, validate_model
from crystalframer_jax.data.registry import TARGET_SETS, target_set
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import write_json
from crystalframer_jax.inference.forward import working_precision
from crystalframer_jax.inference.predictor import Predictor, all_zero, run_and_step, stored_fields, variables_in
from crystalframer_jax.official.checkpoint_file import OfficialCheckpoint, read_checkpoint, write_checkpoint
from crystalframer_jax.official.config import config_from_official, official_from_config
from crystalframer_jax.official.state import (
    RAW_UNIT,
    Arrays,
    OfficialStateError,
    Tree,
    official_from_variables,
    target_statistics,
    variables_from_official,
)
from crystalframer_jax.runs.checkpoints import FOLDER, Checkpoints, on_this_device
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_directory import CONFIG_FILE, SUMMARY_FILE, as_json, sealed

RUN_FILES = (CONFIG_FILE, SUMMARY_FILE, FOLDER)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was imported or exported, and what a user should know of it."""

    config: TrainConfig  # of the run
    targets: tuple[TargetStatistics, ...]
    parameters: int  # how many numbers are trained
    weights: str  # that prediction uses: on import "last" (the model of the file) or "swa"; on export, of which run
    has_average: bool  # whether there are averaged weights beside them
    epoch: int  # of the training
    step: int
    notes: list[str]  # a sentence each


def import_checkpoint(
    file: str | Path,
    workdir: str | Path,
    hyper_parameters: Mapping[str, Any] | None = None,
    data: str = "",
    targets: tuple[str, ...] = (),
    units: tuple[str, ...] = (),
    target_mean: tuple[float, ...] = (),
    target_std: tuple[float, ...] = (),
    weights: str | None = None,
) -> Conversion:
    """Writes a run directory with the model of an official checkpoint; `Predictor.load` and the scripts accept it.

    `hyper_parameters`: official ones, for those that the file does not have. `data`: name of the target set that the
    model was trained on, which gives the units. `targets`, `units`: names instead of the official ones, and units.
    `target_mean`, `target_std`: of the training labels, if the file does not have them. `weights`: "model" or "swa",
    those that prediction uses by default; without it "swa" if the file has averaged weights.

    Raises UserError in one of its kinds, and writes nothing, if the file cannot be used or `workdir` is not empty.
    """
    file, workdir = Path(file).expanduser(), Path(workdir).expanduser()
    _check_free(workdir)
    checkpoint = read_checkpoint(file)
    given, has_average = hyper_parameters or {}, checkpoint.swa_state is not None
    if weights not in (None, "model", "swa"):
        raise ConfigError(f"weights={weights!r} are not in a file; allowed: model, swa")
    if weights == "swa" and not has_average:
        raise UserError(f"{file} has no averaged weights; leave --weights out, or give --weights=model")
    stored = {key: value for key, value in checkpoint.hyper_parameters.items() if value is not None}
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in stored.items()}  # as JSON has it
    if not found and not given:
        raise UserError(f"{file} has no hyperparameters: give those of its training with --config=FILE.json")
    with _about(file):
        config, left_out = config_from_official({**given, **found})
        mean = _given_once("target_mean", checkpoint.target_mean, target_mean)
        std = _given_once("target_std", checkpoint.target_std, target_std)
        config, statistics = _with_targets(config, (mean, std), data, targets, units)
        fields = _model_fields(checkpoint, config)
    selected = "swa" if has_average and weights != "model" else "last"
    parameters = sum(leaf.size for leaf in jax.tree.leaves(fields["params"]))
    ignored = [key for key in given if key in found and found[key] != given[key]]
    notes = _import_notes(ignored, left_out, statistics[0].unit, config)
    run = Conversion(config, statistics, parameters, selected, has_average, checkpoint.epoch, checkpoint.step, notes)
    _write_run(workdir, run, fields, file.name)
    return run


def _write_run(workdir: Path, run: Conversion, fields: dict[str, Tree], origin: str) -> None:
    """Writes a run directory, complete or not at all: a process that is killed leaves `workdir` free."""
    workdir = workdir.resolve()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{workdir.name}.importing.", dir=workdir.parent) as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        write_json(folder / CONFIG_FILE, as_json(run.config))
        with contextlib.closing(Checkpoints(folder, writable=True)) as checkpoints:
            targets = [dataclasses.asdict(s) for s in run.targets]
            meta = {"epoch": run.epoch, "seconds": 0.0, "targets": targets, "val_mae": {}}
            meta["config"] = as_json(run.config)
            checkpoints.save_weights(run.step, fields, meta)
        summary = {
            "selected_weights": run.weights,
            "imported_from": origin,
            "units": {s.name: s.unit for s in run.targets},
            "parameters": run.parameters,
        }
        write_json(folder / SUMMARY_FILE, sealed(summary))
        _check_free(workdir)
        os.replace(folder, workdir)  # an empty folder may be there


@contextlib.contextmanager
def _about(origin: object) -> Iterator[None]:
    """Puts into errors what they are about."""
    try:
        yield
    except (ConfigError, OfficialStateError) as error:
        raise type(error)(f"{origin}: {error}") from error


def _import_notes(ignored: list[str], left_out: list[str], unit: str, config: TrainConfig) -> list[str]:
    """Tells what a user should know about an imported model, a sentence each."""
    notes = []
    if ignored:
        notes.append(f"the file has other values than --config, and they count: {', '.join(ignored)}")
    if left_out:
        notes.append(f"training settings that are not available keep our defaults: {', '.join(left_out)}")
    if unit == RAW_UNIT:
        notes.append(
            "no target_mean or no target_std: predictions are the raw output of the model, without a unit, and cannot "
            "be evaluated; give --target_mean and --target_std of the training labels"
        )
    return notes + _frame_notes(config)


def _check_free(workdir: Path) -> None:
    """Raises UserError unless a run can be written there."""
    if not workdir.exists():
        return
    if not workdir.is_dir():
        raise UserError(f"{workdir} is a file; choose another --workdir")
    if any(workdir.iterdir()):
        found = [name for name in RUN_FILES if (workdir / name).exists()]
        what = f"holds a run already ({', '.join(found)})" if found else "is not empty"
        raise UserError(f"{workdir} {what}; choose another --workdir")


def _given_once(name: str, found: np.ndarray | None, given: tuple[float, ...]) -> Any | None:
    """Returns a statistic of the targets: that of the file, or the one given where it has none."""
    if found is not None and given:
        raise ConfigError(f"the file has its own {name}; leave --{name} out")
    return given or None if found is None else found


def _with_targets(
    config: TrainConfig,
    scaling: tuple[Any | None, Any | None],
    data: str,
    targets: tuple[str, ...],
    units: tuple[str, ...],
) -> tuple[TrainConfig, tuple[TargetStatistics, ...]]:
    """Finds names, units and scaling of the targets; returns them with the configuration that names them."""
    names = config.targets
    for option, given in (("targets", targets), ("units", units)):
        if given and len(given) != len(names):
            raise ConfigError(f"--{option}={','.join(given)}: the model has {len(names)} ({', '.join(names)})")
    config = validate_model(dataclasses.replace(config, targets=targets or names))
    names, name_of_set = config.targets, config.target_set
    official = TARGET_SETS.get(name_of_set)
    if data or not official or not set(names) <= {target.name for target in official.targets}:
        name_of_set = data
    known = tuple(target_set(name_of_set).target(name).unit for name in names) if name_of_set else ()
    if any(values is None for values in scaling):
        if units:
            raise ConfigError(f"--units={','.join(units)} needs target_mean and target_std: raw output has no unit")
        name_of_set = ""  # its labels are not what the model predicts
    config = dataclasses.replace(config, target_set=name_of_set)
    return config, target_statistics(names, *scaling, units or known)


def _model_fields(checkpoint: OfficialCheckpoint, config: TrainConfig) -> dict[str, Tree]:
    """Makes the model's part of a checkpoint of ours; averaged weights that are not there are zero."""
    last = _variables(checkpoint.state, config)
    average = last | {"params": jax.tree.map(np.zeros_like, last["params"])}
    if checkpoint.swa_state is not None:
        with _about("averaged weights"):
            average = _variables(checkpoint.swa_state, config)
        pairs = zip(*(jax.tree.leaves(v["calibration"]) for v in (last, average)), strict=True)
        if not all(np.isclose(a, b, rtol=1e-6, atol=0) for a, b in pairs):
            raise OfficialStateError(
                "gauss_scale of the averaged weights is not that of the last; they are of two trainings"
            )
    averages = {"swa_params": average["params"], "swa_batch_stats": average["batch_stats"]}
    return stored_fields(config, last) | averages


def _variables(state: Arrays, config: TrainConfig) -> dict[str, Tree]:
    """Makes our variables in the type of the model, each in memory of its own."""
    variables = variables_from_official(state, config.model)
    return jax.tree.map(lambda leaf: np.array(leaf, config.model.dtype, order="C"), variables)


def _frame_notes(config: TrainConfig) -> list[str]:
    """Tells of frames that are not the same in the two implementations."""
    if not config.value_pe_angle_real or config.frame_method not in ("max_static", "weighted_pca"):
        return []
    return [f"frame_method={config.frame_method}: here as published, the official code departs; predictions differ"]


def export_checkpoint(
    run: str | Path, file: str | Path, weights: str | None = None, overwrite: bool = False
) -> Conversion:
    """Writes a checkpoint that the official code can load from a run directory, or one of its checkpoints.

    `weights`: "best", "last" or "swa" for the model itself; without it, those that the finished run selected. The
    averaged weights, if there are any, are stored as such in any case. A `file` that exists is replaced only with
    `overwrite`.

    Raises CheckpointError if there is no such model or a part of it is damaged, ConfigError if the official code has no
    such model.
    """
    run, file = Path(run).expanduser(), Path(file).expanduser()
    if file.is_dir() or (file.exists() and not overwrite):
        raise UserError(f"{file} is a folder" if file.is_dir() else f"{file} exists; replace it with --overwrite")
    predictor = Predictor.load(run, weights)
    config, model = predictor.config, predictor.config.model
    has_references = any(s.references for s in predictor.targets)  # may be those of the run that it started from
    official = official_from_config(dataclasses.replace(config, element_references=has_references))
    epoch, average = _epoch_and_average(run, predictor)
    notes = _export_notes(config)
    if average and all_zero(average["batch_stats"]):
        average = None
        notes.append("the averaged weights are left out: their BatchNorm statistics come at the end of the training")
    checkpoint = OfficialCheckpoint(
        hyper_parameters=official,
        state=official_from_variables(predictor.variables, model),
        swa_state=official_from_variables(average, model) if average else None,
        target_mean=np.array([s.mean for s in predictor.targets]),
        target_std=np.array([s.std for s in predictor.targets]),
        epoch=epoch,
        step=predictor.step,
    )
    write_checkpoint(file, checkpoint)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(predictor.variables["params"]))
    return Conversion(
        config, predictor.targets, parameters, predictor.origin, bool(average), epoch, predictor.step, notes
    )


def _epoch_and_average(run: Path, predictor: Predictor) -> tuple[int, Tree | None]:
    """Finds the epoch of the weights of the predictor, and the variables with averaged weights if there are any.

    The average is that of the same checkpoint; the best weights go with that of the last one.
    """
    with contextlib.closing(Checkpoints(run_and_step(run)[0])) as checkpoints:
        epoch = checked(checkpoints.meta(predictor.step), checkpoints.path(predictor.step), "epoch")["epoch"]
        if not predictor.config.swa_epochs:
            return epoch, None
        last = checkpoints.last() if predictor.weights == "best" else None
        with working_precision(predictor.config):
            like = on_this_device(stored_fields(predictor.config, predictor.variables))
            fields = checkpoints.restore_model(last or predictor.step, like)
    average = variables_in(fields, "swa")
    return epoch, None if all_zero(average["params"]) else average


def _export_notes(config: TrainConfig) -> list[str]:
    """Tells what the official code computes differently, a sentence each."""
    notes = _frame_notes(config)
    if config.cutoff_radius:
        notes.append(
            f"cutoff_radius={config.cutoff_radius} has no official counterpart: the official code takes "
            f"adaptive_cutoff_sigma={config.adaptive_cutoff_sigma}"
        )
    if config.precision != "float32":
        notes.append(f"precision={config.precision}: the official model stores and computes in float32")
    return notes
