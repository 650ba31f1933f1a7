"""Records that anybody may have written: a wrong one costs itself, nothing is run, nothing acts on the terminal."""

import csv
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.cli import predict
from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.prepare import Preparation, prepare
from crystalframer_jax.data.records import BadRecord, DataError
from crystalframer_jax.data.store import load_dataset
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.reporting.predictions import plot_calibration, write_predictions
from crystalframer_jax.structures.crystal import CrystalError

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
NACL = Path(__file__).parents[2] / "examples" / "NaCl.cif"
GOOD = ["=1+1", "-x", "@a", "Größe", "a\u00a0b", "'=b", "'c", *map(str, range(13))]  # ids that are unusual at most


def flat(number: int = 0, **changes) -> dict:
    length = 4 + number / 50
    return {
        "id": f"r{number}",
        "e": number / 8,
        "lattice": [[length, 0, 0], [0, length, 0], [0, 0, length]],
        "species": ["Na", "Cl"],
        "frac_coords": [[0, 0, 0], [0.5, 0.5, 0.5]],
        **changes,
    }


def grid(size: int) -> list[list[float]]:
    return [[x / size, y / size, z / size] for x in range(size) for y in range(size) for z in range(size)]


def text_with(key: str, value: str) -> str:
    """A record with JSON text in place of a value."""
    return json.dumps(flat(**{key: "here"})).replace('"here"', value)


DENSE = flat(id="dense", lattice=(np.eye(3) * 1.8).tolist(), species=["C"] * 1728, frac_coords=grid(12))
WRONG = {
    "null": "NoneType",
    "[]": "list",
    '"text"': "str",
    "17": "int",
    text_with("species", "[" * 90 + "]" * 90): "nested 9",
    text_with("more", "[" * 900 + "]" * 900): "nested 9",
    text_with("more", '{"a":' * 5000 + "1" + "}" * 5000): "recursion|nested",
    text_with("e", "7" * 5000): "digits",
    text_with("more", "1" * 100_000): "digits",
    json.dumps(flat())[:-1] + ', "e": 2}': "'e' is there twice",
    json.dumps(flat())[:-1] + ', "more": {"a": 1, "a": 2}}': "'a' is there twice",
    json.dumps(flat(id="\ud800")): r"character \\ud800",
    json.dumps(flat(id="a\0b")): r"character \\x00",
    json.dumps(flat(id="\x1b[2J")): r"character \\x1b",
    json.dumps(flat(id="a\nb")): r"character \\n",
    json.dumps(flat(id="a\u202eb")): r"character \\u202e",
    json.dumps(flat(id="a\u2028b")): r"character \\u2028",
    json.dumps(flat(id="x" * 300)): "300 characters",
    json.dumps(flat(e=[1])): "e is ",
    json.dumps(flat(e={"a": 1})): "e is ",
    json.dumps(flat(split="\x1b]0;")): r"split is '\\x1b",
    json.dumps(flat(lattice=None)): "not a structure",
    json.dumps(flat(lattice=[1, 2, 3])): "not a structure",
    json.dumps(flat(lattice="4 0 0 0 4 0 0 0 4")): "not a structure",
    json.dumps(flat(species="NaCl")): "not a structure",
    json.dumps(flat(species=[None, {}])): "not a structure",
    json.dumps(flat(frac_coords=[["0", "0"], []])): "not a structure",
    json.dumps(flat(frac_coords=[[0, 0, 0], [float("nan")] * 3])): "NaN",
    json.dumps(flat(frac_coords=[[0, 0, 0], [float("inf")] * 3])): "NaN",
    json.dumps(flat(frac_coords=[[0, 0, 0], [1e300, 0, 0]])): "cells away",
    json.dumps(flat(frac_coords=[[0, 0, 0], [10**400, 0, 0]])): "not a structure",
    json.dumps(flat(lattice=(np.eye(3) * 1e300).tolist())): "lattice vector",
    json.dumps(DENSE): "1,728 atoms have about 713,",
    json.dumps(flat(species=["H"] * 60_000, frac_coords=[[0, 0, 0]] * 60_000)): "60,000 atoms",
    json.dumps({"id": "s", "e": 1, "structure": {"lattice": {}, "sites": []}}): "not a pymatgen",
    json.dumps({"id": "s", "e": 1, "structure": {"lattice": {"matrix": []}, "sites": {"a": 1}}}): "not a pymatgen",
    json.dumps({"id": "s", "e": 1, "structure": {"lattice": None, "sites": None}}): "not a pymatgen",
    json.dumps({"id": "s", "e": 1, "atoms": {"elements": 1, "coords": 2, "lattice_mat": 3}}): "not a structure",
}


@pytest.mark.parametrize("kind", ["set.json", "set.jsonl"])
def test_wrong_records_cost_themselves(tmp_path, kind, capsys):
    """skipped.csv names each of them and tells why; the others are prepared, with ids that files can hold."""
    good = [json.dumps(flat(n, id=id)) for n, id in enumerate(GOOD)]
    lines = [line for pair in zip(good, WRONG, strict=False) for line in pair] + list(WRONG)[len(good) :]
    file = tmp_path / kind
    file.write_text("\n".join(lines) if kind == "set.jsonl" else f"[{','.join(lines)}]")
    if kind == "set.jsonl":
        file.write_bytes(file.read_bytes() + b'\n{"id": "\xff"}')
    folder = tmp_path / "data" / "untrusted"
    prepare(folder, custom_source(file, CustomData(targets=("e",))), None, Preparation(max_bad_share=1, workers=1))
    skipped = list(csv.reader((folder / "crystals" / "skipped.csv").read_text().splitlines()))[1:]
    place = "set.jsonl:{}" if kind == "set.jsonl" else "set.json record {}"
    reasons = {where: reason for _, where, reason in skipped}
    for line, message in WRONG.items():
        where = f"{tmp_path}/" + place.format(lines.index(line) + 1)
        assert re.search(message, reasons.pop(where)), (line[:80], message)
    assert len(reasons) == (kind == "set.jsonl")
    printed = capsys.readouterr()
    for text in ((folder / "crystals" / "skipped.csv").read_text(), printed.out + printed.err):
        assert all(c.isprintable() or c == "\n" for c in text)

    dataset = load_dataset(folder, ("e",), 4.0, 1)
    assert dataset.table.ids.tolist() == GOOD
    statistics = (TargetStatistics("e", "", 0.0, 1.0),)
    write_predictions(tmp_path / "p.csv", dataset.table.ids, dataset.labels, dataset.labels, statistics)
    written = [row[0] for row in csv.reader((tmp_path / "p.csv").read_text().splitlines())][1:]
    assert not any(id.startswith(("=", "-", "@")) for id in written)
    assert [without_apostrophe(id) for id in written] == GOOD


def without_apostrophe(cell: str) -> str:
    """As docs/data.md says."""
    return re.sub(re.search(r'str\.replace\(r"(.*?)", ""', DOCS.read_text())[1], "", cell)


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "\ud800", "a\u202e", "a\nb"])
def test_names_of_fields_that_act_are_refused(tmp_path, name):
    (tmp_path / "set.json").write_text(json.dumps([flat(n, **{name: n}) for n in range(12)]))
    with pytest.raises(DataError, match=r"the name of field .* has the character \\.*; rename it, or name --targets"):
        custom_source(tmp_path / "set.json", CustomData())
    assert custom_source(tmp_path / "set.json", CustomData(targets=("e",))).targets[0].name == "e"


def test_messages_and_tables_act_on_no_terminal(tmp_path, capsys):
    bad = [flat(n, id=f"\x1b]0;owned\x07{n}", species=["Na", "\x1b[2J"]) for n in range(3)]
    file = tmp_path / "se\x1b[2Jt.json"
    file.write_text(json.dumps(bad))
    with pytest.raises(SystemExit) as left:
        prepare_main(["--target_set=mine", f"--source={file}", f"--data_dir={tmp_path}"])
    assert str(left.value).startswith("error: 3 of 3 records cannot be used")
    assert str(left.value).isprintable()
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_names_of_targets_need_not_be_names_of_files(tmp_path):
    statistics = tuple(TargetStatistics(name, "eV", 0.0, 1.0) for name in ("energy/atom", "../../e"))
    values = np.random.default_rng(0).normal(size=(30, 2))
    files, _ = plot_calibration(tmp_path / "c.png", values, values + 0.1, np.full((30, 2), 0.2), statistics)
    assert [file.name for file in files] == ["c_energy_atom.png", "c_.._.._e.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)


class Model:
    """Predicts as a trained model would, with the numbers 1, 2, ..."""

    targets = (TargetStatistics("=e\x1b[2J", "eV", 0.0, 1.0),)
    cutoff = 4.0

    def predict_with_spread(self, crystals, *_):
        values = np.arange(1.0, len(crystals) + 1)[:, None]
        return Predictions(values, 0 * values)

    def spread_over(self, *_):
        return ""


def test_files_with_any_name_are_predicted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "load_model", lambda *_: Model())
    names = [b"=cmd|' \x1b[2J.cif", b"not utf-8 \xff.cif", b"\xe2\x80\xae.cif", b"wrong\x1b[2J.cif"]
    for name in names:
        text = NACL.read_text().replace("Na", "\x1b]0;Qq") if name.startswith(b"wrong") else NACL.read_text()
        Path(tmp_path, os.fsdecode(name)).write_text(text)
    monkeypatch.chdir(tmp_path)
    dense = tmp_path / "POSCAR_dense"
    rows = "\n".join(" ".join(map(str, row)) for row in grid(12))
    dense.write_text(f"x\n1\n1.8 0 0\n0 1.8 0\n0 0 1.8\nC\n1728\nDirect\n{rows}\n")
    assert predict.predict_main(["run", *map(os.fsdecode, names), str(dense), "--output=p.csv"]) == 1
    printed = capsys.readouterr()
    assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())
    assert "not utf-8 \\udcff.cif" in printed.out
    assert printed.err.count("error: ") == 2
    header, *lines = csv.reader(Path("p.csv").read_text().splitlines())
    assert header[3].startswith("'=e")
    assert [line[0] for line in lines] == ["'=cmd|' \x1b[2J.cif", "not utf-8 \\udcff.cif", "\u202e.cif"]


MODULE = "a_module_that_nobody_asked_for"
CALL = {"@module": MODULE, "@class": "Thing", "@callable": "thing", "@version": "1"}


def hostile() -> dict[str, dict]:
    """Structures of every kind that name a module wherever there is room."""
    site = {"species": [{"element": "Na", "occu": 1, "properties": CALL}], "abc": [0, 0, 0], "properties": {"m": CALL}}
    matrix = [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    pymatgen = {"lattice": {"matrix": matrix, **CALL}, "sites": [site, CALL | site], "properties": CALL, **CALL}
    pymatgen["sites"][1] = {**site, "abc": [0.5, 0.5, 0.5], "label": CALL}
    jarvis = {"lattice_mat": matrix, "coords": [[0, 0, 0]], "elements": ["Na"], "props": [CALL], **CALL}
    return {
        "pymatgen": {"structure": pymatgen},
        "a structure itself": pymatgen,
        "jarvis": {"atoms": jarvis},
        "flat": flat(properties=[CALL], **CALL),
        "element": {"structure": {**pymatgen, "sites": [{**site, "species": [{"element": CALL, "occu": 1}]}]}},
        "matrix": {"structure": {**pymatgen, "lattice": CALL}},
        "coordinates": {"structure": {**pymatgen, "sites": [{**site, "abc": CALL}]}},
    }


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported."""
    (tmp_path / "modules").mkdir()
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass Thing:\n    @classmethod\n    def from_dict(cls, d): return cls()\n"
    (tmp_path / "modules" / f"{MODULE}.py").write_text(code + "thing = Thing\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    assert not canary.exists()
    assert MODULE not in sys.modules


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("kind", ["set.json", "set.jsonl", "set.pkl"])
@pytest.mark.parametrize("name", hostile())
def test_nothing_is_imported_by_name(tmp_path, kind, name):
    record = {"id": "a", "e": 1.5, "gap": CALL, "more": [CALL], **hostile()[name]}
    content = pickle.dumps([record]) if kind == "set.pkl" else json.dumps(record).encode()
    (tmp_path / kind).write_bytes(b"[" + content + b"]" if kind == "set.json" else content)
    (found,) = custom_source(tmp_path / kind, CustomData(targets=("e",), allow_pickle=True)).records()
    assert not isinstance(found, BadRecord)
    if name in ("element", "matrix", "coordinates"):
        with pytest.raises(CrystalError, match="a: not a pymatgen Structure"):
            found.crystal(4.0)
    else:
        assert found.crystal(4.0).species[0] == 11


@pytest.mark.usefixtures("module")
def test_nothing_is_imported_by_extended_xyz(tmp_path):
    text = json.dumps(CALL).replace('"', '\\"')
    comment = f'Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 e=1.5 more="_JSON {text}"'
    (tmp_path / "set.extxyz").write_text(f"1\n{comment}\nNa 0 0 0\n")
    (found,) = custom_source(tmp_path / "set.extxyz", CustomData(targets=("e",))).records()
    assert found.crystal(4.0).formula == "Na"
    (read,), errors = predict.read_all([str(tmp_path / "set.extxyz")])
    assert (read.crystal.formula, errors) == ("Na", [])
