"""Labels that are classes, as tables, JSON and other files have them."""

import json

import numpy as np
import pytest
from user_files import prepared, records, refused, write_cifs

from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.records import BadRecord, DataError, Record

CELLS = ["True", "false", "YES", "no", "t", "F", "y", "N", "1", "0", "1.0", "na"]
CLASSES = [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, np.nan]


def labels_of(source) -> list[float]:
    found = list(source.records())
    assert all(isinstance(record, Record) for record in found), found
    return [record.labels[0] for record in found]


def write_table(folder, cells, header="id,metal"):
    lines = [header] if header else []
    lines += [f"{record['id']},{cell}" for record, cell in zip(records(), cells, strict=True)]
    file = folder / ("set.csv" if header else "id_prop.csv")
    file.write_text("\n".join(lines))
    return file


def write_json(file, values, **more):
    rows = [record | {"metal": value} | more for record, value in zip(records(), values, strict=True)]
    for row in rows:
        row.pop("e_form")
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("options", [CustomData(), CustomData(targets=("metal",))])
def test_words_in_tables(tmp_path, options):
    """By name, or because there are no numbers."""
    write_cifs(tmp_path)
    np.testing.assert_array_equal(labels_of(custom_source(write_table(tmp_path, CELLS), options)), CLASSES)


def test_words_in_a_table_without_header(tmp_path):
    write_cifs(tmp_path)
    write_table(tmp_path, CELLS, header="")
    np.testing.assert_array_equal(labels_of(custom_source(tmp_path, CustomData())), CLASSES)


def test_truth_values_of_json(tmp_path):
    values = [True, False, "true", "False", 1, 0, None, *[True] * 5]
    expected = [1, 0, 1, 0, 1, 0, np.nan, *[1] * 5]
    file = write_json(tmp_path / "set.jsonl", values)
    np.testing.assert_array_equal(labels_of(custom_source(file, CustomData())), expected)


def test_truth_values_of_ase(tmp_path):
    from ase import Atoms
    from ase.io import write

    images = []
    for number, record in enumerate(records()):
        atoms = Atoms(record["species"], scaled_positions=record["frac_coords"], cell=record["lattice"], pbc=True)
        atoms.info = {"metal": number % 3 == 0}
        images.append(atoms)
    write(tmp_path / "set.extxyz", images)
    found = labels_of(custom_source(tmp_path / "set.extxyz", CustomData(targets=("metal",))))
    assert found == [float(number % 3 == 0) for number in range(12)]


@pytest.mark.parametrize("wrong", ["0.5", "2", "metal"])
def test_what_is_no_class_among_classes(tmp_path, wrong):
    write_cifs(tmp_path)
    source = custom_source(write_table(tmp_path, [*CELLS[:10], wrong, "na"]), CustomData())
    (bad,) = (record for record in source.records() if isinstance(record, BadRecord))
    assert bad.where == f"{tmp_path / 'set.csv'}:12" and bad.id == records()[10]["id"]
    assert bad.reason.startswith(f"metal is '{wrong}'; write True or False, 1 or 0, or na if unknown")


def test_a_word_among_numbers(tmp_path):
    write_cifs(tmp_path)
    source = custom_source(write_table(tmp_path, [*range(11), "True"]), CustomData())
    *good, bad = source.records()
    assert [record.labels for record in good] == [(float(number),) for number in range(11)]
    assert bad.where.endswith("set.csv:13") and "metal is 'True'; it names a class among numbers" in bad.reason


def test_classes_beside_numbers_are_labels_only_if_named(tmp_path, capsys):
    """As the fields is_stable, deprecated of downloaded records."""
    file = write_json(tmp_path / "set.jsonl", [True, False] * 6, gap=1.5)
    source = custom_source(file, CustomData())
    assert [target.name for target in source.targets] == ["gap"]
    assert source.notes == ("no target, although of classes: metal; name --targets to learn them",)
    found = prepared(tmp_path / "data", file, capsys, "--targets=metal")
    assert "metal: 12 labels, 50.0% are 1, the others 0: classes, to be trained with task=classification" in found.text


def test_fields_of_other_words(tmp_path):
    write_cifs(tmp_path)
    file = write_table(tmp_path, ["metal", "insulator"] * 6)
    with pytest.raises(DataError, match="no field holds numbers as labels"):
        custom_source(file, CustomData())
    assert "there are no numbers in field 'metal'" in refused(tmp_path / "data", file, "--targets=metal")
