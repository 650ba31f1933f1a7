"""Measure training steps, predictions, the attention alone and the input pipeline; docs/benchmark.md explains.

python scripts/benchmark.py [--part=PART] [--case=NAME] [--variant=NAME] [--implementation=NAME] [--json=FILE]
python scripts/benchmark.py --scaling [--variant=NAME] [--implementation=NAME] [--json=FILE]

Options that choose can be given several times. Without them everything is measured but the scaling over devices; on a
CPU all but bundled-1024, which takes minutes more.
"""

import argparse
import datetime
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import joblib
from benchmarking import report
from benchmarking.devices import CPU_DEVICES, measure_devices
from benchmarking.measure import ATTENTION, STEPS, describe_case, measure_case, over_atoms
from benchmarking.pipeline import any_target, measure_pipeline
from benchmarking.roofline import KINDS, measure_ceilings

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.configs.variants import VARIANTS
from crystalframer_jax.measuring.cases import BUNDLED, CASES, SMALL
from crystalframer_jax.measuring.programs import Variant

MEASURES = {"steps": STEPS, "attention": ATTENTION, "atoms": (*STEPS, *ATTENTION), "pipeline": ()}  # of the parts
SLOW_ON_CPU = ("bundled-1024",)


@reporting_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes JSON."""
    arguments = parse(argv)
    if arguments.scaling:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)  # before JAX looks for devices
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cores": joblib.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
    }
    print("{device}, {cores} cores, JAX {jax}, {date}".format_map(results))
    parts = arguments.part or list(MEASURES)
    if arguments.scaling:
        (name,) = arguments.variant or ["default"]
        (kind,) = arguments.implementation or ["xla" if jax.default_backend() == "cpu" else "pallas"]
        print(f"{name} {kind}: training steps on up to {jax.local_device_count()} devices, for minutes ...")
        results["devices"] = measure_devices(Variant.named(name), kind, arguments.rounds, data_dir=arguments.data_dir)
        report.print_devices(results["devices"])
    else:
        if "pipeline" in parts:
            any_target(arguments.target_set, arguments.data_dir)  # an unknown name is an error before all else
        if any(MEASURES[part] for part in parts):
            results |= measure_models(arguments, parts)
        if "pipeline" in parts:
            results["pipeline"] = measure_pipeline(arguments.target_set, arguments.data_dir)
            report.print_pipeline(results["pipeline"])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; leaves with an error if --scaling is given together with what it has no use for."""
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--part", action="append", choices=MEASURES, help="default: all")
    parser.add_argument("--scaling", action="store_true", help="nothing but training steps on 1, 2, 4, ... devices")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    kinds, by_default = ("xla", "pallas"), "default: xla, on a GPU pallas too"
    parser.add_argument("--implementation", action="append", choices=kinds, help=by_default)
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="default: what fits into 10 s, 5 to 50")
    parser.add_argument("--target_set", default=BUNDLED, help="of the part pipeline")
    parser.add_argument("--data_dir", default="", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 0:
        parser.error(f"--rounds={arguments.rounds} must be positive")
    if arguments.json and not os.access(arguments.json.absolute().parent, os.W_OK):
        parser.error(f"--json={arguments.json}: there is no such folder, or it cannot be written to")
    if arguments.scaling:
        for name, most in {"part": 0, "case": 0, "variant": 1, "implementation": 1}.items():
            if len(getattr(arguments, name) or ()) > most:
                parser.error(f"--scaling takes one --{name}" if most else f"--scaling has no --{name}; leave it out")
    return arguments


def measure_models(arguments: argparse.Namespace, parts: Sequence[str]) -> dict[str, Any]:
    """Measures whole models and the attention and prints tables."""
    on_cpu = jax.default_backend() == "cpu"
    skipped = SMALL + SLOW_ON_CPU * on_cpu
    variants = [Variant.named(name) for name in arguments.variant or VARIANTS]
    implementations = arguments.implementation or (["xla"] if on_cpu else ["xla", "pallas"])
    ceilings = measure_ceilings()
    described, records = [], []
    for name in arguments.case or [name for name in CASES if name not in skipped]:
        case = CASES[name]
        wanted = [MEASURES[part] for part in parts if part != "atoms" or not case.batch_size]
        if not any(wanted):
            continue
        batch = case.batch(arguments.data_dir)
        described.append(describe_case(case, batch))
        for measure in dict.fromkeys(itertools.chain(*wanted)):
            print(f"{name}: {measure} ...", flush=True)
            for record in measure_case(case, batch, measure, variants, implementations, ceilings, arguments.rounds):
                found = record["failure"] or f"{record['median_s'] * 1e3:,.2f} ms"
                print(f"    {record['variant']} {record['implementation']}: {found}", flush=True)
                records.append(record)
    results = {
        "ceilings": {f"{name} per s": rate for name, rate in zip(KINDS, ceilings.tolist(), strict=True)},
        "cases": described,
        "measurements": records,
        "atoms": over_atoms(records, described),
    }
    report.print_models(results)
    return results


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are not those of earlier processes
    main()
