"""Pickles that hold data are read as they are; whatever else they ask for is refused before it runs."""

import builtins
import collections
import copyreg
import datetime
import os
import pickle
import random
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import (
    Composition,
    DummySpecies,
    Element,
    IStructure,
    Lattice,
    PeriodicSite,
    Site,
    Species,
    Structure,
)

from crystalframer_jax.data.io import pickles
from crystalframer_jax.data.io.pickles import load_pickle
from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.structures import from_pymatgen
from crystalframer_jax.structures.crystal import CrystalError

PROTOCOLS = range(6)


def structure() -> Structure:
    """Oxidation states, a disordered site, a vacancy, a dummy, a spin, and properties of sites and structure."""
    species: list = [{"Na+": 0.5, "K+": 0.25}, Species("Fe", 3, spin=5), DummySpecies("X", 2), "O2-"]
    coords = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.123]])
    crystal = Structure(Lattice.from_parameters(4, 5, 6, 80, 90, 100), species, coords, charge=3.75)
    crystal.add_site_property("magmom", [0.5, np.float64(4.5), None, -1.0])
    crystal.add_site_property("selective_dynamics", [[True, False, True]] * 4)
    crystal.properties["source"] = "a test"
    return crystal


def stored(folder: Path, content: bytes) -> Path:
    file = folder / "data.pkl"
    file.write_bytes(content)
    return file


def through(folder: Path, value, protocol: int):
    return load_pickle(stored(folder, pickle.dumps(value, protocol)))


def same(first, second) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and first.shape == second.shape and np.array_equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


# Data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_records_with_structures(tmp_path, protocol):
    records = [
        {
            "id": f"mp-{number}",
            "bulk modulus": np.float64(number / 7),
            "atoms": structure(),
            "forces": np.random.default_rng(number).normal(size=(3, 4)),
        }
        for number in range(3)
    ]
    loaded = through(tmp_path, records, protocol)
    assert same(loaded, records)
    crystal, expected = loaded[1]["atoms"], structure()
    assert crystal.as_dict() == expected.as_dict()
    assert crystal.site_properties == expected.site_properties
    assert (crystal.charge, crystal.properties) == (3.75, {"source": "a test"})
    assert crystal[0].species == Composition({"Na+": 0.5, "K+": 0.25})
    assert crystal[1].specie.spin == 5
    assert next(iter(Composition("Fe"))) is Element.Fe


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_numbers(tmp_path, protocol):
    shared = [1]
    values = [
        {"a": None, 1: True, (1, "b"): False}, {1, 2}, set(), frozenset([3]), 1 + 2j, bytearray(b"ab"), bytearray(),
        b"", b"\x00\xff", "é𝄞\n", -(2**70), 255, 65536, -1.5, float("inf"), (), (1,), (1, 2, 3, 4), [[], {}],
        collections.OrderedDict([("z", 1), ("a", 2)]), shared, shared, Element.Fe, Element.D, Species("O", -2),
        DummySpecies("Xa"), Composition("Fe2O3"), Lattice.cubic(3), Site("Fe", [0, 0, 0]),
        PeriodicSite("Fe", [0, 0, 0.5], Lattice.cubic(3)),
    ]  # fmt: skip
    loaded = through(tmp_path, values, protocol)
    assert same(loaded, values)
    assert loaded[20] is loaded[21]
    assert loaded[22] is Element.Fe


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_scalars(tmp_path, protocol):
    codes = ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "S3", "U3"]
    base = np.arange(24).reshape(2, 3, 4)
    values = [base.astype(code) for code in codes]
    values += [base.T, base.transpose(1, 2, 0), base[:, ::2], np.zeros((0, 3)), np.array(3.5), np.array(["a", "bcd"])]
    values += [base.astype(code)[0, 0, 1] for code in codes] + [np.str_(""), np.str_("é"), np.bytes_(b"ab")]
    loaded = through(tmp_path, values, protocol)
    assert same(loaded, values)


def test_a_recursive_list(tmp_path):
    items: list = [1]
    items.append(items)
    loaded = through(tmp_path, items, 4)
    assert loaded[1] is loaded


def test_names_of_other_versions(tmp_path):
    content = pickle.dumps([np.float64(1.5), np.arange(3)[::2], Species("Fe", 2)], 2)
    for new, old in ((b"numpy._core", b"numpy.core"), (b"periodic_table\nSpecies", b"periodic_table\nSpecie")):
        assert new in content
        content = content.replace(new, old)
    loaded = load_pickle(stored(tmp_path, content))
    assert same(loaded, [np.float64(1.5), np.array([0, 2]), Species("Fe", 2)])


def test_states_of_older_pymatgen(tmp_path):
    crystal, species = structure(), Species("Fe", 3, spin=5)
    for holder, key in ((species, "_spin"), (crystal, "_properties"), (crystal.lattice, "_pbc")):
        del vars(holder)[key]
    for site in crystal:
        del vars(site)["_label"]
    vars(species)["_properties"] = {"spin": 5}
    loaded, iron = load_pickle(stored(tmp_path, pickle.dumps([crystal, species])))
    assert (iron, iron.spin) == (Species("Fe", 3, spin=5), 5)
    expected = structure()
    expected.properties = {}
    assert loaded == expected
    assert (loaded.properties, loaded.lattice.pbc, loaded.labels) == ({}, (True, True, True), expected.labels)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_isotopes_and_immutable_structures(tmp_path, protocol):
    values = [
        Species("D", 1),
        Species("Fe"),
        DummySpecies("Xa", None, 2),
        IStructure(Lattice.cubic(3), ["D"], [[0, 0, 0]], labels=["a"]),
    ]
    assert same(through(tmp_path, values, protocol), values)


def test_elements_as_python_3_11_0_pickles_them(tmp_path):
    content = b"\x80\x04" + named("builtins", "getattr") + named("pymatgen.core.periodic_table", "Element")
    assert load_pickle(stored(tmp_path, content + text("Fe") + b"\x86R.")) is Element.Fe


def test_one_inconsistent_structure_does_not_cost_the_others(tmp_path):
    wrong = {}
    for says, place, key, value in [
        ("not xyz-shaped", lambda crystal: crystal[0], "_frac_coords", np.zeros(2)),
        ("could not convert string to float", lambda crystal: crystal[0], "_frac_coords", ["a", "b", "c"]),
        ("cannot reshape array of size 6", lambda crystal: crystal.lattice, "_matrix", np.ones((3, 2))),
        ("not 'dict'", lambda crystal: crystal.lattice, "_matrix", [[{}] * 3] * 3),
        ("cannot reshape array of size 4", lambda crystal: crystal, "_lattice", np.eye(2)),
        ("occupancies sum to more than 1", lambda crystal: crystal[0].species, "_data", {Element.Fe: 2.0}),
        ("Amounts in Composition cannot be negative", lambda crystal: crystal[0].species, "_data", {Element.Fe: -1.0}),
    ]:
        wrong[says] = structure()
        vars(place(wrong[says]))[key] = value
    records = [{"structure": crystal} for crystal in (structure(), *wrong.values(), structure())]
    loaded = [record["structure"] for record in through(tmp_path, records, 4)]
    assert loaded[0] == loaded[-1] == structure()
    for says, crystal in zip(wrong, loaded[1:-1], strict=True):
        with pytest.raises(CrystalError, match=f"^mp-1: not a pymatgen Structure .*{says}"):
            from_pymatgen(pickle.loads(pickle.dumps(crystal)), "mp-1")


# Pickles written by hand


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL"""
    return text(module) + text(name) + b"\x93"


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


ELEMENT = named("pymatgen.core.periodic_table", "Element")
STRUCTURE = named("pymatgen.core.structure", "Structure")
LATTICE = named("pymatgen.core.lattice", "Lattice")
NDARRAY = named("numpy", "ndarray")
RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85" + raw(b"b") + b"\x87R"
FLOATS = named("numpy", "dtype") + text("f8") + b"\x85R"


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def calls(canary: Path) -> list[Call]:
    shell = f"touch {canary}"
    return [
        Call(os.system, shell),
        Call(subprocess.Popen, ["touch", str(canary)]),
        Call(subprocess.check_output, ["touch", str(canary)]),
        Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        Call(builtins.exec, f"open({str(canary)!r}, 'w')"),
        Call(builtins.open, str(canary), "w"),
        Call(builtins.__import__, "os"),
        Call(getattr, dict, "__subclasses__"),
        Call(map, os.system, [shell]),
        Call(collections.defaultdict, os.system),
        Call(pickle.loads, pickle.dumps(Call(os.system, shell))),
        Call(np.load, str(canary)),
        Call(np.fromfile, str(canary)),
        Call(datetime.date, 2000, 1, 1),
        Call(Path, "/"),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("number", range(15))
def test_calls_are_refused(tmp_path, number, protocol):
    canary = tmp_path / "canary"
    file = stored(tmp_path, pickle.dumps([1, {"a": calls(canary)[number]}], protocol))
    with pytest.raises(DataError, match=r"data\.pkl asks for .*, which is not data; nothing was run; get the data set"):
        load_pickle(file)
    assert not canary.exists()


def test_the_message_names_what_was_asked_for(tmp_path):
    file = stored(tmp_path, pickle.dumps(Call(os.system, "true")))
    with pytest.raises(DataError, match=rf"{file} asks for posix\.system, "):
        load_pickle(file)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pymatgen.core.structure", "Structure.__init__"),
        ("pymatgen.core.structure", "Structure.__init__.__globals__"),
        ("pymatgen.core.structure", "Structure.from_file"),
        ("pymatgen.core.periodic_table", "Element.Fe"),
        ("pymatgen.core.periodic_table", "os"),
        ("pymatgen.core.structure", "os.system"),
        ("pymatgen.core", "Structure"),
        ("numpy", "dtype.__class__"),
        ("numpy._core.multiarray", "scalar.__self__"),
        ("builtins", "object.__subclasses__"),
        ("builtins", "type"),
        ("crystalframer_jax.data.io.pickles", "_allowed"),
        ("pandas", "DataFrame"),
    ],
)
def test_names_that_are_not_on_the_list(tmp_path, module, name):
    for content in (named(module, name) + b".", f"c{module}\n{name}\n.".encode()):
        with pytest.raises(DataError) as raised:
            load_pickle(stored(tmp_path, b"\x80\x04" + content))
        assert f"asks for {module}.{name}, which is not data" in str(raised.value)


def hostile(canary: Path) -> dict[str, bytes]:
    """Pickles that misuse what is on the list."""
    payload = pickle.dumps(Call(os.system, f"touch {canary}"))
    objects = b"(" + text("O8") + b"\x89\x88tR"
    slots = b"N}" + text("x") + b"K\x01s\x86b"
    return {
        "scalar of objects": named("numpy._core.multiarray", "scalar") + named("numpy", "dtype") + objects
        + raw(payload) + b"\x86R.",
        "dtype of objects": named("numpy", "dtype") + objects + b".",
        "dtype of records": named("numpy", "dtype") + text("f8,O") + b"\x85R.",
        "dtype of a class": named("numpy", "dtype") + NDARRAY + b"\x85R.",
        "state of a dtype": FLOATS + b"(K\x03" + text(">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
        "flags of a dtype": FLOATS + b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb.",
        "dict on a dtype": FLOATS + b"}b.",
        "short scalar": named("numpy._core.multiarray", "scalar") + FLOATS + raw(b"abc") + b"\x86R.",
        "scalar of text": named("numpy._core.multiarray", "scalar") + FLOATS + text("abcdefgh") + b"\x86R.",
        "scalar of no dtype": named("numpy._core.multiarray", "scalar") + text("O") + raw(payload) + b"\x86R.",
        "huge array": RECONSTRUCT + NDARRAY + b"J\xff\xff\xff\x7f\x85" + raw(b"b") + b"\x87R.",
        "array of another class": RECONSTRUCT + STRUCTURE + b"K\x00\x85" + raw(b"b") + b"\x87R.",
        "short array": EMPTY + b"(K\x01K\x02\x85" + FLOATS + b"\x89" + raw(bytes(8)) + b"tb.",
        "negative shape": EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + FLOATS + b"\x89" + raw(b"") + b"tb.",
        "array of a list": EMPTY + b"(K\x01K\x01\x85" + FLOATS + b"\x89]tb.",
        "array twice": EMPTY + (b"(K\x01K\x01\x85" + FLOATS + b"\x89" + raw(bytes(8)) + b"tb") * 2 + b".",
        "array on an array": named("numpy._core.numeric", "_frombuffer") + b"(" + EMPTY + FLOATS + b"K\x00\x85"
        + text("C") + b"tR.",
        "array without dtype": named("numpy._core.numeric", "_frombuffer") + b"(" + raw(bytes(8)) + b"NK\x01\x85"
        + text("C") + b"tR.",
        "attribute of a class": STRUCTURE + slots + b".",
        "dict of a class": STRUCTURE + b"}" + text("x") + b"K\x01sb.",
        "attribute of a function": named("numpy._core.multiarray", "scalar") + slots + b".",
        "attribute of an element": ELEMENT + text("Fe") + b"\x85R}" + text("Z") + b"K\x01sb.",
        "slots of a structure": STRUCTURE + b")\x81" + slots + b".",
        "state that is no dict": LATTICE + b")\x81K\x01b.",
        "attributes without names": LATTICE + b")\x81}K\x01K\x02sb.",
        "attribute of a list": b"]" + slots + b".",
        "call of a structure": STRUCTURE + b")R.",
        "call of ndarray": NDARRAY + b"K\x05\x85R.",
        "call of text": text("os.system") + text("true") + b"\x85R.",
        "call with a list": named("builtins", "bytes") + b"]R.",
        "new ndarray": NDARRAY + b"K\x05\x85\x81.",
        "new structure with arguments": STRUCTURE + b"K\x05\x85\x81.",
        "new element": ELEMENT + text("Fe") + b"\x85\x81.",
        "new object": named("builtins", "object") + b")\x81.",
        "new with keywords": STRUCTURE + b")}\x92.",
        "getattr of a class": named("builtins", "getattr") + STRUCTURE + text("from_file") + b"\x86R.",
        "getattr of an element": named("builtins", "getattr") + ELEMENT + text("__class__") + b"\x86R.",
        "unknown element": ELEMENT + text("mro") + b"\x85R.",
        "reconstructor of ndarray": named("copyreg", "_reconstructor") + NDARRAY + named("builtins", "object")
        + b"N\x87R.",
        "reconstructor with a base": named("copyreg", "_reconstructor") + STRUCTURE + STRUCTURE + b"N\x87R.",
        "long bytearray": named("builtins", "bytearray") + b"J\xff\xff\xff\x7f\x85R.",
        "long bytes": named("builtins", "bytes") + b"J\xff\xff\xff\x7f\x85R.",
        "set of an object": named("builtins", "set") + STRUCTURE + b")\x81\x85R.",
        "other codec": named("_codecs", "encode") + text("a") + text("zlib") + b"\x86R.",
        "append to a structure": STRUCTURE + b")\x81K\x01a.",
        "appends to a structure": STRUCTURE + b")\x81(K\x01K\x02e.",
        "item of a structure": STRUCTURE + b")\x81K\x01K\x02s.",
        "items of a structure": STRUCTURE + b")\x81(K\x01K\x02u.",
        "additems to a list": b"](K\x01\x90.",
        "extension 1": b"\x82\xf0.",
        "extension 2": b"\x83\xf0\x00.",
        "extension 4": b"\x84\xf0\x00\x00\x00.",
        "persistent id": b"Pos\n.",
        "binary persistent id": text("os") + b"Q.",
        "instance": b"(S'true'\nios\nsystem\n.",
        "object": b"(" + STRUCTURE + b"o.",
        "outside buffer": b"\x97.",
        "huge memo": b"Nr\xff\xff\xff\x7f.",
        "huge memo as text": b"Np99999999999\n.",
        "class of an object": STRUCTURE + b")\x81N}" + text("__class__") + LATTICE + b"s\x86b.",
        "formula for a composition": named("pymatgen.core.composition", "Composition") + b")\x81}" + text("_data")
        + text("Fe") + b"sb.",
        "sites of another kind": STRUCTURE + b")\x81}(" + text("_lattice") + b"]((K\x01K\x00K\x00t(K\x00K\x01K\x00t"
        + b"(K\x00K\x00K\x01te" + text("_sites") + b"]K\x01aub.",
    }  # fmt: skip


@pytest.mark.parametrize("case", hostile(Path()))
def test_misuse_of_what_is_allowed(tmp_path, case):
    canary = tmp_path / "canary"
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(DataError, match=r"data\.pkl asks for .*; nothing was run"):
            load_pickle(stored(tmp_path, b"\x80\x05" + hostile(canary)[case]))
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not canary.exists()
    assert not hasattr(Structure, "x")
    assert Element.Fe.Z == 26
    assert np.dtype("f8").str == "<f8"
    assert np.dtype("f8").hasobject is False


def test_a_cached_extension_is_refused(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    monkeypatch.setitem(copyreg._extension_cache, 240, os.system)
    monkeypatch.setitem(copyreg._inverted_registry, 240, ("os", "system"))
    with pytest.raises(DataError, match="asks for the instruction EXT1"):
        load_pickle(stored(tmp_path, b"\x80\x05\x82\xf0" + text(f"touch {canary}") + b"\x85R."))
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        named("collections", "OrderedDict") + b")R\x94" + text("a") + b"h\x00s.",
        b"]\x94(" + named("builtins", "set") + b"h\x00\x85Re.",
        b"]" * 100_000 + b"a" * 99_999 + b".",
    ],
    ids=["OrderedDict", "set", "depth"],
)
def test_objects_that_contain_themselves_and_great_depth(tmp_path, content):
    with pytest.raises(DataError, match="RecursionError"):
        load_pickle(stored(tmp_path, b"\x80\x05" + content))


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"has 20 bytes, over 10; split it"):
        load_pickle(stored(tmp_path, pickle.dumps("0123456789", 2)))


def test_the_classes_themselves_never_come_out(tmp_path):
    (loaded,) = load_pickle(stored(tmp_path, b"\x80\x05" + STRUCTURE + b"\x85."))
    assert not isinstance(loaded, type)
    assert not callable(loaded)


# Damage


def test_files_that_are_cut_anywhere(tmp_path):
    content = pickle.dumps([structure(), np.arange(5.0), {"a": 1}], 4)
    for length in range(0, len(content), 7):
        with pytest.raises(DataError, match=r"is not a complete pickle \(.*\); fetch it again"):
            load_pickle(stored(tmp_path, content[:length]))


def test_random_changes_end_as_data_or_data_error(tmp_path):
    content = pickle.dumps([structure(), np.arange(5.0), np.float64(1), {"a": {1}}], 4)
    rng = random.Random(0)
    for _ in range(1000):
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        try:
            load_pickle(stored(tmp_path, bytes(changed)))
        except DataError as error:
            assert str(tmp_path) in str(error)
            assert "\n" not in str(error)
    assert Element.Fe.Z == 26


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>no</html>", b"\x80\x09.", b"\x80\x04.", b"\x00\x01", b"PK\x03\x04", bytes(range(255, 155, -1))],
)
def test_garbage(tmp_path, content):
    with pytest.raises(DataError):
        load_pickle(stored(tmp_path, content))


def test_a_length_beyond_the_file(tmp_path):
    for content in (b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x8d" + b"\xff" * 7 + b"\x0f", b"\x95" + b"\xff" * 7 + b"\x7f"):
        with pytest.raises(DataError, match="is not a complete pickle"):
            load_pickle(stored(tmp_path, b"\x80\x04" + content))


def test_more_than_one_pickle(tmp_path):
    with pytest.raises(DataError, match="goes on after the end of the pickle"):
        load_pickle(stored(tmp_path, pickle.dumps(1) + pickle.dumps(2)))


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.pkl cannot be read \(No such file"):
        load_pickle(tmp_path / "no.pkl")
