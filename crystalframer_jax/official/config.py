"""Hyperparameters of the official PyTorch implementation: read from its files, and written for it."""

import dataclasses
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from crystalframer_jax.config import ConfigError, TrainConfig, unknown_key_message, validate, validate_given
from crystalframer_jax.config.hyperparameters import KEYS, NEUTRAL_VALUES, TRAINING_KEYS, WITHOUT_COUNTERPART
from crystalframer_jax.data.registry import TARGET_SETS

# Keys that the official training script reads or adds, beside those of its JSON files.
SCRIPT_KEYS = ("param_file", "training_data", "ddp")

# Our keys that the official code does not have.
OURS_ALONE = tuple(name for name, row in KEYS.items() if not row.metadata["official"])

# The values with which the official keys of WITHOUT_COUNTERPART are written for the official code, which asks for them
# and has no defaults: those of its JSON files. NEUTRAL_VALUES has the others: those are also asked for on reading.
OFFICIAL_ALONE: dict[str, Any] = {
    "experiment_name": "crystalframer_jax",
    "save_path": "result/latticeformer",
    "encoder_name": "latticeformer",
    "minimum_range": True,
    "num_workers": 0,
    "use_cuda_code": True,
    "reproduciblity_state": 2,
    "symm_break_noise": 1e-5,
}

NOT_TAKEN_OVER = ("targets", "target_set", "pretrained_model")  # they are looked after one by one
MAX_CHARACTERS, MAX_INTEGER = 4000, 2**53  # of a hyperparameter that makes sense
# Training settings of which all keep our defaults if one is not available or they do not go together.
JUDGED_TOGETHER = (
    ("n_epochs", "swa_epochs", "freeze_bn_epochs"),
    ("optimizer", "adam_betas"),
    ("lr_sch", "sch_params"),
    ("train_filter_min", "train_filter_max"),
)


def config_from_official(official: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Our configuration from official hyperparameters, and those ("key=value") that it does not take over.

    A trained model does not depend on how it was trained: a training setting that is missing or not available here (a
    schedule without steps, no best checkpoint) keeps our default; those not available are listed. `target_set` is empty
    unless the name is known here.

    Raises ConfigError, naming the key, if the model itself is not available here, or if a hyperparameter of the model
    is missing: the official defaults are others than ours, and another cos_abs or pooling would go unnoticed.
    """
    for key, value in official.items():
        _check_plain(key, value)
        if key not in KEYS and key not in WITHOUT_COUNTERPART and key not in SCRIPT_KEYS:
            raise ConfigError(unknown_key_message(key))
        if key in NEUTRAL_VALUES and value != NEUTRAL_VALUES[key]:
            raise ConfigError(f"{key}={value!r} is not available: {WITHOUT_COUNTERPART[key]}")
    missing = [key for key in sorted(KEYS) if key not in (*TRAINING_KEYS, *OURS_ALONE) and official.get(key) is None]
    if missing:
        raise ConfigError(
            f"hyperparameters of the model are missing: {', '.join(missing)}; give them with --config=FILE.json"
        )
    given = {key: value for key, value in official.items() if key in KEYS and key not in NOT_TAKEN_OVER}
    name = official.get("target_set")
    values = {key: _as_ours(key, value) for key, value in given.items() if key not in TRAINING_KEYS}
    values["targets"] = _targets(official["targets"])
    values["target_set"] = name if isinstance(name, str) and name in TARGET_SETS else ""
    config = validate_given(values)
    return _with_training_keys(config, {key: value for key, value in given.items() if key in TRAINING_KEYS})


def _check_plain(key: Any, value: Any) -> None:
    """Raise ConfigError if a hyperparameter is not a name with a value, or a list of them, of sensible size."""
    if not isinstance(key, str) or len(key) > MAX_CHARACTERS:
        raise ConfigError(f"the hyperparameter {reprlib.repr(key)} is a {type(key).__name__}, not a name")
    values = value if isinstance(value, list | tuple) else (value,)
    is_plain = all(
        v is None or isinstance(v, float | str | os.PathLike) or (isinstance(v, int) and abs(v) <= MAX_INTEGER)
        for v in values
    )
    if not is_plain or sum(len(str(v)) + 2 for v in values) > MAX_CHARACTERS:
        raise ConfigError(f"{key[:100]}={reprlib.repr(value)} is not a number, a text or a list of them, or too long")


def _targets(targets: Any) -> str:
    """The official targets, a name or a list of names, as we write them."""
    names = targets if isinstance(targets, list | tuple) else [targets]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"targets={targets!r} is neither a name nor a list of names")
    return ",".join(names)


def _as_ours(key: str, value: Any) -> Any:
    """An official value as we write it."""
    if isinstance(KEYS[key].default, tuple):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return "no" if (key, value) == ("norm_type", "id") else value  # its name here


def _with_training_keys(config: TrainConfig, given: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The configuration with the training settings that can be used here, and those that cannot ("key=value")."""
    together = {key for group in JUDGED_TOGETHER for key in group}
    left_out = []
    for group in JUDGED_TOGETHER + tuple((key,) for key in given if key not in together):
        changes = {key: _as_ours(key, given[key]) for key in group if key in given}
        try:
            config = validate(dataclasses.replace(config, **changes))
        except ConfigError:
            left_out += [f"{key}={reprlib.repr(given[key])}" for key in changes if changes[key] != getattr(config, key)]
    return config, left_out


def official_from_config(config: TrainConfig) -> dict[str, Any]:
    """Every official hyperparameter, with the values of our configuration.

    Raises ConfigError if the official code cannot run such a model.
    """
    _check_official_limits(config)
    left_out = OURS_ALONE if config.optimizer == "sgd" else (*OURS_ALONE, "momentum")  # read for sgd alone
    values = {key: value for key, value in config.as_dict().items() if key not in left_out}
    official = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    official["targets"] = config.targets[0] if len(config.targets) == 1 else list(config.targets)
    official["target_set"] = config.target_set or None
    official["pretrained_model"] = None
    return official | NEUTRAL_VALUES | OFFICIAL_ALONE


def _check_official_limits(config: TrainConfig) -> None:
    """Raise ConfigError for models that exist here and not in the official code."""
    model = config.model
    usual = config.model_dim // config.head_num
    if config.model_dim % config.head_num or (model.k_dim, model.v_dim) != (usual, usual):
        raise ConfigError(
            f"k_dim={config.k_dim}, v_dim={config.v_dim}: the official code works only with model_dim / head_num"
        )
    if config.task == "classification":
        raise ConfigError("task='classification' has no official counterpart: the official code has no logistic loss")
    if set(config.transforms) != {"none"}:
        raise ConfigError(
            f"target_transform={config.target_transform!r} has no official counterpart: the official code would report "
            "the logarithms as labels"
        )
    if config.element_references:
        raise ConfigError(
            "element_references=True has no official counterpart: the official code would report what is left of the "
            "labels without the part of the composition"
        )
    hidden = len(config.embedding_dim) - config.pre_pooling_op.startswith("w")
    if hidden < 1:
        raise ConfigError(
            f"embedding_dim={config.embedding_dim}: the official code needs a layer between pooling and output"
        )
