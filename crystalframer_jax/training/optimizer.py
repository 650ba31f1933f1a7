"""The official optimizers and learning rate schedules; Muon, and schedules that end at zero."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.parallel.devices import Tree

TO_ZERO = ("cosine", "linear")  # schedules
Schedule = Callable[[Any], jax.Array]  # learning rate of an optimizer step 0, 1, ...


def learning_rate(config: TrainConfig, total_steps: int, hold_from: int | None = None) -> Schedule:
    """Makes the schedule `lr_sch`; it stands still from step `hold_from` on (while weights are averaged).

    With t the step, T = sch_params[0] and D = model_dim, the schedules of the official code are

        const                         lr
        inverse_sqrt_nowarmup         lr sqrt(T / (T + t))
        inverse_sqrt_nowarmup_dmodel  lr sqrt(T / (T + t)) / sqrt(D)
        inverse_sqrt_warmup           min(1 / sqrt(t + 1), (t + 1) / T^1.5) / sqrt(D)
        inverse_sqrt_warmup_lrmax     lr sqrt(T) min(1 / sqrt(t + 1), (t + 1) / T^1.5)
        multistep                     lr 0.1^n at and after n of the steps sch_params

    and beside them, after a linear warm-up of T steps, or of the share T < 1 of all steps, with x from 0 to 1 at
    `total_steps`,

        cosine                        lr (1 + cos(pi x)) / 2
        linear                        lr (1 - x)

    With `lr_batch_size`, lr is that of batches of this size, and multiplied by sqrt(batch_size / lr_batch_size).
    Raises ConfigError if the warm-up of `cosine` or `linear` is longer than the training.
    """
    lr, name, width = config.lr, config.lr_sch, config.model_dim
    if config.lr_batch_size:
        lr *= math.sqrt(config.batch_size / config.lr_batch_size)
    first = config.sch_params[0] if config.sch_params else 0
    if name in TO_ZERO:
        first = round(first * total_steps) if first < 1 else first
        if first >= total_steps:
            raise ConfigError(
                f"sch_params={config.sch_params}: the warm-up of lr_sch={name!r} must be shorter than the training, "
                f"{total_steps:,} steps"
            )

    def schedule(step: Any) -> jax.Array:
        held = step if hold_from is None else jnp.minimum(step, hold_from)
        t = jnp.asarray(held, jnp.result_type(float))
        match name:
            case "const":
                return lr * jnp.ones_like(t)
            case "inverse_sqrt_nowarmup":
                return lr * jnp.sqrt(first / (first + t))
            case "inverse_sqrt_nowarmup_dmodel":
                return lr * width**-0.5 * jnp.sqrt(first / (first + t))
            case "inverse_sqrt_warmup":
                return width**-0.5 * jnp.minimum((t + 1) ** -0.5, (t + 1) * first**-1.5)
            case "inverse_sqrt_warmup_lrmax":
                return lr * math.sqrt(first) * jnp.minimum((t + 1) ** -0.5, (t + 1) * first**-1.5)
            case "multistep":
                return lr * 0.1 ** jnp.searchsorted(jnp.array(sorted(config.sch_params)), t, side="right")
        share = jnp.clip((t - first) / (total_steps - first), 0, 1)
        falling = 1 - share if name == "linear" else (1 + jnp.cos(jnp.pi * share)) / 2
        return lr * jnp.where(t < first, (t + 1) / (first + 1), falling)

    return schedule


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Makes directions of the updates, to be multiplied by -lr: clipping, weight decay, and adamw, muon, adam or sgd.

    Weight decay is decoupled from the gradient in adamw, which decays biases and the parameters of normalisations by
    a rate of their own, and added to the gradient in adam and sgd, which leave those alone. That is what PyTorch makes
    of the official settings. muon is adamw but for the matrices in the blocks: their momentum is made orthogonal, and
    as long as updates of adamw are (0.2 for each number, arXiv:2502.16982).
    """
    clip = [
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.clip(config.clip_grad) if config.clip_grad else optax.identity(),
    ]
    decay = _decay(config.weight_decay, of_biases=False)
    if config.optimizer == "sgd":
        return optax.chain(*clip, decay, optax.trace(config.momentum))
    adam = adam_of_vectors(*config.adam_betas)
    if config.optimizer == "muon":  # -1 makes directions, whose sign is turned later, of its updates
        muon = optax.contrib.muon(-1.0, consistent_rms=0.2, muon_weight_dimension_numbers=_axes_of_matrices)
        adam = optax.partition({True: muon, False: adam}, _is_matrix_of_block)
    if config.optimizer == "adam":
        return optax.chain(*clip, decay, adam)
    return optax.chain(*clip, adam, decay, _decay(config.bias_weight_decay, of_biases=True))


def adam_of_vectors(beta_1: float, beta_2: float) -> optax.GradientTransformation:
    """Adam; its moments are trees like the parameters, or a vector each, see layout.for_steps."""
    adam = optax.scale_by_adam(b1=beta_1, b2=beta_2, eps=1e-8)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not isinstance(state.mu, jax.Array):
            return adam.update(updates, state, params)
        vector, restored = ravel_pytree(updates)
        direction: Any
        direction, state = adam.update(vector, state)
        return restored(direction), state

    return optax.GradientTransformation(adam.init, update)


def global_norm(tree: Tree) -> jax.Array:
    """The norm of all arrays of a tree together; of one vector, which compiles sooner than of one after the other."""
    vector, _ = ravel_pytree(tree)
    return jnp.sqrt(jnp.sum(vector**2))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as PyTorch does."""

    def clipped(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, max_norm / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(clipped)


def _is_matrix_of_block(params: Any) -> Any:
    """Tells which parameters are matrices of the blocks, or several; equal blocks may be stacked ("blocks_")."""

    def of(path: Any, x: Any) -> bool:
        name = path[0].key
        return name.startswith("block") and x.ndim >= 2 + name.startswith("blocks_")

    return jax.tree_util.tree_map_with_path(of, params)


def _axes_of_matrices(params: Any) -> Any:
    """The last two axes are a matrix each."""
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)


def _decay(rate: float, of_biases: bool) -> optax.GradientTransformation:
    """Adds the decay of biases and the parameters of normalisations, or that of all others."""

    def mask(params: Any) -> Any:
        def is_chosen(path: Any, _: Any) -> bool:
            name = jax.tree_util.keystr(path)
            return ("bias" in name or "norm" in name) == of_biases

        return jax.tree_util.tree_map_with_path(is_chosen, params)

    return optax.add_decayed_weights(rate, mask)
