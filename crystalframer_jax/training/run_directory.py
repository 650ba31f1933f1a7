"""The run directory: who may train in it, with which hyperparameters, and what software has."""

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
from ml_collections import ConfigDict

from crystalframer_jax.config import RESUMABLE_KEYS, UNIMPORTANT_KEYS, ConfigError, target_names
from crystalframer_jax.configs import default
from crystalframer_jax.files import write_json
from crystalframer_jax.training.checkpoint import FOLDER, read_json

REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pymatgen")


def claim(config: ConfigDict, workdir: Path, resume_with_changes: Sequence[str] = ()) -> None:
    """Write config.json into a new run directory; a run that exists must have been started with the same values.

    Of the hyperparameters named in `resume_with_changes` those of RESUMABLE_KEYS may have changed; the new values are
    stored, and the old ones kept in config_changes.jsonl.

    Raises ConfigError if others have, or if the directory holds imported weights or an ensemble.
    """
    file, values = workdir / "config.json", as_json(config)
    summary = workdir / "summary.json"
    if summary.exists() and "imported_from" in read_json(summary):
        raise ConfigError(
            f"{workdir} holds imported weights; to train them further choose another --workdir and "
            f"--config.pretrained_model={workdir}"
        )
    if (workdir / "member_0").exists():
        raise ConfigError(f"{workdir} holds an ensemble; choose another --workdir")
    if not file.exists() or not any((workdir / FOLDER).glob("[0-9]*")):  # nothing was trained that could be lost
        write_json(file, values)
        return
    before = as_json(default.get_config()) | read_json(file)  # keys that are new since then had their defaults
    changed = [key for key in sorted({*values, *before}) if values.get(key) != before.get(key)]
    important = [key for key in changed if key not in UNIMPORTANT_KEYS]
    _check_changes(workdir, important, before, values, resume_with_changes)
    if changed:
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        record = {"time": now, "changes": {key: [before.get(key), values.get(key)] for key in changed}}
        with (workdir / "config_changes.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        write_json(file, values)


def _check_changes(
    workdir: Path, changed: list[str], before: dict[str, Any], values: dict[str, Any], allowed: Sequence[str]
) -> None:
    """Raise ConfigError unless all hyperparameters that changed may change and were named."""
    unknown = [key for key in allowed if key not in before]
    if unknown:
        raise ConfigError(f"--resume_with_changes={','.join(allowed)}: there is no hyperparameter {unknown[0]}")
    changes = ", ".join(f"{key} {before.get(key)!r} -> {values.get(key)!r}" for key in changed if key not in allowed)
    fixed = [key for key in changed if key not in RESUMABLE_KEYS]
    if fixed and set(changed) <= set(allowed):
        raise ConfigError(
            f"{', '.join(fixed)} cannot change within a run; choose another --workdir, and "
            f"--config.pretrained_model={workdir} to start from its weights"
        )
    if changes:
        keys = ",".join(changed)
        remedy = "" if fixed else f", or go on with them by --resume_with_changes={keys}"
        raise ConfigError(
            f"{workdir} holds a run with other hyperparameters ({changes}); choose another --workdir{remedy}"
        )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The hyperparameters as config.json has them."""
    values = json.loads(config.to_json())
    values["targets"] = ",".join(target_names(config))
    return values


def record_environment(workdir: Path) -> None:
    """Append to environment.jsonl what runs from now on: command, versions, device, commit of a source checkout."""
    device = jax.local_devices()[0]
    record = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
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


def _git_commit() -> str | None:
    """The commit of the source checkout that runs, with "+changes" if files differ from it; None if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
