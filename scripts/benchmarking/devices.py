"""Weak and strong scaling of the training step over the devices of this process."""

import functools
from typing import NamedTuple

import jax
import joblib
import numpy as np
from scipy.optimize import nnls

from benchmarking.cases import SEED, bundled_set
from benchmarking.measure import Variant, filled, train_program
from benchmarking.timing import Program, Record, Timing, quotient, take_turns
from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.parallel.devices import Devices, sum_in_order

CPU_DEVICES = 8  # on a machine without accelerators
STRONG_BATCH = 256  # crystals
WEAK_BATCH = 32  # crystals of each device
SINGLE_BATCH = 128  # crystals, of one more step on one device by which the prediction is fitted
SECONDS = 60.0  # for the rounds of the steps
SUM_SECONDS = 5.0  # of the gradient sums


class Setting(NamedTuple):
    """A training step to measure."""

    devices: int
    batch: int  # crystals in all


class Line(NamedTuple):
    """Seconds (or core-seconds) of a step on one device: fixed + crystals * per_crystal."""

    fixed: float
    per_crystal: float

    def at(self, crystals: float) -> float:
        """Those for some crystals."""
        return self.fixed + crystals * self.per_crystal


def device_counts(available: int) -> list[int]:
    """Lists 1, 2, 4, ... and all."""
    return sorted({2**i for i in range(available.bit_length())} | {available})


def series(counts: list[int]) -> dict[str, list[Setting]]:
    """Lists the settings of strong and of weak scaling, and of one device alone; some are in two of them."""
    return {
        "strong": [Setting(n, STRONG_BATCH) for n in counts],
        "weak": [Setting(n, n * WEAK_BATCH) for n in counts],
        "one device": [Setting(1, batch) for batch in (WEAK_BATCH, SINGLE_BATCH, STRONG_BATCH)],
    }


def typical_batch(loader: TrainingBatches) -> Batch:
    """Packs the batch whose number of neighbors is closest to the mean of an epoch, for a program to be compiled."""
    print(f"    compiling: {loader.batch_size} crystals, {loader.devices.count} of the devices", flush=True)
    edges = np.array([loader.dataset.table.num_edges[loader.rows(step)].sum() for step in range(len(loader))])
    return loader[int(np.argmin(np.abs(edges - edges.mean())))]


def sum_program(variant: Variant, number: int) -> Program:
    """Makes the sum over devices of numbers in the shapes of the gradient."""
    devices = Devices.of_this_process(number)
    function = devices.each(lambda tree: sum_in_order(tree, devices.axis), split=(0,))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variant.state.params)
    return Program(function, lambda: (devices.put(devices.stacked([zeros] * number)),))


def gradient_bytes(variant: Variant) -> int:
    """Counts those of one device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variant.state.params))


def measure_devices(variant: Variant, implementation: Implementation, rounds: int = 0, data_dir: str = "") -> Record:
    """Measures steps and gradient sums on 1, 2, 4, ... devices in turns, and compares them with a prediction.

    See `take_turns` for `rounds`; what fails has a `failure` and no figures.
    """
    dataset, on_cpu = bundled_set(data_dir), jax.default_backend() == "cpu"
    counts = device_counts(jax.local_device_count())
    chosen = series(counts)
    loaders = {}
    for setting in dict.fromkeys(setting for settings in chosen.values() for setting in settings):
        devices = Devices.of_this_process(setting.devices)
        loaders[setting] = TrainingBatches(dataset, setting.batch, 1, SEED, variant.config.model.parts, devices=devices)
    programs = [
        train_program(variant, implementation, functools.partial(typical_batch, loader), loader.devices)
        for loader in loaders.values()
    ]
    timings = dict(zip(loaders, take_turns(programs, rounds, SECONDS), strict=True))
    sums = take_turns([sum_program(variant, n) for n in counts], 0, SUM_SECONDS)
    sum_seconds = {n: timing.median for n, timing in zip(counts, sums, strict=True)} | {1: 0.0}
    cores = joblib.cpu_count() if on_cpu else 0
    records = []
    for name, settings in chosen.items():
        for setting in settings:
            loader = loaders[setting]
            shares = {"sum_s": sum_seconds[setting.devices], "balance": loader.imbalance(len(loader))}
            shares |= filled(loader.fill_factors(len(loader)))
            records.append(step_record(name, setting, timings, cores) | shares)
    line = fit(records)
    return {
        "variant": variant.name,
        "implementation": implementation,
        "forced_cpu_devices": CPU_DEVICES if on_cpu else 0,
        "shared_cores": cores,
        "gradient_bytes": gradient_bytes(variant),
        "steps": records,
        "fit": line._asdict() if line else None,
        "check": check(records, cores),
    }


def step_record(name: str, setting: Setting, timings: dict[Setting, Timing], cores: int = 0) -> Record:
    """Describes a measured step of a series; speed-up and efficiency are of crystals per second, round by round.

    `cores` that all devices share (0: none): the speed-up cannot be expected to be more. Core-seconds show what several
    devices cost even where cores are busy with other things: their efficiency is crystals per core-second, over that of
    one device.
    """
    timing, single = timings[setting], Setting(1, setting.batch // (setting.devices if name == "weak" else 1))
    times_work = setting.batch / single.batch
    speed_up = quotient(times_work, timing.ratio_to(timings[single]))
    used, alone = (timings[one].core_median if cores else None for one in (setting, single))
    return {
        "series": name,
        "devices": setting.devices,
        "crystals": setting.batch,
        **timing.record(setting.batch),
        "speed_up": speed_up,
        "efficiency": quotient(speed_up, setting.devices),
        "efficiency_of_cores": quotient(speed_up, min(setting.devices, cores)),
        "core_s": used,
        "cores_busy": quotient(used, timing.median),
        "efficiency_of_core_s": quotient(times_work, quotient(used, alone)),
    }


def fit(records: list[Record], key: str = "median_s") -> Line | None:
    """Fits the series "one device" by least squares of the relative errors; None if all of it failed."""
    points = [(r["crystals"], r[key]) for r in records if r["series"] == "one device" and r[key]]
    if not points:
        return None
    crystals, seconds = np.array(points, float).T
    parts, _ = nnls(np.stack([1 / seconds, crystals / seconds], axis=1), np.ones(len(seconds)))
    return Line(*parts.tolist())


def check(records: list[Record], cores: int) -> list[Record]:
    """Compares the times of all steps with those predicted from one device, the balance, the sum and the cores.

    Where devices share `cores` (0: none), of which one keeps some busy, they take longer as soon as all are; their
    core-seconds are those of one device, as often as there are devices.
    """
    line, core_line = fit(records), fit(records, "core_s")
    used = [r["cores_busy"] for r in records if r["series"] == "one device" and r["cores_busy"]]
    cores_of_one = float(np.median(used)) if used else 1.0
    found = []
    for record in records:
        if line and record["median_s"] and record["sum_s"] is not None:
            number = record["devices"]
            share = record["crystals"] / number * record["balance"]
            crowding = max(1.0, number * cores_of_one / cores) if cores else 1.0
            seconds = crowding * line.at(share) + record["sum_s"]
            core_seconds = number * core_line.at(share) if core_line else None
            predicted = {
                "predicted_s": seconds,
                "predicted_to_measured": quotient(seconds, record["median_s"]),
                "predicted_core_s": core_seconds,
                "predicted_to_measured_core_s": quotient(core_seconds, record["core_s"]),
            }
            found.append(record | predicted)
    return found
