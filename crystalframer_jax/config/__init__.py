"""Hyperparameters: their defaults, what is allowed, and the frozen configurations of a training and of a model."""

from crystalframer_jax.config.hyperparameters import NO_PARTS, BatchParts, ModelConfig, TrainConfig
from crystalframer_jax.config.validation import (
    ConfigError,
    check_overrides,
    unknown_key_message,
    validate,
    validate_model,
)

__all__ = [
    "NO_PARTS",
    "BatchParts",
    "ConfigError",
    "ModelConfig",
    "TrainConfig",
    "check_overrides",
    "unknown_key_message",
    "validate",
    "validate_model",
]
