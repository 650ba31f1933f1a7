"""Predict structure files with a trained model."""

import itertools
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.cli.common import model_parser, reporting_errors
from crystalframer_jax.data.custom.source import structures_in
from crystalframer_jax.files import check_replaceable, write_csv
from crystalframer_jax.inference.doubts import PredictionWarning, doubts, summary
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import ACCEPTED_FILES
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors
from crystalframer_jax.text import escaped, table, with_unit

DESCRIPTION = """Predict structure files with a trained model or an ensemble. A warning tells, in a line for each file,
of doubtful structures: elements that were not in the training set, cells or numbers of atoms far outside its range,
atoms without neighbors, and what was noticed on reading."""


@reporting_errors()
def predict_main(argv: Sequence[str] | None = None) -> int:
    """Predicts files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    parser = model_parser("predict.py", DESCRIPTION)
    parser.add_argument("files", metavar="FILE", nargs="+", help=f"{ACCEPTED_FILES}; CSV, JSON, .zip, ASE .db or .traj")
    output_help = "write the predictions to this CSV file; if there are warnings, with a column of them"
    parser.add_argument("--output", type=Path, help=output_help)
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_replaceable(arguments.output.expanduser(), b"structure,formula,atoms")
    model = load_model(arguments.run, arguments.weights)
    cutoffs = {member.cutoff for member in getattr(model, "members", (model,))}
    of_reader: list[tuple[str, list[str]]] = []
    crystals, errors = read_all(arguments.files, cutoffs, of_reader)
    if crystals:
        found = [(file, [*told, *doubts(model, c)]) for c, (file, told) in zip(crystals, of_reader, strict=True)]
        named = zip(crystals, found, strict=True)
        for file, group in itertools.groupby(named, lambda item: item[1][0]):
            if told := summary([(escaped(c.id.removeprefix(file)), of_crystal) for c, (_, of_crystal) in group]):
                print(f"warning: {escaped(file)}: {told}", file=sys.stderr)
        progress = len(crystals) > 100 and sys.stderr.isatty()
        with warnings.catch_warnings(action="ignore", category=PredictionWarning):  # they are told
            predictions = model.predict_with_spread(crystals, arguments.num_frame_samples, progress)
        header = ["structure", "formula", "atoms", *(with_unit(t.name, t.unit) for t in model.targets)]
        values = predictions.mean
        if over := model.spread_over(arguments.num_frame_samples):
            header += [with_unit(f"{t.name} std over {over}", t.unit) for t in model.targets]
            values = np.concatenate(predictions, axis=1)
        rows = [
            [crystal.id, crystal.formula, crystal.num_atoms, *line]
            for crystal, line in zip(crystals, values.tolist(), strict=True)
        ]
        print(table(header, rows))
        finite = np.isfinite(predictions.mean).all(axis=1)
        errors += [f"{crystals[i].id}: the prediction is not finite" for i in np.flatnonzero(~finite)]
    for error in errors:
        print(f"error: {escaped(' '.join(error.split()))}", file=sys.stderr)
    if crystals and arguments.output:
        if any(told for _, told in found):
            header.append("warnings")
            rows = [[*row, "; ".join(told)] for row, (_, told) in zip(rows, found, strict=True)]
        write_csv(arguments.output, header, rows)
        print(f"wrote {arguments.output}")
    return 1 if errors else 0


def read_all(
    files: Sequence[str],
    cutoffs: Iterable[float | LatticeBox] = (),
    of_reader: list[tuple[str, list[str]]] | None = None,
) -> tuple[list[Crystal], list[str]]:
    """Reads the crystals of all files, and a line for each file or structure in it that cannot be used.

    They must have neighbor rows for the `cutoffs`. `of_reader` gets of each crystal its file and the warnings about it.
    """
    crystals: list[Crystal] = []
    errors: list[str] = []
    of_reader = [] if of_reader is None else of_reader
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
            crystals.append(crystal)
            texts = [escaped(" ".join(str(warning.message).split())) for warning in (*of_file, *of_crystal)]
            names = [f"{escaped(name)}: " for name in (crystal.id, file)]
            of_reader.append((file, [text.removeprefix(names[0]).removeprefix(names[1]) for text in texts]))
    return crystals, errors


def _line(where: str, error: Exception) -> str:
    return str(error) if isinstance(error, CrystalError) else f"{where}: the memory is too small for it"
