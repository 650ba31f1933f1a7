"""Minutes of measurements that tell how this library works on a GPU: correctness, times, memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.configs.variants import VARIANTS
from crystalframer_jax.measuring.cases import CASES
from crystalframer_jax.measuring.checks import check_attention
from crystalframer_jax.measuring.programs import Variant, forward_program, train_program
from crystalframer_jax.measuring.timing import Program, Record, take_turns
from crystalframer_jax.model.implementation import Implementation

LIMIT = 300.0  # seconds after which nothing new is begun


class Sizes(NamedTuple):
    """What is measured with."""

    check: str = "supercell-1000"  # the names are those of CASES
    batch: str = "bundled-256"
    large: str = "supercell-10000"
    seconds: float = 3.0  # of the rounds of a measure
    changes: tuple[tuple[str, Any], ...] = ()  # hyperparameters


SMALL_MODEL = (("num_layers", 1), ("model_dim", 16), ("head_num", 2), ("ff_dim", 32), ("embedding_dim", (16,)))
FULL, SMALL = Sizes(), Sizes("supercell-40", "bundled-4", "supercell-100", 0.1, SMALL_MODEL)  # SMALL: for tests


def measure_gpu(
    sizes: Sizes = FULL,
    implementations: Sequence[Implementation] = ("xla", "pallas"),
    limit: float = LIMIT,
    say: Callable[[str], None] = print,
) -> Record:
    """Checks kernels against float64, then times training steps and predictions of the variants, then a large cell.

    After `limit` seconds the rest is left out, and named. `say` tells what is begun.
    """
    start, changes = time.monotonic(), dict(sizes.changes)
    results: Record = {"checks": [], "times": [], "left_out": []}

    def begins(what: str) -> bool:
        is_late = time.monotonic() - start > limit
        if is_late:
            results["left_out"].append(what)
        else:
            say(f"{what} ...")
        return not is_late

    for name in VARIANTS:
        if begins(f"sums and gradients, {name}"):
            results["checks"] += check_attention(name, CASES[sizes.check].repeats, implementations, **changes)
    batch = CASES[sizes.batch].batch()
    for name in VARIANTS:
        variant = Variant.named(name, **changes)
        for measure in ("training step", "prediction"):
            if begins(f"{measure}, {name}"):
                results["times"] += _times(measure, variant, sizes.batch, batch, implementations, sizes.seconds)
    name = next(iter(VARIANTS))
    if begins(f"prediction of {sizes.large}, {name}"):
        variant, kinds = Variant.named(name, **changes), implementations[-1:]
        results["times"] += _times("prediction", variant, sizes.large, CASES[sizes.large].batch(), kinds, sizes.seconds)
    results["peak_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    results["seconds"] = time.monotonic() - start
    return results


def _times(
    measure: str, variant: Variant, case: str, batch: Batch, implementations: Sequence[Implementation], seconds: float
) -> list[Record]:
    """Times one measure of a variant by every implementation, in turns."""

    def program(implementation: Implementation) -> Program:
        if measure == "training step":
            return train_program(variant, implementation, lambda: batch)
        return forward_program(variant, implementation, batch)

    timings = take_turns([program(kind) for kind in implementations], seconds=seconds)
    names = {"measure": measure, "case": case, "variant": variant.name}
    crystals, atoms = int((batch.crystal_sizes > 0).sum()), int((batch.species > 0).sum())
    return [
        names | {"implementation": kind, "crystals": crystals, "atoms": atoms} | timing.record(crystals)
        for kind, timing in zip(implementations, timings, strict=True)
    ]
