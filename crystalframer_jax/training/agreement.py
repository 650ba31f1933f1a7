"""What the processes of a training ask for, such as to stop, agreed upon so that all do it at the same step."""

from collections import deque

import jax
import numpy as np

from crystalframer_jax.parallel import Devices, largest_of_processes
from crystalframer_jax.training.results import LAG

NOTHING, SAVE, STOP = 0, 1, 2  # wishes; of several the largest is done


class Agreement:
    """The largest of the wishes of all processes; with one process, its own."""

    def __init__(self, devices: Devices):
        self._devices, self._is_shared = devices, jax.process_count() > 1
        self._largest = devices.each(lambda wish: jax.lax.pmax(wish, devices.axis), split=(0,))
        self._pending: deque[jax.Array] = deque()

    def after_dispatch(self, wish: int) -> int:
        """What all agree to do now; to be asked after every dispatch. It is known LAG dispatches after it was wished.

        Waiting for the wishes of the last dispatch would keep the devices waiting as well.
        """
        if not self._is_shared:
            return wish
        self._pending.append(self._largest(self._devices.put(np.full(len(self._devices.of_process), wish, np.int32))))
        return int(self._pending.popleft()) if len(self._pending) > LAG else NOTHING

    def now(self, wish: int) -> int:
        """What all agree to do, waiting for them."""
        return largest_of_processes(wish)
