"""Fine-tuning: a training that starts from the weights of another run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from crystalframer_jax.config import ConfigError
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.training.state import TargetStatistics, TrainState, Tree


def start_from(state: TrainState, run_dir: str | Path, statistics: tuple[TargetStatistics, ...]) -> TrainState:
    """`state` with the weights, calibration and BatchNorm averages that prediction with `run_dir` uses.

    The output layer is rescaled to the statistics of the new training labels, so that predictions in label units are
    those of the old run; if the targets have other names, it keeps its random weights.

    Raises ConfigError listing what does not fit if the two models differ, CheckpointError if there is no such run.
    """
    predictor = Predictor.load(run_dir)
    old: dict[str, Any] = jax.tree.map(jnp.asarray, dict(predictor.variables))
    if [s.name for s in predictor.targets] == [s.name for s in statistics]:
        old["params"] = old["params"] | {"output": _rescaled(old["params"]["output"], predictor.targets, statistics)}
    else:
        old["params"] = old["params"] | {"output": state.params["output"]}
    new = {"params": state.params, "calibration": state.calibration, "batch_stats": state.batch_stats}
    problems = _differences(old, new)
    if problems:
        raise ConfigError(
            f"pretrained_model={str(run_dir)!r} is another model than this configuration ({'; '.join(problems)}); "
            f"take its hyperparameters from {Path(run_dir) / 'config.json'}"
        )
    return dataclasses.replace(state, **jax.tree.map(lambda x, like: x.astype(like.dtype), old, new))


def _rescaled(layer: Tree, old: tuple[TargetStatistics, ...], new: tuple[TargetStatistics, ...]) -> Tree:
    """The output layer that gives the same predictions in label units with the statistics `new`."""
    ratio = jnp.array([o.std / n.std for o, n in zip(old, new, strict=True)])
    shift = jnp.array([(o.mean - n.mean) / n.std for o, n in zip(old, new, strict=True)])
    return {"kernel": layer["kernel"] * ratio, "bias": layer["bias"] * ratio + shift}


def _differences(old: Tree, new: Tree) -> list[str]:
    """What one tree has and the other has not, or in another shape; at most five lines."""
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_leaves_with_path(old), jax.tree_util.tree_leaves_with_path(new))
    ]
    names = sorted(set(shapes[0]) | set(shapes[1]))
    lines = [
        f"{name} {list(shapes[0].get(name, ())) or 'missing'}, here {list(shapes[1].get(name, ())) or 'missing'}"
        for name in names
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    return lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
