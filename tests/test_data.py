"""Labels, the official split, the prepared store and the order of training batches."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pymatgen.core import Element
from support import BUNDLED

from crystalframer_jax.crystal import CrystalError
from crystalframer_jax.data import store
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.registry import TARGET_SETS, TargetSet
from crystalframer_jax.data.splits import split_80_10_10
from crystalframer_jax.data.store import Dataset, open_dataset, parse_label
from crystalframer_jax.data.table import COLUMNS

CUTOFF = 4.0  # Å; short rows
OFFICIAL_SPLITS = {  # SHA-256 of the official row indices (int64, little endian) of sets without missing labels
    55_723: {  # JARVIS dft_3d_2021
        "train": "94fea386f992e510c7fc0fd712ddd63099b464cc8a980aaf68a429cfe3c4a853",
        "val": "fc61c62e6b734893d10bae41e39fedaa4a7b1a030fa665ea7b8c9d5bca2c908b",
        "test": "c4224c9bee34a8cbd4ba8009e2a47012bfb3b42e84118090063770f28558c00a",
    },
    817_636: {  # OQMD
        "val": "59d1bc158a8a5b8d6fe6061600a657856b752a7e2c7beea4276c9adbfe50c82d",
        "test": "ed16637e1ad31aa8c8132cbc6cda907a2a8de9d39442cff30d1446c5b69b2e48",
    },
}


@dataclasses.dataclass(frozen=True)
class SmallSet(TargetSet):
    """The first `count` records of a bundled file, some of them changed: {record number: changes}."""

    count: int = 60
    changes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def records(self) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(itertools.islice(super().records(), self.count)):
            yield record | self.changes.get(number, {})


class UnreadableSet(SmallSet):
    """A set whose records cannot be asked for: the store must do without them."""

    def records(self) -> Iterator[dict[str, Any]]:
        raise AssertionError("the records were asked for")


def small_set(kind: type[SmallSet] = SmallSet, **values) -> SmallSet:
    """A small set with the targets of mp_flla_2015."""
    whole = TARGET_SETS["mp_flla_2015"]
    return kind(name="small", bundled=whole.bundled, targets=whole.targets, source=whole.source, **values)


def raw_records(count: int | None = None) -> list[dict[str, Any]]:
    """Records of the bundled file, read without the package."""
    with gzip.open(BUNDLED, "rt") as lines:
        return [json.loads(line) for line in itertools.islice(lines, count)]


def stores_in(folder: Path) -> list[str]:
    """What a data folder holds besides lock files, half-made stores included."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def open_small(folder: Path, target_set: SmallSet | None = None, targets=("e_form",), cutoff=CUTOFF) -> Dataset:
    return open_dataset(target_set or small_set(), targets, cutoff, str(folder))


def store_folder(folder: Path) -> Path:
    """The one prepared store below a folder."""
    (prepared,) = folder.glob("small-*")
    return prepared


def assert_same_dataset(a: Dataset, b: Dataset) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a.table, name), getattr(b.table, name), err_msg=name)
    np.testing.assert_array_equal(a.labels, b.labels)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(a.splits[split], b.splits[split])


def assert_same_batch(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Labels


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1.5", 1.5),
        (-2, -2.0),
        (0, 0.0),
        ("na", np.nan),
        ("", np.nan),
        (None, np.nan),
        (float("nan"), np.nan),
        (float("inf"), np.nan),
        ("-inf", np.nan),
        ([1.0], np.nan),
    ],
)
def test_parse_label(value, expected):
    np.testing.assert_equal(parse_label(value), expected)


# Splits


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


def test_split_of_the_bundled_set():
    fields = [target.field for target in TARGET_SETS["mp_flla_2015"].targets]
    labels = np.array([[parse_label(record[field]) for field in fields] for record in raw_records()])
    splits = split_80_10_10(labels)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [3150, 393, 393]
    assert len(np.unique(np.concatenate(list(splits.values())))) == 3150 + 2 * 393
    for found, expected in zip(splits.values(), literal_split(np.ones(3938, bool)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_rows_with_an_unknown_label_drop_out_before_the_split():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(237, 2))
    labels[rng.random((237, 2)) < 0.2] = np.nan
    labels[5] = np.inf
    known = np.isfinite(labels).all(axis=1)
    assert 100 < known.sum() < 200
    for found, expected in zip(split_80_10_10(labels).values(), literal_split(known), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert known[found].all()


def test_the_split_leaves_the_global_random_generator_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    split_80_10_10(np.zeros((20, 1)))
    assert random.random() == expected


def sha256(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("number", OFFICIAL_SPLITS)
def test_official_index_files(number):
    splits = split_80_10_10(np.zeros((number, 1)))
    assert {name: sha256(splits[name]) for name in OFFICIAL_SPLITS[number]} == OFFICIAL_SPLITS[number]


def test_counts_of_all_official_splits():
    """With CRYSTALFRAMER_EXTRA_DATA naming a folder that holds splits.json: counts, and hashes where all rows count."""
    if "CRYSTALFRAMER_EXTRA_DATA" not in os.environ:
        pytest.skip("CRYSTALFRAMER_EXTRA_DATA names no folder with splits.json")
    official = json.loads((Path(os.environ["CRYSTALFRAMER_EXTRA_DATA"]) / "splits.json").read_text())
    by_rule = {name: splits for name, splits in official.items() if "megnet" not in name}  # those have fixed counts
    assert len(by_rule) >= 5
    for name, splits in by_rule.items():
        counts = [splits[split]["count"] for split in ("train", "val", "test")]
        candidates = [split_80_10_10(np.zeros((n, 1))) for n in range(sum(counts), sum(counts) + 3)]
        fitting = [c for c in candidates if [len(c[split]) for split in ("train", "val", "test")] == counts]
        assert fitting, name
        if name in ("jarvis__dft_3d_2021", "jarvis__oqmd_3d"):  # the others miss labels of unknown rows
            stated = {s: v["sha256_of_int64le_row_indices"] for s, v in splits.items() if len(v) > 3}
            assert any(stated == {s: sha256(c[s]) for s in stated} for c in fitting), name


# The prepared store


def test_prepared_crystals_are_those_of_the_records(tmp_path):
    dataset = open_small(tmp_path, targets=("e_above_hull", "e_form"))
    assert [target.name for target in dataset.targets] == ["e_above_hull", "e_form"]
    table, records = dataset.table, raw_records(60)
    assert table.ids.tolist() == [record["id"] for record in records]
    for row, record in enumerate(records):
        atoms = slice(*table.atom_offset[row : row + 2])
        assert table.species[atoms].tolist() == [Element(symbol).Z for symbol in record["species"]]
        np.testing.assert_allclose(table.lattice[row], record["lattice"], rtol=1e-15)
        positions = np.array(record["frac_coords"]) @ np.array(record["lattice"])
        np.testing.assert_allclose(table.position[atoms], positions, atol=1e-12)
        assert dataset.labels[row].tolist() == [record["e_above_hull"], record["formation_energy_per_atom"]]
    for found, expected in zip(dataset.splits.values(), literal_split(np.ones(60, bool)), strict=True):
        assert found.tolist() == expected


def test_a_prepared_store_is_read_without_the_records(tmp_path):
    first = open_small(tmp_path)
    again = open_small(tmp_path, small_set(UnreadableSet))
    assert_same_dataset(first, again)
    assert isinstance(again.table.neighbor, np.memmap)
    assert stores_in(tmp_path) == [store_folder(tmp_path).name]


def test_another_cutoff_or_source_is_another_store(tmp_path, monkeypatch):
    near = open_small(tmp_path)
    with pytest.raises(AssertionError, match="records were asked for"):
        open_small(tmp_path, small_set(UnreadableSet), cutoff=CUTOFF + 0.5)
    far = open_small(tmp_path, cutoff=CUTOFF + 0.5)
    assert len(stores_in(tmp_path)) == 2 and far.table.count.sum() > near.table.count.sum()
    assert_same_dataset(near, open_small(tmp_path, small_set(UnreadableSet)))
    monkeypatch.setattr(UnreadableSet, "sha256", lambda self: "0" * 64)
    with pytest.raises(AssertionError, match="records were asked for"):
        open_small(tmp_path, small_set(UnreadableSet))


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped bit", "cut", "missing"])
def test_a_damaged_store_is_prepared_again(tmp_path, how):
    original = open_small(tmp_path)
    intact = {name: np.array(getattr(original.table, name)) for name in COLUMNS}
    files = sorted(path.name for path in store_folder(tmp_path).iterdir())
    assert len(files) == len(COLUMNS) + 3  # labels, row_of_record, manifest.json
    for name in files:
        damage(store_folder(tmp_path) / name, how)
        with pytest.raises(AssertionError, match="records were asked for"):
            open_small(tmp_path, small_set(UnreadableSet))
        mended = open_small(tmp_path)
        for column, values in intact.items():
            np.testing.assert_array_equal(getattr(mended.table, column), values)
        assert_same_dataset(mended, open_small(tmp_path, small_set(UnreadableSet)))


KILLED_PREPARATION = """
import os, signal, sys
from pathlib import Path
import test_data
from crystalframer_jax.data import store

save = store.np.save
def save_and_die(file, *args, **kwargs):
    save(file, *args, **kwargs)
    if Path(file).name == "image.npy":
        os.kill(os.getpid(), signal.SIGKILL)
store.np.save = save_and_die
test_data.open_small(Path(sys.argv[1]))
"""


def in_process(code: str, *arguments: object) -> subprocess.Popen:
    """Start a Python process that can import this file."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_that_is_used(tmp_path):
    with in_process(KILLED_PREPARATION, tmp_path) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    (left,) = stores_in(tmp_path)
    assert left.startswith(".small-") and (tmp_path / left / "image.npy").exists()
    dataset = open_small(tmp_path)
    assert stores_in(tmp_path) == [store_folder(tmp_path).name]
    assert_same_dataset(dataset, open_small(tmp_path / "elsewhere"))


def test_an_interrupted_preparation_cleans_up(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_small(tmp_path)
    assert not stores_in(tmp_path)


ONE_OF_TWO_PREPARATIONS = """
import sys, time
from pathlib import Path
import test_data

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

class Watched(test_data.SmallSet):
    def records(self):
        (folder / f"{me}-prepares").touch()
        while not (folder / f"{other}-starts").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # enough for the other process to look for the store
        return super().records()

(folder / f"{me}-starts").touch()
test_data.open_small(folder / "data", test_data.small_set(Watched))
"""


def test_of_two_processes_that_need_a_store_one_prepares_it(tmp_path):
    processes = [in_process(ONE_OF_TWO_PREPARATIONS, tmp_path, *names) for names in (("a", "b"), ("b", "a"))]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("*-prepares"))) == 1
    assert stores_in(tmp_path / "data") == [store_folder(tmp_path / "data").name]
    assert_same_dataset(open_small(tmp_path / "data", small_set(UnreadableSet)), open_small(tmp_path / "elsewhere"))


BAD_RECORDS = {
    "unknown element": {"species": ["Xx"]},
    "NaN coordinate": {"frac_coords": [[float("nan"), 0, 0]], "species": ["Fe"]},
    "flat cell": {"lattice": [[1, 0, 0], [0, 1, 0], [1, 1, 0]]},
    "no species": {"species": None},
    "one species too many": {"species": ["Fe"] * 99},
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_bad_record_is_skipped_and_shifts_no_other(tmp_path, capsys, kind):
    number, unlabelled = 37, 80
    changes = {number: BAD_RECORDS[kind], unlabelled: {"e_above_hull": "na"}}
    dataset = open_small(tmp_path, small_set(count=120, changes=changes))
    records = raw_records(120)
    bad_id = records[number]["id"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert bad_id in line

    ids = dataset.table.ids.tolist()
    assert ids == [record["id"] for i, record in enumerate(records) if i != number]
    label_of = {record["id"]: record["formation_energy_per_atom"] for record in records}
    assert dataset.labels[:, 0].tolist() == [label_of[id] for id in ids]
    known = np.arange(120) != unlabelled  # the bad record counts in the split, and drops out afterwards
    for found, expected in zip(dataset.splits.values(), literal_split(known), strict=True):
        assert [ids[row] for row in found] == [records[i]["id"] for i in expected if i != number]
    assert len(np.concatenate(list(dataset.splits.values()))) == 95 + 2 * 11 - 1


def test_too_many_bad_records_are_an_error(tmp_path):
    changes = {number: BAD_RECORDS["unknown element"] for number in (10, 20)}
    with pytest.raises(CrystalError, match=rf"2 of 120 records.*{raw_records(11)[10]['id']}"):
        open_small(tmp_path, small_set(count=120, changes=changes))
    assert not stores_in(tmp_path)


# Training batches


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return open_small(tmp_path_factory.mktemp("data"))


def rows_of(batch, dataset: Dataset) -> list[int]:
    """The crystals of a batch, recognised by their label."""
    labels = dataset.labels[:, 0].astype(np.float32)
    assert len(set(labels.tolist())) == len(labels)
    return [int(np.flatnonzero(labels == target)[0]) for target in batch.targets[batch.target_mask]]


def test_the_order_is_a_function_of_seed_and_epoch(dataset):
    batches, again = (TrainingBatches(dataset, 7, n_epochs=3, seed=5) for _ in range(2))
    again[10], again.order(2)  # what was asked for before does not matter
    for epoch in range(3):
        np.testing.assert_array_equal(batches.order(epoch), again.order(epoch))
        assert sorted(batches.order(epoch)) == sorted(dataset.splits["train"])
    assert not np.array_equal(batches.order(0), batches.order(1))
    assert not np.array_equal(batches.order(0), TrainingBatches(dataset, 7, 3, seed=6).order(0))
    assert not np.array_equal(batches.order(1), TrainingBatches(dataset, 7, 3, seed=6).order(0))


def test_every_epoch_visits_a_crystal_at_most_once_and_drops_the_incomplete_batch(dataset):
    batches = TrainingBatches(dataset, 7, n_epochs=2, seed=0)
    assert (batches.steps_per_epoch, len(batches)) == (6, 12)  # 48 crystals
    for epoch in range(2):
        visited = [rows_of(batches[step], dataset) for step in range(6 * epoch, 6 * epoch + 6)]
        assert [len(rows) for rows in visited] == [7] * 6
        flat = list(itertools.chain(*visited))
        assert len(set(flat)) == 42 and set(flat) <= set(dataset.splits["train"].tolist())
        assert flat == batches.order(epoch)[:42].tolist()


def test_batches_hold_the_atoms_of_their_crystals(dataset):
    batch = TrainingBatches(dataset, 7, n_epochs=1, seed=0)[2]
    table = dataset.table
    for place, row in enumerate(rows_of(batch, dataset)):
        atoms = batch.crystal_of_atom == place
        assert batch.crystal_sizes[place] == atoms.sum() == table.num_atoms[row]
        expected = table.species[slice(*table.atom_offset[row : row + 2])]
        assert batch.species[atoms][np.argsort(batch.atom_in_crystal[atoms])].tolist() == expected.tolist()


@pytest.mark.parametrize("first_step", [0, 5, 11])
def test_iterating_from_a_step_gives_the_batches_by_number(dataset, first_step):
    batches = TrainingBatches(dataset, 7, n_epochs=2, seed=3)
    iterated = list(batches.iterate(first_step))
    assert len(iterated) == len(batches) - first_step
    for step, batch in enumerate(iterated, first_step):
        assert_same_batch(batch, batches[step])


def test_a_batch_size_beyond_the_training_set_takes_all_of_it(dataset):
    batches = TrainingBatches(dataset, 1000, n_epochs=2, seed=3)
    assert (batches.batch_size, batches.steps_per_epoch, len(batches)) == (48, 1, 2)
    assert sorted(rows_of(batches[1], dataset)) == sorted(dataset.splits["train"])
