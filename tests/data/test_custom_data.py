"""Users' own data: each format read back, faulty lines and records among good ones, options, checksums."""

import concurrent.futures
import csv
import dataclasses
import gzip
import json
import math
import multiprocessing
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar
from support import ROOT, real_crystals

from crystalframer_jax.data.custom import labels as custom_labels
from crystalframer_jax.data.custom.source import CustomData, custom_source
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import read_crystals

IDS = ("mp-10", "mp-10000", "mp-10004", "mp-10010", "mp-10021")
E_FORM = (-0.25, 1.5, 0.0, -3e-05, 12.0)
GAP = (0.5, math.nan, 2.25, 0.0, math.nan)  # nan: not known
SPLITS = ("train", "val", "test", "training", "valid")
STANDARD = ("train", "val", "test", "train", "val")


def originals() -> list[Crystal]:
    return real_crystals(IDS)


def structure_of(crystal: Crystal) -> Structure:
    lattice, species = Lattice(crystal.lattice), [Element.from_Z(z) for z in crystal.species]
    return Structure(lattice, species, crystal.positions, coords_are_cartesian=True)


def jarvis_atoms(crystal: Crystal, cartesian: bool) -> dict[str, Any]:
    coords = crystal.positions if cartesian else crystal.positions @ np.linalg.inv(crystal.lattice)
    elements = [Element.from_Z(z).symbol for z in crystal.species]
    atoms = {"lattice_mat": crystal.lattice.tolist(), "coords": coords.tolist(), "elements": elements}
    return atoms | {"cartesian": cartesian}


def flat(crystal: Crystal) -> dict[str, Any]:
    coords = crystal.positions @ np.linalg.inv(crystal.lattice)
    species = [Element.from_Z(z).symbol for z in crystal.species]
    return {"lattice": crystal.lattice.tolist(), "species": species, "frac_coords": coords.tolist()}


def poscar(crystal: Crystal) -> str:
    return Poscar(structure_of(crystal), sort_structure=False).get_str(significant_figures=16)


def cif(crystal: Crystal) -> str:
    return str(CifWriter(structure_of(crystal)))


def gap_text(gap: float) -> str:
    return "na" if math.isnan(gap) else repr(gap)


# Writers: each puts the five crystals into a folder and returns what to give to custom_source


def write_folder(folder: Path) -> Path:
    lines = ["id,e_form,split,gap"]
    for crystal, e_form, split, gap in zip(originals(), E_FORM, SPLITS, GAP, strict=True):
        (folder / f"{crystal.id}.cif").write_text(cif(crystal))
        lines.append(f"{crystal.id},{e_form},{split},{gap_text(gap)}")
    (folder / "id_prop.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_csv(folder: Path) -> Path:
    (folder / "cells").mkdir()
    with (folder / "set.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["material_id", "formula", "e_form", "file", "gap", "split"])
        for i, crystal in enumerate(originals()):
            (folder / "cells" / f"{i}.vasp").write_text(poscar(crystal))
            rows.writerow([crystal.id, crystal.formula, E_FORM[i], f"cells/{i}.vasp", gap_text(GAP[i]), SPLITS[i]])
    return folder / "set.csv"


def write_csv_of_cifs(folder: Path) -> Path:
    with (folder / "train.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["", "material_id", "e_form", "gap", "elements", "cif", "split"])
        for i, crystal in enumerate(originals()):
            rows.writerow([i, crystal.id, E_FORM[i], gap_text(GAP[i]), "['Na', 'Cl']", cif(crystal), SPLITS[i]])
    return folder / "train.csv"


def write_xyz(folder: Path) -> Path:
    frames = []
    for i, crystal in enumerate(originals()):
        atoms = Atoms(crystal.species, crystal.positions, cell=crystal.lattice, pbc=True)
        atoms.info = {"e_form": E_FORM[i], "material_id": crystal.id, "split": SPLITS[i], "gap": gap_text(GAP[i])}
        atoms.arrays["forces"] = np.ones((len(atoms), 3))
        frames.append(atoms)
    ase.io.write(folder / "set.extxyz", frames)
    return folder / "set.extxyz"


def records(structure: str) -> list[dict[str, Any]]:
    """Records with the structure as that kind of dict; an unknown gap is None, NaN, missing or 'na'."""
    made = []
    for i, crystal in enumerate(originals()):
        made.append({"id": crystal.id, "e_form": E_FORM[i], "gap": GAP[i], "split": SPLITS[i], "formula": "x"})
        if structure == "pymatgen":
            made[-1]["structure"] = structure_of(crystal).as_dict()
        elif structure == "jarvis":
            made[-1] = {"jid": made[-1].pop("id"), **made[-1], "atoms": jarvis_atoms(crystal, cartesian=i % 2 == 0)}
        else:
            made[-1].update(flat(crystal))
    made[1]["gap"] = None
    del made[4]["gap"]
    return made


def write_json(folder: Path) -> Path:
    (folder / "set.json").write_text(json.dumps(records("pymatgen")))
    return folder / "set.json"


def write_json_gz(folder: Path) -> Path:
    (folder / "set.json.gz").write_bytes(gzip.compress(json.dumps(records("flat")).encode()))
    return folder / "set.json.gz"


def write_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("jdft.json", json.dumps(records("jarvis")))
        archive.writestr("__MACOSX/._jdft.json", "attributes")
        archive.writestr("README.txt", "no data")
    return folder / "set.zip"


def write_jsonl(folder: Path) -> Path:
    (folder / "set.jsonl").write_text("\n\n".join(map(json.dumps, records("jarvis"))))
    return folder / "set.jsonl"


def write_jsonl_gz(folder: Path) -> Path:
    (folder / "set.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records("flat"))).encode()))
    return folder / "set.jsonl.gz"


def official_record(i: int, crystal: Crystal) -> dict[str, Any]:
    return {"material_id": crystal.id, "structure": structure_of(crystal), "e_form": E_FORM[i], "gap": GAP[i]}


def write_pickles(folder: Path) -> Path:
    """train: the crystals 0, 3; val: 1, 4; test: 2."""
    for split, chosen in (("train", (0, 3)), ("val", (1, 4)), ("test", (2,)), ("all", (0, 1, 2, 3, 4))):
        (folder / split / "raw").mkdir(parents=True)
        content = [official_record(i, originals()[i]) for i in chosen]
        (folder / split / "raw" / "raw_data.pkl").write_bytes(pickle.dumps(content))
    return folder


TURNED = (write_folder, write_csv_of_cifs)  # a CIF does not keep the orientation of the cell
KEPT = (write_csv, write_xyz, write_json, write_json_gz, write_zip, write_jsonl, write_jsonl_gz)
WRITERS = TURNED + KEPT
formats = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


# What is compared


def assert_same(crystal: Crystal, original: Crystal, atol: float = 2e-7) -> None:
    """The same crystal, whatever the order of its atoms and the orientation of its cell."""
    np.testing.assert_allclose(crystal.lattice @ crystal.lattice.T, original.lattice @ original.lattice.T, atol=1e-5)
    assert sorted(crystal.species) == sorted(original.species)
    found, expected = (c.positions @ np.linalg.inv(c.lattice) for c in (crystal, original))
    offset = found[:, None] - expected[None]
    is_near = np.abs(offset - np.round(offset)).max(axis=-1) < atol
    is_same = is_near & (crystal.species[:, None] == original.species[None])
    assert (is_same.sum(axis=0) == 1).all() and (is_same.sum(axis=1) == 1).all()


def usable(source: Source) -> list[Record]:
    found = list(source.records())
    assert all(isinstance(record, Record) for record in found), found
    return found


def only_bad(source: Source) -> list[BadRecord]:
    return [record for record in source.records() if isinstance(record, BadRecord)]


def ids(source: Source) -> list[str]:
    return [record.id for record in source.records() if isinstance(record, Record)]


def labels(source: Source) -> list[tuple[float, ...]]:
    return [record.labels for record in source.records() if isinstance(record, Record)]


def crystal_in_worker(records: list[Record]) -> list[Crystal]:
    return [record.load() for record in records]


# Round trips


@formats
def test_round_trip(write, tmp_path):
    source = custom_source(write(tmp_path), CustomData())
    found = usable(source)
    order = [target.name for target in source.targets]
    assert sorted(order) == ["e_form", "gap"]
    assert [record.id for record in found] == list(IDS)
    expected = {"e_form": E_FORM, "gap": GAP}
    np.testing.assert_array_equal([r.labels for r in found], np.transpose([expected[name] for name in order]))
    assert [record.split for record in found] == list(STANDARD)
    for record, original in zip(found, originals(), strict=True):
        crystal = record.load()
        assert crystal.id == original.id
        assert_same(crystal, original)
        if write in KEPT:
            np.testing.assert_allclose(crystal.lattice, original.lattice, atol=1e-7)
            np.testing.assert_array_equal(crystal.species, original.species)
            np.testing.assert_allclose(crystal.positions, original.positions, atol=1e-7)


def test_cif_files_are_read_as_predict_reads_them(tmp_path):
    files = [
        *sorted((ROOT / "examples").glob("*.cif")),
        *sorted((ROOT / "tests" / "structures" / "files").glob("*.cif")),
    ]
    files = [file for file in files if len(read_crystals(file)) == 1]
    assert len(files) >= 4
    for file in files:
        shutil.copy(file, tmp_path)
    lines = [f"{file.stem},{i}" for i, file in enumerate(files)]
    shutil.copy(ROOT / "examples" / "POSCAR_Si", tmp_path)
    (tmp_path / "id_prop.csv").write_text("\n".join([*lines, "Si,99"]))
    found = usable(custom_source(tmp_path, CustomData()))
    assert [record.labels for record in found] == [(float(i),) for i in range(len(files))] + [(99.0,)]
    for record, file in zip(found, [*files, ROOT / "examples" / "POSCAR_Si"], strict=True):
        (original,) = read_crystals(file)
        crystal = record.load()
        np.testing.assert_array_equal(crystal.species, original.species)
        np.testing.assert_array_equal(crystal.positions, original.positions)
        np.testing.assert_array_equal(crystal.lattice, original.lattice)
        assert (crystal.occupancies is None) == (original.occupancies is None)


def test_records_are_sent_to_workers(tmp_path):
    sent, here = [], []
    for i, write in enumerate(WRITERS):
        (tmp_path / str(i)).mkdir()
        sent += usable(custom_source(write(tmp_path / str(i)), CustomData()))
    here = crystal_in_worker(sent)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there = [pool.submit(record.load) for record in sent]
        for a, b in zip(here, [future.result() for future in there], strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.species, b.species)
            assert a.id == b.id


@formats
def test_passes_are_independent(write, tmp_path):
    source = custom_source(write(tmp_path), CustomData())
    first = source.records()
    next(first), next(first)
    assert ids(source) == list(IDS)
    assert [record.id for record in first] == list(IDS[2:])
    assert source.count in (None, 5)
    assert (source.count is None) == ("json" in write.__name__ or write is write_zip)


@formats
def test_targets_are_taken_in_the_order_asked_for(write, tmp_path):
    path = write(tmp_path)
    source = custom_source(path, CustomData(targets=("gap", "e_form"), units=("eV", "eV/atom")))
    assert [(t.name, t.field, t.unit) for t in source.targets] == [
        ("gap", "gap", "eV"),
        ("e_form", "e_form", "eV/atom"),
    ]
    np.testing.assert_array_equal(labels(source), np.transpose([GAP, E_FORM]))
    assert labels(custom_source(path, CustomData(targets=("e_form",)))) == [(value,) for value in E_FORM]
    with pytest.raises(DataError, match=r"no field 'band' of --targets; choose among .*e_form.*gap|e_form"):
        custom_source(path, CustomData(targets=("band",)))
    with pytest.raises(DataError, match=r"--units has 1 units for 2 targets"):
        custom_source(path, CustomData(units=("eV",)))
    with pytest.raises(DataError, match=r"no field --group_column=prototype; choose among .*gap"):
        custom_source(path, CustomData(group_column="prototype"))
    with pytest.raises(DataError, match=r"names a target twice"):
        custom_source(path, CustomData(targets=("gap", "gap")))


@formats
def test_checksum(write, tmp_path):
    path = write(tmp_path)
    before = custom_source(path, CustomData()).sha256
    assert custom_source(path, CustomData()).sha256 == before
    changed = [CustomData(targets=("gap",)), CustomData(split_column=""), CustomData(group_column="split")]
    assert len({custom_source(path, options).sha256 for options in changed} | {before}) == 4
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert custom_source(moved / path.relative_to(tmp_path), CustomData()).sha256 == before


@pytest.mark.parametrize(("write", "name"), [(write_folder, "mp-10.cif"), (write_csv, "cells/0.vasp")])
def test_checksum_changes_with_a_structure_file(write, name, tmp_path):
    path = write(tmp_path)
    before = custom_source(path, CustomData()).sha256
    file = tmp_path / name
    text = file.read_text()
    file.write_text(text.replace("As", "Sb"))
    assert len(file.read_text()) == len(text)
    after = custom_source(path, CustomData()).sha256
    file.unlink()
    assert len({before, after, custom_source(path, CustomData()).sha256}) == 3


@formats
def test_split_and_group_and_id_columns(write, tmp_path):
    path = write(tmp_path)
    found = usable(custom_source(path, CustomData(split_column="", group_column="split", id_column="split")))
    assert [record.split for record in found] == [""] * 5
    assert [record.group for record in found] == list(SPLITS)
    assert [record.id for record in found] == list(SPLITS)
    bad = only_bad(custom_source(path, CustomData(split_column="e_form")))
    assert len(bad) == 5 and "split is '-0.25'; write train, val or test" in bad[0].reason


# Tables


def folder_of_cifs(folder: Path, text: str | bytes, name: str = "id_prop.csv") -> Path:
    """A folder with a.cif, b.cif, c.cif and a table."""
    for stem, crystal in zip("abc", originals(), strict=False):
        (folder / f"{stem}.cif").write_text(cif(crystal))
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "a,1\nb,-2.5\nc,na\n",
        "a,1\nb,-2.5\nc,na",
        "\ufeffa,1\r\nb,-2.5\r\n\r\n \r\nc,NaN\r\n",
        "a;1\nb;-2.5\nc;\n",
        "a\t1\nb\t-2.5\nc\t-\n",
        '"a","1"\n"b", "-2.5"\n\n"c","None"\n',
        "a.cif,1,\nb.cif,-2.5,\nc.cif,inf,\n",
        " a , 1\n b , -2.5\n c , n/a\n",
        "id,target,\na,1\nb,-2.5,\nc,\n",
        "id,target\na,1\nb,-2.5\nc,null\n",
        "\ufeffid;target\r\na;1\r\nb;-2.5\r\nc;na\r\n",
    ],
)
def test_tables_beside_cif_files(text, tmp_path):
    source = custom_source(folder_of_cifs(tmp_path, text), CustomData())
    assert [target.name for target in source.targets] == ["target"]
    assert ids(source) == ["a", "b", "c"]
    np.testing.assert_array_equal(labels(source), [[1.0], [-2.5], [math.nan]])
    assert source.count == 3
    for record, original in zip(usable(source), originals(), strict=False):
        assert_same(record.load(), original)


def test_names_of_labels_without_a_header(tmp_path):
    folder_of_cifs(tmp_path, "a,1,4\nb,2,5\nc,3,6\n")
    source = custom_source(tmp_path, CustomData())
    assert [target.name for target in source.targets] == ["target_1", "target_2"]
    source = custom_source(tmp_path, CustomData(targets=("e", "gap")))
    assert [target.name for target in source.targets] == ["e", "gap"]
    assert labels(source) == [(1, 4), (2, 5), (3, 6)]
    with pytest.raises(DataError, match=r"id_prop.csv: 2 columns of labels for --targets=e; name all"):
        custom_source(tmp_path, CustomData(targets=("e",)))


def test_a_first_line_that_names_a_file_is_no_header(tmp_path):
    """A typing error in the label of the first crystal must not make it a header."""
    source = custom_source(folder_of_cifs(tmp_path, "a,o.5\nb,2\nc,3\n"), CustomData())
    (bad,) = only_bad(source)
    assert bad == BadRecord(
        "a", f"{tmp_path}/id_prop.csv:1", "target is 'o.5'; write a number with a decimal point, or na if unknown"
    )
    assert ids(source) == ["b", "c"]


def test_bad_lines_leave_the_others(tmp_path):
    lines = ["id,e,gap,split", "a,1,2,train", "b,1.5 eV,2,train", "missing,1,2,test", "a,1", "a,1,2,train,9"]
    lines += ["c,1,2,holdout", ",1,2,val", "c,True,2,val", "c,1_0,2,val", '"c\nd",1,2,val', "b,3,4,Dev", "a,5,,"]
    source = custom_source(folder_of_cifs(tmp_path, "\n".join(lines)), CustomData())
    good = [record for record in source.records() if isinstance(record, Record)]
    assert [(record.id, record.labels[0], record.split) for record in good] == [
        ("a", 1.0, "train"),
        ("b", 3.0, "val"),
        ("a", 5.0, ""),
    ]
    file = f"{tmp_path}/id_prop.csv"
    expected = [
        ("b", 3, "e is '1.5 eV'; write a number"),
        ("missing", 4, "no file missing or missing with .cif"),
        ("a", 5, "2 cells instead of 4"),
        ("a", 6, "5 cells instead of 4"),
        ("c", 7, "split is 'holdout'; write train, val or test"),
        ("id_prop.csv:8", 8, "no name of a structure file"),
        ("c", 9, "e is 'True'"),
        ("c", 10, "e is '1_0'"),
        ("id_prop.csv:11", 11, "over several lines"),
    ]
    bad = only_bad(source)
    assert [(record.id, record.where) for record in bad] == [(id, f"{file}:{line}") for id, line, _ in expected]
    for record, (_, _, reason) in zip(bad, expected, strict=True):
        assert reason in record.reason
    assert source.count == len(good) + len(bad)
    assert good[1].where == f"{file}:13"  # after the row of two lines


def test_a_damaged_cif_concerns_one_crystal(tmp_path):
    folder_of_cifs(tmp_path, "a,1\nb,2\nc,3\n")
    (tmp_path / "b.cif").write_text("data_b\n_cell_length_a 3\n")
    a, b, c = usable(custom_source(tmp_path, CustomData()))
    with pytest.raises(CrystalError, match=r"b\.cif"):
        b.load()
    assert_same(a.load(), originals()[0])
    assert_same(c.load(), originals()[2])


def test_file_names_with_and_without_suffix(tmp_path):
    """Files beat guesses, known suffixes come in order, folders are part of the id."""
    (tmp_path / "sub").mkdir()
    crystals = originals()
    (tmp_path / "x").write_text("notes")
    (tmp_path / "x.vasp").write_text(poscar(crystals[0]))
    (tmp_path / "x.cif").write_text(cif(crystals[1]))
    (tmp_path / "sub" / "POSCAR").write_text(poscar(crystals[2]))
    (tmp_path / "POSCAR_y").write_text(poscar(crystals[3]))
    (tmp_path / "mp-1.5.poscar").write_text(poscar(crystals[4]))
    (tmp_path / "id_prop.csv").write_text("x.vasp,0\nx,1\nsub/POSCAR,2\ny,3\nmp-1.5,4\n")
    found = usable(custom_source(tmp_path, CustomData()))
    assert [record.id for record in found] == ["x", "x", "sub/POSCAR", "y", "mp-1.5"]
    for record, original in zip(found, crystals, strict=True):
        assert_same(record.load(), original)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "id_prop.csv: no labels; write an id and its labels"),
        ("\n  \n", "id_prop.csv: no labels"),
        ("a\nb\n", "id_prop.csv: no labels"),
        ("id,e\n", "there is nothing in it"),
        ("id,e,e\na,1,2\n", "two columns are named e; rename"),
        ("id,formula\na,NaCl\nb,MgO\n", "no field holds numbers as labels .*formula"),
        ("x,1\ny,2\n", "none of 2 records can be used, first: .*id_prop.csv:1: no file x or x with"),
        ('a,1\n"b,2\nc,3\n', "id_prop.csv:2: .*correct the quotes"),
        (b"a,1\nb,\xc5\n", "not UTF-8 text; save it as CSV UTF-8"),
        ("id,e\na,na\nb,na\n", "no field holds numbers as labels"),
    ],
)
def test_faults_of_a_whole_table(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        custom_source(folder_of_cifs(tmp_path, text), CustomData())


def test_a_target_without_any_number(tmp_path):
    folder_of_cifs(tmp_path, "id,e,gap\na,1,na\nb,2,\n")
    with pytest.raises(DataError, match=r"there are no numbers in field 'gap' of --targets; choose among id, e, gap"):
        custom_source(tmp_path, CustomData(targets=("gap",)))
    assert [target.name for target in custom_source(tmp_path, CustomData()).targets] == ["e"]


def test_a_column_with_a_few_typing_errors_is_a_target_all_the_same(tmp_path):
    lines = ["id,e", *["a,1"] * 5, "b,one", *["c,3"] * 5]
    source = custom_source(folder_of_cifs(tmp_path, "\n".join(lines)), CustomData())
    assert len(labels(source)) == 10 and [bad.where for bad in only_bad(source)] == [f"{tmp_path}/id_prop.csv:7"]


def test_csv_columns(tmp_path):
    """The file column by its name; all other numeric columns are targets but those of ids, splits and groups."""
    lines = ["Name,CIF,e (eV, PBE),group,id".replace("e (eV, PBE)", '"e (eV, PBE)"'), "p,a,1,7,10", "q,b.cif,2,8,11"]
    folder_of_cifs(tmp_path, "\n".join(lines), "set.csv")
    source = custom_source(tmp_path / "set.csv", CustomData(group_column="group"))
    assert [(target.name, target.field) for target in source.targets] == [("e (eV  PBE)", "e (eV, PBE)")]
    assert [(record.id, record.group) for record in usable(source)] == [("10", "7"), ("11", "8")]
    assert_same(usable(source)[1].load(), originals()[1])
    assert ids(custom_source(tmp_path / "set.csv", CustomData(id_column="Name", targets=("group",)))) == ["p", "q"]


def test_csv_structure_column(tmp_path):
    folder_of_cifs(tmp_path, "id,first,second,e\np,a,b,1\nq,b,c,2\nr,c,nothing,3\n", "set.tsv".replace("tsv", "csv"))
    file = tmp_path / "set.csv"
    with pytest.raises(
        DataError, match=r"no column with names of structure files .* it has id, first, second, e; name it"
    ):
        custom_source(file, CustomData())
    source = custom_source(file, CustomData(structure_column="second"))
    assert ids(source) == ["p", "q"] and only_bad(source)[0].where == f"{file}:4"
    assert_same(next(iter(source.records())).load(), originals()[1])
    assert source.sha256 != custom_source(file, CustomData(structure_column="first")).sha256
    with pytest.raises(DataError, match=r"no column --structure_column=third; it has id, first, second, e"):
        custom_source(file, CustomData(structure_column="third"))


def test_csv_ids_fall_back_to_the_file(tmp_path):
    folder_of_cifs(tmp_path, "id\tfile\te\n\ta.cif\t1\nnamed\tb.cif\t2\n", "set.tsv")
    assert ids(custom_source(tmp_path / "set.tsv", CustomData())) == ["a", "named"]
    folder_of_cifs(tmp_path, "material_id,e\na,1\nb,2\n", "labels.csv")
    assert ids(custom_source(tmp_path / "labels.csv", CustomData())) == ["a", "b"]


def test_csv_of_cif_texts_with_a_bad_one(tmp_path):
    path = write_csv_of_cifs(tmp_path)
    text = path.read_text().replace("['Na', 'Cl']", "text").replace('"# generated', '"', 1)
    path.write_text(text.replace("_cell_length_a", "_cell_length_q", 1))
    first, *others = usable(custom_source(path, CustomData()))
    with pytest.raises(CrystalError, match=r"train\.csv:2: .*CIF"):
        first.load()
    for record, original in zip(others, originals()[1:], strict=True):
        assert_same(record.load(), original)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set.csv is empty"),
        ("x,1\ny,2\n", "set.csv:1: no header; name the columns"),
        ("file,e\n", "no rows; it has file, e"),
        ("file,file\na,1\n", "two columns are named file"),
        (
            "file,e\nx.cif,1\n",
            "no column with names of structure files in .* it has file, e; name it with --structure_col",
        ),
    ],
)
def test_faults_of_a_whole_csv(text, message, tmp_path):
    folder_of_cifs(tmp_path, text, "set.csv")
    with pytest.raises(DataError, match=message):
        custom_source(tmp_path / "set.csv", CustomData())


# Extended XYZ


def test_xyz_frames_that_cannot_be_used(tmp_path):
    path = write_xyz(tmp_path)
    frames = path.read_text().split("Lattice=")
    frames[2] = frames[2].replace(f"e_form={E_FORM[1]}", "e_form=high")
    frames[3] = frames[3].replace("split=test", "split=unseen")
    frames[4] = frames[4].replace("e_form", 'stress="1 2" e_form')
    path.write_text("Lattice=".join(frames).replace("\n", "\r\n") + "\r\n\r\n4\r\nLattice=\r\nCs 0 0 0\r\n")
    source = custom_source(path, CustomData(targets=("e_form",)))
    assert ids(source) == [IDS[0], IDS[4]] and source.count == 6
    bad = only_bad(source)
    starts = [0, *np.cumsum([crystal.num_atoms + 2 for crystal in originals()])]
    lines = [starts[1] + 1, starts[2] + 1, starts[3] + 1, starts[5] + 3]
    assert [record.where for record in bad] == [f"{path}:{line}" for line in lines]
    assert [record.id for record in bad[:2]] == list(IDS[1:3])
    for record, reason in zip(
        bad,
        ["e_form is 'high'", "split is 'unseen'", "comment line not understood", "ends after 1 of 4 atoms"],
        strict=True,
    ):
        assert reason in record.reason
    good = [record for record in source.records() if isinstance(record, Record)]
    for record, original in zip(good, (originals()[0], originals()[4]), strict=True):
        assert_same(record.load(), original)


def test_a_wrong_number_of_atoms_is_never_passed_over(tmp_path):
    """It costs its frame, not the others."""
    path = write_xyz(tmp_path)
    lines = path.read_text().splitlines()
    original = int(lines[0])
    for number, reason in ((original - 1, "more lines than"), (original + 1, "complete"), ("x", "but 'x'")):
        path.write_text("\n".join([str(number), *lines[1:]]))
        source = custom_source(path, CustomData())
        (bad,) = only_bad(source)
        assert reason in bad.reason and bad.where == f"{path}:1"
        assert ids(source) == list(IDS[1:5])


def test_a_bad_atom_concerns_one_frame(tmp_path):
    path = write_xyz(tmp_path)
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(lines[2].split()[1], "0.o")
    path.write_text("\n".join(lines))
    first, *others = usable(custom_source(path, CustomData()))
    with pytest.raises(CrystalError, match=r"set.extxyz:1: cannot be read as extended XYZ"):
        first.load()
    for record, original in zip(others, originals()[1:], strict=True):
        assert_same(record.load(), original)


def test_xyz_ids(tmp_path):
    frame = '1\nLattice="3 0 0 0 3 0 0 0 3" {} e=1.5\nCs 0 0 0\n'
    comments = ["id=007", "id='a b'", "other=1", "name=12 id=1e3", "cutoff=1 id=T"]
    (tmp_path / "set.xyz").write_text("\ufeff" + "\n".join(frame.format(comment) for comment in comments))
    source = custom_source(tmp_path / "set.xyz", CustomData(targets=("e",)))
    assert ids(source) == ["007", "a b", "set.xyz:9", "1e3", "T"]


def test_xyz_vectors_and_flags_are_no_labels(tmp_path):
    frame = '1\nLattice="3 0 0 0 3 0 0 0 3" pbc="T T T" dipole="1 2 3" relaxed energy=1.5\nCs 0 0 0\n'
    (tmp_path / "set.xyz").write_text(2 * frame)
    assert [target.name for target in custom_source(tmp_path / "set.xyz", CustomData()).targets] == ["energy"]
    with pytest.raises(
        DataError, match=r"no numbers in field 'dipole' of --targets; choose among dipole, relaxed, energy"
    ):
        custom_source(tmp_path / "set.xyz", CustomData(targets=("dipole",)))


def test_xyz_without_ase(tmp_path, monkeypatch):
    path = write_xyz(tmp_path)
    monkeypatch.setitem(sys.modules, "ase.io.extxyz", None)
    with pytest.raises(DataError, match=r"needs ASE; pip install ase"):
        custom_source(path, CustomData())


# JSON


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_json_records_that_cannot_be_used(name, tmp_path):
    made: list[Any] = records("flat")
    made[1]["e_form"] = "high"
    made[2]["split"] = "rest"
    del made[3]["species"]
    made.insert(4, [1, 2])
    made.append({**made[0], "id": None, "e_form": 10**400})
    text = json.dumps(made) if name == "set.json" else "\n".join(map(json.dumps, made))
    (tmp_path / name).write_text(text)
    source = custom_source(tmp_path / name, CustomData(targets=("e_form",)))
    assert ids(source) == [IDS[0], IDS[4]]
    bad = only_bad(source)
    place = " record " if name == "set.json" else ":"
    assert [record.where for record in bad] == [f"{tmp_path / name}{place}{number}" for number in (2, 3, 4, 5, 7)]
    assert [record.id for record in bad] == [*IDS[1:4], f"{name}:5", f"{name}:7"]
    for record, reason in zip(
        bad,
        ["e_form is 'high'", "split is 'rest'", "no structure; give it", "not a JSON object", "e_form is 1000"],
        strict=True,
    ):
        assert reason in record.reason


def test_a_line_that_is_not_json(tmp_path):
    lines = [json.dumps(record) for record in records("pymatgen")]
    lines[2] = lines[2][:-5]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    source = custom_source(tmp_path / "set.jsonl", CustomData())
    assert ids(source) == [*IDS[:2], *IDS[3:]]
    assert [record.where for record in only_bad(source)] == [f"{tmp_path}/set.jsonl:3"]


def test_nested_labels_are_taken_when_named(tmp_path):
    made = [record | {"properties": {"dft": {"k": i}}} for i, record in enumerate(records("flat"))]
    (tmp_path / "set.json").write_text(json.dumps(made))
    source = custom_source(tmp_path / "set.json", CustomData(targets=("properties.dft.k",)))
    assert labels(source) == [(float(i),) for i in range(5)]
    assert [t.name for t in custom_source(tmp_path / "set.json", CustomData()).targets] == ["e_form", "gap"]
    with pytest.raises(DataError, match=r"no field 'properties.k' .* properties.dft.k"):
        custom_source(tmp_path / "set.json", CustomData(targets=("properties.k",)))


def test_labels_far_down_in_a_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("crystalframer_jax.data.custom.fields.SAMPLE", 2)
    made = [record | ({"late": 4.0} if i == 3 else {}) for i, record in enumerate(records("flat"))]
    (tmp_path / "set.json").write_text(json.dumps(made))
    source = custom_source(tmp_path / "set.json", CustomData(targets=("late",)))
    np.testing.assert_array_equal(np.ravel(labels(source)), [np.nan] * 3 + [4.0, np.nan])


def test_structures_without_labels(tmp_path):
    structures = [structure_of(crystal).as_dict() for crystal in originals()]
    (tmp_path / "set.json").write_text(json.dumps(structures))
    with pytest.raises(DataError, match=r"set.json: no field holds numbers as labels"):
        custom_source(tmp_path / "set.json", CustomData())
    labelled = [structure | {"e": float(i)} for i, structure in enumerate(structures)]
    (tmp_path / "set.json").write_text(json.dumps(labelled))
    source = custom_source(tmp_path / "set.json", CustomData())
    assert labels(source) == [(0,), (1,), (2,), (3,), (4,)] and ids(source)[0] == "set.json:1"
    assert_same(usable(source)[1].load(), originals()[1])


def test_json_with_cif_texts(tmp_path):
    made = [{"_id": i, "cif": cif(crystal), "e": 1.5} for i, crystal in enumerate(originals())]
    (tmp_path / "set.json").write_text(json.dumps(made))
    source = custom_source(tmp_path / "set.json", CustomData())
    assert ids(source) == ["0", "1", "2", "3", "4"]
    for record, original in zip(usable(source), originals(), strict=True):
        assert_same(record.load(), original)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("set.json", "", "is empty"),
        ("set.json", "[]", "there is nothing in it"),
        ("set.json", '{"a": 1}', "not a list of records"),
        ("set.json", '[{"id": 1}, {"id', "ends within record 2"),
        ("set.json", '[{"e": 1}]', "none of 1 records can be used, first: .*record 1: no structure; give it under"),
        ("set.jsonl", "\n", "there is nothing in it"),
    ],
)
def test_faults_of_a_whole_json_file(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        custom_source(tmp_path / name, CustomData())


def test_archives_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.json", "[]")
        archive.writestr("b.json", "[]")
    with pytest.raises(DataError, match=r"holds 2 JSON files instead of one; unpack it"):
        custom_source(tmp_path / "set.zip", CustomData())
    (tmp_path / "set.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"set.zip"):
        custom_source(tmp_path / "set.zip", CustomData())


# Pickles


def test_pickles_are_refused_unless_allowed(tmp_path):
    write_pickles(tmp_path)
    for path in (tmp_path, tmp_path / "val" / "raw" / "raw_data.pkl"):
        with pytest.raises(DataError, match=r"can run programs .* add --allow_pickle"):
            custom_source(path, CustomData())


def test_official_pickles(tmp_path):
    source = custom_source(write_pickles(tmp_path), CustomData(allow_pickle=True))
    order = [0, 3, 1, 4, 2]
    assert [target.name for target in source.targets] == ["e_form", "gap"]
    assert ids(source) == [IDS[i] for i in order]
    assert [record.split for record in usable(source)] == ["train", "train", "val", "val", "test"]
    np.testing.assert_array_equal(labels(source), [(E_FORM[i], GAP[i]) for i in order])
    for record, i in zip(usable(source), order, strict=True):
        assert_same(pickle.loads(pickle.dumps(record)).load(), originals()[i])
    (tmp_path / "test" / "raw" / "raw_data.pkl").write_bytes(pickle.dumps([]))
    assert custom_source(tmp_path, CustomData(allow_pickle=True)).sha256 != source.sha256


def test_one_pickle(tmp_path):
    content = [
        official_record(0, originals()[0]),
        3,
        {"jid": "J", "atoms": jarvis_atoms(originals()[1], True), "e_form": 2},
    ]
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(content))
    source = custom_source(tmp_path / "set.pkl", CustomData(allow_pickle=True, targets=("e_form",)))
    assert ids(source) == [IDS[0], "J"] and labels(source) == [(E_FORM[0],), (2.0,)]
    assert_same([r for r in source.records() if isinstance(r, Record)][1].load(), originals()[1])
    (bad,) = only_bad(source)
    assert bad.where == f"{tmp_path}/set.pkl record 2" and "not a dict" in bad.reason
    (tmp_path / "set.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match=r"set.pkl: holds a dict, not a list"):
        custom_source(tmp_path / "set.pkl", CustomData(allow_pickle=True))


def test_one_inconsistent_structure_in_a_pickle(tmp_path):
    content = [official_record(i, originals()[i]) for i in range(3)]
    vars(content[1]["structure"][0])["_frac_coords"] = np.zeros(2)
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(content))
    first, wrong, last = usable(custom_source(tmp_path / "set.pkl", CustomData(allow_pickle=True, targets=("e_form",))))
    assert_same(first.load(), originals()[0])
    with pytest.raises(CrystalError, match=f"{IDS[1]}: not a pymatgen Structure .*not xyz-shaped"):
        wrong.load()
    assert_same(last.load(), originals()[2])


def test_pickles_go_through_the_allow_list(tmp_path):
    (tmp_path / "set.pkl").write_bytes(pickle.dumps([{"structure": shutil.rmtree}]))
    with pytest.raises(DataError, match=r"set\.pkl"):
        custom_source(tmp_path / "set.pkl", CustomData(allow_pickle=True))


# What is no data


def test_folders_and_files_of_other_kinds(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder"):
        custom_source(tmp_path / "nowhere", CustomData())
    with pytest.raises(
        DataError, match=r"no id_prop.csv and no train/raw/raw_data.pkl in it; add a file with the labels$"
    ):
        custom_source(tmp_path, CustomData())
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(DataError, match=r"or give one of its files: labels.csv$"):
        custom_source(tmp_path, CustomData())
    (tmp_path / "a.cif").write_text("")
    with pytest.raises(DataError, match=r"a.cif: unknown kind of data; give a folder with id_prop.csv"):
        custom_source(tmp_path / "a.cif", CustomData())
    with pytest.raises(DataError, match=r"--structure_column is for CSV files"):
        custom_source(write_json(tmp_path), CustomData(structure_column="structure"))


@pytest.mark.parametrize("marker", custom_labels.MISSING)
def test_missing_markers(marker):
    assert math.isnan(custom_labels.number(f" {marker.upper()} ")) and not custom_labels.is_number(marker)


def test_options_are_those_of_the_command():
    names = [field.name for field in dataclasses.fields(CustomData)]
    assert names == [
        "targets",
        "units",
        "structure_column",
        "id_column",
        "split_column",
        "group_column",
        "fold_column",
        "test_fold",
        "allow_pickle",
    ]
