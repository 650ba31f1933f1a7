"""The prepared store: a target set with its neighbour rows, computed once and memory-mapped from then on."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from tqdm import tqdm

from crystalframer_jax.crystal import Crystal, CrystalError
from crystalframer_jax.data.registry import Target, TargetSet
from crystalframer_jax.data.splits import split_80_10_10
from crystalframer_jax.data.table import COLUMNS, CrystalTable, make_table
from crystalframer_jax.files import locked, sha256
from crystalframer_jax.neighbors import LatticeBox, NeighborRows, neighbor_rows

FORMAT = 2  # to be raised when neighbour rows or columns change
MAX_BAD_SHARE = 0.01  # of records that cannot be used, before preparation stops


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared target set with the labels that were asked for."""

    name: str
    table: CrystalTable
    targets: tuple[Target, ...]
    labels: np.ndarray  # [C, T] label units, NaN where unknown
    splits: dict[str, np.ndarray]  # row numbers of the table


def open_dataset(
    target_set: TargetSet, names: tuple[str, ...], cutoff: float | LatticeBox, data_dir: str = ""
) -> Dataset:
    """The prepared target set with the targets `names`; prepared first if it is not in `data_dir` yet.

    `cutoff` is that of the neighbour rows, see `neighbor_rows`; an empty `data_dir` stands for the user's cache folder.
    """
    targets = tuple(target_set.target(name) for name in names)
    root = Path(data_dir).expanduser() if data_dir else platformdirs.user_cache_path("crystalframer_jax")
    fields = [target.field for target in target_set.targets]
    key = {"format": FORMAT, "source": target_set.sha256(), "targets": fields, "cutoff": _as_json(cutoff)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"{target_set.name}-{digest}"
    columns = _read(folder)
    if columns is None:
        with locked(root / f".{folder.name}.lock"):
            columns = _read(folder)  # another process may just have prepared it
            if columns is None:
                _prepare(target_set, cutoff, folder)
                columns = _read(folder)
    if columns is None:
        raise OSError(f"{folder} was written but does not read back as written; check the disk")
    labels, row_of_record = np.asarray(columns["labels"]), np.asarray(columns["row_of_record"])
    chosen = [target_set.targets.index(target) for target in targets]
    return Dataset(
        name=target_set.name,
        table=CrystalTable(**{name: columns[name] for name in COLUMNS}),
        targets=targets,
        labels=labels[row_of_record >= 0][:, chosen],
        splits=_usable(split_80_10_10(labels), row_of_record),
    )


def parse_label(value: Any) -> float:
    """A label as a number; NaN for what sources write where there is none: None, 'na', '', infinities."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _as_json(cutoff: float | LatticeBox) -> Any:
    return dataclasses.asdict(cutoff) if isinstance(cutoff, LatticeBox) else float(cutoff)


def _prepare(target_set: TargetSet, cutoff: float | LatticeBox, folder: Path) -> None:
    """Compute the neighbour rows of all records and write the store, complete or not at all."""
    crystals: list[Crystal] = []
    rows: list[NeighborRows] = []
    labels, row_of_record, bad = [], [], []
    records = list(target_set.records())
    start = time.perf_counter()
    progress = tqdm(records, desc=f"preparing {target_set.name}", unit=" crystals", dynamic_ncols=True, disable=None)
    for record in progress:
        labels.append([parse_label(record.get(target.field)) for target in target_set.targets])
        try:
            crystal = crystal_of_record(record)
            rows.append(neighbor_rows(crystal, cutoff))
        except CrystalError as error:
            bad.append(str(error))
            row_of_record.append(-1)
            continue
        row_of_record.append(len(crystals))
        crystals.append(crystal)
    if len(bad) > MAX_BAD_SHARE * len(records):
        raise CrystalError(f"{target_set.name}: {len(bad)} of {len(records)} records cannot be used, first: {bad[0]}")
    for reason in bad:
        tqdm.write(f"skipped {reason}")
    table = make_table(crystals, rows)
    columns = {name: getattr(table, name) for name in COLUMNS}
    columns["labels"] = np.array(labels)  # of all records; a record that could not be used has row -1
    columns["row_of_record"] = np.array(row_of_record, dtype=np.int64)
    _write(folder, columns)
    seconds = time.perf_counter() - start
    tqdm.write(f"prepared {target_set.name}: {len(crystals):,} crystals in {seconds:.0f} s, kept in {folder}")


def crystal_of_record(record: dict[str, Any]) -> Crystal:
    """The crystal of a JSON record with id, lattice (rows, Å), species (symbols) and frac_coords."""
    from pymatgen.core import Element

    where = record.get("id", "record")
    try:
        lattice = np.array(record["lattice"], dtype=np.float64).reshape(3, 3)
        positions = np.array(record["frac_coords"], dtype=np.float64).reshape(-1, 3) @ lattice
        species = np.array([Element(symbol.strip()).Z for symbol in record["species"]])
    except (KeyError, TypeError, ValueError) as error:
        raise CrystalError(f"{where}: not a crystal record with lattice, species and frac_coords ({error})") from error
    return Crystal(species, positions, lattice, id=where)


def _usable(splits: dict[str, np.ndarray], row_of_record: np.ndarray) -> dict[str, np.ndarray]:
    """Splits of records turned into rows of the table; records that could not be used drop out."""
    rows = {name: row_of_record[records] for name, records in splits.items()}
    return {name: row[row >= 0] for name, row in rows.items()}


def _write(folder: Path, columns: dict[str, np.ndarray]) -> None:
    """Write all columns and their checksums to a temporary folder, then rename it."""
    temporary = folder.with_name(f".{folder.name}.new")  # of this process alone: it holds the lock
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        checksums = {}
        for name, column in columns.items():
            np.save(temporary / f"{name}.npy", column, allow_pickle=False)
            checksums[name] = sha256(temporary / f"{name}.npy")
        (temporary / "manifest.json").write_text(json.dumps(checksums, indent=1))
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """The memory-mapped columns, or None if the store is missing or not as it was written."""
    try:
        checksums = json.loads((folder / "manifest.json").read_text())
        if any(sha256(folder / f"{name}.npy") != checksum for name, checksum in checksums.items()):
            return None
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in checksums}
    except (OSError, ValueError):
        return None
