"""Records: the crystals of a source before they are parsed, with their labels."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.errors import UserError
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors
from crystalframer_jax.text import LONGEST, brief


class DataError(UserError, ValueError):
    """Data that cannot be prepared; the message is one line naming the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One crystal of a source; small, so that worker processes can be sent it and make the crystal."""

    id: str  # in reports and predictions
    where: str  # file and line or record number, for messages
    load: Callable[[], Crystal]  # with this id, or raises CrystalError; it can be pickled, see data/structures.py
    labels: tuple[float, ...]  # one for each target of the source, NaN where unknown
    split: str = ""  # "train", "val" or "test" where the source says so
    group: str = ""  # crystals of a group stay in one split

    def crystal(self, cutoff: float | LatticeBox) -> Crystal:
        """Makes the crystal, with neighbors within `cutoff`; CrystalError, whatever is wrong with it."""
        try:
            crystal = self.load()
            check_neighbors(crystal, cutoff)
        except CrystalError:
            raise
        except Exception as error:  # also MemoryError and RecursionError: other records go on
            reason = f"{type(error).__name__}: {error}"[:LONGEST]
            raise CrystalError(f"{self.where}: cannot be used ({reason}); correct the record") from error
        return crystal


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: where it is and why."""

    id: str
    where: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Target:
    """A property to predict."""

    name: str
    field: str  # of the source, that holds it
    unit: str  # of the label; "" if unknown
    log10: bool = False  # whether the label is the decimal logarithm of the field

    def label(self, value: Any) -> float:
        """Returns the label for a value of the field, NaN if there is none."""
        number = parse_label(value)
        if not self.log10:
            return number
        return math.log10(number) if number > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class Source:
    """Crystals with labels, as they come from files; a `BadRecord` stands for a line or item that is no record."""

    targets: tuple[Target, ...]
    sha256: str  # of everything that `records` reads
    records: Callable[[], Iterator[Record | BadRecord]]  # starts a new pass over all, in the order of the source
    count: int | None = None  # if it is known before they are read
    paths: tuple[Path, ...] = ()  # files and folders of the user that are read
    notes: tuple[str, ...] = ()  # what the user should know


def text_of(value: Any) -> str:
    """Returns an id, split or group as text without blanks around; "" for what is none: None, NaN, endless digits."""
    if isinstance(value, str):
        return value.strip()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int) and value.bit_length() > 1000:
        return ""
    return str(value) if isinstance(value, float | np.generic) else brief(value)


def parse_label(value: Any) -> float:
    """Returns a label as a number; NaN for what sources write where there is none: None, 'na', '', infinities."""
    if isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
