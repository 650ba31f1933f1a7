"""What the processes of a training must agree on: that they train the same, and with which kernels."""

import contextlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax

from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.model.implementation import Implementation, ImplementationError
from crystalframer_jax.parallel.processes import json_from_first_process, largest_of_processes
from crystalframer_jax.runs.run_directory import as_json


def check_alike(config: TrainConfig, options: dict[str, Any]) -> None:
    """Raises ConfigError unless all processes have the same hyperparameters, `options`, versions and kind of devices.

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
    """Returns `implementation`, but "xla" for "auto" if the kernels do not work in one of several processes.

    `trace` is called with an implementation and raises ImplementationError if that does not work here.
    """
    if implementation != "auto" or jax.process_count() == 1 or jax.default_backend() == "cpu":
        return implementation
    fails = 1
    with contextlib.suppress(ImplementationError):
        trace("pallas")
        fails = 0
    return "xla" if largest_of_processes(fails) else implementation
