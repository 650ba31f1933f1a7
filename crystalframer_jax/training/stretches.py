"""Several optimizer steps in one dispatch, of batches that are gathered on the device."""

import functools
from collections.abc import Iterator

import jax

from crystalframer_jax.batch import Batch
from crystalframer_jax.data.device import Stretch
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.training.state import TrainState
from crystalframer_jax.training.step import LossFunction, Recipe, StepFunction, train_step


def dispatches(batches: TrainingBatches, first_step: int, steps_per_dispatch: int) -> Iterator[Batch | Stretch]:
    """What the steps from one on are dispatched with.

    Where the crystals are on the device, stretches of `steps_per_dispatch` batches. What is left before the end of an
    epoch or a change of shape comes batch by batch: every length of a stretch would be another compiled program.
    """
    if batches.device_table is None or steps_per_dispatch == 1:
        yield from batches.iterate(first_step)
        return
    for stretch in batches.stretches(first_step, steps_per_dispatch):
        if len(stretch.crystals) == steps_per_dispatch:
            yield stretch
        else:
            yield from stretch.one_by_one()


def make_stretch(recipe: Recipe, loss: LossFunction, skip_nonfinite: int = 0) -> StepFunction:
    """stretch(state, stretch, freeze_norm=False) -> (state, results); `state` is consumed.

    The steps that `make_train_step` would take one after the other; the results have a first axis of K more. All
    batches are gathered before the first step: gathered between the steps they would become part of their programs,
    which then round otherwise than those of single steps, and a training would depend on where its stretches begin.
    """
    step = train_step(recipe, loss, skip_nonfinite)

    @functools.partial(jax.jit, donate_argnums=0, static_argnames="freeze_norm")
    def run(state: TrainState, stretch: Stretch, freeze_norm: bool = False) -> tuple[TrainState, dict[str, jax.Array]]:
        return jax.lax.scan(lambda state, batch: step(state, batch, freeze_norm), state, stretch.gathered())

    return run
