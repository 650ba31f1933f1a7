"""The run directory: who may train in it, with which hyperparameters, data and software."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from crystalframer_jax.config import ConfigError, TrainConfig, validate_model
from crystalframer_jax.config.hyperparameters import KEYS, RESUMABLE_KEYS, UNIMPORTANT_KEYS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import write_json
from crystalframer_jax.runs.checkpoints import FOLDER, CheckpointError, read_json, steps_in

REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pymatgen")


def check_config(config: TrainConfig, workdir: Path, resume_with_changes: Sequence[str] = ()) -> None:
    """Raises ConfigError unless this run may be in that directory.

    It may if the directory is new, or the run there was started with the same values; of those named in
    `resume_with_changes`, RESUMABLE_KEYS may have changed.
    """
    unknown = [key for key in resume_with_changes if key not in KEYS]
    if unknown:
        raise ConfigError(
            f"--resume_with_changes={','.join(resume_with_changes)}: there is no hyperparameter {unknown[0]}"
        )
    summary = workdir / "summary.json"
    if summary.exists() and "imported_from" in read_json(summary):
        raise ConfigError(
            f"{workdir} holds imported weights; to train them further choose another --workdir and "
            f"--config.pretrained_model={workdir}"
        )
    if (workdir / "member_0").exists():
        raise ConfigError(f"{workdir} holds an ensemble; choose another --workdir")
    changed = _changes(stored_config(workdir), config)
    changes = {key: pair for key, pair in changed.items() if key not in UNIMPORTANT_KEYS}
    fixed = [key for key in changes if key not in RESUMABLE_KEYS]
    if fixed and changes.keys() <= set(resume_with_changes):
        raise ConfigError(
            f"{', '.join(fixed)} cannot change within a run; choose another --workdir, and "
            f"--config.pretrained_model={workdir} to start from its weights"
        )
    if changes.keys() - set(resume_with_changes):
        told = [f"{key} {old!r} -> {new!r}" for key, (old, new) in changes.items() if key not in resume_with_changes]
        remedy = "" if fixed else f", or go on with them by --resume_with_changes={','.join(changes)}"
        raise ConfigError(
            f"{workdir} holds a run with other hyperparameters ({', '.join(told)}); choose another --workdir{remedy}"
        )


def check_data(dataset: Dataset, workdir: Path) -> None:
    """Raises ConfigError if a run was started with other data than these; data.json tells which they are."""
    file = workdir / "data.json"
    values = {"target_set": dataset.name, "digest": dataset.digest, "remark": dataset.remark}
    before = read_json(file) if file.exists() and stored_config(workdir) else values
    if before["digest"] != values["digest"]:
        raise ConfigError(
            f"{workdir} was started with other data under the name {dataset.name} ({before['digest']}, now "
            f"{values['digest']}): prepare those again, or choose another --workdir"
        )
    write_json(file, values)


def store_config(config: TrainConfig, workdir: Path) -> None:
    """Writes config.json; values that have changed since are kept in config_changes.jsonl."""
    before = stored_config(workdir)
    changes = _changes(before, config)
    if changes:
        with (workdir / "config_changes.jsonl").open("a") as stream:
            stream.write(json.dumps({"time": _now(), "changes": changes}) + "\n")
    if changes or not before:
        write_json(workdir / "config.json", as_json(config))


def read_config(workdir: Path) -> TrainConfig:
    """Reads the configuration that a run was started with."""
    file = workdir / "config.json"
    values = TrainConfig().as_dict() | read_json(file)  # keys that are new since then had their defaults
    try:
        return validate_model(values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def stored_config(workdir: Path) -> dict[str, Any]:
    """Reads config.json of a run as JSON; empty if nothing was trained there that could be lost."""
    is_begun = (workdir / "config.json").exists() and steps_in(workdir / FOLDER)
    return as_json(read_config(workdir)) if is_begun else {}


def _changes(before: dict[str, Any], config: TrainConfig) -> dict[str, list[Any]]:
    """Finds the hyperparameters that differ from stored ones (empty: none do): old and new value by key."""
    values = as_json(config)
    return {key: [old, values[key]] for key, old in sorted(before.items()) if old != values[key]}


def as_json(config: TrainConfig) -> dict[str, Any]:
    """Gives the hyperparameters as config.json has them."""
    return json.loads(json.dumps(config.as_dict()))


def record_environment(workdir: Path) -> None:
    """Appends to environment.jsonl what runs from now on: command, versions, device, commit of a source checkout."""
    device = jax.local_devices()[0]
    record = {
        "time": _now(),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
        "crystalframer_jax": importlib.metadata.version("crystalframer-jax"),
        "git_commit": _git_commit(),
        "device": f"{jax.local_device_count()} x {device.device_kind} ({device.platform})",
        "cores": os.cpu_count(),
    }
    with (workdir / "environment.jsonl").open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """Gives the commit of the source checkout that runs, with "+changes" if files differ from it; None if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
