"""Structures as they are given to a model: objects, or paths of files with any number of them."""

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from crystalframer_jax.data.custom.source import structures_in
from crystalframer_jax.inference.doubts import PredictionWarning, doubts, summary
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import as_crystals
from crystalframer_jax.text import escaped


def predict_usable(
    model: Any, structures: Iterable[Any] | Any, predict: Callable[[list[Crystal]], Predictions]
) -> Predictions:
    """Predicts what `Predictor.predict` takes, NaN for an unusable structure among others of its file; warns of it."""
    found = crystals_of(structures)
    is_usable = np.array([isinstance(item, Crystal) for item in found], bool)
    crystals = [item for item in found if isinstance(item, Crystal)]
    for error in found:
        if isinstance(error, CrystalError):
            warnings.warn(f"{error}; its predictions are NaN", stacklevel=4)
    names = [escaped(crystal.id) or f"#{number}" for number, crystal in enumerate(crystals, 1)]
    if told := summary([(name, doubts(model, crystal)) for name, crystal in zip(names, crystals, strict=True)]):
        name = f"{escaped(crystals[0].id)}: " if len(crystals) == 1 and crystals[0].id else ""
        warnings.warn(name + told, PredictionWarning, stacklevel=4)
    predictions = predict(crystals)
    if is_usable.all():
        return predictions
    filled = np.full((2, len(found), len(model.targets)), np.nan)
    filled[:, is_usable] = predictions
    return Predictions(*filled)


def crystals_of(structures: Iterable[Any] | Any) -> list[Crystal | CrystalError]:
    """Reads the crystals of what `Predictor.predict` takes: one structure or path of a file, or several.

    In place of an unusable one among others of its file stands its error.
    """
    is_one = (
        _is_path(structures)
        or isinstance(structures, Crystal)
        or any(
            hasattr(structures, name)
            for name in ("lattice", "cell", "species_and_occu")  # pymatgen, ASE
        )
    )
    items: Iterable[Any] = [structures] if is_one else structures
    return [crystal for item in items for crystal in (_in_file(item) if _is_path(item) else as_crystals(item))]


def _is_path(item: Any) -> bool:
    return isinstance(item, str | os.PathLike)


def _in_file(path: str | os.PathLike[str]) -> list[Crystal | CrystalError]:
    found: list[Crystal | CrystalError] = []
    for make in structures_in(path):
        try:
            found.append(make())
        except CrystalError as error:
            found.append(error)
    errors = [item for item in found if isinstance(item, CrystalError)]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found
