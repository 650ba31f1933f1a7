"""Pickle files of data sets, read without running what they ask for; only for legacy files that come in no other form.

A pickle is a program. While it runs here, inert recorders stand in place of all that it names. Only afterwards
is what they recorded made into arrays, numbers and crystals, through constructors that check it.
"""

import collections
import functools
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen import core

from crystalframer_jax.data.records import DataError

MAX_BYTES = 8 << 30  # of a file; its content takes several times as much memory

_REFUSED = {"PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "NEWOBJ_EX"}
_REFUSED |= {"EXT1", "EXT2", "EXT4"}  # codes of classes, which go past the allow-list
_DTYPE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,6}")  # those without Python objects
_PLAIN = frozenset((str, int, float, bool, bytes, bytearray, type(None)))
_RENAMED = {  # up to protocol 2, and before NumPy 2
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}


def load_pickle(file: Path) -> Any:
    """Reads a pickle file of containers, numbers, text, NumPy arrays and pymatgen structures.

    A malicious file can still exhaust time, memory or the stack. It cannot run code of its own.

    Raises:
      DataError: the file is missing, too large, damaged, or asks for anything else.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise DataError(f"{file} has {size:,} bytes, over {MAX_BYTES:,}; split it, or give JSON lines")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give another file") from error
    try:
        rest = _check_instructions(content)
        loaded = _Maker().make(_record(content))
    except _RefusedError as error:
        raise DataError(
            f"{file} asks for {_line(error)}, which is not data; nothing was run; get the data set from its publisher"
        ) from error
    except Exception as error:  # damaged pickles raise any
        raise DataError(
            f"{file} is not a complete pickle ({type(error).__name__}: {_line(error)}); fetch it again"
        ) from error
    if rest:
        raise DataError(f"{file} goes on after the end of the pickle; fetch it again")
    return loaded


def _line(error: Exception) -> str:
    """Gives the beginning of a message that may quote anything from the file, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(error)[:200])


class _RefusedError(Exception):
    """The pickle asks for something that is not data; the text says what."""


def _check_instructions(content: bytes) -> bytes:
    """Checks what the unpickler would believe: codes, lengths, places in its memo. Returns what follows the end."""
    stream = io.BytesIO(content)
    argument: Any
    for instruction, argument, _ in pickletools.genops(stream):  # raises ValueError for a length beyond the file
        if instruction.name in _REFUSED or instruction.proto > 5:
            raise _RefusedError(f"the instruction {instruction.name}")
        if instruction.name in ("PUT", "LONG_BINPUT") and argument > len(content):
            raise _RefusedError(f"a memo of {argument:,} places")  # they would be filled at once
    return stream.read(1)


# While the pickle runs


class _Recorder:
    """Records what a pickle does with a name, of which there is a subclass; it has no attribute that a pickle can set.

    Attributes:
      arguments: of the call, or of the new object.
      keywords: `new` if there was no call, the `state` it was given, `items` set.
    """

    __slots__ = ("arguments", "keywords")
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "_Recorder":
        recorder = object.__new__(cls)
        recorder.arguments, recorder.keywords = arguments, {"new": True}
        return recorder

    def __init__(self, *arguments: Any):
        del self.keywords["new"]

    def __setstate__(self, state: Any) -> None:
        if "state" in self.keywords:
            raise _RefusedError(f"a change of {type(self).__name__}")
        self.keywords["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.keywords.setdefault("items", []).append((key, value))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Recorder]:
        """Gives the recorder of an allowed name; names are compared whole, so attributes are out of reach."""
        full_name = f"{_RENAMED.get(module, module)}.{name}"
        if full_name not in _RECORDERS:
            raise _RefusedError(f"{module}.{name}")
        return _RECORDERS[full_name]


def _record(content: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except (TypeError, AttributeError) as error:  # recorders and containers do not do what is wanted of them
        raise _RefusedError(f"a call or change of what is data ({error})") from error


# Afterwards


class _Maker:
    """Makes what a tree of containers and recorders stands for; what occurs twice in it is made once."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}  # by the ids of what they are made of
        self._originals: list[Any] = []  # kept, so that no id is used again
        self._begun: set[int] = set()  # lists and dicts, which may contain themselves unless an object is between

    def make(self, value: Any) -> Any:
        """Makes one value."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, type):
            return value.__name__  # of a recorder; classes themselves never come out
        if id(value) in self._begun:
            return value
        if id(value) not in self._made:
            self._originals.append(value)
            self._made[id(value)] = self._made_of(value)
        return self._made[id(value)]

    def _made_of(self, value: Any) -> Any:
        if isinstance(value, _Recorder):
            return self._recorded(value)
        if not isinstance(value, list | dict):
            return type(value)(self._all(value))  # tuples and sets
        self._begun.add(id(value))
        if isinstance(value, list):
            value[:] = self._all(value)
        else:
            keys, items = self._all(value), self._all(value.values())
            value.clear()
            value.update(zip(keys, items, strict=True))
        return value

    def _recorded(self, recorder: _Recorder) -> Any:
        begun, self._begun = self._begun, set()
        name, arguments = type(recorder).__name__, self._all(recorder.arguments)
        keywords = {key: self.make(keyword) for key, keyword in recorder.keywords.items()}
        self._begun = begun
        try:
            return _MAKERS[name](*arguments, **keywords)  # type: ignore[misc]  # a TypeError of None is one more
        except Exception as error:
            raise _RefusedError(f"{name} of other than its content ({error})") from error

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [value if type(value) in _PLAIN else self.make(value) for value in values]


def _copied(kind: Callable[[bytes], Any], content: bytes = b"") -> Any:
    if type(content) is not bytes:  # a number would be a length
        raise TypeError("not bytes")
    return kind(content)


def _encoded(text: str, encoding: str) -> bytes:
    """Makes bytes as they are up to protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"encoding {encoding}")
    return str.encode(text, "latin1")


def _ordered(pairs: Iterable[Any] = (), items: Iterable[Any] = ()) -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict([*pairs, *items])


def _member(owner: str, name: str) -> core.Element:
    """Makes an element as Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    if owner != "pymatgen.core.periodic_table.Element":
        raise ValueError(f"{name} of {owner}")
    return core.Element[name]


def _reconstructed(name: str, base: str, content: None, state: Any) -> Any:
    """Makes an object as it is up to protocol 1."""
    if base != "builtins.object" or content is not None:
        raise ValueError(f"{name} with a base class")
    return _MAKERS[name](new=True, state=state)  # type: ignore[misc]


def _dtype(code: str, align: bool = False, copy: bool = False, state: Any = None) -> np.dtype:
    if not _DTYPE.fullmatch(code):
        raise ValueError(code)
    dtype = np.dtype(code)
    if state is not None and state != dtype.__reduce__()[2]:
        raise ValueError(f"an unusual form of {code}")
    return dtype


def _array(content: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, axes: Any = None) -> np.ndarray:
    if type(content) not in (bytes, bytearray) or not isinstance(dtype, np.dtype) or min(shape, default=0) < 0:
        raise TypeError(f"shape {shape}, dtype {dtype}")
    if order not in ("C", "F") and axes is None:
        raise ValueError(f"order {order}")
    array = np.ndarray(shape, dtype, bytearray(content), order="F" if order == "F" else "C")
    if array.nbytes != len(content):
        raise ValueError(f"{len(content)} bytes for shape {shape}")
    return array if axes is None else array.transpose(axes)


def _array_of_state(cls: str, shape: Any, code: Any, state: tuple[Any, ...]) -> np.ndarray:
    _, shape, dtype, fortran, content = state
    if cls != "numpy.ndarray":
        raise ValueError(cls)
    return _array(content, dtype, shape, "F" if fortran else "C")


def _scalar(dtype: np.dtype, content: bytes = b"") -> Any:
    return _array(content, dtype, (), "C")[()]


def _composition(new: bool, state: dict[str, Any]) -> core.Composition:
    return core.Composition(dict(state["_data"]), allow_negative=bool(state.get("allow_negative")))


def _lattice(new: bool, state: dict[str, Any]) -> core.Lattice:
    return core.Lattice(state["_matrix"], state.get("_pbc", (True, True, True)))


def _species(cls: Any, new: bool, state: dict[str, Any]) -> core.Species:
    symbol = state["_symbol"] if cls is core.DummySpecies else state["_el"].name  # its symbol is H for D
    older = state.get("_properties") or {}
    return cls(symbol, state["_oxi_state"], state.get("_spin", older.get("spin")))


def _site(cls: Any, place: tuple[str, ...], new: bool, state: dict[str, Any]) -> core.Site:
    where = (state[key] for key in place)
    return cls(state["_species"], *where, properties=state.get("properties"), label=state.get("_label"))


def _structure(cls: Any, new: bool, state: dict[str, Any]) -> core.IStructure:
    structure = cls(state["_lattice"], [], [], charge=state.get("_charge"), properties=state.get("_properties"))
    if not all(type(site) is core.PeriodicSite for site in state["_sites"]):
        raise TypeError("sites of another kind")
    structure._sites = type(structure._sites)(state["_sites"])
    return structure


# All names that a pickle may use; None where they can only be named.
_MAKERS: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": _encoded,
    "builtins.bytearray": functools.partial(_copied, bytearray),
    "builtins.bytes": functools.partial(_copied, bytes),
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.getattr": _member,
    "builtins.object": None,
    "builtins.set": set,
    "collections.OrderedDict": _ordered,
    "copyreg._reconstructor": _reconstructed,
    "numpy._core.multiarray._reconstruct": _array_of_state,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "pymatgen.core.composition.Composition": _composition,
    "pymatgen.core.lattice.Lattice": _lattice,
    "pymatgen.core.periodic_table.DummySpecie": functools.partial(_species, core.DummySpecies),
    "pymatgen.core.periodic_table.DummySpecies": functools.partial(_species, core.DummySpecies),
    "pymatgen.core.periodic_table.Element": core.Element.__getitem__,
    "pymatgen.core.periodic_table.Specie": functools.partial(_species, core.Species),
    "pymatgen.core.periodic_table.Species": functools.partial(_species, core.Species),
    "pymatgen.core.sites.PeriodicSite": functools.partial(_site, core.PeriodicSite, ("_frac_coords", "_lattice")),
    "pymatgen.core.sites.Site": functools.partial(_site, core.Site, ("coords",)),
    "pymatgen.core.structure.IStructure": functools.partial(_structure, core.IStructure),
    "pymatgen.core.structure.Structure": functools.partial(_structure, core.Structure),
}
_RECORDERS = {name: type(name, (_Recorder,), {"__slots__": ()}) for name in _MAKERS}
