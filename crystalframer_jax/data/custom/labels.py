"""Labels as people write them: numbers, classes, what stands for unknown, and what is wrong with the others."""

import math
import re
from typing import Any

import numpy as np

from crystalframer_jax.data.records import parse_label
from crystalframer_jax.text import brief

MISSING = ("", "-", "--", "?", "na", "n/a", "#n/a", "<na>", "nan", "none", "null")  # unknown labels, in small letters
CLASSES = dict.fromkeys(("true", "yes", "t", "y"), 1.0) | dict.fromkeys(("false", "no", "f", "n"), 0.0)
LONGEST_CELL = 1000  # characters that are looked at to tell what a cell is
MINUS = "\u2212"  # the mathematical sign, which word processors make of a hyphen

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eEdD][+-]?\d+)?"
_FAULTS = (  # what a cell looks like, and what to do
    (r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?", "write a decimal point instead of the decimal comma"),
    (r"[+-]?\d{1,3}(?:,\d{3})+\.\d+|[+-]?\d{1,3}(?:\.\d{3})+,\d+", "write a number without separators of thousands"),
    (rf"{_NUMBER}\(\d+\)|{_NUMBER}\s*(?:\+/-|\+-|±)\s*{_NUMBER}", "write a number without its uncertainty"),
    (rf"[<>~≈≤≥]=?\s*{_NUMBER}", "write a number instead of the bound, or na"),
    (r"[+-]?(?:\d+\.?\d*|\.\d+)[dD][+-]?\d+", "write a number with e instead of the d of Fortran"),
    (rf"{_NUMBER}\s*(?:[^\W\d_]|[%°])[^\n]*", "write a number without its unit, which --units names"),
)
_CLASS = "it names a class among numbers: write 1 or 0 if all of them are, else a number, or na if unknown"
_NO_CLASS = "write True or False, 1 or 0, or na if unknown, as other labels of this field are classes"
_OTHER = "write a number with a decimal point, or na if unknown"


def number(value: Any) -> float | None:
    """Reads a label as a number, NaN where it is unknown; None for what is no number and no missing marker."""
    if isinstance(value, str):
        value = value.strip().replace(MINUS, "-")
    if value is None or (isinstance(value, str) and value.lower() in MISSING):
        return math.nan
    if isinstance(value, bool | np.bool_) or (isinstance(value, str) and "_" in value):  # Python reads 1_5 as 15
        return None
    try:
        return parse_label(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def class_of(value: Any) -> float | None:
    """Reads a label as a class, 0 or 1, NaN where it is unknown; None for what is none."""
    if isinstance(value, bool | np.bool_):
        return float(value)
    if isinstance(value, str) and (cell := value.strip().lower()) in CLASSES:
        return CLASSES[cell]
    found = number(value)
    return None if found is not None and math.isfinite(found) and found not in (0, 1) else found


def kind(value: Any) -> str:
    """Returns "number" for finite numbers and their texts, "unknown" for unknown labels, "other" for the rest."""
    found = number(value)
    return "other" if found is None else "number" if math.isfinite(found) else "unknown"


def is_number(value: Any) -> bool:
    """Tells whether a value is a finite number, or the text of one."""
    return kind(value) == "number"


def complaint(value: Any) -> str:
    """Tells what to do with a value that looks like a label but is no number: a unit, a decimal comma; else ""."""
    if is_class_word(value):
        return _CLASS
    if not isinstance(value, str) or len(value) > LONGEST_CELL or number(value) is not None:
        return ""
    cell = value.strip().replace(MINUS, "-")
    return next((remedy for pattern, remedy in _FAULTS if re.fullmatch(pattern, cell)), "")


def is_class_word(value: Any) -> bool:
    """Tells whether a value is True or False, or a text that says so."""
    return kind(value) == "other" and class_of(value) is not None


def fault(name: str, value: Any, of_classes: bool = False) -> str:
    """Tells in a sentence why the value of the field `name`, which may be one `of_classes`, is no label."""
    shown = brief(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return f"{name} is {shown}; {_NO_CLASS if of_classes else complaint(value) or _OTHER}"
