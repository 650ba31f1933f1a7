"""Reports of training steps whose loss or gradient is not finite."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crystalframer_jax.batching.batch import pack
from crystalframer_jax.batching.shapes import shape_for
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.training.ledger import StepResult
from crystalframer_jax.training.state import TrainState
from crystalframer_jax.training.step import LossFunction


def batch_report(
    loss: LossFunction,
    statistics: tuple[TargetStatistics, ...],
    state: TrainState,
    batches: TrainingBatches,
    result: StepResult,
    freeze_norm: bool,
) -> dict[str, Any]:
    """Lists the crystals of a step with their labels and losses, and norms of every layer, as JSON.

    `state` has the weights before the step with this `result`; `loss` is for one device, which gets the whole batch.
    Numbers that are not finite are texts ("nan", "inf").
    """
    rows, dataset = batches.rows(result.step), batches.dataset
    ids, labels = dataset.table.ids[rows].tolist(), dataset.labels[rows]
    report = {"step": result.step, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
    batch = pack(dataset.table, rows, shape_for(dataset.table, rows, batches.parts), batches.labels[rows])
    at_step = dataclasses.replace(state, step=jnp.array(result.step, state.step.dtype))
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)
    try:
        (_, (losses, _)), gradient = value_and_grad(state.params, at_step, batch, freeze_norm)
    except jax.errors.JaxRuntimeError as error:  # one device may lack the memory for what several share
        return report | {"ids": ids, "no_details": " ".join(str(error).split())[:300]}
    crystals = [
        {
            "id": ids[i],
            "atoms": int(dataset.table.num_atoms[row]),
            **{s.name: _number(label) for s, label in zip(statistics, labels[i], strict=True)},
            "loss": _number(losses[i]),
        }
        for i, row in enumerate(rows)
    ]
    norms = {
        name: {
            "parameters": _number(optax.global_norm(state.params[name])),
            "gradient": _number(optax.global_norm(gradient[name]) / len(rows)),
        }
        for name in state.params
    }
    return report | {"crystals": crystals, "norms": norms}


def _number(value: Any) -> float | str:
    number = float(value)
    return number if np.isfinite(number) else str(number)
