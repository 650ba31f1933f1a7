"""Transforms of targets: what the model learns, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystalframer_jax.batching.targets import TargetStatistics, check_transform, standardise, to_label_units
from crystalframer_jax.config import ConfigError, TrainConfig, validate
from crystalframer_jax.official.config import official_from_config


def test_statistics_of_logarithms():
    labels = np.array([1.0, 100.0, np.nan])
    found = TargetStatistics.of("bulk", "GPa", labels, transform="log10")
    assert found == TargetStatistics("bulk", "GPa", 1.0, 1.0, "log10")


@pytest.mark.parametrize("make", [np.array, lambda values: jnp.array(values, jnp.float32)], ids=["numpy", "jax"])
def test_one_of_two_targets_is_a_logarithm(make):
    statistics = (TargetStatistics("a", "GPa", 1.0, 0.5, "log10"), TargetStatistics("b", "eV", 2.0, 0.5))
    labels = make([[1.0, 2.0], [1000.0, -3.0]])
    standard = standardise(labels, statistics)
    assert type(standard) is type(labels) and standard.dtype == labels.dtype
    np.testing.assert_allclose(standard, [[-2, 0], [4, -10]], rtol=1e-6)
    np.testing.assert_allclose(to_label_units(np.asarray(standard), statistics), labels, rtol=1e-5)


def test_unknown_labels_change_no_gradient_and_bad_predictions_stay_bad():
    """An unknown label is 0 in a batch and masked."""
    statistics = (TargetStatistics("a", "GPa", 1.0, 0.5, "log10"),)
    assert np.isnan(standardise(np.array([[np.nan]]), statistics)).all()
    assert np.isinf(to_label_units(np.array([[1e9]]), statistics)).all()
    known = jnp.array([[True], [False]])

    def loss(scale):
        targets = standardise(scale * jnp.array([[100.0], [0.0]]), statistics)
        return jnp.sum(jnp.where(known, targets, 0))

    assert jax.grad(loss)(1.0) == pytest.approx(2 / np.log(10), rel=1e-5)


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
