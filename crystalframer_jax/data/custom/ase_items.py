"""Crystals and labels in files of ASE: extended XYZ, databases and trajectories; nothing in them is run."""

import contextlib
import functools
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.data.custom.fields import CustomData, Item, Items, text
from crystalframer_jax.data.custom.folders import DiskFolder, text_of_table
from crystalframer_jax.data.custom.tables import limited_lines
from crystalframer_jax.data.records import BadRecord, DataError
from crystalframer_jax.data.structures import from_arrays, from_text
from crystalframer_jax.files import sha256
from crystalframer_jax.structures.extxyz import LONGEST_COMMENT, Frame, frames
from crystalframer_jax.text import LONGEST, escaped

NOT_IN_INFO = ("Lattice", "Properties", "pbc")  # what ASE takes out of the comment line for itself
LARGEST_VALUE = 64 << 20  # bytes of one value or frame
SMALLEST_ROW = 16  # bytes; a database has no more rows than its size allows
RESULTS = ("energy", "magmom")  # of calculators that are labels; the others are as long as the crystal is large


def xyz_items(file: Path, options: CustomData) -> Items:
    """Reads the frames of an extended XYZ file, with the values of their comment lines."""
    try:
        from ase.io.extxyz import key_val_str_to_dict
    except ImportError as error:
        raise _no_ase(file, "extended XYZ") from error

    def item(frame: Frame) -> Item | BadRecord:
        lines, where, id = frame.lines, f"{file}:{frame.line}", f"{escaped(file.name)}:{frame.line}"
        if frame.problem:
            return BadRecord(id, where, frame.problem)
        try:
            found = key_val_str_to_dict(lines[1])
        except Exception as error:  # whatever the parser raises
            return BadRecord(id, where, f"comment line not understood ({str(error)[:LONGEST]}); correct it")
        values = {key: value for key, value in found.items() if key not in NOT_IN_INFO}
        id = _xyz_id(values, lines[1], options.id_names()) or id
        return Item(id, where, functools.partial(from_text, "".join(lines), where, "extxyz", id), values)

    count = sum(1 for _ in _frames(file))
    return Items(str(file), sha256(file), lambda: map(item, _frames(file)), count)


def _frames(file: Path) -> Iterator[Frame]:
    """Yields the frames of a file, also packed by gzip; of wrong ones why they are."""
    with text_of_table(file, DiskFolder(file.parent), errors="replace", newline=None) as stream:
        yield from frames(limited_lines(stream, file, LONGEST_COMMENT))


def _xyz_id(values: Mapping[str, Any], comment: str, names: tuple[str, ...]) -> str:
    """Returns the id of a frame as it is written: ASE makes 7 of 007."""
    for name in names:
        if found := text(values, name):
            written = re.search(rf"(?:^|\s){re.escape(name)}\s*=\s*[\"']?([^\s\"']+)", comment)
            return found if isinstance(values[name], str) or not written else written[1]
    return ""


def database_items(file: Path, options: CustomData) -> Items:
    """Reads the rows of an ASE database, with their key-value pairs and energies; the file is opened to read only."""
    try:
        from ase.db.sqlite import SQLite3Database
    except ImportError as error:
        raise _no_ase(file, "an ASE database") from error

    class Database(SQLite3Database):  # type: ignore[misc]
        def _connect(self) -> sqlite3.Connection:
            connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
            connection.execute("PRAGMA trusted_schema = OFF")
            return connection

        def decode(self, txt: str, lazy: bool = False) -> Any:
            return json.loads(txt)  # ASE makes objects and arrays of any size of what a text names

    columns = ["id", "numbers", "positions", "cell", "pbc", "key_value_pairs", *RESULTS]

    def read() -> Iterator[Item | BadRecord]:
        with _reading(file, "an ASE database", "write it again with ase convert"), Database(str(file)) as database:
            ids = _row_ids(database.connection, file.stat().st_size // SMALLEST_ROW)
            for id in ids:
                try:
                    (row,) = database.select(id=id, columns=columns, include_data=False)
                    yield _item_of_atoms(file, id, vars(row), {**_results(vars(row)), **row.key_value_pairs}, options)
                except Exception as error:  # whatever ASE raises of a damaged row
                    yield _damaged(file, id, error)

    return Items(str(file), sha256(file), read)


def _row_ids(connection: sqlite3.Connection, most: int) -> list[int]:
    """Lists the rows of the table that ASE reads; ValueError if it is no plain table, or has more rows than bytes."""
    found = connection.execute("SELECT type, rootpage FROM sqlite_master WHERE name = 'systems'").fetchall()
    if [kind for kind, page in found if page] != ["table"]:
        raise ValueError("it has no table of systems")
    ids = [id for (id,) in connection.execute("SELECT id FROM systems ORDER BY id LIMIT ?", (most + 1,))]
    if len(ids) > most:
        raise ValueError("it has more rows than bytes")
    return ids


def trajectory_items(file: Path, options: CustomData) -> Items:
    """Reads the frames of an ASE trajectory, with their info and energies; old ones, which are pickles, are refused."""
    try:
        from ase.io.ulm import NDArrayReader, Reader
    except ImportError as error:
        raise _no_ase(file, "an ASE trajectory") from error
    size = file.stat().st_size

    class Frames(Reader):  # type: ignore[misc]
        def _read_data(self, index: int) -> dict[str, Any]:
            self._fd.seek(self._offsets[index])
            length = int(np.frombuffer(self._fd.read(8), "<i8")[0])
            if not 0 <= length <= min(size, LARGEST_VALUE):
                raise ValueError(f"frame {index + 1} has {length:,} bytes")
            data = json.loads(self._fd.read(length))  # ASE makes objects and arrays of any size of what a text names
            self._little_endian = data.pop("_little_endian", True)
            return dict(data)

    def values_of(frame: Any) -> dict[str, Any]:
        found = {}
        for name, value in frame._data.items():
            if isinstance(value, NDArrayReader):
                if not 0 <= int(value.nbytes) <= min(size, LARGEST_VALUE):
                    raise ValueError(f"{name} has {value.nbytes:,} bytes")
                value = value.read() if name in ("numbers", "positions", "cell", "pbc") else None
            found[name] = value
        return found

    def read() -> Iterator[Item | BadRecord]:
        with _reading(file, "an ASE trajectory", "write it again with ase.io.write"), file.open("rb") as stream:
            if stream.read(8) not in (b"- of Ulm", b"AFFormat") or stream.read(16).rstrip() != b"ASE-Trajectory":
                raise ValueError("it does not begin as one does; those of old versions are pickles, which are not read")
            stream.seek(32)
            if not 0 <= int(np.frombuffer(stream.read(8), "<i8")[0]) <= size // SMALLEST_ROW:
                raise ValueError("more frames than bytes")
            frames = Frames(stream)
            header = values_of(frames) if len(frames) else {}
            for number in range(len(frames)):
                try:
                    frame = values_of(frames[number])
                    calculator, info = frame.get("calculator"), frame.get("info")
                    results = _results(getattr(calculator, "_data", {}))
                    labels = {**results, **(info if isinstance(info, dict) else {})}
                    atoms = {"pbc": header.get("pbc"), "numbers": header.get("numbers"), **frame}
                    yield _item_of_atoms(file, number + 1, atoms, labels, options)
                except Exception as error:  # whatever ASE raises of a damaged frame
                    yield _damaged(file, number + 1, error)

    return Items(str(file), sha256(file), read)


def _item_of_atoms(
    file: Path, number: int, atoms: Mapping[str, Any], labels: dict[str, Any], options: CustomData
) -> Item | BadRecord:
    """Makes the item of a row or frame."""
    where = f"{file}:{number}"
    id = text(labels, *options.id_names()) or f"{escaped(file.name)}:{number}"
    try:
        numbers, positions = np.asarray(atoms["numbers"]), np.asarray(atoms["positions"], "<f8")
        cell, pbc = (
            np.asarray(atoms["cell"], float).tolist(),
            np.asarray(atoms.get("pbc", [0] * 3)).astype(bool).tolist(),
        )
    except (KeyError, TypeError, ValueError) as error:
        return BadRecord(id, where, f"no atoms ({str(error)[:LONGEST]}); write it again with ASE")
    content = numbers.astype("<i4").tobytes(), positions.tobytes()
    return Item(id, where, functools.partial(from_arrays, *content, cell, pbc, id), labels)


def _damaged(file: Path, number: int, error: Exception) -> BadRecord:
    reason = " ".join(f"{type(error).__name__}: {error}"[:LONGEST].split())
    return BadRecord(f"{escaped(file.name)}:{number}", f"{file}:{number}", f"damaged ({reason}); write it again")


def _results(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in RESULTS if isinstance(values.get(name), float | int)}


def _no_ase(file: Path, kind: str) -> DataError:
    return DataError(f"{file}: reading {kind} needs ASE; pip install ase, or pip install '.[ase]'")


@contextlib.contextmanager
def _reading(file: Path, kind: str, remedy: str) -> Iterator[None]:
    """Turns whatever ASE raises of a damaged file into DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:LONGEST] or type(error).__name__
        raise DataError(f"{file} cannot be read as {kind} ({reason}); {remedy}") from error
