"""A program is compiled with a line that says so, never silently."""

import re

import jax
import pytest
from small_sets import open_small
from tiny import open_tiny, tiny_config, tiny_runs

from crystalframer_jax.config import validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.training import logging, loop
from crystalframer_jax.training.loop import Options, Run


def lines_of(capsys) -> list[str]:
    """What was printed about programs since the last call."""
    return [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]


def test_every_new_shape_is_announced_once(tmp_path, capsys):
    """Of single batches and of chunks, with and without what is optional, and the call goes through."""
    batches = TrainingBatches(open_small(tmp_path), 4, 1, seed=0, on_device=True)
    batch, chunk = batches[0], next(batches.chunks(0, 2))
    other = batches[1]
    calls = []
    step = logging.announced("the step", lambda *arguments, **options: calls.append((arguments, options)) or 7)
    assert step("state", batch, None) == step("state", other, None) == 7 and calls[0] == (("state", batch, None), {})
    atoms, edges = batches.shapes[0].num_atoms, batches.shapes[0].edges
    what = f"of up to {atoms:,} atoms and {edges:,} neighbors ..."
    assert lines_of(capsys) == [f"compiling the step for batches {what}"]
    step("state", chunk, None)
    assert lines_of(capsys) == [f"compiling the step for chunks of batches {what}"]
    for _ in range(2):
        step("state", batch, 3)
    step("state", batch, 4, freeze=True)
    assert len(lines_of(capsys)) == 2 and calls[-1][1] == {"freeze": True}
    batches.shapes = batches.shapes[-1:]
    step("state", batches[0], None)
    (line,) = lines_of(capsys)
    assert f"{batches.shapes[0].num_atoms:,} atoms" in line and what not in line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose programs do nothing."""
    monkeypatch.setattr(loop, "make_train_step", lambda *_: lambda state, work, freeze_norm: (state, {}))
    with tiny_runs(tmp_path / "compiled"):
        config = tiny_config(tmp_path / "data", frame_method="no", value_pe_angle_real=0)
        run = Run(validate(config), tmp_path / "run", open_tiny(config), Options(on_device=False))
        yield run
        run.checkpoints.close()


def test_a_run_announces_training_steps_and_predictions(run, capsys):
    for batch in list(run.batches.iterate(0)):
        run.step(None, batch, freeze_norm=False)
    (line,) = lines_of(capsys)
    assert re.fullmatch(
        r"compiling the training step for batches of up to [\d,]+ atoms and [\d,]+ neighbors \.\.\.", line
    )
    variables = jax.eval_shape(run.model.init, jax.random.key(0), run.batches[0])
    variables = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), variables)
    run.evaluator.predict(variables, run.dataset.splits["val"])
    (line,) = lines_of(capsys)
    assert line.startswith("compiling the prediction for batches of up to ")


def test_a_run_tells_how_full_its_batches_are(run):
    fill, shape = run.batches.fill_factors(), run.batches.shapes[0]
    assert run.batches.describe() == (
        f"batches of 16 crystals in {shape.num_atoms:,} atom slots ({fill.atoms:.0%} filled) with {shape.edges:,} for "
        f"neighbors ({fill.edges:.0%} filled)"
    )
