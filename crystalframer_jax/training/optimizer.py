"""The official optimizer: AdamW with its own decay for biases, gradient clipping, inverse square root schedule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def inverse_sqrt_nowarmup(lr: float, decay_steps: float, hold_from: int | None) -> Callable[[Any], jax.Array]:
    """lr(t) = lr sqrt(T / (T + t)) at step t = 0, 1, ...; from step `hold_from` on it stands still."""

    def schedule(step: Any) -> jax.Array:
        held = step if hold_from is None else jnp.minimum(step, hold_from)
        return lr * jnp.sqrt(decay_steps / (decay_steps + held))

    return schedule


def learning_rate(config: ConfigDict, swa_first_step: int | None) -> Callable[[Any], jax.Array]:
    """The schedule of a configuration; while weights are averaged it stands still."""
    return inverse_sqrt_nowarmup(config.lr, config.sch_params[0], swa_first_step)


def make_optimizer(config: ConfigDict, swa_first_step: int | None) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay (its own for biases and normalisations), learning rate."""
    parts = [
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.adam_betas[0], b2=config.adam_betas[1], eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, lambda params: _is_bias_or_norm(params, False)),
        optax.add_decayed_weights(config.bias_weight_decay, lambda params: _is_bias_or_norm(params, True)),
        optax.scale_by_learning_rate(learning_rate(config, swa_first_step)),
    ]
    return optax.chain(*parts)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), as the official code does."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, max_norm / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_bias_or_norm(params: Any, wanted: bool) -> Any:
    """A mask: whether being a bias, or a parameter of a normalisation, equals `wanted`."""

    def of(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return ("bias" in name or "norm" in name) == wanted

    return jax.tree_util.tree_map_with_path(of, params)
