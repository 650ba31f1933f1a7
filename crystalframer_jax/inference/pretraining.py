"""Crystals that a model was pretrained on: models of the package know theirs, and so do those that start from them."""

from typing import Any, NamedTuple

import numpy as np

from crystalframer_jax.data.store import Dataset, crystals_of
from crystalframer_jax.inference.shipped import is_model_name, read_model


class Pretraining(NamedTuple):
    """Which of some crystals a model was pretrained on, with labels of the targets that it predicts."""

    seen: np.ndarray  # bool [C]
    told: str  # in a sentence; empty if it was on none of them, as far as is known


def pretraining_of(starts: set[str], dataset: Dataset, rows: np.ndarray, what: str) -> Pretraining:
    """Looks for rows of a data set among the training crystals of models of the package; `what` the rows are.

    `starts` are models by name, or other places, of which nothing is known. Those that predict none of the targets of
    the data set have seen none of its labels.
    """
    seen, told = np.zeros(len(rows), bool), []
    table = dataset.table
    models = {name: read_model(name) for name in sorted(starts) if is_model_name(name)}
    for name, model in models.items():
        shared = {target["name"] for target in model.meta["targets"]} & {target.name for target in dataset.targets}
        if model.seen is None or not shared:
            continue
        found = model.seen.hold(table.ids[rows], crystals_of(table, rows))
        seen |= found
        if found.any():
            with_labels = ", ".join(sorted(shared))
            told.append(f"{name} was trained on {found.sum():,} of {len(rows):,} {what}, with labels of {with_labels}")
    return Pretraining(seen, "; ".join(told))


def starts_of(model: Any) -> set[str]:
    """Returns where the weights of a `Predictor` or of the members of an `Ensemble` come from: models by name."""
    members = getattr(model, "members", (model,))
    return {member.name or member.config.pretrained_model for member in members}
