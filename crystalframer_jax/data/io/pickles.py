"""Pickle files of data sets, read without running what they ask for; only for legacy files that come in no other form.

A pickle is a program. The usual unpickler, written in C, checks names only: it would let the program set attributes of
the classes that it may name, and change shared objects such as Element.Fe or the number types of NumPy. The unpickler
in Python, used here, looks each instruction up in a table, so each can be checked; it takes about twice the time.
"""

import collections
import dataclasses
import functools
import io
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from crystalframer_jax.data.records import DataError

_INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET
    EMPTY_LIST LIST EMPTY_DICT DICT EMPTY_SET APPEND APPENDS SETITEM SETITEMS ADDITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""  # not among them: extension codes, persistent ids, buffers outside the file, instances of Python 2
_NUMBERS = re.compile(r"b1|[iu][1248]|f(2|4|8|16)|c(8|16|32)|[SU]\d{1,6}")  # codes of dtypes without Python objects


def load_pickle(file: Path) -> Any:
    """The content of a pickle file of containers, numbers, text, NumPy arrays and pymatgen structures.

    Names are compared whole, so attributes of what is allowed cannot be reached. The only functions that run are
    those of this file, which check what they are given. Only lists, dicts, sets, new arrays and new pymatgen objects
    can be filled; classes, elements and dtypes cannot be changed.

    What remains: the attributes of the pymatgen objects are whatever the file says, as their constructors do not run,
    and pymatgen hashes and compares them where they are keys. So a malicious file can make a wrong or inconsistent
    structure, or exhaust memory or the stack; it cannot run code of its own. Check what comes out before relying on it.

    Raises:
      DataError: the file is missing, damaged, or asks for anything else.
    """
    try:
        content = file.read_bytes()  # whole, so that no length stated in it asks for more memory than the file has
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give another file") from error
    stream = io.BytesIO(content)
    try:
        loaded = _DataUnpickler(stream).load()
    except _RefusedError as error:
        raise DataError(
            f"{file} asks for {_line(error)}, which is not data; nothing was run; get the data set from its publisher"
        ) from error
    except Exception as error:  # damaged pickles raise any
        raise DataError(
            f"{file} is not a complete pickle ({type(error).__name__}: {_line(error)}); fetch it again"
        ) from error
    if stream.read(1):
        raise DataError(f"{file} goes on after the end of the pickle; fetch it again")
    return loaded


def _line(error: Exception) -> str:
    """The beginning of a message that may quote anything from the file, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(error)[:200])


class _RefusedError(Exception):
    """The pickle asks for something that is not data; the text says what."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _RefusedError(what)


@dataclasses.dataclass(frozen=True, slots=True)
class _Named:
    """What a name in a pickle stands for; never the class or function itself.

    Attributes:
      name: module and name.
      make: called instead of the class or function, with the arguments in the pickle.
      new: class of which the pickle may make an object without its constructor, to be filled from a dict.
    """

    name: str
    make: Callable[..., Any] | None = None
    new: type | None = None


class _Instructions(dict[int, Any]):
    """What each instruction runs."""

    def __missing__(self, code: int) -> NoReturn:
        for known in pickletools.opcodes:
            _require(known.code != chr(code), f"the instruction {known.name}")
        raise pickle.UnpicklingError(f"byte {code} is no instruction")


class _DataUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """The unpickler of Python with the instructions that only make data, and checks in those that name or change."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch = _Instructions(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]])
        for name in _INSTRUCTIONS.split()
    )

    def find_class(self, module: str, name: str) -> _Named:
        """The stand-in for an allowed name."""
        _require((module, name) in _allowed(), f"{module}.{name}")
        return _allowed()[module, name]

    def load_reduce(self) -> None:
        """Calls the stand-in of a function."""
        arguments, function = self.stack.pop(), self.stack.pop()
        _require(isinstance(function, _Named) and type(arguments) is tuple, "a call of what is not a function")
        _require(function.make is not None, f"a call of {function.name}")
        self.stack.append(function.make(*arguments))

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_bytearray8(self) -> None:
        """Reads before it takes memory: the length stated may be anything."""
        (length,) = struct.unpack("<Q", self.read(8))
        content = self.read(length)
        if len(content) < length:
            raise EOFError("a byte array is cut off")
        self.append(bytearray(content))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_newobj(self) -> None:
        """Makes an empty pymatgen object."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(_new_object(cls, *arguments))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        """Fills a new array or pymatgen object; a dtype is complete, so its state is only compared."""
        state, new = self.stack.pop(), self.stack[-1]
        if type(new) is np.ndarray:
            _fill_array(new, *state)
        elif isinstance(new, np.dtype):
            _require(state == new.__reduce__()[2], f"an unusual form of {new}")
        else:
            _require(type(new) in _pymatgen_classes(), f"a change of {_described(new)}")
            _require(type(state) is dict and all(type(key) is str for key in state), "attributes that are not a dict")
            vars(new).update(state)

    dispatch[pickle.BUILD[0]] = load_build

    def _container(self, *types: type) -> Any:
        container = self.stack[-1]
        _require(type(container) in types, f"a change of {_described(container)}")
        return container

    def load_append(self) -> None:
        """Appends one item to a list."""
        item = self.stack.pop()
        self._container(list).append(item)

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        """Appends items to a list."""
        items = self.pop_mark()
        self._container(list).extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_setitem(self) -> None:
        """Adds one item to a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._container(dict, collections.OrderedDict)[key] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """Adds items to a dict."""
        items = self.pop_mark()
        self._container(dict, collections.OrderedDict).update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_additems(self) -> None:
        """Adds items to a set."""
        items = self.pop_mark()
        self._container(set).update(items)

    dispatch[pickle.ADDITEMS[0]] = load_additems


def _described(value: Any) -> str:
    return value.name if isinstance(value, _Named) else f"an object of type {type(value).__name__}"


# Names that a pickle may use


@functools.cache
def _pymatgen_classes() -> dict[Any, tuple[tuple[str, str], ...]]:
    """Classes of which objects may be made, with the names they are or were pickled under."""
    from pymatgen.core.composition import Composition
    from pymatgen.core.lattice import Lattice
    from pymatgen.core.periodic_table import DummySpecies, Species
    from pymatgen.core.sites import PeriodicSite, Site
    from pymatgen.core.structure import IStructure, Structure

    classes = (Structure, IStructure, PeriodicSite, Site, Lattice, Composition, Species, DummySpecies)
    names: dict[Any, tuple[tuple[str, str], ...]] = {cls: ((cls.__module__, cls.__name__),) for cls in classes}
    for cls, older in ((Species, "Specie"), (DummySpecies, "DummySpecie")):
        names[cls] += ((cls.__module__, older),)
    return names


@functools.cache
def _allowed() -> dict[tuple[str, str], _Named]:
    """All names that a pickle may use."""
    made: dict[tuple[str, str], Callable[..., Any] | None] = {
        ("_codecs", "encode"): _bytes_of_text,
        ("collections", "OrderedDict"): functools.partial(_collected, collections.OrderedDict),
        ("pymatgen.core.periodic_table", "Element"): _element,
        ("numpy", "dtype"): _dtype,
        ("numpy", "ndarray"): None,
    }
    for module in ("builtins", "__builtin__"):  # the latter up to protocol 2
        made[module, "object"] = None
        made[module, "getattr"] = _element_by_name
        made[module, "complex"] = _complex
        made[module, "bytes"] = _no_bytes
        made[module, "bytearray"] = _bytearray
        made[module, "set"] = functools.partial(_collected, set)
        made[module, "frozenset"] = functools.partial(_collected, frozenset)
    for module in ("copyreg", "copy_reg"):
        made[module, "_reconstructor"] = _new_object_of_protocol_1
    for package in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        made[f"{package}.multiarray", "_reconstruct"] = _empty_array
        made[f"{package}.multiarray", "scalar"] = _scalar
        made[f"{package}.numeric", "_frombuffer"] = _array_of_buffer
    allowed = {key: _Named(".".join(key), make=make) for key, make in made.items()}
    for cls, names in _pymatgen_classes().items():
        allowed |= {key: _Named(".".join(key), new=cls) for key in names}
    return allowed


# What runs in place of the functions that a pickle names; the arguments may be anything


def _is_name(value: Any, name: str) -> bool:
    return isinstance(value, _Named) and value.name in (f"builtins.{name}", f"__builtin__.{name}", name)


def _new_object(cls: Any, *arguments: Any) -> Any:
    _require(isinstance(cls, _Named) and cls.new is not None, f"a new object of {_described(cls)}")
    _require(arguments == (), f"{cls.name} with arguments")
    return object.__new__(cls.new)


def _new_object_of_protocol_1(cls: Any, base: Any, state: Any) -> Any:
    _require(_is_name(base, "object") and state is None, "copyreg._reconstructor with a base class")
    return _new_object(cls)


def _element(symbol: Any) -> Any:
    from pymatgen.core.periodic_table import Element

    _require(type(symbol) is str and symbol in Element.__members__, "an unknown Element")
    return Element[symbol]


def _element_by_name(owner: Any, name: Any) -> Any:
    """The way in which Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    _require(_is_name(owner, "pymatgen.core.periodic_table.Element"), "builtins.getattr")
    return _element(name)


def _collected(cls: type, items: Any = ()) -> Any:
    _require(type(items) in (list, tuple), f"a {cls.__name__} of what is not a list")
    return cls(items)


def _complex(real: Any, imaginary: Any) -> complex:
    _require(type(real) is float and type(imaginary) is float, "a complex of what are not numbers")
    return complex(real, imaginary)


def _no_bytes(*content: Any) -> bytes:
    _require(content == (), "builtins.bytes with content")  # a number would be a length
    return b""


def _bytearray(content: Any = b"") -> bytearray:
    _require(type(content) is bytes, "a bytearray of what is not bytes")
    return bytearray(content)


def _bytes_of_text(text: Any, encoding: Any) -> bytes:
    """Bytes up to protocol 2."""
    _require(type(text) is str and encoding in ("latin1", "latin-1"), "_codecs.encode of other than latin1")
    return text.encode("latin1")


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    _require(type(code) is str and _NUMBERS.fullmatch(code) is not None, f"numpy.dtype {code!r}")
    return np.dtype(code)


def _scalar(dtype: Any, content: Any = b"") -> Any:
    """NumPy's own function loads the content as a pickle if the dtype is that of Python objects; `_dtype` has none."""
    _require(isinstance(dtype, np.dtype) and type(content) is bytes, "numpy.scalar of what are not bytes")
    _require(len(content) == dtype.itemsize, f"numpy.scalar {dtype} of {len(content)} bytes")
    return np.ndarray((), dtype, buffer=content)[()] if content else np.zeros((), dtype)[()]


def _empty_array(cls: Any, shape: Any, code: Any) -> np.ndarray:
    _require(_is_name(cls, "numpy.ndarray") and shape == (0,), "numpy._reconstruct of other than an empty array")
    return np.empty((0,), np.int8)


def _fill_array(array: np.ndarray, version: Any, shape: Any, dtype: Any, fortran: Any, content: Any) -> None:
    _require(array.shape == (0,), "a change of an array")  # its memory may be in use
    _check_layout(shape, dtype)
    _require(type(content) is bytes, "an array of what are not bytes")
    _require(len(content) == math.prod(shape) * dtype.itemsize, f"an array {shape} of {len(content)} bytes")
    array.__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
    """Arrays in protocol 5; order "K" stands for any other permutation of the axes."""
    _check_layout(shape, dtype)
    _require(type(content) in (bytes, bytearray), "an array of what are not bytes")
    _require(order in ("C", "F", "K"), f"an array in order {order!r}")
    array = np.frombuffer(content, dtype)
    if order != "K" or axis_order is None:
        return array.reshape(shape, order=order)
    _require(type(axis_order) is tuple and all(type(axis) is int for axis in axis_order), "an array without axis order")
    return array.reshape(shape).transpose(axis_order)


def _check_layout(shape: Any, dtype: Any) -> None:
    _require(isinstance(dtype, np.dtype), "an array without dtype")
    _require(
        type(shape) is tuple and all(type(length) is int and length >= 0 for length in shape), "an array of no shape"
    )
