"""What tests of several processes need, without importing JAX."""

import os
import socket
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCHEDULER_VARIABLES = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE")


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with so many CPU devices, without those of a scheduler."""
    variables = {name: v for name, v in os.environ.items() if not name.startswith(SCHEDULER_VARIABLES)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return variables | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
