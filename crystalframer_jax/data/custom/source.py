"""Users' own crystals and labels in one file or folder: tables, JSON, files of ASE, pickles of the official project."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from crystalframer_jax.data.custom.ase_items import database_items, trajectory_items, xyz_items
from crystalframer_jax.data.custom.fields import CustomData, Item, Items, field, record_of, target_fields
from crystalframer_jax.data.custom.folders import ZipFolder, fail, is_structure
from crystalframer_jax.data.custom.json_items import item_of, json_items
from crystalframer_jax.data.custom.labels import number as number_in
from crystalframer_jax.data.custom.split_parts import joined, split_of, split_paths
from crystalframer_jax.data.custom.tables import Table, folder_items, id_prop_of, table_items
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, Target
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.files import sha256
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import structures_in as structures_in_file
from crystalframer_jax.text import escaped


def custom_source(path: Path, options: CustomData) -> Source:
    """Opens the crystals and labels of a file or folder; what is in it is told by names, see `READERS`.

    Labels are the fields in `options.targets`, or all that hold numbers rather than other text in the first 1000
    items, or, without such, those that hold classes: True and False, yes and no become 1 and 0. Raises DataError for
    what concerns all items: no such file, no labels, unknown names.
    """
    items = _items(path, options)
    fields, notes = target_fields(items, options)
    if options.units and len(options.units) != len(fields):
        names = ", ".join(fields)
        raise DataError(f"{items.name}: --units has {len(options.units)} units for {len(fields)} targets ({names})")
    units = options.units or ("",) * len(fields)
    # names of targets are listed with commas in configurations
    targets = tuple(Target(name.replace(",", " "), name, unit) for name, unit in zip(fields, units, strict=True))
    columns = [options.targets, options.id_column, options.structure_column, options.split_column, options.group_column]
    columns += [options.fold_column, options.test_fold] if options.test_fold else []
    checksum = hashlib.sha256(json.dumps([items.sha256, columns]).encode()).hexdigest()  # with what changes records

    def records() -> Iterator[Record | BadRecord]:
        return (record_of(item, fields, options) for item in items.read())

    return Source(targets, checksum, records, items.count, (path,), notes)


Maker = Callable[[], Crystal]  # makes the crystal of a structure, or raises CrystalError


def structures_in(path: str | os.PathLike[str]) -> list[Maker]:
    """Finds the structures in a file of any kind: what makes the crystal of each, or raises CrystalError.

    That is a structure file, or a table, JSON, archive, database or trajectory of which labels are passed over; these
    are told by their ids. Raises CrystalError if the file as a whole cannot be read.
    """
    return [make for make, _ in labelled_in(path)]


def labelled_in(path: str | os.PathLike[str], fields: tuple[str, ...] = ()) -> list[tuple[Maker, tuple[float, ...]]]:
    """Finds the structures in a file of any kind as `structures_in`, or in a folder with id_prop.csv, and their labels.

    Labels are the numbers in `fields`, NaN where there is none; the columns of an id_prop.csv without a header are
    these fields if they are as many.
    """
    path = Path(path)
    is_folder = path.is_dir() and has_table(path)
    if not is_folder and not path.name.lower().endswith(CONTAINERS):
        return [(make, (math.nan,) * len(fields)) for make in structures_in_file(path)]
    try:
        if not is_folder and not path.is_file():
            raise DataError(f"{path}: there is no such file")
        if path.suffix.lower() == ".zip" and _is_of_structures(archive := ZipFolder(path)):
            makers = [archive.loader(name, name) for name in archive.names() if is_structure(name)]
            return [(make, (math.nan,) * len(fields)) for make in makers]
        return [(_loader(item), _labels(item, fields)) for item in _items_with(path, fields).read()]
    except (DataError, OSError) as error:
        raise CrystalError(str(error)) from error


def has_table(folder: Path) -> bool:
    """Tells whether a folder holds crystals with an id_prop.csv."""
    return bool(id_prop_of(path.name for path in folder.iterdir()))


def _items_with(path: Path, fields: tuple[str, ...]) -> Items:
    """Reads the items of a file or folder; columns without names have those of the fields if they are as many."""
    try:
        return _items(path, CustomData(targets=fields))
    except DataError:
        return _items(path, CustomData())


def _labels(item: Item | BadRecord, fields: tuple[str, ...]) -> tuple[float, ...]:
    values = item.values if isinstance(item, Item) else {}
    found = (number_in(field(values, name)) for name in fields)
    return tuple(math.nan if label is None else label for label in found)


def _loader(item: Item | BadRecord) -> Maker:
    return item.load if isinstance(item, Item) else functools.partial(fail, f"{item.where}: {item.reason}")


def _items(path: Path, options: CustomData) -> Items:
    """Reads the items of a file or folder, by the reader for its kind."""
    lower = path.name.lower()
    if options.structure_column and not lower.endswith((*TABLES, ".zip")) and not (path.is_dir() and split_paths(path)):
        raise DataError(f"{path}: --structure_column is for CSV files; leave it out")
    if path.is_dir():
        return _items_of_folder(path, options)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder")
    for endings, reader in READERS.items():
        if lower.endswith(endings):
            return reader(path, options)
    raise DataError(f"{path}: unknown kind of data; give {ACCEPTED}")


def _items_of_folder(folder: Path, options: CustomData) -> Items:
    names = sorted(path.name for path in folder.iterdir())
    if id_prop := id_prop_of(names):
        return folder_items(Table(folder / id_prop), options)
    pickles = {split: folder / split / "raw" / "raw_data.pkl" for split in SPLITS}
    pickles = {split: file for split, file in pickles.items() if file.is_file()}
    if pickles:
        return _pickle_items(folder, options, pickles)
    if parts := split_paths(folder):
        return joined(folder, {split: _items(part, options) for split, part in parts.items()})
    endings = tuple(ending for group in READERS for ending in group)
    files = [name for name in names if name.lower().endswith(endings) and (folder / name).is_file()]
    hint = f"; or give one of its files: {', '.join(files[:5])}" if files else ""
    raise DataError(f"{folder}: no id_prop.csv and no train/raw/raw_data.pkl in it; add a file with the labels{hint}")


def _csv_items(file: Path, options: CustomData) -> Items:
    return _items_of_table(Table(file), file.name, options)


def _items_of_table(table: Table, name: str, options: CustomData) -> Items:
    """Reads a table, which may lack a header if its name begins with id_prop."""
    return (folder_items if name.lower().startswith("id_prop") else table_items)(table, options)


def _zip_items(file: Path, options: CustomData) -> Items:
    """Reads an archive with a table and structure files, or with one JSON file; it is not unpacked.

    Of several tables, each is for the split that it, or its folder, is named by.
    """
    archive = ZipFolder(file)
    names = archive.names()
    found = [name for name in names if id_prop_of([name.rpartition("/")[2]])]
    tables = found or [name for name in names if name.lower().endswith(TABLES)]
    has_json = any(name.lower().endswith(".json") for name in names)
    if not tables or (has_json and not found):
        if _is_of_structures(archive):
            raise DataError(f"{file}: no table of labels in it; add id_prop.csv")
        return json_items(file, options)
    if len(tables) == 1:
        return _zipped_table(file, tables[0], options)
    parts = {}
    for name in tables:
        folder, _, last = name.rpartition("/")
        parts[split_of(folder.rpartition("/")[2], True) or split_of(last, False)] = name
    if len(parts) < len(tables) or "train" not in parts or "" in parts:
        raise DataError(f"{file}: {len(tables)} tables of labels in it, not one for each split; unpack it and give one")
    return joined(file, {split: _zipped_table(file, parts[split], options) for split in SPLITS if split in parts})


def _zipped_table(file: Path, name: str, options: CustomData) -> Items:
    inner, slash, last = name.rpartition("/")
    return _items_of_table(Table(file, ZipFolder(file, inner + slash), last), last, options)


def _is_of_structures(archive: ZipFolder) -> bool:
    """Tells whether an archive has structure files and no JSON."""
    names = archive.names()
    return any(map(is_structure, names)) and not any(name.lower().endswith(".json") for name in names)


def _pickle_items(path: Path, options: CustomData, files: Mapping[str, Path] | None = None) -> Items:
    """Reads the records of one pickled list, or of the `files` of the official project, one for each split."""
    if not options.allow_pickle:
        raise DataError(
            f"{path}: pickle files can run programs when they are read; if you trust this one, add --allow_pickle, "
            "which reads no more than lists, numbers and structures"
        )
    from crystalframer_jax.data.io.pickles import load_pickle  # imports pymatgen

    files = files or {"": path}
    digest = hashlib.sha256("\n".join(f"{split} {sha256(file)}" for split, file in files.items()).encode())
    load = functools.cache(load_pickle)  # slow, and all of a file is in memory anyway

    def read() -> Iterator[Item | BadRecord]:
        for split, file in files.items():
            records = load(file)
            if not isinstance(records, list):
                raise DataError(f"{file}: holds a {type(records).__name__}, not a list of records; pickle such a list")
            for number, record in enumerate(records, 1):
                found = record if isinstance(record, dict) else f"is not a dict but of type {type(record).__name__}"
                id = f"{split or escaped(file.name)}:{number}"
                yield item_of(found, f"{file} record {number}", id, options, split)

    return Items(str(path), digest.hexdigest(), read)


TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
JSON = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
DATABASES, TRAJECTORIES = (".db",), (".traj",)
READERS: dict[tuple[str, ...], Callable[[Path, CustomData], Items]] = {
    TABLES: _csv_items,
    (".extxyz", ".xyz", ".extxyz.gz", ".xyz.gz"): xyz_items,
    JSON: json_items,
    (".zip",): _zip_items,
    DATABASES: database_items,
    TRAJECTORIES: trajectory_items,
    (".pkl", ".pickle"): _pickle_items,
}
CONTAINERS = (*TABLES, *JSON, ".zip", *DATABASES, *TRAJECTORIES)
ACCEPTED = (
    "a folder with id_prop.csv, or with train, val and test; a CSV file with a column of structure files (.csv, .tsv), "
    "extended XYZ (.extxyz, .xyz), JSON (.json, .jsonl), any of these as .gz; a .zip of structures and their table, or "
    "of JSON; an ASE database or trajectory (.db, .traj); or pickles of the official project"
)
