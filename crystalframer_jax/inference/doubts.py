"""What a prediction does not know: crystals unlike all that a model was trained on, or of which it sees nothing."""

import re
from collections.abc import Sequence
from typing import Any

from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, atoms_without_neighbors

MOST_KINDS = 5  # of warnings told in one line


class PredictionWarning(UserWarning):
    """Predictions that are not to be trusted as others of the model are; the message says which and why."""


def doubts(model: Any, crystal: Crystal) -> list[str]:
    """Tells in a few words each why a prediction of a `Predictor` or an `Ensemble` may be wrong; mostly nothing.

    Of an ensemble the doubts of all its members. Models that do not tell what their training set held, imported ones
    and those of old versions, have doubts only about atoms without neighbors.
    """
    members = getattr(model, "members", (model,))
    coverages = dict.fromkeys(getattr(member, "coverage", None) for member in members)
    found = [text for coverage in coverages if coverage for text in coverage.doubts(crystal)]
    for cutoff in dict.fromkeys(member.cutoff for member in members if _sees_by_radius(member)):
        if number := atoms_without_neighbors(crystal, cutoff):
            atoms = (
                "no atom has a" if number == crystal.num_atoms else f"{number:,} of {crystal.num_atoms:,} atoms have no"
            )
            found.append(f"{atoms} neighbor within the cutoff of {cutoff:.3g} Å")
    return list(dict.fromkeys(found))


def _sees_by_radius(member: Any) -> bool:
    """Tells whether a model sees nothing but neighbors within a radius: others see all atoms of the cell."""
    config = getattr(member, "config", None)
    return not isinstance(member.cutoff, LatticeBox) and (config is None or config.domain == "real")


def summary(found: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Sums up the warnings about some structures, given with their names, in one line; empty if there are none.

    Of those that differ in numbers alone one is told, and how many there are.
    """
    texts: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for name, warnings in found:
        for kind, text in {re.sub(r"\d[\d.,]*", "0", text): text for text in warnings}.items():
            texts.setdefault(kind, text)
            names.setdefault(kind, []).append(name)
    if len(found) == 1:
        return "; ".join(texts.values())
    told = [
        f"{text} ({len(names[kind])} of {len(found)} structures, the first is {names[kind][0]})"
        for kind, text in list(texts.items())[:MOST_KINDS]
    ]
    more = len(texts) - len(told)
    return "; ".join([*told, *([f"{more} warnings of other kinds"] if more else [])])
