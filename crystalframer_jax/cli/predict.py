"""Predict structure files with a trained model."""

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from crystalframer_jax.cli.arguments import DEFAULT_MODEL, predict_parser
from crystalframer_jax.cli.common import parsed, reporting_errors
from crystalframer_jax.data.custom.source import structures_in
from crystalframer_jax.files import check_replaceable, write_csv
from crystalframer_jax.inference.doubts import PredictionWarning, doubts, summary
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors
from crystalframer_jax.text import escaped, table, with_unit


class Read(NamedTuple):
    """A crystal of a file, and what was noticed on reading it."""

    crystal: Crystal
    file: str
    warnings: list[str]


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/predict.py."""
    return run(parsed(predict_parser("predict.py", model_first=True), argv))


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Predicts files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    if arguments.output:
        check_replaceable(arguments.output.expanduser(), b"structure,formula,atoms")
    model = load_model(arguments.model or DEFAULT_MODEL, arguments.weights)
    cutoffs = {member.cutoff for member in getattr(model, "members", (model,))}
    found, errors = read_all(arguments.files, cutoffs)
    crystals = [read.crystal for read in found]
    if crystals:
        found = [read._replace(warnings=[*read.warnings, *doubts(model, read.crystal)]) for read in found]
        for file, group in itertools.groupby(found, lambda read: read.file):
            if told := summary([(escaped(read.crystal.id.removeprefix(file)), read.warnings) for read in group]):
                print(f"warning: {escaped(file)}: {told}", file=sys.stderr)
        progress = len(crystals) > 100 and sys.stderr.isatty()
        with warnings.catch_warnings(action="ignore", category=PredictionWarning):  # they are told
            predictions = model.predict_with_spread(crystals, arguments.num_frame_samples, progress)
        header = ["structure", "formula", "atoms", *(with_unit(t.name, t.unit) for t in model.targets)]
        values = predictions.value
        if over := model.spread_over(arguments.num_frame_samples):
            header += [with_unit(f"{t.name} std over {over}", t.unit) for t in model.targets]
            values = np.concatenate(predictions, axis=1)
        rows = [
            [crystal.id, crystal.formula, crystal.num_atoms, *line]
            for crystal, line in zip(crystals, values.tolist(), strict=True)
        ]
        print(table(header, rows))
        finite = np.isfinite(predictions.value).all(axis=1)
        errors += [f"{crystals[i].id}: the prediction is not finite" for i in np.flatnonzero(~finite)]
    for error in errors:
        print(f"error: {escaped(' '.join(error.split()))}", file=sys.stderr)
    if crystals and arguments.output:
        lines = [[*row, "; ".join(read.warnings)] for row, read in zip(rows, found, strict=True)]
        write_csv(arguments.output, [*header, "warnings"], lines)
        print(f"wrote {arguments.output}")
    return 1 if errors else 0


def read_all(files: Sequence[str], cutoffs: Iterable[float | LatticeBox] = ()) -> tuple[list[Read], list[str]]:
    """Reads the crystals of all files, and a line for each file or structure in it that cannot be used.

    They must have neighbor rows for the `cutoffs`.
    """
    read: list[Read] = []
    errors: list[str] = []
    for file in files:
        with warnings.catch_warnings(record=True) as of_file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                found = structures_in(file)
            except (CrystalError, MemoryError) as error:
                errors.append(_line(file, error))
                continue
        for number, make in enumerate(found, 1):
            with warnings.catch_warnings(record=True) as of_crystal:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                try:
                    crystal = make()
                    for cutoff in cutoffs:
                        check_neighbors(crystal, cutoff)
                except (CrystalError, MemoryError) as error:
                    errors.append(_line(f"{file}#{number}", error))
                    continue
            texts = [escaped(" ".join(str(warning.message).split())) for warning in (*of_file, *of_crystal)]
            names = [f"{escaped(name)}: " for name in (crystal.id, file)]
            texts = [text.removeprefix(names[0]).removeprefix(names[1]) for text in texts]
            read.append(Read(crystal, file, texts))
    return read, errors


def _line(where: str, error: Exception) -> str:
    return str(error) if isinstance(error, CrystalError) else f"{where}: the memory is too small for it"
