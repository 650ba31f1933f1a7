"""Initialisation, the training step and the forward pass, as compiled functions."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from crystalframer_jax.batch import Batch
from crystalframer_jax.model.layers import BATCH_NORM_MOMENTUM
from crystalframer_jax.model.random_bits import keys_by_place
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.training.state import TargetStatistics, TrainState, Tree, standardise

Forward = Callable[..., jax.Array]
StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def working_precision(config: ConfigDict) -> contextlib.AbstractContextManager:
    """Switches float64 on in JAX while a model of precision=float64 is at work; nothing else needs to."""
    return jax.enable_x64(True) if config.precision == "float64" else contextlib.nullcontext()


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
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            calibration=calibrated.get("calibration", {}),
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            swa_params=jax.tree.map(jnp.zeros_like, params),
            swa_batch_stats=jax.tree.map(jnp.zeros_like, batch_stats),
            swa_steps=zero,
        )

    return build(batch, key)


def make_train_step(
    model: CrystalFramer,
    optimizer: optax.GradientTransformation,
    statistics: tuple[TargetStatistics, ...],
    key: jax.Array,
    swa_first_step: int | None,
) -> StepFunction:
    """step(state, batch) -> (state, {"loss", "grad_norm"}); the state passed in is consumed.

    Frames (among ties) and dropout are drawn from `key` folded with the step. From `swa_first_step` on, the weights
    after each step enter an equal average.
    """

    def loss_of(params: Tree, state: TrainState, batch: Batch) -> tuple[jax.Array, Tree]:
        frame_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        frame_keys = keys_by_place(frame_key, batch.crystal_sizes.shape[0])
        variables = {"params": params, "calibration": state.calibration, "batch_stats": state.batch_stats}
        predictions, changed = model.apply(
            variables, batch, frame_keys, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
        )
        targets = standardise(batch.targets, statistics)
        loss = l1_loss(predictions, targets, batch.target_mask, jnp.sum(batch.crystal_sizes > 0))
        return loss, changed.get("batch_stats", {})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params, state, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        swa_params, swa_steps = state.swa_params, state.swa_steps
        if swa_first_step is not None:
            swa_steps = swa_steps + (state.step >= swa_first_step)
            share = jnp.where(state.step >= swa_first_step, 1 / jnp.maximum(swa_steps, 1), 0)
            swa_params = jax.tree.map(lambda mean, new: mean + share * (new - mean), swa_params, params)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            swa_params=swa_params,
            swa_steps=swa_steps,
        )
        return new_state, {"loss": loss, "grad_norm": optax.global_norm(gradient)}

    return jax.jit(step, donate_argnums=0)


def make_forward(model: CrystalFramer) -> Forward:
    """forward(variables, batch, key) -> standardised predictions [B, T].

    Without key the first of several equally good frames is taken; a key draws one, the same for the same crystal
    wherever it stands in a batch.
    """

    def forward(variables: Tree, batch: Batch, key: jax.Array | None = None) -> Any:
        keys = None if key is None else jnp.broadcast_to(key, batch.crystal_sizes.shape)
        return model.apply(variables, batch, keys)

    return jax.jit(forward)


def make_batch_statistics(model: CrystalFramer) -> Callable[[Tree, Batch], Tree]:
    """statistics(variables, batch) -> the means and variances that BatchNorm sees in this batch (batch_stats)."""

    def statistics(variables: Tree, batch: Batch) -> Tree:
        start = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        _, changed = model.apply(
            {**variables, "batch_stats": start},
            batch,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jax.tree.map(lambda x: x / BATCH_NORM_MOMENTUM, changed["batch_stats"])

    return jax.jit(statistics)
