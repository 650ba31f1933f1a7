"""Files with random changes: each gives crystals, or errors of one line, within 2 s and 1 GB.

They are read in a process of its own, which a file could end or fill. A number that is reported names a file: `python
tests/data/test_mutated_files.py FOLDER NUMBER NUMBER+1` writes and reads it again.
"""

import csv
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.records import DataError

FILES = Path(__file__).parents[1] / "structures" / "files"
SECONDS, BYTES = 2.0, 1 << 30
EXTREME = ["1e308", "-0", "nan", "inf", "1000000000", "-1", "0", "1e-320", "1e999999"]
EXTREME += ["9" * 5000, "7" * 1_000_000, "0." + "3" * 100_000]
INSERTED = [
    "\x00",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "\n",
    "\r",
    '"',
    "'",
    "[" * 200,
    "{",
    ",",
    "#",
    ";",
    "=",
    "\t",
    "(",
    "\ufeff",
]


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


def originals() -> list[tuple[str, bytes]]:
    """Names, of which the suffixes tell the kind, and contents of sound files."""
    lines = "".join(json.dumps(record) + "\n" for record in dicts())
    texts = {"set.jsonl": lines, "set.json": json.dumps(dicts(), indent=1), "set.csv": table()}
    texts |= {"id_prop.csv": "id,e\nZnO.cif,1.5\nquartz,-2e3\nCONTCAR,na\n"}
    texts |= {name: (FILES / name).read_text() for name in ("ZnO.cif", "quartz.cif", "disordered.cif", "CONTCAR")}
    texts |= {name: (FILES / "frames.extxyz").read_text() for name in ("frames.extxyz", "set.extxyz")}
    return [(name, text.encode()) for name, text in texts.items()]


def changed(content: bytes, rng: random.Random) -> bytes:
    """Applies one to four random changes."""
    for _ in range(rng.randint(1, 4)):
        content = rng.choice(CHANGES)(content, rng)
    return content


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) or 1)
    return content[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1]) + content[at + 1 :]


def span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 3, 10, 100, 1000]))


def delete(content: bytes, rng: random.Random) -> bytes:
    start, end = span(content, rng)
    return content[:start] + content[end:]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start, end = span(content, rng)
    return content[:end] + content[start:end] * rng.choice([1, 2, 50]) + content[end:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(INSERTED).encode(errors="surrogatepass") + content[at:]


def replace_number(content: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"-?\d+(\.\d*)?", content))
    if not numbers:
        return content
    start, end = rng.choice(numbers).span()
    return content[:start] + rng.choice(EXTREME).encode() + content[end:]


def swap_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bit, delete, repeat, insert, replace_number, replace_number, replace_number, swap_lines,
]  # fmt: skip


@pytest.mark.parametrize("part", range(2))
def test_some_mutated_files(tmp_path, part):
    read_mutated(tmp_path, 150 * part, 150 * part + 150)


def test_a_row_with_more_cells_than_columns(tmp_path):
    """The last of which is a structure: found among 40,000 mutated files."""
    (tmp_path / "ZnO.cif").write_bytes((FILES / "ZnO.cif").read_bytes())
    (tmp_path / "set.csv").write_text("name,e\nx,1,ZnO.cif\n")
    with pytest.raises(DataError, match="no column with names of structure files"):
        custom_source(tmp_path / "set.csv", CustomData())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_mutated_files(tmp_path, part):
    read_mutated(tmp_path, 500 * part, 500 * part + 500)


def read_mutated(folder: Path, first: int, end: int) -> None:
    command = [sys.executable, __file__, folder, str(first), str(end)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"it ended in number {lines[-1] if lines else '?'}: {done.stderr[-2000:]}"
    assert lines[-1].startswith("read"), done.stdout
    crystals, errors = map(int, re.findall(r"\d+", lines[-1]))
    assert crystals and errors, lines[-1]


class _Late(BaseException):
    """What takes too long; nothing may catch it."""


def _main(folder: Path, first: int, end: int) -> None:
    from crystalframer_jax.errors import UserError

    sound, kinds = originals(), [0, 0]
    for name in ("ZnO.cif", "quartz.cif", "CONTCAR"):
        (folder / name).write_bytes((FILES / name).read_bytes())
    warnings.simplefilter("ignore")
    for file in (folder / "ZnO.cif", folder / "CONTCAR"):
        _read(file)  # imports what is needed
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (virtual + BYTES, virtual + BYTES))

    def late(*_: object) -> None:
        raise _Late

    signal.signal(signal.SIGALRM, late)
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
        start = time.process_time()
        signal.alarm(int(4 * SECONDS))
        try:
            found, wrong = _read(file.parent if name == "id_prop.csv" else file)
            kinds = [kinds[0] + found, kinds[1] + wrong]
        except UserError as error:
            kinds[1] += 1
            assert len(str(error)) < 5000, f"{number} {name}: an error of {len(str(error))} characters"
        except BaseException:
            print(f"{number} {name}: {traceback.format_exc()}", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
        seconds = time.process_time() - start
        assert seconds < SECONDS, f"{number} {name}: {seconds:.1f} s"
    print("read", kinds[0], "crystals and", kinds[1], "errors")


def _read(file: Path) -> tuple[int, int]:
    """Reads a file as the program does; gives how many crystals and how many errors there were."""
    from crystalframer_jax.cli.predict import read_all
    from crystalframer_jax.data.prepare import _crystals_of

    if not (file.is_dir() or file.name.startswith("set")):
        crystals, errors = read_all([file], [6.93])
        for crystal in crystals:
            assert crystal.formula
        return len(crystals), len(errors)
    source = custom_source(file, CustomData(split_column="split"))
    records = list(source.records())
    columns = _crystals_of(len(source.targets), records)
    return len(columns["ids"]), len(records) - len(columns["ids"])


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
