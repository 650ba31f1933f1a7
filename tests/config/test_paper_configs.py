"""The configurations of the paper's benchmarks, and the script that trains them all (its python is a stand-in)."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from forks import Fork
from ml_collections import config_flags
from support import ROOT

from crystalframer_jax.config import ConfigError, validate, validate_model
from crystalframer_jax.configs import default, finetune, quickstart, recommended
from crystalframer_jax.configs.variants import VARIANTS
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.inference.shipped import read_model

BENCHMARKS = ("jarvis", "megnet", "oqmd")

# (epochs, epochs of Crystalformer, batch size, epochs averaged), from params/ of the official project.
OFFICIAL = {"jarvis": (2000, 800, 256, 50), "megnet": (800, 500, 128, 50), "oqmd": (200, 200, 1024, 20)}
# From train_jarvis_time.sh of the official project; value_pe_angle_real=0 is its Crystalformer.
OFFICIAL_ENCODINGS = {
    "default": {
        "value_pe_dist_coef": 1.0,
        "value_pe_angle_wscale": 4.0,
        "value_pe_angle_real": 64,
        "value_pe_angle_coef": 1.0,
        "frame_method": "max",
    },
    "lightweight": {
        "value_pe_dist_coef": 1.5,
        "value_pe_angle_wscale": 1.0,
        "value_pe_angle_real": 16,
        "value_pe_angle_coef": 6.0,
        "frame_method": "max",
    },
    "crystalformer": {"value_pe_dist_coef": 1.0, "value_pe_angle_real": 0, "frame_method": "no"},
}


def module_of(name):
    return importlib.import_module(f"crystalframer_jax.configs.{name}")


def unit_of(benchmark):
    return TARGET_SETS[benchmark.target_set].target(benchmark.target).unit


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_settings_are_the_official_ones_and_all_others_the_defaults(name, variant):
    config, known = module_of(name).get_config(variant), default.get_config()
    epochs, epochs_without_frames, batch_size, swa_epochs = OFFICIAL[name]
    expected = dict(known) | OFFICIAL_ENCODINGS[variant]
    expected |= {"batch_size": batch_size, "swa_epochs": swa_epochs}
    expected["n_epochs"] = epochs_without_frames if variant == "crystalformer" else epochs
    expected |= {"target_set": config.target_set, "targets": config.targets}
    assert dict(config) == expected
    validate(config)
    assert validate_model(config).model.uses_frames == (variant != "crystalformer")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_default_variant_is_default_and_its_target_the_first(name):
    module = module_of(name)
    config = module.get_config()
    assert config == module.get_config("default")
    assert (config.target_set, config.targets) == (module.BENCHMARKS[0].target_set, module.BENCHMARKS[0].target)


@pytest.mark.parametrize("variant", ["light", "", "Default"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_unknown_variant_is_refused_with_the_allowed_ones(name, variant):
    with pytest.raises(ConfigError) as error:
        module_of(name).get_config(variant)
    message = str(error.value)
    assert repr(variant) in message and all(allowed in message for allowed in VARIANTS) and "\n" not in message


@pytest.mark.parametrize("variant", ["", ":default", ":lightweight", ":crystalformer"])
def test_the_command_line_chooses_the_variant_after_a_colon(variant):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["train", f"--config={ROOT}/configs/jarvis.py{variant}"])
    assert dict(holder.value) == dict(module_of("jarvis").get_config(variant[1:] or "default"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_documented_table_is_what_the_script_compares_with(name):
    """Every row: benchmark, target set, target, unit, sizes, published errors of the columns' variants."""
    module, text = module_of(name), (ROOT / "docs" / "paper.md").read_text()
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in re.findall(r"^\|.*$", text, re.M)
    ]
    assert header[:4] == ["benchmark", "target_set", "target", "unit"] and header[5:] == ["default", "crystalformer"]
    stated = [
        (*row[1:4], {key: float(value) for key, value in zip(header[5:], row[5:], strict=True)})
        for row in rows
        if row[0] == name
    ]
    assert stated == [(b.target_set, b.target, unit_of(b), dict(b.published_mae)) for b in module.BENCHMARKS]
    for command in (f"crystalframer train --config={name}", f"scripts/reproduce.sh {name}"):
        assert command in module.__doc__, "the file states the commands that run it"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_errors_fall_with_frames_except_where_the_paper_says_otherwise(name):
    """A slip of column or row would show: only the energy above the hull of JARVIS is better without frames."""
    for benchmark in module_of(name).BENCHMARKS:
        worse = benchmark.published_mae["default"] > benchmark.published_mae["crystalformer"]
        assert worse == (benchmark.target == "ehull")


def test_quickstart_is_lightweight():
    config, known = quickstart.get_config(), default.get_config()
    changes = {key: config[key] for key in config if config[key] != known[key]}
    expected = dict(OFFICIAL_ENCODINGS["lightweight"]) | {"num_layers": 2, "n_epochs": 12, **recommended.RECIPE}
    del expected["frame_method"]
    assert changes == expected


def test_configurations_import_nothing_heavy():
    allowed = ("ml_collections", "dataclasses", "typing", "collections.abc", "crystalframer_jax.config")
    for file in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module in allowed or module.startswith("crystalframer_jax.configs"), (file.name, module)


def test_a_configuration_is_imported_first_without_a_circle():
    """In a fresh interpreter."""
    subprocess.run([sys.executable, "-c", "import crystalframer_jax.configs.variants"], check=True, timeout=120)


# ------------------------------------------------------------------------------------------- scripts/reproduce.sh

# Stands for the python of the environment: notes what train.py was asked for and does as PLAN says for a run.
PYTHON = """#!{python} -IS
import json, os, signal, sys, time
from pathlib import Path
if sys.argv[1] != "scripts/train.py":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with open("calls.jsonl", "a") as stream:
    stream.write(json.dumps(sys.argv[2:]) + "\\n")
given = dict(argument.lstrip("-").split("=", 1) for argument in sys.argv[2:])
run, target = Path(given["workdir"]), given["config.targets"]
plan = json.loads(os.environ.get("PLAN", "{{}}")).get(run.name, 0.25)
run.mkdir(parents=True, exist_ok=True)
if plan == "fail":
    sys.exit("error: this target cannot be trained")
if plan == "stop":
    sys.exit(0)
if plan == "wait":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: (Path("signals").open("a").write(f"{{number}} "), sys.exit(0)))
    (run / "waiting").touch()
    time.sleep(60)
    sys.exit("error: nobody asked to stop")
with (run / "metrics.jsonl").open("w") as stream:
    for epoch in range(int(given.get("config.n_epochs", 1))):
        stream.write(json.dumps({{"epoch": epoch, "crystals_per_s": 1000.5 + epoch}}) + "\\n")
(run / "summary.json").write_text(json.dumps({{"test": {{target: {{"mae": plan}}}}}}))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the scripts and an environment, up to date, whose python is the one above."""
    (tmp_path / "scripts").mkdir()
    for name in ("reproduce.sh", "reproduce.py", "environment.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "pyproject.toml").touch()
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PYTHON.format(python=sys.executable))
    (programs / "python").chmod(0o755)
    (tmp_path / ".venv" / f"installed-{sys.version_info[0]}.{sys.version_info[1]}").touch()
    return tmp_path


def environment_of(plan, changes):
    kept = {key: value for key, value in os.environ.items() if key not in ("VENV", "VARIANT", "EXTRA")}
    return kept | {"PYTHON": sys.executable, "PLAN": json.dumps(plan or {})} | changes


def start(checkout, *arguments, plan=None, **environment):
    """The script for the shell."""
    return subprocess.Popen(
        [checkout / "scripts" / "reproduce.sh", *arguments],
        env=environment_of(plan, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if these tests run in the background
    )


def reproduce(checkout, *arguments, by_shell=False, plan=None, **environment):
    """(exit status, standard output, standard error, arguments of each call of train.py); by the shell, or at once."""
    if by_shell:
        process = start(checkout, *arguments, plan=plan, **environment)
    else:
        environment = environment_of(plan, environment)
        environment |= {"PATH": f"{checkout}/.venv/bin:{environment['PATH']}"}
        process = Fork("scripts/reproduce.py", *arguments, environment=environment, folder=checkout)
    output, error = process.communicate(timeout=120)
    calls = checkout / "calls.jsonl"
    return (
        process.returncode,
        output,
        error,
        [json.loads(c) for c in calls.read_text().splitlines()] if calls.exists() else [],
    )


@pytest.mark.parametrize("arguments", [(), ("materials",), ("--config.lr=1",)])
def test_without_a_benchmark_the_script_says_how_it_is_used(checkout, arguments):
    status, output, error, calls = reproduce(checkout, *arguments, by_shell=True)
    assert status == 2 and not output and not calls
    assert error.startswith("usage: ") and error.count("\n") == 1


def test_an_unknown_variant_stops_the_script_in_one_line(checkout):
    status, _, error, calls = reproduce(checkout, "jarvis", VARIANT="light")
    assert status == 1 and not calls
    assert error == "error: variant 'light' is not available; allowed: default, lightweight, crystalformer\n"


@pytest.mark.parametrize(("name", "variant"), [("jarvis", "default"), ("megnet", "crystalformer"), ("oqmd", "default")])
def test_every_target_is_trained_and_compared(checkout, name, variant):
    environment = {} if variant == "default" else {"VARIANT": variant}
    status, output, error, calls = reproduce(checkout, name, "--config.lr=1e-3", by_shell=name == "oqmd", **environment)
    benchmarks = module_of(name).BENCHMARKS
    assert (status, error) == (0, "")
    assert calls == [
        [
            f"--config=configs/{name}.py:{variant}",
            f"--workdir=runs/{name}/{variant}/{b.target}",
            f"--config.target_set={b.target_set}",
            f"--config.targets={b.target}",
            "--config.lr=1e-3",
        ]
        for b in benchmarks
    ]
    for b in benchmarks:
        row = rf"^{b.target} +{re.escape(unit_of(b))} +0\.25000 +{b.published_mae[variant]}$"
        assert re.search(row, output, re.M), output


def test_a_variant_without_published_errors_has_none_in_the_table(checkout):
    status, output, _, _ = reproduce(checkout, "oqmd", VARIANT="lightweight", plan={"stability": 0.07})
    assert status == 0 and re.search(r"^stability +eV/atom +0\.07000 +-$", output, re.M)


def test_the_folds_of_matbench_phonons_are_trained_by_the_recommended_recipe(checkout):
    """Mean and standard deviation (divisor 4) over the folds beside the published mean; none while one lacks."""
    plan = dict(zip((f"fold_{n}" for n in range(5)), (25.0, 27.0, 29.0, 31.0, 33.0), strict=True))
    status, output, error, calls = reproduce(checkout, "matbench_phonons", "--config.lr=1e-3", plan=plan)
    assert (status, error) == (0, "")
    assert calls == [
        [
            "--config=configs/matbench_phonons.py:default",
            f"--workdir=runs/matbench_phonons/default/fold_{fold}",
            f"--config.target_set=matbench_phonons-fold_{fold}",
            "--config.targets=last_phdos_peak",
            "--config.lr=1e-3",
        ]
        for fold in range(5)
    ]
    assert re.search(r"^fold_4 +1/cm +33\.00000 +-$", output, re.M), output
    assert re.search(r"^mean of the folds +1/cm +29\.00000 +28\.8$", output, re.M), output
    assert re.search(r"^standard deviation +1/cm +3\.16228 +-$", output, re.M), output
    shutil.rmtree(checkout / "runs")
    status, output, _, _ = reproduce(checkout, "matbench_phonons", plan=plan | {"fold_2": "fail"})
    assert status == 1 and re.search(r"^mean of the folds +1/cm +- +28\.8$", output, re.M), output


def test_matbench_phonons_is_the_recommended_recipe_for_80_epochs():
    for variant in VARIANTS:
        config, recipe = module_of("matbench_phonons").get_config(variant), recommended.get_config(variant)
        assert {key: config[key] for key in config if config[key] != recipe[key]} == {
            "target_set": "matbench_phonons-fold_0",
            "targets": "last_phdos_peak",
            "n_epochs": 80,
        }
        validate(config)


@pytest.mark.parametrize("variant", finetune.VARIANTS)
def test_what_is_fine_tuned_is_the_model_of_the_package(variant):
    config = validate(finetune.get_config(variant))
    shipped = read_model(config.pretrained_model).config
    assert config.model == dataclasses.replace(shipped.model, num_targets=1)
    assert config.cutoff == shipped.cutoff
    blocks = [f"block_{number}" for number in range(config.num_layers)]
    assert config.reinit_layers == ",".join(blocks[{"few": 2, "many": 0}[variant] :])


def test_a_variant_of_fine_tuning_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"finetune:all: there is no such variant; choose one of few, many"):
        finetune.get_config("all")


def test_a_target_that_fails_does_not_keep_the_others_from_running(checkout):
    status, output, error, calls = reproduce(checkout, "megnet", plan={"bandgap": "fail", "bulk_modulus": "fail"})
    assert status == 1 and len(calls) == 4
    assert re.search(r"^bandgap +eV +- +0\.185$", output, re.M)
    assert re.search(r"^shear_modulus +log10 GPa +0\.25000 +0\.0677$", output, re.M)
    assert error.endswith(
        "failed:\n  runs/megnet/default/bandgap (exit status 1)\n  runs/megnet/default/bulk_modulus (exit status 1)\n"
    )


def test_a_training_that_stopped_stops_the_script_and_the_same_command_continues(checkout):
    status, output, _, calls = reproduce(checkout, "megnet", plan={"bandgap": "stop"})
    assert status == 0 and len(calls) == 2
    assert output.endswith("stopped in runs/megnet/default/bandgap; the same command continues there\n")
    status, output, _, calls = reproduce(checkout, "megnet")
    assert status == 0 and len(calls) == 2 + 4 and "published" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_goes_on_to_the_training_and_no_other_is_started(checkout, number):
    """Sent to the script alone (kill) or to its process group (Ctrl-C): the training hears of it once."""
    process = start(checkout, "oqmd", plan={"stability": "wait"})
    waiting = checkout / "runs" / "oqmd" / "default" / "stability" / "waiting"
    for _ in range(600):
        if waiting.exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the second target was not started")
    send = os.killpg if number == signal.SIGINT else os.kill
    send(process.pid, number)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert output.endswith("stopped in runs/oqmd/default/stability; the same command continues there\n")
    assert (checkout / "signals").read_text() == f"{number} "
    assert not (checkout / "runs" / "oqmd" / "default" / "bandgap").exists()


def test_timing_trains_three_epochs_of_every_variant_unless_told_otherwise(checkout):
    status, output, error, calls = reproduce(checkout, "timing", "--config.n_epochs=2")
    assert (status, error) == (0, "")
    assert [call[0] for call in calls] == [f"--config=configs/jarvis.py:{variant}" for variant in VARIANTS]
    for call, variant in zip(calls, VARIANTS, strict=True):
        assert call[1] == f"--workdir=runs/timing/{variant}/formation_energy"
        assert call[4:] == ["--config.n_epochs=3", "--config.swa_epochs=0", "--config.n_epochs=2"]
        assert re.search(rf"^{variant} +1,000\.5 +1,001\.5$", output, re.M)
