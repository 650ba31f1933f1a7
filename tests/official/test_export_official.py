"""Runs made into checkpoints of the official implementation."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_files import lightning, saved, torch
from official_states import assert_same

from crystalframer_jax import Predictor
from crystalframer_jax.cli.convert import export_main
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.predictor import stored_fields
from crystalframer_jax.official.checkpoint_file import read_checkpoint
from crystalframer_jax.official.conversion import export_checkpoint, import_checkpoint
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def imported(averaged_file, tmp_path_factory) -> Path:
    """Run directory of a checkpoint with averaged weights."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(averaged_file, workdir, data="small")
    return workdir


def test_a_run_comes_back_as_the_checkpoint_it_was(imported, averaged_file, tmp_path):
    file = tmp_path / "back.ckpt"
    export_checkpoint(imported, file, "last")
    before, after = read_checkpoint(averaged_file), read_checkpoint(file)
    assert_same(after.state, before.state)
    assert_same(after.swa_state, before.swa_state)
    assert (after.target_mean, after.target_std, after.epoch, after.step) == (-2.0, 3.0, 7, 123)
    changed = {"experiment_name": "code_v5", "target_set": None, "param_file": "tiny.json"}
    assert after.hyper_parameters | changed == before.hyper_parameters


def test_the_names_of_an_exported_file_are_those_of_the_official_model(imported, averaged_file, tmp_path):
    """The official code loads with strict=True: nothing may be missing or left over."""
    export_checkpoint(imported, tmp_path / "swa.ckpt")
    expected = torch.load(averaged_file, weights_only=False)["state_dict"]
    content = torch.load(tmp_path / "swa.ckpt", weights_only=True)  # plain values and tensors
    found = content["state_dict"]
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in expected.items()}
    assert {"pytorch-lightning_version", "hyper_parameters", "epoch", "global_step"} <= content.keys()
    # The averaged weights, which an imported run selects, are also those of the model itself.
    for name in ("mlp.0.weight", "mlp.1.running_var"):
        assert torch.equal(found["model." + name], expected["swa_model.module." + name])


def test_a_run_without_an_average(tmp_path, official, states):
    file = saved(tmp_path, lightning(official, states[0], None))
    import_checkpoint(file, tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "back.ckpt")
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert content["swa_model.n_averaged"] == 0 and "swa_model.module.mlp.0.weight" in content
    assert read_checkpoint(tmp_path / "back.ckpt").swa_state is None
    file = saved(tmp_path, lightning(official | {"swa_epochs": 0}, states[0], None))
    import_checkpoint(file, tmp_path / "never")
    export_checkpoint(tmp_path / "never", tmp_path / "back.ckpt", overwrite=True)
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in content if name.startswith("swa_model")]


def add_checkpoint(run: Path, step: int, changes: dict, error: float | None = None) -> None:
    """One more checkpoint, as training writes it: the first one with other fields."""
    predictor = Predictor.load(run, "last")
    model = stored_fields(predictor.config, predictor.variables)
    rest = {"step": jnp.int32(step), "opt_state": {}, "swa_steps": jnp.int32(0), "skipped_steps": jnp.int32(0)}
    checkpoints = Checkpoints(run, writable=True, keep_last=3)
    meta = checkpoints.meta(123) | {"epoch": step}
    checkpoints.save(TrainState(**model | changes, **rest), meta, error)
    checkpoints.close()


@pytest.fixture
def two_checkpoints(imported, tmp_path) -> Path:
    """A run whose best weights (step 200) are not the last (step 300), which are averaged."""
    shutil.copytree(imported, tmp_path / "run")
    swa = Predictor.load(imported, "swa").variables
    average = {f"swa_{name}": swa[name] for name in ("params", "batch_stats")}
    nothing = {f"swa_{name}": jax.tree.map(np.zeros_like, swa[name]) for name in ("params", "batch_stats")}
    add_checkpoint(tmp_path / "run", 200, {"params": swa["params"]} | nothing, error=0.5)
    add_checkpoint(tmp_path / "run", 300, average)
    return tmp_path / "run"


def test_the_best_weights_go_with_the_last_average(two_checkpoints, states, tmp_path):
    exported = export_checkpoint(two_checkpoints, tmp_path / "best.ckpt", "best")
    assert (exported.epoch, exported.step, exported.has_average) == (200, 200, True)
    found = read_checkpoint(tmp_path / "best.ckpt")
    assert_same(found.state["mlp.0.weight"], states[1]["mlp.0.weight"])
    assert_same(found.swa_state, states[1] | {"mlp.1.num_batches_tracked": np.int64(0)})
    exported = export_checkpoint(two_checkpoints / "checkpoints" / "200", tmp_path / "200.ckpt")
    assert (exported.step, exported.has_average) == (200, False)


def test_a_damaged_checkpoint_is_not_hidden(two_checkpoints, tmp_path):
    for file in (two_checkpoints / "checkpoints" / "300" / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="300 cannot be used: model/"):
        export_checkpoint(two_checkpoints, tmp_path / "best.ckpt", "best")
    assert not (tmp_path / "best.ckpt").exists()


def test_an_average_without_batch_norm_statistics_is_left_out(two_checkpoints, tmp_path):
    """They are computed at the end of the training."""
    like = Predictor.load(two_checkpoints, "swa").variables["batch_stats"]
    add_checkpoint(two_checkpoints, 400, {"swa_batch_stats": jax.tree.map(np.zeros_like, like)})
    exported = export_checkpoint(two_checkpoints, tmp_path / "a.ckpt", "last")
    assert not exported.has_average and any("BatchNorm statistics" in note for note in exported.notes)
    assert read_checkpoint(tmp_path / "a.ckpt").swa_state is None


def test_what_the_official_code_computes_differently_is_said(tmp_path, official, states, capsys):
    changes = {"precision": "float64", "cutoff_radius": 4.0, "frame_method": "max_static"}
    import_checkpoint(saved(tmp_path, lightning(official | changes, states[0], None)), tmp_path / "run")
    assert export_main([str(tmp_path / "run"), str(tmp_path / "a.ckpt")]) == 0
    output = capsys.readouterr().out
    for words in ("precision=float64: the official model stores", "cutoff_radius=4.0", "frame_method=max_static"):
        assert f"note: {words}" in output


def test_a_file_is_replaced_only_if_asked_for(imported, tmp_path):
    file = tmp_path / "a.ckpt"
    file.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"a\.ckpt exists; replace it with --overwrite"):
        export_main([str(imported), str(file)])
    assert file.read_bytes() == b"mine"
    assert export_main([str(imported), str(file), "--overwrite"]) == 0
    assert read_checkpoint(file).step == 123
    with pytest.raises(UserError, match="is a folder"):
        export_checkpoint(imported, tmp_path, overwrite=True)


def test_an_export_of_no_run_is_an_error_of_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        export_main([str(tmp_path / "nowhere"), str(tmp_path / "a.ckpt")])
    assert not list(tmp_path.iterdir())
