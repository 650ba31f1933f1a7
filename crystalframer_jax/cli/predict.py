"""Predict crystals in files with a trained model."""

import argparse
import csv
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystalframer_jax.cli.arguments import DEFAULT_MODEL, predict_parser
from crystalframer_jax.cli.common import parsed, reporting_errors, shows_progress, tell
from crystalframer_jax.cli.inputs import Read, read_all
from crystalframer_jax.config import ConfigError
from crystalframer_jax.files import check_replaceable, json_text, write_csv, write_json
from crystalframer_jax.inference.doubts import PredictionWarning, doubts, summary
from crystalframer_jax.inference.ensemble import Ensemble, load_model
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.shipped import card_line
from crystalframer_jax.reporting.metrics import metrics_for, target_metrics
from crystalframer_jax.text import csv_cell, escaped, table, with_unit

STDOUT = Path("-")


class Answer(NamedTuple):
    """Crystals with what was predicted of them."""

    model: Predictor | Ensemble
    read: list[Read]
    predictions: Predictions
    over: str  # what the spread is over; empty: there is none
    errors: list[str]  # of what could not be used

    @property
    def has_labels(self) -> bool:
        """Tells whether any label is known."""
        return any(np.isfinite(read.labels).any() for read in self.read)


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/predict.py."""
    return run(parsed(predict_parser("predict.py", model_first=True), argv))


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Predicts files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    for file, beginning in ((arguments.output, b"structure,formula,atoms"), (arguments.json, b'{\n "model"')):
        if file and file != STDOUT:
            check_replaceable(file.expanduser(), beginning)
    to_stdout = STDOUT in (arguments.output, arguments.json)
    model = model_of(arguments)
    cutoffs = {member.cutoff for member in getattr(model, "members", (model,))}
    found, errors = read_all(arguments.files, cutoffs, label_fields(model, arguments.labels))
    answer = predict(model, found, arguments.num_frame_samples, errors)
    if found and not to_stdout:
        print(table(*rows_of(answer)))
    tell(answer.errors)
    if answer.has_labels:
        print(f"\n{errors_text(answer)}", file=sys.stderr if to_stdout else sys.stdout)
    if found and arguments.output:
        _write_csv(arguments.output, answer)
    if arguments.json:
        _write_json(arguments.json, answer)
    return 1 if answer.errors else 0


def model_of(arguments: argparse.Namespace) -> Predictor | Ensemble:
    """Loads the model that is asked for; without any, that of the package, which is said in a line."""
    if not arguments.model:
        line = f"model {DEFAULT_MODEL} (no --model given): {card_line(DEFAULT_MODEL)}"
        print(line, file=sys.stderr, flush=True)
    return load_model(arguments.model or DEFAULT_MODEL, arguments.weights, arguments.precision)


def label_fields(model: Predictor | Ensemble, given: tuple[str, ...]) -> tuple[str, ...]:
    """Names the fields with the labels of the targets; ConfigError if others are given than one for each."""
    targets = tuple(target.name for target in model.targets)
    if given and len(given) != len(targets):
        raise ConfigError(f"--labels={','.join(given)} must name one field for each target ({', '.join(targets)})")
    return given or targets


def predict(model: Predictor | Ensemble, found: list[Read], samples: int | None, errors: list[str]) -> Answer:
    """Predicts what was read, and warns, in a line for each file, of what is doubtful."""
    crystals = [read.crystal for read in found]
    over = model.spread_over(samples)
    if not crystals:
        empty = np.zeros((0, len(model.targets)))
        return Answer(model, found, Predictions(empty, empty), over, errors)
    found = [read._replace(warnings=[*read.warnings, *doubts(model, read.crystal)]) for read in found]
    for file, group in itertools.groupby(found, lambda read: read.file):
        if told := summary([(escaped(read.crystal.id.removeprefix(file)), read.warnings) for read in group]):
            print(f"warning: {escaped(file)}: {told}", file=sys.stderr)
    progress = shows_progress(len(crystals))
    with warnings.catch_warnings(action="ignore", category=PredictionWarning):  # they are told
        predictions = model.predict_with_spread(crystals, samples, progress)
    finite = np.isfinite(predictions.value).all(axis=1)
    errors = errors + [f"{crystals[i].id}: the prediction is not finite" for i in np.flatnonzero(~finite)]
    return Answer(model, found, predictions, over, errors)


def rows_of(answer: Answer) -> tuple[list[str], list[list[Any]]]:
    """Tabulates predictions: header and rows, with spreads and labels where there are any."""
    targets, values = answer.model.targets, [answer.predictions.value]
    header = ["structure", "formula", "atoms", *(t.title for t in targets)]
    if answer.over:
        header += [with_unit(f"{t.name} std over {answer.over}", t.unit) for t in targets]
        values.append(answer.predictions.spread)
    if answer.has_labels:
        header += [with_unit(f"{t.name} label", t.unit) for t in targets]
        values.append(np.array([read.labels for read in answer.read]))
    lines = np.concatenate(values, axis=1).tolist()
    crystals = [read.crystal for read in answer.read]
    return header, [[c.id, c.formula, c.num_atoms, *line] for c, line in zip(crystals, lines, strict=True)]


def errors_text(answer: Answer) -> str:
    """Tells the errors of predictions for which there are labels."""
    labels = np.array([read.labels for read in answer.read])
    titles = metrics_for(answer.model.targets).titles.values()
    metrics = target_metrics(answer.predictions.value, labels, answer.model.targets)
    known = np.isfinite(labels).sum(axis=0).tolist()
    rows = [
        [t.name, t.unit or None, count, *metrics[t.name].values()]
        for t, count in zip(answer.model.targets, known, strict=True)
    ]
    return table(["errors", "unit", "crystals", *titles], rows)


def _write_csv(file: Path, answer: Answer) -> None:
    header, rows = rows_of(answer)
    lines = [[*row, "; ".join(read.warnings)] for row, read in zip(rows, answer.read, strict=True)]
    lines = [["" if isinstance(cell, float) and np.isnan(cell) else cell for cell in line] for line in lines]
    if file == STDOUT:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([csv_cell(cell) for cell in line] for line in [[*header, "warnings"], *lines])
    else:
        write_csv(file, [*header, "warnings"], lines)
        print(f"wrote {file}")


def _write_json(file: Path, answer: Answer) -> None:
    names = [target.name for target in answer.model.targets]
    predictions: list[dict[str, Any]] = []
    for read, value, spread in zip(answer.read, *(part.tolist() for part in answer.predictions), strict=True):
        crystal = read.crystal
        one: dict[str, Any] = {"structure": crystal.id, "formula": crystal.formula, "atoms": crystal.num_atoms}
        one["predictions"] = dict(zip(names, value, strict=True))
        if answer.over:
            one["std"] = dict(zip(names, spread, strict=True))
        if answer.has_labels:
            one["labels"] = dict(zip(names, read.labels, strict=True))
        predictions.append(one | {"warnings": read.warnings})
    content = {
        "model": answer.model.origin,
        "units": {target.name: target.unit for target in answer.model.targets},
        "std_over": answer.over or None,
        "structures": predictions,
        "errors": answer.errors,
    }
    if file == STDOUT:
        sys.stdout.write(json_text(content, indent=1))
    else:
        file.expanduser().parent.mkdir(parents=True, exist_ok=True)
        write_json(file.expanduser(), content)
        print(f"wrote {file}")
