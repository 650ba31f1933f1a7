"""Checkpoints of the official implementation made into runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_files import SCALING, lightning, saved, torch
from official_states import assert_same
from support import ROOT, random_crystal

from crystalframer_jax import Predictor, load_official
from crystalframer_jax.cli.convert import import_main
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.config.hyperparameters import KEYS
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.predictor import read_config
from crystalframer_jax.official.checkpoint_file import read_checkpoint
from crystalframer_jax.official.conversion import import_checkpoint
from crystalframer_jax.official.state import OfficialStateError
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def crystals():
    rng = np.random.default_rng(0)
    return [random_crystal(rng, n) for n in (3, 5)]


@pytest.fixture(scope="module")
def imported(averaged_file, tmp_path_factory) -> Path:
    """Run directory of a checkpoint with averaged weights."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(averaged_file, workdir, data="small")
    return workdir


@pytest.mark.parametrize("weights", [None, "swa", "last"])
def test_a_run_predicts_as_the_official_model_it_comes_from(imported, official, states, crystals, weights):
    state = states[0] if weights == "last" else states[1]
    expected = load_official(official, state | SCALING).predict(crystals)
    assert abs(expected[0, 0] - expected[1, 0]) > 1e-3
    np.testing.assert_array_equal(Predictor.load(imported, weights).predict(crystals), expected)


def test_what_a_run_directory_says(imported, official):
    config = read_config(imported)
    validate(config)
    assert json.loads((imported / "config.json").read_text()).keys() == KEYS.keys()
    assert (config.num_layers, config.norm_type, config.target_set, config.targets) == (1, "bn", "small", ("e_form",))
    summary = json.loads((imported / "summary.json").read_text())
    assert summary["selected_weights"] == "swa" and summary["imported_from"] == "model.ckpt"
    predictor = Predictor.load(imported)
    (target,) = predictor.targets
    assert (target.name, target.unit, target.mean, target.std) == ("e_form", "eV/atom", -2.0, 3.0)
    assert "step 123" in predictor.origin


def test_an_imported_run_is_evaluated_and_predicts_files(imported, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where the data are prepared
    assert evaluate_main([str(imported), "--split=val"]) == 0
    assert "e_form      eV/atom         6  " in capsys.readouterr().out
    assert predict_main([str(imported), str(ROOT / "examples" / "NaCl.cif")]) == 0
    assert "e_form (eV/atom)" in capsys.readouterr().out


@pytest.mark.parametrize("average", ["none", "not begun"])
def test_without_averaged_weights_the_last_are_taken(tmp_path, official, states, crystals, average):
    content = lightning(official, states[0], states[1] if average == "not begun" else None)
    run = import_checkpoint(saved(tmp_path, content), tmp_path / "run")
    assert run.weights == "last" and run.targets[0].unit == "label units" and run.config.target_set == ""
    expected = load_official(official, states[0] | SCALING).predict(crystals)
    np.testing.assert_array_equal(Predictor.load(tmp_path / "run").predict(crystals), expected)
    with pytest.raises(CheckpointError, match="averaged"):
        Predictor.load(tmp_path / "run", "swa")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_state_dict_alone_needs_hyperparameters(tmp_path, official, states, prefix):
    file = saved(tmp_path, {prefix + name: torch.tensor(value) for name, value in states[0].items()})
    with pytest.raises(UserError, match="--config"):
        import_checkpoint(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "official.json").write_text(json.dumps(official | {"target_set": "mp_flla_2015"}))
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'official.json'}"]
    assert import_main([str(file), *arguments]) == 0
    assert_same(Predictor.load(tmp_path / "run").variables, load_official(official, states[0]).variables)
    for content in ("{", "[1]", 10**5 * "["):
        (tmp_path / "official.json").write_text(content)
        with pytest.raises(SystemExit, match=r"error: .*official\.json"):
            import_main([str(file), f"--workdir={tmp_path / 'b'}", f"--config={tmp_path / 'official.json'}"])


def without_scaling(official: dict, states: tuple, *names: str) -> dict:
    content = lightning(official, states[0], None)
    for name in names:
        del content["state_dict"][name]
    return content


@pytest.mark.parametrize("missing", [("target_mean",), ("target_std",), ("target_mean", "target_std")])
def test_without_scaling_of_the_targets_the_output_is_raw(tmp_path, official, states, crystals, missing, capsys):
    content = without_scaling(official | {"target_set": "mp_flla_2015"}, states, *missing)
    file = saved(tmp_path, content)
    options = [str(file), "--target_set=mp_flla_2015"]
    assert import_main([*options, f"--workdir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    assert "note: no target_mean or no target_std: predictions are the raw output" in output
    assert "evaluate.py" not in output and read_config(tmp_path / "run").target_set == ""
    predictor = Predictor.load(tmp_path / "run")
    assert [(t.name, t.unit, t.mean, t.std) for t in predictor.targets] == [("e_form", "raw output", 0.0, 1.0)]
    raw = load_official(official, states[0]).predict(crystals)
    np.testing.assert_array_equal(predictor.predict(crystals), raw)
    with pytest.raises(SystemExit, match="--units=eV needs target_mean and target_std"):
        import_main([*options, f"--workdir={tmp_path / 'b'}", "--units=eV"])
    given = [f"--{name}={SCALING[name][0]}" for name in missing]
    assert import_main([*options, f"--workdir={tmp_path / 'scaled'}", *given]) == 0
    predictor = Predictor.load(tmp_path / "scaled")
    assert [(t.name, t.unit, t.mean, t.std) for t in predictor.targets] == [("e_form", "eV/atom", -2.0, 3.0)]
    np.testing.assert_array_equal(
        predictor.predict(crystals), load_official(official, states[0] | SCALING).predict(crystals)
    )


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        (True, ["--target_mean=0", "--target_std=0"], "target_std = 0.0 must be positive"),
        (True, ["--target_mean=0", "--target_std=nan"], "target_std = nan: finite numbers"),
        (True, ["--target_mean=0,1", "--target_std=1"], "target_mean has 2 numbers for 1 targets"),
        (False, ["--target_mean=0"], "the file has its own target_mean"),
    ],
)
def test_scaling_that_is_given_must_be_needed_and_fit(tmp_path, official, states, missing, options, words):
    file = saved(tmp_path, without_scaling(official, states, *(SCALING if missing else ())))
    with pytest.raises(SystemExit, match=words) as error:
        import_main([str(file), f"--workdir={tmp_path / 'run'}", *options])
    assert str(error.value).startswith(f"error: {file}: ") and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="2"):
        import_main([str(file), f"--workdir={tmp_path / 'run'}", "--target_mean=a"])


def test_hyperparameters_that_the_file_lacks_are_given(tmp_path, official, states, capsys):
    """Those of the file count; the others come from --config, and are never guessed."""
    partial = {key: value for key, value in official.items() if key not in ("cos_abs", "pooling")}
    partial["domain"] = None
    file, json_file = saved(tmp_path, lightning(partial, states[0], None)), tmp_path / "official.json"
    options = [str(file), f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match=r"missing: cos_abs, domain, pooling; give them with --config=FILE\.json"):
        import_main(options)
    json_file.write_text(json.dumps({"cos_abs": 1, "domain": "real"}))
    with pytest.raises(SystemExit, match="missing: pooling;"):
        import_main([*options, f"--config={json_file}"])
    json_file.write_text(json.dumps(official | {"cos_abs": 1, "pooling": "max", "ff_dim": 999, "lr": 1.0}))
    assert import_main([*options, f"--config={json_file}"]) == 0
    assert "the file has other values than --config, and they count: lr, ff_dim\n" in capsys.readouterr().out
    config = read_config(tmp_path / "run")
    assert (config.cos_abs, config.pooling, config.domain, config.ff_dim) == (1, "max", "real", official["ff_dim"])


def test_names_and_units_of_targets_can_be_given(tmp_path, official, states):
    file = saved(tmp_path, lightning(official | {"targets": "formation_energy"}, states[0], None))
    run = import_checkpoint(file, tmp_path / "a", targets=("e_form",), units=("meV",))
    assert [(t.name, t.unit) for t in run.targets] == [("e_form", "meV")]
    run = import_checkpoint(file, tmp_path / "b", targets=("e_form",), data="mp_flla_2015")
    assert [(t.name, t.unit) for t in run.targets] == [("e_form", "eV/atom")]
    for options, words in (
        ({"targets": ("a", "b")}, "--targets=a,b: the model has 1"),
        ({"units": ("eV", "K")}, "--units=eV,K"),
        ({"data": "nowhere"}, "target_set='nowhere'"),
        ({"data": "mp_flla_2015"}, "targets='formation_energy'"),
    ):
        with pytest.raises(ConfigError) as error:
            import_checkpoint(file, tmp_path / "c", **options)
        assert words in str(error.value)
    assert not (tmp_path / "c").exists()


def test_what_is_not_taken_over_is_said(tmp_path, official, states, capsys):
    changes = {"model_checkpoint_save_top_k": -1, "frame_method": "max_static"}
    file = saved(tmp_path, lightning(official | changes, states[0], None))
    assert import_main([str(file), f"--workdir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    for words in ("model_checkpoint_save_top_k=-1", "frame_method=max_static: here as published", "epoch 7, step 123"):
        assert words in output
    validate(read_config(tmp_path / "run"))


@pytest.mark.parametrize(("weights", "selected"), [(None, "swa"), ("swa", "swa"), ("model", "last")])
def test_which_weights_an_imported_run_uses(tmp_path, averaged_file, official, states, weights, selected, capsys):
    """Those of the model in best.ckpt of the official code are the best ones; a run directory calls them last."""
    option = [f"--weights={weights}"] if weights else []
    assert import_main([str(averaged_file), f"--workdir={tmp_path / 'run'}", *option]) == 0
    used = f"weights of the file (called last), and their average (swa); {selected} is used by default\n"
    assert used in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["selected_weights"] == selected
    expected = load_official(official, states[selected == "swa"]).variables
    assert_same(Predictor.load(tmp_path / "run").variables, expected)


def test_averaged_weights_that_are_not_there_cannot_be_used(tmp_path, official, states):
    file = saved(tmp_path, lightning(official, states[0], None))
    with pytest.raises(UserError, match="has no averaged weights"):
        import_checkpoint(file, tmp_path / "run", weights="swa")
    with pytest.raises(ConfigError, match=r"weights='last'.*model, swa"):
        import_checkpoint(file, tmp_path / "run", weights="last")


def test_nothing_is_overwritten(averaged_file, imported, tmp_path):
    with pytest.raises(UserError, match="holds a run already"):
        import_checkpoint(averaged_file, imported)
    (tmp_path / "notes.txt").write_text("x")
    for workdir, words in ((tmp_path, "is not empty"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(UserError, match=words):
            import_checkpoint(averaged_file, workdir)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


KILLED = """
import os, sys
from crystalframer_jax.official import conversion as exchange
write_json = exchange.write_json
exchange.write_json = lambda file, content: os._exit(9) if file.name == "summary.json" else write_json(file, content)
exchange.import_checkpoint(*sys.argv[1:])
"""


def test_an_import_that_is_killed_does_not_stand_in_the_way(averaged_file, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()  # an empty folder is as good as none
    command = [sys.executable, "-c", KILLED, str(averaged_file), str(workdir)]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2 and not list(workdir.iterdir())
    import_checkpoint(averaged_file, workdir)
    assert Predictor.load(workdir).step == 123


def test_an_import_that_fails_leaves_nothing(averaged_file, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Checkpoints, "save_weights", full)
    with pytest.raises(OSError):
        import_checkpoint(averaged_file, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_fit_are_listed(tmp_path, official, states):
    state = dict(states[0])
    del state["mlp.3.bias"]
    state["mlp.0.weight"] = np.zeros((16, 15), np.float32)
    file = saved(tmp_path, lightning(official, state, None))
    with pytest.raises(OfficialStateError) as error:
        import_checkpoint(file, tmp_path / "run")
    for words in (str(file), "missing mlp.3.bias [1]", "mlp.0.weight has shape [16, 15], expected [16, 16]"):
        assert words in str(error.value)
    average = dict(states[1])
    del average["mlp.1.running_var"]
    file = saved(tmp_path, lightning(official, states[0], average, averaged_steps=2))
    with pytest.raises(OfficialStateError, match=r"averaged weights.*missing mlp\.1\.running_var"):
        import_checkpoint(file, tmp_path / "run")
    average = states[1] | {"encoder.layers.0.self_attn.gauss_scale": np.array([9.0, 1.0], np.float32)}
    file = saved(tmp_path, lightning(official, states[0], average, averaged_steps=2))
    with pytest.raises(OfficialStateError, match="two trainings"):
        import_checkpoint(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((1,), float("nan")), "mlp.3.bias has values that are not finite"),
        (torch.full((1,), float("inf")), "mlp.3.bias has values that are not finite"),
        (torch.ones(1, dtype=torch.complex64), "mlp.3.bias is complex64, not floating-point"),
        (torch.ones(1, dtype=torch.int32), "mlp.3.bias is int32, not floating-point"),
        (torch.ones(1).to_sparse(), "mlp.3.bias is not an ordinary tensor (torch.float32, torch.sparse_coo"),
    ],
    ids=["nan", "inf", "complex", "integer", "sparse"],
)
@pytest.mark.parametrize("prefix", ["model.", "swa_model.module."])
def test_tensors_that_no_model_has_are_named(tmp_path, official, states, prefix, value, words):
    content = lightning(official, *states, averaged_steps=2)
    content["state_dict"][prefix + "mlp.3.bias"] = value
    file = saved(tmp_path, content)
    with pytest.raises(SystemExit) as error:
        import_main([str(file), f"--workdir={tmp_path / 'run'}"])
    message = str(error.value)
    assert message.startswith(f"error: {file}") and words in message and len(message) < 400
    assert ("averaged weights" in message) == (prefix != "model." and "ordinary" not in message)


def test_a_model_that_was_never_trained(tmp_path, official, states):
    state = states[0] | {"encoder.layers.0.self_attn.gauss_scale": np.zeros(2, np.float32)}
    with pytest.raises(OfficialStateError, match="never trained"):
        import_checkpoint(saved(tmp_path, lightning(official, state, None)), tmp_path / "run")


def test_the_scripts(averaged_file, tmp_path):
    run, file = tmp_path / "run", tmp_path / "back.ckpt"

    def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    process = script("import_torch_checkpoint", averaged_file, f"--workdir={run}", "--target_set=mp_flla_2015")
    assert process.returncode == 0 and process.stderr == ""
    for words in ("1 block, frames max, domain real", "e_form  eV/atom    -2", "swa is used by default"):
        assert words in process.stdout
    assert f"predict --model={run}" in process.stdout and f"evaluate --model={run}" in process.stdout
    process = script("export_torch_checkpoint", run, file, "--weights=last")
    assert process.returncode == 0 and process.stderr == "" and "last weights of" in process.stdout
    assert_same(read_checkpoint(file).state, read_checkpoint(averaged_file).state)
    process = script("import_torch_checkpoint", averaged_file, f"--workdir={run}")
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
