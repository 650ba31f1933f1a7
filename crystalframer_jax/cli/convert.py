"""Checkpoints of the official PyTorch implementation become runs, and runs become such checkpoints."""

import argparse
from collections.abc import Sequence

from crystalframer_jax.cli.arguments import export_torch_parser, import_parser
from crystalframer_jax.cli.common import parsed, reporting_errors
from crystalframer_jax.files import read_json
from crystalframer_jax.official.conversion import Conversion, export_checkpoint, import_checkpoint
from crystalframer_jax.text import table


def import_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/import_torch_checkpoint.py."""
    return import_run(parsed(import_parser("import_torch_checkpoint.py"), argv))


@reporting_errors()
def import_run(arguments: argparse.Namespace) -> int:
    """Makes a run directory of a checkpoint of the official implementation."""
    if arguments.hyper_parameters:
        arguments.hyper_parameters = read_json(arguments.hyper_parameters)
    run = import_checkpoint(**vars(arguments))
    print(f"{arguments.file} -> {arguments.workdir}")
    _tell(run)
    print(f"next: crystalframer predict --model={arguments.workdir} FILE.cif")
    if run.config.target_set:
        print(f"      crystalframer evaluate --model={arguments.workdir}")
    return 0


def export_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/export_torch_checkpoint.py."""
    return export_run(parsed(export_torch_parser("export_torch_checkpoint.py"), argv))


@reporting_errors()
def export_run(arguments: argparse.Namespace) -> int:
    """Writes a run as a checkpoint that the official implementation can load."""
    exported = export_checkpoint(arguments.run, arguments.file, arguments.weights, arguments.overwrite)
    print(f"{exported.weights} -> {arguments.file}: {exported.parameters:,} parameters")
    for note in exported.notes:
        print(f"note: {note}")
    return 0


def _tell(run: Conversion) -> None:
    """Prints what was imported."""
    config = run.config
    blocks = "block" if config.num_layers == 1 else "blocks"
    frames = config.frame_method if config.value_pe_angle_real else "none (Crystalformer)"
    print(
        f"{run.parameters:,} parameters, {config.num_layers} {blocks}, frames {frames}, domain {config.domain}; "
        f"epoch {run.epoch}, step {run.step}"
    )
    found = ", and their average (swa)" if run.has_average else ""
    print(f"weights of the file (called last){found}; {run.weights} is used by default")
    rows = [[s.name, s.unit or None, f"{s.mean:.6g}", f"{s.std:.6g}"] for s in run.targets]
    print(table(["target", "unit", "mean", "standard deviation"], rows))
    for note in run.notes:
        print(f"note: {note}")
