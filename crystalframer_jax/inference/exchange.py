"""Run directories from checkpoints of the official implementation, and such checkpoints from runs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from crystalframer_jax.config import TRAINING_KEYS, ConfigError, ModelConfig, model_config, target_names
from crystalframer_jax.data.registry import TARGET_SETS, target_set
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import locked, write_json
from crystalframer_jax.inference.official import (
    UNKNOWN_UNIT,
    OfficialStateError,
    Tree,
    official_from_variables,
    target_statistics,
    variables_from_official,
)
from crystalframer_jax.inference.official_config import OURS_ALONE, config_from_official, official_from_config
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.torch_checkpoint import (
    Arrays,
    OfficialCheckpoint,
    read_checkpoint,
    write_checkpoint,
)
from crystalframer_jax.training.checkpoint import FOLDER, CheckpointError, Checkpoints
from crystalframer_jax.training.state import TargetStatistics

RUN_FILES = ("config.json", "summary.json", FOLDER)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What was imported or exported: configuration, targets, weights, and what a user should know (`notes`)."""

    config: ConfigDict
    targets: tuple[TargetStatistics, ...]
    parameters: int
    weights: str
    epoch: int
    step: int
    notes: list[str]


def import_checkpoint(
    file: str | Path,
    workdir: str | Path,
    hyper_parameters: Mapping[str, Any] | None = None,
    data: str = "",
    targets: tuple[str, ...] = (),
    units: tuple[str, ...] = (),
) -> Exchange:
    """Write a run directory with the model of an official checkpoint; `Predictor.load` and the scripts accept it.

    `hyper_parameters`: official ones, instead of those in the file. `data`: name of the target set that the model was
    trained on, which gives the units. `targets`, `units`: names instead of the official ones, and units.

    Raises UserError in one of its kinds, and writes nothing, if the file cannot be used or `workdir` holds a run.
    """
    file, workdir = Path(file), Path(workdir)
    checkpoint = read_checkpoint(file)
    official = checkpoint.hyper_parameters if hyper_parameters is None else hyper_parameters
    if not official:
        raise UserError(f"{file} has no hyperparameters: give those of its training with --config=official.json")
    config, left_out = config_from_official(official)
    model = model_config(config)
    statistics = _describe_targets(config, checkpoint, data, targets, units)
    fields, weights = _model_fields(file, checkpoint, model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(fields["params"]))
    meta = {
        "epoch": checkpoint.epoch,
        "seconds": 0.0,
        "targets": [dataclasses.asdict(s) for s in statistics],
        "val_mae": {},
    }
    with locked(workdir / "lock", f"{workdir}: another process is writing there; choose another --workdir"):
        found = [name for name in RUN_FILES if (workdir / name).exists()]
        if found:
            raise UserError(f"{workdir} holds a run already ({', '.join(found)}); choose another --workdir")
        write_json(workdir / "config.json", json.loads(config.to_json()))
        checkpoints = Checkpoints(workdir, writable=True)
        checkpoints.save_weights(checkpoint.step, fields, meta)
        checkpoints.close()
        summary = {
            "selected_weights": weights,
            "imported_from": file.name,
            "units": {s.name: s.unit for s in statistics},
            "parameters": parameters,
        }
        write_json(workdir / "summary.json", summary)
    notes = _import_notes(official, left_out, checkpoint, config)
    return Exchange(config, statistics, parameters, weights, checkpoint.epoch, checkpoint.step, notes)


def _describe_targets(
    config: ConfigDict,
    checkpoint: OfficialCheckpoint,
    data: str,
    targets: tuple[str, ...],
    units: tuple[str, ...],
) -> tuple[TargetStatistics, ...]:
    """Names, units and scaling of the targets; sets `targets` and `target_set` of the configuration."""
    names = target_names(config)
    for option, given in (("targets", targets), ("units", units)):
        if given and len(given) != len(names):
            raise ConfigError(f"--{option}={','.join(given)}: the model has {len(names)} ({', '.join(names)})")
    config.targets = ",".join(targets or names)
    names = target_names(config)
    if data:
        config.target_set = data
        known = tuple(target_set(data).target(name).unit for name in names)
    elif config.target_set and set(names) <= {target.name for target in TARGET_SETS[config.target_set].targets}:
        known = tuple(target_set(config.target_set).target(name).unit for name in names)
    else:
        config.target_set = ""
        known = (UNKNOWN_UNIT,) * len(names)
    return target_statistics(names, checkpoint.target_mean, checkpoint.target_std, units or known)


def _model_fields(file: Path, checkpoint: OfficialCheckpoint, model: ModelConfig) -> tuple[dict[str, Tree], str]:
    """The model's part of a checkpoint of ours, and which of its weights to use: "swa" or "last"."""
    last = _variables(f"{file}", checkpoint.state, model)
    average = {"params": jax.tree.map(np.zeros_like, last["params"]), "batch_stats": last["batch_stats"]}
    if checkpoint.swa_state is not None:
        average = _variables(f"{file}, averaged weights", checkpoint.swa_state, model)
        pairs = zip(*(jax.tree.leaves(v["calibration"]) for v in (last, average)), strict=True)
        if not all(np.isclose(a, b, rtol=1e-6, atol=0) for a, b in pairs):
            raise OfficialStateError(
                f"{file}: gauss_scale of the averaged weights is not that of the last; they are of two trainings"
            )
    fields = last | {"swa_params": average["params"], "swa_batch_stats": average["batch_stats"]}
    return fields, "last" if checkpoint.swa_state is None else "swa"


def _variables(origin: str, state: Arrays, model: ModelConfig) -> dict[str, Tree]:
    """Our variables in the type of the model, each in memory of its own."""
    try:
        variables = variables_from_official(state, model)
    except OfficialStateError as error:
        raise OfficialStateError(f"{origin}: {error}") from error
    return jax.tree.map(lambda leaf: np.array(leaf, model.dtype, order="C"), variables)


def _import_notes(
    official: Mapping[str, Any], left_out: list[str], checkpoint: OfficialCheckpoint, config: ConfigDict
) -> list[str]:
    """What a user should know about an imported model, a sentence each."""
    notes = []
    if left_out:
        notes.append(f"training settings that are not available keep our defaults: {', '.join(left_out)}")
    absent = [key for key in config if key not in official and key not in (*TRAINING_KEYS, *OURS_ALONE)]
    if absent:
        values = ", ".join(f"{key}={config[key]!r}" for key in absent)
        notes.append(f"hyperparameters that are not given have our defaults: {values}")
    if checkpoint.target_mean is None or checkpoint.target_std is None:
        notes.append("no target_mean and target_std in the file: predictions are the raw output of the model")
    return notes + _frame_notes(config)


def _frame_notes(config: ConfigDict) -> list[str]:
    """Frames that are not the same in the two implementations."""
    if not config.value_pe_angle_real or config.frame_method not in ("max_static", "weighted_pca"):
        return []
    return [f"frame_method={config.frame_method}: here as published, the official code departs; predictions differ"]


def export_checkpoint(run: str | Path, file: str | Path, weights: str | None = None) -> Exchange:
    """Write a checkpoint that the official code can load from a run directory, or one of its checkpoints.

    `weights`: "best", "last" or "swa" for the model itself; without it, those that the finished run selected. The
    averaged weights, if there are any, are stored as such in any case.

    Raises CheckpointError if there is no such model, ConfigError if the official code has no such model.
    """
    predictor = Predictor.load(run, weights)
    config, model = predictor.config, model_config(predictor.config)
    step, epoch = _progress(Path(run), weights or predictor.origin.split()[0])
    average = _averaged(run) if config.swa_epochs else None
    checkpoint = OfficialCheckpoint(
        hyper_parameters=official_from_config(config),
        state=official_from_variables(predictor.variables, model),
        swa_state=None if average is None else official_from_variables(average, model),
        target_mean=np.array([s.mean for s in predictor.targets]),
        target_std=np.array([s.std for s in predictor.targets]),
        epoch=epoch,
        step=step,
    )
    write_checkpoint(file, checkpoint)
    notes = _frame_notes(config)
    if config.cutoff_radius:
        notes.append(
            f"cutoff_radius={config.cutoff_radius} has no official counterpart: the official code takes "
            f"adaptive_cutoff_sigma={config.adaptive_cutoff_sigma}"
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(predictor.variables["params"]))
    return Exchange(config, predictor.targets, parameters, predictor.origin, epoch, step, notes)


def _progress(run: Path, weights: str) -> tuple[int, int]:
    """Step and epoch of the checkpoint that `Predictor.load` takes."""
    is_checkpoint = run.parent.name == FOLDER
    checkpoints = Checkpoints(run.parent.parent if is_checkpoint else run)
    try:
        step = int(run.name) if is_checkpoint else checkpoints.best() if weights == "best" else checkpoints.last()
        if step is None:
            raise CheckpointError(f"{run} has no checkpoint")
        return step, checkpoints.meta(step)["epoch"]
    finally:
        checkpoints.close()


def _averaged(run: str | Path) -> Tree | None:
    """The variables with averaged weights, or None if nothing was averaged yet."""
    try:
        return Predictor.load(run, "swa").variables
    except CheckpointError:  # the run itself was loaded before
        return None
