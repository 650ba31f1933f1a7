"""Training steps, predictions and the attention of one block alone, measured side by side for tables and JSON."""

import collections
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from benchmarking import roofline
from crystalframer_jax.batching.batch import Batch, Fill, fill_factors
from crystalframer_jax.measuring.cases import Case
from crystalframer_jax.measuring.programs import Variant, attention_program, forward_program, train_program
from crystalframer_jax.measuring.timing import Program, Record, quotient, take_turns
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.training.layer_names import count_parameters

BASELINE = "crystalformer"  # frame-free: what frames cost is counted from it
STEPS = ("train step", "forward")
ATTENTION = ("attention", "attention and gradient")
SECONDS = 10.0  # for the rounds of a case and measure, at least 5 of them


def make_program(
    measure: str, variant: Variant, batch: Batch, implementation: Implementation
) -> tuple[Program, np.ndarray]:
    """Makes the program of a measure, one of STEPS and ATTENTION, and counts its least work."""
    config, size = variant.config.model, roofline.size_of(batch)
    if measure == "train step":
        program = train_program(variant, implementation, lambda: batch)
        return program, roofline.train_step(config, size, count_parameters(variant.state.params))
    if measure == "forward":
        return forward_program(variant, implementation, batch), roofline.model(config, size)[0]
    with_gradient = measure == ATTENTION[1]
    work = roofline.attention(config, size, training=with_gradient)
    program = attention_program(config, implementation, batch, with_gradient)
    return program, np.add(*work) if with_gradient else work[0]


def describe_case(case: Case, batch: Batch) -> Record:
    """Tells how large a case is and how full its arrays are."""
    size = roofline.size_of(batch)
    places = {"padded_atoms": len(batch.species), "row_length": batch.rows.row_length}
    average = {"neighbors_per_atom": size.neighbors / size.atoms}
    return {"case": case.name} | size._asdict() | average | places | filled(fill_factors(batch))


def filled(fill: Fill) -> Record:
    """Names the fractions of places that hold real data as tables do."""
    return {"atoms_filled": fill.atoms, "neighbors_filled": fill.edges, "columns_filled": fill.columns}


def measure_case(
    case: Case,
    batch: Batch,
    measure: str,
    variants: Sequence[Variant],
    implementations: Sequence[Implementation],
    ceilings: np.ndarray,
    rounds: int = 0,
) -> list[Record]:
    """Measures one batch with every variant and implementation in turns, see `take_turns`."""
    size, keys = roofline.size_of(batch), list(itertools.product(variants, implementations))
    programs, works = zip(*(make_program(measure, variant, batch, kind) for variant, kind in keys), strict=True)
    found = take_turns(programs, rounds, SECONDS)
    timings = {(variant.name, kind): timing for (variant, kind), timing in zip(keys, found, strict=True)}
    records = []
    for ((name, implementation), timing), work in zip(timings.items(), works, strict=True):
        record = {
            "case": case.name,
            "measure": measure,
            "variant": name,
            "implementation": implementation,
            **timing.record(size.crystals),
            "shortest_s": min(timing.seconds) if timing.median else None,
            "atoms_per_s": quotient(size.atoms, timing.median),
            "memory_bytes_per_crystal": quotient(timing.memory_bytes, size.crystals),
            "memory_bytes_per_atom": quotient(timing.memory_bytes, size.atoms),
            "peak_device_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            **dict(zip(roofline.KINDS, work.tolist(), strict=True)),
            "floor_s": (floor := float(np.max(work / ceilings))),
            "share_of_floor": quotient(floor, timing.median),
            "ratio_to_crystalformer": timing.ratio_to(timings.get((BASELINE, implementation))),
            "ratio_to_xla": timing.ratio_to(timings.get((name, "xla"))),
        }
        records.append(record)
    return records


def over_atoms(records: Sequence[Record], cases: Sequence[Record]) -> list[Record]:
    """Finds the log-log slope of the time over the number of atoms of the supercells, where there are two or more."""
    atoms = {case["case"]: case["atoms"] for case in cases if case["crystals"] == 1}
    names, points = ("measure", "variant", "implementation"), collections.defaultdict[tuple, dict[int, float]](dict)
    for record in records:
        if record["case"] in atoms and record["median_s"]:
            points[tuple(map(record.get, names))][atoms[record["case"]]] = record["median_s"]
    return [
        dict(zip(names, key, strict=True)) | {"atoms": list(found), "slope": slope([*found], [*found.values()])}
        for key, found in points.items()
        if len(found) > 1
    ]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Fits the exponent p of y = c x^p by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
