"""The prepared store: the crystals of a target set and, for each cutoff, their neighbor rows, as checked columns.

    DATA_DIR/TARGET_SET/crystals/      the crystals, their labels and splits; skipped, warnings and leakage.csv
    DATA_DIR/TARGET_SET/rows-DIGEST/   the neighbor rows for one cutoff

Each folder holds one .npy file for every column and a manifest.json with checksums and a digest of the columns. A
folder is there complete or not at all: it is made beside, under a name with a dot, and renamed, see owned.py.
"""

import contextlib
import dataclasses
import functools
import itertools
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from tqdm import tqdm

from crystalframer_jax.batching.table import CRYSTAL_COLUMNS, ROW_COLUMNS, CrystalTable, row_columns
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.build import Columns, build_parts, join_parts
from crystalframer_jax.data.owned import (
    MANIFEST,
    begin,
    digest_of,
    discard,
    put,
    read_columns,
    read_manifest,
    require_place,
    settle,
    write_manifest,
)
from crystalframer_jax.data.records import DataError, Target
from crystalframer_jax.data.registry import TARGET_SETS, find_target
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.files import FileError, locked
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, neighbor_rows
from crystalframer_jax.text import escaped

ROWS_FORMAT = 4  # to be raised when neighbor rows or their columns change
CHUNK_ATOMS = 9_000  # atoms whose neighbors a worker process finds at a time; about 100 MB
LABEL_COLUMNS = ("labels", "leaked", *SPLITS)
SET_COLUMNS = (*CRYSTAL_COLUMNS, *LABEL_COLUMNS)
ANOTHER_FOLDER = "name another folder by --data_dir, or to train by --config.data_dir"
MANIFEST_KEYS = {"format": int, "source": str, "key": str, "remark": str, "targets": list, "crystals": int}


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
    if "\0" in data_dir:
        raise ConfigError(f"data_dir={data_dir!r} is not a name of a folder")
    try:
        return Path(data_dir).expanduser() if data_dir else platformdirs.user_cache_path("crystalframer_jax")
    except RuntimeError as error:  # ~NAME of a user who is not known
        raise ConfigError(f"data_dir={data_dir!r}: {error}") from error


def load_dataset(folder: Path, names: tuple[str, ...], cutoff: float | LatticeBox, workers: int = 0) -> Dataset:
    """Opens the target set that was prepared in `folder`, with the targets `names`.

    Neighbor rows within `cutoff`, see `neighbor_rows`, are computed first if they are not there. Crystals for which
    none of these labels is known are in no split. Raises DataError if nothing was prepared there, if it is damaged, or
    if a split has no crystal with these labels.
    """
    manifest, crystals, rows = _columns(folder, cutoff)
    _found(folder, manifest, names)  # an unknown target is told before all work
    if rows is None:
        with changing(folder):
            manifest, crystals, rows = _columns(folder, cutoff)  # another process may just have changed them
            if rows is None:
                rows_folder = _rows_folder(folder, manifest, cutoff)
                _write_rows(rows_folder, manifest["digest"], crystals, cutoff, workers)
                *_, rows = _columns(folder, cutoff)
                if rows is None:
                    raise OSError(f"{rows_folder} was written but does not read back as written; check the disk")
    return _dataset(folder, names, manifest, crystals, rows)


def read_dataset(folder: Path, names: tuple[str, ...], cutoff: float | LatticeBox) -> Dataset | None:
    """Opens a target set as `load_dataset` does, but only reads: None if anything of it is missing or damaged."""
    if read_set(folder) is None:
        return None
    manifest, crystals, rows = _columns(folder, cutoff)
    return _dataset(folder, names, manifest, crystals, rows) if rows else None


def _dataset(
    folder: Path, names: tuple[str, ...], manifest: dict[str, Any], crystals: Columns, rows: Columns
) -> Dataset:
    """Makes the data set of what was read."""
    known, targets = targets_of(manifest), _found(folder, manifest, names)
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
        remark=escaped(manifest["remark"]),
    )


def _found(folder: Path, manifest: dict[str, Any], names: tuple[str, ...]) -> tuple[Target, ...]:
    """Finds the targets of those names; ConfigError if there is none."""
    return tuple(find_target(folder.name, targets_of(manifest), name) for name in names)


def _columns(folder: Path, cutoff: float | LatticeBox) -> tuple[dict[str, Any], Columns, Columns | None]:
    """Reads manifest and columns of the crystals, and of their neighbor rows (None if they are not there or damaged).

    Raises DataError if there are no crystals or they are damaged.
    """
    crystals = read_set(folder)
    if crystals is None:
        state = "damaged" if (folder / "crystals").exists() else "not prepared"
        source = [] if folder.name in TARGET_SETS else ["--source=..."]
        where = [] if folder.parent == data_folder("") else [f"--data_dir={folder.parent}"]
        command = shlex.join(["crystalframer", "prepare", f"--target_set={folder.name}", *source, *where])
        raise DataError(f"target set {folder.name} is {state} in {folder.parent}; run {command}")
    rows = read_columns(_rows_folder(folder, crystals[0], cutoff), ROW_COLUMNS)
    return *crystals, rows[1] if rows and _rows_fit(crystals[1], rows[1]) else None


def _crystals_fit(manifest: dict[str, Any], columns: Columns) -> bool:
    """Tells whether columns of crystals, which may be from anybody, have their shapes, and rows that there are."""
    number, atoms, sites = columns["ids"].size, columns["species"].size, columns["shared_site"].size
    shapes = {
        "ids": (number,),
        "atom_offset": (number + 1,),
        "lattice": (number, 3, 3),
        "species": (atoms,),
        "position": (atoms, 3),
        "shared_site": (sites,),
        "shared_occupancy": (sites, 98),
        "labels": (number, len(manifest["targets"])),
    }
    return (
        all(columns[name].shape == shape for name, shape in shapes.items())
        and _are_offsets(columns["atom_offset"], atoms)
        and all(_are_rows(columns[name], number) for name in ("leaked", *SPLITS))
        and _are_rows(columns["shared_site"], atoms)
    )


def _rows_fit(crystals: Columns, rows: Columns) -> bool:
    """Tells likewise whether columns of neighbor rows are those of some crystals."""
    number, atoms, edges = crystals["ids"].size, crystals["species"].size, rows["reverse"].size
    shapes = {"edge_offset": (number + 1,), "count": (atoms,), "basis": (number, 3, 3)}
    shapes |= {"image": (edges, 3), "reverse": (edges,)}
    return (
        all(rows[name].shape == shape for name, shape in shapes.items())
        and _are_offsets(rows["edge_offset"], edges)
        and int(rows["count"].sum(dtype=np.int64)) == edges
    )


def _are_offsets(column: np.ndarray, end: int) -> bool:
    return column.dtype.kind == "i" and column[0] == 0 and column[-1] == end and bool((np.diff(column) >= 0).all())


def _are_rows(column: np.ndarray, number: int) -> bool:
    return column.ndim == 1 and column.dtype.kind == "i" and bool(((column >= 0) & (column < number)).all())


def read_set(folder: Path) -> tuple[dict[str, Any], Columns] | None:
    """Reads manifest and columns of the crystals in `folder`; None if there are none or they are damaged."""
    found = read_columns(folder / "crystals", SET_COLUMNS)
    with contextlib.suppress(FileError):
        return found if found and _crystals_fit(_checked(found[0], folder), found[1]) else None
    return None


def read_set_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of the crystals in `folder`, not the columns; FileError if it is missing or damaged."""
    return _checked(read_manifest(folder / "crystals"), folder)


def targets_of(manifest: dict[str, Any]) -> tuple[Target, ...]:
    """Returns the targets in the manifest of a set."""
    return tuple(Target(**target) for target in manifest["targets"])


def _checked(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a manifest that says of crystals what it should; FileError otherwise."""
    with contextlib.suppress(KeyError, TypeError):
        are_texts = [isinstance(text, str) for t in targets_of(manifest) for text in (t.name, t.field, t.unit)]
        if all(are_texts) and all(type(manifest[key]) is kind for key, kind in MANIFEST_KEYS.items()):
            return manifest
    raise FileError(f"{folder / 'crystals' / MANIFEST} is damaged: not as it was written")


def _rows_folder(folder: Path, manifest: dict[str, Any], cutoff: float | LatticeBox) -> Path:
    """Returns where the neighbor rows of the crystals are kept that a manifest is of."""
    radius = dataclasses.asdict(cutoff) if isinstance(cutoff, LatticeBox) else float(cutoff)
    digest = digest_of({"format": ROWS_FORMAT, "crystals": manifest["digest"], "cutoff": radius})
    return folder / f"rows-{digest}"


def _write_rows(folder: Path, digest: str, crystals: Columns, cutoff: float | LatticeBox, workers: int) -> None:
    """Computes the neighbor rows of all crystals and writes their columns."""
    start, number = time.perf_counter(), len(crystals["ids"])
    parts, title = parts_folder(folder, CHUNK_ATOMS), f"neighbors of {folder.parent.name}"
    require_place(folder, ROW_COLUMNS)
    begin(parts)
    chunks = itertools.groupby(range(number), lambda row: crystals["atom_offset"][row] // CHUNK_ATOMS)
    chunks_of_crystals = ([crystal_at(crystals, row) for row in rows] for _, rows in chunks)
    files = build_parts(functools.partial(_rows_of, cutoff), chunks_of_crystals, parts, title, number, workers)
    with writing(folder, {"crystals": digest, "cutoff": str(cutoff)}, ROW_COLUMNS) as temporary:
        join_parts(files, ROW_COLUMNS, temporary)
    discard(parts)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    tqdm.write(
        f"neighbors of {number:,} crystals found in {seconds:.0f} s ({number / seconds:,.0f} crystals/s), "
        f"{size / number / 1000:.1f} kB a crystal in {folder}"
    )


def _rows_of(cutoff: float | LatticeBox, crystals: list[Crystal]) -> Columns:
    """Computes the neighbor rows of a chunk of crystals."""
    return row_columns(crystals, [neighbor_rows(crystal, cutoff) for crystal in crystals])


def crystals_of(table: CrystalTable, rows: np.ndarray) -> Iterator[Crystal]:
    """Makes crystals of rows of a table, as `crystal_at`."""
    columns = {name: getattr(table, name) for name in CRYSTAL_COLUMNS}
    return (crystal_at(columns, row) for row in rows)


def crystal_at(crystals: Columns, row: int) -> Crystal:
    """Makes a crystal of the store without its occupancies."""
    atoms = slice(*crystals["atom_offset"][row : row + 2])
    id = str(crystals["ids"][row])
    return Crystal(crystals["species"][atoms], crystals["position"][atoms], crystals["lattice"][row], id=id)


# Changes


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Holds the lock for what is prepared in `folder`, where first what a killed process began is ended."""
    if folder.is_symlink():
        raise DataError(f"{folder} is a link, through which nothing is written; name the folder itself by --data_dir")
    with locked(folder.parent / f".{folder.name}.lock", remedy=ANOTHER_FOLDER):
        settle(folder)
        yield


def parts_folder(folder: Path, chunk: int) -> Path:
    """Returns where parts of `folder` are kept until it is written; what was made in other chunks is not used."""
    return folder.with_name(f".{folder.name}-by-{chunk}.parts")


@contextlib.contextmanager
def writing(folder: Path, manifest: dict[str, Any], columns: tuple[str, ...]) -> Iterator[Path]:
    """Makes a temporary folder to write columns into, which then gets a manifest and takes the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.next")
    discard(temporary)
    begin(temporary)
    try:
        yield temporary
        write_manifest(temporary, manifest)
        put(temporary, folder, columns)
    finally:
        discard(temporary)
