"""What users' own data say of a crystal: its labels, id, split and group, read from named fields; which are labels."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from crystalframer_jax.data.records import BadRecord, DataError, Record, parse_label, text_of
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import brief, escaped, unsafe_character

MOST_FIELDS = 10_000  # with those of nested objects
LONGEST_NAME = 200  # characters, of a field
SAMPLE = 1000  # items that are looked at to tell what their fields hold
MISSING = ("", "-", "na", "n/a", "nan", "none", "null")  # what stands for an unknown label, in small letters
ID_NAMES = ("id", "material_id", "mat_id", "jid", "mp_id", "mpid", "structure_id", "_id", "uid")
SPLIT_NAMES = {
    **dict.fromkeys(MISSING, ""),
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True)
class CustomData:
    """How to read a user's own data; a field is a column or a key."""

    targets: tuple[str, ...] = ()  # fields with labels; empty: all numeric ones
    units: tuple[str, ...] = ()  # one for each target, or none
    structure_column: str = ""  # of a CSV file, with the names of structure files or the text of a CIF
    id_column: str = ""  # field with the ids; empty: one named as in ID_NAMES
    split_column: str = "split"  # field with train, val or test; it may be absent if it is the default
    group_column: str = ""  # field whose value is shared by crystals that must stay in one split
    allow_pickle: bool = False

    def id_names(self, usual: Iterable[str] = ID_NAMES) -> tuple[str, ...]:
        """Lists the fields in which to look for the id: the one named, else the usual ones."""
        return (self.id_column,) if self.id_column else tuple(usual)


@dataclasses.dataclass(frozen=True)
class Item:
    """One crystal as its file gives it, see `Record`, with the named values that are not yet understood."""

    id: str
    where: str
    load: Callable[[], Crystal]
    values: Mapping[str, Any]
    split: str = ""  # if the folder says it
    file: Path | None = None  # with the structure, if that is not in the file of the labels


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of a file or folder."""

    name: str  # of the file, for messages
    sha256: str  # of all that is read
    read: Callable[[], Iterator[Item | BadRecord]]  # starts a new pass over them
    count: int | None = None
    no_labels: tuple[str, ...] = ID_NAMES  # fields that are no labels although they may hold numbers


def target_fields(items: Items, options: CustomData) -> tuple[str, ...]:
    """Chooses the fields that are targets; DataError if there are none, or a name in the options is not found."""
    if len(set(options.targets)) < len(options.targets):
        raise DataError(f"{items.name}: --targets={','.join(options.targets)} names a target twice")
    columns = {option: getattr(options, option) for option in ("id_column", "group_column", "split_column")}
    columns = {option: name for option, name in columns.items() if name not in ("", getattr(CustomData, option))}
    found = _survey(items, options.targets, columns.values())
    known = ", ".join(map(short, list(found)[:30])) + (", ..." if len(found) > 30 else "") or "nothing but structures"
    for name in options.targets:
        if not (name in found and found[name]["number"]):
            problem = "there are no numbers in" if name in found else "there is no"
            raise DataError(f"{items.name}: {problem} field {name!r} of --targets; choose among {known}")
    for option, name in columns.items():
        if name not in found:
            raise DataError(f"{items.name}: there is no field --{option}={name}; choose among {known}")
    no_labels = {*items.no_labels, options.id_column, options.group_column, options.split_column}
    fields = options.targets or tuple(
        name
        for name, seen in found.items()
        if seen["number"] > seen["other"] and not seen["nested"] and name not in no_labels
    )
    if not fields:
        raise DataError(f"{items.name}: no field holds numbers as labels ({known}); add one or name --targets")
    for name in fields:
        if unsafe := unsafe_character(name):
            problem = f"the name of field {short(escaped(name))} has the character {unsafe}"
            raise DataError(f"{items.name}: {problem}; rename it, or name --targets without it")
    return fields


def _survey(items: Items, targets: Iterable[str], columns: Iterable[str]) -> dict[str, collections.Counter[str]]:
    """Counts the kinds of values in the fields of the first items, and of more until all named fields are found.

    Raises DataError if no item is usable.
    """
    found: dict[str, collections.Counter[str]] = {}
    count, bad = 0, []
    for count, item in enumerate(items.read(), 1):
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            _look_at(item.values, found)
        has_targets = all(name in found and found[name]["number"] for name in targets)
        if count >= SAMPLE and has_targets and found.keys() >= set(columns):
            break
    if not count:
        raise DataError(f"{items.name}: there is nothing in it; give a file with structures and labels")
    if len(bad) == count:
        first = f"{bad[0].where}: {bad[0].reason}"
        raise DataError(f"{items.name}: none of {count} records can be used, first: {first}")
    return found


def _look_at(values: Mapping[str, Any], found: dict[str, collections.Counter[str]], prefix: str = "") -> None:
    """Counts the kinds of the values of an item, and of those of nested objects, see `field`."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or len(name) > LONGEST_NAME or (len(found) >= MOST_FIELDS and name not in found):
            continue  # which also ends what holds itself
        found.setdefault(name, collections.Counter(nested=bool(prefix)))[_kind(value)] += 1
        if isinstance(value, Mapping):
            _look_at(value, found, f"{name}.")


def record_of(item: Item | BadRecord, fields: tuple[str, ...], options: CustomData) -> Record | BadRecord:
    """Makes the record of an item, with the labels in `fields`."""
    if isinstance(item, BadRecord):
        return item
    labels = []
    for name in fields:
        value = field(item.values, name)
        if (label := number(value)) is None:
            problem = f"{name} is {short(brief(value))}; write a number with a decimal point, or na if unknown"
            return BadRecord(item.id, item.where, problem)
        labels.append(label)
    word = item.split or text(item.values, options.split_column).lower()
    if (split := SPLIT_NAMES.get(word)) is None:
        problem = f"split is {short(brief(word))}; write train, val or test, or name another --split_column"
        return BadRecord(item.id, item.where, problem)
    return Record(item.id, item.where, item.load, tuple(labels), split, text(item.values, options.group_column))


def field(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of that name, or None; a dot leads into a nested object, as in "properties.band_gap"."""
    if name in values:
        return values[name]
    first, _, rest = name.partition(".")
    nested = values.get(first)
    return field(nested, rest) if rest and isinstance(nested, Mapping) else None


def text(values: Mapping[str, Any], *names: str) -> str:
    """Returns the first text (an id, a group) among the values of these names that is not blank, else ""."""
    found = (field(values, name) for name in names if name)
    return next(filter(None, map(text_of, found)), "")


def short(text: str) -> str:
    """Returns the beginning of a text, for messages."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def is_cif_text(value: Any) -> TypeGuard[str]:
    """Tells whether a value is the text of a CIF."""
    return isinstance(value, str) and "data_" in value and "\n" in value.strip()


def number(value: Any) -> float | None:
    """Reads a label as a number, NaN where it is unknown; None for what is no number and no missing marker."""
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    if isinstance(value, bool | np.bool_) or (isinstance(value, str) and "_" in value):  # Python reads 1_5 as 15
        return None
    try:
        return parse_label(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def _kind(value: Any) -> str:
    """Returns "number" for finite numbers and their texts, "unknown" for unknown labels, "other" for the rest."""
    found = number(value)
    return "other" if found is None else "number" if math.isfinite(found) else "unknown"


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number, or the text of one."""
    return _kind(value) == "number"
