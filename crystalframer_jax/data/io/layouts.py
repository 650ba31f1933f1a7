"""Records of a JSON file in whatever layout: a list, one record, objects by id, or a table as pandas writes it."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crystalframer_jax.data.io.streams import JsonText, Unreadable, opened

LARGEST_COLUMN = 512 << 20  # characters; a table written column by column is put together in memory
DEEPEST_TEXT = 3  # JSON texts in each other
FRAME = ("columns", "index", "data")  # keys of pandas' orientations "split" and "table"
RECORDS = ("data", "records", "entries", "structures", "materials")  # keys of a list of records inside an object


class Row(NamedTuple):
    """A record, or the reason why it is none."""

    number: int  # from 1
    label: str  # id or row label in the file; "" if there is none
    record: dict[str, Any] | str


def json_rows(file: Path, is_record: Callable[[Any], bool], structures: tuple[str, ...]) -> Iterator[Row]:
    """Reads the records of a JSON file, gzipped or alone in a zip archive, one at a time where its layout allows.

    Layouts: a list of records; one record; an object of records by id; and those of pandas: records, split (that of
    Matbench), index, columns and table, also as a text inside JSON, and with lists for columns.

    Args:
      file: the file.
      is_record: tells whether a value is a record with a structure, or a structure.
      structures: keys under which records have their structures.

    Raises:
      DataError: as `json_records`; also for objects of another layout.
    """
    return _rows(file, None, is_record, structures, DEEPEST_TEXT)


def _rows(
    file: Path, content: str | None, is_record: Callable[[Any], bool], structures: tuple[str, ...], depth: int
) -> Iterator[Row]:
    """Reads the records of a file, or of a text that was found in it."""
    if content is None:
        with opened(file, "") as (stream, name):
            yield from _Layout(JsonText(stream, name, file), file, is_record, structures, depth).rows()
    else:
        stream = io.BytesIO(content.encode(errors="replace"))
        yield from _Layout(JsonText(stream, f"{file} (text in it)", file), file, is_record, structures, depth).rows()


class _Layout:
    """Finds out the layout of a JSON text while it is read."""

    def __init__(
        self, text: JsonText, file: Path, is_record: Callable[[Any], bool], structures: tuple[str, ...], depth: int
    ):
        self.text, self.file, self.is_record, self.structures, self.depth = text, file, is_record, structures, depth
        self.fields: dict[str, Any] = {}  # of an object whose layout is not clear yet
        self.columns: dict[str, dict[str, str]] = {}  # of structures, by row label: their texts
        self.by_id = False
        self.number = 0

    def rows(self) -> Iterator[Row]:
        beginning = self.text.peek()
        if beginning == "{":
            yield from self._object()
        elif beginning == '"' and self.depth:
            yield from self._inner(self.text.value(1))
        else:
            yield from (Row(number, "", record) for number, record in self.text.records())
            return
        if self.text.peek():
            self.text.fail("goes on after the end of its object", "give one with a list of records")

    def _inner(self, content: str) -> Iterator[Row]:
        return _rows(self.file, content, self.is_record, self.structures, self.depth - 1)

    def _object(self) -> Iterator[Row]:
        is_read = False
        for key in self.text.members():
            opening = self.text.peek()
            if key in RECORDS and opening == "[" and not self.by_id and not self.columns:
                is_read = True
                yield from self._list(key)
            elif key in self.structures and opening and opening in "[{" and not self.by_id:
                self._column(key, opening)
            else:
                value = self.text.value(self.number + 1)
                if key == "data" and isinstance(value, str) and self.depth and value.lstrip()[:1] in ("[", "{"):
                    is_read = True
                    yield from self._inner(value)
                elif self.by_id or (not self.columns and key not in FRAME and self.is_record(value)):
                    yield from self._of_id(key, value)
                else:
                    self.fields[key] = value
        if not is_read and not self.by_id:
            yield from self._rest()

    def _of_id(self, id: str, value: Any) -> Iterator[Row]:
        """Gives a record by its id, after those that came before one with a structure."""
        before, self.fields, self.by_id = self.fields, {}, True
        for key, content in (*before.items(), (id, value)):
            self.number += 1
            if isinstance(content, str) and not isinstance(content, Unreadable):
                content = {self.structures[0]: content}
            reason = f"is not JSON ({content})" if isinstance(content, Unreadable) else "is no object with a structure"
            yield Row(self.number, key, content if isinstance(content, dict) else reason)

    def _list(self, key: str) -> Iterator[Row]:
        """Reads the rows of a frame, lists or objects."""
        names, index = self.fields.get("columns"), self.fields.get("index")
        schema = self.fields.get("schema")
        label = schema.get("primaryKey") if isinstance(schema, dict) else None
        label = label[0] if isinstance(label, list) and len(label) == 1 else None
        if not isinstance(names, list) and key == "data":
            names, index = self._head()
        for number, value in self.text.elements():
            row_label = ""
            if isinstance(value, list) and isinstance(names, list):
                is_whole = len(value) == len(names)
                record: Any = {str(name): cell for name, cell in zip(names, value, strict=is_whole)}
                record = record if is_whole else f"has {len(value)} values for {len(names)} columns"
                if isinstance(index, list) and number <= len(index):
                    row_label = _label(index[number - 1])
            elif isinstance(value, dict):
                record = value
                if label in value:
                    row_label = _label(value[label])
                    if label == "index":
                        record = {name: cell for name, cell in value.items() if name != label}
            else:
                reason = f"is not JSON ({value})" if isinstance(value, Unreadable) else "is no row of named columns"
                record = reason
            yield Row(number, row_label, record)

    def _head(self) -> tuple[Any, Any]:
        """Looks for the columns and the index of a frame behind its data."""
        found: dict[str, Any] = {}
        with opened(self.file, "") as (stream, name):
            text = JsonText(stream, name, self.file)
            for key in text.members() if text.peek() == "{" else ():
                if key in RECORDS and text.peek() == "[":
                    for _ in text.elements():
                        pass
                else:
                    found[key] = text.value(1)
        return found.get("columns"), found.get("index")

    def _column(self, key: str, opening: str) -> None:
        """Reads a column of structures, by row label or as a list; or the structure of the only record."""
        cells: dict[str, str] = {}
        size = 0
        labelled = self.text.members() if opening == "{" else self.text.elements()
        for found in labelled:
            if opening == "{":
                self.text.value(len(cells) + 1)
            label = found if isinstance(found, str) else str(found[0] - 1)
            if label in cells:
                self.text.fail(f"has the key {label[:40]!r} twice in {key}")
            cells[label] = self.text.parsed
            size += len(self.text.parsed)
            if size > LARGEST_COLUMN:
                remedy = 'write the table with orient="records", lines=True as .jsonl'
                self.text.fail(f"has a column {key} of more than {LARGEST_COLUMN:,} characters", remedy)
        if opening == "{":
            whole = {name: _parsed(content) for name, content in cells.items()} if len(cells) < 100 else {}
            if self.is_record({key: whole}):
                self.fields[key] = whole
                return
        self.columns[key] = cells

    def _rest(self) -> Iterator[Row]:
        """Gives the only record, or the rows of a table that was read column by column."""
        if self.is_record(self.fields) and not self.columns:
            inner = [
                value for key, value in self.fields.items() if isinstance(value, dict) and key not in self.structures
            ]
            if len(inner) < len(self.fields) or len({tuple(cells) for cells in inner}) > 1:
                yield Row(1, "", self.fields)
                return
            labels = list(inner[0])  # of a table whose structures are in several columns
        elif self.columns:
            labels = list(dict.fromkeys(label for cells in self.columns.values() for label in cells))
        else:
            keys = ", ".join(map(repr, list(self.fields)[:5]))
            self.text.fail(
                f"is not a list of records, nor an object of records by id or of columns (its keys: {keys[:200]})",
                "give a list of objects with a structure and labels each",
            )
        for number, label in enumerate(labels, 1):
            record = {name: _cell(column, label, number) for name, column in self.fields.items()}
            for name, cells in self.columns.items():
                if label in cells:
                    record[name] = _parsed(cells[label])
            yield Row(number, label, record)


def _cell(column: Any, label: str, number: int) -> Any:
    """Returns the cell of a row from a column of cells by label, or from a list of them."""
    if isinstance(column, dict):
        return column.get(label)
    return column[number - 1] if isinstance(column, list) and number <= len(column) else None


def _label(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
