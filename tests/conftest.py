"""Fixtures shared by the tests. Helper functions are in support.py, the float64 reference in brute_force.py."""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest

os.environ.setdefault("CRYSTALFRAMER_COMPILATION_CACHE", "off")  # tests leave the user's folder alone


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
def _programs_of_one_file_only():
    """Drops compiled programs after each file: a process with thousands of them runs out of memory maps and crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def script():
    """scripts/benchmark.py as a module of the test's own."""
    file = Path(__file__).parents[1] / "scripts" / "benchmark.py"
    specification = importlib.util.spec_from_file_location("benchmark_script", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


LONG_FILES = ("test_distributed", "test_interruptions", "test_training", "test_cli", "test_golden", "test_chunks")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that the two processes of scripts/test.sh end together."""
    items.sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))
