"""Checks of a configuration as a user gives it, on its way to a frozen one."""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from crystalframer_jax.config.hyperparameters import (
    KEYS,
    LARGEST_CUTOFF,
    LIMITS,
    MOST_CHARACTERS,
    MOST_ELEMENTS,
    MOST_PARAMETERS,
    TRAINING_KEYS,
    TRANSFORMS,
    WITHOUT_COUNTERPART,
    TrainConfig,
)
from crystalframer_jax.errors import UserError
from crystalframer_jax.text import brief


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the key and what is allowed."""


def validate(config: ConfigDict | Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """Freezes a configuration; ConfigError, naming the key and what is allowed, if no model can be trained with it."""
    frozen = validate_model(config)
    _check_values(frozen, TRAINING_KEYS)
    _check_training(frozen)
    return frozen


def validate_model(config: ConfigDict | Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """Does the same for the model alone: a trained one predicts, however it was trained."""
    values = config.as_dict() if isinstance(config, TrainConfig) else dict(config)
    for key in values:
        if key not in KEYS:
            raise ConfigError(unknown_key_message(key))
    for key in sorted(KEYS):
        if key not in values:
            raise ConfigError(f"{key} is missing; start from crystalframer_jax.configs.default")
        values[key] = _frozen_value(key, values[key])
    frozen = TrainConfig(**values)
    _check_values(frozen, [key for key in KEYS if key not in TRAINING_KEYS])
    _check_model(frozen)
    return frozen


def validate_given(values: Mapping[str, Any]) -> TrainConfig:
    """Does the same where hyperparameters that are not given, such as those of later versions, have their defaults."""
    return validate_model(TrainConfig().as_dict() | dict(values))


def _frozen_value(key: str, value: Any) -> Any:
    """Freezes a value; ConfigError if it, or an element of it, is not of the type of the default, or out of bounds."""
    if key == "targets":
        return _target_names(value)
    default, most = KEYS[key].default, KEYS[key].metadata["most"]
    expected = default[0] if isinstance(default, tuple) else default
    kind = (int, float) if isinstance(expected, float) else type(expected)
    values = value if isinstance(value, tuple | list) else (value,)
    if isinstance(default, tuple) != isinstance(value, tuple | list) or not all(
        isinstance(v, kind) and isinstance(v, bool) == isinstance(expected, bool) for v in values
    ):
        raise ConfigError(f"{key}={brief(value)} is of the wrong type; the default is {default!r}")
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        raise ConfigError(f"{key}={brief(value)} must be finite")
    if any(len(v) > MOST_CHARACTERS if isinstance(v, str) else abs(v) > most for v in values):
        largest = f"{MOST_CHARACTERS} characters are" if isinstance(expected, str) else f"{most:,.12g} is"
        raise ConfigError(f"{key}={brief(value)} is out of bounds: {largest} the most that is taken")
    if len(values) > MOST_ELEMENTS:
        raise ConfigError(f"{key} has {len(values):,} values; at most {MOST_ELEMENTS:,} are taken")
    return tuple(value) if isinstance(default, tuple) else float(value) if isinstance(default, float) else value


def _target_names(targets: Any) -> tuple[str, ...]:
    """Reads targets: 'a', 'a,b' or a list of names."""
    given = targets.split(",") if isinstance(targets, str) else targets
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"targets={brief(targets)} is neither a name nor a list of names")
    names = tuple(name.strip() for name in given if name.strip())
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"targets={brief(targets)}: name one or several different targets, separated by commas")
    if len(names) > MOST_ELEMENTS or max(map(len, names)) > MOST_CHARACTERS:
        raise ConfigError(f"targets={brief(targets)}: these are too many names, or too long ones")
    return names


def _check_values(config: TrainConfig, keys: Iterable[str]) -> None:
    """Raises ConfigError if the value of a key, looked at alone, is not allowed."""
    for key in keys:
        value, row = getattr(config, key), KEYS[key].metadata
        if row["values"] and value not in row["values"]:
            allowed = ", ".join(map(repr, row["values"]))
            raise ConfigError(f"{key}={value!r} is not available; allowed: {allowed}")
        for limit in row["limits"]:
            is_within, words = LIMITS[limit]
            if not is_within(value):
                raise ConfigError(f"{key}={value!r} {words}")


def check_overrides(arguments: Iterable[str]) -> None:
    """Raises ConfigError if one of the command line arguments `--config.KEY=VALUE` names a key that does not exist."""
    for argument in arguments:
        match = re.match(r"--?config\.(\w+)", argument)
        if match and match[1] not in KEYS:
            raise ConfigError(unknown_key_message(match[1]))


def unknown_key_message(key: str) -> str:
    """Writes a sentence about a key that does not exist, with the nearest name that does."""
    if key in WITHOUT_COUNTERPART:
        return f"{key} has no counterpart here: {WITHOUT_COUNTERPART[key]}; leave it out"
    near = difflib.get_close_matches(key, KEYS, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _check_model(config: TrainConfig) -> None:
    """Raises ConfigError if keys of the model do not go together."""
    if config.task == "classification":
        _check_defaults(config, ("target_transform", "element_references"))
    elif not set(config.transforms) <= set(TRANSFORMS) or len(config.transforms) != len(config.targets):
        raise ConfigError(
            f"target_transform={config.target_transform!r} must be one of {', '.join(TRANSFORMS)}, or one for each of "
            f"the {len(config.targets)} targets, separated by commas"
        )
    if config.model_dim % config.head_num and not (config.k_dim and config.v_dim):
        raise ConfigError(f"head_num={config.head_num} does not divide model_dim={config.model_dim}")
    if config.domain == "multihead" and config.head_num % 2:
        raise ConfigError(f"head_num={config.head_num} must be even: domain=multihead splits the heads in two halves")
    for key in ("scale_real", "scale_reci"):
        scales = getattr(config, key)
        if not 1 <= len(scales) <= config.num_layers or min(scales) <= 0:
            raise ConfigError(
                f"{key}={scales} needs one positive length, or one for each of the "
                f"{config.num_layers} blocks (fewer take turns)"
            )
    if config.value_pe_dist_max == 0 and config.value_pe_dist_real:
        raise ConfigError("value_pe_dist_max=0: give Å (positive) or multiples of scale_real (negative)")
    if config.value_pe_angle_real == 1:
        raise ConfigError("value_pe_angle_real=1: give 0 (no frames) or at least 2 Gaussians")
    if config.value_pe_angle_real and config.frame_method == "no":
        raise ConfigError(
            f"value_pe_angle_real={config.value_pe_angle_real} needs frames: choose frame_method=max, or "
            "value_pe_angle_real=0 for Crystalformer"
        )
    if config.value_pe_angle_real and config.domain != "real":
        raise ConfigError(
            f"domain={config.domain!r} has no frames: attention in reciprocal space is over atoms, not over neighbors "
            "in some direction; choose domain=real, or value_pe_angle_real=0 for Crystalformer"
        )
    if config.pre_pooling_op.startswith("w") and not config.embedding_dim:
        raise ConfigError(f"pre_pooling_op={config.pre_pooling_op!r} takes its width from embedding_dim: give one")
    if any(width < 1 for width in config.embedding_dim):
        raise ConfigError(f"embedding_dim={config.embedding_dim}: every width must be at least 1")
    if isinstance(config.cutoff, float) and config.cutoff > LARGEST_CUTOFF:
        raise ConfigError(
            f"adaptive_cutoff_sigma={config.adaptive_cutoff_sigma}, scale_real={brief(config.scale_real)}, "
            f"gauss_lb_real={config.gauss_lb_real} make a cutoff of {config.cutoff:,.6g} Å; at most "
            f"{LARGEST_CUTOFF:g} Å are taken"
        )
    if (count := _rough_size(config)) > MOST_PARAMETERS:
        sizes = ("num_layers", "model_dim", "head_num", "k_dim", "v_dim", "ff_dim", "embedding_dim")
        told = ", ".join(f"{key}={brief(getattr(config, key))}" for key in sizes)
        raise ConfigError(f"{told}: a model of about {count:,} parameters; at most {MOST_PARAMETERS:,} are taken")


def _check_defaults(config: TrainConfig, keys: Iterable[str]) -> None:
    """Raises ConfigError for a key of numbers that is not left at its default where targets are classes."""
    for key in keys:
        value, default = getattr(config, key), KEYS[key].default
        if value != default:
            raise ConfigError(
                f"{key}={value!r} is for targets that are numbers: classes, 0 or 1, are learned as they are, by the "
                f"logistic loss; with task='classification' leave it at {key}={default!r}"
            )


def _rough_size(config: TrainConfig) -> int:
    """Counts the parameters of a model, but for the small ones."""
    model = config.model
    dim, heads, value = model.model_dim, model.head_num, model.v_dim
    attention = 2 * dim * heads * (model.k_dim + value)
    encodings = heads * value * (model.value_pe_dist_real + 3 * model.value_pe_angle_real)
    widths = (dim, *model.embedding_dim, model.num_targets)
    output = sum(a * b for a, b in itertools.pairwise(widths))
    return model.num_layers * (attention + encodings + 2 * dim * model.ff_dim) + output


def _check_training(config: TrainConfig) -> None:
    """Raises ConfigError if keys of the training do not go together."""
    if config.task == "classification":
        _check_defaults(config, ("loss_func", "normalize_targets"))
    if config.swa_epochs >= config.n_epochs:
        raise ConfigError(
            f"swa_epochs={config.swa_epochs} must be smaller than n_epochs={config.n_epochs}; 0 switches averaging off"
        )
    if config.lr_sch == "multistep":
        if not config.sch_params or min(config.sch_params) <= 0:
            raise ConfigError(f"sch_params={config.sch_params}: lr_sch='multistep' needs the steps of its drops")
    elif config.lr_sch != "const" and (len(config.sch_params) != 1 or config.sch_params[0] < 0):
        raise ConfigError(f"sch_params={config.sch_params}: lr_sch={config.lr_sch!r} needs one number of steps")
    elif config.lr_sch.startswith("inverse_sqrt") and not config.sch_params[0] > 0:
        raise ConfigError(f"sch_params={config.sch_params}: lr_sch={config.lr_sch!r} needs a positive number")
    if config.reinit_layers and not config.pretrained_model:
        raise ConfigError(
            f"reinit_layers={config.reinit_layers!r} needs a pretrained_model; all layers start at random"
        )
    if len(config.adam_betas) != 2 or not all(0 <= beta < 1 for beta in config.adam_betas):
        raise ConfigError(f"adam_betas={config.adam_betas} must be two numbers from 0 to below 1")
    if config.freeze_bn_epochs >= config.n_epochs:
        raise ConfigError(
            f"freeze_bn_epochs={config.freeze_bn_epochs} must be smaller than n_epochs={config.n_epochs}: BatchNorm "
            "would never learn its statistics"
        )
    if config.seed + config.ensemble_size > 2**32:
        raise ConfigError(f"seed={config.seed} must be below {2**32 - config.ensemble_size + 1}")
    if 0 < config.train_filter_max < config.train_filter_min:
        raise ConfigError(
            f"train_filter_max={config.train_filter_max} is below train_filter_min={config.train_filter_min}"
        )
