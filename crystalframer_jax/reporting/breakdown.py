"""Where the errors of predictions are: by element, by number of atoms, and the largest."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from crystalframer_jax.batching.table import CrystalTable, amounts_of
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.reporting.metrics import check_shapes
from crystalframer_jax.structures.crystal import formula_of
from crystalframer_jax.text import table, with_unit

SIZES = (1, 5, 11, 21, 41, 81)  # atoms, where the groups begin
LEAST = 5  # crystals with an element that is told
MOST = 10  # elements, and crystals of each target, that are told


def breakdown(
    crystals: CrystalTable,
    rows: np.ndarray,
    predictions: np.ndarray,
    labels: np.ndarray,
    statistics: Sequence[TargetStatistics],
) -> str:
    """Tabulates the mean absolute errors of rows of a table by number of atoms and by element, and the largest errors.

    Predictions and labels [C, T] are those of the rows, in label units. Of the elements those with the largest errors
    (of the first target) are told, if they are in LEAST crystals.
    """
    check_shapes(predictions, labels)
    amounts = amounts_of(crystals, rows)
    off = np.abs(predictions - labels)
    columns = ["crystals", *(with_unit(f"MAE {s.name}", s.unit) for s in statistics)]
    by_size = table(["atoms", *columns], _by_size(crystals.num_atoms[rows], off))
    lines, number = _by_element(amounts, off)
    title = f"element ({len(lines)} of {number})"
    parts = [by_size, table([title, *columns], lines)]
    for t, s in enumerate(statistics):
        header = [
            f"largest errors of {s.name}",
            "formula",
            "atoms",
            *(with_unit(x, s.unit) for x in ("label", "error")),
        ]
        largest = np.argsort(-np.nan_to_num(off[:, t], nan=-1.0), kind="stable")[:MOST]
        worst = [i for i in largest if np.isfinite(off[i, t])]
        found = []
        for i in worst:
            names = [str(crystals.ids[rows[i]]), formula_of(amounts[i]), int(crystals.num_atoms[rows[i]])]
            found.append([*names, float(labels[i, t]), float(predictions[i, t] - labels[i, t])])
        parts.append(table(header, found, num_left=2))
    return "\n\n".join(parts)


def errors_by_element(crystals: CrystalTable, rows: np.ndarray, off: np.ndarray) -> dict[int, float]:
    """Returns the mean of |errors| [C] over the crystals that hold an element, by atomic number; NaN are left out."""
    known = np.isfinite(off)
    holds = amounts_of(crystals, rows)[known] > 0
    return {int(z) + 1: float(off[known][holds[:, z]].mean()) for z in np.flatnonzero(holds.any(axis=0))}


def _by_size(num_atoms: np.ndarray, off: np.ndarray) -> list[list[Any]]:
    """Lists the groups of SIZES that there are, with their number of crystals and mean errors."""
    lines = []
    for first, after in zip(SIZES, (*SIZES[1:], None), strict=True):
        chosen = (num_atoms >= first) & (num_atoms < (after or np.inf))
        if chosen.any():
            name = f"{first} to {after - 1}" if after else f"{first} or more"
            lines.append([name, int(chosen.sum()), *_means(off[chosen])])
    return lines


def _by_element(amounts: np.ndarray, off: np.ndarray) -> tuple[list[list[Any]], int]:
    """Lists the elements with the largest errors; returns also how many elements are in LEAST crystals."""
    from pymatgen.core import Element

    lines: list[list[Any]] = []
    for number in np.flatnonzero((amounts > 0).sum(axis=0) >= LEAST):
        chosen = amounts[:, number] > 0
        lines.append([Element.from_Z(int(number) + 1).symbol, int(chosen.sum()), *_means(off[chosen])])
    lines.sort(key=lambda line: -(line[2] if line[2] is not None else -1.0))
    return lines[:MOST], len(lines)


def _means(off: np.ndarray) -> list[float | None]:
    """Averages errors [C, T] over the crystals with a label."""
    return [float(np.nanmean(column)) if np.isfinite(column).any() else None for column in off.T]
