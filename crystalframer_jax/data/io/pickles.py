"""Pickle files of data sets, read without running what they ask for; only for legacy files that come in no other form.

A pickle is a program. While it runs here, inert recorders stand in place of all that it names. Only afterwards
is what they recorded made into arrays, numbers and crystals, through constructors that check it.
"""

import collections
import dataclasses
import functools
import gc
import io
import pickle
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen import core

from crystalframer_jax.data.io.pickle_instructions import LARGEST_KEY, RefusedError, check_instructions
from crystalframer_jax.data.records import DataError

MAX_BYTES = 8 << 30  # of a file; its content takes several times as much memory

DEEPEST = 100  # containers and objects in each other
FEW_KEYS = 100  # of a dict or a set, that may be of any kind
MOST_SPECIES = 400  # of a composition

_DTYPE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,6}")  # those without Python objects
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # up to protocol 2


def load_pickle(file: Path) -> Any:
    """Reads a pickle file of containers, numbers, text, NumPy arrays and pymatgen structures.

    A malicious file cannot run code of its own. What it makes is in proportion to its size: names for one thing are no
    way to make it many.

    Raises:
      DataError: the file is missing, too large, damaged, nested too deeply, or asks for anything else.
    """
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise DataError(f"{file} has {size:,} bytes, over {MAX_BYTES:,}; split it, or give JSON lines")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give another file") from error
    is_collecting = gc.isenabled()
    gc.disable()  # it would go through all that is made again and again
    try:
        rest = check_instructions(content)
        loaded = _Copies(len(content)).of(_record(content), {})
    except RefusedError as error:
        what = f"asks for {_line(error)}, which is not data; nothing was run; get the data set from its publisher"
        raise DataError(f"{file} {what}") from error
    except _BombError as error:
        what = "unpacks to far more than its size suggests; get the data set from its publisher"
        raise DataError(f"{file} {what}") from error
    except Exception as error:  # damaged pickles raise any
        reason = f"{type(error).__name__}: {_line(error)}"
        raise DataError(f"{file} is not a complete pickle ({reason}); fetch it again") from error
    finally:
        gc.enable() if is_collecting else None
    if rest:
        raise DataError(f"{file} goes on after the end of the pickle; fetch it again")
    return loaded


def _line(error: Exception) -> str:
    """Gives the beginning of a message that may quote anything from the file, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(error)[:200])


class _BombError(Exception):
    """The pickle makes much of little."""


@dataclasses.dataclass(frozen=True)
class WrongStructure:
    """Stands for a structure that cannot be made, so that one crystal is lost and not its file; any use says why."""

    reason: str
    sites = ()

    @property
    def lattice(self) -> core.Lattice:
        """Raises ValueError."""
        raise ValueError(self.reason)


class _Type(type):
    """Of the recorders, which may be in a pickle as classes too."""


class _Recorder(metaclass=_Type):
    """Records what a pickle does with a name, of which there is a subclass.

    It notes `arguments` if it is called, the `state` it is given, and `items` set, as all changes go through here.
    """

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if hasattr(self, "state"):
            raise RefusedError(f"a change of {type(self).__name__}")
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        vars(self).setdefault("items", []).append((key, value))

    def make(self, copies: "_Copies") -> Any:
        """Makes what it stands for, of its own copies, as those of others may not be complete."""
        name, depth = type(self).__name__, copies.depth
        try:
            noted = {key: copies.of(value, {}) for key, value in vars(self).items()}
            arguments = noted.pop("arguments", ())
            copies.count_bytes(arguments)
            copies.count_bytes(noted.get("state"))
            self.made = _MAKERS[name](*arguments, **noted)  # type: ignore[misc]  # TypeError of None
        except Exception as error:
            if name.endswith("Structure") and isinstance(error, _OF_ONE_STRUCTURE):
                self.made, copies.depth = WrongStructure(_line(error)), depth
            elif isinstance(error, RefusedError | _BombError | RecursionError | MemoryError):
                raise
            else:
                raise RefusedError(f"{name} of other than its content ({error})") from error
        return self.made


class _Copies:
    """Copies what was recorded, with what recorders stand for in their place, as far as the size of the file allows."""

    def __init__(self, size: int):
        self._parts, self._bytes = 100_000 + 4 * size, 1_000_000 + 4 * size
        self.depth = 0

    def count_bytes(self, place: Any) -> None:
        """Counts the bytes and texts that a maker is about to copy."""
        if type(place) is tuple:
            for part in place:
                if type(part) in _SIZED:
                    self._bytes -= len(part)
            if self._bytes < 0:
                raise _BombError

    def of(self, value: Any, memo: dict[int, Any]) -> Any:
        """Copies a value; `memo` has the copies made by then, by what they are copies of."""
        kind: Any = type(value)
        if kind in _PLAIN:
            return value
        if kind is _Type:
            return value.__name__  # classes never come out
        if type(kind) is _Type and "made" in vars(value):
            return value.made
        if id(value) in memo:
            return memo[id(value)]
        self.depth += 1
        if self.depth > DEEPEST:
            raise RecursionError(f"nested over {DEEPEST} deep")
        copied: Any
        if type(kind) is _Type:
            copied = value.make(self)
        elif kind is list:
            memo[id(value)] = copied = []
            copied += self._all(value, memo)
        elif kind is dict:
            memo[id(value)] = copied = {}
            keys, parts = self._all(value, memo), self._all(value.values(), memo)
            copied.update(zip(keys if len(keys) <= FEW_KEYS else _hashable(keys), parts, strict=True))
        elif kind is bytearray:
            copied = bytearray(value)
        elif kind in (tuple, set, frozenset):
            parts = self._all(value, memo)
            parts = parts if kind is tuple or len(parts) <= FEW_KEYS else _hashable(parts)
            copied = memo.setdefault(id(value), kind(parts))  # a tuple may have been met within itself
        else:
            raise RefusedError(f"a {kind.__name__}")
        self.depth -= 1
        return copied

    def _all(self, values: Collection[Any], memo: dict[int, Any]) -> list[Any]:
        self._parts -= len(values)
        if self._parts < 0:
            raise _BombError
        return [value if type(value) in _PLAIN else self.of(value, memo) for value in values]


_OF_ONE_STRUCTURE = (RefusedError, ValueError, KeyError, OverflowError)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Type:
        """Gives the recorder of an allowed name; names are compared whole, so attributes are out of reach."""
        full_name = f"{_RENAMED.get(module, module)}.{name}".replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if full_name not in _RECORDERS:
            raise RefusedError(f"{module}.{name}")
        return _RECORDERS[full_name]


def _record(content: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except (TypeError, AttributeError) as error:  # recorders and containers do not do what is wanted of them
        raise RefusedError(f"a call or change of what is data ({error})") from error


def _reconstructed(name: str, base: str, content: None, state: Any) -> Any:
    """Makes an object as it is up to protocol 1."""
    if type(name) is not str or base != "builtins.object" or content is not None:
        raise ValueError("an object with a base class")
    return _MAKERS[name](state=state)  # type: ignore[misc]


def _dtype(code: str, align: bool = False, copy: bool = False, state: Any = None) -> np.dtype:
    if not _DTYPE.fullmatch(code) or state not in (None, np.dtype(code).__reduce__()[2]):
        raise ValueError(f"{code} in an unusual form")
    return np.dtype(code)


def _array(content: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, axes: Any = None) -> np.ndarray:
    is_shape = type(shape) is tuple and all(type(length) is int and length >= 0 for length in shape)
    if type(content) not in (bytes, bytearray) or not isinstance(dtype, np.dtype) or not is_shape:
        raise TypeError("shape, type or content of another kind")
    array = np.ndarray(shape, dtype, bytearray(content), order="F" if order == "F" else "C")
    if array.nbytes != len(content) or array.size > max(len(content), 1):  # elements may have no bytes
        raise ValueError(f"{len(content)} bytes for shape {shape}")
    return array if axes is None else array.transpose(axes)


def _species(cls: Any, state: dict[str, Any]) -> core.Species:
    symbol = _text(state["_symbol"]) if cls is core.DummySpecies else state["_el"].name  # its symbol is H for D
    older = state.get("_properties") or {}
    return cls(symbol, _number(state["_oxi_state"]), _number(state.get("_spin", older.get("spin"))))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("something else than a text")
    return value


def _number(value: Any) -> Any:
    """Returns a number or None; TypeError for something else, which may be shown or hashed without end."""
    if not isinstance(value, int | float | np.number | None):
        raise TypeError("something else than a number")
    return value


def _few(numbers: Any, deep: int = 2) -> Any:
    """Returns numbers for a vector or a matrix; ValueError if there are more, which NumPy would follow without end."""
    if isinstance(numbers, list | tuple):
        if len(numbers) > 9 or not deep:
            raise ValueError("more than a vector or a matrix")
        for part in numbers:
            _few(part, deep - 1)
    return numbers


def _hashable(items: Iterable[Any]) -> list[Any]:
    """Returns the items of a set or the keys of a dict; ValueError if their hashing may have no end."""
    items = list(items)
    for item in items:
        parts, number = [item], 0
        while parts:
            part = parts.pop()
            number += 1
            parts += part if isinstance(part, tuple | frozenset) else ()
            if number + len(parts) > 2 * LARGEST_KEY:
                raise ValueError(f"a key of over {LARGEST_KEY} parts")
            if len(items) > FEW_KEYS and not isinstance(part, _SPREAD):
                raise ValueError(f"{len(items):,} keys of {type(part).__name__}")
    return items


def _ordered(pairs: Iterable[Any] = (), items: Iterable[Any] = ()) -> collections.OrderedDict[Any, Any]:
    pairs = [(key, value) for key, value in [*pairs, *items]]
    _hashable(key for key, _ in pairs)
    return collections.OrderedDict(pairs)


def _composition(state: dict[str, Any]) -> core.Composition:
    if type(state["_data"]) is not dict or len(state["_data"]) > MOST_SPECIES:
        raise ValueError("not some species with amounts")
    return core.Composition(dict(state["_data"]), allow_negative=bool(state.get("allow_negative")))


def _site(cls: Any, place: tuple[str, ...], state: dict[str, Any]) -> core.Site:
    where = (_few(state[key]) for key in place)
    if not isinstance(state["_species"], core.Composition):
        raise TypeError("a site of something else than species")
    return cls(state["_species"], *where, properties=state.get("properties"), label=state.get("_label"))


def _structure(cls: Any, state: dict[str, Any]) -> core.IStructure:
    if not all(type(site) is core.PeriodicSite for site in state["_sites"]):
        raise TypeError("sites of another kind")
    structure = cls(
        _few(state["_lattice"]), [], [], charge=_number(state.get("_charge")), properties=state.get("_properties")
    )
    structure._sites = type(structure._sites)(state["_sites"])
    return structure


_CODECS = {"latin1": "latin1", "latin-1": "latin1"}  # of bytes up to protocol 2
_ENUMS = {"pymatgen.core.periodic_table.Element": core.Element}  # Python 3.11.0 to 3.11.3 pickles members by getattr

# All names that a pickle may use; None where they can only be named. A memoryview is not made of a number, a length.
_MAKERS: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": lambda text, encoding: str.encode(text, _CODECS[_text(encoding)]),
    "builtins.bytearray": lambda content=b"": bytearray(memoryview(content)),
    "builtins.bytes": lambda content=b"": bytes(memoryview(content)),
    "builtins.complex": complex,
    "builtins.frozenset": lambda items=(): frozenset(_hashable(items)),
    "builtins.getattr": lambda owner, name: _ENUMS[_text(owner)][_text(name)],
    "builtins.object": None,
    "builtins.set": lambda items=(): set(_hashable(items)),
    "collections.OrderedDict": _ordered,
    "copyreg._reconstructor": _reconstructed,
    "numpy._core.multiarray._reconstruct": lambda *_, state: _array(state[4], state[2], state[1], "CF"[state[3]]),
    "numpy._core.multiarray.scalar": lambda dtype, content=b"": _array(content, dtype, (), "C")[()],
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "pymatgen.core.composition.Composition": _composition,
    "pymatgen.core.lattice.Lattice": lambda state: core.Lattice(
        _few(state["_matrix"]), _few(state.get("_pbc", (True,) * 3))
    ),
    "pymatgen.core.periodic_table.DummySpecie": functools.partial(_species, core.DummySpecies),
    "pymatgen.core.periodic_table.DummySpecies": functools.partial(_species, core.DummySpecies),
    "pymatgen.core.periodic_table.Element": lambda symbol: core.Element[_text(symbol)],
    "pymatgen.core.periodic_table.Specie": functools.partial(_species, core.Species),
    "pymatgen.core.periodic_table.Species": functools.partial(_species, core.Species),
    "pymatgen.core.sites.PeriodicSite": functools.partial(_site, core.PeriodicSite, ("_frac_coords", "_lattice")),
    "pymatgen.core.sites.Site": functools.partial(_site, core.Site, ("coords",)),
    "pymatgen.core.structure.IStructure": functools.partial(_structure, core.IStructure),
    "pymatgen.core.structure.Structure": functools.partial(_structure, core.Structure),
}
_RECORDERS = {name: _Type(name, (_Recorder,), {}) for name in _MAKERS}
# What has a hash of its own; others may have one for many, which takes the square of their number
_SPREAD = (str, int, float, bytes, type(None), tuple, frozenset, np.integer, np.floating, core.Element, core.Species)
_SIZED = {bytes, bytearray, str}
_PLAIN = {int, float, str, bytes, bool, complex, type(None)}
