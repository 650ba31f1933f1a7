"""Predict structure files with a trained model."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.cli.common import model_parser, reporting_errors
from crystalframer_jax.data.custom.source import structures_in
from crystalframer_jax.files import check_replaceable, write_csv
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import ACCEPTED_FILES
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors
from crystalframer_jax.text import escaped, table


@reporting_errors()
def predict_main(argv: Sequence[str] | None = None) -> int:
    """Predicts files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    parser = model_parser("predict.py", "Predict structure files with a trained model or an ensemble.")
    parser.add_argument("files", metavar="FILE", nargs="+", help=f"{ACCEPTED_FILES}; CSV, JSON, .zip, ASE .db or .traj")
    parser.add_argument("--output", type=Path, help="write the predictions to this CSV file")
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_replaceable(arguments.output.expanduser(), b"structure,formula,atoms")
    model = load_model(arguments.run, arguments.weights)
    cutoffs = {member.cutoff for member in getattr(model, "members", (model,))}
    crystals, errors = read_all(arguments.files, cutoffs)
    if crystals:
        progress = len(crystals) > 100 and sys.stderr.isatty()
        predictions = model.predict_with_spread(crystals, arguments.num_frame_samples, progress)
        header = ["structure", "formula", "atoms", *(f"{t.name} ({t.unit})" for t in model.targets)]
        values = predictions.mean
        if over := model.spread_over(arguments.num_frame_samples):
            header += [f"{t.name} std over {over} ({t.unit})" for t in model.targets]
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
        write_csv(arguments.output, header, rows)
        print(f"wrote {arguments.output}")
    return 1 if errors else 0


def read_all(files: Sequence[str], cutoffs: Iterable[float | LatticeBox] = ()) -> tuple[list[Crystal], list[str]]:
    """Reads the crystals of all files, and a line for each file or structure in it that cannot be used.

    They must have neighbor rows for the `cutoffs`. Warnings go to stderr.
    """
    crystals: list[Crystal] = []
    errors: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        doubts: list[str] = []
        warnings.showwarning = lambda message, *_: doubts.append(escaped(message))
        for file in files:
            try:
                found = structures_in(file)
            except (CrystalError, MemoryError) as error:
                errors.append(_line(file, error))
                continue
            for number, make in enumerate(found, 1):
                try:
                    crystal = make()
                    for cutoff in cutoffs:
                        check_neighbors(crystal, cutoff)
                    crystals.append(crystal)
                except (CrystalError, MemoryError) as error:
                    errors.append(_line(f"{file}#{number}", error))
            for doubt in _merged(doubts, escaped(file)):
                print(f"warning: {doubt}", file=sys.stderr)
            doubts.clear()
    return crystals, errors


def _merged(doubts: Sequence[str], file: str) -> list[str]:
    """Merges warnings that are the same for several structures of a file."""
    alike: dict[str, list[str]] = {}
    for doubt in doubts:
        alike.setdefault(doubt.removeprefix(file).partition(": ")[2], []).append(doubt)
    return [first if not more else f"{first} (as {len(more)} more of this file)" for first, *more in alike.values()]


def _line(where: str, error: Exception) -> str:
    return str(error) if isinstance(error, CrystalError) else f"{where}: the memory is too small for it"
