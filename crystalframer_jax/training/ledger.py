"""The ledger of an epoch: what its steps gave, looked at when the device is busy with later ones already."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.training.logging import Logbook, say

LAG = 2  # dispatches whose results are not looked at yet


class StepResult(NamedTuple):
    """The result of a step (see step.make_train_step) as Python numbers."""

    step: int
    loss: float
    grad_norm: float
    finite: bool
    skipped_steps: int


class Ledger:
    """Keeps what happens in an epoch; it steers nothing.

    Attributes:
      epoch: its number, from 0.
      steps: how many it has.
      position: how many of them were taken.
      results: [loss, gradient norm] of the steps that were looked at, without those that were skipped.
    """

    def __init__(
        self, epoch: int, batches: TrainingBatches, step: int, meta: dict[str, Any], skip_nonfinite: int, log: Logbook
    ):
        """Opens it at optimizer step `step`; `meta` is that of the last checkpoint."""
        self.epoch, self.steps = epoch, batches.steps_per_epoch
        self.position = step - epoch * self.steps
        self.results: list[list[float]] = list(meta["results"])
        self._first, self._batch_size, self._skip_nonfinite = self.position, batches.batch_size, skip_nonfinite
        self._seconds, self._start, self._waited = meta["seconds"], time.perf_counter(), 0.0
        self._pending: deque[dict[str, jax.Array]] = deque()
        self._log = log
        log.start_epoch(epoch, self.position)

    @property
    def is_complete(self) -> bool:
        """Whether all steps were taken."""
        return self.position == self.steps

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, also before it was interrupted."""
        return self._seconds + time.perf_counter() - self._start

    def next_of(self, work: Iterator[Any]) -> Any:
        """Takes what is dispatched next; the time until it is there counts as waiting."""
        start = time.perf_counter()
        found = next(work)
        self._waited += time.perf_counter() - start
        return found

    def add(self, result: dict[str, jax.Array]) -> None:
        """Enters what a dispatch gave: results of one step, or with a first axis of steps."""
        self._pending.append(result)
        self.position += result["step"].size

    def look(self, at_all: bool) -> StepResult | None:
        """Looks at the results of all dispatches, or of all but the last few, which may not be known yet.

        Returns the first one that is not finite and must not be skipped, and looks no further.
        """
        while len(self._pending) > (0 if at_all else LAG):
            arrays = jax.device_get(self._pending.popleft())
            columns = [np.atleast_1d(arrays[name]).tolist() for name in StepResult._fields]
            for result in map(StepResult._make, zip(*columns, strict=True)):
                if result.finite:
                    self.results.append([result.loss, result.grad_norm])
                elif result.skipped_steps > self._skip_nonfinite:
                    return result
                else:
                    say(
                        f"epoch {self.epoch + 1}: skipped a step with loss {result.loss}, gradient {result.grad_norm} "
                        f"({result.skipped_steps} of {self._skip_nonfinite} allowed)"
                    )
        self._log.advance(self.position, self.results[-1][0] if self.results else None)
        return None

    def metrics(self) -> dict[str, float]:
        """Returns means over the steps that were looked at, and the speed from the start to now."""
        loss, grad_norm = np.mean(self.results, axis=0).tolist()
        seconds = time.perf_counter() - self._start
        crystals_per_s = (self.position - self._first) * self._batch_size / seconds
        waiting_share = self._waited / seconds
        return dict(loss=loss, grad_norm=grad_norm, crystals_per_s=crystals_per_s, waiting_share=waiting_share)
