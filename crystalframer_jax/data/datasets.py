"""Target sets by name: those known from the start, and those that users have prepared from their own files."""

import re
from pathlib import Path

from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.prepare import is_current, prepare
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import Dataset, data_folder, load_dataset
from crystalframer_jax.structures.neighbors import LatticeBox


def open_dataset(name: str, targets: tuple[str, ...], cutoff: float | LatticeBox, data_dir: str = "") -> Dataset:
    """Opens the target set of that name with its `targets` and neighbor rows within `cutoff`, see `neighbor_rows`.

    A bundled set is prepared if need be; others are prepared by scripts/prepare_data.py. An empty `data_dir` stands
    for the user's cache folder. Raises ConfigError for an unknown name, DataError for a set that is not prepared.
    """
    folder = folder_of(name, data_dir)
    known = TARGET_SETS.get(name)
    if known and isinstance(known.source, Bundled):
        source = known.source.open(known.targets)
        if not is_current(folder, source):
            prepare(folder, source, known)
    elif not known and not folder.is_dir():
        prepared = ", ".join(prepared_sets(folder.parent)) or "none"
        raise ConfigError(
            f"target_set={name!r} is not known; allowed: {', '.join(TARGET_SETS)}, and what was prepared in "
            f"{folder.parent} ({prepared}). Your own crystals become a target set by scripts/prepare_data.py"
        )
    return load_dataset(folder, targets, cutoff)


def folder_of(name: str, data_dir: str = "") -> Path:
    """Returns the folder of a target set; ConfigError if the name cannot be that of a folder."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"target_set={name!r} must be a name of letters, digits and _ . + -")
    return data_folder(data_dir) / name


def prepared_sets(root: Path) -> list[str]:
    """Lists the target sets prepared in a folder that are not known from the start."""
    found = {file.parts[-3] for file in root.glob("*/crystals/manifest.json")}
    return sorted(found - set(TARGET_SETS))
