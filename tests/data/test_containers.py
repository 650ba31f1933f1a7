"""JSON of all layouts, archives of structure files, databases and trajectories of ASE, prepared and predicted."""

import csv
import gzip
import io
import json
import pickle
import sqlite3
import sys
import zipfile

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from user_files import as_dict, cif, prepared, records, write_cifs

from crystalframer_jax.cli.predict import read_all
from crystalframer_jax.data.custom import folders
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source, structures_in
from crystalframer_jax.data.io import layouts, streams
from crystalframer_jax.data.records import BadRecord, DataError, Record
from crystalframer_jax.structures.crystal import CrystalError

IDS = [record["id"] for record in records()]
COUNTS = [str(number) for number in range(12)]


def frame(structure: str = "structure") -> dict[str, list]:
    """Columns of a table."""
    made = [as_dict(record) for record in records()]
    return {structure: made, "e_form": [record["e_form"] for record in records()]}


def rows() -> list[list]:
    return [list(row) for row in zip(*frame().values(), strict=True)]


def by_label(labels: list) -> dict[str, dict]:
    return {name: dict(zip(labels, column, strict=True)) for name, column in frame().items()}


def objects() -> list[dict]:
    return [dict(zip(frame(), row, strict=True)) for row in rows()]


FIELDS = [{"name": "index", "type": "integer"}, {"name": "structure"}, {"name": "e_form", "type": "number"}]
SCHEMA = {"fields": FIELDS, "primaryKey": ["index"], "pandas_version": "1.4.0"}
NAMED = [{"material_id": id, **row} for id, row in zip(IDS, objects(), strict=True)]
NAMED_ROWS = [[id, *row] for id, row in zip(IDS, rows(), strict=True)]
LAYOUTS = {
    "split": ({"columns": list(frame()), "index": IDS, "data": rows()}, IDS),
    "split that counts": ({"columns": list(frame()), "index": list(range(12)), "data": rows()}, COUNTS),
    "split, data first": ({"data": rows(), "index": IDS, "columns": list(frame())}, IDS),
    "split with a column of ids": (
        {
            "index": list(range(12)),
            "columns": ["id", *frame()],
            "data": [[i, *r] for i, r in zip(IDS, rows(), strict=True)],
        },
        IDS,
    ),
    "records": (NAMED, IDS),
    "index": (dict(zip(IDS, objects(), strict=True)), IDS),
    "index that counts": (dict(zip(COUNTS, objects(), strict=True)), COUNTS),
    "index with a column of ids": (dict(zip(COUNTS, NAMED, strict=True)), IDS),
    "columns": (by_label(IDS), IDS),
    "columns that count": (by_label(COUNTS), COUNTS),
    "columns, labels first": (dict(reversed(by_label(IDS).items())), IDS),
    "lists": (frame(), COUNTS),
    "table": ({"schema": SCHEMA, "data": [{"index": i, **row} for i, row in enumerate(NAMED)]}, IDS),
    "table by id": (
        {
            "schema": SCHEMA | {"primaryKey": ["name"]},
            "data": [{"name": i, **r} for i, r in zip(IDS, objects(), strict=True)],
        },
        IDS,
    ),
    "a text": (json.dumps(NAMED), IDS),
    "monty's frame": ({"@module": "pandas", "@class": "DataFrame", "data": json.dumps(by_label(IDS))}, IDS),
    "structures as text": ([{**row, "structure": json.dumps(row["structure"])} for row in NAMED], IDS),
    "columns of texts": ({**by_label(IDS), "structure": {r["id"]: json.dumps(as_dict(r)) for r in records()}}, IDS),
    "columns of CIFs": ({"e_form": by_label(IDS)["e_form"], "cif": {r["id"]: cif(r) for r in records()}}, IDS),
    "flat records by id": ({record["id"]: record for record in records()}, IDS),
    "flat columns": ({key: {r["id"]: r[key] for r in records()} for key in records()[0]}, IDS),
    "records in an object": ({"meta": {"count": 12}, "data": NAMED}, IDS),
}
layout = pytest.mark.parametrize("name", LAYOUTS)


@layout
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_of_json(tmp_path, name, packed):
    content, ids = LAYOUTS[name]
    file = tmp_path / ("set.json.gz" if packed else "set.json")
    text = json.dumps(content, indent=None if packed else 1).encode()
    file.write_bytes(gzip.compress(text) if packed else text)
    source = custom_source(file, CustomData())
    found = list(source.records())
    assert all(isinstance(record, Record) for record in found), found
    assert [target.name for target in source.targets] == ["e_form"]
    assert [(record.id, record.labels) for record in found] == [
        (id, (record["e_form"],)) for id, record in zip(ids, records(), strict=True)
    ]
    for record, original in zip(found, records(), strict=True):
        crystal = record.load()
        assert crystal.num_atoms == len(original["species"]) and crystal.id == record.id
        volumes = [abs(np.linalg.det(lattice)) for lattice in (crystal.lattice, original["lattice"])]
        np.testing.assert_allclose(*volumes, rtol=1e-6)
    crystals, errors = read_all([str(file)])
    assert [read.crystal.id for read in crystals] == ids and not errors


@pytest.mark.parametrize(
    "content",
    [as_dict(records()[0]), {"structure": as_dict(records()[0]), "e": 1}, records()[0], {"x": as_dict(records()[0])}],
)
def test_one_structure(tmp_path, content):
    (tmp_path / "one.json").write_text(json.dumps(content))
    ((make,), expected) = structures_in(tmp_path / "one.json"), records()[0]
    assert make().num_atoms == len(expected["species"])


def test_structures_without_labels_are_predicted(tmp_path):
    """Also texts by id."""
    for name, content in {
        "dicts": {record["id"]: as_dict(record) for record in records()},
        "texts": {record["id"]: json.dumps(as_dict(record)) for record in records()},
        "cifs": {record["id"]: cif(record) for record in records()},
        "list": [{"id": record["id"], **as_dict(record)} for record in records()],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert [make().id for make in structures_in(tmp_path / f"{name}.json")] == IDS, name


def test_wrong_records_cost_themselves(tmp_path):
    content = dict(zip(IDS, objects(), strict=True))
    content = {"before": {"e_form": 1.0}, **content, "after": 3, "text": {"structure": '{"lattice": [', "e_form": 1}}
    (tmp_path / "set.json").write_text(json.dumps(content))
    found = list(custom_source(tmp_path / "set.json", CustomData()).records())
    bad = {record.id: record.reason for record in found if isinstance(record, BadRecord)}
    assert bad.keys() == {"before", "after"} and len(found) == 15
    with pytest.raises(CrystalError, match="is not JSON"):
        found[-1].load()
    crystals, errors = read_all([str(tmp_path / "set.json")])
    assert len(crystals) == 12 and len(errors) == 3
    split = {"columns": ["structure", "e_form"], "data": [*rows(), [1], 5, [None, 2]]}
    (tmp_path / "set.json").write_text(json.dumps(split))
    found = list(custom_source(tmp_path / "set.json", CustomData()).records())
    assert [isinstance(record, BadRecord) for record in found] == [False] * 12 + [True] * 3
    assert "has 1 values for 2 columns" in found[12].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', r"set.json is not a list of records, .* \(its keys: 'a'\), at character 9; give a list of"),
        ("{}", "is not a list of records"),
        ('{"mp-1": 1.5, "mp-2": [2]}', "is not a list of records"),
        ('{"structure": {"0": 1}, "e": {"0": 1}', "has no comma and no end of the object"),
        ('{"structure": {"0": 1, "0": 2}}', "has the key '0' twice"),
        ('{"columns": ["structure"], "data": [[1], [2]', "has no comma and no end of the list"),
        ("3", "is not a list of records"),
        ('"[" ', "text in it.* ends before record 1"),
        ('{"a" 1}', "has no key in quotes and colon"),
        ("{1: 2}", "has no key in quotes and colon"),
        ('{"a": 1} x', "is not a list of records|goes on after"),
    ],
)
def test_faults_of_json_objects(tmp_path, text, message):
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        custom_source(tmp_path / "set.json", CustomData())
    assert "\n" not in str(raised.value)


def test_a_table_by_columns_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "LARGEST_COLUMN", 2000)
    (tmp_path / "set.json").write_text(json.dumps(by_label(IDS)))
    with pytest.raises(DataError, match=r"has a column structure of more than 2,000 characters.*lines=True"):
        custom_source(tmp_path / "set.json", CustomData())


def test_json_in_the_cells_of_a_table(tmp_path):
    with (tmp_path / "set.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["material_id", "structure", "e_form"])
        lines.writerows([r["id"], json.dumps(as_dict(r), indent=1), r["e_form"]] for r in records())
    source = custom_source(tmp_path / "set.csv", CustomData())
    assert [record.id for record in source.records()] == IDS
    assert [record.load().num_atoms for record in source.records()] == [len(r["species"]) for r in records()]


def test_structures_as_python_shows_them(tmp_path):
    """As pandas writes dicts into CSV."""
    with (tmp_path / "set.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["structure", "e_form"])
        lines.writerows([str(as_dict(r)), r["e_form"]] for r in records())
    with pytest.raises(DataError, match=r"none of 12 records .*set.csv:2: the structure is written as Python shows it"):
        custom_source(tmp_path / "set.csv", CustomData())


def test_classes_in_json(tmp_path):
    rows = [{**row, "e_form": number % 2 == 0} for number, row in enumerate(NAMED)]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    found = [record.labels for record in custom_source(tmp_path / "set.json", CustomData()).records()]
    assert found == [(float(row["e_form"]),) for row in rows]


def test_gzipped_frames(tmp_path):
    ase.io.write(tmp_path / "set.extxyz", [Atoms("Si", cell=[3, 3, 3], pbc=True, info={"e": i}) for i in range(3)])
    content = (tmp_path / "set.extxyz").read_bytes()
    (tmp_path / "set.extxyz.gz").write_bytes(gzip.compress(content))
    found = list(custom_source(tmp_path / "set.extxyz.gz", CustomData()).records())
    assert [(record.labels, record.load().num_atoms) for record in found] == [((float(i),), 1) for i in range(3)]
    (tmp_path / "set.extxyz.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match=r"set\.extxyz\.gz is damaged"):
        custom_source(tmp_path / "set.extxyz.gz", CustomData())


# Archives


def zipped(file, folder: str = "", table: str = "id_prop.csv", **more: str):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in records():
            archive.writestr(f"{folder}{record['id']}.cif", cif(record))
        archive.writestr("__MACOSX/._x.cif", "attributes")
        if table:
            header = "" if table.endswith("id_prop.csv") else "id,e\n"
            text = header + "".join(f"{record['id']},{record['e_form']}\n" for record in records())
            archive.writestr(folder + table, text)
        for name, content in more.items():
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize("folder", ["", "top/", "a/b/"])
@pytest.mark.parametrize("table", ["id_prop.csv", "labels.csv"])
def test_zipped_folders(tmp_path, capsys, folder, table):
    file = zipped(tmp_path / "set.zip", folder, table)
    source = custom_source(file, CustomData())
    found = list(source.records())
    assert [record.id for record in found] == IDS
    assert [pickle.loads(pickle.dumps(r)).load().num_atoms for r in found] == [len(r["species"]) for r in records()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.zip"]  # nothing was unpacked
    crystals, errors = read_all([str(file)])
    assert len(crystals) == 12 and not errors
    if folder == "" and table == "id_prop.csv":
        assert len(prepared(tmp_path / "data", file, capsys).columns["ids"]) == 12


def test_archives_of_other_kinds(tmp_path):
    with pytest.raises(DataError, match=r"no table of labels in it; add id_prop.csv"):
        custom_source(zipped(tmp_path / "set.zip", table=""), CustomData())
    crystals, errors = read_all([str(tmp_path / "set.zip")])
    assert [read.crystal.id for read in crystals] == [f"{id}.cif" for id in sorted(IDS)] and not errors
    zipped(tmp_path / "set.zip", **{"POSCAR_Si": "x\n1\n3 0 0\n0 3 0\n0 0 3\nSi\n1\nDirect\n0 0 0\n", "z.cif": "no"})
    crystals, errors = read_all([str(tmp_path / "set.zip")])
    assert [read.crystal.id for read in crystals if read.crystal.formula == "Si"] == ["POSCAR_Si"]
    assert len(crystals) == 13 and len(errors) == 1 and "z.cif" in errors[0]


@pytest.mark.parametrize("name", ["{}/id_prop.csv", "{}.csv", "top/{}_set.csv", "top/{}/labels.csv"])
def test_zipped_splits(tmp_path, name):
    parts = {"train": records()[:8], "valid": records()[8:10], "test": records()[10:]}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for part, chosen in parts.items():
            table = name.format(part)
            header = "" if table.endswith("id_prop.csv") else "id,e\n"
            archive.writestr(table, header + "".join(f"{record['id']},{record['e_form']}\n" for record in chosen))
            for record in chosen:
                archive.writestr(f"{table.rpartition('/')[0]}/{record['id']}.cif".lstrip("/"), cif(record))
    found = list(custom_source(tmp_path / "set.zip", CustomData()).records())
    assert [record.id for record in found] == IDS
    assert [record.split for record in found] == ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    zipped(tmp_path / "set.zip", table="a.csv", **{"b.csv": "id,e\n"})
    with pytest.raises(DataError, match=r"2 tables of labels in it, not one for each split"):
        custom_source(tmp_path / "set.zip", CustomData())


def test_damaged_members_cost_themselves(tmp_path):
    file = zipped(tmp_path / "set.zip")
    content = bytearray(file.read_bytes())
    at = content.index(f"{IDS[3]}.cif".encode()) + 60
    content[at : at + 30] = bytes(30)
    file.write_bytes(content)
    crystals, errors = read_all([str(file)])
    assert len(crystals) == 11 and len(errors) == 1 and "damaged" in errors[0]


def test_limits_of_archives(tmp_path, monkeypatch):
    file = zipped(tmp_path / "set.zip")
    monkeypatch.setattr(folders, "LARGEST_MEMBER", 300)
    with pytest.raises(DataError, match=r"would unpack to .* bytes, over 300"):
        custom_source(file, CustomData())
    monkeypatch.undo()
    monkeypatch.setattr(folders, "MOST_MEMBERS", 5)
    folders._opened.cache_clear()
    with pytest.raises(DataError, match=r"holds 14 files, of at most 5"):
        custom_source(file, CustomData())
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"whose name has 2,004 characters"):
        custom_source(zipped(tmp_path / "long.zip", **{"x" * 2000 + ".cif": ""}), CustomData())
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.cif", bytes(1 << 20))
    monkeypatch.setattr(streams, "MIN_SIZE_LIMIT", 1 << 20)
    with pytest.raises(DataError, match=r"would unpack to 3,145,728 bytes, over 1,048,576; unpack it first"):
        custom_source(tmp_path / "bomb.zip", CustomData())
    (tmp_path / "cut.zip").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip is damaged"):
        custom_source(tmp_path / "cut.zip", CustomData())
    assert read_all([str(tmp_path / "cut.zip"), str(tmp_path / "none.zip")])[1] == [
        f"{tmp_path}/cut.zip is damaged (File is not a zip file); delete it and fetch it again",
        f"{tmp_path}/none.zip: there is no such file",
    ]


def test_names_lead_out_of_no_archive(tmp_path):
    (tmp_path / "secret.cif").write_text(cif(records()[0]))
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "set.zip", "w") as archive:
        archive.writestr("id_prop.csv", f"../secret,1\n{tmp_path}/secret,2\n")
    with pytest.raises(DataError, match="none of 2 records can be used"):
        custom_source(inside / "set.zip", CustomData())


# ASE


def atoms(record: dict) -> Atoms:
    return Atoms(record["species"], scaled_positions=record["frac_coords"], cell=record["lattice"], pbc=True)


def write_database(file):
    with ase.db.connect(file) as database:
        for record in records():
            database.write(atoms(record), material_id=record["id"], e_form=record["e_form"], data={"x": np.ones(3)})
    return file


def write_trajectory(file):
    with ase.io.Trajectory(file, "w") as trajectory:
        for record in records():
            frame = atoms(record)
            frame.info = {"material_id": record["id"], "e_form": record["e_form"], "array": np.ones(3)}
            trajectory.write(frame)
    return file


@pytest.mark.parametrize(("write", "name"), [(write_database, "set.db"), (write_trajectory, "set.traj")])
def test_files_of_ase(tmp_path, write, name):
    file = write(tmp_path / name)
    before = file.read_bytes()
    source = custom_source(file, CustomData())
    found = list(source.records())
    assert [target.name for target in source.targets] == ["e_form"]
    assert [(record.id, record.labels) for record in found] == [(r["id"], (r["e_form"],)) for r in records()]
    for record, original in zip(found, records(), strict=True):
        crystal = pickle.loads(pickle.dumps(record)).load()
        np.testing.assert_array_equal(crystal.species, atoms(original).numbers)
        np.testing.assert_allclose(crystal.positions, atoms(original).positions, atol=1e-12)
        np.testing.assert_allclose(crystal.lattice, original["lattice"], atol=1e-12)
    crystals, errors = read_all([str(file)])
    assert [read.crystal.id for read in crystals] == IDS and not errors
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["set.db", "set.traj"])
def test_energies_of_ase(tmp_path, name):
    """Of frames of one crystal too, of which a trajectory has the elements once."""
    frames = []
    for number in range(12):
        frame = atoms(records()[0])
        frame.rattle(0.01, seed=number)
        frame.calc = SinglePointCalculator(frame, energy=-float(number), forces=np.zeros((len(frame), 3)))
        frames.append(frame)
    if name == "set.db":
        with ase.db.connect(tmp_path / name) as database:
            for frame in frames:
                database.write(frame)
    else:
        ase.io.write(tmp_path / name, frames)
    source = custom_source(tmp_path / name, CustomData())
    found = list(source.records())
    assert [(record.id, record.labels) for record in found] == [(f"{name}:{i + 1}", (-float(i),)) for i in range(12)]
    assert all(record.load().num_atoms == len(frames[0]) for record in found)


@pytest.mark.parametrize(
    ("name", "module"), [("set.db", "ase.db.sqlite"), ("set.traj", "ase.io.ulm"), ("set.xyz", "ase.io.extxyz")]
)
def test_without_ase(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_text("")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"needs ASE; .*pip install '\.\[ase\]'$"):
        custom_source(tmp_path / name, CustomData())


def test_a_bad_row_costs_itself(tmp_path):
    file = write_database(tmp_path / "set.db")
    connection = sqlite3.connect(file)
    connection.execute("UPDATE systems SET positions = x'00' WHERE id = 3")
    connection.execute("UPDATE systems SET key_value_pairs = '{' WHERE id = 4")
    connection.commit()
    connection.close()
    found = list(custom_source(file, CustomData()).records())
    assert [isinstance(record, BadRecord) for record in found] == [i in (2, 3) for i in range(12)]
    crystals, errors = read_all([str(file)])
    assert len(crystals) == 10 and len(errors) == 2
    molecule = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.1]])
    with ase.db.connect(file) as database:
        database.write(molecule, material_id="molecule", e_form=1.0)
    assert "molecule" in read_all([str(file)])[1][-1] and "not periodic" in read_all([str(file)])[1][-1]


def test_what_is_no_file_of_ase(tmp_path):
    for name in ("set.db", "set.traj"):
        (tmp_path / name).write_bytes(pickle.dumps([1, 2]) * 20)
        with pytest.raises(DataError, match=f"{name} cannot be read as an ASE"):
            custom_source(tmp_path / name, CustomData())
        assert len(read_all([str(tmp_path / name)])[1]) == 1
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (y)").connection.close()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(DataError, match=r"other\.db cannot be read as an ASE database \(it has no table of systems\)"):
        custom_source(tmp_path / "other.db", CustomData())
    assert (tmp_path / "other.db").read_bytes() == before


def test_a_view_is_no_table(tmp_path):
    """It could go on for ever."""
    connection = sqlite3.connect(tmp_path / "set.db")
    endless = "WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT id FROM n"
    connection.execute(f"CREATE VIEW systems AS {endless}")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match="no table of systems"):
        custom_source(tmp_path / "set.db", CustomData())


def test_arrays_in_texts_are_not_made(tmp_path):
    """ASE would fill 80 GB."""
    file = write_trajectory(tmp_path / "set.traj")
    content = file.read_bytes()
    bomb = b'{"__ndarray__": [[9999999999], "float64", [0]]}'
    at = content.rindex(b'"info": {')
    end = content.index(b"}}", at) + 2
    assert end - at > len(bomb) + 8
    file.write_bytes(content[: at + 8] + bomb.ljust(end - at - 8) + content[end:])
    found = list(custom_source(file, CustomData(targets=("e_form",))).records())
    assert len(found) == 12 and np.isnan(found[-1].labels)
    shape = b'[[%d, 3], "float64"' % len(records()[-1]["species"])
    file.write_bytes(content.replace(shape, b"[[" + b"9" * (len(shape) - 14) + b'], "float64"'))
    found = list(custom_source(file, CustomData(targets=("e_form",))).records())
    assert len(found) == 12 and "positions has" in found[-1].reason


def test_members_of_archives_are_decoded(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.CIF", cif(records()[0]).replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "set.zip").write_bytes(buffer.getvalue())
    assert [make().num_atoms for make in structures_in(tmp_path / "set.zip")] == [len(records()[0]["species"])]


def test_source_files_stay_readable(tmp_path):
    write_cifs(tmp_path)
    assert len(structures_in(tmp_path / f"{IDS[0]}.cif")) == 1
