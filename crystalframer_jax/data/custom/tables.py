"""Labels in CSV files, beside structure files or with the text of structures in a column."""

import collections
import csv
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from crystalframer_jax.data.custom.fields import (
    ID_NAMES,
    SAMPLE,
    CustomData,
    Item,
    Items,
    is_cif_text,
    is_json_text,
    short,
    text,
)
from crystalframer_jax.data.custom.folders import SUFFIXES, DiskFolder, Folder, find_structure, suffix_of, text_of_table
from crystalframer_jax.data.custom.labels import MINUS, MISSING, complaint, fault, is_class_word, is_number
from crystalframer_jax.data.io.streams import check_unpacked
from crystalframer_jax.data.records import BadRecord, DataError
from crystalframer_jax.data.structures import from_json, from_text
from crystalframer_jax.files import sha256
from crystalframer_jax.text import escaped

LONGEST_CELL = 64 << 20  # characters
FILE_COLUMNS = ("structure", "structure_file", "file", "filename", "file_name", "path", "cif", "cif_file", "poscar")
Rows = Iterator[tuple[int, list[str]]]  # with the number of their line
COMMAS = "are they decimal commas? Write decimal points"


class Table:
    """The rows of a CSV file on the disk or in an archive, and the folder that its structure files are in."""

    def __init__(self, file: Path, folder: Folder | None = None, member: str = ""):
        self.file, self.member = file, member
        self.folder: Folder = folder or DiskFolder(file.parent)
        self.name = f"{file} ({member})" if member else str(file)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yields number of the first line and cells of each row that is not blank."""
        csv.field_size_limit(LONGEST_CELL)  # a CIF may be long
        line = 1
        try:
            with text_of_table(self.file, self.folder, self.member) as stream:
                lines, beginning, delimiter = limited_lines(stream, self.file, LONGEST_CELL), [], ","
                for text in lines:
                    beginning.append(text)
                    if said := re.fullmatch(r"sep=(.)\s*", text):  # a line of Excel's own
                        beginning[-1], delimiter = "\n", said[1]
                        break
                    if text.strip():
                        delimiter = _delimiter(text)
                        break
                lines = itertools.chain(beginning, lines)
                reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
                for row in reader:
                    cells = [cell.strip() for cell in row]
                    if any(cells):
                        yield line, cells
                    line = reader.line_num + 1
        except UnicodeError as error:
            raise DataError(f"{self.name} is not UTF-8 text; save it as CSV UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{self.name}:{line}: {error}; correct the quotes") from error

    def has_structure(self, cell: str) -> bool:
        """Tells whether a cell is a structure or names a file with one."""
        return is_cif_text(cell) or is_json_text(cell) or _is_python(cell) or bool(find_structure(self.folder, cell))


def id_prop_of(names: Iterable[str]) -> str:
    """Finds the table of a folder in the layout of CGCNN; "" if there is none."""
    return next((name for name in names if name.lower() in ("id_prop.csv", "id_prop.csv.gz")), "")


def folder_items(table: Table, options: CustomData) -> Items:
    """Reads the crystals of an id_prop.csv: id or file name, then labels; mostly without a header."""
    sample = list(itertools.islice(table.rows(), SAMPLE))
    first = sample[0][1] if sample else []
    # columns that are empty throughout come from a delimiter at the end of lines
    width = max(
        (i for _, cells in sample if len(cells) == len(first) for i, cell in enumerate(cells, 1) if cell), default=0
    )
    if width < 2:
        raise DataError(f"{table.name}: no labels; write an id and its labels on each line, separated by commas")
    has_header = _is_header(table, first)
    if not has_header:
        _check_commas(table, sample)
    names = _checked_names(table, first) if has_header else ["", *_label_names(table, width - 1, options)]
    return _items(table, names, has_header, 0, options.id_names(()))


def table_items(table: Table, options: CustomData) -> Items:
    """Reads the crystals of a CSV file with a header and a column of file names or of structures as text.

    Without a header it may be laid out as an id_prop.csv is.
    """
    rows = table.rows()
    line, first = next(rows, (0, []))
    if not first:
        raise DataError(f"{table.name} is empty; write a header and a line for each crystal")
    if find_structure(table.folder, first[0]):
        return folder_items(table, options)
    _check_has_header(table, line, first)
    names = _checked_names(table, first)
    structure = _structure_column(table, names, rows, options)
    found = sorted((name for name in names if name.lower() in ID_NAMES), key=lambda name: ID_NAMES.index(name.lower()))
    return _items(table, names, True, structure, options.id_names(found))


def _check_has_header(table: Table, line: int, cells: list[str]) -> None:
    """Raises DataError if the first row is that of a crystal; it tells of a label that is no number."""
    if not any(map(is_number, cells)) and not (any(map(complaint, cells)) and any(map(table.has_structure, cells))):
        return
    faulty = next((cell for cell in cells if complaint(cell) and not is_class_word(cell)), "")
    reason = f" ({fault('a label', faulty)})" if faulty else ""
    raise DataError(f"{table.name}:{line}: no header; name the columns on the first line{reason}")


def _check_commas(table: Table, sample: list[tuple[int, list[str]]]) -> None:
    """Raises DataError for a table without header in which commas also divide decimals: -0,53 would be two labels."""
    halves = [(cells[1::2], cells[2::2]) for _, cells in sample if len(cells) % 2]
    is_halved = len(halves) == len(sample) > 1 and all(
        whole and all(re.fullmatch(rf"[+{MINUS}-]?\d+", cell) for cell in whole) and all(map(str.isdecimal, decimals))
        for whole, decimals in halves
    )
    if is_halved and any((len(cell) > 2 and cell[0] == "0") or len(cell) > 5 for _, d in halves for cell in d):
        line, cells = sample[0]
        shown = short(",".join(cells[1:3]))
        raise DataError(f"{table.name}:{line}: {shown} would be two labels; {COMMAS}, or divide cells by semicolons")


def _items(table: Table, names: Sequence[str], has_header: bool, structure: int, id_names: tuple[str, ...]) -> Items:
    """Reads a table with those columns ("" to pass over one); `structure` is the number of that with structures.

    The checksum is of the table and of all files that it names.
    """
    file, folder = table.file, table.folder

    def item(line: int, cells: list[str]) -> Item | BadRecord:
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        where = f"{table.name}:{line}"
        values = {name: cell for name, cell in zip(names, cells, strict=False) if name}
        cell = cells[structure] if structure < len(cells) else ""
        id = text(values, *id_names) or _id_of_cell(cell) or f"{escaped(file.name)}:{line}"
        if len(cells) != len(names):
            hint = f" ({COMMAS})" if len(cells) > len(names) and _has_halves(cells) else ""
            return BadRecord(id, where, f"{len(cells)} cells instead of {len(names)}; correct the line{hint}")
        if is_json_text(cell):
            values.pop(names[structure], None)
            return Item(id, where, functools.partial(from_json, cell, where, id), values)
        if _is_python(cell):
            remedy = "write it as JSON, as structure.to_json() does"
            return BadRecord(id, where, f"the structure is written as Python shows it; {remedy}")
        if any("\n" in cell and not is_cif_text(cell) for cell in cells):
            return BadRecord(id.split("\n")[0], where, "a quoted cell goes on over several lines; close the quote")
        if is_cif_text(cell):
            return Item(id, where, functools.partial(from_text, cell, where, "cif", id), values)
        if found := find_structure(folder, cell):
            return Item(id, where, folder.loader(found, id), values, file=folder.file(found))
        return BadRecord(id, where, f"no {_expected(cell)} in {folder.name}; correct the name or add the file")

    def read() -> Iterator[Item | BadRecord]:
        return itertools.starmap(item, itertools.islice(table.rows(), int(has_header), None))

    digest, count = hashlib.sha256(sha256(file).encode()), 0
    for found in read():
        count += 1
        if isinstance(found, Item) and found.file:
            digest.update(f"{os.path.relpath(found.file, file.parent)}\n{sha256(found.file)}\n".encode())
    return Items(table.name, digest.hexdigest(), read, count, (names[structure], *id_names))


def limited_lines(stream: TextIO, file: Path, most: int) -> Iterator[str]:
    """Reads the lines of a file, with their ends; DataError for one of more than `most` characters."""
    for number, line in enumerate(iter(lambda: stream.readline(most + 1), ""), 1):
        if len(line) > most:
            raise DataError(f"{file}:{number}: a line of over {most:,} characters; is it the right kind of file?")
        check_unpacked(stream.buffer, file)
        yield line


def _delimiter(line: str) -> str:
    """Chooses the delimiter that makes most cells of a line; the comma last, which may be a decimal comma."""
    return max("\t;,", key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))


def _has_halves(cells: list[str]) -> bool:
    """Tells whether two cells in a row may be the halves of a number with a decimal comma."""
    return any(re.fullmatch(r"[+-]?\d+", a) and b.isdecimal() for a, b in itertools.pairwise(cells))


def _is_header(table: Table, cells: list[str]) -> bool:
    """Tells whether a row of id_prop.csv has names instead of an id and labels."""
    labels = cells[1:]
    is_named = any(cell.lower() not in MISSING for cell in labels)
    are_names = not any(is_number(cell) or cell[:1] in "+-.,0123456789" for cell in labels if cell)  # 1.o is a slip
    return is_named and are_names and not find_structure(table.folder, cells[0])


def _label_names(table: Table, count: int, options: CustomData) -> list[str]:
    """Chooses names for the labels of a file without a header."""
    if options.targets and len(options.targets) != count:
        given = ", ".join(options.targets)
        raise DataError(
            f"{table.name}: {count} columns of labels for --targets={given}; name all of them, or add a header"
        )
    return list(options.targets) or (["target"] if count == 1 else [f"target_{i + 1}" for i in range(count)])


def _checked_names(table: Table, header: list[str]) -> list[str]:
    """Checks the names in a header; "" for columns that have none, as the index that pandas writes."""
    for name, count in collections.Counter(filter(None, header)).items():
        if count > 1:
            raise DataError(f"{table.name}: two columns are named {short(name)}; rename one of them")
    return header if header[-1] else header[:-1]


def _structure_column(table: Table, names: list[str], rows: Rows, options: CustomData) -> int:
    """Finds the column of structures: as named, else the first of a usual name whose cells are such."""
    known = ", ".join(short(name) for name in names[:100] if name)
    if options.structure_column:
        if options.structure_column not in names:
            raise DataError(f"{table.name}: no column --structure_column={options.structure_column}; it has {known}")
        return names.index(options.structure_column)
    sample = list(itertools.islice(rows, SAMPLE))
    lower = [name.lower() for name in names]
    for usual in filter(lower.__contains__, (*FILE_COLUMNS, *ID_NAMES)):
        column = lower.index(usual)
        if any(table.has_structure(cells[column]) for _, cells in sample if column < len(cells)):
            return column
    where = table.folder.name
    problem = f"no column with names of structure files in {where} or with CIFs" if sample else "no rows"
    raise DataError(f"{table.name}: {problem}; it has {known}; name it with --structure_column")


def _is_python(cell: str) -> bool:
    """Tells whether a cell is a dict of a structure as Python shows it."""
    return cell.startswith("{'") and "'lattice'" in cell


def _expected(cell: str) -> str:
    """Tells what a cell names, for messages."""
    shown = short(cell)
    guesses = "" if suffix_of(cell) else f" or {shown} with {', '.join(SUFFIXES[:5])}, ..."
    return f"file {shown}{guesses}" if shown else "name of a structure file"


def _id_of_cell(cell: str) -> str:
    """Returns a file name without the suffix; "" for the text of a structure."""
    return "" if "\n" in cell or is_json_text(cell) or _is_python(cell) else cell.removesuffix(suffix_of(cell))
