"""Tiny training runs, for the tests of training and of prediction."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from test_data import small_set

from crystalframer_jax.config import neighbor_cutoff, target_names
from crystalframer_jax.configs import default
from crystalframer_jax.data.registry import TARGET_SETS, target_set
from crystalframer_jax.data.store import open_dataset


@contextlib.contextmanager
def tiny_runs(compiled: Path) -> Iterator[None]:
    """Register the target set "small" (60 crystals), and keep compiled programs in a folder: runs share them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGET_SETS, "small", small_set())
        changes = {
            "jax_compilation_cache_dir": str(compiled),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        before = {name: getattr(jax.config, name) for name in changes}
        for name, value in changes.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def tiny_config(data_dir: Path, **changes) -> ConfigDict:
    """One small block on 60 crystals; three epochs of three steps, the last one averaged."""
    config = default.get_config()
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    config.update(value_pe_dist_real=8, value_pe_angle_real=8, cutoff_radius=4.0)
    config.update(batch_size=16, n_epochs=3, swa_epochs=1, lr=2e-3, sch_params=(20.0,))
    config.update(target_set="small", data_dir=str(data_dir))
    config.update(changes)
    return config


STEPS_PER_EPOCH = 3


def open_tiny(config: ConfigDict):
    """The dataset of a configuration."""
    return open_dataset(target_set(config.target_set), target_names(config), neighbor_cutoff(config), config.data_dir)


def assert_equal_trees(a, b) -> None:
    """Every leaf has the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
