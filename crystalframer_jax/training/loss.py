"""The loss functions of the official recipe, on standardised targets."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "L1": lambda error: error * jnp.sign(error),  # with the derivative 0 at 0, as in PyTorch; that of jnp.abs is 1
    "MSE": jnp.square,
    "Smooth_L1": lambda error: optax.losses.huber_loss(error, delta=1.0),
}


def loss_per_crystal(name: str, predictions: Any, targets: Any, known: Any) -> jax.Array:
    """Sums over the known targets of `name` (L1, MSE, Smooth_L1) of prediction - target, [B]; arguments [B, T]."""
    if not predictions.shape == targets.shape == known.shape:
        raise ValueError(f"shapes differ: {predictions.shape}, {targets.shape}, {known.shape}")
    error = jnp.where(known, predictions - targets, 0)  # unknown targets may be NaN; all losses of 0 are 0
    return jnp.sum(LOSSES[name](error), axis=1)
