"""Measure training steps, predictions, the attention alone and the input pipeline; docs/benchmark.md explains.

python scripts/benchmark.py [--part=PART] [--case=NAME] [--variant=NAME] [--implementation=NAME] [--json=FILE]
python scripts/benchmark.py --scaling [--variant=NAME] [--implementation=NAME] [--json=FILE]

Options that choose can be given several times. Without them everything is measured but the scaling over devices; on a
CPU all but bundled-1024, which takes minutes more.
"""

import argparse
import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import joblib
from benchmarking import report
from benchmarking.cases import BUNDLED, CASES, SMALL
from benchmarking.ceilings import measure_ceilings
from benchmarking.devices import make_cpu_devices, measure_devices
from benchmarking.measure import ATTENTION, STEPS, describe_case, measure_case, over_atoms
from benchmarking.model import Variant
from benchmarking.pipeline import any_target, measure_pipeline

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import validate
from crystalframer_jax.configs import default
from crystalframer_jax.configs.variants import VARIANTS, with_variant

PARTS = ("steps", "attention", "atoms", "pipeline")
MEASURES = {"steps": STEPS, "attention": ATTENTION, "atoms": (*STEPS, *ATTENTION)}
SLOW_ON_CPU = ("bundled-1024",)
SECONDS = 10.0  # for the rounds of a case and measure, at least 5 of them


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--scaling", action="store_true", help="nothing but training steps on 1, 2, 4, ... devices")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument(
        "--implementation", action="append", choices=("xla", "pallas"), help="default: xla, on a GPU pallas too"
    )
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
        check_scaling(parser, arguments)
        make_cpu_devices()
    on_cpu = jax.default_backend() == "cpu"
    skipped = SMALL + SLOW_ON_CPU * on_cpu
    parts = () if arguments.scaling else arguments.part or PARTS
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cores": joblib.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
    }
    report.print_header(results)
    with reporting_errors():
        if arguments.scaling:
            results["devices"] = measure_scaling(arguments, on_cpu)
        if "pipeline" in parts:
            any_target(arguments.target_set, arguments.data_dir)  # an unknown name is an error before all measurements
        if set(parts) & set(MEASURES):
            results |= measure_models(
                parts,
                arguments.case or [name for name in CASES if name not in skipped],
                arguments.variant or list(VARIANTS),
                arguments.implementation or (["xla"] if on_cpu else ["xla", "pallas"]),
                arguments.rounds,
                arguments.data_dir,
            )
        if "pipeline" in parts:
            results["pipeline"] = measure_pipeline(arguments.target_set, arguments.data_dir)
            report.print_pipeline(results["pipeline"])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def check_scaling(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Leave with an error if --scaling is given together with what it has no use for."""
    for name in ("part", "case"):
        if getattr(arguments, name):
            parser.error(f"--scaling measures nothing else; leave --{name} out")
    for name in ("variant", "implementation"):
        if len(getattr(arguments, name) or ()) > 1:
            parser.error(f"--scaling takes one --{name}")


def measure_scaling(arguments: argparse.Namespace, on_cpu: bool) -> dict[str, Any]:
    """Training steps on several devices and the model on paper, printed as tables."""
    (name,) = arguments.variant or ["default"]
    (implementation,) = arguments.implementation or ["xla" if on_cpu else "pallas"]
    print(f"{name} {implementation}: training steps on up to {jax.local_device_count()} devices, for minutes ...")
    variant = Variant(name, validate(with_variant(default.get_config(), name)))
    results = measure_devices(variant, implementation, report.print_line, arguments.rounds, data_dir=arguments.data_dir)
    report.print_devices(results)
    return results


def measure_models(
    parts: Sequence[str],
    cases: Sequence[str],
    variants: Sequence[str],
    implementations: Sequence[Any],
    rounds: int,
    data_dir: str,
) -> dict[str, Any]:
    """Measurements of whole models and of the attention, printed as tables."""
    ceilings = measure_ceilings()
    chosen = [Variant(name, validate(with_variant(default.get_config(), name))) for name in variants]
    described, records = [], []
    for name in cases:
        case = CASES[name]
        wanted = [part for part in parts if part in MEASURES and (part != "atoms" or not case.batch_size)]
        measures = list(dict.fromkeys(measure for part in wanted for measure in MEASURES[part]))
        if not measures:
            continue
        batch = case.batch(data_dir=data_dir)
        described.append(describe_case(case, batch))
        for measure in measures:
            print(f"{name}: {measure} ...", flush=True)
            found = measure_case(case, batch, measure, chosen, implementations, ceilings, rounds, SECONDS)
            report.print_progress(found)
            records += found
    results = {
        "ceilings": {f"{name} per s": rate for name, rate in dataclasses.asdict(ceilings).items()},
        "cases": described,
        "measurements": records,
        "atoms": over_atoms(records, described),
    }
    report.print_ceilings(results["ceilings"])
    report.print_cases(described)
    report.print_measures(records)
    report.print_over_atoms(results["atoms"])
    return results


if __name__ == "__main__":
    main()
