"""The cores of a CPU as devices."""

import os

import forks
import pytest

PROGRAM = """
import os
import jax
if hasattr(os, "sched_getaffinity"):
    os.sched_getaffinity = lambda _: set(range({cores}))
os.cpu_count = lambda: {cores}
{before}
from crystalframer_jax.parallel.cores import use_cores
use_cores()
print(jax.local_device_count())
"""


@pytest.mark.parametrize(
    ("cores", "before", "variables", "expected"),
    [
        (3, "", {}, 3),
        (1, "", {}, 1),
        (64, "", {}, 4),
        (3, "", {"JAX_NUM_CPU_DEVICES": "2"}, 2),
        (3, "", {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, 2),
        (3, "jax.devices()", {}, 1),
        (3, "jax.distributed.is_initialized = lambda: True", {}, 1),
    ],
)
def test_every_core_is_a_device_unless_somebody_has_chosen(cores, before, variables, expected):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    environment |= {"JAX_PLATFORMS": "cpu", **variables}
    found = forks.run("-c", PROGRAM.format(cores=cores, before=before), environment=environment)
    assert int(found.stdout) == expected
