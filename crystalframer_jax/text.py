"""Plain text: what comes from outside, tables and durations."""

import math
import reprlib
import unicodedata
from typing import Any

FORMULA_SIGNS = (*"=+-@", *"＝＋－＠", "\t", "\r", "\n")  # with which text becomes a formula in a spreadsheet
UNSAFE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of a character, ends of lines and paragraphs
DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # that text turns with


def escaped(text: object) -> str:
    """Text from outside, a file name or an id, as it may be shown: invisible characters as Python writes them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def unsafe_character(text: str) -> str:
    """The first character, written visibly, for which a text can be no name: it acts or hides, or is no character."""
    if text.isprintable():
        return ""
    return next((escaped(c) for c in text if unicodedata.category(c) in UNSAFE or c in DIRECTIONS), "")


def brief(value: object) -> str:
    """A value of whatever kind and size in a few words: as Python writes it, but cut."""
    try:
        return escaped(_BRIEF.repr(value)[:LONGEST])
    except ValueError:  # of integers with thousands of digits
        return "an endless number"


LONGEST = 200  # characters
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = LONGEST
_BRIEF.maxtuple = _BRIEF.maxlist = 20
_BRIEF.maxlevel = 3


def csv_cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet would take for a formula has an apostrophe in front.

    So has text that looks like the result: no two texts become one. Numbers stay as they are, also those written as
    text.
    """
    if not isinstance(value, str) or not value.lstrip("'").startswith(FORMULA_SIGNS):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def with_unit(name: str, unit: str) -> str:
    """Writes "name (unit)", or the name alone of what has no unit."""
    return f"{name} ({unit})" if unit else name


def table(header: list[str], rows: list[list[Any]], num_left: int = 1) -> str:
    """Text columns, the first `num_left` aligned left and the others right; numbers with four decimals."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        aligned = [
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return escaped(value)


def duration(seconds: float) -> str:
    """Seconds as 3 h 05 min, 4 min 07 s or 12 s."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
