"""Files with random changes: each gives crystals, or errors of one line, within 2 s and 1 GB.

They are read in a process of its own, which a file could end or fill. A number that is reported names a file:
`PYTHONPATH=tests python tests/data/test_mutated_files.py FOLDER NUMBER NUMBER+1` writes and reads it again.
"""

import csv
import io
import json
import random
import sqlite3
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
from mutations import changed, in_time, limit_memory, numbers_of_last_line

from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.records import DataError

TABLES = 20  # 150 times this is the first number of a table
FILES = Path(__file__).parents[1] / "structures" / "files"


def dicts() -> list[dict]:
    """Records of every kind of structure."""
    flat = {
        "lattice": [[4, 0, 0], [0, 4, 0], [0, 0, 4]],
        "species": ["Na", "Cl"],
        "frac_coords": [[0, 0, 0], [0.5] * 3],
    }
    jarvis = {"lattice_mat": flat["lattice"], "elements": ["Si"], "coords": [[0.1, 0.2, 0.3]], "cartesian": False}
    sites = [
        {
            "species": [{"element": "Fe", "occu": 0.5, "oxidation_state": 2.0}],
            "abc": [0, 0, 0],
            "properties": {"m": 1.5},
        },
        {"species": [{"element": "O", "occu": 1}], "abc": [0.5, 0.5, 0.25], "label": "O1"},
    ]
    pymatgen = {"lattice": {"matrix": flat["lattice"], "pbc": [True] * 3}, "sites": sites, "charge": 0}
    records = [{"id": "a", "e": 1.5, "split": "train", **flat}, {"id": "b", "e": -2, "split": "val", "atoms": jarvis}]
    return [
        *records,
        {"id": "c", "e": 0.25, "split": "test", "structure": pymatgen, "more": {"gap": 3, "tags": [1, None]}},
    ]


def table() -> str:
    """CSV with the text of CIFs in a column."""
    stream = io.StringIO()
    rows = csv.writer(stream)
    rows.writerow(["id", "cif", "e", "split"])
    for number, name in enumerate(("ZnO.cif", "quartz.cif")):
        rows.writerow([name, (FILES / name).read_text(), number + 0.5, "train"])
    return stream.getvalue()


def tables() -> list[tuple[str, bytes]]:
    """Tables, JSON of all layouts and files of ASE."""
    import ase.db
    import ase.io
    from ase import Atoms

    _, jarvis, pymatgen = dicts()
    named = {"a": {"structure": pymatgen["structure"], "e": 1.5}, "b": {"structure": jarvis["atoms"], "e": 2}}
    columns = {key: {id: record[key] for id, record in named.items()} for key in ("structure", "e")}
    split = {"index": list(named), "columns": ["structure", "e"], "data": [[*r.values()] for r in named.values()]}
    text = [{"id": "a", "structure": json.dumps(pymatgen["structure"]), "e": 1.5}]
    schema = {"schema": {"fields": [{"name": "index"}], "primaryKey": ["index"]}, "data": [{"index": 0, **named["a"]}]}
    found = [("set.json", json.dumps(content)) for content in (named, columns, split, text, schema, text[0])]
    rows = "ZnO.cif;1,5;0\nquartz;-2e3;1\nCONTCAR;na;2\n"
    found += [("id_prop.csv", rows), ("id_prop.csv", rows.replace(";", "\t").replace(",", ".")), ("set.csv", table())]
    rows = "file,e,fold,split\r\nZnO.cif,True,1,train\r\nquartz,1.2 eV,2,val\r\nCONTCAR,3,1,test\r\n"
    found += [("id_prop.csv", rows)]
    contents = [(name, content.encode()) for name, content in found]
    atoms = Atoms("NaCl", [[0, 0, 0], [2, 2, 2]], cell=[4, 4, 4], pbc=True, info={"e": 1.5})
    with tempfile.TemporaryDirectory() as folder:
        with ase.db.connect(f"{folder}/set.db") as database:
            for _ in range(2):
                database.write(atoms, e=1.5, unit="eV")
        with sqlite3.connect(f"{folder}/set.db") as connection:  # the same bytes every time
            connection.execute("UPDATE systems SET unique_id = id, ctime = 0, mtime = 0, username = 'x'")
        connection.close()
        ase.io.write(f"{folder}/set.traj", [atoms, atoms])
        with zipfile.ZipFile(f"{folder}/set.zip", "w") as archive:
            archive.writestr(zipfile.ZipInfo("id_prop.csv"), "ZnO,1\nquartz,2\n")
            for name in ("ZnO.cif", "quartz.cif"):
                archive.writestr(zipfile.ZipInfo(name), (FILES / name).read_bytes())
        contents += [(name, Path(folder, name).read_bytes()) for name in ("set.db", "set.traj", "set.zip")]
    return contents


def originals() -> list[tuple[str, bytes]]:
    """Names, of which the suffixes tell the kind, and contents of sound files."""
    lines = "".join(json.dumps(record) + "\n" for record in dicts())
    texts = {"set.jsonl": lines, "set.json": json.dumps(dicts(), indent=1), "set.csv": table()}
    texts |= {"id_prop.csv": "id,e\nZnO.cif,1.5\nquartz,-2e3\nCONTCAR,na\n"}
    texts |= {name: (FILES / name).read_text() for name in ("ZnO.cif", "quartz.cif", "disordered.cif", "CONTCAR")}
    texts |= {name: (FILES / "frames.extxyz").read_text() for name in ("frames.extxyz", "set.extxyz")}
    return [(name, text.encode()) for name, text in texts.items()]


@pytest.mark.parametrize("part", [0, 1, TABLES, TABLES + 1])
def test_some_mutated_files(tmp_path, part):
    read_mutated(tmp_path, 150 * part, 150 * part + 150)


def test_a_row_with_more_cells_than_columns(tmp_path):
    """The last of which is a structure: found among 40,000 mutated files."""
    (tmp_path / "ZnO.cif").write_bytes((FILES / "ZnO.cif").read_bytes())
    (tmp_path / "set.csv").write_text("name,e\nx,1,ZnO.cif\n")
    with pytest.raises(DataError, match="no column with names of structure files"):
        custom_source(tmp_path / "set.csv", CustomData())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_mutated_files(tmp_path, part):
    first = 500 * part if part < 4 else 150 * TABLES + 500 * (part - 4)
    read_mutated(tmp_path, first, first + 500)


def read_mutated(folder: Path, first: int, end: int) -> None:
    crystals, errors = numbers_of_last_line(__file__, folder, first, end)
    assert crystals and errors


def _main(folder: Path, first: int, end: int) -> None:
    from crystalframer_jax.errors import UserError

    sound, kinds = originals() if first < 150 * TABLES else tables(), [0, 0]
    for name in ("ZnO.cif", "quartz.cif", "CONTCAR"):
        (folder / name).write_bytes((FILES / name).read_bytes())
    warnings.simplefilter("ignore")
    for file in (folder / "ZnO.cif", folder / "CONTCAR"):
        _read(file)  # imports what is needed
    limit_memory()
    for number in range(first, end):
        print(number, flush=True)
        rng = random.Random(number)
        name, content = rng.choice(sound)
        file = folder / f"{number}" / name
        file.parent.mkdir(exist_ok=True)
        if name == "id_prop.csv":
            for other in ("ZnO.cif", "quartz.cif", "CONTCAR"):
                (file.parent / other).write_bytes((folder / other).read_bytes())
        file.write_bytes(changed(content, rng))
        with in_time(f"{number} {name}"):
            try:
                found, wrong = _read(file.parent if name == "id_prop.csv" else file)
                kinds = [kinds[0] + found, kinds[1] + wrong]
            except UserError as error:
                kinds[1] += 1
                assert len(str(error)) < 5000, f"an error of {len(str(error))} characters"
    print("read", kinds[0], "crystals and", kinds[1], "errors")


def _read(file: Path) -> tuple[int, int]:
    """Reads a file as the program does; gives how many crystals and how many errors there were."""
    from crystalframer_jax.cli.predict import read_all
    from crystalframer_jax.data.prepare import _crystals_of

    if not file.is_dir():  # sets are predicted too
        crystals, errors = read_all([file], [6.93])
        for read in crystals:
            assert read.crystal.formula
        if not file.name.startswith("set"):
            return len(crystals), len(errors)
    source = custom_source(file, CustomData(split_column="split"))
    records = list(source.records())
    records = records[:500]  # a thousand sound crystals take a second
    columns = _crystals_of(len(source.targets), records)
    return len(columns["ids"]), len(records) - len(columns["ids"])


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
