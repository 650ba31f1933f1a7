"""Preparation of a target set: crystals parsed and checked, splits made and verified, leaks between them found."""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crystalframer_jax.crystal import Crystal, CrystalError
from crystalframer_jax.data.build import Columns, build_parts, join_parts
from crystalframer_jax.data.leakage import Leak, find_leaks
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, crystal_of
from crystalframer_jax.data.registry import TargetSet
from crystalframer_jax.data.splits import SPLITS, differences, given_split, random_split, split_by_group
from crystalframer_jax.data.store import digest_of, parts_folder, read_columns, writing
from crystalframer_jax.data.table import CRYSTAL_COLUMNS, crystal_columns
from crystalframer_jax.files import locked, write_csv

CRYSTALS_FORMAT = 1  # to be raised when crystals or their columns change
CHUNK = 200  # records that a worker process makes crystals of at a time


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a target set is prepared.

    Attributes:
      split_seed: of the shuffle before a random split.
      max_bad_share: of the records that cannot be used; more is an error.
      unofficial: take a source whose splits are not those of the published numbers.
      workers: processes; 0: one for each core.
    """

    split_seed: int = 123
    max_bad_share: float = 0.05
    unofficial: bool = False
    workers: int = 0


DEFAULT = Preparation()
NumberedRecords = list[tuple[int, Record]]


def prepare(folder: Path, source: Source, known: TargetSet | None, options: Preparation = DEFAULT) -> bool:
    """Prepare the crystals of a source in `folder`, whose name is that of the target set; False if they are there.

    `known` is the target set if it is one of those known from the start: their splits are verified. Records that
    cannot be used are listed in skipped.csv, crystals that are in two splits in leakage.csv. Raises DataError if there
    are too many of the former, or splits are not what they should be.
    """
    key = {
        "format": CRYSTALS_FORMAT,
        "source": source.sha256,
        "targets": [dataclasses.asdict(target) for target in source.targets],
        "split_seed": options.split_seed,
        "unofficial": options.unofficial,
    }
    digest = digest_of(key)
    with locked(folder.parent / f".{folder.name}.lock"):
        found = read_columns(folder / "crystals", CRYSTAL_COLUMNS)
        is_prepared = found is not None and found[0]["digest"] == digest
        for left in folder.glob(".crystals-*.parts"):
            if is_prepared or left.name != f".crystals-{digest}.parts":
                shutil.rmtree(left)
        if is_prepared:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with parts_folder(folder / f"crystals-{digest}") as parts:
            _write(folder, parts, source, known, options, key | {"digest": digest})
        for rows in folder.glob("rows-*"):  # of what was there before
            shutil.rmtree(rows)
        tqdm.write(f"prepared in {time.perf_counter() - start:.0f} s, kept in {folder}")
    return True


@dataclasses.dataclass
class _Listing:
    """What is known of all records of a source, in its order."""

    ids: list[str] = dataclasses.field(default_factory=list)
    labels: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    splits: list[str] = dataclasses.field(default_factory=list)
    groups: list[str] = dataclasses.field(default_factory=list)
    bad: dict[int, BadRecord] = dataclasses.field(default_factory=dict)

    def chunks(self, source: Source) -> Iterator[tuple[int, NumberedRecords]]:
        """The records in chunks, with their sizes; takes them down on the way."""
        chunk: NumberedRecords = []
        for number, record in enumerate(source.records()):
            self.ids.append(record.id)
            if isinstance(record, BadRecord):
                self.bad[number] = record
                record = Record("", "", None, (np.nan,) * len(source.targets))
            else:
                chunk.append((number, record))
            self.labels.append(record.labels)
            self.splits.append(record.split)
            self.groups.append(record.group)
            if len(chunk) == CHUNK:
                yield CHUNK, chunk
                chunk = []
        if chunk:
            yield len(chunk), chunk


def _write(
    folder: Path, parts: Path, source: Source, known: TargetSet | None, options: Preparation, manifest: dict
) -> None:
    """Make the columns of the crystals; `parts` is for what is done so far."""
    listing = _Listing()
    title = f"crystals of {folder.name}"
    total = source.count or (known.num_records if known else None) or None
    files = build_parts(_crystals_of, listing.chunks(source), parts, title, total, options.workers)
    records = np.concatenate([np.load(file)["record"] for file in files]) if files else np.zeros(0, np.int64)
    for file in files:
        with np.load(file) as content:
            bad = zip(content["bad_record"], content["bad_where"], content["bad_reason"], strict=True)
            for number, where, reason in bad:
                listing.bad[int(number)] = BadRecord(listing.ids[number], str(where), str(reason))
    _report_bad(folder, listing, options.max_bad_share)

    labels = np.array(listing.labels, dtype=np.float64).reshape(-1, len(source.targets))
    splits, remark = _splits(folder.name, listing, labels, known, options)
    row_of_record = np.full(len(listing.ids), -1, dtype=np.int64)
    row_of_record[records] = np.arange(len(records))
    rows = {name: _present(row_of_record[chosen]) for name, chosen in splits.items()}
    for name in SPLITS:
        if not len(rows[name]):
            raise DataError(
                f"{folder.name}: no crystal is left for {name}; there are {len(records):,} with "
                f"{int(np.isfinite(labels[records]).any(axis=1).sum()):,} labelled ones among them"
            )
    with writing(folder / "crystals", manifest | {"remark": remark}) as temporary:
        join_parts(files, CRYSTAL_COLUMNS, temporary)
        columns = {name: np.load(temporary / f"{name}.npy", mmap_mode="r") for name in CRYSTAL_COLUMNS}
        leaks = find_leaks(columns, rows, options.workers)
        leaked = sorted({leak.held for leak in leaks if leak.in_training})
        extra = {"labels": labels[records], "leaked": np.array(leaked, dtype=np.int64), **rows}
        for name, column in extra.items():
            np.save(temporary / f"{name}.npy", column)
    _report(folder, source, columns, labels[records], rows, leaks, remark)


def _crystals_of(chunk: NumberedRecords) -> Columns:
    """The crystals of numbered records, and those that cannot be used."""
    crystals: list[Crystal] = []
    numbers, bad = [], []
    for number, record in chunk:
        try:
            crystals.append(crystal_of(record))
            numbers.append(number)
        except CrystalError as error:
            bad.append((number, record.where, " ".join(str(error).split())))
    return {
        **crystal_columns(crystals),
        "record": np.array(numbers, dtype=np.int64),
        "bad_record": np.array([number for number, _, _ in bad], dtype=np.int64),
        "bad_where": np.array([where for _, where, _ in bad], dtype=np.str_),
        "bad_reason": np.array([reason for _, _, reason in bad], dtype=np.str_),
    }


def _splits(
    name: str, listing: _Listing, labels: np.ndarray, known: TargetSet | None, options: Preparation
) -> tuple[dict[str, np.ndarray], str]:
    """Record numbers of each split, and a remark on what is unusual about them.

    A target set of published numbers takes the records whose labels are all known; others those with any label.
    """
    official = known.official_splits if known else {}
    as_published = bool(official) and not options.unofficial
    expected = known.num_records if known else 0
    if as_published and expected not in (0, len(listing.ids)):
        raise DataError(f"{name}: {_likely_change(len(listing.ids), expected)}")
    is_known = np.isfinite(labels)
    usable = np.flatnonzero(is_known.all(axis=1) if as_published else is_known.any(axis=1))
    if not len(usable):
        raise DataError(f"{name}: no record has a label; is the name of the label column right?")
    if any(listing.groups):  # which are only read if asked for
        splits = split_by_group(usable, [listing.groups[record] for record in usable], options.split_seed)
    elif any(listing.splits):
        unnamed = [listing.ids[record] for record in usable if not listing.splits[record]]
        if unnamed:
            raise DataError(f"{name}: {len(unnamed):,} records have no split, first: {unnamed[0]}; name it for all")
        splits = given_split(usable, [listing.splits[record] for record in usable])
    else:
        counts = known.split_counts if known and as_published else ()
        splits = random_split(usable, counts, options.split_seed)
    if not official:
        return splits, ""
    found = differences(splits, listing.ids, official)
    if not found:
        return splits, ""
    if as_published:
        raise DataError(f"{name}: {'; '.join(found)}: {_likely_change(len(listing.ids), expected)}")
    return splits, "not the official data or splits: errors cannot be compared with published ones"


def _likely_change(number: int, expected: int) -> str:
    """What has probably happened to a source of `number` records that gives other splits, and what to do."""
    if expected and number != expected:
        cause = f"the source has {number:,} records instead of {expected:,}, so it is another release or a part"
    elif expected:
        cause = "the source has as many records as it should, so labels were corrected or records reordered upstream"
    else:
        cause = "the files are another release, or were mixed up"
    return f"{cause}; fetch the version that published numbers refer to, or accept this one with --unofficial"


def _present(rows: np.ndarray) -> np.ndarray:
    """Rows of the table without those of records that could not be used."""
    return rows[rows >= 0]


def _report_bad(folder: Path, listing: _Listing, max_share: float) -> None:
    """Write skipped.csv; DataError if too many records are in it."""
    file, number, total = folder / "skipped.csv", len(listing.bad), len(listing.ids)
    if not total:
        raise DataError(f"{folder.name}: the source has no records")
    bad = [listing.bad[record] for record in sorted(listing.bad)]
    write_csv(file, ("id", "where", "reason"), [(record.id, record.where, record.reason) for record in bad])
    if not bad:
        return
    first = f"{bad[0].where}: {bad[0].reason}"
    if number > max_share * total:
        raise DataError(
            f"{number:,} of {total:,} records cannot be used ({file} lists them), first: {first}. Correct them, or "
            f"accept more by --max_bad_share={min(1.0, round(number / total + 0.005, 2))}"
        )
    tqdm.write(f"skipped {number:,} of {total:,} records ({file} lists them), first: {first}")


def _report(
    folder: Path,
    source: Source,
    columns: Columns,
    labels: np.ndarray,
    rows: dict[str, np.ndarray],
    leaks: list[Leak],
    remark: str,
) -> None:
    """Print what was prepared, and write leakage.csv."""
    ids = columns["ids"]
    write_csv(
        folder / "leakage.csv",
        ("kind", "split", "id", "is_also_in", "id_there"),
        [(leak.kind, leak.split, ids[leak.held], leak.other_split, ids[leak.other]) for leak in leaks],
    )
    atoms = np.diff(columns["atom_offset"])
    sizes = ", ".join(f"{len(rows[name]):,} {name}" for name in SPLITS)
    tqdm.write(f"{folder.name}: {len(atoms):,} crystals of {atoms.min()} to {atoms.max()} atoms; {sizes}")
    for target, column in zip(source.targets, labels.T, strict=True):
        values = column[np.isfinite(column)]
        extent = f"{values.min():.4g} to {values.max():.4g} {target.unit}".rstrip() if len(values) else "none is known"
        tqdm.write(f"  {target.name}: {len(values):,} labels, {extent}")
    for name in ("test", "val"):
        kinds = [leak.kind for leak in leaks if leak.split == name and leak.in_training]
        if kinds:
            number = f"1 {name} crystal is" if len(kinds) == 1 else f"{len(kinds):,} {name} crystals are"
            tqdm.write(
                f"  {number} also in training: {kinds.count('id'):,} by id, {kinds.count('structure'):,} by structure "
                "(leakage.csv)"
            )
    if remark:
        tqdm.write(f"  {remark}")
