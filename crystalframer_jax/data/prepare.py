"""Preparation of a target set: crystals parsed and checked, splits made and verified, leaks between them found."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import time
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crystalframer_jax.batching.table import CRYSTAL_COLUMNS, crystal_columns
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.assignment import Preparation, rows_of, splits_of
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
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source
from crystalframer_jax.data.registry import TargetSet
from crystalframer_jax.data.repeats import Repeats, find_repeats
from crystalframer_jax.data.report import Warnings, extensive_targets, in_no_split, report
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import LABEL_COLUMNS, SET_COLUMNS, changing, parts_folder, read_set, writing
from crystalframer_jax.files import FileError, write_csv
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.text import escaped, unsafe_character

CRYSTALS_FORMAT = 2  # to be raised when crystals or their columns change
LONGEST_ID = 200  # characters
LONGEST_WARNING = 1000
CHUNK = 250  # records that a worker process makes crystals of at a time
# what parts say of a record; reason: why it is skipped, warning: of its structure, content: a checksum of its crystal
LISTED = ("id", "where", "labels", "split", "group", "reason", "warning", "content")


DEFAULT = Preparation()


def prepare(folder: Path, source: Source, known: TargetSet | None, options: Preparation = DEFAULT) -> bool:
    """Prepares the crystals of a source in `folder`, whose name is that of the target set; False if they are there.

    `known` is the target set if it is one of those known from the start: their splits are verified. Records that
    cannot be used are listed in crystals/skipped.csv, crystals that are in two splits in crystals/leakage.csv. Raises
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
            "val_share": options.val_share,
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
    repeats = Repeats({}, {}, listing["labels"]) if known else find_repeats(listing)
    left_out = repeats.contradicting | repeats.copies
    splits, remark = splits_of(folder.name, listing | {"labels": repeats.labels}, known, options, left_out)
    rows = rows_of(splits, records, folder.name)
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
        columns |= {"labels": repeats.labels[records], "leaked": np.array(leaked, dtype=np.int64), **rows}
        for name in LABEL_COLUMNS:
            np.save(temporary / f"{name}.npy", columns[name])
        bad += [BadRecord(listing["id"][n], listing["where"][n], reason) for n, reason in left_out.items()]
        told = [row for row in zip(*(listing[name] for name in ("id", "where", "warning")), strict=True) if row[2]]
        notes = [("", "", note) for note in source.notes]
        notes += [] if known else extensive_targets(source.targets, columns)
        _write_reports(temporary, bad, notes + told, leaks, columns["ids"])
        report(folder.name, source.targets, columns, leaks)
        for line in filter(None, (in_no_split(columns, len(repeats.contradicting), len(repeats.copies)), remark)):
            tqdm.write(f"  {line}")
    if bad:
        first = f"{bad[0].where}: {bad[0].reason}"
        tqdm.write(f"skipped {len(bad):,} of {count:,} records (crystals/skipped.csv), first: {first}")
    for _, _, note in notes:
        tqdm.write(f"warning: {note}")
    if told:
        tqdm.write(f"warnings of {len(told):,} of {count:,} records (crystals/warnings.csv), first: {told[0][2]}")


def _write_reports(folder: Path, bad: list[BadRecord], told: Warnings, leaks: list[Leak], ids: np.ndarray) -> None:
    """Writes the lists of skipped records, of leaks and, if there are any, of warnings."""
    write_csv(folder / "skipped.csv", *_table(bad))
    lines = [(leak.kind, leak.split, ids[leak.held], leak.other_split, ids[leak.other]) for leak in leaks]
    write_csv(folder / "leakage.csv", ("kind", "split", "id", "is_also_in", "id_there"), lines)
    if told:
        write_csv(folder / "warnings.csv", ("id", "where", "warning"), told)


def _listing(files: list[Path]) -> Columns:
    """Joins what the parts say of all records, in the order of the source."""
    rows = []
    for file in files:
        with np.load(file) as part:
            rows += json.loads(part["listing"].tobytes())
    columns = zip(LISTED, zip(*rows, strict=True), strict=True)
    return {name: np.array(column, np.float64 if name == "labels" else object) for name, column in columns}


def _crystals_of(num_targets: int, chunk: list[Record | BadRecord]) -> Columns:
    """Makes the crystals of records, and what is LISTED of all of them; those without a reason have a crystal."""
    crystals: list[Crystal] = []
    listed = []
    cutoff = TrainConfig().cutoff  # the usual one; a larger may ask for too many neighbors later
    for record in chunk:
        id, where, labels, split, group = record.id, record.where, (np.nan,) * num_targets, "", ""
        reason, warning, content = "", "", ""
        if len(id) > LONGEST_ID:
            id, reason = id[:LONGEST_ID], f"its id has {len(id):,} characters"
        elif unsafe := unsafe_character(id):
            reason = f"its id has the character {unsafe}; rename it"
        elif isinstance(record, BadRecord):
            reason = record.reason
        else:
            labels, split, group = record.labels, record.split, record.group
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("ignore")
                    warnings.simplefilter("always", UserWarning)
                    crystals.append(record.crystal(cutoff))
                warning = "; ".join(" ".join(str(told.message).split()) for told in caught)[:LONGEST_WARNING]
                content = _checksum(crystals[-1])
            except CrystalError as error:
                reason = " ".join(str(error).split())
        id, where, reason, warning = escaped(id) if reason else id, escaped(where), escaped(reason), escaped(warning)
        listed.append((id, where, labels, split, group, reason, warning, content))
    return crystal_columns(crystals) | {"listing": np.frombuffer(json.dumps(listed).encode(), np.uint8)}


def _checksum(crystal: Crystal) -> str:
    """Returns a checksum of cell and atoms, by which copies are told from other crystals of the same id."""
    arrays = (crystal.lattice, crystal.species, crystal.positions, crystal.occupancies)
    content = b"".join(array.tobytes() for array in arrays if array is not None)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _table(bad: list[BadRecord]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Tabulates records that cannot be used: header and rows."""
    return ("id", "where", "reason"), [(record.id, record.where, record.reason) for record in bad]
