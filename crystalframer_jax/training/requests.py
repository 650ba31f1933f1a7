"""What a training is asked to do besides going on: to save, because it is time, or to stop."""

import time
from collections import deque

import jax
import numpy as np

from crystalframer_jax.parallel.devices import Devices
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.parallel.processes import is_first_process, largest_of_processes
from crystalframer_jax.training.ledger import LAG

NOTHING, SAVE, STOP = 0, 1, 2  # of the requests of several processes the largest is done


class Requests:
    """Asked at every safe moment; the answer is the same in all processes that train together."""

    def __init__(self, interruption: Interruption, checkpoint_minutes: float, devices: Devices):
        self._interruption, self._seconds, self._devices = interruption, 60 * checkpoint_minutes, devices
        self._are_several, self._reason, self._saved_at = jax.process_count() > 1, "", time.monotonic()
        self._largest = devices.each(lambda request: jax.lax.pmax(request, devices.axis), split=(0,))
        self._pending: deque[jax.Array] = deque()

    def after_dispatch(self) -> int:
        """Tells what all agree to do, NOTHING, SAVE or STOP; to be asked after every dispatch.

        With several processes it is known LAG dispatches after the request: waiting for the requests of the last
        dispatch would keep the devices waiting as well.
        """
        request = self._own()
        if not self._are_several:
            return request
        requests = np.full(len(self._devices.of_process), request, np.int32)
        self._pending.append(self._largest(self._devices.put(requests)))
        agreed = int(self._pending.popleft()) if len(self._pending) > LAG else NOTHING
        if agreed != NOTHING:
            self._pending.clear()  # the same request, repeated until it was known
        return agreed

    def now(self) -> int:
        """Tells the same elsewhere, waiting for all processes."""
        self._pending.clear()
        return largest_of_processes(self._own())

    def saved(self) -> None:
        """Notes that all is saved: from here the time to the next checkpoint counts."""
        self._saved_at = time.monotonic()

    def stopped(self, where: str) -> TrainingInterrupted:
        """Makes the end of a training that was asked to stop, to be raised when all is saved."""
        return TrainingInterrupted(f"stopped by {self._reason or 'a request to another process'} {where}")

    def _own(self) -> int:
        """Tells what this process asks for."""
        self._reason = self._interruption.reason()
        if self._reason:
            return STOP
        return SAVE if is_first_process() and time.monotonic() - self._saved_at > self._seconds else NOTHING
