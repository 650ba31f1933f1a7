"""Splits of a dataset into training, validation and test crystals."""

import dataclasses
import hashlib
import random
from collections.abc import Sequence

import numpy as np

SPLITS = ("train", "val", "test")
LARGEST_HELD = 0.15  # share of the records in test or validation that a split by groups may reach


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """What is known of an official split: its size, its first and last crystal, and which records it takes."""

    count: int
    first_id: str
    last_id: str
    sha256: str = ""  # of the record numbers as int64, little endian; empty: unknown


def random_split(records: np.ndarray, counts: Sequence[int] = (), seed: int = 123) -> dict[str, np.ndarray]:
    """Shuffled splits of N record numbers: the rule of the official index files.

    Training takes the first int(0.8 N), test the last int(0.1 N), and validation the int(0.1 N) before those, unless
    `counts` (train, val, test) says how many. With seed 123 and all records whose labels are known, in the order of
    the source, these are the official splits of JARVIS, MEGNet and OQMD.
    """
    number = len(records)
    n_train, n_val, n_test = counts or (int((1 - 0.1 - 0.1) * number), int(0.1 * number), int(0.1 * number))
    if n_train + n_val + n_test > number:
        raise ValueError(f"{number:,} crystals are too few for {n_train:,} + {n_val:,} + {n_test:,}")
    order = list(range(number))
    random.Random(seed).shuffle(order)
    shuffled = records[np.array(order, dtype=np.int64)]
    first_held, first_test = number - n_val - n_test, number - n_test
    return {"train": shuffled[:n_train], "val": shuffled[first_held:first_test], "test": shuffled[first_test:]}


def split_by_group(records: np.ndarray, groups: Sequence[str], seed: int = 123) -> dict[str, np.ndarray]:
    """Splits in which all records of a group are together; `groups` names that of each of the record numbers.

    Groups are shuffled and go to test until it has at least a tenth of the records, then to validation likewise; the
    rest is for training, and so are groups which would make test or validation larger than LARGEST_HELD of all.
    """
    members: dict[str, list[int]] = {}
    for record, group in zip(records.tolist(), groups, strict=True):
        members.setdefault(group, []).append(record)
    names = sorted(members)
    random.Random(seed).shuffle(names)
    held: dict[str, list[int]] = {"test": [], "val": []}
    left: list[int] = []
    for name in names:
        fitting = [
            chosen
            for chosen in held.values()
            if len(chosen) < 0.1 * len(records) and len(chosen) + len(members[name]) <= LARGEST_HELD * len(records)
        ]
        (fitting[0] if fitting else left).extend(members[name])
    return {name: np.array(sorted({"train": left, **held}[name]), dtype=np.int64) for name in SPLITS}


def given_split(records: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The record numbers of each split, where `names` says train, val or test for each of them."""
    chosen = np.array(names)
    return {split: records[chosen == split] for split in SPLITS}


def differences(
    splits: dict[str, np.ndarray], ids: Sequence[str] | np.ndarray, official: dict[str, SplitFacts]
) -> list[str]:
    """In what these splits (record numbers) differ from official ones; `ids` of all records."""
    found = []
    for name, facts in official.items():
        rows = splits[name]
        if len(rows) != facts.count:
            found.append(f"{name} has {len(rows):,} crystals instead of {facts.count:,}")
            continue
        ends = str(ids[rows[0]]), str(ids[rows[-1]])
        if ends != (facts.first_id, facts.last_id):
            found.append(f"{name} runs from {ends[0]} to {ends[1]} instead of {facts.first_id} to {facts.last_id}")
        elif facts.sha256 and record_hash(rows) != facts.sha256:
            found.append(f"{name} consists of other records")
    return found


def record_hash(records: np.ndarray) -> str:
    """SHA-256 of record numbers, as the official index files are identified."""
    return hashlib.sha256(records.astype("<i8").tobytes()).hexdigest()
