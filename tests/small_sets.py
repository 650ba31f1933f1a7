"""A target set of 60 bundled crystals, for the tests of data and of training."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from support import BUNDLED

from crystalframer_jax.batching.table import COLUMNS
from crystalframer_jax.data.prepare import DEFAULT, Preparation, prepare
from crystalframer_jax.data.records import Record, Source, Target
from crystalframer_jax.data.registry import TARGET_SETS, TargetSet
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import Dataset, load_dataset
from crystalframer_jax.data.structures import from_dict

CUTOFF = 4.0  # Å; short rows


@dataclasses.dataclass(frozen=True)
class SmallSource(Bundled):
    """The first `count` records of a bundled file, some of them changed: {record number: changes}."""

    count: int = 60
    changes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    readable: bool = True

    def open(self, targets: tuple[Target, ...]) -> Source:
        def records() -> Iterator[Record]:
            assert self.readable, "the records were asked for"
            for number, content in enumerate(raw_records(self.count)):
                content |= self.changes.get(number, {})
                labels = tuple(target.label(content[target.field]) for target in targets)
                load = functools.partial(from_dict, content, content["id"])
                yield Record(content["id"], f"line {number + 1}", load, labels)

        checksum = hashlib.sha256(repr((self.count, self.changes)).encode()).hexdigest()
        return Source(targets, checksum, records, self.count)


def small_set(**values) -> TargetSet:
    """A small set with the targets of mp_flla_2015."""
    whole = TARGET_SETS["mp_flla_2015"]
    source = SmallSource(whole.source.file, **values)
    return dataclasses.replace(whole, name="small", source=source)


def raw_records(count: int | None = None) -> list[dict[str, Any]]:
    """Records of the bundled file, read without the package."""
    with gzip.open(BUNDLED, "rt") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def prepare_small(folder: Path, target_set: TargetSet | None = None, options: Preparation = DEFAULT) -> bool:
    """Prepare the crystals of the small set below a folder."""
    target_set = target_set or small_set()
    return prepare(folder / "small", target_set.source.open(target_set.targets), target_set, options)


def open_small(folder: Path, target_set: TargetSet | None = None, targets=("e_form",), cutoff=CUTOFF) -> Dataset:
    prepare_small(folder, target_set)
    return load_dataset(folder / "small", targets, cutoff)


def rows_folder(folder: Path) -> Path:
    """The one folder with neighbor rows of the small set below a folder."""
    (rows,) = (folder / "small").glob("rows-*")
    return rows


def assert_same_dataset(a: Dataset, b: Dataset) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a.table, name), getattr(b.table, name), err_msg=name)
    np.testing.assert_array_equal(a.labels, b.labels)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(a.splits[split], b.splits[split])
    assert a.digest == b.digest


def assert_same_batch(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def literal_split(known: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    """The rule of the official index files, written out with the global random generator."""
    rows = [row for row in range(len(known)) if known[row]]
    n = len(rows)
    ids = list(range(n))
    random.seed(123)
    random.shuffle(ids)
    train, held = int((1 - 0.1 - 0.1) * n), int(0.1 * n)
    order = [rows[i] for i in ids]
    return order[:train], order[-2 * held : -held], order[-held:]
