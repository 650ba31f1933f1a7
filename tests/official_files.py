"""What tests of official checkpoints need: a tiny model, and files of it as PyTorch Lightning writes them."""

import json
from pathlib import Path, PosixPath

import jax
import numpy as np
import pytest
from support import GOLDEN, random_variables

from crystalframer_jax.config import ModelConfig, validate_model
from crystalframer_jax.official.config import config_from_official
from crystalframer_jax.official.state import official_from_variables

torch = pytest.importorskip("torch")

# One small block with BatchNorm, so that the averaged weights have running averages of their own.
TINY = {"num_layers": 1, "model_dim": 16, "head_num": 2, "ff_dim": 32, "embedding_dim": [16], "norm_type": "bn"}
TINY |= {"value_pe_dist_real": 8, "value_pe_angle_real": 8, "adaptive_cutoff_sigma": -2.0, "param_file": "tiny.json"}
SCALING = {"target_mean": np.array([-2.0], np.float32), "target_std": np.array([3.0], np.float32)}


def tiny_official() -> dict:
    """Official hyperparameters of a tiny model."""
    return golden("max")[0] | TINY


def tiny_states() -> tuple[dict, dict]:
    """Official state dicts of the last and of averaged weights, with the same calibration."""
    config = validate_model(config_from_official(tiny_official())[0]).model
    last, average = distinct_variables(config, 0), distinct_variables(config, 1)
    average["calibration"] = last["calibration"]
    return official_from_variables(last, config), official_from_variables(average, config)


def lightning(official: dict, last: dict, average: dict | None, averaged_steps: int = 0, **changes) -> dict:
    """What PyTorch Lightning stores of the official model, with its names."""
    state = {f"model.{name}": torch.tensor(value) for name, value in last.items()}
    if average is not None:
        state["swa_model.n_averaged"] = torch.tensor(averaged_steps)
        state |= {f"swa_model.module.{name}": torch.tensor(value) for name, value in average.items()}
    state |= {name: torch.tensor(value) for name, value in SCALING.items()}
    return {
        "epoch": 7,
        "global_step": 123,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": PosixPath("/somewhere")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 5e-4}]}],
        "lr_schedulers": [{"base_lrs": [5e-4], "last_epoch": 123, "lr_lambdas": [None]}],
        "hparams_name": None,
        "hyper_parameters": official,
        **changes,
    }


def saved(folder: Path, content: object, name: str = "model.ckpt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def tiny_file(folder: Path) -> Path:
    """A checkpoint of the tiny model with averaged weights."""
    return saved(folder, lightning(tiny_official(), *tiny_states(), averaged_steps=50))


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
