"""Checkpoint files of the official implementation: read without executing them, made into runs, and written."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path, PosixPath

import numpy as np
import pytest
from support import random_crystal
from test_official import assert_same, distinct_variables, golden
from test_training import tiny_runs

from crystalframer_jax import Predictor, load_official
from crystalframer_jax.cli import evaluate_main, predict_main
from crystalframer_jax.config import ConfigError, model_config, validate
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.exchange import export_checkpoint, import_checkpoint
from crystalframer_jax.inference.exchange_cli import export_main, import_main
from crystalframer_jax.inference.official import OfficialStateError, official_from_variables
from crystalframer_jax.inference.official_config import config_from_official
from crystalframer_jax.inference.predictor import read_config
from crystalframer_jax.inference.torch_checkpoint import (
    OfficialCheckpoint,
    TorchFileError,
    read_checkpoint,
    write_checkpoint,
)
from crystalframer_jax.training.checkpoint import CheckpointError

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
# One small block with BatchNorm, so that the averaged weights have running averages of their own.
TINY = {"num_layers": 1, "model_dim": 16, "head_num": 2, "ff_dim": 32, "embedding_dim": [16], "norm_type": "bn"}
TINY |= {"value_pe_dist_real": 8, "value_pe_angle_real": 8, "adaptive_cutoff_sigma": -2.0, "param_file": "tiny.json"}
SCALING = {"target_mean": np.array([-2.0], np.float32), "target_std": np.array([3.0], np.float32)}


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory) -> Iterator[None]:
    with tiny_runs(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def official() -> dict:
    """Official hyperparameters of a tiny model."""
    return golden("max")[0] | TINY


@pytest.fixture(scope="module")
def states(official) -> tuple[dict, dict]:
    """Official state dicts of the last and of averaged weights, with the same calibration."""
    config = model_config(config_from_official(official)[0])
    last, average = distinct_variables(config, 0), distinct_variables(config, 1)
    average["calibration"] = last["calibration"]
    return official_from_variables(last, config), official_from_variables(average, config)


@pytest.fixture(scope="module")
def crystals():
    rng = np.random.default_rng(0)
    return [random_crystal(rng, n) for n in (3, 5)]


def lightning(official: dict, last: dict, average: dict | None, averaged_steps: int = 0, **changes) -> dict:
    """What PyTorch Lightning stores of the official model, with its names."""
    state = {f"model.{name}": torch.tensor(value) for name, value in last.items()}
    if average is not None:
        state["swa_model.n_averaged"] = torch.tensor(averaged_steps)
        state |= {f"swa_model.module.{name}": torch.tensor(value) for name, value in average.items()}
    state |= {name: torch.tensor(value) for name, value in SCALING.items()}
    return {
        "epoch": 7,
        "global_step": 123,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": PosixPath("/somewhere")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 5e-4}]}],
        "lr_schedulers": [{"base_lrs": [5e-4], "last_epoch": 123, "lr_lambdas": [None]}],
        "hparams_name": None,
        "hyper_parameters": official,
        **changes,
    }


def saved(folder: Path, content: object, name: str = "model.ckpt") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def averaged_file(tmp_path_factory, official, states) -> Path:
    return saved(tmp_path_factory.mktemp("averaged"), lightning(official, *states, averaged_steps=50))


@pytest.fixture(scope="module")
def imported(averaged_file, tmp_path_factory) -> Path:
    """Run directory of a checkpoint with averaged weights."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(averaged_file, workdir, data="small")
    return workdir


# Import


@pytest.mark.parametrize("weights", [None, "swa", "last"])
def test_a_run_predicts_as_the_official_model_it_comes_from(imported, official, states, crystals, weights):
    state = states[0] if weights == "last" else states[1]
    expected = load_official(official, state | SCALING).predict(crystals)
    assert abs(expected[0, 0] - expected[1, 0]) > 1e-3
    np.testing.assert_array_equal(Predictor.load(imported, weights).predict(crystals), expected)


def test_what_a_run_directory_says(imported, official):
    config = read_config(imported)
    validate(config)
    assert json.loads((imported / "config.json").read_text()).keys() == set(config)
    assert (config.num_layers, config.norm_type, config.target_set, config.targets) == (1, "bn", "small", "e_form")
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
    (target,) = Predictor.load(tmp_path / "run").targets
    assert (target.name, target.unit, target.mean, target.std) == ("e_form", "eV/atom", 0.0, 1.0)
    for content in ("{", "[1]"):
        (tmp_path / "official.json").write_text(content)
        with pytest.raises(SystemExit, match=r"error: .*official\.json"):
            import_main([str(file), *arguments])


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
    official = {key: value for key, value in official.items() if key != "cos_abs"} | {"lr_sch": "const"}
    official["frame_method"] = "max_static"
    file = saved(tmp_path, lightning(official, states[0], None))
    assert import_main([str(file), f"--workdir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    for words in ("lr_sch='const'", "cos_abs=0", "frame_method=max_static: here as published", "epoch 7, step 123"):
        assert words in output
    validate(read_config(tmp_path / "run"))


def test_a_run_is_not_overwritten(averaged_file, imported):
    with pytest.raises(UserError, match="holds a run already"):
        import_checkpoint(averaged_file, imported)


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


def test_a_model_that_was_never_trained(tmp_path, official, states):
    state = states[0] | {"encoder.layers.0.self_attn.gauss_scale": np.zeros(2, np.float32)}
    with pytest.raises(OfficialStateError, match="never trained"):
        import_checkpoint(saved(tmp_path, lightning(official, state, None)), tmp_path / "run")


# Files


class Malicious:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, official, states, zipped):
    trace, file = tmp_path / "trace", tmp_path / "model.ckpt"
    content = lightning(official, states[0], None, callbacks=Malicious(trace))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TorchFileError) as error:
        read_checkpoint(file)
    assert ("posix.mkdir" in str(error.value) and "nothing of the file was executed" in str(error.value)) == zipped
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the file does what it says
    assert trace.exists()


def test_classes_that_only_hold_values_are_read(tmp_path, official, states):
    file = saved(tmp_path, lightning(Namespace(**official), states[0], None))
    assert read_checkpoint(file).hyper_parameters == official
    with pytest.raises(TorchFileError, match=r"fractions\.Fraction"):
        read_checkpoint(saved(tmp_path, lightning(official | {"lr": Fraction(1, 2)}, states[0], None)))


def test_half_precision_becomes_float32(tmp_path):
    values = {"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.tensor([0.1], dtype=torch.float64)}
    expected = {"a": np.array([1.5], np.float32), "b": np.array([0.1])}
    assert_same(read_checkpoint(saved(tmp_path, values)).state, expected)


def test_files_that_are_no_checkpoints_are_errors_of_one_line(tmp_path, averaged_file, states):
    whole = averaged_file.read_bytes()
    torn = bytearray(whole)
    torn[whole.index(states[0]["mlp.0.weight"].tobytes())] ^= 1  # the lowest bit of a weight
    cases = {
        "empty": (b"", "empty"),
        "text": (b"hello", "not a PyTorch file"),
        "truncated": (whole[: len(whole) // 2], "damaged"),
        "no-end": (whole[:-40], "damaged"),
        "torn": (bytes(torn), "checksum"),
    }
    for name, (content, word) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TorchFileError) as error:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and word in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(TorchFileError, match=r"does not exist|not a file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        {"a": 1.0},
        {"state_dict": [1]},
        {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": 3},
        {"state_dict": {"a": torch.zeros(1)}, "epoch": "x"},
    ],
)
def test_files_of_other_content_are_errors(tmp_path, content):
    with pytest.raises(TorchFileError, match=r"model\.ckpt"):
        read_checkpoint(saved(tmp_path, content))


def test_pytorch_that_is_missing_or_too_old(averaged_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError, match=r'pip install "\.\[torch\]"'):
            read_checkpoint(averaged_file)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match=r"2\.6 or newer"):
        read_checkpoint(averaged_file)


# Export


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
    import_checkpoint(file, tmp_path / "never", official | {"swa_epochs": 0})
    export_checkpoint(tmp_path / "never", tmp_path / "back.ckpt")
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in content if name.startswith("swa_model")]


def test_a_file_is_complete_or_not_there(tmp_path, states, official, monkeypatch):
    checkpoint = OfficialCheckpoint(official, states[0], None, *SCALING.values())
    write_checkpoint(tmp_path / "new" / "a.ckpt", checkpoint)
    before = (tmp_path / "new" / "a.ckpt").read_bytes()

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "new" / "a.ckpt", checkpoint)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]
    assert (tmp_path / "new" / "a.ckpt").read_bytes() == before


# Command lines


def test_the_scripts(averaged_file, tmp_path):
    run, file = tmp_path / "run", tmp_path / "back.ckpt"

    def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, f"scripts/{name}.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    process = script("import_torch_checkpoint", averaged_file, f"--workdir={run}", "--target_set=mp_flla_2015")
    assert process.returncode == 0 and process.stderr == ""
    for words in ("1 block, frames max, domain real", "e_form  eV/atom    -2", "swa is used by default"):
        assert words in process.stdout
    assert f"scripts/predict.py {run}" in process.stdout and f"scripts/evaluate.py {run}" in process.stdout
    process = script("export_torch_checkpoint", run, file, "--weights=last")
    assert process.returncode == 0 and process.stderr == "" and "last weights of" in process.stdout
    assert_same(read_checkpoint(file).state, read_checkpoint(averaged_file).state)
    process = script("import_torch_checkpoint", averaged_file, f"--workdir={run}")
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


def test_an_export_of_no_run_is_an_error_of_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        export_main([str(tmp_path / "nowhere"), str(tmp_path / "a.ckpt")])
    assert not list(tmp_path.iterdir())
