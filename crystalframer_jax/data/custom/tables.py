"""Labels in CSV files, beside structure files or with the text of CIFs in a column."""

import collections
import csv
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from crystalframer_jax.data.custom.fields import (
    ID_NAMES,
    MISSING,
    SAMPLE,
    CustomData,
    Item,
    Items,
    is_cif_text,
    is_number,
    short,
    text,
)
from crystalframer_jax.data.records import BadRecord, DataError
from crystalframer_jax.data.structures import from_file, from_text
from crystalframer_jax.files import sha256
from crystalframer_jax.text import escaped

LONGEST_CELL = 64 << 20  # characters
SUFFIXES = (".cif", ".vasp", ".poscar", ".extxyz", ".xyz")
POSCAR_PREFIXES = ("POSCAR", "CONTCAR")
FILE_COLUMNS = ("structure", "structure_file", "file", "filename", "file_name", "path", "cif", "cif_file", "poscar")


def folder_items(folder: Path, options: CustomData) -> Items:
    """Reads the crystals of a folder with id_prop.csv: id or file name, then labels; mostly without a header."""
    file = folder / "id_prop.csv"
    sample = [cells for _, cells in itertools.islice(_rows(file), SAMPLE)]
    first = sample[0] if sample else []
    # columns that are empty throughout come from a delimiter at the end of lines
    width = max(
        (i for cells in sample if len(cells) == len(first) for i, cell in enumerate(cells, 1) if cell), default=0
    )
    if width < 2:
        raise DataError(f"{file}: no labels; write an id and its labels on each line, separated by commas")
    has_header = _is_header(folder, first)
    names = _checked_names(file, first) if has_header else ["", *_label_names(file, width - 1, options)]
    return _items(file, names, has_header, 0, options.id_names(()))


def table_items(file: Path, options: CustomData) -> Items:
    """Reads the crystals of a CSV file with a header and a column of file names or of CIF texts."""
    rows = _rows(file)
    line, first = next(rows, (0, []))
    if not first:
        raise DataError(f"{file} is empty; write a header and a line for each crystal")
    if any(is_number(cell) for cell in first):
        raise DataError(f"{file}:{line}: no header; name the columns on the first line")
    names = _checked_names(file, first)
    structure = _structure_column(file, names, rows, options)
    found = sorted((name for name in names if name.lower() in ID_NAMES), key=lambda name: ID_NAMES.index(name.lower()))
    return _items(file, names, True, structure, options.id_names(found))


def _items(file: Path, names: Sequence[str], has_header: bool, structure: int, id_names: tuple[str, ...]) -> Items:
    """Reads a table with those columns ("" to pass over one); `structure` is the number of that with structures.

    The checksum is of the table and of all files that it names.
    """

    def item(line: int, cells: list[str]) -> Item | BadRecord:
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        where = f"{file}:{line}"
        values = {name: cell for name, cell in zip(names, cells, strict=False) if name}
        cell = cells[structure] if structure < len(cells) else ""
        id = text(values, *id_names) or _id_of_cell(cell) or f"{escaped(file.name)}:{line}"
        if len(cells) != len(names):
            return BadRecord(id, where, f"{len(cells)} cells instead of {len(names)}; correct the line")
        if any("\n" in cell and not is_cif_text(cell) for cell in cells):
            return BadRecord(id.split("\n")[0], where, "a quoted cell goes on over several lines; close the quote")
        if is_cif_text(cell):
            return Item(id, where, functools.partial(from_text, cell, where, True, id), values)
        if found := _structure_file(file.parent, cell):
            return Item(id, where, functools.partial(from_file, found, id), values, file=found)
        return BadRecord(id, where, f"no {_expected(cell)} in {file.parent}; correct the name or add the file")

    def read() -> Iterator[Item | BadRecord]:
        return itertools.starmap(item, itertools.islice(_rows(file), int(has_header), None))

    digest, count = hashlib.sha256(sha256(file).encode()), 0
    for found in read():
        count += 1
        if isinstance(found, Item) and found.file:
            digest.update(f"{os.path.relpath(found.file, file.parent)}\n{sha256(found.file)}\n".encode())
    return Items(str(file), digest.hexdigest(), read, count, (names[structure], *id_names))


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields number of the first line and cells of each row that is not blank."""
    csv.field_size_limit(LONGEST_CELL)  # a CIF may be long
    line = 1
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            delimiter = _delimiter(next(filter(str.strip, limited_lines(stream, file, LONGEST_CELL)), ""))
            stream.seek(0)
            lines = limited_lines(stream, file, LONGEST_CELL)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if any(cells):
                    yield line, cells
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text; save it as CSV UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{file}:{line}: {error}; correct the quotes") from error


def limited_lines(stream: TextIO, file: Path, most: int) -> Iterator[str]:
    """Reads the lines of a file, with their ends; DataError for one of more than `most` characters."""
    for number, line in enumerate(iter(lambda: stream.readline(most + 1), ""), 1):
        if len(line) > most:
            raise DataError(f"{file}:{number}: a line of over {most:,} characters; is it the right kind of file?")
        yield line


def _delimiter(line: str) -> str:
    """Chooses the delimiter that makes most cells of a line; the comma last, which may be a decimal comma."""
    return max("\t;,", key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))


def _is_header(folder: Path, cells: list[str]) -> bool:
    """Tells whether a row of id_prop.csv has names instead of an id and labels."""
    labels = cells[1:]
    is_named = any(cell.lower() not in MISSING for cell in labels)
    are_names = not any(is_number(cell) or cell[:1] in "+-.,0123456789" for cell in labels if cell)  # 1.o is a slip
    return is_named and are_names and not _structure_file(folder, cells[0])


def _label_names(file: Path, count: int, options: CustomData) -> list[str]:
    """Chooses names for the labels of a file without a header."""
    if options.targets and len(options.targets) != count:
        given = ", ".join(options.targets)
        raise DataError(f"{file}: {count} columns of labels for --targets={given}; name all of them, or add a header")
    return list(options.targets) or (["target"] if count == 1 else [f"target_{i + 1}" for i in range(count)])


def _checked_names(file: Path, header: list[str]) -> list[str]:
    """Checks the names in a header; "" for columns that have none, as the index that pandas writes."""
    for name, count in collections.Counter(filter(None, header)).items():
        if count > 1:
            raise DataError(f"{file}: two columns are named {short(name)}; rename one of them")
    return header if header[-1] else header[:-1]


def _structure_column(file: Path, names: list[str], rows: Iterator[tuple[int, list[str]]], options: CustomData) -> int:
    """Finds the column of structures: as named, else the first of a usual name whose cells are such."""
    known = ", ".join(short(name) for name in names[:100] if name)
    if options.structure_column:
        if options.structure_column not in names:
            raise DataError(f"{file}: no column --structure_column={options.structure_column}; it has {known}")
        return names.index(options.structure_column)
    sample = list(itertools.islice(rows, SAMPLE))
    lower = [name.lower() for name in names]
    for usual in filter(lower.__contains__, (*FILE_COLUMNS, *ID_NAMES)):
        column = lower.index(usual)
        found = (cells[column] for _, cells in sample if column < len(cells))
        if any(is_cif_text(cell) or _structure_file(file.parent, cell) for cell in found):
            return column
    problem = f"no column with names of structure files in {file.parent} or with CIFs" if sample else "no rows"
    raise DataError(f"{file}: {problem}; it has {known}; name it with --structure_column")


def _structure_file(folder: Path, name: str) -> Path | None:
    """Finds the file of that name, else the one of that name with a suffix, or with POSCAR_ before it."""
    is_whole = name.lower().endswith(SUFFIXES) or Path(name).name.upper().startswith(POSCAR_PREFIXES)
    guesses = [f"{name}{suffix}" for suffix in SUFFIXES] + [f"POSCAR_{name}", f"POSCAR-{name}"]
    candidates = [name, *guesses] if is_whole else [*guesses, name]
    return next((folder / guess for guess in candidates if name and os.path.isfile(folder / guess)), None)


def _expected(cell: str) -> str:
    """Tells what a cell names, for messages."""
    shown = short(cell)
    guesses = "" if cell.lower().endswith(SUFFIXES) else f" or {shown} with {', '.join(SUFFIXES)}"
    return f"file {shown}{guesses}" if shown else "name of a structure file"


def _id_of_cell(cell: str) -> str:
    """Returns a file name without the suffix; "" for the text of a CIF."""
    if "\n" in cell:
        return ""
    return next((cell[: -len(suffix)] for suffix in SUFFIXES if cell.lower().endswith(suffix)), cell)
