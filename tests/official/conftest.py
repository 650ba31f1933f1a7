"""Tiny official models and their files; importing what makes them skips tests where PyTorch is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_runs


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Iterator[None]:
    """Keeps compiled programs of runs on the target set "small"."""
    with tiny_runs():
        yield


@pytest.fixture(scope="module")
def official() -> dict:
    """Official hyperparameters."""
    from official_files import tiny_official

    return tiny_official()


@pytest.fixture(scope="module")
def states() -> tuple[dict, dict]:
    """Official state dicts of last and averaged weights."""
    from official_files import tiny_states

    return tiny_states()


@pytest.fixture(scope="module")
def averaged_file(tmp_path_factory) -> Path:
    """A checkpoint with averaged weights."""
    from official_files import tiny_file

    return tiny_file(tmp_path_factory.mktemp("averaged"))
