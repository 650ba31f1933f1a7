"""What a checkpoint tells beside its arrays, held to what it can be: its checksums may have been made anew."""

import reprlib
from collections.abc import Callable
from typing import Any

from crystalframer_jax.config.hyperparameters import LOGIT, TRANSFORMS
from crystalframer_jax.files import FileError
from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) <= 1e300  # also no integer that is no float


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _is_target(value: Any) -> bool:
    """Tells whether these are the fields of TargetStatistics."""
    return (
        isinstance(value, dict)
        and value.keys() | {"transform", "references"} == {"name", "unit", "mean", "std", "transform", "references"}
        and value.get("transform", "none") in (*TRANSFORMS, LOGIT)  # old runs have neither
        and _is_list(references := value.get("references", []), _is_finite)
        and len(references) in (0, MAX_ATOMIC_NUMBER)
        and isinstance(value["name"], str)
        and isinstance(value["unit"], str)
        and _is_finite(value["mean"])
        and _is_finite(value["std"])
        and value["std"] > 0
    )


def _is_range(value: Any, is_kind: Callable[[Any], bool]) -> bool:
    return _is_list(value, is_kind) and len(value) == 2 and 0 < value[0] <= value[1]


def _is_coverage(value: Any) -> bool:
    """Tells whether these are the fields of Coverage."""
    return (
        isinstance(value, dict)
        and value.keys() == {"elements", "volume_per_atom", "num_atoms"}
        and _is_list(value["elements"], lambda number: _is_count(number, 1) and number <= MAX_ATOMIC_NUMBER)
        and _is_range(value["volume_per_atom"], _is_finite)
        and _is_range(value["num_atoms"], _is_count)
    )


def _is_error(value: Any) -> bool:
    return value is None or _is_number(value)  # NaN and null: no label is known


def _are_errors(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_error, value.values()))


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_pair(value: Any) -> bool:
    return _is_list(value, _is_number) and len(value) == 2


# Fields of the meta data, of the scores of a checkpoint and of a line of metrics: what they must be, if they are there.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (lambda value: _is_count(value, -1), "the number of an epoch"),
    "step": (_is_count, "the number of a step"),
    "seconds": (lambda value: _is_finite(value) and value >= 0, "a time"),
    "results": (lambda value: _is_list(value, _is_pair), "losses and gradient norms of steps"),
    "targets": (
        lambda value: _is_list(value, _is_target) and bool(value),
        "targets with a name, a unit, a finite mean and a positive standard deviation",
    ),
    "training_set": (_is_coverage, "elements, volumes per atom and numbers of atoms of a training set"),
    **dict.fromkeys(("val_mae", "val_roc_auc"), (_are_errors, "errors by target")),
    "config": (lambda value: isinstance(value, dict), "hyperparameters by name"),
    "data": (lambda value: isinstance(value, dict) and isinstance(value.get("digest"), str), "the digest of data"),
    "validation_loss": (lambda value: value is None or _is_finite(value), "a loss"),
    "loss": (_is_finite, "a loss"),
    "val_loss": (_is_finite, "a loss"),
    "lr": (_is_finite, "a learning rate"),
    "crystals_per_s": (_is_finite, "a speed"),
    "num_frame_samples": (lambda value: _is_count(value, 1), "a number of draws"),
    "selected_weights": (lambda value: isinstance(value, str), "the name of weights"),
}


def checked(content: dict[str, Any], what: object, *required: str) -> dict[str, Any]:
    """Returns `content`; FileError, naming `what` it is, if one of its fields is wrong or a required one is missing."""
    for name in required:
        if name not in content:
            raise FileError(f"{what} is damaged: it has no {name}")
    for name, value in content.items():
        is_right, words = FIELDS.get(name, (None, ""))
        if is_right and not is_right(value):
            raise FileError(f"{what} is damaged: {name} is {reprlib.repr(value)}, not {words}")
    return content
