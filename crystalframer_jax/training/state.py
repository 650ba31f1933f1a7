"""The training state."""

import dataclasses

import jax

from crystalframer_jax.parallel.devices import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training."""

    step: jax.Array  # [] int32 optimizer steps taken
    params: Tree
    calibration: Tree  # of the Gaussian widths; set by the first batch
    batch_stats: Tree  # running averages of BatchNorm
    opt_state: Tree
    swa_params: Tree  # equal average over the steps of the last epochs
    swa_batch_stats: Tree  # of the averaged weights; zeros before the end of the training
    swa_steps: jax.Array  # [] int32 weights in that average
    ema_params: Tree  # exponential moving average; empty without ema_decay
    ema_batch_stats: Tree  # of the averaged weights; zeros before the end of the training
    skipped_steps: jax.Array  # [] int32 steps whose loss or gradient was not finite
