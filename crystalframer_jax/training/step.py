"""Initialisation, the training step and the forward pass, as compiled functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crystalframer_jax.batch import Batch
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.training.state import TargetStatistics, TrainState, Tree, standardise

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def l1_loss(predictions: jax.Array, targets: jax.Array, known: jax.Array, crystals: jax.Array) -> jax.Array:
    """Mean over the crystals of the sum over known targets of |prediction - target|; all [B, T] but `crystals` []."""
    if not predictions.shape == targets.shape == known.shape:
        raise ValueError(f"shapes differ: {predictions.shape}, {targets.shape}, {known.shape}")
    return jnp.sum(jnp.where(known, jnp.abs(predictions - targets), 0)) / crystals


def initial_state(
    model: CrystalFramer, optimizer: optax.GradientTransformation, batch: Batch, key: jax.Array
) -> TrainState:
    """Random weights, with the Gaussian widths calibrated on `batch`, the first of the training."""

    @jax.jit
    def build(batch: Batch, key: jax.Array) -> TrainState:
        variables = model.init(key, batch)
        _, calibrated = model.apply(variables, batch, calibrate=True, mutable=["calibration"])
        params = variables["params"]
        zero = jnp.zeros((), jnp.int32)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return TrainState(zero, params, calibrated["calibration"], optimizer.init(params), zeros, zero)

    return build(batch, key)


def make_train_step(
    model: CrystalFramer,
    optimizer: optax.GradientTransformation,
    statistics: tuple[TargetStatistics, ...],
    key: jax.Array,
    swa_first_step: int | None,
) -> StepFunction:
    """step(state, batch) -> (state, {"loss", "grad_norm"}); the state passed in is consumed.

    Frames are drawn among ties from `key` folded with the step. From `swa_first_step` on, the weights after each
    step enter an equal average.
    """

    def loss_of(params: Tree, calibration: Tree, batch: Batch, frame_key: jax.Array) -> jax.Array:
        predictions: Any = model.apply({"params": params, "calibration": calibration}, batch, frame_key)
        targets = standardise(batch.targets, statistics)
        return l1_loss(predictions, targets, batch.target_mask, jnp.sum(batch.crystal_sizes > 0))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        frame_key = jax.random.fold_in(key, state.step)
        loss, gradient = jax.value_and_grad(loss_of)(state.params, state.calibration, batch, frame_key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        swa_params, swa_steps = state.swa_params, state.swa_steps
        if swa_first_step is not None:
            swa_steps = swa_steps + (state.step >= swa_first_step)
            share = jnp.where(state.step >= swa_first_step, 1 / jnp.maximum(swa_steps, 1), 0)
            swa_params = jax.tree.map(lambda mean, new: mean + share * (new - mean), swa_params, params)
        new_state = TrainState(state.step + 1, params, state.calibration, opt_state, swa_params, swa_steps)
        return new_state, {"loss": loss, "grad_norm": optax.global_norm(gradient)}

    return jax.jit(step, donate_argnums=0)


def make_forward(model: CrystalFramer) -> Callable[[Tree, Batch], jax.Array]:
    """forward({"params", "calibration"}, batch) -> standardised predictions [B, T], deterministic."""
    return jax.jit(lambda variables, batch: model.apply(variables, batch))
