"""What the processes of a training must agree on: that they train the same, with what, and when they stop."""

import importlib.metadata
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.model.implementation import Implementation, ImplementationError
from crystalframer_jax.parallel.devices import Devices
from crystalframer_jax.parallel.processes import json_from_first_process, largest_of_processes
from crystalframer_jax.runs.run_directory import as_json
from crystalframer_jax.training.ledger import LAG

NOTHING, SAVE, STOP = 0, 1, 2  # requests; of several the largest is done


class Consensus:
    """The largest of the requests of all processes; with one process, its own."""

    def __init__(self, devices: Devices):
        self._devices, self._are_several = devices, jax.process_count() > 1
        self._largest = devices.each(lambda request: jax.lax.pmax(request, devices.axis), split=(0,))
        self._pending: deque[jax.Array] = deque()

    def after_dispatch(self, request: int) -> int:
        """What all agree to do now; to be asked after every dispatch. It is known LAG dispatches after the request.

        Waiting for the requests of the last dispatch would keep the devices waiting as well.
        """
        if not self._are_several:
            return request
        requests = np.full(len(self._devices.of_process), request, np.int32)
        self._pending.append(self._largest(self._devices.put(requests)))
        agreed = int(self._pending.popleft()) if len(self._pending) > LAG else NOTHING
        if agreed != NOTHING:
            self._pending.clear()  # the same request, repeated until it was known
        return agreed

    def now(self, request: int) -> int:
        """What all agree to do, waiting for them."""
        self._pending.clear()
        return largest_of_processes(request)


def check_alike(config: TrainConfig, options: dict[str, Any]) -> None:
    """Raise ConfigError unless all processes have the same hyperparameters, `options`, versions and kind of devices.

    Otherwise they would wait for one another, or their weights would drift apart.
    """
    devices = [device.process_index for device in jax.devices()]
    numbers = [devices.count(process) for process in range(jax.process_count())]
    if len(set(numbers)) > 1:
        raise ConfigError(f"the processes have {', '.join(map(str, numbers))} devices; give all of them as many")
    values = {
        **{f"--{name}": value for name, value in options.items()},
        **{f"--config.{key}": value for key, value in as_json(config).items() if key != "data_dir"},
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "crystalframer-jax")},
        "devices": sorted({device.device_kind for device in jax.local_devices()}),
    }
    first = json_from_first_process(values)
    differing = [f"{key} {first[key]} there, {value} here" for key, value in values.items() if value != first.get(key)]
    if differing:
        raise ConfigError(
            f"process {jax.process_index()} differs from the first ({'; '.join(differing)}): give all processes the "
            "same command, environment and kind of devices"
        )


def agreed_implementation(implementation: Implementation, trace: Callable[[Implementation], object]) -> Implementation:
    """`implementation`; "xla" for "auto" if the kernels do not work in one of several processes.

    `trace` is called with an implementation and raises ImplementationError if that does not work here.
    """
    if implementation != "auto" or jax.process_count() == 1 or jax.default_backend() == "cpu":
        return implementation
    try:
        trace("pallas")
        fails = False
    except ImplementationError:
        fails = True
    return "xla" if largest_of_processes(int(fails)) else implementation
