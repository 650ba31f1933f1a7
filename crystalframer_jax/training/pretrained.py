"""Fine-tuning: a training that starts from the weights of another run."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.pretraining import pretraining_of
from crystalframer_jax.training.averages import weights_of
from crystalframer_jax.training.layer_names import layer_mask
from crystalframer_jax.training.state import TrainState, Tree

# What may differ between the two: it does not change what the weights compute, but for rounding and draws.
MAY_DIFFER = ("num_targets", "dropout", "scale_grad", "precision", "tie_tolerance")


def start_from(state: TrainState, config: TrainConfig, statistics: tuple[TargetStatistics, ...]) -> TrainState:
    """Gives `state` the weights, calibration and BatchNorm averages that prediction with `pretrained_model` uses.

    Targets that the old run predicts too (by name) keep their predictions in label units: their part of the output
    layer is rescaled to `statistics`, those of the new training labels with the old element references.
    Other targets, those with another transform and the layers of `reinit_layers`, keep their random weights.

    Raises ConfigError listing the hyperparameters that differ if the old run is another model than `config`,
    CheckpointError if there is no such run.
    """
    run_dir = config.pretrained_model
    predictor = Predictor.load(run_dir)
    differences = _differences(predictor.config, config)
    if differences:
        raise ConfigError(
            f"pretrained_model={run_dir!r} is another model: {'; '.join(differences)}; use those of "
            f"{Path(run_dir) / 'config.json'}"
        )
    old: dict[str, Any] = jax.tree.map(np.asarray, dict(predictor.variables))
    output = _output_layer(old["params"]["output"], predictor.targets, state.params["output"], statistics)
    is_random = layer_mask(state.params, config.reinit_layers, "reinit_layers")
    old["params"] = jax.tree.map(
        lambda x, fresh, random: fresh if random else x, old["params"] | {"output": output}, state.params, is_random
    )
    placed = jax.tree.map(lambda x, like: jax.device_put(np.array(x, like.dtype)), old, weights_of(state))
    return dataclasses.replace(state, **placed)


def seen_before(config: TrainConfig, dataset: Dataset) -> list[str]:
    """Tells, in a sentence for each split, how many crystals to judge by the model it starts from was trained on."""
    starts = {config.pretrained_model}
    found = (pretraining_of(starts, dataset, dataset.splits[split], f"{split} crystals") for split in ("val", "test"))
    return [of_split.told for of_split in found if of_split.told]


def _output_layer(
    old: Tree, old_targets: tuple[TargetStatistics, ...], new: Tree, new_targets: tuple[TargetStatistics, ...]
) -> Tree:
    """Makes the new output layer with the columns of the old one, rescaled, for the targets that both have."""
    kernel, bias = np.array(new["kernel"]), np.array(new["bias"])
    for (t, target), (o, before) in itertools.product(enumerate(new_targets), enumerate(old_targets)):
        if (target.name, target.transform) == (before.name, before.transform):
            kernel[:, t] = old["kernel"][:, o] * before.std / target.std
            bias[t] = (old["bias"][o] * before.std + before.mean - target.mean) / target.std
    return {"kernel": kernel, "bias": bias}


def _differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Lists the hyperparameters of the model in which two configurations differ: "key old, here new"."""
    values = [{**dataclasses.asdict(config.model), "cutoff": config.cutoff} for config in (old, new)]
    return [
        f"{key} {values[0][key]!r}, here {values[1][key]!r}"
        for key in values[0]
        if key not in MAY_DIFFER and values[0][key] != values[1][key]
    ]
