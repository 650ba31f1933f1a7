"""What users' own data say of a crystal: its labels, id, split and group, read from named fields; which are labels."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from crystalframer_jax.data.custom.labels import MISSING, class_of, complaint, fault, is_class_word, kind, number
from crystalframer_jax.data.records import BadRecord, DataError, Record, text_of
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.text import brief, escaped, unsafe_character

MOST_FIELDS = 10_000  # with those of nested objects
LONGEST_NAME = 200  # characters, of a field
SAMPLE = 1000  # items that are looked at to tell what their fields hold
ID_NAMES = ("id", "material_id", "mat_id", "jid", "mp_id", "mpid", "structure_id", "_id", "uid")
COUNTERS = ("index", "level_0", "Unnamed: 0")  # fields in which pandas numbers its rows
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
    fold_column: str = "fold"  # field with the fold of a cross-validation; no label
    test_fold: str = ""  # the fold that is the test set, the others are for training; empty: there are no folds
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


@dataclasses.dataclass
class Seen:
    """What the values of a field are, in the items that were looked at."""

    nested: bool = False  # in an object
    number: int = 0
    unknown: int = 0
    other: int = 0
    faulty: int = 0  # of `other`, those that look like labels: see `complaint`
    words: int = 0  # of `other`, those that name a class: True, False, yes, no
    binary: int = 0  # of `number`, 0 and 1
    first: str = ""  # of `other`: where it is, and what is wrong with it

    @property
    def are_classes(self) -> bool:
        """Whether the field holds classes: words for them rather than numbers but 0 and 1."""
        return self.words > self.number - self.binary

    @property
    def has_labels(self) -> bool:
        """Whether any of the values is a label."""
        return self.number + self.words > 0


def target_fields(items: Items, options: CustomData) -> tuple[dict[str, bool], tuple[str, ...]]:
    """Chooses the fields that are targets, by name whether of classes, with notes on those that look like targets.

    Fields of classes are chosen if they are named, or if there are no fields of numbers.

    Raises DataError if there are none, or if a name in the options is not found.
    """
    if len(set(options.targets)) < len(options.targets):
        raise DataError(f"{items.name}: --targets={','.join(options.targets)} names a target twice")
    columns = {option: getattr(options, option) for option in ("id_column", "group_column", "split_column")}
    columns = {option: name for option, name in columns.items() if name not in ("", getattr(CustomData, option))}
    if options.test_fold or options.fold_column != CustomData.fold_column:
        columns["fold_column"] = options.fold_column
    found, folds = _survey(items, columns.values(), options)
    known = ", ".join(map(short, list(found)[:30])) + (", ..." if len(found) > 30 else "") or "nothing but structures"
    for name in options.targets:
        if not (name in found and found[name].has_labels):
            problem = "there are no numbers in" if name in found else "there is no"
            first = f" (first: {found[name].first})" if name in found and found[name].first else ""
            raise DataError(f"{items.name}: {problem} field {name!r} of --targets; choose among {known}{first}")
    for option, name in columns.items():
        if name not in found:
            raise DataError(f"{items.name}: there is no field --{option}={name}; choose among {known}")
    if options.test_fold and options.test_fold not in folds:
        problem = f"no crystal is in fold --test_fold={options.test_fold} of column {options.fold_column}"
        raise DataError(f"{items.name}: {problem}; choose among {', '.join(map(short, sorted(folds)[:30]))}")
    no_labels = {*items.no_labels, *COUNTERS}
    no_labels |= {options.id_column, options.group_column, options.split_column, options.fold_column}
    open_to_choice = {name: seen for name, seen in found.items() if not seen.nested and name not in no_labels}
    chosen = tuple(name for name, seen in open_to_choice.items() if seen.number > seen.other)
    left = {name: seen for name, seen in open_to_choice.items() if name not in chosen}
    classes = tuple(name for name, seen in left.items() if seen.are_classes and 2 * seen.words > seen.other)
    faulty = [seen.first for name, seen in left.items() if name not in classes and 2 * seen.faulty > seen.other]
    fields = options.targets or chosen or classes
    if not fields and faulty:
        raise DataError(f"{items.name}: no field holds numbers as labels, first: {faulty[0]}")
    if not fields:
        first = next((f"; first: {seen.first}" for seen in open_to_choice.values() if seen.first), "")
        raise DataError(f"{items.name}: no field holds numbers as labels ({known}{first}); add one or name --targets")
    for name in fields:
        if unsafe := unsafe_character(name):
            problem = f"the name of field {short(escaped(name))} has the character {unsafe}"
            raise DataError(f"{items.name}: {problem}; rename it, or name --targets without it")
    notes = [] if options.targets else [f"no target, although it looks like one: {first}" for first in faulty]
    if not options.targets and chosen and classes:
        notes.append(f"no target, although of classes: {', '.join(map(short, classes))}; name --targets to learn them")
    if options.fold_column in found and not options.test_fold and options.fold_column not in fields:
        notes.append(f"the folds of column {options.fold_column} are not used: name the one for test with --test_fold")
    return {name: found[name].are_classes for name in fields}, tuple(notes)


def _survey(items: Items, columns: Iterable[str], options: CustomData) -> tuple[dict[str, Seen], set[str]]:
    """Counts the kinds of values in the fields of the first items, and of more until all that is named is found.

    Returns them with the folds that occur. Raises DataError if no item is usable.
    """
    found: dict[str, Seen] = {}
    folds: set[str] = set()
    count, bad = 0, []
    for count, item in enumerate(items.read(), 1):
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            _look_at(item, item.values, found)
            if options.test_fold and len(folds) < MOST_FIELDS:
                folds.add(_fold(item, options))
        has_targets = all(name in found and found[name].has_labels for name in options.targets)
        has_fold = not options.test_fold or options.test_fold in folds
        if count >= SAMPLE and has_targets and has_fold and found.keys() >= set(columns):
            break
    if not count:
        raise DataError(f"{items.name}: there is nothing in it; give a file with structures and labels")
    if len(bad) == count:
        first = f"{bad[0].where}: {bad[0].reason}"
        raise DataError(f"{items.name}: none of {count} records can be used, first: {first}")
    return found, folds - {""}


def _look_at(item: Item, values: Mapping[str, Any], found: dict[str, Seen], prefix: str = "") -> None:
    """Counts the kinds of the values of an item, and of those of nested objects, see `field`."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or len(name) > LONGEST_NAME or (len(found) >= MOST_FIELDS and name not in found):
            continue  # which also ends what holds itself
        seen = found.setdefault(name, Seen(nested=bool(prefix)))
        kind_ = kind(value)
        setattr(seen, kind_, getattr(seen, kind_) + 1)
        if kind_ == "number":
            seen.binary += number(value) in (0, 1)
        if kind_ == "other":
            seen.words += is_class_word(value)
            seen.faulty += bool(complaint(value))
            seen.first = seen.first or f"{item.where}: {fault(short(name), value)}"
        if isinstance(value, Mapping):
            _look_at(item, value, found, f"{name}.")


def _fold(item: Item, options: CustomData) -> str:
    """Returns the fold of an item, written as the one for test is if they are the same number: 2.0 as 2."""
    fold = text(item.values, options.fold_column)
    number_, wanted = number(fold), number(options.test_fold)
    return options.test_fold if fold and number_ is not None and number_ == wanted else fold


def record_of(item: Item | BadRecord, fields: Mapping[str, bool], options: CustomData) -> Record | BadRecord:
    """Makes the record of an item, with the labels in `fields`, of which some are of classes."""
    if isinstance(item, BadRecord):
        return item
    labels = []
    for name, of_classes in fields.items():
        value = field(item.values, name)
        if (label := (class_of if of_classes else number)(value)) is None:
            return BadRecord(item.id, item.where, fault(name, value, of_classes))
        labels.append(label)
    if options.test_fold:
        if not (fold := _fold(item, options)):
            return BadRecord(item.id, item.where, f"no fold in column {options.fold_column}; give it one")
        word = "test" if fold == options.test_fold else "train"
    else:
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


def is_json_text(value: Any) -> TypeGuard[str]:
    """Tells whether a value is the JSON text of a structure, as pymatgen writes it."""
    return isinstance(value, str) and value[:100].lstrip().startswith("{") and '"lattice' in value
