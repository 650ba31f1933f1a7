"""Transforms of targets: what the model learns, and the way back."""

import dataclasses
import json

import numpy as np
import pytest

from crystalframer_jax.batching.table import compositions_of, table_of
from crystalframer_jax.batching.targets import (
    RIDGE,
    TargetStatistics,
    check_transform,
    standardise,
    to_label_units,
    to_learn,
)
from crystalframer_jax.config import ConfigError, TrainConfig, validate
from crystalframer_jax.official.config import official_from_config
from crystalframer_jax.structures.crystal import Crystal


def test_statistics_of_logarithms():
    labels = np.array([1.0, 100.0, np.nan])
    found = TargetStatistics.of("bulk", "GPa", labels, transform="log10")
    assert found == TargetStatistics("bulk", "GPa", 1.0, 1.0, "log10")


def test_one_of_two_targets_is_a_logarithm():
    statistics = (TargetStatistics("a", "GPa", 1.0, 0.5, "log10"), TargetStatistics("b", "eV", 2.0, 0.5))
    labels = np.array([[1.0, 2.0], [1000.0, -3.0]])
    outputs = standardise(to_learn(labels, statistics, None), statistics)
    np.testing.assert_allclose(outputs, [[-2, 0], [4, -10]], rtol=1e-6)
    np.testing.assert_allclose(to_label_units(outputs, statistics), labels, rtol=1e-12)


def test_unknown_labels_stay_unknown_and_bad_predictions_bad():
    statistics = (TargetStatistics("a", "GPa", 1.0, 0.5, "log10"),)
    assert np.isnan(to_learn(np.array([[np.nan]]), statistics, None)).all()
    assert np.isinf(to_label_units(np.array([[1e9]]), statistics)).all()


# Element references


def test_references_are_the_ridge_regression_of_numpy():
    rng = np.random.default_rng(0)
    compositions = rng.dirichlet(np.full(6, 0.3), 200)
    compositions = np.concatenate([compositions, np.zeros((200, 92))], axis=1)
    labels = compositions[:, :6] @ np.array([-3.0, 1, 0, 2, 5, -1]) + 7 + 0.1 * rng.normal(size=200)
    labels[::9] = np.nan
    found = TargetStatistics.of("e", "eV/atom", labels, compositions=compositions)
    known = np.isfinite(labels)
    mean, x = labels[known].mean(), compositions[known, :6]
    rows = np.concatenate([x, np.sqrt(RIDGE) * np.eye(6)])  # ridge: as if there were more crystals
    expected = np.linalg.lstsq(rows, np.concatenate([labels[known] - mean, np.zeros(6)]), rcond=None)[0]
    np.testing.assert_allclose(found.references[:6], expected, rtol=1e-9)
    assert not any(found.references[6:])  # of elements that are in no crystal
    left = labels[known] - x @ expected
    np.testing.assert_allclose([found.mean, found.std], [left.mean(), left.std()], rtol=1e-9)
    assert left.std() < 0.2 * labels[known].std()
    assert TargetStatistics(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_labels_come_back_with_references_and_logarithms():
    rng = np.random.default_rng(1)
    references = tuple(rng.normal(size=98))
    statistics = (
        TargetStatistics("a", "GPa", 1.0, 0.5, "log10", references),
        TargetStatistics("b", "eV", 2.0, 3.0),
        TargetStatistics("c", "eV", -1.0, 2.0, references=references[::-1]),
    )
    compositions = rng.dirichlet(np.full(98, 0.1), 5)
    labels = np.exp(rng.normal(size=(5, 3)))
    learned = to_learn(labels, statistics, compositions)
    np.testing.assert_allclose(learned[:, 0], np.log10(labels[:, 0]) - compositions @ np.array(references))
    np.testing.assert_array_equal(learned[:, 1], labels[:, 1])
    outputs = standardise(learned, statistics)
    np.testing.assert_allclose(to_label_units(outputs, statistics, compositions), labels, rtol=1e-12)
    draws = to_label_units(np.stack([outputs, outputs + 1]), statistics, compositions)
    np.testing.assert_allclose(draws[1, :, 2] - labels[:, 2], 2.0)


def test_compositions_are_shares_of_atoms_also_of_shared_sites():
    lattice, positions = 5 * np.eye(3), np.array([[0.0, 0, 0], [2.5, 2.5, 2.5], [0, 2.5, 2.5]])
    shared = np.zeros((3, 98))
    shared[0, 10], shared[0, 18], shared[1, 16], shared[2, 7] = 0.25, 0.5, 1, 1  # Na0.25K0.5 Cl O: a quarter is empty
    mixed = Crystal(np.array([19, 17, 8]), positions, lattice, shared)
    plain = Crystal(np.array([11, 17, 17]), positions, lattice)
    found = compositions_of(table_of([plain, mixed, plain], 3.0), np.array([1, 0]))
    expected = np.zeros((2, 98))
    expected[0, [10, 18, 16, 7]] = np.array([0.25, 0.5, 1, 1]) / 2.75
    expected[1, [10, 16]] = 1 / 3, 2 / 3
    np.testing.assert_allclose(found, expected)


# Logarithms


def test_labels_without_a_logarithm_are_counted():
    labels, ids = np.array([1.0, np.nan, 0.0, -2.0]), np.array(["a", "b", "c", "d"])
    check_transform("gap", "none", ids, labels)
    with pytest.raises(ConfigError, match=r"2 of 3 labels of gap .* first is 0 of c; .*target_transform='none'"):
        check_transform("gap", "log10", ids, labels)


def test_one_transform_for_all_targets_or_one_for_each():
    config = TrainConfig(targets=("a", "b")).as_dict()
    assert validate(config).transforms == ("none", "none")
    assert validate(config | {"target_transform": "log10"}).transforms == ("log10", "log10")
    assert validate(config | {"target_transform": "log10, none"}).transforms == ("log10", "none")
    for wrong in ("ln", "log10,none,none", ""):
        with pytest.raises(ConfigError, match=r"target_transform='.*none, log10.* 2 targets"):
            validate(config | {"target_transform": wrong})


def test_the_official_format_has_no_transforms():
    with pytest.raises(ConfigError, match="target_transform='log10'"):
        official_from_config(validate(TrainConfig().as_dict() | {"target_transform": "log10"}))
