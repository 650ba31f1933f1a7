"""Fixtures shared by the tests. Helper functions are in support.py, the float64 reference in brute_force.py."""

import gc
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Most of the time is spent compiling. Programs are compiled in haste, but for those that tests want as users compile
# them, and kept for all processes and the next run. As users compile all of them:
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= scripts/test.sh
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
MOST_BYTES = 2 * 10**9
MOST_MAPS = 20_000  # of memory: a process may have 65,530
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
flags = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_force_host_platform_device_count=1"
os.environ.setdefault("XLA_FLAGS", flags)  # one device: users have one for each core
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("CRYSTALFRAMER_COMPILATION_CACHE", "off")  # the user's folder is left alone

# Files of tests stand in memory where there is room: checkpoints and prepared sets wait for the disk to have them.
MEMORY = "/dev/shm"
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 10**9:
    tempfile.tempdir = os.environ["TMPDIR"] = MEMORY

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from scheduling import OneWaits, waits  # noqa: E402


def pytest_configure(config):
    """Empties the folder of compiled programs when it has grown too large; before other processes start."""
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in PROGRAMS.glob("*")) > MOST_BYTES:
        shutil.rmtree(PROGRAMS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a process of its own to the tests that wait most of their time."""
    return OneWaits(config, log) if config.getvalue("dist") == "worksteal" else None


def pytest_collection_modifyitems(items):
    """Begins with those that wait: at the end nothing else would be left to do meanwhile."""
    items.sort(key=lambda item: not waits(item.nodeid))


def pytest_collection_finish():
    """Looks for garbage less often, and not among what was imported: that took an eighth of the time."""
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    """Runs a test in float32, as users do, and in float64 with x64 switched on for this test only."""
    with jax.enable_x64(request.param == np.float64):
        yield request.param


@pytest.fixture
def x64():
    """Switches float64 on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Drops compiled programs before they are so many that the process runs out of memory maps and crashes."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def script():
    """scripts/benchmark.py as a module of the test's own."""
    file = Path(__file__).parents[1] / "scripts" / "benchmark.py"
    specification = importlib.util.spec_from_file_location("benchmark_script", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
