"""Files of contributions to leaderboards: JARVIS-Leaderboard, and Matbench v0.1 as its package reads them."""

import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.errors import UserError
from crystalframer_jax.files import replacing, write_json

JARVIS = {  # by target set and target: property and data set of the benchmark
    ("jarvis__dft_3d_2021", "formation_energy"): "formation_energy_peratom-dft_3d",
    ("jarvis__dft_3d_2021", "total_energy"): "optb88vdw_total_energy-dft_3d",
    ("jarvis__dft_3d_2021", "opt_bandgap"): "optb88vdw_bandgap-dft_3d",
    ("jarvis__dft_3d_2021-mbj_bandgap", "mbj_bandgap"): "mbj_bandgap-dft_3d",
    ("jarvis__dft_3d_2021-ehull", "ehull"): "ehull-dft_3d",
    ("jarvis__megnet", "e_form"): "e_form-megnet",
    ("jarvis__megnet", "bandgap"): "gappbe-megnet",
}
LARGEST = 256 << 20  # bytes of an unpacked benchmark
MATBENCH = "matbench_v0.1"
MATBENCH_VERSION = "0.6"  # of the package whose files these are like
FOLDS = tuple(f"fold_{number}" for number in range(5))
LEAST_PERCENT = 1e-5  # smaller labels are left out of mape


class LeaderboardError(UserError, ValueError):
    """Predictions that are no contribution; the message says why."""


def jarvis_name(benchmark: str) -> str:
    """Names the file of a contribution to a benchmark such as "ehull-dft_3d", without its endings."""
    return f"AI-SinglePropertyPrediction-{benchmark}-test-mae"


def jarvis_ids(file: Path) -> list[str]:
    """Reads the test ids of a benchmark of the leaderboard (a .json.zip)."""
    try:
        with zipfile.ZipFile(file) as archive:
            (info,) = archive.infolist()
            if info.file_size > LARGEST:
                raise LeaderboardError(f"{file} would unpack to {info.file_size:,} bytes")
            return list(json.loads(archive.read(info))["test"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise LeaderboardError(
            f"{file} is no benchmark of the leaderboard, a .json.zip with test ids ({error})"
        ) from error


def in_order_of(wanted: Sequence[str], ids: Sequence[str], what: str) -> np.ndarray:
    """Returns where the wanted ids are among ids; LeaderboardError if they are not the same ones."""
    place = {id: row for row, id in enumerate(ids)}
    if missing := [id for id in wanted if id not in place]:
        raise LeaderboardError(
            f"{what}: {len(missing):,} of {len(wanted):,} crystals have no prediction, first {missing[0]}"
        )
    return np.array([place[id] for id in wanted], int)


def write_jarvis(
    folder: Path,
    benchmark: str,
    ids: Sequence[str],
    labels: np.ndarray,
    predictions: np.ndarray,
    metadata: Mapping[str, Any],
    commands: Sequence[str],
) -> list[Path]:
    """Writes a contribution: csv.zip (id, target, prediction; arrays [C]), metadata.json and run.sh."""
    check_finite(predictions, benchmark)
    name = jarvis_name(benchmark)
    text = io.StringIO()
    rows = zip(ids, labels.tolist(), predictions.tolist(), strict=True)
    csv.writer(text, lineterminator="\n").writerows([("id", "target", "prediction"), *rows])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.csv.zip", folder / "metadata.json", folder / "run.sh"]
    with replacing(files[0]) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.csv", text.getvalue())
    write_json(files[1], dict(metadata) | {"time_taken_seconds": {files[0].name: metadata["time_taken_seconds"]}})
    with replacing(files[2]) as temporary:
        temporary.write_text("\n".join(["#!/bin/bash", "set -e", *commands]) + "\n")
        temporary.chmod(0o755)
    return files


def check_finite(predictions: np.ndarray, what: str) -> None:
    """Raises LeaderboardError if a prediction is not a number."""
    if wrong := int((~np.isfinite(predictions)).sum()):
        raise LeaderboardError(f"{what}: {wrong:,} of {predictions.size:,} predictions are not finite")


# Matbench


def matbench_scores(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Returns the scores of a regression fold, of arrays [C]: mae, rmse, mape (of labels that are not 0), max_error."""
    off = np.abs(predictions - labels)
    large = np.abs(labels) > LEAST_PERCENT
    mape = float((off[large] / np.abs(labels[large])).mean()) if large.any() else 0.0
    return {
        "mae": float(off.mean()),
        "rmse": float(np.sqrt((off**2).mean())),
        "mape": mape,
        "max_error": float(off.max()),
    }


def matbench_results(
    task: str,
    folds: Mapping[str, tuple[Sequence[str], np.ndarray, np.ndarray]],
    parameters: Mapping[str, Mapping[str, Any]],
    datestamp: str,
) -> dict[str, Any]:
    """Makes the content of results.json of one task: ids, labels and predictions [C] of the test crystals by fold.

    Raises LeaderboardError if a fold is missing, if test sets of two folds share a crystal, or for what is not finite.
    """
    if missing := [fold for fold in FOLDS if fold not in folds]:
        raise LeaderboardError(f"{task}: Matbench takes all five folds, and {', '.join(missing)} are missing")
    results, seen = {}, set[str]()
    for fold in FOLDS:
        ids, labels, predictions = folds[fold]
        check_finite(predictions, f"{task}, {fold}")
        if seen & set(ids) or len(set(ids)) < len(ids):
            raise LeaderboardError(
                f"{task}: a test crystal of {fold} is in the test set of another fold, or there twice"
            )
        seen |= set(ids)
        results[fold] = {
            "data": dict(zip(ids, map(float, predictions), strict=True)),
            "parameters": dict(parameters[fold]),
            "scores": matbench_scores(labels, predictions),
        }
    of_task = {
        "@module": "matbench.task",
        "@class": "MatbenchTask",
        "benchmark_name": MATBENCH,
        "dataset_name": task,
        "results": results,
    }
    content = {
        "@module": "matbench.bench",
        "@class": "MatbenchBenchmark",
        "version": MATBENCH_VERSION,
        "tasks": {task: of_task},
        "user_metadata": {},
        "benchmark_name": MATBENCH,
        "datestamp": datestamp,
    }
    return content | {"hash": matbench_hash(content)}


def matbench_hash(content: Mapping[str, Any]) -> str:
    """Computes the checksum that is in such a file: SHA-256 of its JSON with sorted keys, without the checksum."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_matbench(
    folder: Path, results: Mapping[str, Any], info: Mapping[str, Any], commands: Sequence[str]
) -> list[Path]:
    """Writes results.json.gz, info.json and run.py, which has the commands."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json.gz", folder / "info.json", folder / "run.py"]
    with replacing(files[0]) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
    write_json(files[1], info)
    lines = ["import subprocess", "", *(f"subprocess.run({line!r}, shell=True, check=True)" for line in commands)]
    with replacing(files[2]) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return files
