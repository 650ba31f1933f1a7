"""Training steps take a state in fewer arrays: the same steps, and nothing of it is seen in what a run leaves."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import (
    NO_FRAMES,
    STEPS_PER_EPOCH,
    StopAt,
    assert_equal_trees,
    assert_same_run,
    open_tiny,
    tiny_config,
    tiny_runs,
)

from crystalframer_jax.config import validate
from crystalframer_jax.parallel.interruption import TrainingInterrupted
from crystalframer_jax.training.layout import for_steps, separate, stacked
from crystalframer_jax.training.loop import Run
from crystalframer_jax.training.start import train
from crystalframer_jax.training.state import TrainState

TWO_BLOCKS = {"num_layers": 2, "scale_real": (1.4,)}  # alike
FOUR_BLOCKS = NO_FRAMES | {"num_layers": 4, "scale_real": (1.4, 2.0), "model_dim": 8, "ff_dim": 8}  # of two kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs():
        yield tmp_path_factory.mktemp("stacking")


def run_of(folder: Path, name: str, **changes) -> Run:
    config = tiny_config(folder / "data", **(FOUR_BLOCKS | changes))
    run = Run(validate(config), folder / name, open_tiny(config))
    run.checkpoints.close()
    return run


def any_state(run: Run) -> TrainState:
    """Numbers of which no two are equal, in numpy: nothing is compiled."""
    numbers = itertools.count()

    def fill(like: jax.ShapeDtypeStruct) -> np.ndarray:
        return next(numbers) + np.arange(like.size, dtype=like.dtype).reshape(like.shape) / max(2 * like.size, 1)

    return jax.tree.map(lambda like: fill(like).astype(like.dtype), jax.eval_shape(run.initial_state))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_blocks_are_stacked_and_separated_again(folder, optimizer):
    run = run_of(folder, "there and back", optimizer=optimizer, ema_decay=0.9)
    state = any_state(run)
    together = stacked(state, run.config)
    for tree in (together.params, together.ema_params, together.calibration):
        assert {name for name in tree if name.startswith("block")} == {"blocks_0", "blocks_1"}
    kernels = [state.params[f"block_{number}"]["attention"]["q"]["kernel"] for number in (1, 3)]
    np.testing.assert_array_equal(together.params["blocks_1"]["attention"]["q"]["kernel"], np.stack(kernels))
    blocks = [path for path, _ in jax.tree_util.tree_leaves_with_path(together) if "'block_" in str(path)]
    assert blocks == []
    assert_equal_trees(separate(together, run.config), state)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw"}, {"optimizer": "muon"}, {"optimizer": "sgd"}, {"frozen_layers": "block_2"}]
)
def test_the_layout_of_steps_can_be_undone(folder, changes):
    """Moments and averages have an array each in it; those of Muon are matrices."""
    run = run_of(folder, "undone", ema_decay=0.9, **changes)
    state = any_state(run)
    laid_out, undo = for_steps(state, run.config)
    weights = sum(x.size for x in jax.tree.leaves(state.params))
    assert laid_out.swa_params.shape == laid_out.ema_params.shape == (weights,)
    vectors = [x for x in jax.tree.leaves(laid_out.opt_state) if x.ndim == 1 and x.size > 500]
    assert len(vectors) == (0 if run.config.optimizer == "sgd" else 2)
    assert_equal_trees(undo(laid_out), state)


@pytest.mark.parametrize("changes", [{"frozen_layers": "block_2"}, {"scale_real": (1.0, 1.4, 1.7, 2.0)}])
def test_blocks_stay_apart_where_they_differ(folder, changes):
    run = run_of(folder, "apart", **changes)
    state = any_state(run)
    assert stacked(state, run.config) is state
    assert_equal_trees(separate(state, run.config), state)


def test_steps_in_their_layout_are_those_without(folder, x64):
    """Averages, moments and norms included; two of them enter the equal average."""
    changes = {"clip_norm": 0.5, "weight_decay": 0.1, "bias_weight_decay": 0.2, "ema_decay": 0.9, "dropout": 0.2}
    run = run_of(folder, "steps", precision="float64", swa_epochs=2, optimizer="muon", **changes, **TWO_BLOCKS)
    states = []
    for state, undo in ((run.initial_state(), lambda state: state), for_steps(run.initial_state(), run.config)):
        for step in range(STEPS_PER_EPOCH + 2):
            state, result = run.step(state, run.batches[step])
        states.append((undo(state), result))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(states[1]), jax.tree.leaves(states[0]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-11, err_msg=name)
    first = run.initial_state().params["block_1"]["linear1"]["kernel"]
    assert np.abs(states[1][0].params["block_1"]["linear1"]["kernel"] - first).max() > 1e-4


def test_an_interrupted_run_of_equal_blocks_goes_on_from_its_separate_ones(folder):
    """In the middle of an epoch."""
    config = tiny_config(folder / "data", **(FOUR_BLOCKS | TWO_BLOCKS))
    run = run_of(folder, "asked", **TWO_BLOCKS)
    assert "blocks_0" in stacked(any_state(run), run.config).params
    train(config, folder / "whole")
    with pytest.raises(TrainingInterrupted):
        train(config, folder / "interrupted", interruption=StopAt(3))
    train(config, folder / "interrupted")
    assert_same_run(config, folder / "interrupted", folder / "whole")
