"""Training steps, predictions and the attention of one block alone, measured side by side for tables and JSON."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking import roofline
from benchmarking.cases import TARGET, Case, packed, unit_cell
from benchmarking.timing import Program, Record, quotient, take_turns
from crystalframer_jax.batching.batch import Batch, Fill, fill_factors, unpacked
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ModelConfig, TrainConfig, validate
from crystalframer_jax.configs import default
from crystalframer_jax.configs.variants import with_variant
from crystalframer_jax.inference.forward import make_forward
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.model.encoder import value_bases
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices
from crystalframer_jax.training.averages import weights_of
from crystalframer_jax.training.layer_names import count_parameters
from crystalframer_jax.training.state import TrainState
from crystalframer_jax.training.step import initial_state, make_loss, make_recipe, make_train_step

BASELINE = "crystalformer"  # frame-free: what frames cost is counted from it
STEPS = ("train step", "forward")
ATTENTION = ("attention", "attention and gradient")
STEPS_PER_EPOCH = 10  # nothing depends on it: the averages start long after the last step measured
STATISTICS = (TargetStatistics(TARGET, "eV/atom", 0.0, 1.0),)  # as many operations as with the true ones
SMALL_CUTOFF = 3.0  # Å, of the batch that initial weights are made with: their cost is not measured
SECONDS = 10.0  # for the rounds of a case and measure, at least 5 of them


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A configuration to measure, by name."""

    name: str
    config: TrainConfig

    @classmethod
    def named(cls, name: str) -> "Variant":
        """Takes the default configuration with the values of a variant."""
        return cls(name, validate(with_variant(default.get_config(), name)))

    @functools.cached_property
    def state(self) -> TrainState:
        """The state that a training starts from, calibrated on one small crystal; takes seconds to compile."""
        recipe = make_recipe(self.config, STEPS_PER_EPOCH)
        batch = packed(unit_cell(), SMALL_CUTOFF, self.config.model.parts)
        return initial_state(CrystalFramer(self.config.model, "xla"), recipe, batch, jax.random.key(0))


def train_program(
    variant: Variant, implementation: Implementation, batch: Callable[[], Batch], devices: Devices = ONE_DEVICE
) -> Program:
    """Makes the step of a training, from the initial weights on: its state goes from run to run, the batch stays."""
    model, recipe = CrystalFramer(variant.config.model, implementation), make_recipe(variant.config, STEPS_PER_EPOCH)
    loss = make_loss(model, recipe, STATISTICS, jax.random.key(1), devices.axis)
    return Program(
        make_train_step(recipe, loss, devices=devices),  # consumes its state
        lambda: (devices.replicate(jax.tree.map(jnp.copy, variant.state)), devices.put(batch())),
        advance=lambda given, result: (result[0], given[1]),
    )


def make_program(
    measure: str, variant: Variant, batch: Batch, implementation: Implementation
) -> tuple[Program, np.ndarray]:
    """Makes the program of a measure, one of STEPS and ATTENTION, and counts its least work.

    A prediction is from the packed batch to standardised targets. The attention is that of one block for random q, k, v
    and a, its gradient that with respect to these and the projections; rows are unpacked beforehand.
    """
    config, size = variant.config.model, roofline.size_of(batch)
    if measure == "train step":
        program = train_program(variant, implementation, lambda: batch)
        return program, roofline.train_step(config, size, count_parameters(variant.state.params))
    if measure == "forward":
        program = Program(
            make_forward(CrystalFramer(config, implementation)),
            lambda: (weights_of(variant.state), jax.device_put(batch)),
        )
        return program, roofline.model(config, size)[0]

    forward = functools.partial(attention, config, implementation)
    inputs = functools.partial(random_inputs, config, len(batch.species))
    if measure == "attention":
        program = Program(jax.jit(forward), lambda: (inputs(), jax.jit(unpacked)(batch)))
        return program, roofline.attention(config, size)[0]

    def with_gradient(inputs: dict, batch: Batch, gradient: jax.Array) -> tuple[jax.Array, dict]:
        output, transpose = jax.vjp(lambda inputs: forward(inputs, batch), inputs)
        return output, transpose(gradient)[0]

    program = Program(jax.jit(with_gradient), lambda: (inputs(), jax.jit(unpacked)(batch), inputs(seed=1)["v"]))
    return program, np.add(*roofline.attention(config, size, training=True))


def attention(config: ModelConfig, implementation: Implementation, inputs: dict, batch: Batch) -> jax.Array:
    """Frames and attention of one block: [N, H, d_v] from `random_inputs` and an unpacked batch."""
    q, k, v, a = (inputs[name] for name in "qkva")
    frames = None
    if config.uses_frames:
        frames = block_frames(config.frame_method, q, k, a, batch, config.tie_tolerance, implementation=implementation)
    w_dist, w_angle = inputs.get("w_dist"), inputs.get("w_angle")
    factors = config.value_pe_dist_coef, config.value_pe_angle_coef
    encoding = ValueEncoding(w_dist, w_angle, value_bases(config, 0), *factors)
    return framed_attention(q, k, v, a, batch.rows, frames, encoding, implementation)


def random_inputs(config: ModelConfig, num_atoms: int, seed: int = 0) -> dict[str, jax.Array]:
    """Draws q, k [N, H, d_k], v [N, H, d_v], a [N, H] (1/Å^2) and the projections of a block, of the order of one."""
    rng, heads = np.random.default_rng(seed), config.head_num
    distances, angles = value_bases(config, 0).sizes
    shapes: dict[str, tuple[int, ...]] = {name: (num_atoms, heads, config.k_dim) for name in "qk"}
    shapes["v"] = (num_atoms, heads, config.v_dim)
    shapes |= {"w_dist": (heads, config.v_dim, distances), "w_angle": (3, heads, config.v_dim, angles)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items() if math.prod(shape)}
    inputs["a"] = -rng.uniform(0.5, 1.5, (num_atoms, heads)) / (2 * config.scale_of_block(0) ** 2)
    return {name: jnp.asarray(x, config.dtype) for name, x in inputs.items()}


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
