"""What users' own data say of a crystal: its labels, id, split and group, read from named fields."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from crystalframer_jax.data.records import BadRecord, Record, parse_label
from crystalframer_jax.structures.crystal import Crystal, CrystalError

SAMPLE = 1000  # items that are looked at to tell what their fields hold
MISSING = ("", "-", "na", "n/a", "nan", "none", "null")  # what stands for an unknown label, in small letters
ID_NAMES = ("id", "material_id", "mat_id", "jid", "mp_id", "mpid", "structure_id", "_id", "uid")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True)
class OwnData:
    """How to read a user's own data.

    Attributes:
      targets: names of the fields (columns, keys) with labels; empty: all numeric ones.
      units: one for each target, or none.
      structure_column: column of a CSV file with the names of structure files, or with the text of a CIF.
      id_column: field with the ids; by default one named as in `ID_NAMES`.
      split_column: field with train, val or test; it may be absent if it is the default.
      group_column: field whose value is shared by crystals that must stay in one split.
      allow_pickle: read pickle files.
    """

    targets: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    structure_column: str = ""
    id_column: str = ""
    split_column: str = "split"
    group_column: str = ""
    allow_pickle: bool = False

    def id_names(self, usual: Iterable[str] = ID_NAMES) -> tuple[str, ...]:
        """The fields in which to look for the id: the one named, else the usual ones."""
        return (self.id_column,) if self.id_column else tuple(usual)


@dataclasses.dataclass(frozen=True)
class Item:
    """One crystal as its file gives it: id, place, structure (see `Record`), the split if its folder says it, and
    the named values, not yet understood.
    """

    id: str
    where: str
    structure: Any
    values: Mapping[str, Any]
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of a file or folder.

    Attributes:
      name: of the file, for messages.
      sha256: checksum of all that is read.
      read: starts a new pass over them.
      count: their number, if known.
      no_labels: names of fields that are no labels although they may hold numbers.
    """

    name: str
    sha256: str
    read: Callable[[], Iterator[Item | BadRecord]]
    count: int | None = None
    no_labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StructureText:
    """The text of a CIF or of one frame of extended XYZ, to be parsed when called."""

    text: str
    where: str
    is_cif: bool

    def __call__(self) -> Crystal:
        """The crystal; raises CrystalError."""
        from crystalframer_jax.structures.files import cif_crystals, extxyz_crystals

        crystals = (cif_crystals if self.is_cif else extxyz_crystals)(self.text, self.where)
        if len(crystals) != 1:
            raise CrystalError(f"{self.where}: has {len(crystals)} structures for one label; make it one")
        return crystals[0]


def is_cif_text(value: Any) -> TypeGuard[str]:
    """Whether a value is the text of a CIF."""
    return isinstance(value, str) and "data_" in value and "\n" in value.strip()


def record_of(item: Item, fields: tuple[str, ...], options: OwnData) -> Record | BadRecord:
    """The record of an item, with the labels in `fields`."""
    try:
        labels = tuple(_label(item.values, name) for name in fields)
        split = item.split or _split(field(item.values, options.split_column))
    except ValueError as error:
        return BadRecord(item.id, item.where, str(error))
    group = text(field(item.values, options.group_column))
    return Record(item.id, item.where, item.structure, labels, split, group)


def field(values: Mapping[str, Any], name: str) -> Any:
    """The value of that name, or None; a dot leads into a nested object, as in "properties.band_gap"."""
    if not name:
        return None
    if name in values:
        return values[name]
    first, _, rest = name.partition(".")
    nested = values.get(first)
    return field(nested, rest) if rest and isinstance(nested, Mapping) else None


def text(value: Any) -> str:
    """An id or group as text; "" for None and NaN."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def short(text: str) -> str:
    """The beginning of a text, for messages."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def first_text(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first text among the values of these names that is not blank; "" if there is none."""
    return next((found for name in names if (found := text(field(values, name)))), "")


def number(value: Any) -> float:
    """A label as a number, NaN where it is unknown; ValueError for what is neither a number nor a missing marker."""
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return math.nan
    if isinstance(value, bool | np.bool_) or (isinstance(value, str) and "_" in value):  # Python reads 1_5 as 15
        raise ValueError("no number")
    try:
        return parse_label(float(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("no number") from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, or the text of one."""
    try:
        return math.isfinite(number(value))
    except ValueError:
        return False


def _label(values: Mapping[str, Any], name: str) -> float:
    """The label of that name; ValueError naming it."""
    value = field(values, name)
    try:
        return number(value)
    except ValueError as error:
        raise ValueError(
            f"{name} is {short(repr(value))}; write a number with a decimal point, or na if unknown"
        ) from error


def _split(value: Any) -> str:
    """train, val or test, "" if there is none; ValueError for anything else."""
    found = text(value).lower()
    if found in MISSING:
        return ""
    if found not in SPLIT_NAMES:
        raise ValueError(f"split is {short(repr(found))}; write train, val or test, or name another --split_column")
    return SPLIT_NAMES[found]
