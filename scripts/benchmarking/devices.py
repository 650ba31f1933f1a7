"""Weak and strong scaling of the training step over the devices of this process."""

import functools
from typing import NamedTuple

import jax
import joblib
import numpy as np

from benchmarking.measure import filled
from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.measuring.cases import SEED, bundled_set
from crystalframer_jax.measuring.programs import Variant, train_program
from crystalframer_jax.measuring.timing import Program, Record, Timing, quotient, take_turns
from crystalframer_jax.model.implementation import Implementation
from crystalframer_jax.parallel.devices import Devices, sum_in_order

CPU_DEVICES = 8  # on a machine without accelerators
STRONG_BATCH = 256  # crystals
WEAK_BATCH = 32  # crystals of each device
SECONDS = 60.0  # for the rounds of the steps
SUM_SECONDS = 5.0  # of the gradient sums


class Setting(NamedTuple):
    """A training step to measure."""

    devices: int
    batch: int  # crystals in all


def device_counts(available: int) -> list[int]:
    """Lists 1, 2, 4, ... and all."""
    return sorted({2**i for i in range(available.bit_length())} | {available})


def series(counts: list[int]) -> dict[str, list[Setting]]:
    """Lists the settings of strong and of weak scaling; one may be in both."""
    return {"strong": [Setting(n, STRONG_BATCH) for n in counts], "weak": [Setting(n, n * WEAK_BATCH) for n in counts]}


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


def measure_devices(variant: Variant, implementation: Implementation, rounds: int = 0, data_dir: str = "") -> Record:
    """Measures steps and gradient sums on 1, 2, 4, ... devices in turns.

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
    return {
        "variant": variant.name,
        "implementation": implementation,
        "forced_cpu_devices": CPU_DEVICES if on_cpu else 0,
        "shared_cores": cores,
        "gradient_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(variant.state.params)),
        "steps": records,
    }


def step_record(name: str, setting: Setting, timings: dict[Setting, Timing], cores: int = 0) -> Record:
    """Describes a measured step of a series; speed-up and efficiency are of crystals per second, round by round.

    `cores` that all devices share (0: none): the speed-up cannot be expected to be more.
    """
    timing, single = timings[setting], Setting(1, setting.batch // (setting.devices if name == "weak" else 1))
    speed_up = quotient(setting.batch / single.batch, timing.ratio_to(timings[single]))
    return {
        "series": name,
        "devices": setting.devices,
        "crystals": setting.batch,
        **timing.record(setting.batch),
        "speed_up": speed_up,
        "efficiency": quotient(speed_up, setting.devices),
        "efficiency_of_cores": quotient(speed_up, min(setting.devices, cores)),
    }
