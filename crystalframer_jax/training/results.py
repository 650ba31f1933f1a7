"""What the steps of an epoch give, looked at when the device is busy with later ones already."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from crystalframer_jax.training.logging import say

LAG = 2  # dispatches whose results are not looked at yet


class StepResult(NamedTuple):
    """The result of a step (see step.train_step) as Python numbers."""

    step: int
    loss: float
    grad_norm: float
    finite: bool
    skipped_steps: int


class EpochResults:
    """The results of the steps of an epoch.

    Attributes:
      taken: [loss, gradient norm] of the steps that were looked at, without those that were skipped.
    """

    def __init__(self, epoch: int, taken: list[list[float]], skip_nonfinite: int):
        self.epoch, self.taken, self.skip_nonfinite = epoch, taken, skip_nonfinite
        self._pending: deque[dict[str, jax.Array]] = deque()

    @property
    def last_loss(self) -> float | None:
        """The loss of the last step that was looked at."""
        return self.taken[-1][0] if self.taken else None

    def add(self, result: dict[str, jax.Array]) -> int:
        """Add what a dispatch gave, results of one step or with a first axis of steps; returns the number of steps."""
        self._pending.append(result)
        return result["step"].size

    def take(self, all_of_them: bool) -> StepResult | None:
        """Look at the results of all dispatches, or of all but the last few.

        Returns the first one that is not finite and must not be skipped, and looks no further.
        """
        while len(self._pending) > (0 if all_of_them else LAG):
            for result in step_results(self._pending.popleft()):
                if result.finite:
                    self.taken.append([result.loss, result.grad_norm])
                elif result.skipped_steps > self.skip_nonfinite:
                    return result
                else:
                    say(
                        f"epoch {self.epoch + 1}: skipped a step with loss {result.loss}, gradient {result.grad_norm} "
                        f"({result.skipped_steps} of {self.skip_nonfinite} allowed)"
                    )
        return None

    def means(self) -> dict[str, float]:
        """Means of the loss and of the gradient norm over the steps that were looked at."""
        loss, grad_norm = np.mean(self.taken, axis=0).tolist()
        return {"loss": loss, "grad_norm": grad_norm}


def step_results(result: dict[str, jax.Array]) -> Iterator[StepResult]:
    """The results of a dispatch step by step; waits for them."""
    arrays = jax.device_get(result)
    columns = [np.atleast_1d(arrays[name]).tolist() for name in StepResult._fields]
    return map(StepResult._make, zip(*columns, strict=True))
