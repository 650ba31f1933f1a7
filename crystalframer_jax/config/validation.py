"""Checks of the configuration and the part of it that the model needs."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crystalframer_jax.config.hyperparameters import (
    ALLOWED_VALUES,
    NOT_NEGATIVE,
    POSITIVE,
    TRAINING_KEYS,
    WITHOUT_COUNTERPART,
)
from crystalframer_jax.configs import default
from crystalframer_jax.errors import UserError
from crystalframer_jax.structures.neighbors import LatticeBox


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the key and what is allowed."""


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """What the batches of a model hold beside species and neighbour rows, and their floating-point type."""

    cells: bool = False  # the atoms of each cell, for attention in reciprocal space
    lattice_vectors: bool = False  # for lattice frames
    scatter: bool = False  # for pca frames
    dtype: str = "float32"


NO_PARTS = BatchParts()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of the model under their official names; lengths in Å. Hashable: a static argument."""

    num_targets: int
    num_layers: int
    model_dim: int
    head_num: int
    k_dim: int
    v_dim: int
    ff_dim: int
    embedding_dim: tuple[int, ...]
    t_activation: str
    t_fixup_init: bool
    domain: str
    frame_method: str
    tie_tolerance: float
    pooling: str
    pre_pooling_op: str
    norm_type: str
    dropout: float
    precision: str
    lattice_range: int
    scale_real: tuple[float, ...]
    gauss_lb_real: float
    scale_reci: tuple[float, ...]
    gauss_lb_reci: float
    gauss_state: str
    normalize_gauss: bool
    positive_func_beta: float
    value_pe_dist_real: int
    value_pe_dist_coef: float
    value_pe_dist_max: float
    value_pe_dist_wscale: float
    value_pe_angle_real: int
    value_pe_angle_coef: float
    value_pe_angle_wscale: float
    cos_abs: int
    scale_grad: float

    @property
    def uses_frames(self) -> bool:
        """False for Crystalformer, which has no angle encoding and therefore no frames."""
        return self.value_pe_angle_real > 0

    @property
    def dtype(self) -> np.dtype:
        """Type of parameters, positions and lattice sums."""
        return np.dtype("float64" if self.precision == "float64" else "float32")

    @property
    def parts(self) -> BatchParts:
        """What batches must hold beside the neighbour rows."""
        return BatchParts(
            cells=self.domain != "real",
            lattice_vectors=self.uses_frames and self.frame_method == "lattice",
            scatter=self.uses_frames and self.frame_method == "pca",
            dtype=self.dtype.name,
        )

    def domain_of_block(self, block: int) -> str:
        """real, reci, RECI or multihead; the domains of an interleaving take turns."""
        domains = self.domain.split("-")
        return domains[block % len(domains)]

    def scale_of_block(self, block: int) -> float:
        """r0 of a block, Å; several take turns."""
        return self.scale_real[block % len(self.scale_real)]

    def reciprocal_scale_of_block(self, block: int) -> float:
        """scale_reci of a block, Å; several take turns."""
        return self.scale_reci[block % len(self.scale_reci)]


def target_names(config: ConfigDict) -> tuple[str, ...]:
    """The targets of a configuration: 'a', 'a,b' or a list of names."""
    targets = config.targets
    given = targets.split(",") if isinstance(targets, str) else list(targets)
    names = tuple(name.strip() for name in given if name.strip())
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"targets={targets!r}: name one or several different targets, separated by commas")
    return names


def neighbor_cutoff(config: ConfigDict) -> float | LatticeBox:
    """Radius r_c of the neighbour rows in Å, or (adaptive_cutoff_sigma=0) the box of lattice images.

    It is the radius given, else the window of the widest attention Gaussian: as many of its widths r0 / sqrt(gauss_lb)
    as adaptive_cutoff_sigma says. The sign, which in the official code decides whether the window follows the actual
    width of each Gaussian, makes no difference.
    """
    if config.cutoff_radius > 0:
        return float(config.cutoff_radius)
    if config.adaptive_cutoff_sigma == 0:
        return LatticeBox(config.lattice_range)
    return abs(config.adaptive_cutoff_sigma) * max(config.scale_real) / math.sqrt(config.gauss_lb_real)


def validate(config: ConfigDict) -> None:
    """Raise ConfigError, naming the key and what is allowed, if a model cannot be trained with this configuration."""
    validate_model(config)
    _check_values(config, TRAINING_KEYS)
    if config.swa_epochs >= config.n_epochs:
        raise ConfigError(
            f"swa_epochs={config.swa_epochs} must be smaller than n_epochs={config.n_epochs}; 0 switches averaging off"
        )
    if config.lr_sch == "multistep":
        if not config.sch_params or min(config.sch_params) <= 0:
            raise ConfigError(f"sch_params={tuple(config.sch_params)}: lr_sch='multistep' needs the steps of its drops")
    elif config.lr_sch != "const" and (len(config.sch_params) != 1 or config.sch_params[0] < 0):
        raise ConfigError(f"sch_params={tuple(config.sch_params)}: lr_sch={config.lr_sch!r} needs one number of steps")
    elif config.lr_sch.startswith("inverse_sqrt") and not config.sch_params[0] > 0:
        raise ConfigError(f"sch_params={tuple(config.sch_params)}: lr_sch={config.lr_sch!r} needs a positive number")
    if config.reinit_layers and not config.pretrained_model:
        raise ConfigError(
            f"reinit_layers={config.reinit_layers!r} needs a pretrained_model; all layers start at random"
        )
    if len(config.adam_betas) != 2 or not all(0 <= beta < 1 for beta in config.adam_betas):
        raise ConfigError(f"adam_betas={tuple(config.adam_betas)} must be two numbers from 0 to below 1")
    if config.freeze_bn_epochs >= config.n_epochs:
        raise ConfigError(
            f"freeze_bn_epochs={config.freeze_bn_epochs} must be smaller than n_epochs={config.n_epochs}: BatchNorm "
            "would never learn its statistics"
        )
    if config.seed + config.ensemble_size > 2**32:
        raise ConfigError(f"seed={config.seed} must be below {2**32 - config.ensemble_size + 1}")
    for key in ("ema_decay", "momentum"):
        if config[key] >= 1:
            raise ConfigError(f"{key}={config[key]} must be below 1")
    for key in ("train_percent_check", "val_percent_check"):
        if config[key] > 1:
            raise ConfigError(f"{key}={config[key]} is a share: at most 1")
    if 0 < config.train_filter_max < config.train_filter_min:
        raise ConfigError(
            f"train_filter_max={config.train_filter_max} is below train_filter_min={config.train_filter_min}"
        )


def validate_model(config: ConfigDict) -> None:
    """The same for the model alone: a trained one predicts, however it was trained."""
    known = default.get_config()
    for key in config:
        if key not in known:
            raise ConfigError(unknown_key_message(key, list(known)))
    for key in known:
        if key not in config:
            raise ConfigError(f"{key} is missing; start from crystalframer_jax.configs.default")
    _check_values(config, [key for key in known if key not in TRAINING_KEYS])
    _validate_combinations(config)


def _check_values(config: ConfigDict, keys: Iterable[str]) -> None:
    """Raise ConfigError if the value of a key, looked at alone, is not allowed."""
    known = default.get_config()
    for key in keys:
        value = config[key]
        _check_type(key, value, known[key])
        if key in ALLOWED_VALUES and value not in ALLOWED_VALUES[key]:
            allowed = ", ".join(map(repr, ALLOWED_VALUES[key]))
            raise ConfigError(f"{key}={value!r} is not available; allowed: {allowed}")
        if key in POSITIVE and not value > 0:
            raise ConfigError(f"{key}={value!r} must be positive")
        if key in NOT_NEGATIVE and not value >= 0:
            raise ConfigError(f"{key}={value!r} must not be negative")


def _check_type(key: str, value: Any, default_value: Any) -> None:
    """Raise ConfigError if a value, or an element of it, is not of the type of the default, or not finite."""
    if key == "targets":  # a name, several separated by commas, or a list: see target_names
        return
    expected = default_value[0] if isinstance(default_value, tuple) else default_value
    kind = (int, float) if isinstance(expected, float) else type(expected)
    values = value if isinstance(value, tuple | list) else (value,)
    if isinstance(default_value, tuple) != isinstance(value, tuple | list) or not all(
        isinstance(v, kind) and isinstance(v, bool) == isinstance(expected, bool) for v in values
    ):
        raise ConfigError(f"{key}={value!r} is of the wrong type; the default is {default_value!r}")
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        raise ConfigError(f"{key}={value!r} must be finite")


def check_overrides(arguments: Iterable[str]) -> None:
    """Raise ConfigError if one of the command line arguments `--config.KEY=VALUE` names a key that does not exist."""
    known = list(default.get_config())
    for argument in arguments:
        match = re.match(r"--?config\.(\w+)", argument)
        if match and match[1] not in known:
            raise ConfigError(unknown_key_message(match[1], known))


def unknown_key_message(key: str, known: list[str]) -> str:
    """One sentence about a key that does not exist, with the nearest name that does."""
    if key in WITHOUT_COUNTERPART:
        return f"{key} has no counterpart here: {WITHOUT_COUNTERPART[key]}; leave it out"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _validate_combinations(config: ConfigDict) -> None:
    target_names(config)
    for key in ("gauss_lb_real", "gauss_lb_reci", "dropout"):
        if config[key] >= 1:
            raise ConfigError(f"{key}={config[key]} must be below 1")
    if config.model_dim % config.head_num and not (config.k_dim and config.v_dim):
        raise ConfigError(f"head_num={config.head_num} does not divide model_dim={config.model_dim}")
    if config.domain == "multihead" and config.head_num % 2:
        raise ConfigError(f"head_num={config.head_num} must be even: domain=multihead splits the heads in two halves")
    for key in ("scale_real", "scale_reci"):
        if not 1 <= len(config[key]) <= config.num_layers or min(config[key]) <= 0:
            raise ConfigError(
                f"{key}={tuple(config[key])} needs one positive length, or one for each of the "
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
            f"domain={config.domain!r} has no frames: attention in reciprocal space is over atoms, not over neighbours "
            "in some direction; choose domain=real, or value_pe_angle_real=0 for Crystalformer"
        )
    if config.pre_pooling_op.startswith("w") and not config.embedding_dim:
        raise ConfigError(f"pre_pooling_op={config.pre_pooling_op!r} takes its width from embedding_dim: give one")
    if any(width < 1 for width in config.embedding_dim):
        raise ConfigError(f"embedding_dim={tuple(config.embedding_dim)}: every width must be at least 1")


def model_config(config: ConfigDict) -> ModelConfig:
    """The model's part of a configuration; k_dim, v_dim = 0 become model_dim / head_num."""
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"num_targets"}
    values = {name: config[name] for name in names}
    for name in ("embedding_dim", "scale_real", "scale_reci"):
        values[name] = tuple(values[name])
    for name in ("k_dim", "v_dim"):
        values[name] = values[name] or config.model_dim // config.head_num
    return ModelConfig(num_targets=len(target_names(config)), **values)
