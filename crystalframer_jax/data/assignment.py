"""Which record of a source goes into which split."""

import dataclasses
import random
from collections.abc import Collection

import numpy as np

from crystalframer_jax.data.build import Columns
from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.registry import TargetSet
from crystalframer_jax.data.splits import differences, given_split, random_split, split_by_group


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a target set is prepared."""

    split_seed: int = 123  # of the shuffle before a random split
    max_bad_share: float = 0.05  # of the records that cannot be used; more is an error
    unofficial: bool = False  # take a source whose splits are not those of the published numbers
    workers: int = 0  # processes; 0: one for each core
    val_share: float = 0.0  # of the training crystals that become validation, where the source names no other


def rows_of(splits: dict[str, np.ndarray], records: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Returns splits of record numbers as rows of the table; those that could not be used drop out."""
    rows = {split: np.searchsorted(records, chosen[np.isin(chosen, records)]) for split, chosen in splits.items()}
    for split, chosen in rows.items():
        if not len(chosen):
            number = sum(map(len, rows.values()))
            remedy = ", or take a tenth of those for training with --val_share=0.1" if split == "val" else ""
            raise DataError(
                f"{name}: no crystal is left for {split}, there are {number:,} in all splits; give at least 10, or say "
                f"in a column or field named split which are train, val and test{remedy}"
            )
    return rows


def splits_of(
    name: str, listing: Columns, known: TargetSet | None, options: Preparation, left_out: Collection[int] = ()
) -> tuple[dict[str, np.ndarray], str]:
    """Returns record numbers of each split, and a remark on what is unusual about them.

    A target set of published numbers takes the records whose labels are all known; others those with any label.
    Records that are `left_out` are in no split.
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
    usable = usable[~np.isin(usable, list(left_out))]
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
    if options.val_share:
        splits = _with_validation(name, splits, listing, options)
    found = differences(splits, listing["id"], official)
    if found and as_published:
        raise DataError(f"{name}: {'; '.join(found)}: {cause}")
    return splits, "not the official data or splits: errors cannot be compared with published ones" if found else ""


def _with_validation(
    name: str, splits: dict[str, np.ndarray], listing: Columns, options: Preparation
) -> dict[str, np.ndarray]:
    """Takes validation crystals out of training, at random; those that cannot be used do not count."""
    if len(splits["val"]):
        raise DataError(
            f"{name}: there are {len(splits['val']):,} crystals for validation already; leave --val_share out"
        )
    train = splits["train"][listing["reason"][splits["train"]] == ""].tolist()
    random.Random(options.split_seed).shuffle(train)
    number = max(1, round(options.val_share * len(train)))
    return splits | {"train": np.sort(train[number:]), "val": np.sort(train[:number])}


def _likely_change(number: int, expected: int) -> str:
    """Tells what has probably happened to a source of `number` records that gives other splits, and what to do."""
    if expected and number != expected:
        cause = f"the source has {number:,} records instead of {expected:,}, so it is another release or a part"
    elif expected:
        cause = "the source has as many records as it should, so labels were corrected or records reordered upstream"
    else:
        cause = "the files are another release, or were mixed up"
    return f"{cause}; fetch the version that published numbers refer to, or accept this one with --unofficial"
