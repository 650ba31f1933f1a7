"""Weak and strong scaling of the training step over the devices of this process, and the model on paper beside it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import joblib
import numpy as np

from benchmarking import cluster
from benchmarking.cases import BUNDLED, SEED, TARGET
from benchmarking.cluster import Compute
from benchmarking.model import STATISTICS, STEPS_PER_EPOCH, Variant
from benchmarking.timing import Program, Timing, take_turns
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import Devices, summed
from crystalframer_jax.training.step import make_loss, make_recipe, make_train_step

CPU_DEVICES = 8  # on a machine without accelerators
STRONG_BATCH = 256  # crystals
WEAK_BATCH = 32  # crystals of each device
SINGLE_BATCH = 128  # crystals, of one more step on one device by which the model on paper is fitted
SUM_SECONDS = 5.0  # for the rounds of the gradient sums

Record = dict[str, Any]


def make_cpu_devices() -> None:
    """Let a machine without accelerators have CPU_DEVICES devices; to be called before JAX looks for devices."""
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def device_counts(available: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({2**i for i in range(available.bit_length())} | {available})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training step to measure."""

    devices: int
    batch: int  # crystals in all

    def loader(self, dataset: Dataset, variant: Variant) -> TrainingBatches:
        """One epoch of such batches."""
        devices = Devices.of_this_process(self.devices)
        return TrainingBatches(dataset, self.batch, 1, SEED, variant.model.parts, devices=devices)


def series(counts: list[int]) -> dict[str, list[Setting]]:
    """The settings of strong and of weak scaling, and of one device alone; some are in two of them."""
    return {
        "strong": [Setting(n, STRONG_BATCH) for n in counts],
        "weak": [Setting(n, n * WEAK_BATCH) for n in counts],
        "one device": [Setting(1, batch) for batch in (WEAK_BATCH, SINGLE_BATCH, STRONG_BATCH)],
    }


class CoreClock:
    """Core-seconds of this process for programs that run in turns: told after every run, it counts from the last."""

    def __init__(self) -> None:
        self.last = time.process_time()
        self.seconds: dict[Any, list[float]] = {}

    def ran(self, key: Any) -> None:
        """The program `key` has just run."""
        now = time.process_time()
        self.seconds.setdefault(key, []).append(now - self.last)
        self.last = now

    def median(self, key: Any) -> float | None:
        """Median core-seconds of a run of a program; its first run, for warming up, does not count."""
        rounds = self.seconds.get(key, [])[1:]
        return float(np.median(rounds)) if rounds else None


def step_program(
    setting: Setting,
    loader: TrainingBatches,
    variant: Variant,
    implementation: Implementation,
    clock: CoreClock,
    tell: Callable[[str], None],
) -> Program:
    """The step of a training on several devices, again and again on its typical batch, which stays on them.

    `tell` is told when it is about to be compiled.
    """
    devices, recipe = loader.devices, make_recipe(variant.config, STEPS_PER_EPOCH)
    loss = make_loss(CrystalFramer(variant.model, implementation), recipe, STATISTICS, jax.random.key(1), devices.axis)
    step = make_train_step(recipe, loss, devices=devices)

    def arguments() -> tuple:
        tell(f"compiling the step of {setting.batch} crystals on {setting.devices} of the devices")
        return devices.replicate(jax.tree.map(np.array, variant.state)), devices.put(
            loader[typical(loader)]
        )  # consumed: a copy

    def advance(given: tuple, result: tuple) -> tuple:
        clock.ran(setting)
        return result[0], given[1]

    return Program(step, arguments, advance)


def typical(loader: TrainingBatches) -> int:
    """The batch whose number of neighbours is closest to the mean of an epoch; it does not depend on the devices."""
    edges = np.array([loader.dataset.table.num_edges[loader.rows(step)].sum() for step in range(len(loader))])
    return int(np.argmin(np.abs(edges - edges.mean())))


def sum_program(variant: Variant, number: int) -> Program:
    """The sum over devices of numbers in the shapes of the gradient."""
    devices = Devices.of_this_process(number)
    function = devices.each(lambda tree: summed(tree, devices.axis), split=(0,))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variant.state.params)
    return Program(function, lambda: (devices.put(devices.stacked([zeros] * number)),))


def gradient_bytes(variant: Variant) -> int:
    """Of one device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variant.state.params))


def measure_devices(
    variant: Variant,
    implementation: Implementation,
    tell: Callable[[str], None],
    rounds: int = 0,
    seconds: float = 60.0,
    data_dir: str = "",
) -> Record:
    """Steps and gradient sums on 1, 2, 4, ... devices in turns, and what the model on paper makes of them.

    See `take_turns` for `rounds` and `seconds`; what fails has a `failure` and no figures. `tell` hears how far it is.
    """
    dataset = open_dataset(BUNDLED, (TARGET,), variant.config.cutoff, data_dir)
    counts, on_cpu = device_counts(len(jax.local_devices())), jax.default_backend() == "cpu"
    chosen = series(counts)
    settings = list(dict.fromkeys(setting for one in chosen.values() for setting in one))
    loaders = {setting: setting.loader(dataset, variant) for setting in settings}
    clock = CoreClock()
    programs = [step_program(setting, loaders[setting], variant, implementation, clock, tell) for setting in settings]
    timings = dict(zip(settings, take_turns(programs, rounds, seconds), strict=True))
    sums = dict(zip(counts, take_turns([sum_program(variant, n) for n in counts], 0, SUM_SECONDS), strict=True))
    core_seconds = {setting: clock.median(setting) for setting in settings}
    cores = joblib.cpu_count() if on_cpu else 0
    sum_seconds = {n: timing.median for n, timing in sums.items()} | {1: 0.0}
    records = [
        step_record(name, setting, timings, core_seconds, cores)
        | {"sum_s": sum_seconds[setting.devices]}
        | how_even(loaders[setting])
        for name in chosen
        for setting in chosen[name]
    ]
    compute = fit(records)
    return {
        "variant": variant.name,
        "implementation": implementation,
        "forced_cpu_devices": CPU_DEVICES if on_cpu else 0,
        "shared_cores": cores,
        "gradient_bytes": gradient_bytes(variant),
        "steps": records,
        "fit": dataclasses.asdict(compute) if compute else None,
        "check": check(records, cores),
        "paper": paper(dataset, variant, None if on_cpu else compute),
    }


def step_record(
    name: str,
    setting: Setting,
    timings: dict[Setting, Timing],
    core_seconds: dict[Setting, float | None],
    cores: int = 0,
) -> Record:
    """A measured step of a series; speed-up and efficiency are of crystals per second, round by round.

    `cores` that all devices share (0: none): the speed-up cannot be expected to be more. Core-seconds show what several
    devices cost even where cores are busy with other things: their efficiency is crystals per core-second, over that of
    one device.
    """
    timing, single = timings[setting], Setting(1, setting.batch // setting.devices if name == "weak" else setting.batch)
    ratio, median = timing.ratio_to(timings[single]), timing.median
    times_work = setting.batch / single.batch
    speed_up = times_work / ratio if ratio else None
    used, alone = (core_seconds.get(one) if timings[one].median and cores else None for one in (setting, single))
    return {
        "series": name,
        "devices": setting.devices,
        "crystals": setting.batch,
        "rounds": len(timing.seconds),
        "median_s": median,
        "crystals_per_s": setting.batch / median if median else None,
        "speed_up": speed_up,
        "efficiency": speed_up / setting.devices if speed_up else None,
        "efficiency_of_cores": speed_up / min(setting.devices, cores) if speed_up and cores else None,
        "core_s": used,
        "cores_busy": used / median if used and median else None,
        "efficiency_of_core_s": times_work * alone / used if used and alone else None,
        "compile_s": timing.compile_seconds,
        "memory_bytes": timing.memory_bytes,
        "failure": timing.failure,
    }


def how_even(loader: TrainingBatches) -> Record:
    """Balance and filled places, means over all batches of an epoch."""
    fill = loader.fill_factors(len(loader))
    return {"balance": loader.imbalance(len(loader)), "atoms_filled": fill.atoms, "neighbors_filled": fill.edges}


def fit(records: list[Record], key: str = "median_s") -> Compute | None:
    """Time (or core-seconds) of a step against crystals, from the series "one device"; None if all of it failed."""
    points = [(r["crystals"], r[key]) for r in records if r["series"] == "one device" and r[key]]
    return Compute.fitted(*zip(*points, strict=True)) if points else None


def check(records: list[Record], cores: int) -> list[Record]:
    """Predicted and measured times of all steps: one device's time per crystal, the balance, the sum, the cores.

    Where devices share `cores` (0: none), their core-seconds too: those of one device, as often as there are devices.
    """
    compute, core_work = fit(records), fit(records, "core_s")
    used = [r["cores_busy"] for r in records if r["series"] == "one device" and r["cores_busy"]]
    cores_of_one, found = float(np.median(used)) if used else 1.0, []
    for record in records:
        if compute and record["median_s"] and record["sum_s"] is not None:
            number, core_s = record["devices"], record["core_s"]
            crystals = record["crystals"] / number * record["balance"]
            seconds = cluster.predict_here(number, crystals, compute, record["sum_s"], cores_of_one, cores)
            predicted_core_s = number * core_work.seconds(crystals) if core_work else None
            found.append(
                {name: record[name] for name in ("series", "devices", "crystals", "median_s", "core_s")}
                | {"predicted_s": seconds, "predicted_to_measured": seconds / record["median_s"]}
                | {"predicted_core_s": predicted_core_s}
                | {"predicted_to_measured_core_s": predicted_core_s / core_s if predicted_core_s and core_s else None}
            )
    return found


def paper(dataset: Dataset, variant: Variant, measured: Compute | None) -> Record:
    """The model on paper, with the measured time of a GPU or else the estimate."""
    compute = measured or cluster.ESTIMATE
    tables = cluster.predictions(dataset, compute, gradient_bytes(variant))
    rows = []
    for one in tables:
        for row in one:
            record = dataclasses.asdict(row) | {"step": row.step, "crystals_per_s": row.batch / row.step}
            record["efficiency_on_gpus"] = [row.efficiency(one[0], seconds) for seconds in row.on_gpus]
            record["efficiency"] = row.efficiency(one[0], row.step)
            rows.append(record | {"packed_efficiency": row.efficiency(one[0], row.packed_step)})
    assumed = dataclasses.asdict(cluster.Cluster(cluster.NETWORKS[0]))
    del assumed["network"]
    return {
        "compute": dataclasses.asdict(compute) | {"measured": measured is not None},
        "cluster": assumed,
        "networks": [dataclasses.asdict(network) for network in cluster.NETWORKS],
        "rows": rows,
    }
