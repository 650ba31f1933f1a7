"""Crystals that a source lists more than once under one id."""

import collections
import dataclasses

import numpy as np

from crystalframer_jax.data.build import Columns


@dataclasses.dataclass(frozen=True)
class Repeats:
    """What is left out of the splits, by record number, with the reason; and the labels that are left."""

    contradicting: dict[int, str]
    copies: dict[int, str]
    labels: np.ndarray  # [N, T], NaN for what is left out; a crystal has the labels of its copies too


def find_repeats(listing: Columns) -> Repeats:
    """Finds records of the same id and crystal: with other labels, none of them is used; else the first stands for all.

    A copy in another split stays, as a leak, and so do other crystals of the id. `listing` has a row for each record;
    those with a reason are passed over.
    """
    found = Repeats({}, {}, listing["labels"].copy())
    crystals: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for number in np.flatnonzero(listing["reason"] == "").tolist():
        crystals[listing["id"][number], listing["content"][number]].append(number)
    for same in crystals.values():
        if len(same) > 1:
            _compare(same, listing, found)
    return found


def _compare(same: list[int], listing: Columns, found: Repeats) -> None:
    """Compares the labels of records of one id and crystal."""
    labels, where = listing["labels"], listing["where"]
    known = [column[np.isfinite(column)] for column in labels[same].T]
    if any(np.ptp(column) > 0 for column in known if len(column)):
        places = ", ".join(f"{', '.join(f'{label:g}' for label in labels[n])} at {where[n]}" for n in same[:3])
        for number in same:
            found.contradicting[number] = f"its id has contradicting labels ({places}); leave the right one"
            found.labels[number] = np.nan
        return
    merged = [column[0] if len(column) else np.nan for column in known]
    kept: dict[str, int] = {}  # by split
    for number in same:
        first = kept.setdefault(listing["split"][number], number)
        found.labels[number] = merged if first == number else np.nan
        if first != number:
            found.copies[number] = f"the same crystal and labels as at {where[first]}, which is used"
