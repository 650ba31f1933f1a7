"""Small pickles that would take the stack, the memory or all time: an error in one line, or the record's alone.

They are read in a process of its own, whose end by a signal would be the failure that the tests are about.
"""

import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def doubled(start: bytes, times: int = 80, pack: bytes = b"\x86") -> bytes:
    """A tuple of the same twice, of which there is one twice, and so on."""
    return start + (b"2" + pack) * times


DOUBLE = doubled(b")")
LISTS = b"]" + b"".join(b"q" + bytes([n]) + b"0]" + (b"h" + bytes([n]) + b"a") * 2 for n in range(80))
MEGABYTE = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
BYTES = named("builtins", "bytes")
DICT_OF_ITSELF = b"}q\x00" + b"".join(text(name) + b"h\x00s" for name in "abc")
ENDLESS = b"\x8b" + struct.pack("<i", 3000) + b"\x01" * 3000
ARRAY = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
EMPTY_TEXTS = ARRAY + b"(K\x01J\xff\xff\xff\x7fK\x03\x86" + named("numpy", "dtype") + text("S0") + b"\x85R\x89C\x00tb"


def long_key(number: int) -> bytes:
    """An integer whose hash is 0, as a key with None."""
    return b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"Ns"


def complex_key(number: int) -> bytes:
    """Likewise of a complex number."""
    parts = b"".join(b"G" + struct.pack(">d", part) for part in (-1000003.0 * number, number))
    return named("builtins", "complex") + parts + b"\x86RNs"


REFUSED = {
    "deep key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
    "key on the stack twice": b"}" + DOUBLE + b"K\x01s.",
    "keys": b"}(" + DOUBLE + b"K\x01u.",
    "keys of a dict": b"(" + DOUBLE + b"K\x01d.",
    "set": b"\x8f(" + DOUBLE + b"\x90.",
    "frozen set": b"(" + DOUBLE + b"\x91.",
    "frozen sets": b"(" + doubled(b")", 80, b"\x86\x85") + b"\x91.",
    "key from the memo": b"}" + DOUBLE + b"q\x000h\x00K\x01s.",
    "key behind a mark that is taken back": b"}((0" + DOUBLE + b"K\x01u.",
    "long keys": b"}" + b"".join(map(long_key, range(1, 90_000))) + b".",
    "complex keys": b"}" + b"".join(map(complex_key, range(20_000))) + b".",
    "called set": named("builtins", "set") + b"](" + DOUBLE + b"e\x85R.",
    "called frozen set": named("builtins", "frozenset") + b"]" + DOUBLE + b"a\x85R.",
    "ordered": named("collections", "OrderedDict") + b"]]" + DOUBLE + b"aK\x01aa\x85R.",
    "codec": named("_codecs", "encode") + text("a") + DOUBLE + b"\x86R.",
    "element": named("pymatgen.core.periodic_table", "Element") + DOUBLE + b"\x85R.",
    "member": named("builtins", "getattr") + named("pymatgen.core.periodic_table", "Element") + DOUBLE + b"\x86R.",
    "shape": ARRAY + b"(K\x01" + DOUBLE + named("numpy", "dtype") + text("f8") + b"\x85R\x89C\x00tb.",
    "reconstructor": named("copyreg", "_reconstructor") + DOUBLE + DOUBLE + b"N\x87R.",
    "spin": named("pymatgen.core.composition", "Composition") + b")\x81}" + text("_data") + b"}"
    + named("pymatgen.core.periodic_table", "DummySpecies") + b")\x81}(" + text("_symbol") + text("X")
    + text("_oxi_state") + b"K\x01" + text("_spin") + DOUBLE + b"ubK\x01ssb.",
    "site": named("pymatgen.core.sites", "Site") + b")\x81}(" + text("_species") + DOUBLE + text("coords") + b")ub.",
    "composition": named("pymatgen.core.composition", "Composition") + b")\x81}" + text("_data") + b"]" + DOUBLE
    + b"K\x01\x86asb.",
    "lattice": named("pymatgen.core.lattice", "Lattice") + b")\x81}" + text("_matrix") + LISTS + b"sb.",
    "bytes": MEGABYTE + b"q\x000](" + (BYTES + b"h\x00\x85R") * 3000 + b"e.",
    "shared list": b"](" + b"K\x01" * 10_000 + b"eq\x000](" + (named("builtins", "set") + b"h\x00\x85R") * 3000 + b"e.",
    "many texts of no length": EMPTY_TEXTS + b".",
    "depth": b"]" * 150 + b"a" * 149 + b".",
}  # fmt: skip

WRONG_RECORD = {
    "lists as coordinates": text("coords") + LISTS,
    "lists as a lattice": text("lattice_mat") + LISTS,
    "tuples as a name": text("id") + DOUBLE,
    "lists as a label": text("e") + LISTS,
    "lists as a split": text("split") + LISTS,
    "endless name": text("id") + ENDLESS,
    "endless label": text("e") + ENDLESS,
    "endless split": text("split") + ENDLESS,
    "endless symbol": text("elements") + b"]" + ENDLESS + b"a",
    "object of itself": text("more") + DICT_OF_ITSELF,
}


def record(number: int) -> bytes:
    """A dict of JARVIS, open for more."""
    vector = [b"](" + b"".join(b"G" + struct.pack(">d", 3.0 * (i == j)) for j in range(3)) + b"e" for i in range(3)]
    items = [text("lattice_mat") + b"](" + b"".join(vector) + b"e", text("coords") + b"](" + vector[0] + b"e"]
    items += [text("elements") + b"](" + text("Si") + b"e", text("cartesian") + b"\x89"]
    items += [text("e") + b"G" + struct.pack(">d", number), text("id") + text(f"r{number}")]
    return b"}(" + b"".join(items) + b"u"


def run(folder: Path, contents: dict[str, bytes]) -> list[str]:
    """Reads pickles in a process with 4 GB that is killed after a minute; gives a line for each."""
    files = []
    for number, content in enumerate(contents.values()):
        files.append(folder / f"{number}.pkl")
        files[-1].write_bytes(b"\x80\x04" + content)

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        signal.alarm(60)

    done = subprocess.run([sys.executable, HERE, *files], capture_output=True, text=True, preexec_fn=limits)
    assert done.returncode == 0, f"{done.stdout} {done.stderr[-2000:]}"
    return done.stdout.splitlines()


def test_bombs_are_refused(tmp_path):
    lines = run(tmp_path, REFUSED)
    for name, line in zip(REFUSED, lines, strict=True):
        assert "DataError" in line, f"{name}: {line}"


def test_a_wrong_record_costs_itself(tmp_path):
    contents = {
        name: b"](" + record(1) + record(2) + wrong + b"s" + record(3) + b"e." for name, wrong in WRONG_RECORD.items()
    }
    lines = run(tmp_path, contents)
    for name, line in zip(WRONG_RECORD, lines, strict=True):
        assert line.startswith("r1 ") and line.endswith(" r3"), f"{name}: {line}"


def test_what_is_met_often_but_not_made_often_is_read(tmp_path):
    """As in honest files: one species in all sites, one text in all records, tuples of many numbers."""
    shared = text("a" * 200) + b"q\x000](" + b"h\x00" * 20_000 + b"e."
    numbers = b"(" + b"G" + struct.pack(">d", 0.5) + b"2" * 5000 + b"t."
    keys = b"}" + b"K\x01K\x02\x86K\x03\x85\x86K\x01s."
    assert run(tmp_path, {"shared": shared, "numbers": numbers, "keys": keys}) == ["list 20000", "tuple 5001", "dict 1"]


def _main(files: list[str]) -> None:
    from crystalframer_jax.data.custom.fields import CustomData
    from crystalframer_jax.data.custom.source import custom_source
    from crystalframer_jax.data.io.pickles import load_pickle
    from crystalframer_jax.data.records import BadRecord, DataError
    from crystalframer_jax.structures.crystal import CrystalError

    def name(record) -> str:
        try:
            return (isinstance(record, BadRecord) and "bad") or (record.crystal(5.0) and record.id)
        except CrystalError:
            return "bad"

    for file in map(Path, files):
        try:
            loaded = load_pickle(file)
            if isinstance(loaded, list) and isinstance(loaded[0], dict):
                source = custom_source(file, CustomData(allow_pickle=True))
                print(" ".join(map(name, source.records())))
            else:
                print(type(loaded).__name__, len(loaded))
        except DataError as error:
            print("DataError", error)


if __name__ == "__main__":
    _main(sys.argv[1:])


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_are_small(name):
    assert len(REFUSED[name]) < 2_000_000
