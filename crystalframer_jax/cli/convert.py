"""The command lines of scripts/import_torch_checkpoint.py and scripts/export_torch_checkpoint.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crystalframer_jax.cli.common import WEIGHTS_HELP, names, reporting_errors
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import FileError, read_json
from crystalframer_jax.official.conversion import Conversion, export_checkpoint, import_checkpoint
from crystalframer_jax.text import table


@reporting_errors()
def import_main(argv: Sequence[str] | None = None) -> int:
    """Makes a run directory of a checkpoint of the official implementation."""
    description = "Make a run directory of a checkpoint of the official PyTorch implementation."
    parser = argparse.ArgumentParser("import_torch_checkpoint.py", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("file", metavar="FILE.ckpt", type=Path, help="Lightning checkpoint, or state dict (--config)")
    add("--workdir", type=Path, required=True, help="run directory to write; must not hold a run")
    config_help = "official hyperparameters not in the file"
    add("--config", dest="hyper_parameters", type=read_official_json, metavar="FILE.json", help=config_help)
    add("--target_set", dest="data", default="", help="name of the data that the model was trained on")
    add("--targets", type=names, default=(), help="names instead of the official ones: a,b")
    add("--units", type=names, default=(), help="a unit for each target; default: of the target set")
    add("--target_mean", type=_numbers, default=(), help="of the training labels, if not in the file")
    add("--target_std", type=_numbers, default=(), help="of the training labels, if not in the file")
    weights_help = "used by default; without it swa if the file has averaged weights"
    add("--weights", choices=("model", "swa"), help=weights_help)
    arguments = parser.parse_args(argv)
    run = import_checkpoint(**vars(arguments))
    print(f"{arguments.file} -> {arguments.workdir}")
    _tell(run)
    print(f"next: python scripts/predict.py {arguments.workdir} FILE.cif")
    if run.config.target_set:
        print(f"      python scripts/evaluate.py {arguments.workdir}")
    return 0


@reporting_errors()
def export_main(argv: Sequence[str] | None = None) -> int:
    """Writes a run as a checkpoint that the official implementation can load."""
    description = "Write a run as a checkpoint that the official PyTorch implementation can load."
    parser = argparse.ArgumentParser("export_torch_checkpoint.py", description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints (RUN/checkpoints/STEP)")
    parser.add_argument("file", metavar="FILE.ckpt", type=Path, help="file to write")
    parser.add_argument("--weights", choices=("best", "last", "swa"), help=WEIGHTS_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.ckpt if it exists")
    arguments = parser.parse_args(argv)
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


def read_official_json(file: str) -> dict[str, Any]:
    """Reads the hyperparameters of an official JSON file."""
    try:
        return read_json(Path(file))
    except FileError as error:  # argparse would drop the message of a ValueError
        raise UserError(str(error)) from error


def _numbers(text: str) -> tuple[float, ...]:
    """Reads numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers separated by commas") from error
