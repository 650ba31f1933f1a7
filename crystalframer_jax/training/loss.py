"""The loss functions: those of the official recipe, on standardised targets, and the logistic loss of classes."""

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
    """Sums the losses of the known targets, [B]; arguments [B, T].

    `name`: L1, MSE or Smooth_L1 of prediction - target, or logistic: of the class 0 or 1, given its logit,
    -log of the probability of the class.
    """
    if not predictions.shape == targets.shape == known.shape:
        raise ValueError(f"shapes differ: {predictions.shape}, {targets.shape}, {known.shape}")
    if name == "logistic":
        losses = optax.losses.sigmoid_binary_cross_entropy(jnp.asarray(predictions), jnp.where(known, targets, 0))
        return jnp.sum(jnp.where(known, losses, 0), axis=1)
    error = jnp.where(known, predictions - targets, 0)  # unknown targets may be NaN; all losses of 0 are 0
    return jnp.sum(LOSSES[name](error), axis=1)
