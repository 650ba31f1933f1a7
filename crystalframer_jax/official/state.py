"""Models of the official PyTorch implementation: its names and shapes of parameters, in both directions."""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.official.config import config_from_official

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]
Leaf = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # of official arrays
RAW_UNIT = "raw output"
MAX_PROBLEMS = 10  # that are listed in an error


class OfficialStateError(UserError, ValueError):
    """Official parameters that do not fit the configuration; the message lists all that is wrong."""


def variables_from_official(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tree]:
    """Makes the variables {"params", "calibration", "batch_stats"} of CrystalFramer of an official state dict.

    `state`: arrays under the official names, without the prefix "model."; weights [out, in]. The variables keep
    their types, and may share their memory.

    Raises OfficialStateError listing the names that are missing, unexpected, not of finite floating-point numbers or of
    another shape than the model asks for, and if the widths of the attention Gaussians were never calibrated, which
    the first training batch does.
    """
    blocks = len(set(re.findall(r"^encoder\.layers\.(\d+)\.", "\n".join(state), re.MULTILINE)))
    if blocks != config.num_layers:  # said first: each block has two dozen names
        word = "block" if blocks == 1 else "blocks"
        raise OfficialStateError(f"the state dict has {blocks} {word}, num_layers={config.num_layers}")
    layout = _layout(config)
    arrays = {name: np.asarray(value) for name, value in state.items()}
    problems = _misfits(layout.shapes, arrays, layout.unused)
    flaws = {name: _flaw(arrays[name], config.dtype) for name in layout.shapes if name in arrays}
    problems += [f"{name} {flaw}" for name, flaw in flaws.items() if flaw]
    if problems:
        raise OfficialStateError(f"the official parameters do not fit the configuration: {_listed(problems)}")
    # The official code asks the same of the scale.
    uncalibrated = [name for name in layout.shapes if name.endswith("gauss_scale") and not arrays[name][0] > 0]
    if uncalibrated:
        raise OfficialStateError(
            f"the official model was never trained: {_listed(uncalibrated)} not set, which the first "
            "training batch does"
        )
    leaves = {path: leaf(arrays) for path, leaf in layout.leaves.items()}
    return {"calibration": {}, "batch_stats": {}} | unflatten_dict(leaves, sep="/")


def official_from_variables(variables: Tree, config: ModelConfig) -> Arrays:
    """Makes an official state dict, complete and in the official shapes: `variables_from_official` undone.

    What the official code stores and never uses is zero. Raises OfficialStateError if the variables are of another
    model than `config`.
    """
    layout = _layout(config)
    # The leaves are given running numbers in place of arrays to read, and so tell where they belong.
    numbers: Arrays = {}
    size = 0
    for name, shape in layout.shapes.items():
        numbers[name] = size + np.arange(math.prod(shape)).reshape(shape)
        size += numbers[name].size
    places = {path: leaf(numbers) for path, leaf in layout.leaves.items()}
    values = {path: np.asarray(value) for path, value in flatten_dict(variables, sep="/").items()}
    problems = _misfits({path: place.shape for path, place in places.items()}, values)
    if problems:
        raise OfficialStateError(f"the variables do not fit the configuration: {_listed(problems)}")
    flat = np.zeros(size, np.result_type(*values.values()))
    for path, place in places.items():
        flat[place] = values[path]
    state = {name: flat[number] for name, number in numbers.items()}
    for name, shape in layout.unused.items():
        state[name] = np.zeros(shape, np.int64 if name.endswith("num_batches_tracked") else flat.dtype)
    return state


class _Layout:
    """The leaves of our variables by path, as functions of official arrays by name."""

    def __init__(self) -> None:
        self.leaves: dict[str, Leaf] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the arrays that the leaves read
        self.unused: dict[str, tuple[int, ...]] = {}  # that the official code stores, and that have no effect

    def take(self, name: str, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Leaf:
        """Returns a leaf that is the array of that name, or a part of it."""
        self.shapes[name] = shape
        return lambda state: part(state[name])

    def dense(self, path: str, name: str, inputs: int, outputs: int) -> None:
        """Lays out a dense layer."""
        self.leaves[f"{path}/kernel"] = self.take(f"{name}.weight", (outputs, inputs), np.transpose)
        self.leaves[f"{path}/bias"] = self.take(f"{name}.bias", (outputs,))

    def norm(self, path: str, name: str, width: int) -> None:
        """Lays out scale and bias of a normalisation."""
        self.leaves[f"{path}/scale"] = self.take(f"{name}.weight", (width,))
        self.leaves[f"{path}/bias"] = self.take(f"{name}.bias", (width,))


def _misfits(shapes: Mapping[str, tuple[int, ...]], found: Arrays, allowed: Collection[str] = ()) -> list[str]:
    """Lists what is missing, of another shape, or not asked for."""
    problems = [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in found]
    for name, value in found.items():
        if name not in shapes and name not in allowed:
            problems.append(f"unexpected {name}")
        elif name in shapes and value.shape != shapes[name]:
            problems.append(f"{name} has shape {list(value.shape)}, expected {list(shapes[name])}")
    return problems


def _flaw(value: np.ndarray, dtype: np.dtype) -> str:
    """Tells what is wrong with the numbers of a parameter, if anything."""
    if not jax.dtypes.issubdtype(value.dtype, np.floating):
        return f"is {value.dtype}, not floating-point"
    with np.errstate(over="ignore"):
        finite = np.isfinite(value.astype(dtype, copy=False)).all()
    return "" if finite else f"has values that are not finite in {dtype}"


def _listed(problems: Sequence[Any]) -> str:
    """Lists the first problems, and how many more there are."""
    shown = [f"{problem!s:.200}" for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _layout(config: ModelConfig) -> _Layout:
    """Lays out the variables of a model: the one place that knows both sides."""
    layout, dim = _Layout(), config.model_dim
    layout.leaves["params/embedding"] = layout.take("input_embeddings.weight", (dim, 98), np.transpose)
    for number in range(config.num_layers):
        path, name = f"params/block_{number}", f"encoder.layers.{number}"
        _attention(layout, f"{path}/attention/", f"{name}.self_attn.", config, config.domain_of_block(number))
        layout.dense(f"{path}/linear1", f"{name}.linear1", dim, config.ff_dim)
        layout.dense(f"{path}/linear2", f"{name}.linear2", config.ff_dim, dim)
        if not config.t_fixup_init:
            layout.norm(f"{path}/norm1", f"{name}.norm1", dim)
            layout.norm(f"{path}/norm2", f"{name}.norm2", dim)
        widths = f"{name}.self_attn.gauss_scale"
        if config.normalize_gauss:
            for i, part in enumerate(("scale", "shift")):
                leaf = layout.take(widths, (2,), operator.itemgetter(i))
                layout.leaves[f"calibration/block_{number}/attention/{part}"] = leaf
        else:
            layout.unused[widths] = (2,)
        layout.unused[f"{name}.self_attn.atten_scale"] = (1,)
    if not config.t_fixup_init:
        layout.norm("params/norm", "encoder.norm", dim)
    _head(layout, config)
    return layout


def _attention(layout: _Layout, path: str, name: str, config: ModelConfig, domain: str) -> None:
    """Lays out the parameters of the attention of a block."""
    heads, dim = config.head_num, config.model_dim
    k_width, v_width = heads * config.k_dim, heads * config.v_dim
    end = 0
    for part, width in (("q", k_width), ("k", k_width), ("v", v_width)):
        start, end = end, end + width
        layout.leaves[f"{path}{part}/kernel"] = layout.take(f"{name}{part}_proj_weight", (width, dim), np.transpose)
        biases = layout.take(f"{name}in_proj_bias", (2 * k_width + v_width,), operator.itemgetter(slice(start, end)))
        layout.leaves[f"{path}{part}/bias"] = biases
    layout.dense(f"{path}out", f"{name}out_proj", v_width, dim)
    by_input = config.gauss_state.startswith("x")  # the widths are functions of the layer input, not of q
    stored: tuple[int, ...] = (heads, dim) if by_input else (k_width,)
    w_pos = layout.take(f"{name}lattice_pos_weights", stored, lambda weights: weights.reshape(heads, -1))
    layout.leaves[f"{path}w_pos"] = w_pos
    if domain not in ("real", "multihead"):
        return
    # The official dist weights of a multihead block have all heads, of which only the real half is used.
    real_heads = heads // 2 if domain == "multihead" else heads

    def encoding(parts: list[str], stored_heads: int, size: int) -> Leaf:
        shape = (1, stored_heads, config.v_dim, size)
        leaves = [layout.take(name + part, shape, lambda weights: weights[:, :real_heads]) for part in parts]
        return lambda state: np.concatenate([leaf(state) for leaf in leaves])

    if config.value_pe_dist_real:
        layout.leaves[f"{path}w_dist"] = encoding(["pe_dist_proj"], heads, config.value_pe_dist_real)
    if config.value_pe_angle_real:
        angles = [f"proj_angle{axis}" for axis in (1, 2, 3)]
        layout.leaves[f"{path}w_angle"] = encoding(angles, real_heads, config.value_pe_angle_real)


def _head(layout: _Layout, config: ModelConfig) -> None:
    """Lays out the output layers; official names count Linear, norm, activation."""

    def norm(key: str, name: str, width: int) -> None:
        if config.norm_type in ("bn", "ln"):
            layout.norm(f"params/{key}", name, width)
        if config.norm_type == "bn":
            layout.leaves[f"batch_stats/{key}/mean"] = layout.take(f"{name}.running_mean", (width,))
            layout.leaves[f"batch_stats/{key}/var"] = layout.take(f"{name}.running_var", (width,))
            layout.unused[f"{name}.num_batches_tracked"] = ()

    width, widths = config.model_dim, list(config.embedding_dim)
    if config.pre_pooling_op.startswith("w"):
        layout.dense("params/pre_pooling", "proj_before_pooling.0", width, widths[0])
        width = widths.pop(0)
    if config.pre_pooling_op == "w+bn+relu":
        norm("pre_pooling_norm", "proj_before_pooling.1", width)
    for i, next_width in enumerate(widths):
        layout.dense(f"params/dense_{i}", f"mlp.{3 * i}", width, next_width)
        norm(f"dense_{i}_norm", f"mlp.{3 * i + 1}", next_width)
        width = next_width
    layout.dense("params/output", f"mlp.{3 * len(widths)}", width, config.num_targets)


def load_official(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Predictor:
    """Makes a Predictor of official hyperparameters and an official state dict (arrays by name).

    `target_mean` and `target_std` in the state give predictions in label units; without both predictions are the raw
    output of the model. Raises ConfigError for settings that are not available and hyperparameters of the model that
    are missing, OfficialStateError (a ValueError) for names, shapes or numbers of the state that do not fit.
    """
    ours, _ = config_from_official(config)
    state = dict(state)
    scaling = state.pop("target_mean", None), state.pop("target_std", None)
    targets = target_statistics(ours.targets, *scaling)
    return Predictor(ours, variables_from_official(state, ours.model), targets)


def target_statistics(
    names: tuple[str, ...],
    mean: np.ndarray | Sequence[float] | float | None,
    std: np.ndarray | Sequence[float] | float | None,
    units: tuple[str, ...] = (),
) -> tuple[TargetStatistics, ...]:
    """Makes statistics by target of mean and standard deviation [T], or one for all targets.

    Without both they are 0 and 1, and the unit is "raw output" whatever `units` says; without `units` it is unknown.
    """
    if mean is None or std is None:
        return tuple(TargetStatistics(name, RAW_UNIT, 0.0, 1.0) for name in names)
    columns = []
    for key, given in (("target_mean", mean), ("target_std", std)):
        values = np.ravel(np.asarray(given))
        if values.size not in (1, len(names)):
            raise OfficialStateError(
                f"{key} has {values.size} numbers for {len(names)} targets; one for each is needed"
            )
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise OfficialStateError(f"{key} = {_listed(values.tolist())}: finite numbers are needed")
        if key == "target_std" and not values.min() > 0:
            raise OfficialStateError(f"{key} = {_listed(values.tolist())} must be positive")
        columns.append(np.broadcast_to(values.astype(np.float64), len(names)).tolist())
    units = units or ("label units",) * len(names)
    return tuple(TargetStatistics(*values) for values in zip(names, units, *columns, strict=True))
