"""Kernels and XLA operations against sums in float64, on a crystal without symmetry."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import unpacked
from crystalframer_jax.config import BatchParts, ModelConfig
from crystalframer_jax.measuring.cases import CUTOFF, packed, supercell, unit_cell
from crystalframer_jax.measuring.programs import Variant, attention, random_inputs
from crystalframer_jax.measuring.timing import Record, reason_of
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import Implementation

SAME_FRAME = 1e-3  # largest difference of an axis; others are another choice


def check_attention(
    name: str, repeats: tuple[int, int, int], implementations: Sequence[Implementation], **changes: Any
) -> list[Record]:
    """Compares the attention of one block of a variant, and its gradient, with the same in float64, a record for each.

    Differences are the largest, relative to the largest number; frames are those by XLA in float32 for all, and the
    share of its own that are the same is told. What fails has a `failure`.
    """
    crystal = supercell(unit_cell(), repeats)
    exact = Variant.named(name, **changes, precision="float64").config.model
    frames: Any = None
    records: list[Record] = []

    def computed(config: ModelConfig, implementation: Implementation, dtype: str) -> tuple[Any, Any, Any]:
        """Frames of the implementation, output, and gradients of its sum with random weights."""
        nonlocal frames
        with jax.enable_x64(dtype == "float64"):
            batch = jax.jit(unpacked)(packed(crystal, CUTOFF, BatchParts(dtype=dtype)))
            inputs = random_inputs(config, crystal.num_atoms)
            weights = random_inputs(config, crystal.num_atoms, seed=1)["v"]
            own = None
            if config.uses_frames:
                q, k, a = (inputs[key] for key in "qka")
                found = functools.partial(block_frames, config.frame_method, implementation=implementation)
                own = jax.jit(lambda q, k, a, batch: found(q, k, a, batch, config.tie_tolerance))(q, k, a, batch)
                frames = own if frames is None else frames
            given = None if frames is None else jnp.asarray(frames, config.dtype)

            def loss(inputs: dict, batch: Any) -> tuple[jax.Array, jax.Array]:
                output = attention(config, implementation, inputs, batch, given)
                return jnp.sum(output * weights), output

            gradient, output = jax.jit(jax.grad(loss, has_aux=True))(inputs, batch)
            return jax.device_get((own, output, gradient))

    single = Variant.named(name, **changes).config.model
    try:
        own_frames, *_ = computed(single, "xla", "float32")
        _, *expected = computed(exact, "xla", "float64")
    except Exception as error:  # of many kinds, as in `timing.runs_of`
        return [{"variant": name, "implementation": "xla", "failure": reason_of(error)}]
    for implementation in implementations:
        record: Record = {"variant": name, "implementation": implementation, "failure": ""}
        try:
            found_frames, *found = computed(single, implementation, "float32")
            record["sums"], record["gradients"] = map(_difference, found, expected)
            if found_frames is not None:
                same = np.abs(found_frames - own_frames).max(axis=(-1, -2)) < SAME_FRAME
                record["same_frames"] = float(same.mean())
        except Exception as error:
            record["failure"] = reason_of(error)
        records.append(record)
    return records


def _difference(found: Any, expected: Any) -> float:
    """The largest difference of the arrays, each relative to its own largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
