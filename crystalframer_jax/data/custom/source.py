"""Users' own crystals and labels in one file or folder: tables, extended XYZ, JSON, pickles of the official project."""

import functools
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crystalframer_jax.data.custom.fields import CustomData, Item, Items, is_cif_text, record_of, target_fields, text
from crystalframer_jax.data.custom.tables import folder_items, limited_lines, table_items
from crystalframer_jax.data.io.pickles import load_pickle
from crystalframer_jax.data.io.streams import json_lines, json_records
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, Target
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.structures import FLAT, JARVIS, PYMATGEN, dict_loader, from_dict, from_pymatgen, from_text
from crystalframer_jax.files import sha256
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.extxyz import LONGEST_COMMENT, Frame, frames
from crystalframer_jax.text import LONGEST, escaped

STRUCTURE_KEYS = ("structure", "atoms", "cif")
MAY_LACK = ("charge", "cartesian")  # of the keys of a structure
NOT_IN_INFO = ("Lattice", "Properties", "pbc")  # what ASE takes out of the comment line for itself


def custom_source(path: Path, options: CustomData) -> Source:
    """Opens the crystals and labels of a file or folder; what is in it is told by names, see `READERS`.

    Labels are the fields in `options.targets`, or all that hold numbers rather than other text in the first 1000
    items. Raises DataError for what concerns all items: no such file, no labels, unknown names.
    """
    items = _items(path, options)
    fields = target_fields(items, options)
    if options.units and len(options.units) != len(fields):
        names = ", ".join(fields)
        raise DataError(f"{items.name}: --units has {len(options.units)} units for {len(fields)} targets ({names})")
    units = options.units or ("",) * len(fields)
    # names of targets are listed with commas in configurations
    targets = tuple(Target(name.replace(",", " "), name, unit) for name, unit in zip(fields, units, strict=True))
    columns = (options.targets, options.id_column, options.structure_column, options.split_column, options.group_column)
    checksum = hashlib.sha256(json.dumps([items.sha256, columns]).encode()).hexdigest()  # with what changes records

    def records() -> Iterator[Record | BadRecord]:
        return (record_of(item, fields, options) for item in items.read())

    return Source(targets, checksum, records, items.count, (path,))


def _items(path: Path, options: CustomData) -> Items:
    """Reads the items of a file or folder, by the reader for its kind."""
    lower = path.name.lower()
    if options.structure_column and not lower.endswith((".csv", ".tsv")):
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
    if (folder / "id_prop.csv").is_file():
        return folder_items(folder, options)
    pickles = {split: folder / split / "raw" / "raw_data.pkl" for split in SPLITS}
    pickles = {split: file for split, file in pickles.items() if file.is_file()}
    if pickles:
        return _pickle_items(folder, options, pickles)
    endings = tuple(ending for group in READERS for ending in group)
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(endings))
    hint = f"; or give one of its files: {', '.join(files[:5])}" if files else ""
    raise DataError(f"{folder}: no id_prop.csv and no train/raw/raw_data.pkl in it; add a file with the labels{hint}")


def _xyz_items(file: Path, options: CustomData) -> Items:
    """Reads the frames of an extended XYZ file, with the values of their comment lines."""
    try:
        from ase.io.extxyz import key_val_str_to_dict
    except ImportError as error:
        raise DataError(f"{file}: reading extended XYZ needs ASE; pip install ase") from error

    def item(frame: Frame) -> Item | BadRecord:
        lines, where, id = frame.lines, f"{file}:{frame.line}", f"{escaped(file.name)}:{frame.line}"
        if frame.problem:
            return BadRecord(id, where, frame.problem)
        try:
            found = key_val_str_to_dict(lines[1])
        except Exception as error:  # whatever the parser raises
            return BadRecord(id, where, f"comment line not understood ({str(error)[:LONGEST]}); correct it")
        values = {key: value for key, value in found.items() if key not in NOT_IN_INFO}
        id = _xyz_id(values, lines[1], options.id_names()) or id
        return Item(id, where, functools.partial(from_text, "".join(lines), where, False, id), values)

    count = sum(1 for _ in _frames(file))
    return Items(str(file), sha256(file), lambda: map(item, _frames(file)), count)


def _frames(file: Path) -> Iterator[Frame]:
    """Yields the frames of a file, also packed by gzip; of wrong ones why they are."""
    opened = gzip.open if file.name.lower().endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8-sig", errors="replace") as stream:
        yield from frames(limited_lines(stream, file, LONGEST_COMMENT))


def _xyz_id(values: Mapping[str, Any], comment: str, names: tuple[str, ...]) -> str:
    """Returns the id of a frame as it is written: ASE makes 7 of 007."""
    for name in names:
        if found := text(values, name):
            written = re.search(rf"(?:^|\s){re.escape(name)}\s*=\s*[\"']?([^\s\"']+)", comment)
            return found if isinstance(values[name], str) or not written else written[1]
    return ""


def _json_items(file: Path, options: CustomData) -> Items:
    """Reads the records of a JSON array (also gzipped, or alone in a zip archive) or of JSON lines (also gzipped)."""

    def read() -> Iterator[Item | BadRecord]:
        has_lines = file.name.lower().endswith((".jsonl", ".jsonl.gz"))
        for number, record in json_lines(file) if has_lines else json_records(file):
            place = f"{file}:{number}" if has_lines else f"{file} record {number}"
            yield _item(record, place, f"{escaped(file.name)}:{number}", options)

    return Items(str(file), sha256(file), read)


def _pickle_items(path: Path, options: CustomData, files: Mapping[str, Path] | None = None) -> Items:
    """Reads the records of one pickled list, or of the `files` of the official project, one for each split."""
    if not options.allow_pickle:
        raise DataError(
            f"{path}: pickle files can run programs when they are read; if you trust this one, add --allow_pickle, "
            "which reads no more than lists, numbers and structures"
        )
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
                yield _item(found, f"{file} record {number}", id, options, split)

    return Items(str(path), digest.hexdigest(), read)


def _item(
    record: dict[str, Any] | str, where: str, fallback: str, options: CustomData, split: str = ""
) -> Item | BadRecord:
    """Makes the item of a record, or of the reason why it is none; `fallback` is its id if it has none."""
    if isinstance(record, str):
        return BadRecord(fallback, where, record)
    id = text(record, *options.id_names()) or fallback
    keys, load = _structure(record, where, id)
    if load is None:
        remedy = "give it under structure, atoms or cif, or as lattice, species and frac_coords"
        return BadRecord(id, where, f"no structure; {remedy}")
    return Item(id, where, load, {key: value for key, value in record.items() if key not in keys}, split)


def _structure(record: dict[str, Any], where: str, id: str) -> tuple[tuple[str, ...], Callable[[], Crystal] | None]:
    """Returns the keys that the structure of a record is made of, and what makes it; None if it has none."""
    for key in STRUCTURE_KEYS:
        value = record.get(key)
        if is_cif_text(value):
            return (key,), functools.partial(from_text, value, where, True, id)
        if isinstance(value, Mapping):
            return (key,), dict_loader(value, id)
        if hasattr(value, "sites"):
            return (key,), functools.partial(from_pymatgen, value, id)
    for keys in (PYMATGEN, FLAT, JARVIS):  # records that are structures themselves
        if all(key in record or key in MAY_LACK for key in keys):
            return keys, functools.partial(from_dict, {key: record[key] for key in keys if key in record}, id)
    return (), None


READERS: dict[tuple[str, ...], Callable[[Path, CustomData], Items]] = {
    (".csv", ".tsv"): table_items,
    (".extxyz", ".xyz", ".extxyz.gz", ".xyz.gz"): _xyz_items,
    (".json", ".json.gz", ".zip", ".jsonl", ".jsonl.gz"): _json_items,
    (".pkl", ".pickle"): _pickle_items,
}
ACCEPTED = (
    "a folder with id_prop.csv, a CSV file with a column of structure files (.csv, .tsv), extended XYZ (.extxyz, "
    ".xyz), JSON (.json, .json.gz, .zip, .jsonl, .jsonl.gz), or pickles of the official project"
)
