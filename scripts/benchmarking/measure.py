"""Measurements of cases, variants and implementations side by side, as records for tables and JSON."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarking import floor
from benchmarking.cases import Case
from benchmarking.model import Variant, attention_program, forward_program, train_step_program
from benchmarking.timing import Program, Timing, take_turns
from crystalframer_jax.batching.batch import Batch, fill_factors
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.training.layer_names import count_parameters

BASELINE = "crystalformer"  # frame-free: what frames cost is counted from it
STEPS = ("train step", "forward")
ATTENTION = ("attention", "attention and gradient")

Record = dict[str, Any]


def measure_case(
    case: Case,
    batch: Batch,
    measure: str,
    variants: Sequence[Variant],
    implementations: Sequence[Implementation],
    ceilings: floor.Work,
    rounds: int = 0,
    seconds: float = 20.0,
) -> list[Record]:
    """Records of a measure (one of STEPS and ATTENTION) for one batch, of every variant and implementation.

    They take turns; see `take_turns` for `rounds` and `seconds`.
    """
    size = floor.Size.of(batch)
    keys = [(variant, implementation) for variant in variants for implementation in implementations]
    programs = [program(measure, variant, batch, implementation) for variant, implementation in keys]
    found = take_turns(programs, rounds, seconds)
    timings = {(variant.name, implementation): found[i] for i, (variant, implementation) in enumerate(keys)}
    records = []
    for (variant, implementation), timing in zip(keys, found, strict=True):
        work = work_of(measure, variant, size)
        record: Record = {"case": case.name, "measure": measure}
        record |= {"variant": variant.name, "implementation": implementation}
        record |= _numbers(timing, size, work, work.seconds(ceilings))
        record |= {
            "ratio_to_crystalformer": timing.ratio_to(timings.get((BASELINE, implementation))),
            "ratio_to_xla": timing.ratio_to(timings.get((variant.name, "xla"))),
            "failure": timing.failure,
        }
        records.append(record)
    return records


def describe_case(case: Case, batch: Batch) -> Record:
    """How large a case is and how full its arrays are."""
    size, fill = floor.Size.of(batch), fill_factors(batch)
    return {
        "case": case.name,
        "crystals": size.crystals,
        "atoms": size.atoms,
        "neighbors": size.neighbors,
        "neighbors_per_atom": size.neighbors / size.atoms,
        "padded_atoms": len(batch.species),
        "row_length": batch.rows.row_length,
        "atoms_filled": fill.atoms,
        "neighbors_filled": fill.edges,
        "columns_filled": fill.columns,
    }


def program(measure: str, variant: Variant, batch: Batch, implementation: Implementation) -> Program:
    """The program of a measure."""
    if measure == "train step":
        return train_step_program(variant, batch, implementation)
    if measure == "forward":
        return forward_program(variant, batch, implementation)
    return attention_program(variant, batch, implementation, backward=measure != "attention")


def work_of(measure: str, variant: Variant, size: floor.Size) -> floor.Work:
    """The least work of a measure."""
    model = variant.model
    if measure == "train step":
        return floor.train_step(model, size, count_parameters(variant.state.params))
    if measure == "forward":
        return floor.forward(model, size)
    backward = measure != "attention"
    work = floor.attention(model, size, training=backward)
    return work + floor.attention_backward(model, size) if backward else work


def over_atoms(records: Sequence[Record], cases: Sequence[Record]) -> list[Record]:
    """Log-log slope of the time over the number of atoms of the supercells, wherever there are two or more."""
    atoms = {case["case"]: case["atoms"] for case in cases if case["crystals"] == 1}
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for record in records:
        if record["case"] in atoms and record["median_s"] is not None:
            key = (record["measure"], record["variant"], record["implementation"])
            found.setdefault(key, []).append((atoms[record["case"]], record["median_s"]))
    return [
        dict(zip(("measure", "variant", "implementation"), key, strict=True))
        | {"atoms": [n for n, _ in points], "slope": slope(*zip(*points, strict=True))}
        for key, points in found.items()
        if len(points) > 1
    ]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y = c x^p by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def peak_device_bytes() -> int | None:
    """Largest memory in use on the device since the process started; None where the device does not count it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _numbers(timing: Timing, size: floor.Size, work: floor.Work, floor_seconds: float) -> Record:
    median, memory = timing.median, timing.memory_bytes
    return {
        "rounds": len(timing.seconds),
        "median_s": median,
        "shortest_s": min(timing.seconds) if median else None,
        "crystals_per_s": size.crystals / median if median else None,
        "atoms_per_s": size.atoms / median if median else None,
        "compile_s": timing.compile_seconds,
        "memory_bytes": memory,
        "memory_bytes_per_crystal": memory / size.crystals if memory else None,
        "memory_bytes_per_atom": memory / size.atoms if memory else None,
        "peak_device_bytes": peak_device_bytes(),
        "exponentials": work.exponentials,
        "flops": work.flops,
        "bytes": work.bytes,
        "floor_s": floor_seconds,
        "share_of_floor": floor_seconds / median if median else None,
    }
