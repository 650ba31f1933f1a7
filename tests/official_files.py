"""What tests of official checkpoints need: a tiny model, and files of it as PyTorch Lightning writes them."""

from pathlib import Path, PosixPath

import numpy as np
import pytest
from official_states import distinct_variables, golden

from crystalframer_jax.config import validate_model
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
