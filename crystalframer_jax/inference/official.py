"""Models of the official PyTorch implementation, from hyperparameters and parameters by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from crystalframer_jax.config import (
    WITHOUT_COUNTERPART,
    ConfigError,
    ModelConfig,
    model_config,
    target_names,
    unknown_key_message,
    validate_model,
)
from crystalframer_jax.configs import default
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.training.state import TargetStatistics

Tree = dict[str, Any]


def variables_from_official(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tree]:
    """The variables {"params", "calibration"} of CrystalFramer from an official state dict (weights [out, in]).

    Raises ValueError listing every name that is missing, unexpected or has another shape than the model asks for.
    """
    reader = _Reader(state)
    params: Tree = {"embedding": reader.take("input_embeddings.weight", (config.model_dim, 98)).T}
    calibration: Tree = {}
    for block in range(config.num_layers):
        params[f"block_{block}"], scale, shift = _block(reader, f"encoder.layers.{block}.", config)
        calibration[f"block_{block}"] = {"attention": {"scale": scale, "shift": shift}}
    params |= _head(reader, config)
    reader.finish()
    return {"params": params, "calibration": calibration}


class _Reader:
    """Takes arrays out of a state dict by name and shape, and collects what is wrong."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.left = dict(state)
        self.problems: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.left:
            self.problems.append(f"missing {name} {list(shape)}")
            return np.zeros(shape, np.float32)
        value = np.asarray(self.left.pop(name))
        if value.shape != shape:
            self.problems.append(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
            return np.zeros(shape, np.float32)
        return value

    def dense(self, name: str, inputs: int, outputs: int) -> Tree:
        weight = self.take(f"{name}.weight", (outputs, inputs))
        return {"kernel": weight.T, "bias": self.take(f"{name}.bias", (outputs,))}

    def finish(self) -> None:
        problems = self.problems + [f"unexpected {name}" for name in self.left]
        if problems:
            raise ValueError("the official parameters do not fit the configuration: " + "; ".join(problems))


def _block(reader: _Reader, prefix: str, config: ModelConfig) -> tuple[Tree, np.ndarray, np.ndarray]:
    """Parameters of a block, and (scale, shift) of its calibration."""
    heads, dim, ff_dim = config.head_num, config.model_dim, config.ff_dim
    k_width, v_width = heads * config.k_dim, heads * config.v_dim
    attention = prefix + "self_attn."
    widths = {"q": k_width, "k": k_width, "v": v_width}
    biases = np.split(reader.take(attention + "in_proj_bias", (2 * k_width + v_width,)), [k_width, 2 * k_width])
    tree: Tree = {
        name: {"kernel": reader.take(f"{attention}{name}_proj_weight", (width, dim)).T, "bias": bias}
        for (name, width), bias in zip(widths.items(), biases, strict=True)
    }
    tree["out"] = reader.dense(attention + "out_proj", v_width, dim)
    tree["w_pos"] = reader.take(attention + "lattice_pos_weights", (k_width,)).reshape(heads, config.k_dim)
    encodings = {"w_dist": (["pe_dist_proj"], config.value_pe_dist_real)}
    encodings["w_angle"] = ([f"proj_angle{axis}" for axis in (1, 2, 3)], config.value_pe_angle_real)
    for name, (parts, size) in encodings.items():
        if size:
            shape = (1, heads, config.v_dim, size)
            tree[name] = np.concatenate([reader.take(attention + part, shape) for part in parts])
    scale, shift = reader.take(attention + "gauss_scale", (2,))
    reader.left.pop(attention + "atten_scale", None)  # an unused buffer
    block: Tree = {"attention": tree}
    block["linear1"] = reader.dense(prefix + "linear1", dim, ff_dim)
    block["linear2"] = reader.dense(prefix + "linear2", ff_dim, dim)
    return block, scale, shift


def _head(reader: _Reader, config: ModelConfig) -> Tree:
    """Output layers; the official names count Linear, norm and activation."""
    tree: Tree = {}
    width, widths = config.model_dim, list(config.embedding_dim)
    if config.pre_pooling_op.startswith("w"):
        tree["pre_pooling"] = reader.dense("proj_before_pooling.0", width, widths[0])
        width = widths.pop(0)
    for i, next_width in enumerate(widths):
        tree[f"dense_{i}"] = reader.dense(f"mlp.{3 * i}", width, next_width)
        width = next_width
    tree["output"] = reader.dense(f"mlp.{3 * len(widths)}", width, config.num_targets)
    return tree


def load_official(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Predictor:
    """A Predictor from official hyperparameters and an official state dict (arrays by name).

    `target_mean` and `target_std` in the state give predictions in label units; without them predictions are the raw
    output of the model. Raises ConfigError for settings that are not available, ValueError for names or shapes of
    the state that do not fit.
    """
    ours = default.get_config()
    for key, value in config.items():
        if key not in ours and key not in WITHOUT_COUNTERPART:
            raise ConfigError(unknown_key_message(key, list(ours)))
        if key in ours and key not in ("targets", "target_set"):
            is_several = isinstance(ours[key], tuple)
            ours[key] = tuple(value if isinstance(value, list | tuple) else [value]) if is_several else value
    targets = config.get("targets", "target")
    ours.targets = targets if isinstance(targets, str) else ",".join(targets)
    validate_model(ours)
    state = dict(state)
    names = target_names(ours)
    means = np.broadcast_to(np.asarray(state.pop("target_mean", 0.0), np.float64).ravel(), len(names))
    stds = np.broadcast_to(np.asarray(state.pop("target_std", 1.0), np.float64).ravel(), len(names))
    targets = tuple(
        TargetStatistics(name, "label units", float(mean), float(std))
        for name, mean, std in zip(names, means, stds, strict=True)
    )
    return Predictor(ours, variables_from_official(state, model_config(ours)), targets)
