"""Training and evaluation on target sets of every layout."""

import math

import numpy as np
import pytest
from test_prepare import RECORDS, archive, prepare, write_cifs
from tiny import NO_FRAMES, tiny_config, tiny_runs

from crystalframer_jax.cli import prepare as prepare_cli
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.splits import random_split
from crystalframer_jax.training.start import train


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with tiny_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_cli, "TrainConfig", lambda: TrainConfig(cutoff_radius=4.0))
        yield


def one_epoch(folder, target_set: str, targets: str, **changes):
    return tiny_config(
        folder / "data", target_set=target_set, targets=targets, n_epochs=1, swa_epochs=0, **NO_FRAMES | changes
    )


@pytest.mark.parametrize(
    ("name", "targets"),
    [pytest.param("jarvis__oqmd_3d", "delta_e,stability", marks=pytest.mark.slow), ("mine", "target")],
)
def test_training_on_every_layout(tmp_path, capsys, name, targets):
    if name == "mine":
        prepare(tmp_path, name, f"--source={write_cifs(tmp_path / 'mine', range(40))}")
    else:
        source = archive(tmp_path, "all_oqmd.json")
        prepare(tmp_path, name, f"--source={source}", "--unofficial")
    capsys.readouterr()
    summary = train(one_epoch(tmp_path, name, targets), tmp_path / "run")
    assert all(math.isfinite(summary["test"][target]["mae"]) for target in targets.split(","))
    assert ("cannot be compared with published ones" in capsys.readouterr().out) == (name != "mine")


def test_errors_without_leaked_crystals(tmp_path, capsys):
    splits = random_split(np.arange(60))
    held, trained = int(splits["test"][2]), int(splits["train"][0])
    file = archive(tmp_path, "megnet.json", {held: {"id": RECORDS[trained]["id"]}})
    prepare(tmp_path, "jarvis__megnet", f"--source={file}", "--unofficial")
    train(one_epoch(tmp_path, "jarvis__megnet", "e_form"), tmp_path / "run")
    capsys.readouterr()
    assert evaluate_main([str(tmp_path / "run"), "--split=test", f"--output={tmp_path / 'test.csv'}"]) == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    errors = []
    for line in (tmp_path / "test.csv").read_text().splitlines()[1:]:
        _, target, prediction = line.split(",")
        errors.append(abs(float(target) - float(prediction)))
    assert lines["e_form"][2:4] == ["6", f"{sum(errors) / 6:.4f}"]
    assert lines["e_form, without leaks"][4:6] == ["5", f"{(sum(errors) - errors[2]) / 5:.4f}"]
    assert evaluate_main([str(tmp_path / "run"), "--split=val"]) == 0
    assert "without leaks" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(tmp_path):
    config = one_epoch(tmp_path, "mine", "target")
    source = write_cifs(tmp_path / "mine", range(40))
    prepare(tmp_path, "mine", f"--source={source}")
    summary = train(config, tmp_path / "run")
    assert train(config, tmp_path / "run") == summary
    lines = (source / "id_prop.csv").read_text().splitlines()
    (source / "id_prop.csv").write_text("\n".join(lines[:39]) + "\n")
    prepare(tmp_path, "mine", f"--source={source}")
    with pytest.raises(ConfigError, match="was started with other data under the name mine"):
        train(config, tmp_path / "run")
    (source / "id_prop.csv").write_text("\n".join(lines) + "\n")
    prepare(tmp_path, "mine", f"--source={source}")
    assert train(config, tmp_path / "run") == summary
