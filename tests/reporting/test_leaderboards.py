"""Contributions to leaderboards, read as their own rules say."""

import csv
import gzip
import hashlib
import io
import json
import zipfile

import numpy as np
import pytest

from crystalframer_jax.reporting.leaderboards import (
    FOLDS,
    LeaderboardError,
    in_order_of,
    jarvis_ids,
    matbench_results,
    write_jarvis,
    write_matbench,
)

METADATA = {
    "model_name": "x",
    "team_name": "",
    "date_submitted": "01-02-2026",
    "project_url": "",
    "time_taken_seconds": 5,
}
NO_PARAMETERS: dict = {fold: {} for fold in FOLDS}


def test_a_contribution_to_jarvis(tmp_path):
    labels, predictions = np.array([0.5, -1.25]), np.array([0.75, -1.0])
    ids = ["JVASP-1", "JVASP-2"]
    files = write_jarvis(tmp_path / "out", "ehull-dft_3d", ids, labels, predictions, METADATA, ["echo done"])
    name = files[0].name
    # How the leaderboard takes the name apart: category, subcategory, property, data set, split, metric.
    parts = name.split(".csv.zip")[0].split("-")
    assert parts == ["AI", "SinglePropertyPrediction", "ehull", "dft_3d", "test", "mae"]
    with zipfile.ZipFile(files[0]) as archive:
        assert archive.namelist() == [name.removesuffix(".zip")]
        rows = list(csv.DictReader(io.StringIO(archive.read(archive.namelist()[0]).decode())))
    assert [row["id"] for row in rows] == ids and [float(row["prediction"]) for row in rows] == predictions.tolist()
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["time_taken_seconds"] == {name: 5} and METADATA.keys() == metadata.keys()
    assert (tmp_path / "out" / "run.sh").read_text() == "#!/bin/bash\nset -e\necho done\n"


def test_ids_of_a_benchmark(tmp_path):
    file = tmp_path / "b.json.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("b.json", json.dumps({"train": {"c": 1}, "test": {"b": 1, "a": 2}}))
    assert jarvis_ids(file) == ["b", "a"]
    assert in_order_of(["b", "a"], ["a", "x", "b"], "b").tolist() == [2, 0]
    with pytest.raises(LeaderboardError, match="1 of 2 crystals have no prediction, first b"):
        in_order_of(["a", "b"], ["a"], "b")
    file.write_text("no archive")
    with pytest.raises(LeaderboardError, match="no benchmark of the leaderboard"):
        jarvis_ids(file)


def folds(count=4):
    """Labels and predictions of five folds."""
    rng, found = np.random.default_rng(0), {}
    for number, fold in enumerate(FOLDS):
        ids = [f"mb-phonons-{number * count + i + 1:04d}" for i in range(count)]
        labels = rng.uniform(1, 2, count)
        found[fold] = ids, labels, labels + rng.normal(size=count)
    return found


def immutable(content):
    """Sorted by keys at every level, as the checksum of the package wants it."""
    return {
        key: immutable(value) if isinstance(value, dict) else value
        for key, value in sorted(content.items(), key=lambda item: item[0])
    }


def test_results_as_matbench_reads_them(tmp_path):
    given = folds()
    parameters = {fold: {"lr": 1e-3, "layers": [1, 2], "b": {"z": 1, "a": None}} for fold in FOLDS}
    results = matbench_results("matbench_phonons", given, parameters, "2026.01.02 03:04.05")
    write_matbench(tmp_path / "out", results, {"authors": "A"}, ["echo 'a b'"])
    found = json.loads(gzip.decompress((tmp_path / "out" / "results.json.gz").read_bytes()))
    assert set(found) == {
        *("@module", "@class", "version", "benchmark_name", "tasks", "user_metadata", "datestamp", "hash")
    }
    checksum = found.pop("hash")
    assert hashlib.sha256(json.dumps(immutable(found)).encode()).hexdigest() == checksum
    task = found["tasks"]["matbench_phonons"]
    assert set(task) == {"@module", "@class", "dataset_name", "results", "benchmark_name"}
    assert list(task["results"]) == [f"fold_{i}" for i in range(5)]
    for fold, (ids, labels, predictions) in given.items():
        of_fold = task["results"][fold]
        assert set(of_fold) == {"data", "parameters", "scores"} and list(of_fold["data"]) == ids
        assert all(type(value) is float for value in (*of_fold["data"].values(), *of_fold["scores"].values()))
        off = [abs(p - t) for p, t in zip(predictions, labels, strict=True)]
        expected = {"mae": sum(off) / 4, "rmse": (sum(x * x for x in off) / 4) ** 0.5, "max_error": max(off)}
        expected["mape"] = sum(x / t for x, t in zip(off, labels, strict=True)) / 4
        assert of_fold["scores"] == pytest.approx(expected)
    compile((tmp_path / "out" / "run.py").read_text(), "run.py", "exec")


def test_results_that_matbench_would_refuse():
    given = folds()
    given["fold_1"][2][0] = np.nan
    with pytest.raises(LeaderboardError, match="fold_1: 1 of 4 predictions are not finite"):
        matbench_results("t", given, NO_PARAMETERS, "")
    given = folds()
    given["fold_2"][0][0] = given["fold_0"][0][0]
    with pytest.raises(LeaderboardError, match="of fold_2 is in the test set of another"):
        matbench_results("t", given, NO_PARAMETERS, "")
    with pytest.raises(LeaderboardError, match="fold_4 are missing"):
        matbench_results("t", {fold: folds()[fold] for fold in FOLDS[:4]}, NO_PARAMETERS, "")


def test_the_package_itself_reads_them(tmp_path):
    bench = pytest.importorskip("matbench.bench")
    metadata = pytest.importorskip("matbench.metadata")
    splits = metadata.mbv01_validation.splits["matbench_phonons"]
    given = {fold: (list(splits[fold].test), np.ones(253), np.full(253, 1.5)) for fold in FOLDS}
    results = matbench_results("matbench_phonons", given, NO_PARAMETERS, "2026.01.02 03:04.05")
    assert bench.MatbenchBenchmark.from_dict(results).is_valid
