"""The cores of a CPU as devices, which share the work of a batch better than the threads of one device do."""

import contextlib
import os
from typing import Any

import jax

MOST = 4  # devices that are made; more would have few crystals each


def use_cores() -> None:
    """Makes JAX take every core of a CPU, at most MOST, for a device of its own, from now on in this process.

    It does not if the number of CPU devices has been chosen (JAX_NUM_CPU_DEVICES, or in XLA_FLAGS), if several
    processes share the work, or if JAX has looked for devices already.
    """
    config: Any = jax.config
    is_chosen = config.jax_num_cpu_devices != -1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not is_chosen and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            config.update("jax_num_cpu_devices", min(_cores(), MOST))


def _cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
