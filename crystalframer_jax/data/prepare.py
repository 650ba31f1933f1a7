"""Preparation of a target set: crystals parsed and checked, splits made and verified, leaks between them found."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crystalframer_jax.batching.table import CRYSTAL_COLUMNS, crystal_columns
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.build import Columns, build_parts, join_parts
from crystalframer_jax.data.leakage import Leak, find_leaks
from crystalframer_jax.data.owned import (
    begin,
    begun,
    digest_of,
    discard,
    mapped_columns,
    read_manifest,
    remove,
    remove_report,
    require_place,
    write_report,
)
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, Target
from crystalframer_jax.data.registry import TargetSet
from crystalframer_jax.data.splits import SPLITS, differences, given_split, random_split, split_by_group
from crystalframer_jax.data.store import LABEL_COLUMNS, SET_COLUMNS, changing, parts_folder, read_set, writing
from crystalframer_jax.files import FileError, write_csv
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.text import escaped, unsafe_character

CRYSTALS_FORMAT = 2  # to be raised when crystals or their columns change
LONGEST_ID = 200  # characters
CHUNK = 250  # records that a worker process makes crystals of at a time
# what parts say of a record; reason: why it is skipped
LISTED = ("id", "where", "labels", "split", "group", "reason", "warning")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a target set is prepared."""

    split_seed: int = 123  # of the shuffle before a random split
    max_bad_share: float = 0.05  # of the records that cannot be used; more is an error
    unofficial: bool = False  # take a source whose splits are not those of the published numbers
    workers: int = 0  # processes; 0: one for each core


DEFAULT = Preparation()


def prepare(folder: Path, source: Source, known: TargetSet | None, options: Preparation = DEFAULT) -> bool:
    """Prepares the crystals of a source in `folder`, whose name is that of the target set; False if they are there.

    `known` is the target set if it is one of those known from the start: their splits are verified. Records that
    cannot be used are listed in crystals/skipped.csv, those that leave a doubt in crystals/warnings.csv, crystals that
    are in two splits in crystals/leakage.csv. Raises
    DataError if there are too many of the former (skipped.csv is then beside), or splits are not what they should be.
    """
    key = digest_of(
        {
            "format": CRYSTALS_FORMAT,
            "source": source.sha256,
            "targets": [dataclasses.asdict(target) for target in source.targets],
            "readers": {name: _version(name) for name in ("pymatgen", "pymatgen-core", "ase")},
            "split_seed": options.split_seed,
            "unofficial": options.unofficial,
        }
    )
    _require_apart(folder, source)
    with changing(folder):
        found = read_set(folder)
        is_prepared = found is not None and found[0]["key"] == key
        if not is_prepared:
            require_place(folder / "crystals", SET_COLUMNS)
            start = time.perf_counter()
            for path in begun(folder):  # parts of another source; they would fill the disk
                if path.name.startswith(".crystals-") and key not in path.name:
                    discard(path)
            _write(folder, source, known, options, key)
            tqdm.write(f"prepared in {time.perf_counter() - start:.0f} s, kept in {folder}")
            found = read_set(folder)
        remove_report(folder / "skipped.csv")  # of an attempt that failed
        for path in begun(folder):  # what was left, but not what neighbor rows will go on from
            rows = folder / path.name[1:].partition("-by-")[0]
            if not (is_prepared and path.name.endswith(".parts") and rows.name.startswith("rows-")) or rows.exists():
                discard(path)
        for path in folder.glob("rows-*"):
            if found and re.fullmatch("rows-[0-9a-f]{12}", path.name) and _are_rows_of_others(path, found[0]["digest"]):
                remove(path)
    return not is_prepared


def _require_apart(folder: Path, source: Source) -> None:
    """Raises DataError if a source is inside the place where it is prepared, or the other way round."""
    place = folder.resolve()
    for path in source.paths:
        path = path.resolve()
        if place.is_relative_to(path) or path.is_relative_to(place):
            raise DataError(
                f"{path} and {place}, where it would be prepared, are one inside the other: choose another --data_dir "
                "or --target_set"
            )


def _are_rows_of_others(folder: Path, digest: str) -> bool:
    """Tells whether a folder has neighbor rows of other crystals than those with that digest, or nothing."""
    with contextlib.suppress(OSError, FileError):
        return not os.listdir(folder) or bool(read_manifest(folder).get("crystals", digest) != digest)
    return False


def is_current(folder: Path, source: Source) -> bool:
    """Tells whether what is prepared in a folder comes from this source, and was written by this version."""
    found = read_set(folder)
    return found is not None and (found[0]["source"], found[0]["format"]) == (source.sha256, CRYSTALS_FORMAT)


def _version(package: str) -> str:
    """Returns the version of a package that reads structures; "" if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write(folder: Path, source: Source, known: TargetSet | None, options: Preparation, key: str) -> None:
    """Makes the columns of the crystals."""
    stream = source.records()
    chunks = iter(lambda: list(itertools.islice(stream, CHUNK)), [])
    work, parts = functools.partial(_crystals_of, len(source.targets)), parts_folder(folder / f"crystals-{key}", CHUNK)
    begin(parts)
    total = source.count or (known.num_records if known else None) or None
    files = build_parts(work, chunks, parts, f"crystals of {folder.name}", total, options.workers)
    if not files:
        raise DataError("the source has no records; look at what --source names")
    listing = _listing(files)
    is_bad, count = listing["reason"] != "", len(listing["reason"])
    records = np.flatnonzero(~is_bad)
    bad = list(map(BadRecord, *(listing[name][is_bad] for name in ("id", "where", "reason"))))
    if len(bad) > options.max_bad_share * count + 1e-9:
        discard(parts)  # what could not be used may be readable next time
        file, share = folder / "skipped.csv", math.ceil(100 * len(bad) / count) / 100
        is_listed = write_report(file, *_table(bad))
        where = f"{file} lists them" if is_listed else f"not listed: another {file} is there"
        raise DataError(
            f"{len(bad):,} of {count:,} records cannot be used ({where}), first: "
            f"{bad[0].where}: {bad[0].reason}. Correct them, or accept more by --max_bad_share={share:g}"
        )
    splits, remark = _splits(folder.name, listing, known, options)
    rows = _rows_of(splits, records, folder.name)
    lost = sum(len(splits[name]) - len(rows[name]) for name in SPLITS)
    if lost and known and known.official_splits and not remark:
        remark = f"{lost:,} crystals of the official splits could not be used (crystals/skipped.csv)"
    manifest = {
        "format": CRYSTALS_FORMAT,
        "source": source.sha256,
        "key": key,
        "remark": remark,
        "targets": [dataclasses.asdict(target) for target in source.targets],
        "crystals": len(records),
    }
    with writing(folder / "crystals", manifest, SET_COLUMNS) as temporary:
        join_parts(files, CRYSTAL_COLUMNS, temporary)
        columns = mapped_columns(temporary, CRYSTAL_COLUMNS)
        if len(columns["ids"]) != len(records):
            raise RuntimeError("records were lost or doubled on the way; please report this")
        leaks = find_leaks(columns, rows, options.workers)
        leaked = sorted({leak.held for leak in leaks if leak.other_split == "train"})
        columns |= {"labels": listing["labels"][records], "leaked": np.array(leaked, dtype=np.int64), **rows}
        for name in LABEL_COLUMNS:
            np.save(temporary / f"{name}.npy", columns[name])
        write_csv(temporary / "skipped.csv", *_table(bad))
        columns_of = (listing[name] for name in ("id", "where", "warning"))
        doubts = [row for row in zip(*columns_of, strict=True) if row[2]]
        if doubts:
            write_csv(temporary / "warnings.csv", ("id", "where", "warning"), doubts)
        ids = columns["ids"]
        lines = [(leak.kind, leak.split, ids[leak.held], leak.other_split, ids[leak.other]) for leak in leaks]
        write_csv(temporary / "leakage.csv", ("kind", "split", "id", "is_also_in", "id_there"), lines)
        _report(folder.name, source.targets, columns, leaks)
        if remark:
            tqdm.write(f"  {remark}")
    if doubts:
        tqdm.write(f"warnings of {len(doubts):,} of {count:,} records (crystals/warnings.csv), first: {doubts[0][2]}")
    if bad:
        first = f"{bad[0].where}: {bad[0].reason}"
        tqdm.write(f"skipped {len(bad):,} of {count:,} records (crystals/skipped.csv), first: {first}")


def _listing(files: list[Path]) -> Columns:
    """Joins what the parts say of all records, in the order of the source."""
    rows = []
    for file in files:
        with np.load(file) as part:
            rows += json.loads(part["listing"].tobytes())
    columns = zip(LISTED, zip(*rows, strict=True), strict=True)
    return {name: np.array(column, np.float64 if name == "labels" else object) for name, column in columns}


def _rows_of(splits: dict[str, np.ndarray], records: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Returns splits of record numbers as rows of the table; those that could not be used drop out."""
    rows = {split: np.searchsorted(records, chosen[np.isin(chosen, records)]) for split, chosen in splits.items()}
    for split, chosen in rows.items():
        if not len(chosen):
            number = sum(map(len, rows.values()))
            raise DataError(
                f"{name}: no crystal is left for {split}, there are {number:,} in all splits; give at least 10, or say "
                "in a column or field named split which are train, val and test"
            )
    return rows


def _crystals_of(num_targets: int, chunk: list[Record | BadRecord]) -> Columns:
    """Makes the crystals of records, and what is LISTED of all of them; those without a reason have a crystal."""
    crystals: list[Crystal] = []
    listed = []
    cutoff = TrainConfig().cutoff  # the usual one; a larger may ask for too many neighbors later
    for record in chunk:
        id, where, labels, split, group, reason = record.id, record.where, (np.nan,) * num_targets, "", "", ""
        doubts: list[str] = []
        if len(id) > LONGEST_ID:
            id, reason = id[:LONGEST_ID], f"its id has {len(id):,} characters"
        elif unsafe := unsafe_character(id):
            reason = f"its id has the character {unsafe}; rename it"
        elif isinstance(record, BadRecord):
            reason = record.reason
        else:
            labels, split, group = record.labels, record.split, record.group
            try:
                with _kept_warnings() as doubts:
                    crystals.append(record.crystal(cutoff))
            except CrystalError as error:
                reason = " ".join(str(error).split())
        doubt = "" if reason else escaped("; ".join(dict.fromkeys(doubts)))
        listed.append((escaped(id) if reason else id, escaped(where), labels, split, group, escaped(reason), doubt))
    return crystal_columns(crystals) | {"listing": np.frombuffer(json.dumps(listed).encode(), np.uint8)}


@contextlib.contextmanager
def _kept_warnings() -> Iterator[list[str]]:
    """Yields a list that is filled with the texts of the warnings of structure files; others are dropped."""
    kept: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield kept
        finally:
            kept += [str(warning.message) for warning in caught if warning.category is UserWarning]


def _splits(
    name: str, listing: Columns, known: TargetSet | None, options: Preparation
) -> tuple[dict[str, np.ndarray], str]:
    """Returns record numbers of each split, and a remark on what is unusual about them.

    A target set of published numbers takes the records whose labels are all known; others those with any label.
    """
    official = known.official_splits if known else {}
    as_published = bool(official) and not options.unofficial
    expected = known.num_records if known else 0
    count = len(listing["labels"])
    cause = _likely_change(count, expected)
    if as_published and expected not in (0, count):
        raise DataError(f"{name}: {cause}")
    is_known = np.isfinite(listing["labels"])
    usable = np.flatnonzero(is_known.all(axis=1) if as_published else is_known.any(axis=1))
    if not len(usable):
        raise DataError(f"{name}: no record has a label; is the name of the label column right?")
    if listing["group"].any():  # which are only read if asked for
        splits = split_by_group(usable, listing["group"][usable].tolist(), options.split_seed)
    elif listing["split"].any():
        named = listing["split"][usable]
        unnamed = listing["id"][usable][named == ""]
        if len(unnamed):
            raise DataError(f"{name}: {len(unnamed):,} records have no split, first: {unnamed[0]}; name it for all")
        splits = given_split(usable, named.tolist())
    else:
        counts = known.split_counts if known and as_published else ()
        if sum(counts) > len(usable):
            raise DataError(f"{name}: only {len(usable):,} records have all labels, of {sum(counts):,}: {cause}")
        splits = random_split(usable, counts, options.split_seed)
    found = differences(splits, listing["id"], official)
    if found and as_published:
        raise DataError(f"{name}: {'; '.join(found)}: {cause}")
    return splits, "not the official data or splits: errors cannot be compared with published ones" if found else ""


def _likely_change(number: int, expected: int) -> str:
    """Tells what has probably happened to a source of `number` records that gives other splits, and what to do."""
    if expected and number != expected:
        cause = f"the source has {number:,} records instead of {expected:,}, so it is another release or a part"
    elif expected:
        cause = "the source has as many records as it should, so labels were corrected or records reordered upstream"
    else:
        cause = "the files are another release, or were mixed up"
    return f"{cause}; fetch the version that published numbers refer to, or accept this one with --unofficial"


def _table(bad: list[BadRecord]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Tabulates records that cannot be used: header and rows."""
    return ("id", "where", "reason"), [(record.id, record.where, record.reason) for record in bad]


def _report(name: str, targets: tuple[Target, ...], columns: Columns, leaks: list[Leak]) -> None:
    """Prints what was prepared."""
    atoms = np.diff(columns["atom_offset"])
    sizes = ", ".join(f"{len(columns[split]):,} {split}" for split in SPLITS)
    tqdm.write(f"{name}: {len(atoms):,} crystals of {atoms.min()} to {atoms.max()} atoms; {sizes}")
    for target, column in zip(targets, columns["labels"].T, strict=True):
        values = column[np.isfinite(column)]
        extent = f"{values.min():.4g} to {values.max():.4g} {target.unit}".rstrip() if len(values) else "none is known"
        tqdm.write(f"  {target.name}: {len(values):,} labels, {extent}")
    for split in ("test", "val"):
        kinds = [leak.kind for leak in leaks if (leak.split, leak.other_split) == (split, "train")]
        if kinds:
            number = f"1 {split} crystal is" if len(kinds) == 1 else f"{len(kinds):,} {split} crystals are"
            tqdm.write(
                f"  {number} also in training: {kinds.count('id'):,} by id, {kinds.count('structure'):,} by structure "
                "(crystals/leakage.csv)"
            )
