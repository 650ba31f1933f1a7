"""Models of the official PyTorch implementation: its names and shapes of parameters, in both directions."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.official.config import config_from_official

Tree = dict[str, Any]
Arrays = dict[str, np.ndarray]
Leaf = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # of official arrays
UNKNOWN_UNIT, RAW_UNIT = "label units", "raw output"
MAX_PROBLEMS, MAX_PROBLEM_CHARACTERS = 10, 200  # that are listed in an error


class OfficialStateError(UserError, ValueError):
    """Official parameters that do not fit the configuration; the message lists all that is wrong."""


def variables_from_official(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tree]:
    """Makes the variables {"params", "calibration", "batch_stats"} of CrystalFramer of an official state dict.

    `state`: arrays under the official names, without the prefix "model."; weights [out, in].

    Raises OfficialStateError listing the names that are missing, unexpected, not of finite floating-point numbers or of
    another shape than the model asks for, and if the widths of the attention Gaussians were never calibrated, which
    the first training batch does.
    """
    blocks = len({match[1] for match in (re.match(r"encoder\.layers\.(\d+)\.", name) for name in state) if match})
    if blocks != config.num_layers:  # said first: each block has two dozen names
        word = "block" if blocks == 1 else "blocks"
        raise OfficialStateError(f"the state dict has {blocks} {word}, num_layers={config.num_layers}")
    layout = _Layout()
    tree = _variables(layout, config)
    _check_state(state, layout, config.dtype)
    widths = [name for name in layout.shapes if name.endswith("gauss_scale") and name not in layout.unused]
    uncalibrated = [name for name in widths if not state[name][0] > 0]  # as the official code asks
    if uncalibrated:
        raise OfficialStateError(
            f"the official model was never trained: {_listed(uncalibrated)} not set, which the first "
            "training batch does"
        )
    return jax.tree.map(lambda leaf: leaf(state), tree)


def official_from_variables(variables: Mapping[str, Tree], config: ModelConfig) -> Arrays:
    """Makes an official state dict, complete and in the official shapes: `variables_from_official` undone.

    What the official code stores and never uses is zero. Raises OfficialStateError if the variables are of another
    model than `config`.
    """
    layout = _Layout()
    return _placed(layout, _variables(layout, config), dict(variables))[0]


def official_from_params(params: Tree, config: ModelConfig) -> Arrays:
    """Makes official arrays of the parameters alone, or of what has their structure (gradients), by name and shape."""
    layout = _Layout()
    arrays, is_trained = _placed(layout, _variables(layout, config)["params"], params)
    return {name: value for name, value in arrays.items() if is_trained[name]}


class _Layout:
    """The official names of a model with their shapes, collected while a tree of leaves is made that read them."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unused: set[str] = set()  # that the official code stores, and that have no effect

    def take(self, name: str, shape: tuple[int, ...], part: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Leaf:
        """Returns a leaf that is the array of that name, or a part of it."""
        self.shapes[name] = shape
        return lambda state: part(np.asarray(state[name]))

    def skip(self, name: str, shape: tuple[int, ...]) -> None:
        """Notes a name without effect."""
        self.shapes[name] = shape
        self.unused.add(name)

    def calibration(self, name: str) -> Tree:
        """Lays out scale and shift of the Gaussian widths of a block."""
        return {part: self.take(name, (2,), operator.itemgetter(i)) for i, part in enumerate(("scale", "shift"))}

    def dense(self, name: str, inputs: int, outputs: int) -> Tree:
        """Lays out a dense layer."""
        kernel = self.take(f"{name}.weight", (outputs, inputs), np.transpose)
        return {"kernel": kernel, "bias": self.take(f"{name}.bias", (outputs,))}

    def norm(self, name: str, width: int) -> Tree:
        """Lays out scale and bias of a normalisation."""
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def running_averages(self, name: str, width: int) -> Tree:
        """Lays out the running averages of a BatchNorm."""
        self.skip(f"{name}.num_batches_tracked", ())
        return {
            "mean": self.take(f"{name}.running_mean", (width,)),
            "var": self.take(f"{name}.running_var", (width,)),
        }


def _check_state(state: Mapping[str, np.ndarray], layout: _Layout, dtype: np.dtype) -> None:
    """Raises OfficialStateError, listing all that is wrong, unless a state dict has these arrays."""
    needed = {name: shape for name, shape in layout.shapes.items() if name not in layout.unused}
    found = [_problem(name, state.get(name), shape, dtype) for name, shape in needed.items()]
    problems = [problem for problem in found if problem]
    problems += [f"unexpected {name}" for name in state if name not in layout.shapes]
    if problems:
        raise OfficialStateError(f"the official parameters do not fit the configuration: {_listed(problems)}")


def _problem(name: str, stored: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """Tells what is wrong with an array, if anything."""
    if stored is None:
        return f"missing {name} {list(shape)}"
    value = np.asarray(stored)
    if value.shape != shape:
        return f"{name} has shape {list(value.shape)}, expected {list(shape)}"
    if not jax.dtypes.issubdtype(value.dtype, np.floating):
        return f"{name} is {value.dtype}, not floating-point"
    with np.errstate(over="ignore"):
        finite = np.isfinite(value.astype(dtype, copy=False)).all()
    return "" if finite else f"{name} has values that are not finite in {dtype}"


def _placed(layout: _Layout, tree: Tree, values: Tree) -> tuple[Arrays, dict[str, bool]]:
    """Puts `values` where the leaves of `tree` read them, by name, zero elsewhere; tells which names have any.

    The leaves are given running numbers in place of arrays to read, and so tell where they belong.
    """
    ends = np.cumsum([math.prod(shape) for shape in layout.shapes.values()])
    numbers = {
        name: np.arange(end - math.prod(shape), end).reshape(shape)
        for (name, shape), end in zip(layout.shapes.items(), ends, strict=True)
    }
    where, what = _leaves(jax.tree.map(lambda leaf: leaf(numbers), tree)), _leaves(values)
    problems = [f"missing {name}" for name in where if name not in what]
    problems += [f"unexpected {name}" for name in what if name not in where]
    for name in where.keys() & what.keys():
        if where[name].shape != what[name].shape:
            problems.append(f"{name} has shape {list(what[name].shape)}, expected {list(where[name].shape)}")
    if problems:
        raise OfficialStateError(f"the variables do not fit the configuration: {_listed(sorted(problems))}")
    flat, is_placed = np.zeros(ends[-1], np.result_type(*what.values())), np.zeros(ends[-1], bool)
    for name, place in where.items():
        flat[place], is_placed[place] = what[name], True
    arrays = {
        name: flat[number].astype(np.int64) if name.endswith("num_batches_tracked") else flat[number]
        for name, number in numbers.items()
    }
    return arrays, {name: bool(is_placed[number].any()) for name, number in numbers.items()}


def _listed(problems: Sequence[str]) -> str:
    """Lists the first problems, and how many more there are."""
    shown = [problem[:MAX_PROBLEM_CHARACTERS] for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _leaves(tree: Tree) -> Arrays:
    """Returns the leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _variables(layout: _Layout, config: ModelConfig) -> dict[str, Tree]:
    """Lays out the variables of a model as leaves by official name: the one place that knows both sides."""
    dim = config.model_dim
    params: Tree = {"embedding": layout.take("input_embeddings.weight", (dim, 98), np.transpose)}
    calibration: Tree = {}
    for block in range(config.num_layers):
        prefix = f"encoder.layers.{block}."
        params[f"block_{block}"] = _block(layout, prefix, config, config.domain_of_block(block))
        if config.normalize_gauss:
            widths = layout.calibration(prefix + "self_attn.gauss_scale")
            calibration[f"block_{block}"] = {"attention": widths}
        else:
            layout.skip(prefix + "self_attn.gauss_scale", (2,))
        layout.skip(prefix + "self_attn.atten_scale", (1,))
    if not config.t_fixup_init:
        params["norm"] = layout.norm("encoder.norm", dim)
    head, batch_stats = _head(layout, config)
    return {"params": params | head, "calibration": calibration, "batch_stats": batch_stats}


def _block(layout: _Layout, prefix: str, config: ModelConfig, domain: str) -> Tree:
    """Lays out the parameters of a block."""
    dim, ff_dim = config.model_dim, config.ff_dim
    tree: Tree = {"attention": _attention(layout, prefix + "self_attn.", config, domain)}
    tree["linear1"] = layout.dense(prefix + "linear1", dim, ff_dim)
    tree["linear2"] = layout.dense(prefix + "linear2", ff_dim, dim)
    if not config.t_fixup_init:
        tree |= {name: layout.norm(prefix + name, dim) for name in ("norm1", "norm2")}
    return tree


def _attention(layout: _Layout, prefix: str, config: ModelConfig, domain: str) -> Tree:
    """Lays out the parameters of the attention of a block."""
    heads, dim = config.head_num, config.model_dim
    k_width, v_width = heads * config.k_dim, heads * config.v_dim
    widths = {"q": k_width, "k": k_width, "v": v_width}
    tree: Tree = {}
    end = 0
    for name, width in widths.items():
        start, end = end, end + width
        kernel = layout.take(f"{prefix}{name}_proj_weight", (width, dim), np.transpose)
        bias = layout.take(prefix + "in_proj_bias", (2 * k_width + v_width,), operator.itemgetter(slice(start, end)))
        tree[name] = {"kernel": kernel, "bias": bias}
    tree["out"] = layout.dense(prefix + "out_proj", v_width, dim)
    by_input = config.gauss_state.startswith("x")  # the widths are functions of the layer input, not of q
    stored: tuple[int, ...] = (heads, dim) if by_input else (k_width,)
    tree["w_pos"] = layout.take(prefix + "lattice_pos_weights", stored, lambda weights: weights.reshape(heads, -1))
    if domain not in ("real", "multihead"):
        return tree
    # The official dist weights of a multihead block have all heads, of which only the real half is used.
    real_heads = heads // 2 if domain == "multihead" else heads
    encodings = [
        ("w_dist", ["pe_dist_proj"], heads, config.value_pe_dist_real),
        ("w_angle", [f"proj_angle{axis}" for axis in (1, 2, 3)], real_heads, config.value_pe_angle_real),
    ]
    for name, parts, stored_heads, size in encodings:
        if size:
            shape = (1, stored_heads, config.v_dim, size)
            leaves = [layout.take(prefix + part, shape, lambda weights: weights[:, :real_heads]) for part in parts]
            tree[name] = lambda state, leaves=leaves: np.concatenate([leaf(state) for leaf in leaves])
    return tree


def _head(layout: _Layout, config: ModelConfig) -> tuple[Tree, Tree]:
    """Lays out parameters and running averages of the output layers; official names count Linear, norm, activation."""
    params: Tree = {}
    batch_stats: Tree = {}

    def norm(official: str, name: str, width: int) -> None:
        if config.norm_type in ("bn", "ln"):
            params[name] = layout.norm(official, width)
        if config.norm_type == "bn":
            batch_stats[name] = layout.running_averages(official, width)

    width, widths = config.model_dim, list(config.embedding_dim)
    if config.pre_pooling_op.startswith("w"):
        params["pre_pooling"] = layout.dense("proj_before_pooling.0", width, widths[0])
        width = widths.pop(0)
    if config.pre_pooling_op == "w+bn+relu":
        norm("proj_before_pooling.1", "pre_pooling_norm", width)
    for i, next_width in enumerate(widths):
        params[f"dense_{i}"] = layout.dense(f"mlp.{3 * i}", width, next_width)
        norm(f"mlp.{3 * i + 1}", f"dense_{i}_norm", next_width)
        width = next_width
    params["output"] = layout.dense(f"mlp.{3 * len(widths)}", width, config.num_targets)
    return params, batch_stats


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

    Without both they are 0 and 1, and the unit is "raw output" whatever `units` says.
    """
    if mean is None or std is None:
        return tuple(TargetStatistics(name, RAW_UNIT, 0.0, 1.0) for name in names)
    means, stds = (_one_for_each(names, *given) for given in (("target_mean", mean), ("target_std", std)))
    if not min(stds) > 0:
        raise OfficialStateError(f"target_std = {_listed([str(value) for value in stds])} must be positive")
    units = units or (UNKNOWN_UNIT,) * len(names)
    return tuple(TargetStatistics(*values) for values in zip(names, units, means, stds, strict=True))


def _one_for_each(names: tuple[str, ...], key: str, values: Any) -> list[float]:
    """Returns a finite number for each target."""
    flat = np.ravel(np.asarray(values))
    if flat.size not in (1, len(names)):
        raise OfficialStateError(f"{key} has {flat.size} numbers for {len(names)} targets; one for each is needed")
    if flat.dtype.kind not in "fiu" or not np.isfinite(flat).all():
        raise OfficialStateError(f"{key} = {_listed([str(value) for value in flat])}: finite numbers are needed")
    return np.broadcast_to(flat.astype(np.float64), len(names)).tolist()
