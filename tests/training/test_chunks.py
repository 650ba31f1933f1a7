"""Several optimizer steps in one dispatch give the bits of single steps, wherever the chunks are cut."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import StopAt, assert_equal_trees, nan_at, open_tiny, stored_state, tiny_config, tiny_runs

from crystalframer_jax.batching.device_table import Chunk
from crystalframer_jax.config import validate
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.training.ledger import Ledger
from crystalframer_jax.training.logging import Logbook, read_metrics
from crystalframer_jax.training.loop import Options, Run, TrainingError
from crystalframer_jax.training.state import TrainState

SINGLE, FOUR = Options(on_device=True, steps_per_dispatch=1), Options(on_device=True, steps_per_dispatch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs(as_users_do=True):
        yield tmp_path_factory.mktemp("chunks")


@pytest.fixture(scope="module")
def config(folder):
    """Two epochs of nine steps, of one shape; the second is averaged."""
    return tiny_config(folder / "data", batch_size=5, n_epochs=2, ema_decay=0.9)


def run_of(config, workdir: Path, options: Options, interruption: Interruption | None = None) -> Run:
    """A run whose batches all have the largest shape."""
    run = Run(validate(config), workdir, open_tiny(config), options, interruption)
    run.batches.shapes = run.batches.shapes[-1:]
    return run


def dispatched(run: Run) -> list[int]:
    """How many steps each dispatch of a run takes, filled while it trains."""
    lengths: list[int] = []

    def counted(advance):
        def counted_advance(state, work, freeze_norm):
            lengths.append(len(work.batches.species) if isinstance(work, Chunk) else 1)
            return advance(state, work, freeze_norm=freeze_norm)

        return counted_advance

    run.step = counted(run.step)
    return lengths


@dataclasses.dataclass
class Finished:
    """What a run leaves, without its times."""

    state: TrainState
    rest: list

    @classmethod
    def read(cls, config, workdir: Path) -> "Finished":
        state, meta = stored_state(config, workdir)
        lines = [line | {"crystals_per_s": 0, "waiting_share": 0} for line in read_metrics(workdir)]
        assert int(state.step) == 18 and int(state.swa_steps) == 9 and len(lines) == 2
        return cls(state, [lines, meta | {"seconds": 0}, (workdir / "predictions_test.csv").read_bytes()])


def assert_same_bits(actual: Finished, expected: Finished) -> None:
    """Of weights, optimizer, averages, metrics, results and predictions."""
    assert_equal_trees(actual.state, expected.state)
    assert actual.rest == expected.rest


@pytest.fixture(scope="module")
def undisturbed(config, folder) -> Finished:
    """A run that was never interrupted, with one step a dispatch."""
    run = run_of(config, folder / "single", SINGLE)
    lengths = dispatched(run)
    run.finish()
    assert lengths == 18 * [1]
    return Finished.read(config, folder / "single")


def test_chunks_change_no_bit(config, undisturbed, folder, monkeypatch):
    """Nor do checkpoints, which wait for the end of a chunk."""
    run = run_of(config, folder / "four", FOUR)
    monkeypatch.setattr(run.requests, "_seconds", -1.0)
    lengths, saved, save = dispatched(run), [], run.checkpoints.save
    monkeypatch.setattr(run.checkpoints, "save", lambda state, *x: saved.append(int(state.step)) or save(state, *x))
    run.finish()
    assert lengths == [4, 4, 1, 4, 4, 1] and saved == [4, 8, 9, 13, 17, 18]
    assert_same_bits(Finished.read(config, folder / "four"), undisturbed)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config, undisturbed, folder):
    """A stop takes place at the end of a chunk; those that follow begin elsewhere than without it."""
    workdir = folder / "stopped"
    for options, dispatches, epoch, step in (FOUR, 1, 1, 4), (SINGLE, 8, 2, 11):  # the end of an epoch asks as well
        with pytest.raises(TrainingInterrupted, match=f"in epoch {epoch}, saved at step {step};"):
            run_of(config, workdir, options, StopAt(dispatches)).finish()
    run = run_of(config, workdir, FOUR)
    lengths = dispatched(run)
    run.finish()
    assert lengths == [4, 1, 1, 1]
    assert_same_bits(Finished.read(config, workdir), undisturbed)


# Steps that are not finite


@pytest.fixture(scope="module")
def without_frames(config):
    """A model that compiles faster; what a step does with its loss is the same."""
    changed = config.copy_and_resolve_references()
    changed.update(value_pe_angle_real=0, frame_method="no")
    return changed


def stopped_by_nan(config, workdir: Path, options: Options) -> tuple[str, dict]:
    """The error of a run and its report."""
    with pytest.raises(TrainingError) as error:
        run_of(config, workdir, options).finish()
    return str(error.value).replace(str(workdir), "RUN"), json.loads((workdir / "nonfinite_step_5.json").read_text())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_inside_a_chunk_is_reported_as_with_single_steps(without_frames, folder, monkeypatch):
    """Step 5, the second of four: the weights stand still since then, and so does the count of steps."""
    nan_at(monkeypatch, 5)
    (message, report), expected = (
        stopped_by_nan(without_frames, folder / f"nan-{options.steps_per_dispatch}", options)
        for options in (FOUR, SINGLE)
    )
    assert (message, report) == expected
    assert "not finite at step 5 (epoch 1)" in message and (report["step"], report["loss"]) == (5, "nan")


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "steps_taken"), [(0, 2), (1, 4)])
def test_steps_after_one_that_is_not_finite(without_frames, folder, monkeypatch, capsys, allowed, steps_taken):
    """Without permission weights and counts stand still since then; else the next steps are those of single steps."""
    nan_at(monkeypatch, 5)
    run = run_of(without_frames, folder / "unused", dataclasses.replace(FOUR, skip_nonfinite=allowed))
    run.checkpoints.close()
    first, second = itertools.islice(run.batches.chunks(0, 4), 2)
    state, _ = run.step(run.initial_state(), first)
    start = jax.tree.map(np.array, state)
    for number in range(steps_taken):
        state, _ = run.step(state, jax.tree.map(lambda x, number=number: x[number], second.batches))
    ended, result = run.step(jax.tree.map(jax.numpy.array, start), second)
    assert_equal_trees(ended, state)
    assert (int(ended.step), int(ended.skipped_steps)) == (4 + steps_taken, 1)
    with Logbook(run.workdir, run.batches, 0) as log:
        ledger = Ledger(0, run.batches, 4, {"results": [], "seconds": 0.0}, allowed, log)
        ledger.add(result)
        assert ledger.position == 8
        failed = ledger.look(at_all=True)
    if allowed:
        assert failed is None and len(ledger.results) == 3
        assert "epoch 1: skipped a step with loss nan" in capsys.readouterr().out
    else:
        assert (failed.step, failed.finite, failed.skipped_steps) == (5, False, 1) and len(ledger.results) == 1


def test_batches_packed_on_the_host_take_a_dispatch_each(config, folder):
    """Whatever is asked for, and without any program for chunks."""
    run = run_of(config, folder / "host", Options(on_device=False, steps_per_dispatch=4))
    run.checkpoints.close()
    works = list(run.batches.dispatches(16, 4))
    assert len(works) == 2 and not any(isinstance(work, Chunk) for work in works)
    with pytest.raises(ValueError, match="not kept there"):
        next(run.batches.chunks(0, 4))
