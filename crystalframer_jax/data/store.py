"""The prepared store: the crystals of a target set and, for each cutoff, their neighbor rows, as checked columns.

    DATA_DIR/TARGET_SET/crystals/      the crystals, their labels and splits; skipped.csv, leakage.csv
    DATA_DIR/TARGET_SET/rows-DIGEST/   the neighbor rows for one cutoff

Each folder holds one .npy file for every column and a manifest.json with checksums and a digest of the columns. A
folder is there complete or not at all: it is made beside, under a name with a dot, and renamed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from tqdm import tqdm

from crystalframer_jax.batching.table import CRYSTAL_COLUMNS, ROW_COLUMNS, CrystalTable, row_columns
from crystalframer_jax.data.build import Columns, build_parts, join_parts
from crystalframer_jax.data.records import DataError, Target
from crystalframer_jax.data.registry import TARGET_SETS, find_target
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.files import json_text, locked, sha256
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, neighbor_rows

ROWS_FORMAT = 3  # to be raised when neighbor rows or their columns change
CHUNK_ATOMS = 9_000  # atoms whose neighbors a worker process finds at a time; about 100 MB
LABEL_COLUMNS = ("labels", "leaked", *SPLITS)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared target set with the labels that were asked for."""

    name: str
    table: CrystalTable
    targets: tuple[Target, ...]
    labels: np.ndarray  # [C, T] label units, NaN where unknown
    splits: dict[str, np.ndarray]  # row numbers of the table
    leaked: np.ndarray  # rows of validation and test crystals that are also in training, by id or by structure
    digest: str  # identifies crystals, labels and splits
    remark: str = ""  # what whoever trains on it should know


def data_folder(data_dir: str) -> Path:
    """Returns the folder of prepared data; an empty `data_dir` stands for the user's cache folder."""
    return Path(data_dir).expanduser() if data_dir else platformdirs.user_cache_path("crystalframer_jax")


def load_dataset(folder: Path, names: tuple[str, ...], cutoff: float | LatticeBox, workers: int = 0) -> Dataset:
    """Opens the target set that was prepared in `folder`, with the targets `names`.

    Neighbor rows within `cutoff`, see `neighbor_rows`, are computed first if they are not there. Crystals for which
    none of these labels is known are in no split. Raises DataError if nothing was prepared there, if it is damaged, or
    if a split has no crystal with these labels.
    """
    manifest, crystals = _crystals(folder)
    known = tuple(Target(**target) for target in manifest["targets"])
    targets = tuple(find_target(folder.name, known, name) for name in names)
    rows = _rows(folder, manifest["digest"], crystals, cutoff, workers)
    labels = crystals["labels"][:, [known.index(target) for target in targets]]
    has_label = np.isfinite(labels).sum(axis=1) > 0
    splits = {split: crystals[split][has_label[crystals[split]]] for split in SPLITS}
    for split, chosen in splits.items():
        if not len(chosen):
            raise DataError(
                f"{folder.name}: no crystal for {split} has a label {' or '.join(names)}; choose another target, or "
                "prepare it again with another split"
            )
    return Dataset(
        name=folder.name,
        table=CrystalTable(**{name: crystals[name] for name in CRYSTAL_COLUMNS}, **rows),
        targets=targets,
        labels=labels,
        splits=splits,
        leaked=crystals["leaked"],
        digest=manifest["digest"],
        remark=manifest["remark"],
    )


def _crystals(folder: Path) -> tuple[dict[str, Any], Columns]:
    """Reads manifest and columns of the crystals in `folder`; DataError if there are none or they are damaged."""
    found = read_columns(folder / "crystals", (*CRYSTAL_COLUMNS, *LABEL_COLUMNS))
    if found is None:
        state = "damaged" if (folder / "crystals").exists() else "not prepared"
        source = [] if folder.name in TARGET_SETS else ["--source=..."]
        where = [] if folder.parent == data_folder("") else [f"--data_dir={folder.parent}"]
        command = shlex.join(["scripts/prepare_data.py", f"--target_set={folder.name}", *source, *where])
        raise DataError(f"target set {folder.name} is {state} in {folder.parent}; run {command}")
    return found


def _rows(folder: Path, digest: str, crystals: Columns, cutoff: float | LatticeBox, workers: int) -> Columns:
    """Reads the columns of the neighbor rows, computed first if they are not there."""
    radius = dataclasses.asdict(cutoff) if isinstance(cutoff, LatticeBox) else float(cutoff)
    rows_digest = digest_of({"format": ROWS_FORMAT, "crystals": digest, "cutoff": radius})
    rows_folder = folder / f"rows-{rows_digest}"
    found = read_columns(rows_folder, ROW_COLUMNS)
    if found is None:
        with locked(folder.parent / f".{folder.name}.lock"):
            if read_columns(rows_folder, ROW_COLUMNS) is None:  # another process may just have computed them
                _write_rows(rows_folder, digest, crystals, cutoff, workers)
            found = read_columns(rows_folder, ROW_COLUMNS)
    if found is None:
        raise OSError(f"{rows_folder} was written but does not read back as written; check the disk")
    return found[1]


def _write_rows(folder: Path, digest: str, crystals: Columns, cutoff: float | LatticeBox, workers: int) -> None:
    """Computes the neighbor rows of all crystals and writes their columns."""
    start, number = time.perf_counter(), len(crystals["ids"])
    parts, title = parts_folder(folder, CHUNK_ATOMS), f"neighbors of {folder.parent.name}"
    chunks = itertools.groupby(range(number), lambda row: crystals["atom_offset"][row] // CHUNK_ATOMS)
    chunks_of_crystals = ([crystal_at(crystals, row) for row in rows] for _, rows in chunks)
    files = build_parts(functools.partial(_rows_of, cutoff), chunks_of_crystals, parts, title, number, workers)
    with writing(folder, {"crystals": digest, "cutoff": str(cutoff)}) as temporary:
        join_parts(files, ROW_COLUMNS, temporary)
    shutil.rmtree(parts)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    tqdm.write(
        f"neighbors of {number:,} crystals found in {seconds:.0f} s ({number / seconds:,.0f} crystals/s), "
        f"{size / number / 1000:.1f} kB a crystal in {folder}"
    )


def _rows_of(cutoff: float | LatticeBox, crystals: list[Crystal]) -> Columns:
    """Computes the neighbor rows of a chunk of crystals."""
    return row_columns(crystals, [neighbor_rows(crystal, cutoff) for crystal in crystals])


def crystal_at(crystals: Columns, row: int) -> Crystal:
    """Makes a crystal of the store without its occupancies."""
    atoms = slice(*crystals["atom_offset"][row : row + 2])
    id = str(crystals["ids"][row])
    return Crystal(crystals["species"][atoms], crystals["position"][atoms], crystals["lattice"][row], id=id)


# Folders of columns


def digest_of(key: dict[str, Any]) -> str:
    """Returns twelve hexadecimal digits that identify a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def parts_folder(folder: Path, chunk: int) -> Path:
    """Returns where parts of `folder` are kept until it is written; what was made in other chunks is not used."""
    return folder.with_name(f".{folder.name}-{chunk}.parts")


@contextlib.contextmanager
def writing(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Makes a temporary folder to write columns into, which then gets a manifest and takes the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.new")  # of this process alone: it holds the lock
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        checksums = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        columns = {name: checksum for name, checksum in checksums.items() if name.endswith(".npy")}
        content = manifest | {"sha256": checksums, "digest": digest_of(columns)}
        (temporary / "manifest.json").write_text(json_text(content | {"check": digest_of(content)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_columns(folder: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], Columns] | None:
    """Reads manifest and memory-mapped columns; None if the folder is missing or not as it was written."""
    for _ in range(3):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = (folder / "manifest.json").read_text()
            manifest = json.loads(text)
            is_intact = manifest.pop("check") == digest_of(manifest) and all(
                sha256(folder / name) == checksum for name, checksum in manifest["sha256"].items()
            )
            columns = mapped_columns(folder, names) if is_intact else {}
            if (folder / "manifest.json").read_text() == text:  # else it was replaced meanwhile
                return (manifest, columns) if is_intact else None
    return None


def mapped_columns(folder: Path, names: Iterable[str]) -> Columns:
    """Maps columns into memory, as plain arrays: slices of np.memmap are slow."""
    return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
