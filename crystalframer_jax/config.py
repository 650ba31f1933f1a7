"""Checks of the configuration and the part of it that the model needs."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from crystalframer_jax.configs import default
from crystalframer_jax.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names the key and what is allowed."""


# Official hyperparameters that exist with one value (or a few) here.
ALLOWED_VALUES: dict[str, tuple] = {
    "domain": ("real",),
    "frame_method": ("max", "no"),
    "t_activation": ("relu", "gelu"),
    "t_fixup_init": (True,),
    "pooling": ("avr", "max"),
    "pre_pooling_op": ("no", "relu", "w+relu"),
    "norm_type": ("no",),
    "dropout": (0.0,),
    "use_cgcnn_feat": (False,),
    "gauss_state": ("q",),
    "normalize_gauss": (True,),
    "value_pe_wave_real": (0,),
    "cos_abs": (0, 1),
    "optimizer": ("adamw",),
    "lr_sch": ("inverse_sqrt_nowarmup",),
    "clip_grad": (0.0,),
    "loss_func": ("L1",),
    "normalize_targets": ("scale_bias",),
    "scale_grad": (0.0,),
}

# Official hyperparameters without a counterpart: what takes their place.
WITHOUT_COUNTERPART: dict[str, str] = {
    "experiment_name": "the run is named by --workdir",
    "save_path": "the run is stored in --workdir",
    "encoder_name": "there is one encoder, CrystalFramer",
    "lattice_range": "neighbours are found by radius (adaptive_cutoff_sigma, cutoff_radius)",
    "minimum_range": "neighbours are found by radius (adaptive_cutoff_sigma, cutoff_radius)",
    "gauss_lb_reci": "only domain=real is available",
    "scale_reci": "only domain=real is available",
    "value_pe_dist_reci": "only domain=real is available",
    "value_pe_wave_reci": "only domain=real is available",
    "freeze_bn_epochs": "norm_type=no has no BatchNorm",
    "train_filter_max": "all labelled crystals are used",
    "train_filter_min": "all labelled crystals are used",
    "train_percent_check": "all labelled crystals are used",
    "val_percent_check": "all labelled crystals are used",
    "model_checkpoint_save_top_k": "the best and the last checkpoint are kept",
    "pretrained_model": "training starts from random weights",
    "num_workers": "batches are prepared in a background thread",
    "use_cuda_code": "the device is chosen by JAX",
    "reproduciblity_state": "runs are always reproducible (seed)",
    "symm_break_noise": "ties are broken by rule (tie_tolerance)",
}

# Hyperparameters that a trained model does not depend on.
TRAINING_KEYS = (
    "seed",
    "n_epochs",
    "batch_size",
    "optimizer",
    "lr",
    "lr_sch",
    "sch_params",
    "adam_betas",
    "weight_decay",
    "bias_weight_decay",
    "clip_norm",
    "clip_grad",
    "loss_func",
    "normalize_targets",
    "swa_epochs",
    "scale_grad",
    "target_set",
)

POSITIVE = (
    "num_layers",
    "model_dim",
    "head_num",
    "ff_dim",
    "batch_size",
    "n_epochs",
    "lr",
    "gauss_lb_real",
    "positive_func_beta",
    "value_pe_dist_wscale",
    "value_pe_angle_wscale",
)
NOT_NEGATIVE = (
    "k_dim",
    "v_dim",
    "cutoff_radius",
    "tie_tolerance",
    "value_pe_dist_real",
    "value_pe_angle_real",
    "weight_decay",
    "bias_weight_decay",
    "clip_norm",
    "swa_epochs",
    "seed",
)


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
    frame_method: str
    tie_tolerance: float
    pooling: str
    pre_pooling_op: str
    scale_real: tuple[float, ...]
    gauss_lb_real: float
    positive_func_beta: float
    value_pe_dist_real: int
    value_pe_dist_coef: float
    value_pe_dist_max: float
    value_pe_dist_wscale: float
    value_pe_angle_real: int
    value_pe_angle_coef: float
    value_pe_angle_wscale: float
    cos_abs: int

    @property
    def uses_frames(self) -> bool:
        """False for Crystalformer, which has no angle encoding and therefore no frames."""
        return self.value_pe_angle_real > 0

    def scale_of_block(self, block: int) -> float:
        """r0 of a block, Å."""
        return self.scale_real[block if len(self.scale_real) > 1 else 0]


def target_names(config: ConfigDict) -> tuple[str, ...]:
    """The targets of a configuration: 'a', 'a,b' or a list of names."""
    targets = config.targets
    given = targets.split(",") if isinstance(targets, str) else list(targets)
    names = tuple(name.strip() for name in given if name.strip())
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"targets={targets!r}: name one or several different targets, separated by commas")
    return names


def cutoff_radius(config: ConfigDict) -> float:
    """Radius r_c of the neighbour rows in Å: the one given, else the window of the widest attention Gaussian."""
    if config.cutoff_radius > 0:
        return float(config.cutoff_radius)
    return abs(config.adaptive_cutoff_sigma) * max(config.scale_real) / math.sqrt(config.gauss_lb_real)


def validate(config: ConfigDict) -> None:
    """Raise ConfigError, naming the key and what is allowed, if a model cannot be trained with this configuration."""
    validate_model(config)
    _check_values(config, TRAINING_KEYS)
    if config.swa_epochs >= config.n_epochs:
        raise ConfigError(
            f"swa_epochs={config.swa_epochs} must be smaller than n_epochs={config.n_epochs}; 0 switches averaging off"
        )
    if len(config.sch_params) != 1 or config.sch_params[0] <= 0:
        raise ConfigError(f"sch_params={tuple(config.sch_params)}: lr_sch={config.lr_sch!r} needs one positive number")
    if len(config.adam_betas) != 2 or not all(0 <= beta < 1 for beta in config.adam_betas):
        raise ConfigError(f"adam_betas={tuple(config.adam_betas)} must be two numbers from 0 to below 1")


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
    if config.gauss_lb_real >= 1:
        raise ConfigError(f"gauss_lb_real={config.gauss_lb_real} must be below 1")
    if config.model_dim % config.head_num and not (config.k_dim and config.v_dim):
        raise ConfigError(f"head_num={config.head_num} does not divide model_dim={config.model_dim}")
    if len(config.scale_real) not in (1, config.num_layers) or min(config.scale_real, default=0) <= 0:
        raise ConfigError(
            f"scale_real={tuple(config.scale_real)} needs one positive length, or one for each of the "
            f"{config.num_layers} blocks"
        )
    if config.adaptive_cutoff_sigma >= 0 and not config.cutoff_radius:
        raise ConfigError(
            f"adaptive_cutoff_sigma={config.adaptive_cutoff_sigma} must be negative (radius in widths of the widest "
            "Gaussian), or give cutoff_radius in Å"
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
    if config.pre_pooling_op.startswith("w") and not config.embedding_dim:
        raise ConfigError(f"pre_pooling_op={config.pre_pooling_op!r} takes its width from embedding_dim: give one")
    if any(width < 1 for width in config.embedding_dim):
        raise ConfigError(f"embedding_dim={tuple(config.embedding_dim)}: every width must be at least 1")


def model_config(config: ConfigDict) -> ModelConfig:
    """The model's part of a configuration; k_dim, v_dim = 0 become model_dim / head_num."""
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"num_targets"}
    values = {name: config[name] for name in names}
    for name in ("embedding_dim", "scale_real"):
        values[name] = tuple(values[name])
    for name in ("k_dim", "v_dim"):
        values[name] = values[name] or config.model_dim // config.head_num
    return ModelConfig(num_targets=len(target_names(config)), **values)
