"""Parameters of the official implementation for tests: those of golden files, and made-up ones, without PyTorch."""

import json

import jax
import numpy as np
from support import GOLDEN, random_variables

from crystalframer_jax.config import ModelConfig


def leaves(tree: dict) -> dict[str, np.ndarray]:
    """Leaves by path."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}


def assert_same(a: dict, b: dict) -> None:
    """The same names, shapes, types and bits."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def distinct_variables(config: ModelConfig, seed: int = 0) -> dict:
    """Variables as Flax makes them, where no two numbers are equal and scales are positive."""
    rng = np.random.default_rng(seed)
    like = {"calibration": {}, "batch_stats": {}, **random_variables(config)}

    def draw(path: tuple, leaf: np.ndarray) -> np.ndarray:
        values = rng.normal(size=np.shape(leaf)).astype(np.float32)
        return np.abs(values) if path[-1].key in ("scale", "var") else values

    return jax.tree_util.tree_map_with_path(draw, like)


def golden(name: str) -> tuple[dict, dict]:
    """Hyperparameters and state dict of a golden file, as the official code wrote them."""
    file = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    state = {key.removeprefix("param/"): file[key] for key in file.files if key.startswith("param/")}
    return json.loads(file["config_json"].tobytes()), state
