"""Hyperparameters: their defaults, what is allowed, and the part of them that the model needs."""

from crystalframer_jax.config.validation import (
    NO_PARTS,
    BatchParts,
    ConfigError,
    ModelConfig,
    check_overrides,
    model_config,
    neighbor_cutoff,
    target_names,
    unknown_key_message,
    validate,
    validate_model,
)

__all__ = [
    "NO_PARTS",
    "BatchParts",
    "ConfigError",
    "ModelConfig",
    "check_overrides",
    "model_config",
    "neighbor_cutoff",
    "target_names",
    "unknown_key_message",
    "validate",
    "validate_model",
]
