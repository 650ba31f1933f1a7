"""Pictures: what a model sees from an atom, a crystal, the errors of several trainings."""

import argparse
from pathlib import Path

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.cli.predict import model_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.files import check_replaceable
from crystalframer_jax.inference.ensemble import Ensemble
from crystalframer_jax.inference.views import View, views
from crystalframer_jax.reporting.crystal_figures import crystal_figure
from crystalframer_jax.reporting.plots import validation_curves, write
from crystalframer_jax.reporting.view_figures import attention_figure, frames_figure, symbol_of
from crystalframer_jax.reporting.view_page import write_frames_page
from crystalframer_jax.runs.run_directory import read_config
from crystalframer_jax.structures.files import only_crystal
from crystalframer_jax.text import escaped
from crystalframer_jax.training.logging import read_metrics

BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<"}  # of what may be replaced


@reporting_errors()
def run_frames(arguments: argparse.Namespace) -> int:
    """Draws the frames of an atom."""
    file = _output(arguments)
    view, title = _seen(arguments)
    if file.suffix.lower() == ".html":
        write_frames_page(view, title, file, arguments.head or 0)
        return _told(file)
    heads = range(len(view.weights)) if arguments.head is None else [arguments.head]
    write(frames_figure(view, heads, title, arguments.dark), file)
    return _told(file)


@reporting_errors()
def run_attention(arguments: argparse.Namespace) -> int:
    """Draws attention weights against distance."""
    file = _output(arguments)
    write(attention_figure(*_seen(arguments), arguments.dark), file)
    return _told(file)


@reporting_errors()
def run_crystal(arguments: argparse.Namespace) -> int:
    """Draws a crystal."""
    file, crystal = _output(arguments), only_crystal(arguments.file)
    write(crystal_figure(crystal, f"{Path(arguments.file).name}: {crystal.formula}", arguments.dark), file)
    return _told(file)


@reporting_errors()
def run_runs(arguments: argparse.Namespace) -> int:
    """Draws the validation errors of trainings."""
    file = _output(arguments)
    config = read_config(arguments.runs[0])
    target = arguments.target or config.targets[0]
    found = {str(run): read_metrics(run) for run in arguments.runs}
    if not any(target in line.get("val_mae", {}) for epochs in found.values() for line in epochs):
        raise ConfigError(f"no run has a validation error of {target}; --target names another of {config.targets}")
    write(validation_curves(found, target, ""), file)
    return _told(file)


def _seen(arguments: argparse.Namespace) -> tuple[View, str]:
    """Looks at the atom that is asked for, and tells in a line what that is; of an ensemble by its first model."""
    crystal, model = only_crystal(arguments.file), model_of(arguments)
    predictor = model.members[0] if isinstance(model, Ensemble) else model
    block = arguments.block if arguments.block != -1 else predictor.config.num_layers - 1
    found = views(predictor, crystal, block)
    if not 0 <= arguments.atom < len(found):
        raise ConfigError(f"--atom={arguments.atom}: {arguments.file} has atoms 0 to {len(found) - 1}")
    view, heads = found[arguments.atom], predictor.config.head_num
    head = getattr(arguments, "head", None)
    if head is not None and not 0 <= head < heads:
        raise ConfigError(f"--head={head}: the model has heads 0 to {heads - 1}")
    element = symbol_of(view.species[-1])
    return view, f"{escaped(Path(arguments.file).name)}: atom {arguments.atom}, {element}, block {block}"


def _output(arguments: argparse.Namespace) -> Path:
    """Returns the file to write, if it may be written."""
    file = arguments.output.expanduser()
    check_replaceable(file, BEGINNINGS[file.suffix.lower()])
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _told(file: Path) -> int:
    print(f"wrote {file}")
    return 0
