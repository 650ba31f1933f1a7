"""Pickle files of data sets, read without running what they ask for; only for legacy files that come in no other form.

A pickle is a program. While it runs here, inert recorders stand in place of all that it names. Only afterwards
is what they recorded made into arrays, numbers and crystals, through constructors that check it.
"""

import collections
import copy
import dataclasses
import functools
import gc
import io
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen import core

from crystalframer_jax.data.records import DataError

MAX_BYTES = 8 << 30  # of a file; its content takes several times as much memory

# Instructions; those that begin with EXT name classes by codes, which go past the allow-list.
_REFUSED = ["PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"]
_DTYPE = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,6}")  # those without Python objects
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # up to protocol 2


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
    is_collecting = gc.isenabled()
    gc.disable()  # it would go through all that is made again and again
    try:
        rest = _check_instructions(content)
        loaded = copy.deepcopy(_record(content), _NAMES.copy())
    except _RefusedError as error:
        what = f"asks for {_line(error)}, which is not data; nothing was run; get the data set from its publisher"
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


class _RefusedError(Exception):
    """The pickle asks for something that is not data; the text says what."""


@dataclasses.dataclass(frozen=True)
class WrongStructure:
    """Stands for a structure that cannot be made, so that one crystal is lost and not its file; any use says why."""

    reason: str
    sites = ()

    @property
    def lattice(self) -> core.Lattice:
        """Raises ValueError."""
        raise ValueError(self.reason)


def _check_instructions(content: bytes) -> bytes:
    """Checks what the unpickler would believe: codes, lengths, places in its memo. Returns what follows the end."""
    stream = io.BytesIO(content)
    for instruction, argument, _ in pickletools.genops(stream):  # raises ValueError for a length beyond the file
        if instruction.name in _REFUSED or instruction.proto > 5:
            raise _RefusedError(f"the instruction {instruction.name}")
        if instruction.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise _RefusedError(f"a memo of {argument:,} places")  # they would be filled at once
    return stream.read(1)


class _Type(type):
    """Of the recorders; of the usual type, deepcopy would return them before it looks at its memo."""


class _Recorder(metaclass=_Type):
    """Records what a pickle does with a name, of which there is a subclass.

    It notes `arguments` if it is called, the `state` it is given, and `items` set, as all changes go through here.
    """

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if hasattr(self, "state"):
            raise _RefusedError(f"a change of {type(self).__name__}")
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        vars(self).setdefault("items", []).append((key, value))

    def __deepcopy__(self, memo: Any) -> Any:
        """Makes what it stands for, of its own copies, as those in the memo may not be complete."""
        if not hasattr(self, "made"):
            self.made = self._make(type(self).__name__)
        return self.made

    def _make(self, name: str) -> Any:
        try:
            noted = {key: copy.deepcopy(value, _NAMES.copy()) for key, value in vars(self).items()}
            return _MAKERS[name](*noted.pop("arguments", ()), **noted)  # type: ignore[misc]  # TypeError of None
        except Exception as error:
            if name.endswith("Structure") and isinstance(error, _RefusedError | ValueError | KeyError):
                return WrongStructure(_line(error))
            if isinstance(error, _RefusedError | RecursionError | MemoryError):
                raise
            raise _RefusedError(f"{name} of other than its content ({error})") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Type:
        """Gives the recorder of an allowed name; names are compared whole, so attributes are out of reach."""
        full_name = f"{_RENAMED.get(module, module)}.{name}".replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if full_name not in _RECORDERS:
            raise _RefusedError(f"{module}.{name}")
        return _RECORDERS[full_name]


def _record(content: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except (TypeError, AttributeError) as error:  # recorders and containers do not do what is wanted of them
        raise _RefusedError(f"a call or change of what is data ({error})") from error


def _reconstructed(name: str, base: str, content: None, state: Any) -> Any:
    """Makes an object as it is up to protocol 1."""
    if base != "builtins.object" or content is not None:
        raise ValueError(f"{name} with a base class")
    return _MAKERS[name](state=state)  # type: ignore[misc]


def _dtype(code: str, align: bool = False, copy: bool = False, state: Any = None) -> np.dtype:
    if not _DTYPE.fullmatch(code) or state not in (None, np.dtype(code).__reduce__()[2]):
        raise ValueError(f"{code} in an unusual form")
    return np.dtype(code)


def _array(content: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str, axes: Any = None) -> np.ndarray:
    if type(content) not in (bytes, bytearray) or not isinstance(dtype, np.dtype) or min(shape, default=0) < 0:
        raise TypeError(f"shape {shape}, dtype {dtype}")
    array = np.ndarray(shape, dtype, bytearray(content), order="F" if order == "F" else "C")
    if array.nbytes != len(content):
        raise ValueError(f"{len(content)} bytes for shape {shape}")
    return array if axes is None else array.transpose(axes)


def _species(cls: Any, state: dict[str, Any]) -> core.Species:
    symbol = state["_symbol"] if cls is core.DummySpecies else state["_el"].name  # its symbol is H for D
    older = state.get("_properties") or {}
    return cls(symbol, state["_oxi_state"], state.get("_spin", older.get("spin")))


def _site(cls: Any, place: tuple[str, ...], state: dict[str, Any]) -> core.Site:
    where = (state[key] for key in place)
    return cls(state["_species"], *where, properties=state.get("properties"), label=state.get("_label"))


def _structure(cls: Any, state: dict[str, Any]) -> core.IStructure:
    if not all(type(site) is core.PeriodicSite for site in state["_sites"]):
        raise TypeError("sites of another kind")
    structure = cls(state["_lattice"], [], [], charge=state.get("_charge"), properties=state.get("_properties"))
    structure._sites = type(structure._sites)(state["_sites"])
    return structure


_CODECS = {"latin1": "latin1", "latin-1": "latin1"}  # of bytes up to protocol 2
_ENUMS = {"pymatgen.core.periodic_table.Element": core.Element}  # Python 3.11.0 to 3.11.3 pickles members by getattr

# All names that a pickle may use; None where they can only be named. A memoryview is not made of a number, a length.
_MAKERS: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": lambda text, encoding: str.encode(text, _CODECS[encoding]),
    "builtins.bytearray": lambda content=b"": bytearray(memoryview(content)),
    "builtins.bytes": lambda content=b"": bytes(memoryview(content)),
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.getattr": lambda owner, name: _ENUMS[owner][name],
    "builtins.object": None,
    "builtins.set": set,
    "collections.OrderedDict": lambda pairs=(), items=(): collections.OrderedDict([*pairs, *items]),
    "copyreg._reconstructor": _reconstructed,
    "numpy._core.multiarray._reconstruct": lambda *_, state: _array(state[4], state[2], state[1], "CF"[state[3]]),
    "numpy._core.multiarray.scalar": lambda dtype, content=b"": _array(content, dtype, (), "C")[()],
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    "numpy.ndarray": None,
    "pymatgen.core.composition.Composition": lambda state: core.Composition(
        dict(state["_data"]), allow_negative=bool(state.get("allow_negative"))
    ),
    "pymatgen.core.lattice.Lattice": lambda state: core.Lattice(state["_matrix"], state.get("_pbc", (True,) * 3)),
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
_RECORDERS = {name: _Type(name, (_Recorder,), {}) for name in _MAKERS}
_NAMES: dict[int, Any] = {id(recorder): name for name, recorder in _RECORDERS.items()}  # classes never come out
