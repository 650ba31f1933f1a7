"""What the readers of structure files share: numbers as people write them, true reasons, warnings."""

from __future__ import annotations

import contextlib
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator

import numpy as np

from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.text import LONGEST, brief, escaped

MINUS = "\u2010\u2011\u2012\u2013\u2014\u2212\ufe58\ufe63\uff0d"  # hyphens and dashes that stand for a minus sign
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class UnreadableError(ValueError):
    """Why a part of a file cannot be read, and what to do; `parsing` says in which file."""

    def __init__(self, reason: str, remedy: str = "correct the file") -> None:
        super().__init__(reason)
        self.remedy = remedy


@contextlib.contextmanager
def parsing(where: str, kind: str) -> Iterator[None]:
    """Silences the warnings of a parser and turns whatever it raises into a one-line `CrystalError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CrystalError:
        raise
    except Exception as error:
        cause = error if isinstance(error, UnreadableError) else error.__cause__ or error
        known: dict[type, str] = {
            IndexError: "it ends early",
            np.linalg.LinAlgError: "the cell has no volume",
            KeyError: f"{cause} is missing or not known",
            MemoryError: "the memory is too small for it",
        }
        reason = " ".join(known.get(type(cause), str(cause)[:LONGEST] or type(cause).__name__).split())
        remedy = getattr(error, "remedy", "correct the file")
        raise CrystalError(f"{where}: cannot be read as {kind} ({escaped(reason)}); {remedy}") from error


def warn(message: str) -> None:
    """Warns of something in a file; the message names the structure."""
    warnings.warn(escaped(message), stacklevel=3)


def plain(text: str) -> str:
    """Writes minus signs, blanks and digits of other alphabets and of full width as ASCII; the rest stays."""
    return text if text.isascii() else "".join(map(_plain, text))


def _plain(character: str) -> str:
    if character in MINUS:
        return "-"
    if character.isspace():
        return " "
    if "\uff01" <= character <= "\uff5e":  # ASCII in full width
        return chr(ord(character) - 0xFEE0)
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def number(text: str, what: str, finite: bool = True) -> float:
    """Reads a number; UnreadableError, naming `what` it should be, for anything else: also for 1_5, which Python takes.

    NaN and infinity are none either, unless they are looked for later (not `finite`).
    """
    text = plain(text).strip()
    is_number = NUMBER.fullmatch(text) or text.strip("+-").lower() in ("nan", "inf", "infinity")
    value = float(text) if is_number else math.nan
    if not is_number or (finite and not math.isfinite(value)):
        raise UnreadableError(f"{what} is {brief(text)}, {'NaN or infinity' if is_number else 'not a number'}")
    return value
