"""Suspect labels: the rule, and the list."""

import collections
import csv
import math
import re

import numpy as np
from small_sets import open_small, raw_records

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.reporting.suspects import HEADER, are_suspect, suspect_labels, suspects_text, write_suspects


def test_the_rule():
    """The median absolute error is 1; the models deviate by 1 for the last crystals, by 4 for one of them."""
    labels = np.array([1.0, -1, 1, -1, 1, -1, np.nan, 1, -1, -4.9, 5.1, 11, -5.1, np.nan])
    samples = np.zeros((3, len(labels)))
    samples[:, 9:] = np.array([[-1.0, 0, 1]]).T * [1, 1, 4, 1, 1]
    suspect, distances = are_suspect(labels, samples)
    # -4.9 is 3.9 below the lowest model and 4.9 deviations away; 11 is 7 above the highest, but no 3 deviations away
    assert np.flatnonzero(suspect).tolist() == [9, 10, 12]
    np.testing.assert_allclose(distances[[9, 10, 11, 12]], [4.9, 5.1, 11, 5.1])
    labels[9] = -3.9  # 2.9 below the lowest model
    assert np.flatnonzero(are_suspect(labels, samples)[0]).tolist() == [10, 12]
    samples[0, 10] = np.nan
    assert np.flatnonzero(are_suspect(labels, samples)[0]).tolist() == [12]


def test_one_model_agrees_with_nobody_and_unknown_labels_with_everything():
    assert not are_suspect(np.array([0.1, -0.1, 0.1, 50.0]), np.zeros((1, 4)))[0].any()
    assert not are_suspect(np.full(4, np.nan), np.zeros((2, 4)))[0].any()


def test_the_list_has_all_splits_and_targets_and_the_farthest_first(tmp_path):
    """The second target is judged by logarithms: ten times too small is as suspect as ten times too large."""
    dataset = open_small(tmp_path, targets=("e_form", "e_above_hull"))
    rng = np.random.default_rng(0)
    statistics = (TargetStatistics("a", "eV", 0.0, 1.0), TargetStatistics("b", "GPa", 0.0, 1.0, "log10", (1.0,) * 98))
    values = np.stack([rng.normal(size=60), 10 ** rng.uniform(0, 3, 60)], axis=1)
    dataset.labels[:] = values + [1, 0] * rng.choice([-0.1, 0.1], (60, 1))
    dataset.labels[:, 1] *= 10 ** rng.choice([-0.1, 0.1], 60)
    wrong = [int(dataset.splits[split][0]) for split in ("train", "test", "val")]
    dataset.labels[wrong, [0, 1, 1]] = values[wrong, [0, 1, 1]] * [1, 0.1, 100] + [5, 0, 0]
    dataset.labels[dataset.splits["train"][5:9], 1] = np.nan
    samples = {split: np.stack([values[rows]] * 2) * [[[0.999]], [[1.001]]] for split, rows in dataset.splits.items()}
    found = suspect_labels(dataset, samples, statistics)
    assert [line[0] for line in found] == ["train", "val", "test"] and [line[3] for line in found] == ["a", "b", "b"]
    assert [line[1] for line in found] == [dataset.table.ids[row] for row in (wrong[0], wrong[2], wrong[1])]
    np.testing.assert_allclose([line[-1] for line in found], [50, 20, 10], rtol=1e-2)
    for line, row, t in zip(found, (wrong[0], wrong[2], wrong[1]), (0, 1, 1), strict=True):
        assert line[4] == dataset.labels[row, t] and line[7] == line[4] - line[5]
        np.testing.assert_allclose(line[5], values[row, t], rtol=1e-9)
        np.testing.assert_allclose(line[6], abs(values[row, t]) * 0.002 / np.sqrt(2), rtol=1e-9)
        atoms = collections.Counter(raw_records(60)[row]["species"])
        assert {symbol: int(n or 1) for symbol, n in re.findall(r"([A-Z][a-z]?)(\d*)", line[2])} == {
            symbol: n // math.gcd(*atoms.values()) for symbol, n in atoms.items()
        }
    write_suspects(tmp_path / "list.csv", found)
    header, *lines = csv.reader((tmp_path / "list.csv").read_text().splitlines())
    assert tuple(header) == HEADER and [line[:2] for line in lines] == [line[:2] for line in found]


def test_how_many_there_are_is_told():
    text = suspects_text({"train": 1200, "val": 0, "test": 3})
    assert text == "labels that all models agree against: 1,200 in train, 0 in val, 3 in test"
