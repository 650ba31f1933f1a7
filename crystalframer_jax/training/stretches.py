"""Several optimizer steps in one dispatch, of batches that are gathered on the device."""

from collections.abc import Iterator

import jax

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.batching.device_table import Chunk
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices
from crystalframer_jax.training.state import TrainState
from crystalframer_jax.training.step import LossFunction, Recipe, StepFunction, train_step


def dispatches(batches: TrainingBatches, first_step: int, steps_per_dispatch: int) -> Iterator[Batch | Chunk]:
    """What the steps from one on are dispatched with: stretches, if the crystals are on the devices."""
    if batches.device_table is None or steps_per_dispatch == 1:
        return batches.iterate(first_step)
    return batches.chunks(first_step, steps_per_dispatch)


def make_stretch(
    recipe: Recipe, loss: LossFunction, skip_nonfinite: int = 0, devices: Devices = ONE_DEVICE
) -> StepFunction:
    """stretch(state, stretch, freeze_norm=False) -> (state, results); `state` is consumed.

    The steps that `make_train_step` would take one after the other; the results have a first axis of K more. The
    batches were gathered by another program: gathered between the steps they would become part of theirs, which then
    round otherwise than those of single steps, and a training would depend on where its stretches begin.
    """
    step = train_step(recipe, loss, skip_nonfinite, devices.axis)

    def run(state: TrainState, stretch: Chunk, freeze_norm: bool = False) -> tuple[TrainState, dict[str, jax.Array]]:
        return jax.lax.scan(lambda state, batch: step(state, batch, freeze_norm), state, stretch.batches)

    return devices.each(run, split=(1,), static=("freeze_norm",), donate=(0,))
