"""Users' own crystals and labels: which format they are in, and which of their fields are targets."""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crystalframer_jax.data.custom.fields import SAMPLE, CustomData, Items, number, record_of
from crystalframer_jax.data.custom.formats import json_items, pickle_items, xyz_items
from crystalframer_jax.data.custom.tables import folder_items, table_items
from crystalframer_jax.data.records import BadRecord, DataError, Source, Target
from crystalframer_jax.data.splits import SPLITS

__all__ = ["CustomData", "custom_source"]

READERS: dict[tuple[str, ...], Callable[[Path, CustomData], Items]] = {
    (".csv", ".tsv"): table_items,
    (".extxyz", ".xyz"): xyz_items,
    (".json", ".json.gz", ".zip", ".jsonl", ".jsonl.gz"): json_items,
    (".pkl", ".pickle"): pickle_items,
}
ACCEPTED = (
    "a folder with id_prop.csv, a CSV file with a column of structure files (.csv, .tsv), extended XYZ (.extxyz, "
    ".xyz), JSON (.json, .json.gz, .zip, .jsonl, .jsonl.gz), or pickles of the official project"
)


def custom_source(path: Path, options: CustomData) -> Source:
    """Opens the crystals and labels of a file or folder; what is in it is told by names, see `READERS`.

    Labels are the fields in `options.targets`, or all that hold numbers rather than other text in the first 1000
    items. Raises DataError for what concerns all items: no such file, no labels, unknown names.
    """
    items = _items(path, options)
    fields = _target_fields(items, options)
    if options.units and len(options.units) != len(fields):
        names = ", ".join(fields)
        raise DataError(f"{items.name}: --units has {len(options.units)} units for {len(fields)} targets ({names})")
    units = options.units or ("",) * len(fields)
    # names of targets are listed with commas in configurations
    targets = tuple(Target(name.replace(",", " "), name, unit) for name, unit in zip(fields, units, strict=True))
    columns = (options.targets, options.id_column, options.structure_column, options.split_column, options.group_column)
    checksum = hashlib.sha256(json.dumps([items.sha256, columns]).encode()).hexdigest()  # with what changes records
    return Source(targets, checksum, lambda: (record_of(item, fields, options) for item in items.read()), items.count)


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
        return pickle_items(folder, options, pickles)
    endings = tuple(ending for group in READERS for ending in group)
    files = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(endings))
    hint = f"; or give one of its files: {', '.join(files[:5])}" if files else ""
    raise DataError(f"{folder}: no id_prop.csv and no train/raw/raw_data.pkl in it; add a file with the labels{hint}")


def _target_fields(items: Items, options: CustomData) -> tuple[str, ...]:
    """Chooses the fields that are targets; DataError if there are none, or a name in the options is not found."""
    if len(set(options.targets)) < len(options.targets):
        raise DataError(f"{items.name}: --targets={','.join(options.targets)} names a target twice")
    survey = _survey(items, options)
    names = list(survey.is_nested)
    known = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "") or "nothing but structures"
    for name in options.targets:
        if not survey.numbers[name]:
            problem = "there are no numbers in" if name in names else "there is no"
            raise DataError(f"{items.name}: {problem} field {name!r} of --targets; choose among {known}")
    for option, name in _named_columns(options).items():
        if name not in names:
            raise DataError(f"{items.name}: there is no field --{option}={name}; choose among {known}")
    no_labels = {*items.no_labels, options.id_column, options.group_column, options.split_column}
    fields = options.targets or tuple(
        name
        for name in names
        if survey.numbers[name] > survey.others[name] and not survey.is_nested[name] and name not in no_labels
    )
    if not fields:
        raise DataError(f"{items.name}: no field holds numbers as labels ({known}); add one or name --targets")
    return fields


def _named_columns(options: CustomData) -> dict[str, str]:
    """Returns the columns besides targets that the user has named."""
    columns = {name: getattr(options, name) for name in ("id_column", "group_column", "split_column")}
    return {option: name for option, name in columns.items() if name != getattr(CustomData, option) and name}


@dataclasses.dataclass
class _Survey:
    """What stands in the fields of the first items: how many numbers and other values (unknown labels are neither)."""

    is_nested: dict[str, bool] = dataclasses.field(default_factory=dict)  # for each name
    numbers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Counts the values of an item, and those of nested objects, see `field`."""
        for key, value in values.items():
            name = f"{prefix}{key}"
            self.is_nested[name] = bool(prefix)
            try:
                self.numbers[name] += math.isfinite(number(value))
            except ValueError:
                self.others[name] += 1
            if isinstance(value, Mapping):
                self.add(value, f"{name}.")


def _survey(items: Items, options: CustomData) -> _Survey:
    """Looks at the first items, and at more until all names in the options are found; DataError if none is usable."""
    survey, columns = _Survey(), set(_named_columns(options).values())
    count, num_used, first_bad = 0, 0, ""
    for count, item in enumerate(items.read(), 1):
        if isinstance(item, BadRecord):
            first_bad = first_bad or f"{item.where}: {item.reason}"
        else:
            num_used += 1
            survey.add(item.values)
        has_all = all(survey.numbers[name] for name in options.targets) and survey.is_nested.keys() >= columns
        if count >= SAMPLE and has_all:
            break
    if not count:
        raise DataError(f"{items.name}: there is nothing in it; give a file with structures and labels")
    if not num_used:
        raise DataError(f"{items.name}: none of {count} records can be used, first: {first_bad}")
    return survey
