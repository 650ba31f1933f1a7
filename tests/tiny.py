"""Tiny training runs, for the tests of training and of prediction."""

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forks import Fork
from ml_collections import ConfigDict
from small_sets import small_set
from support import AS_USERS_DO

from crystalframer_jax.config import TrainConfig, validate, validate_model
from crystalframer_jax.configs import default
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.parallel.interruption import Interruption
from crystalframer_jax.reporting import plots
from crystalframer_jax.runs.checkpoints import Checkpoints
from crystalframer_jax.training import loop, validation
from crystalframer_jax.training.logging import read_metrics
from crystalframer_jax.training.loop import Run
from crystalframer_jax.training.state import TrainState


@contextlib.contextmanager
def jit_as_users_do() -> Iterator[None]:
    """Functions that are jitted meanwhile are compiled as users compile them; none may be called by another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_USERS_DO))
        yield


MAKERS = [(loop, "make_recipe"), (loop, "make_loss"), (loop, "make_train_step"), (validation, "make_forward")]


def remembered(make: Callable) -> Callable:
    """`make`, which gives equal arguments what it gave before: a function that is traced and compiled already."""
    made = {}

    @functools.wraps(make)
    def make_once(*args):
        if args not in made:
            made[args] = make(*args)
        return made[args]

    return make_once


@contextlib.contextmanager
def tiny_runs(as_users_do: bool = False) -> Iterator[None]:
    """Register the target set "small" (60 crystals), draw figures of few points, make equal programs once.

    Training steps are compiled in haste, or as users compile them.
    """
    make = inspect.unwrap(loop.make_train_step)

    def make_as_users_do(*args):
        with jit_as_users_do():
            return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGET_SETS, "small", small_set())
        patch.setitem(plots.STYLE, "figure.dpi", 30)
        if as_users_do:
            patch.setattr(loop, "make_train_step", make_as_users_do)
        for module, name in MAKERS:
            patch.setattr(module, name, remembered(inspect.unwrap(getattr(module, name))))
        yield


def tiny_config(data_dir: Path, **changes) -> ConfigDict:
    """One small block on 60 crystals; three epochs of three steps, the last one averaged."""
    config = default.get_config()
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    config.update(value_pe_dist_real=8, value_pe_angle_real=8, cutoff_radius=4.0)
    config.update(batch_size=16, n_epochs=3, swa_epochs=1, lr=2e-3, sch_params=(20.0,))
    config.update(target_set="small", data_dir=str(data_dir))
    config.update(changes)
    return config


STEPS_PER_EPOCH = 3
NO_FRAMES = {"value_pe_angle_real": 0, "frame_method": "no"}  # for tests about other things: compiled sooner


def open_tiny(config: ConfigDict | TrainConfig):
    """The dataset of a configuration."""
    config = validate_model(config)
    return open_dataset(config.target_set, config.targets, config.cutoff, config.data_dir)


def assert_equal_trees(a, b) -> None:
    """Every leaf has the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def start_training(config: ConfigDict, workdir: Path, *flags: str, seconds_per_step: float = 0.0) -> Fork:
    """scripts/train.py in a process of its own; its configuration is written beside `config.data_dir`."""
    file = Path(config.data_dir).parent / f"{workdir.name}_config.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config.to_dict()!r}, convert_dict=False)\n"
    )
    arguments = [str(seconds_per_step), f"--config={file}", f"--workdir={workdir}"]
    return Fork(Path(__file__).parent / "train_tiny.py", *arguments, *flags)


class StopAt(Interruption):
    """Asks to stop when it is asked for the given time."""

    def __init__(self, question: int):
        super().__init__()
        self.left = question

    def reason(self) -> str:
        self.left -= 1
        return "" if self.left > 0 else "the test"


def stored_state(config: ConfigDict, workdir: Path) -> tuple[TrainState, dict]:
    """The training state of the last checkpoint of a run, and its meta data."""
    run = Run(validate(config), workdir, open_tiny(config))
    run.checkpoints.close()
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.restore_state(checkpoints.last(), run.initial_state())
    finally:
        checkpoints.close()


def assert_same_run(config: ConfigDict, workdir: Path, expected: Path) -> None:
    """All that two runs leave is equal to the bit, except for times."""
    for line, other in zip(read_metrics(workdir), read_metrics(expected), strict=True):
        times = {"crystals_per_s": 0, "waiting_share": 0}
        assert line | times == other | times
    times = {"seconds": 0, "crystals_per_s": 0}
    summaries = [json.loads((run / "summary.json").read_text()) for run in (workdir, expected)]
    assert summaries[0] | times == summaries[1] | times
    assert (workdir / "predictions_test.csv").read_bytes() == (expected / "predictions_test.csv").read_bytes()
    (state, meta), (other, other_meta) = stored_state(config, workdir), stored_state(config, expected)
    assert_equal_trees(state, other)
    assert meta | {"seconds": 0} == other_meta | {"seconds": 0}
    assert int(state.step) == 9 and int(state.swa_steps) == 3
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.swa_params))


def nan_at(monkeypatch, step: int) -> None:
    """Let the loss of one step be NaN in every run that is made from now on."""
    make = loop.make_loss

    def make_nan(*args):
        loss = make(*args)

        def loss_with_nan(params, state, *args):
            value, rest = loss(params, state, *args)
            return value * jnp.where(state.step == step, jnp.nan, 1), rest

        return loss_with_nan

    monkeypatch.setattr(loop, "make_loss", make_nan)


def assert_same_bits(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert isinstance(a, jax.Array) and a.dtype == e.dtype and a.shape == e.shape, name
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes(), name
