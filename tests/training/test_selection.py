"""Which weights of a finished training are selected."""

import numpy as np
import pytest

from crystalframer_jax.training.validation import selected

SPREAD = np.random.default_rng(0).normal(size=400)
SPREAD -= SPREAD.mean()
LOSS = 1 + 0.1 * np.random.default_rng(1).random(400)
TWO_ERRORS = 2 * np.std(SPREAD, ddof=1) / 20  # of the mean of 400


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"last": LOSS, "best": LOSS}, "swa"),
        ({"last": LOSS + SPREAD - 0.9 * TWO_ERRORS}, "swa"),
        ({"last": LOSS + SPREAD - 1.1 * TWO_ERRORS}, "last"),
        ({"last": LOSS + SPREAD - 1.1 * TWO_ERRORS, "best": LOSS + SPREAD - 1.2 * TWO_ERRORS}, "best"),
        ({"ema": LOSS - 1e-3, "best": LOSS - 1e-3}, "ema"),
        ({"best": LOSS + SPREAD - 0.5 * TWO_ERRORS, "ema": LOSS + SPREAD}, "swa"),
    ],
)
def test_averaged_weights_are_selected_unless_others_are_better_by_two_standard_errors(others, expected):
    assert selected({"swa": LOSS, **others}) == expected
    assert selected({**others, "swa": LOSS}) == expected


def test_the_last_weights_are_preferred_to_the_epoch_that_happened_to_be_best():
    assert selected({"best": LOSS + SPREAD - 0.9 * TWO_ERRORS, "last": LOSS}) == "last"
    assert selected({"last": LOSS}) == "last"


def test_weights_whose_loss_is_not_finite_are_selected_only_if_there_are_no_others():
    broken = np.where(np.arange(400) == 7, np.nan, LOSS)
    assert selected({"swa": broken, "last": LOSS + 1}) == "last"
    assert selected({"swa": broken}) == "swa"


def test_one_validation_crystal_decides_nothing():
    assert selected({"swa": np.array([2.0]), "last": np.array([1.0])}) == "swa"
