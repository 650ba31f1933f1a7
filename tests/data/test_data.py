"""Labels, splits, and the prepared store."""

import csv
import dataclasses
import hashlib
import json
import os
import random
import signal
import struct
from pathlib import Path

import forks
import numpy as np
import pytest
import small_sets
from pymatgen.core import Element
from small_sets import (
    CUTOFF,
    assert_same_dataset,
    literal_split,
    open_small,
    prepare_small,
    raw_records,
    rows_folder,
    small_set,
)

from crystalframer_jax.batching.table import COLUMNS
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data import build, store
from crystalframer_jax.data import prepare as module
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.prepare import Preparation
from crystalframer_jax.data.records import DataError, parse_label
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.splits import differences, given_split, random_split, record_hash, split_by_group
from crystalframer_jax.data.store import Dataset, load_dataset
from crystalframer_jax.data.structures import from_dict
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.neighbors import neighbor_rows

UNREADABLE = small_set(readable=False)  # the store must do without the records


def left_in(folder: Path) -> list[str]:
    """What the folder of a target set holds."""
    return sorted(path.name for path in folder.iterdir())


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


def test_split_of_the_bundled_set():
    splits = random_split(np.arange(3938))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [3150, 393, 393]
    assert len(np.unique(np.concatenate(list(splits.values())))) == 3150 + 2 * 393
    for found, expected in zip(splits.values(), literal_split(np.ones(3938, bool)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_split_of_some_of_the_records():
    known = np.random.default_rng(0).random(237) > 0.3
    for found, expected in zip(random_split(np.flatnonzero(known)).values(), literal_split(known), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert known[found].all()


def test_another_seed_is_another_split():
    first, second = (random_split(np.arange(50), seed=seed) for seed in (123, 124))
    assert sorted(np.concatenate(list(second.values()))) == list(range(50))
    assert set(first["test"]) != set(second["test"])


def test_a_split_with_counts():
    splits = random_split(np.arange(100), (60, 30, 5))
    order = list(range(100))
    random.Random(123).shuffle(order)
    assert {name: rows.tolist() for name, rows in splits.items()} == {
        "train": order[:60],
        "val": order[65:95],
        "test": order[95:],
    }
    with pytest.raises(ValueError, match=r"100 crystals are too few for 60 \+ 36 \+ 5"):
        random_split(np.arange(100), (60, 36, 5))


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    records = np.flatnonzero(rng.random(400) < 0.8)
    groups = [f"g{number}" for number in rng.integers(40, size=len(records))]
    splits = split_by_group(records, groups)
    assert sorted(np.concatenate(list(splits.values()))) == records.tolist()
    group_of = dict(zip(records.tolist(), groups, strict=True))
    found = {name: {group_of[record] for record in rows.tolist()} for name, rows in splits.items()}
    assert not (found["train"] & found["val"] or found["train"] & found["test"] or found["val"] & found["test"])
    for name in ("val", "test"):
        assert 0.1 * len(records) <= len(splits[name]) < 0.18 * len(records)
    again = split_by_group(records, groups)
    assert all(np.array_equal(again[name], rows) for name, rows in splits.items())
    assert set(split_by_group(records, groups, seed=5)["test"].tolist()) != set(splits["test"].tolist())


def test_a_large_group_is_for_training():
    groups = ["large"] * 50 + [f"g{number}" for number in range(50)]
    for seed in range(20):
        splits = split_by_group(np.arange(100), groups, seed)
        assert [len(splits[name]) for name in ("train", "val", "test")] == [80, 10, 10]


def test_a_given_split():
    splits = given_split(np.array([2, 5, 7, 8]), ["val", "train", "test", "train"])
    assert {name: rows.tolist() for name, rows in splits.items()} == {"train": [5, 8], "val": [2], "test": [7]}


def test_the_split_leaves_the_global_random_generator_alone():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    random_split(np.arange(20))
    assert random.random() == expected


OFFICIAL = {name: known.official_splits for name, known in TARGET_SETS.items() if known.official_splits}


def test_the_twelve_targets_of_the_paper_have_official_splits():
    of_paper = [name for name in OFFICIAL if name.startswith("jarvis__")]
    assert sum(len(TARGET_SETS[name].targets) for name in of_paper) == 12
    assert all(set(OFFICIAL[name]) == {"train", "val", "test"} for name in of_paper)


def test_every_crystal_of_matbench_phonons_is_tested_once():
    """The test crystals of each fold are the official ones: their checksum is that of the official list."""
    tested, validated = [], []
    for fold in range(5):
        known = TARGET_SETS[f"matbench_phonons-fold_{fold}"]
        records = list(known.source.open(known.targets).records())
        assert all(record.labels[0] > 50 for record in records)
        rows = {
            name: np.array([i for i, r in enumerate(records) if r.split == name]) for name in ("train", "val", "test")
        }
        facts, ids = known.official_splits["test"], [record.id for record in records]
        assert not differences(rows, ids, known.official_splits) and facts.count == 253
        tested += rows["test"].tolist()
        validated.append({*rows["val"]})
        assert 80 < len(rows["val"]) < 130 and len(rows["train"]) + len(rows["val"]) == 1012
    assert sorted(tested) == list(range(1265))
    common = set.intersection(*({*validated[i]} | {*tested[253 * i : 253 * (i + 1)]} for i in range(5)))
    assert common == set.union(*validated)  # whoever validates does so wherever it is not tested


@pytest.mark.parametrize("name", ["jarvis__dft_3d_2021", "jarvis__megnet", "jarvis__oqmd_3d"])
def test_the_rule_gives_the_official_splits_where_all_labels_are_known(name):
    known = TARGET_SETS[name]
    splits = random_split(np.arange(known.num_records), known.split_counts)
    hashes = {split: facts.sha256 for split, facts in known.official_splits.items() if facts.sha256}
    assert len(hashes) >= 2
    assert {split: record_hash(splits[split]) for split in hashes} == hashes
    assert {split: len(rows) for split, rows in splits.items()} == {s: f.count for s, f in OFFICIAL[name].items()}


def test_record_hash():
    content = struct.pack("<3q", 5, 0, 2**40)
    assert record_hash(np.array([5, 0, 2**40])) == hashlib.sha256(content).hexdigest()


def test_counts_of_all_official_splits():
    """With CRYSTALFRAMER_EXTRA_DATA naming a folder that holds splits.json: counts, and hashes where all rows count."""
    if "CRYSTALFRAMER_EXTRA_DATA" not in os.environ:
        pytest.skip("CRYSTALFRAMER_EXTRA_DATA names no folder with splits.json")
    official = json.loads((Path(os.environ["CRYSTALFRAMER_EXTRA_DATA"]) / "splits.json").read_text())
    for name, splits in official.items():
        for split, facts in splits.items():
            found = OFFICIAL[name][split]
            assert [found.count, found.first_id, found.last_id] == list(facts.values())[:3]
            assert found.sha256 == facts.get("sha256_of_int64le_row_indices", "")
    by_rule = {name: splits for name, splits in official.items() if "megnet" not in name}  # those have fixed counts
    assert len(by_rule) >= 5
    for name, splits in by_rule.items():
        counts = [splits[split]["count"] for split in ("train", "val", "test")]
        candidates = [random_split(np.arange(n)) for n in range(sum(counts), sum(counts) + 3)]
        fitting = [c for c in candidates if [len(c[split]) for split in ("train", "val", "test")] == counts]
        assert fitting, name
        if name in ("jarvis__dft_3d_2021", "jarvis__oqmd_3d"):  # the others miss labels of unknown rows
            stated = {s: v["sha256_of_int64le_row_indices"] for s, v in splits.items() if len(v) > 3}
            assert any(stated == {s: record_hash(c[s]) for s in stated} for c in fitting), name


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
    again = load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
    assert_same_dataset(first, again)
    assert isinstance(again.table.image.base, np.memmap)
    rows = rows_folder(tmp_path).name
    assert left_in(tmp_path / "small") == ["crystals", rows]
    assert left_in(tmp_path) == [".small.lock", "small"]


def test_another_cutoff_needs_no_records_and_another_source_replaces_all(tmp_path):
    near = open_small(tmp_path)
    far = load_dataset(tmp_path / "small", ("e_form",), CUTOFF + 0.5)
    assert far.table.count.sum() > near.table.count.sum()
    assert len(list((tmp_path / "small").glob("rows-*"))) == 2
    assert not prepare_small(tmp_path)  # there already
    other = open_small(tmp_path, small_set(count=61))
    assert len(other.table) == 61 and other.digest != near.digest
    assert len(list((tmp_path / "small").glob("rows-*"))) == 1


def test_neighbor_rows_are_those_of_each_crystal(tmp_path):
    table = open_small(tmp_path).table
    for row, record in enumerate(raw_records(60)):
        lattice = np.array(record["lattice"])
        numbers = np.array([Element(symbol).Z for symbol in record["species"]])
        crystal = Crystal(numbers, np.array(record["frac_coords"]) @ lattice, lattice)
        expected = neighbor_rows(crystal, CUTOFF)
        atoms, edges = slice(*table.atom_offset[row : row + 2]), slice(*table.edge_offset[row : row + 2])
        np.testing.assert_array_equal(table.count[atoms], expected.count)
        np.testing.assert_array_equal(table.reverse[edges], expected.reverse)
        np.testing.assert_array_equal(expected.center[table.reverse[edges]], expected.index)
        np.testing.assert_allclose(table.image[edges] @ table.basis[row], expected.image @ lattice, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_parts_of_any_size_join_to_the_same_store(tmp_path, monkeypatch, chunk):
    changes = {3: {"species": ["Xx"]}, 20: {"species": ["Xx"]}}
    target_set = small_set(changes=changes)
    expected = open_small(tmp_path / "a", target_set)
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(store, "CHUNK_ATOMS", 10 * chunk)
    assert_same_dataset(expected, open_small(tmp_path / "b", target_set))


def test_worker_processes_make_the_same_store(tmp_path):
    prepare_small(tmp_path, options=Preparation(workers=2))
    parallel = load_dataset(tmp_path / "small", ("e_form",), CUTOFF, workers=2)
    assert_same_dataset(open_small(tmp_path / "serial"), parallel)


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped bit", "cut", "missing"])
def test_damage_is_noticed_and_preparation_mends_it(tmp_path, how):
    intact = copy_of(open_small(tmp_path))
    files = sorted([*(tmp_path / "small" / "crystals").iterdir(), *rows_folder(tmp_path).iterdir()])
    assert len(files) == len(COLUMNS) + 9  # labels, leaked, three splits, two reports, two of manifest.json
    for file in files:
        damage(file, how)
        if file.parent.name == "crystals":
            with pytest.raises(DataError, match=r"small is damaged in .*; run crystalframer prepare"):
                load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
            with pytest.raises(AssertionError, match="records were asked for"):
                prepare_small(tmp_path, UNREADABLE)
            assert prepare_small(tmp_path)
        assert_same_dataset(intact, load_dataset(tmp_path / "small", ("e_form",), CUTOFF))


def copy_of(dataset: Dataset) -> Dataset:
    """The dataset in memory: its files may change."""
    table = dataclasses.replace(dataset.table, **{name: np.array(getattr(dataset.table, name)) for name in COLUMNS})
    splits = {name: np.array(rows) for name, rows in dataset.splits.items()}
    return dataclasses.replace(dataset, table=table, labels=np.array(dataset.labels), splits=splits)


def test_a_set_that_was_not_prepared(tmp_path):
    with pytest.raises(
        DataError, match=r"megnet is not prepared in .*; run crystalframer prepare --target_set=jarvis__megnet"
    ):
        open_dataset("jarvis__megnet", ("e_form",), CUTOFF, str(tmp_path))
    with pytest.raises(ConfigError, match=r"'mine' is not known; allowed: mp_flla_2015, .*\(none\)"):
        open_dataset("mine", ("e_form",), CUTOFF, str(tmp_path))
    with pytest.raises(ConfigError, match="must be a name of letters"):
        open_dataset("../mine", ("e_form",), CUTOFF, str(tmp_path))


def test_a_bundled_set_prepares_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGET_SETS, "small", small_set())
    dataset = open_dataset("small", ("e_form",), CUTOFF, str(tmp_path))
    assert_same_dataset(dataset, open_small(tmp_path / "elsewhere"))
    monkeypatch.setitem(TARGET_SETS, "small", UNREADABLE)
    assert_same_dataset(dataset, open_dataset("small", ("e_form",), CUTOFF, str(tmp_path)))


KILLED_PREPARATION = """
import os, signal, sys
from pathlib import Path
import small_sets
from crystalframer_jax.data import build, prepare, store

parts, prepare.CHUNK, store.CHUNK_ATOMS = int(sys.argv[2]), 10, 60
replace = os.replace
def replace_and_die(*args):
    global parts
    replace(*args)
    parts -= 1
    if not parts:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
small_sets.open_small(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "moment", [2, 6, 7, 8, 9, 11, 12]
)  # after some of: 6 parts, two reports, crystals, parts, rows
def test_a_killed_preparation_goes_on(tmp_path, monkeypatch, moment):
    process = forks.run("-c", KILLED_PREPARATION, tmp_path, moment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    is_prepared = (tmp_path / "small" / "crystals").exists()
    assert is_prepared == (moment >= 9)
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "small").glob(".*.parts/part-*.npz")}
    assert parts
    monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(store, "CHUNK_ATOMS", 60)
    made, make = [], build.replacing
    monkeypatch.setattr(build, "replacing", lambda file: made.append(file) or make(file))
    dataset = open_small(tmp_path)
    assert not set(made) & set(parts)  # what was done is not done again
    assert left_in(tmp_path / "small") == ["crystals", rows_folder(tmp_path).name]
    assert_same_dataset(dataset, open_small(tmp_path / "elsewhere"))


def test_a_damaged_part_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)
    join = module.join_parts

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "join_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_small(tmp_path)
    parts = sorted((tmp_path / "small").glob(".crystals-*.parts/*"))
    assert len(parts) == 6
    for part, how in zip(parts, ["cut", "missing"] * 3, strict=True):
        damage(part, how)
    monkeypatch.setattr(module, "join_parts", join)
    assert_same_dataset(open_small(tmp_path), open_small(tmp_path / "elsewhere"))


def test_parts_of_another_source_are_thrown_away(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "join_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_small(tmp_path)
    other = small_set(count=50)
    assert_same_dataset(open_small(tmp_path, other), open_small(tmp_path / "elsewhere", other))
    assert not list((tmp_path / "small").glob(".*"))


ONE_OF_TWO_PREPARATIONS = """
import sys, time
from pathlib import Path
import small_sets

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
raw_records = small_sets.raw_records

def watched(count):
    (folder / f"{me}-prepares").touch()
    while not (folder / f"{other}-starts").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # enough for the other process to look for the store
    return raw_records(count)

small_sets.raw_records = watched
(folder / f"{me}-starts").touch()
small_sets.open_small(folder / "data")
"""


def test_of_two_processes_that_need_a_store_one_prepares_it(tmp_path):
    processes = [forks.Fork("-c", ONE_OF_TWO_PREPARATIONS, tmp_path, *names) for names in (("a", "b"), ("b", "a"))]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.glob("*-prepares"))) == 1
    prepared = load_dataset(tmp_path / "data" / "small", ("e_form",), CUTOFF)
    assert_same_dataset(prepared, open_small(tmp_path / "elsewhere"))


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
    no_labels = {"e_above_hull": "na", "formation_energy_per_atom": None}
    dataset = open_small(tmp_path, small_set(count=120, changes={number: BAD_RECORDS[kind], unlabelled: no_labels}))
    records = raw_records(120)
    bad_id = records[number]["id"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert "1 of 120 records" in line and f"line {number + 1}" in line
    with (tmp_path / "small" / "crystals" / "skipped.csv").open() as stream:
        ((id, where, reason),) = list(csv.reader(stream))[1:]
    assert id == bad_id and where == f"line {number + 1}" and len(reason) > 10

    ids = dataset.table.ids.tolist()
    assert ids == [record["id"] for i, record in enumerate(records) if i != number]
    label_of = {record["id"]: record["formation_energy_per_atom"] for record in records}
    label_of[records[unlabelled]["id"]] = np.nan
    np.testing.assert_array_equal(dataset.labels[:, 0], [label_of[id] for id in ids])
    known = np.arange(120) != unlabelled  # the bad record counts in the split, and drops out afterwards
    known[number] = True
    for found, expected in zip(dataset.splits.values(), literal_split(known), strict=True):
        assert [ids[row] for row in found] == [records[i]["id"] for i in expected if i != number]
    assert len(np.concatenate(list(dataset.splits.values()))) == 95 + 2 * 11 - 1


def test_a_crystal_without_the_label_asked_for_is_in_no_split(tmp_path):
    changes = {number: {"e_above_hull": "na"} for number in range(0, 60, 3)}
    both = open_small(tmp_path, small_set(changes=changes), ("e_form", "e_above_hull"))
    one = open_small(tmp_path, small_set(changes=changes), ("e_above_hull",))
    for name, rows in both.splits.items():
        assert one.splits[name].tolist() == [row for row in rows.tolist() if row % 3]
    assert sum(map(len, one.splits.values())) < sum(map(len, both.splits.values())) == 60


def test_too_many_bad_records_are_an_error(tmp_path):
    changes = {number: BAD_RECORDS["unknown element"] for number in range(10, 17)}
    target_set = small_set(count=120, changes=changes)
    with pytest.raises(DataError, match=r"7 of 120 records .*skipped.csv.* line 11: .*--max_bad_share=0.06"):
        open_small(tmp_path, target_set)
    assert not (tmp_path / "small" / "crystals").exists()
    assert len((tmp_path / "small" / "skipped.csv").read_text().splitlines()) == 8
    assert prepare_small(tmp_path, target_set, Preparation(max_bad_share=0.06))
    assert len(load_dataset(tmp_path / "small", ("e_form",), CUTOFF).table) == 113


def test_what_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    def unreadable(structure, id):
        raise CrystalError(f"{id}: needs ASE; pip install ase")

    with monkeypatch.context() as patch:
        patch.setattr(small_sets, "from_dict", unreadable)
        with pytest.raises(DataError, match=r"60 of 60 records .*needs ASE"):
            prepare_small(tmp_path)
    assert len(open_small(tmp_path).table) == 60
    assert left_in(tmp_path / "small") == ["crystals", rows_folder(tmp_path).name]


def test_parts_in_chunks_of_another_size_are_not_used(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "CHUNK", 20)
    with monkeypatch.context() as patch:
        patch.setattr(module, "join_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_small(tmp_path)
    monkeypatch.setattr(module, "CHUNK", 10)
    assert_same_dataset(open_small(tmp_path), open_small(tmp_path / "elsewhere"))


def test_a_split_of_ones_own_of_a_bundled_set_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGET_SETS, "small", small_set())
    prepare_small(tmp_path, options=Preparation(split_seed=4))
    splits = open_dataset("small", ("e_form",), CUTOFF, str(tmp_path)).splits
    order = list(range(60))
    random.Random(4).shuffle(order)
    assert splits["test"].tolist() == order[54:]


def test_a_name_of_excessive_length_is_a_bad_record(tmp_path):
    dataset = open_small(tmp_path, small_set(changes={5: {"id": "x" * 20_000}}))
    assert len(dataset.table) == 59 and dataset.table.ids.itemsize <= 4 * 200


@pytest.mark.parametrize(
    "change",
    [
        {"frac_coords": np.zeros((3, 5)).tolist(), "species": ["H"] * 5},
        {"lattice": [3.0] * 9},
        {"lattice": [[1e200, 0, 0], [0, 1e200, 0], [0, 0, 1e200]]},
        {"lattice": None},
    ],
)
def test_structures_that_are_not_what_they_seem(tmp_path, change):
    assert len(open_small(tmp_path, small_set(changes={7: change})).table) == 59


@pytest.mark.parametrize("cartesian", ["false", None, 2])
def test_a_flag_that_is_none(cartesian):
    structure = {"lattice_mat": np.eye(3) * 4, "elements": ["Fe"], "coords": [[0, 0, 0.5]], "cartesian": cartesian}
    with pytest.raises(CrystalError, match=r"cartesian=.* is neither true nor false"):
        from_dict(structure, "a")


def test_a_target_without_labels_in_a_split(tmp_path):
    test = random_split(np.arange(60))["test"].tolist()
    target_set = small_set(changes={number: {"e_above_hull": "na"} for number in test})
    assert len(open_small(tmp_path, target_set).splits["test"]) == 6
    with pytest.raises(DataError, match="small: no crystal for test has a label e_above_hull"):
        load_dataset(tmp_path / "small", ("e_above_hull",), CUTOFF)


def test_an_unknown_target_is_told_before_all_work(tmp_path):
    prepare_small(tmp_path)
    with pytest.raises(ConfigError, match="'gap' is not in target set small; it has e_form, e_above_hull"):
        load_dataset(tmp_path / "small", ("gap",), CUTOFF)
    assert left_in(tmp_path / "small") == ["crystals"]


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    """And not a crash, as it is when it shows while memory is written back to a mapped file."""
    written = []
    write = np.lib.format.write_array_header_1_0

    def limited(stream, header):
        write(stream, header)
        stream.flush()
        written.append(stream.name)
        os.ftruncate(stream.fileno(), 0)
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())

    prepare_small(tmp_path)
    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", limited)
    with pytest.raises(OSError, match="No space left"):
        load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
    monkeypatch.undo()
    assert written
    assert_same_dataset(open_small(tmp_path), open_small(tmp_path / "elsewhere"))


def test_sources_that_leave_nothing(tmp_path):
    with pytest.raises(DataError, match="the source has no records"):
        open_small(tmp_path, small_set(count=0))
    no_labels = dict.fromkeys(("e_above_hull", "formation_energy_per_atom"), "na")
    with pytest.raises(DataError, match="no record has a label"):
        open_small(tmp_path, small_set(count=20, changes=dict.fromkeys(range(20), no_labels)))
    with pytest.raises(DataError, match="no crystal is left for val"):
        open_small(tmp_path, small_set(count=9))
