"""Splits that come with users' data: files or folders by split, folds, validation taken out of training."""

import json

import ase.io
import numpy as np
import pytest
from ase import Atoms
from user_files import cif, prepared, records, refused, write_cifs

from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.records import DataError

PARTS = {"train": slice(0, 7), "val": slice(7, 10), "test": slice(10, 12)}
NAMES = [
    {"train": "train", "val": "val", "test": "test"},
    {"train": "training", "val": "validation", "test": "testing"},
    {"train": "train", "val": "valid", "test": "test"},
    {"train": "TRAIN", "val": "Dev", "test": "Test"},
    {"train": "data_train", "val": "data-val", "test": "split.test_2"},
]


def lines(part: str) -> str:
    return "id,e\n" + "".join(f"{record['id']},{record['e_form']}\n" for record in records()[PARTS[part]])


def assert_given(made) -> None:
    for part, chosen in PARTS.items():
        assert made.ids(part) == [record["id"] for record in records()[chosen]]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names["train"])
def test_files_by_split(tmp_path, capsys, names):
    source = tmp_path / "source"
    write_cifs(source)
    for part, name in names.items():
        (source / f"{name}.csv").write_text(lines(part))
    (source / "train_and_test.csv").write_text("no table")
    (source / "README.txt").write_text("no table")
    assert_given(prepared(tmp_path / "data", source, capsys))


@pytest.mark.parametrize("names", NAMES[:4], ids=lambda names: names["train"])
def test_folders_by_split(tmp_path, capsys, names):
    source = tmp_path / "source"
    for part, name in names.items():
        (source / name).mkdir(parents=True)
        for record in records()[PARTS[part]]:
            (source / name / f"{record['id']}.cif").write_text(cif(record))
        (source / name / "id_prop.csv").write_text(lines(part).split("\n", 1)[1])
    assert_given(prepared(tmp_path / "data", source, capsys))


def test_tables_without_header_by_split(tmp_path, capsys):
    write_cifs(tmp_path / "source")
    for part in PARTS:
        (tmp_path / "source" / f"id_prop_{part}.csv").write_text(lines(part).split("\n", 1)[1])
    assert_given(prepared(tmp_path / "data", tmp_path / "source", capsys))


@pytest.mark.parametrize("ending", ["json", "jsonl", "extxyz"])
def test_files_of_other_kinds_by_split(tmp_path, capsys, ending):
    (tmp_path / "source").mkdir()
    for part, chosen in PARTS.items():
        file = tmp_path / "source" / f"{part}.{ending}"
        if ending == "extxyz":
            frames = []
            for record in records()[chosen]:
                positions = np.array(record["frac_coords"]) @ record["lattice"]
                frame = Atoms(record["species"], positions, cell=record["lattice"], pbc=True)
                frame.info = {"id": record["id"], "e_form": record["e_form"]}
                frames.append(frame)
            ase.io.write(file, frames)
        else:
            texts = [json.dumps(record) for record in records()[chosen]]
            file.write_text("\n".join(texts) if ending == "jsonl" else f"[{','.join(texts)}]")
    assert_given(prepared(tmp_path / "data", tmp_path / "source", capsys))


def test_what_is_unclear_is_refused(tmp_path):
    write_cifs(tmp_path)
    for name in ("train.csv", "val.csv", "validation.csv"):
        (tmp_path / name).write_text(lines("train"))
    with pytest.raises(DataError, match=r"both val.csv and validation.csv are for val; leave one"):
        custom_source(tmp_path, CustomData())
    (tmp_path / "validation.csv").unlink()
    (tmp_path / "val.csv").unlink()
    with pytest.raises(DataError, match=r"no id_prop.csv .*one of its files: train.csv"):
        custom_source(tmp_path, CustomData())


def test_a_crystal_of_two_splits_is_told(tmp_path, capsys):
    """Once in each, as a leak; with another label it is in neither."""
    source = tmp_path / "source"
    write_cifs(source)
    first, second = records(2)
    for part in PARTS:
        more = f"{first['id']},{first['e_form']}\n{second['id']},9.5\n" if part == "test" else ""
        (source / f"{part}.csv").write_text(lines(part) + more)
    made = prepared(tmp_path / "data", source, capsys)
    assert first["id"] in made.ids("train") and first["id"] in made.ids("test")
    assert second["id"] not in made.ids("train") + made.ids("test")
    assert "1 test crystal is also in training: 1 by id" in made.text and "2 with contradicting labels" in made.text


def test_only_training_and_test(tmp_path, capsys):
    source = tmp_path / "source"
    write_cifs(source)
    for part in ("train", "test"):
        (source / f"{part}.csv").write_text(lines(part))
    message = refused(tmp_path / "data", source)
    assert "no crystal is left for val" in message and "--val_share=0.1" in message
    made = prepared(tmp_path / "data", source, capsys, "--val_share=0.3")
    assert len(made.ids("val")) == 2 and len(made.ids("train")) == 5 and len(made.ids("test")) == 2
    assert sorted(made.ids("val") + made.ids("train")) == sorted(record["id"] for record in records()[PARTS["train"]])
    other = prepared(tmp_path / "other", source, capsys, "--val_share=0.3", "--split_seed=7")
    assert other.ids("val") != made.ids("val") and other.ids("test") == made.ids("test")
    again = prepared(tmp_path / "again", source, capsys, "--val_share=0.3")
    assert again.ids("val") == made.ids("val")
    for part in PARTS:
        (source / f"{part}.csv").write_text(lines(part))
    assert "3 crystals for validation already; leave --val_share out" in refused(
        tmp_path / "data", source, "--val_share=0.3"
    )


def folds(tmp_path, values: list, name: str = "fold"):
    write_cifs(tmp_path / "source")
    cells = zip(records(), values, strict=True)
    text = "".join(f"{record['id']},{record['e_form']},{fold}\n" for record, fold in cells)
    (tmp_path / "source" / "set.csv").write_text(f"id,e,{name}\n{text}")
    return tmp_path / "source" / "set.csv"


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ([0, 1, 2] * 4, "1"),
        ([0.0, 1.0, 2.0] * 4, "1"),
        (["fold_0", "fold_1", "fold_2"] * 4, "fold_1"),
        (["a", "b b", "c"] * 4, "b b"),
        (["00", "01", "02"] * 4, "1"),
    ],
)
def test_folds(tmp_path, capsys, values, asked):
    made = prepared(tmp_path / "data", folds(tmp_path, values), capsys, f"--test_fold={asked}")
    assert made.ids("test") == [record["id"] for record in records()[1::3]]
    assert len(made.ids("val")) == 1 and len(made.ids("train")) == 7
    assert made.columns["labels"].shape == (12, 1)


def test_folds_of_another_column_and_validation_out_of_them(tmp_path, capsys):
    source = folds(tmp_path, ["x", "y"] * 6, "cv")
    made = prepared(tmp_path / "data", source, capsys, "--test_fold=y", "--fold_column=cv", "--val_share=0.5")
    assert made.ids("test") == [record["id"] for record in records()[1::2]] and len(made.ids("val")) == 3
    message = refused(tmp_path / "data", source, "--test_fold=z", "--fold_column=cv")
    assert "no crystal is in fold --test_fold=z of column cv; choose among x, y" in message
    assert "there is no field --fold_column=fold" in refused(tmp_path / "data", source, "--test_fold=z")
    assert "leave --split_column and --group_column out" in refused(
        tmp_path / "data", source, "--test_fold=x", "--fold_column=cv", "--group_column=cv"
    )


def test_folds_that_are_not_asked_for(tmp_path, capsys):
    """They are no labels, and the user is told."""
    made = prepared(tmp_path / "data", folds(tmp_path, [0, 1, 2] * 4), capsys)
    assert made.columns["labels"].shape == (12, 1)
    assert "warning: the folds of column fold are not used: name the one for test with --test_fold" in made.text


def test_a_crystal_without_a_fold(tmp_path, capsys):
    source = folds(tmp_path, [0, 1, 2] * 3 + [0, 1, ""])
    made = prepared(tmp_path / "data", source, capsys, "--test_fold=1", "--max_bad_share=0.2")
    assert len(made.columns["ids"]) == 11 and "no fold in column fold" in (made.folder / "skipped.csv").read_text()
