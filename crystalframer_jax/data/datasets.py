"""Target sets by name: those known from the start, and those that users have prepared from their own files."""

import re
import shlex
from pathlib import Path

from tqdm import tqdm

from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.prepare import is_current, prepare
from crystalframer_jax.data.records import DataError, Source
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import Dataset, data_folder, load_dataset, read_dataset, read_set_manifest, targets_of
from crystalframer_jax.files import FileError
from crystalframer_jax.structures.neighbors import LatticeBox
from crystalframer_jax.text import escaped

NAME = r"\w[\w.+-]*"  # of a target set


def open_dataset(name: str, targets: tuple[str, ...], cutoff: float | LatticeBox, data_dir: str = "") -> Dataset:
    """Opens the target set of that name with its `targets` and neighbor rows within `cutoff`, see `neighbor_rows`.

    A bundled set is prepared if need be; others are prepared by crystalframer prepare. An empty `data_dir` stands
    for the user's cache folder. Raises ConfigError for an unknown name, DataError for a set that is not prepared.
    """
    folder = folder_of(name, data_dir)
    if source := _bundled(name):
        if not is_current(folder, source):
            prepare(folder, source, TARGET_SETS[name])
    elif name not in TARGET_SETS and not folder.is_dir():
        prepared = ", ".join(prepared_sets(folder.parent)) or "none"
        raise ConfigError(
            f"target_set={name!r} is not known; allowed: {', '.join(TARGET_SETS)}, and what was prepared in "
            f"{folder.parent} ({prepared}). Your own crystals become a target set by crystalframer prepare"
        )
    return load_dataset(folder, targets, cutoff)


def open_dataset_of_run(name: str, targets: tuple[str, ...], cutoff: float | LatticeBox, stated: str) -> Dataset:
    """Opens the target set of a run, which may be from anybody: `stated`, its own `data_dir`, is only read.

    If not all is there, complete and undamaged, the set is that of the user's cache folder. Raises DataError, naming
    --data_dir, if it cannot be opened there.
    """
    if not stated:
        return open_dataset(name, targets, cutoff)
    folder, source = folder_of(name, stated), _bundled(name)
    dataset = read_dataset(folder, targets, cutoff) if source is None or is_current(folder, source) else None
    if dataset:
        return dataset
    try:
        dataset = open_dataset(name, targets, cutoff)
    except (ConfigError, DataError) as error:
        flag = escaped(shlex.join([f"--data_dir={stated}"]))
        raise DataError(
            f"{escaped(folder)}, where the run has its data, does not hold all that is needed, and nothing is written "
            f"where a run says: add {flag} to have it completed there ({error})"
        ) from error
    tqdm.write(f"note: {escaped(folder)} does not hold all that is needed; the data are those of {folder_of(name)}")
    return dataset


def _bundled(name: str) -> Source | None:
    """Opens the source of a target set that comes with the package; None for others."""
    known = TARGET_SETS.get(name)
    return known.source.open(known.targets) if known and isinstance(known.source, Bundled) else None


def folder_of(name: str, data_dir: str = "") -> Path:
    """Returns the folder of a target set; ConfigError if the name cannot be that of a folder."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"target_set={name!r} must be a name of letters, digits and _ . + -")
    return data_folder(data_dir) / name


def target_names(name: str, data_dir: str = "") -> tuple[str, ...]:
    """Names the targets of a set that is known or prepared; ConfigError if there is no such set."""
    if name in TARGET_SETS:
        return tuple(target.name for target in TARGET_SETS[name].targets)
    folder = folder_of(name, data_dir)
    try:
        return tuple(target.name for target in targets_of(read_set_manifest(folder)))
    except FileError as error:
        raise ConfigError(f"target_set={name!r} is not known, and not prepared in {folder.parent} ({error})") from error


def prepared_sets(root: Path) -> list[str]:
    """Lists the target sets prepared in a folder that are not known from the start."""
    found = {file.parts[-3] for file in root.glob("*/crystals/manifest.json")}
    return sorted(name for name in found - set(TARGET_SETS) if re.fullmatch(NAME, name))
