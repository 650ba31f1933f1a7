"""The run directory: who may train in it, with which hyperparameters, data and software; what its model was."""

import datetime
import functools
import hashlib
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
from tqdm import tqdm

from crystalframer_jax.config import ConfigError, TrainConfig, validate_given
from crystalframer_jax.config.hyperparameters import KEYS, NEVER, RESUMABLE_KEYS, UNIMPORTANT_KEYS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import FileError, append_line, json_text, read_json, write_json
from crystalframer_jax.runs.checkpoints import FOLDER, CheckpointError, newest_meta, steps_in
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.text import escaped

CONFIG_FILE, DATA_FILE, SUMMARY_FILE = "config.json", "data.json", "summary.json"
TIMES = ("seconds", "crystals_per_s")  # in a summary, that differ between runs which are equal to the bit
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
    if "imported_from" in _summary_or_nothing(workdir):
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
    file, values = workdir / DATA_FILE, data_of(dataset)
    before = newest_meta(workdir).get("data")  # checkpoints of old versions do not tell
    if before is None and file.exists() and steps_in(workdir / FOLDER):
        before = checked(read_json(file), file, "digest")
    if before and before["digest"] != values["digest"]:
        raise ConfigError(
            f"{workdir} was started with other data under the name {dataset.name} ({before['digest']}, now "
            f"{values['digest']}): prepare those again, or choose another --workdir"
        )
    write_json(file, values)


def data_of(dataset: Dataset) -> dict[str, Any]:
    """Tells which data a run is trained on, as data.json and its checkpoints have it."""
    return {"target_set": dataset.name, "digest": dataset.digest, "remark": dataset.remark}


def store_config(config: TrainConfig, workdir: Path) -> None:
    """Writes config.json; values that have changed since are kept in config_changes.jsonl."""
    before = stored_config(workdir)
    changes = _changes(before, config)
    if changes:
        append_line(workdir / "config_changes.jsonl", json.dumps({"time": _now(), "changes": changes}))
    if changes or not before or not (workdir / CONFIG_FILE).exists():
        write_json(workdir / CONFIG_FILE, as_json(config))


def read_config(workdir: Path, meta: dict[str, Any] | None = None) -> TrainConfig:
    """Reads the configuration of a run: config.json, held to what a checkpoint tells, whose checksums protect it.

    `meta`: what that checkpoint tells; None: the newest. Only hyperparameters that may change within a run may differ.
    If config.json is missing, the checkpoint has it. With one of an old version, which does not tell, config.json is
    taken as it is. A line on stderr says either. Raises CheckpointError, with the remedy, if it is damaged or another.
    """
    file, meta = workdir / CONFIG_FILE, newest_meta(workdir) if meta is None else meta
    try:
        told = validate_given(meta["config"]) if "config" in meta else None
    except ConfigError as error:
        raise CheckpointError(f"a checkpoint of {workdir} tells of an impossible configuration: {error}") from error
    if told and not os.path.lexists(file):
        warn(f"{file} is missing; the configuration is taken from the checkpoint")
        return told
    remedy = "remove it: the checkpoint tells the configuration" if told else "put back a copy of it"
    try:
        config = validate_given(read_json(file))
    except FileError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    except ConfigError as error:
        raise CheckpointError(f"{file} is damaged: {error}; {remedy}") from error
    if told is None:
        if steps_in(workdir / FOLDER):
            warn(
                f"{workdir} is of an old version, whose checkpoints do not protect {CONFIG_FILE}; it is taken as it is"
            )
        return config
    for key, row in KEYS.items():
        here, there = getattr(config, key), getattr(told, key)
        if row.metadata["change"] == NEVER and here != there:
            raise CheckpointError(f"{file} is not that of the checkpoints: {key}={here!r}, there {there!r}; {remedy}")
    return config


def stored_config(workdir: Path) -> dict[str, Any]:
    """Reads the configuration of a run as JSON; empty if nothing was trained there that could be lost."""
    return as_json(read_config(workdir)) if steps_in(workdir / FOLDER) else {}


def sealed(summary: dict[str, Any]) -> dict[str, Any]:
    """Adds the SHA-256 of a summary to it, without the times: predictions depend on what it says."""
    content = {key: value for key, value in summary.items() if key not in (*TIMES, "seal")}
    return summary | {"seal": hashlib.sha256(json_text(content).encode()).hexdigest()}


def read_summary(workdir: Path) -> dict[str, Any]:
    """Reads the summary of a run; empty if there is none yet, CheckpointError if it is not as it was written."""
    file = workdir / SUMMARY_FILE
    try:
        if not os.path.lexists(file):
            return {}
        summary = read_json(file)
        steering = ("selected_weights", "num_frame_samples", *TIMES)
        checked({key: summary[key] for key in steering if key in summary}, file)
        is_old = bool(summary) and "seal" not in summary and "config" not in newest_meta(workdir)
        if not is_old and sealed(summary) != summary:
            raise FileError(f"{file} is damaged: its seal is not that of its content")
    except FileError as error:
        raise CheckpointError(f"{error}; remove it, and the command that made it makes it again") from error
    return summary


def _summary_or_nothing(workdir: Path) -> dict[str, Any]:
    try:
        return read_summary(workdir)
    except CheckpointError:  # it is made again
        return {}


@functools.lru_cache(maxsize=256)
def warn(text: str) -> None:
    """Prints a line on stderr, once."""
    tqdm.write(escaped(f"warning: {text}"), file=sys.stderr)


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
    append_line(workdir / "environment.jsonl", json.dumps(record))


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
