"""The syntax of CIF: data blocks, their items and tables, with the lines on which they are."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from crystalframer_jax.structures.reading import UnreadableError

LONGEST_LINE = 20_000  # characters; the standard has 2,048
MOST_QUOTES = 500  # on a line, each of which is followed to the end

TOKEN = re.compile(r"""'(.*?)'(?!\S)|"(.*?)"(?!\S)|(\#.*)|['"]?(\S+)""")
OF_ATOMS = re.compile(r"\s*_atom_site[._](label|type_symbol|fract|cartn)", re.IGNORECASE)
WANTED = ("_atom_site_", "_atom_type_", "_atom_sites_", "_cell_", "_symmetry_", "_space_group", "_chemical_formula_")


@dataclasses.dataclass
class Item:
    """The values of a name: one, or a column of a table."""

    line: int  # of the name
    values: list[str] = dataclasses.field(default_factory=list)
    lines: list[int] = dataclasses.field(default_factory=list)  # of the values
    is_column: bool = False


@dataclasses.dataclass
class Block:
    """A data block: what of its items a structure may need, by their names in small letters, with "_" for "."."""

    items: dict[str, Item] = dataclasses.field(default_factory=dict)
    problem: UnreadableError | None = None  # the first

    def column(self, name: str) -> list[str]:
        """Lists the values of a name, none if it is not there."""
        return self.items[name].values if name in self.items else []

    def text(self, name: str) -> str:
        """Returns the first value of a name, "" if there is none or it is not known."""
        value = next(iter(self.column(name)), "")
        return "" if value in ("?", ".") else value


class _Token(NamedTuple):
    line: int
    text: str
    is_quoted: bool  # so it is a value, whatever it looks like


def blocks(text: str) -> list[Block]:
    """Finds the data blocks of a CIF that list atoms."""
    found: list[Block] = []
    lines = text.split("\n")
    for start, end in itertools.pairwise([*_starts(lines), len(lines)]):
        block = Block()
        try:
            _fill(block, _Stream(_tokens(lines, start, end)))
        except UnreadableError as error:
            block.problem = error
        if any(map(OF_ATOMS.match, lines[start:end] if block.problem else block.items)):
            found.append(block)
    return found


def _starts(lines: list[str]) -> list[int]:
    """Finds the lines on which data blocks begin: data_ outside of text fields."""
    starts, opened = [], None
    for number, line in enumerate(lines):
        if line.startswith(";"):
            opened = number if opened is None else None
        elif opened is None and line.lstrip()[:5].lower() == "data_":
            starts.append(number)
    if opened is not None:  # a field that nothing ends costs its own block only
        rest = (n for n in range(opened + 1, len(lines)) if lines[n][:5].lower() == "data_")
        if (start := next(rest, None)) is not None:
            starts += [start + more for more in _starts(lines[start:])]
    return starts


def _tokens(lines: list[str], number: int, end: int) -> Iterator[_Token]:
    """Divides lines into tokens; UnreadableError for a line or a text field without an end."""
    while number < end:
        line = lines[number]
        number += 1
        if line.startswith(";"):
            start, close = number, next((n for n in range(number, end) if lines[n].startswith(";")), None)
            if close is None:
                raise UnreadableError(
                    f"line {start}: the text that begins with ; does not end", "end it with a line of ;"
                )
            field = [line[1:].strip(), *lines[number:close]]
            yield _Token(start, " ".join(field).strip(), True)
            line, number = lines[close][1:], close + 1
        if len(line) > LONGEST_LINE or line.count("'") + line.count('"') > MOST_QUOTES:
            problem = f"line {number}: a line of {len(line):,} characters is too long or has too many quotes"
            raise UnreadableError(problem, "break it")
        for single, double, comment, word in TOKEN.findall(line):
            if not comment:
                yield _Token(number, word or single or double, not word)


class _Stream:
    """Tokens of which the next can be looked at."""

    def __init__(self, tokens: Iterator[_Token]) -> None:
        self._tokens, self.next = tokens, next(tokens, None)

    def take(self) -> _Token:
        """Returns the next token, which there must be."""
        token, self.next = self.next, next(self._tokens, None)
        assert token is not None
        return token

    def has_value(self) -> bool:
        """Tells whether the next token is a value."""
        token = self.next
        return token is not None and (
            token.is_quoted or not (token.text.startswith("_") or token.text[:5].lower() in ("loop_", "save_", "stop_"))
        )

    def has_name(self) -> bool:
        """Tells whether the next token is the name of an item."""
        return self.next is not None and not self.next.is_quoted and self.next.text.startswith("_")


def _fill(block: Block, stream: _Stream) -> None:
    """Puts the items of a data block into it."""
    while stream.next:
        token = stream.take()
        if not token.is_quoted and token.text.lower() == "loop_":
            _fill_table(block, stream)
        elif not token.is_quoted and token.text.startswith("_"):
            item = Item(token.line)
            while stream.has_value():
                value = stream.take()
                is_more = bool(item.values) and value.line == item.lines[0]  # as in a name without quotes: P 63/m m c
                if not item.values or is_more:
                    item.values = [" ".join([*item.values, value.text])]
                    item.lines = item.lines or [value.line]
            _put(block, token.text, item)


def _fill_table(block: Block, stream: _Stream) -> None:
    """Puts the columns of a table into a block."""
    columns: list[tuple[str, Item]] = []
    while stream.has_name():
        token = stream.take()
        columns.append((token.text, Item(token.line, is_column=True)))
    count, is_wanted = 0, any(_name(name).startswith(WANTED) for name, _ in columns)
    while stream.has_value():
        token = stream.take()
        if is_wanted:
            item = columns[count % len(columns)][1]
            item.values.append(token.text)
            item.lines.append(token.line)
        count += 1
    if is_wanted and count % len(columns):
        name, item = columns[0]
        problem = f"line {item.line}: the table of {name} has {count:,} values in {len(columns)} columns"
        raise UnreadableError(problem, "give every row a value for each column, ? for what is not known")
    for name, item in columns:
        _put(block, name, item)


def _put(block: Block, text: str, item: Item) -> None:
    """Puts an item into a block, instead of one of the same name; UnreadableError if atoms would then be others."""
    name = _name(text)
    if not name.startswith(WANTED):
        return
    before, block.items[name] = block.items.get(name, item), item
    if before.values != item.values and name.startswith(("_atom_site_", "_cell_")):
        raise UnreadableError(f"lines {before.line} and {item.line}: {text} is given twice", "remove one of them")


def _name(text: str) -> str:
    return text.lower().replace(".", "_").rstrip("_")
