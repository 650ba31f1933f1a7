"""What a training is asked to do besides going on: to save, because it is time, or to stop."""

import time

from crystalframer_jax.parallel.devices import Devices
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.parallel.processes import is_first_process
from crystalframer_jax.training.consensus import NOTHING, SAVE, STOP, Consensus


class Requests:
    """Asked at every safe moment; the answer is the same in all processes that train together."""

    def __init__(self, interruption: Interruption, checkpoint_minutes: float, devices: Devices):
        self._interruption, self._seconds = interruption, 60 * checkpoint_minutes
        self._consensus, self._reason, self._saved_at = Consensus(devices), "", time.monotonic()

    def after_dispatch(self) -> int:
        """NOTHING, SAVE or STOP; to be asked after every dispatch, without waiting for the devices."""
        return self._consensus.after_dispatch(self._own())

    def now(self) -> int:
        """The same elsewhere, waiting for all processes."""
        return self._consensus.now(self._own())

    def saved(self) -> None:
        """Tell that all is saved: from here the time to the next checkpoint counts."""
        self._saved_at = time.monotonic()

    def stopped(self, where: str) -> TrainingInterrupted:
        """The end of a training that was asked to stop, to be raised when all is saved."""
        return TrainingInterrupted(f"stopped by {self._reason or 'a request to another process'} {where}")

    def _own(self) -> int:
        """What this process asks for."""
        self._reason = self._interruption.reason()
        if self._reason:
            return STOP
        return SAVE if is_first_process() and self._is_save_due() else NOTHING

    def _is_save_due(self) -> bool:
        return time.monotonic() - self._saved_at > self._seconds
