"""Models of the official PyTorch implementation: its names and shapes of parameters, in both directions."""

import math
import re
from collections.abc import Mapping, Sequence
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
UNKNOWN_UNIT, RAW_UNIT = "label units", "raw output"
MAX_PROBLEMS, MAX_PROBLEM_CHARACTERS = 10, 200  # that are listed in an error
MAX_ELEMENTS = 2**40  # of an array; larger ones are asked for by senseless hyperparameters only


class OfficialStateError(UserError, ValueError):
    """Official parameters that do not fit the configuration; the message lists all that is wrong."""


def variables_from_official(state: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Tree]:
    """The variables {"params", "calibration", "batch_stats"} of CrystalFramer from an official state dict.

    `state`: arrays under the official names, without the prefix "model."; weights [out, in].

    Raises OfficialStateError listing the names that are missing, unexpected, not of finite floating-point numbers or of
    another shape than the model asks for, and if the widths of the attention Gaussians were never calibrated, which
    the first training batch does.
    """
    blocks = len({match[1] for match in (re.match(r"encoder\.layers\.(\d+)\.", name) for name in state) if match})
    if blocks != config.num_layers:  # said first: each block has two dozen names
        word = "block" if blocks == 1 else "blocks"
        raise OfficialStateError(f"the state dict has {blocks} {word}, num_layers={config.num_layers}")
    reader = _Reader(state, config.dtype)
    variables = _variables(reader, config)
    reader.finish()
    return variables


def official_from_variables(variables: Mapping[str, Tree], config: ModelConfig) -> Arrays:
    """The official state dict, complete and in the official shapes, of our variables: `variables_from_official` undone.

    What the official code stores and never uses is zero. Raises OfficialStateError if the variables are of another
    model than `config`.
    """
    numbers = _Numbers()
    places = _variables(numbers, config)
    return numbers.put(places, dict(variables))


def official_from_params(params: Tree, config: ModelConfig) -> Arrays:
    """The trained parameters alone, or whatever has their structure (gradients), by official name and shape."""
    numbers = _Numbers()
    places = _variables(numbers, config)["params"]
    is_trained = np.zeros(numbers.total, bool)
    for place in jax.tree.leaves(places):
        is_trained[place] = True
    arrays = numbers.put(places, params)
    return {name: value for name, value in arrays.items() if is_trained[numbers.numbers[name]].any()}


class _Names:
    """Hands out arrays by official name and shape. What they are is decided by the two kinds below."""

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array of that name."""
        raise NotImplementedError

    def unused(self, name: str, shape: tuple[int, ...]) -> None:
        """Note a name that the official code stores and that has no effect."""
        raise NotImplementedError

    def concatenate(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Arrays one after the other along the first axis."""
        return np.concatenate(arrays)

    def calibration(self, name: str) -> Tree:
        """Scale and shift of the Gaussian widths of a block."""
        scale, shift = self.take(name, (2,))
        return {"scale": scale, "shift": shift}

    def dense(self, name: str, inputs: int, outputs: int) -> Tree:
        """A dense layer."""
        weight = self.take(f"{name}.weight", (outputs, inputs))
        return {"kernel": weight.T, "bias": self.take(f"{name}.bias", (outputs,))}

    def norm(self, name: str, width: int) -> Tree:
        """Scale and bias of a normalisation."""
        return {"scale": self.take(f"{name}.weight", (width,)), "bias": self.take(f"{name}.bias", (width,))}

    def running_averages(self, name: str, width: int) -> Tree:
        """Running averages of a BatchNorm."""
        self.unused(f"{name}.num_batches_tracked", ())
        return {
            "mean": self.take(f"{name}.running_mean", (width,)),
            "var": self.take(f"{name}.running_var", (width,)),
        }


class _Reader(_Names):
    """Takes arrays out of a state dict, and collects what is wrong.

    In place of what is wrong it hands out a zero that only looks like an array: the shapes are those that the
    hyperparameters ask for, which may be any.
    """

    def __init__(self, state: Mapping[str, np.ndarray], dtype: np.dtype):
        self.left = dict(state)
        self.dtype = dtype
        self.problems: list[str] = []
        self.uncalibrated: list[str] = []

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.left:
            problem = f"missing {name} {list(shape)}"
        else:
            value = np.asarray(self.left.pop(name))
            problem = self._problem(name, value, shape)
            if not problem:
                return value
        self.problems.append(problem)
        if math.prod(shape) > MAX_ELEMENTS:
            self.left.clear()  # nobody looked for the others yet
            self.finish()
        return np.broadcast_to(np.float32(0), shape)

    def _problem(self, name: str, value: np.ndarray, shape: tuple[int, ...]) -> str:
        """What is wrong with an array, if anything."""
        if value.shape != shape:
            return f"{name} has shape {list(value.shape)}, expected {list(shape)}"
        if not jax.dtypes.issubdtype(value.dtype, np.floating):
            return f"{name} is {value.dtype}, not floating-point"
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(self.dtype, copy=False)).all()
        return "" if finite else f"{name} has values that are not finite in {self.dtype}"

    def concatenate(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return arrays[0] if self.problems else super().concatenate(arrays)

    def unused(self, name: str, shape: tuple[int, ...]) -> None:
        self.left.pop(name, None)

    def calibration(self, name: str) -> Tree:
        before = len(self.problems)
        values = super().calibration(name)
        if len(self.problems) == before and not values["scale"] > 0:  # as the official code asks
            self.uncalibrated.append(name)
        return values

    def finish(self) -> None:
        problems = self.problems + [f"unexpected {name}" for name in self.left]
        if problems:
            raise OfficialStateError(f"the official parameters do not fit the configuration: {_listed(problems)}")
        if self.uncalibrated:
            raise OfficialStateError(
                f"the official model was never trained: {_listed(self.uncalibrated)} not set, which the first "
                "training batch does"
            )


class _Numbers(_Names):
    """Gives out running numbers in place of arrays, so that a tree of them tells where each of its leaves belongs."""

    def __init__(self) -> None:
        self.numbers: dict[str, np.ndarray] = {}
        self.total = 0

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        start = self.total
        self.total += int(np.prod(shape))
        self.numbers[name] = np.arange(start, self.total).reshape(shape)
        return self.numbers[name]

    def unused(self, name: str, shape: tuple[int, ...]) -> None:
        self.take(name, shape)

    def put(self, places: Tree, values: Tree) -> Arrays:
        """Arrays by name with the leaves of `values` where `places` says, and zero elsewhere."""
        where, what = _leaves(places), _leaves(values)
        problems = [f"missing {name}" for name in where if name not in what]
        problems += [f"unexpected {name}" for name in what if name not in where]
        for name in where.keys() & what.keys():
            if where[name].shape != what[name].shape:
                problems.append(f"{name} has shape {list(what[name].shape)}, expected {list(where[name].shape)}")
        if problems:
            raise OfficialStateError(f"the variables do not fit the configuration: {_listed(sorted(problems))}")
        flat = np.zeros(self.total, np.result_type(*what.values()))
        for name, place in where.items():
            flat[place] = what[name]
        arrays = {name: flat[number] for name, number in self.numbers.items()}
        return {
            name: value.astype(np.int64) if name.endswith("num_batches_tracked") else value
            for name, value in arrays.items()
        }


def _listed(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    shown = [problem[:MAX_PROBLEM_CHARACTERS] for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _leaves(tree: Tree) -> Arrays:
    """Leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _variables(names: _Names, config: ModelConfig) -> dict[str, Tree]:
    """The variables of a model, made of arrays by official name: the one place that knows both sides."""
    dim = config.model_dim
    params: Tree = {"embedding": names.take("input_embeddings.weight", (dim, 98)).T}
    calibration: Tree = {}
    for block in range(config.num_layers):
        prefix = f"encoder.layers.{block}."
        params[f"block_{block}"] = _block(names, prefix, config, config.domain_of_block(block))
        if config.normalize_gauss:
            widths = names.calibration(prefix + "self_attn.gauss_scale")
            calibration[f"block_{block}"] = {"attention": widths}
        else:
            names.unused(prefix + "self_attn.gauss_scale", (2,))
        names.unused(prefix + "self_attn.atten_scale", (1,))
    if not config.t_fixup_init:
        params["norm"] = names.norm("encoder.norm", dim)
    head, batch_stats = _head(names, config)
    return {"params": params | head, "calibration": calibration, "batch_stats": batch_stats}


def _block(names: _Names, prefix: str, config: ModelConfig, domain: str) -> Tree:
    """Parameters of a block."""
    dim, ff_dim = config.model_dim, config.ff_dim
    tree: Tree = {"attention": _attention(names, prefix + "self_attn.", config, domain)}
    tree["linear1"] = names.dense(prefix + "linear1", dim, ff_dim)
    tree["linear2"] = names.dense(prefix + "linear2", ff_dim, dim)
    if not config.t_fixup_init:
        tree |= {name: names.norm(prefix + name, dim) for name in ("norm1", "norm2")}
    return tree


def _attention(names: _Names, prefix: str, config: ModelConfig, domain: str) -> Tree:
    """Parameters of the attention of a block."""
    heads, dim = config.head_num, config.model_dim
    k_width, v_width = heads * config.k_dim, heads * config.v_dim
    widths = {"q": k_width, "k": k_width, "v": v_width}
    biases = np.split(names.take(prefix + "in_proj_bias", (2 * k_width + v_width,)), [k_width, 2 * k_width])
    tree: Tree = {
        name: {"kernel": names.take(f"{prefix}{name}_proj_weight", (width, dim)).T, "bias": bias}
        for (name, width), bias in zip(widths.items(), biases, strict=True)
    }
    tree["out"] = names.dense(prefix + "out_proj", v_width, dim)
    by_input = config.gauss_state.startswith("x")  # the widths are functions of the layer input, not of q
    w_pos = names.take(prefix + "lattice_pos_weights", (heads, dim) if by_input else (k_width,))
    tree["w_pos"] = w_pos.reshape(heads, -1)
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
            tree[name] = names.concatenate([names.take(prefix + part, shape)[:, :real_heads] for part in parts])
    return tree


def _head(names: _Names, config: ModelConfig) -> tuple[Tree, Tree]:
    """Parameters and running averages of the output layers; the official names count Linear, norm and activation."""
    params: Tree = {}
    batch_stats: Tree = {}

    def norm(official: str, name: str, width: int) -> None:
        if config.norm_type in ("bn", "ln"):
            params[name] = names.norm(official, width)
        if config.norm_type == "bn":
            batch_stats[name] = names.running_averages(official, width)

    width, widths = config.model_dim, list(config.embedding_dim)
    if config.pre_pooling_op.startswith("w"):
        params["pre_pooling"] = names.dense("proj_before_pooling.0", width, widths[0])
        width = widths.pop(0)
    if config.pre_pooling_op == "w+bn+relu":
        norm("proj_before_pooling.1", "pre_pooling_norm", width)
    for i, next_width in enumerate(widths):
        params[f"dense_{i}"] = names.dense(f"mlp.{3 * i}", width, next_width)
        norm(f"mlp.{3 * i + 1}", f"dense_{i}_norm", next_width)
        width = next_width
    params["output"] = names.dense(f"mlp.{3 * len(widths)}", width, config.num_targets)
    return params, batch_stats


def load_official(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Predictor:
    """A Predictor from official hyperparameters and an official state dict (arrays by name).

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
    """Mean and standard deviation [T], or one for all targets, by target.

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
    """A finite number for each target."""
    flat = np.ravel(np.asarray(values))
    if flat.size not in (1, len(names)):
        raise OfficialStateError(f"{key} has {flat.size} numbers for {len(names)} targets; one for each is needed")
    if flat.dtype.kind not in "fiu" or not np.isfinite(flat).all():
        raise OfficialStateError(f"{key} = {_listed([str(value) for value in flat])}: finite numbers are needed")
    return np.broadcast_to(flat.astype(np.float64), len(names)).tolist()
