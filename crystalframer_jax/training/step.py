"""Initialisation and the training step, as compiled functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.batching.device_table import Chunk
from crystalframer_jax.batching.targets import TargetStatistics, standardise
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices, psum, sum_in_order
from crystalframer_jax.training.averages import averaged
from crystalframer_jax.training.layer_names import layer_mask
from crystalframer_jax.training.loss import loss_per_crystal
from crystalframer_jax.training.optimizer import Schedule, global_norm, learning_rate, make_optimizer
from crystalframer_jax.training.state import TrainState, Tree

LossFunction = Callable[..., tuple[jax.Array, Any]]
Result = dict[str, jax.Array]
StepFunction = Callable[..., tuple[TrainState, Result]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training step does with the gradient of which loss."""

    config: TrainConfig
    optimizer: optax.GradientTransformation  # directions, to be multiplied by -learning_rate
    learning_rate: Schedule
    swa_first_step: int | None  # from here on the weights enter an equal average


def make_recipe(config: TrainConfig, steps_per_epoch: int) -> Recipe:
    """Makes the recipe of a configuration."""
    swa_first_step = (config.n_epochs - config.swa_epochs) * steps_per_epoch if config.swa_epochs else None
    schedule = learning_rate(config, config.n_epochs * steps_per_epoch, swa_first_step)
    return Recipe(config, make_optimizer(config), schedule, swa_first_step)


def initial_state(
    model: CrystalFramer, recipe: Recipe, batch: Batch, key: jax.Array, devices: Devices = ONE_DEVICE
) -> TrainState:
    """Draws random weights and calibrates the Gaussian widths on `batch`, the first of the training; on all devices."""
    build = _state_builder(model.clone(axis=devices.axis), recipe, devices)
    return build(batch, devices.replicate(jax.random.key_data(key)))


@functools.lru_cache(maxsize=1)  # the shapes of a state are asked for before the state: it is traced once
def _state_builder(model: CrystalFramer, recipe: Recipe, devices: Devices) -> Callable[[Batch, jax.Array], TrainState]:
    """Compiles the function of `initial_state`."""

    def build(batch: Batch, key_data: jax.Array) -> TrainState:
        variables = model.init(jax.random.wrap_key_data(key_data), batch)
        _, calibrated = model.apply(variables, batch, calibrate=True, mutable=["calibration"])
        batch_stats = jax.tree.map(lambda x: x.astype(model.config.dtype), variables.get("batch_stats", {}))
        return new_state(recipe, variables["params"], calibrated.get("calibration", {}), batch_stats)

    return devices.each(build, split=(0,), for_cpu={})


def new_state(recipe: Recipe, params: Tree, calibration: Tree, batch_stats: Tree) -> TrainState:
    """Makes the state of a training that starts from these weights."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    count = functools.partial(jnp.zeros, (), jnp.int32)  # each an array of its own: training steps consume them
    return TrainState(
        step=count(),
        params=params,
        calibration=calibration,
        batch_stats=batch_stats,
        opt_state=recipe.optimizer.init(params),
        swa_params=zeros(params),
        swa_batch_stats=zeros(batch_stats),
        swa_steps=count(),
        ema_params=zeros(params) if recipe.config.ema_decay else {},
        ema_batch_stats=zeros(batch_stats) if recipe.config.ema_decay else {},
        skipped_steps=count(),
    )


def make_loss(
    model: CrystalFramer, recipe: Recipe, statistics: tuple[TargetStatistics, ...], seed: int, axis: str | None = None
) -> LossFunction:
    """Makes loss(params, state, batch, freeze_norm) -> (sum of losses, (loss of each crystal [B], new batch_stats)).

    Frames (among ties) and dropout are drawn from `seed` (uint32), the step, and the place of the crystal in the batch,
    of which every device of `axis` may have a share.
    """
    model, draws_frames = model.clone(axis=axis), recipe.config.ties == "drawn"

    def loss(params: Tree, state: TrainState, batch: Batch, freeze_norm: bool) -> tuple[jax.Array, Any]:
        seeds = draw(draw(jnp.uint32(seed), state.step), batch.crystal_place)
        variables = {"params": params, "calibration": state.calibration, "batch_stats": state.batch_stats}
        predictions, changed = model.apply(
            variables,
            batch,
            draw(seeds, 0) if draws_frames else None,
            train=True,
            freeze_norm=freeze_norm,
            dropout_seeds=draw(seeds, 1),
            mutable=["batch_stats"],
        )
        targets = standardise(batch.targets, statistics)
        losses = loss_per_crystal(recipe.config.loss, predictions, targets, batch.target_mask)
        batch_stats = state.batch_stats | changed.get("batch_stats", {})
        return jnp.sum(losses), (losses, batch_stats)

    return loss


def make_train_step(
    recipe: Recipe, loss: LossFunction, skip_nonfinite: int = 0, devices: Devices = ONE_DEVICE
) -> StepFunction:
    """Compiles step(state, work, freeze_norm=False) -> (state, result) for some devices; `state` is consumed.

    A state as layout.for_steps makes it compiles sooner.

    `work` is a Batch, or a Chunk of K for as many steps in one dispatch, whose result has a first axis of K more. The
    batches of a chunk were gathered by another program: gathered between the steps they would become part of theirs,
    which then round otherwise than single ones, and a training would depend on where its chunks begin.

    The result has "step", "loss", "grad_norm" (before clipping), "finite" and "skipped_steps" (so far). With
    `freeze_norm` BatchNorm keeps its statistics. A step whose loss or gradient is not finite leaves all weights as they
    are and is counted; after more than `skip_nonfinite` of them nothing changes any more.
    """

    def advance(state: TrainState, work: Batch | Chunk, freeze_norm: bool = False) -> tuple[TrainState, Result]:
        step = functools.partial(_step, recipe, loss, skip_nonfinite, devices.axis, freeze_norm)
        return jax.lax.scan(step, state, work.batches) if isinstance(work, Chunk) else step(state, work)

    return devices.each(advance, split=(1,), static=("freeze_norm",), donate=(0,))


def _step(
    recipe: Recipe,
    loss: LossFunction,
    skip_nonfinite: int,
    axis: str | None,
    freeze_norm: bool,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Result]:
    """Takes a step down the mean of the losses of a batch, of which every device of `axis` has a share."""
    is_frozen = layer_mask(state.params, recipe.config.frozen_layers, "frozen_layers")
    number = psum(jnp.sum(batch.crystal_sizes > 0), axis)

    def share_of_mean(params: Tree) -> tuple[jax.Array, Any]:
        total, others = loss(params, state, batch, freeze_norm)
        return total / number, others

    (value, (_, batch_stats)), gradient = jax.value_and_grad(share_of_mean, has_aux=True)(state.params)
    value, gradient = sum_in_order((value, gradient), axis)
    gradient = jax.tree.map(lambda g, frozen: jnp.zeros_like(g) if frozen else g, gradient, is_frozen)
    grad_norm = global_norm(gradient)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    running = state.skipped_steps <= skip_nonfinite

    def kept(new: Tree, old: Tree) -> Tree:
        return jax.tree.map(lambda n, o: jnp.where(finite & running, n, o), new, old)

    updates, opt_state = recipe.optimizer.update(gradient, state.opt_state, state.params)
    rate = recipe.learning_rate(state.step)
    params = jax.tree.map(
        lambda p, u, frozen: p if frozen else p - jnp.asarray(rate, p.dtype) * u, state.params, updates, is_frozen
    )
    params = kept(params, state.params)  # before they are averaged: once for both
    averages = averaged(state, params, recipe.swa_first_step, recipe.config.ema_decay)
    new = dataclasses.replace(state, batch_stats=batch_stats, opt_state=opt_state, **averages)
    new = dataclasses.replace(kept(new, state), params=params)
    skipped_steps = state.skipped_steps + (running & ~finite)
    result = {"step": state.step, "loss": value, "grad_norm": grad_norm, "finite": finite}
    result["skipped_steps"] = skipped_steps
    return dataclasses.replace(new, step=state.step + running, skipped_steps=skipped_steps), result
