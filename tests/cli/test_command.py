"""The command crystalframer: help, exit statuses, what each subcommand prints and writes."""

import csv
import dataclasses
import gzip
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from pymatgen.core import Structure
from small_sets import raw_records
from support import EXAMPLES, ROOT
from tiny import tiny_config, tiny_runs
from user_files import write_cifs

import crystalframer_jax
from crystalframer_jax.cli import (
    arguments,
    command,
    doctor,
    evaluate,
    export_jarvis,
    export_matbench,
    predict,
    show,
    train,
)
from crystalframer_jax.cli.command import COMMANDS, main
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.assignment import Preparation
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.inference import shipped
from crystalframer_jax.inference.predictor import PRECISIONS, WEIGHTS, Predictor
from crystalframer_jax.runs.checkpoints import Checkpoints
from crystalframer_jax.structures import read_crystals
from crystalframer_jax.training.start import train as train_run

HEAVY = ("jax", "pymatgen", "absl", "ml_collections", "scipy", "matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run on the small set; its copy is a model of the package, "tiny", and the default one."""
    folder = tmp_path_factory.mktemp("command")
    with tiny_runs(), pytest.MonkeyPatch.context() as patch:
        train_run(tiny_config(folder / "data", n_epochs=1, swa_epochs=0), folder / "run")
        predictor, models = Predictor.load(folder / "run"), folder / "models"
        models.mkdir()
        meta = Checkpoints(folder / "run").meta(predictor.step) | {"step": predictor.step}
        checksum = shipped.write_model(models / "tiny.npz", predictor.variables, predictor.config, meta)
        card = {"in short": "energies, far off"}
        entry = {"file": "tiny.npz", "sha256": checksum, "version": 1, "card": card}
        (models / "index.json").write_text(json.dumps({"tiny": entry}))
        patch.setattr(shipped, "_folder", lambda: models)
        for module in (predict, evaluate, doctor):
            patch.setattr(module, "DEFAULT_MODEL", "tiny")
        yield folder / "run"


@pytest.fixture
def place(run, tmp_path, monkeypatch):
    """A current folder with examples/ and runs/quickstart."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_of(words) -> int:
    """The exit status of a command line in this process."""
    try:
        return main(words)
    except SystemExit as error:
        return 1 if isinstance(error.code, str) else error.code


# Help


def test_help_imports_nothing_slow():
    lines = [[], *(name.split() for name in COMMANDS), ["export"]]
    code = f"""
import contextlib, io, sys
from crystalframer_jax.cli.command import main
for words in {lines!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = main([*words, "--help"])
        except SystemExit as error:
            status = error.code
    assert status == 0 and out.getvalue().startswith("usage: crystalframer"), words
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (process.stdout, process.stderr) == ("[]\n", "")


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "crystalframer_jax", "--version"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout == f"crystalframer_jax {crystalframer_jax.__version__}\n" and process.returncode == 0


def examples_of(name: str) -> list[list[str]]:
    """The command lines in the help of a subcommand, after pipes."""
    lines = re.findall(r"^  (?:.* \| )?crystalframer (.*)$", COMMANDS[name].parser().epilog, re.MULTILINE)
    assert lines, name
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_command_lines(name):
    for words in examples_of(name):
        count = name.count(" ") + 1
        assert words[:count] == name.split()
        patterns = 5 if name == "export matbench" else 1  # files that the shell finds
        given = [x for word in words[count:] for x in [word] * (patterns if "*" in word else 1)]
        COMMANDS[name].parser().parse_args([word for word in given if not word.startswith("--config.")])


@pytest.mark.parametrize("name", ["predict", "embed"])
def test_examples_of_the_help_do_what_they_say(place, name, monkeypatch, capsys):
    for words in examples_of(name):
        monkeypatch.setattr(sys, "stdin", io.StringIO("examples/NaCl.cif\n\nexamples/SrTiO3.cif\n"))
        assert status_of(words) == 0, words
        assert "error" not in capsys.readouterr().err
    assert (place / ("predictions.csv" if name == "predict" else "vectors.npz")).is_file()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], 2),
        (["foretell"], 2),
        (["export"], 2),
        (["export", "everything"], 2),
        (["predict"], 2),
        (["predict", "--moedl=x", "a.cif"], 2),
        (["predict", "nowhere.cif"], 1),
        (["predict", "--model=nowhere", "examples/NaCl.cif"], 1),
        (["train", "--config=nowhere", "--workdir=x"], 2),
        (["train", "--config=quickstart", "--config.lrr=1", "--workdir=x"], 2),
        (["train", "--config=quickstart", "loose", "--workdir=x"], 2),
        (["embed", "examples/NaCl.cif"], 1),
        (["embed", "examples/NaCl.cif", "--output=a.txt"], 2),
        (["evaluate"], 1),
        (["doctor", "--gpu"], 1),
    ],
)
def test_exit_statuses(place, words, status, capsys):
    assert status_of(words) == status
    assert not (place / "x").exists()


def test_defaults_of_the_command_line_are_those_of_the_library():
    given = COMMANDS["prepare"].parser().parse_args([])
    assert (given.max_bad_share, given.split_seed) == (Preparation.max_bad_share, Preparation.split_seed)
    for name in vars(CustomData()):
        assert getattr(given, name) == getattr(CustomData, name), name
    assert set(arguments.WEIGHTS) == set(WEIGHTS) and arguments.PRECISIONS == PRECISIONS


# Training


def test_configurations_by_name(monkeypatch, tmp_path):
    folder = ROOT / "configs"
    assert set(arguments.shipped_configs()) == {file.stem for file in folder.glob("*.py")} - {"__init__", "variants"}
    expected = [f"--config={folder / 'recommended.py'}:lightweight"]
    assert train.with_config_files(["--config=recommended:lightweight"]) == expected
    words = ["--config", "recommended:lightweight", "--config.lr", "-1e-3", "--workdir=x", "--config.n_epochs=2"]
    parsed = train.parse(words, "crystalframer train")
    assert (parsed.config.lr, parsed.config.n_epochs, parsed.workdir) == (-1e-3, 2, "x")
    assert parsed.config.value_pe_angle_real == 16  # of the variant
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder that is no run does not stand in the way
    assert train.with_config_files(["--config=quickstart"]) == [f"--config={folder / 'quickstart.py'}"]
    with pytest.raises(ConfigError, match=r"nowhere: there is no such file, nor .*quickstart"):
        train.with_config_files(["--config=nowhere"])


# Prediction


def test_prediction_without_a_model_says_which_it_is(place, capsys):
    assert main(["predict", "examples/NaCl.cif"]) == 0
    printed = capsys.readouterr()
    line, *warnings = printed.err.splitlines(keepends=True)
    assert line == "model tiny (no --model given): energies, far off\n"
    assert "e_form (eV/atom)" in printed.out
    assert main(["predict", "--model=runs/quickstart", "examples/NaCl.cif"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (printed.out, "".join(warnings))  # of elements the small set does not hold


def test_files_folders_patterns_and_what_is_none(place, capsys):
    (place / "empty").mkdir()
    (place / "bad.cif").write_text("")
    words = ["predict", "examples", "bad.cif", "examples/N*.cif", "x*.cif", "empty", "tiny", "runs/quickstart"]
    assert main([*words, "--csv=-"]) == 1
    printed = capsys.readouterr()
    header, *lines = csv.reader(printed.out.splitlines())
    assert header == ["structure", "formula", "atoms", "e_form (eV/atom)", "warnings"]
    names = ["examples/NaCl.cif", "examples/POSCAR_Si", "examples/SrTiO3.cif", "examples/NaCl.cif"]
    assert [line[0] for line in lines] == names and lines[0] == lines[3]
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    expected = ["bad.cif: ", "x*.cif: no file has", "empty: no file with", "tiny: a model", "runs/quickstart: a model"]
    assert len(errors) == 5 and all(f"error: {text}" in line for text, line in zip(expected, errors, strict=True))


def test_fifty_files_are_predicted_and_twenty_broken_ones_told(place, capsys):
    """Each broken file costs one line that names it; the table has the others, in the order given."""
    written = [record["id"] for record in write_cifs(place / "many", 50)]
    whole = (place / "many" / f"{written[0]}.cif").read_text()
    first_number = re.compile(r"(_cell_length_a +)\S+")
    broken = {
        "empty": "",
        "binary": "\0\1\2",
        "words": "not a crystal",
        "no_atoms": whole[: whole.index("_atom_site")],
        "no_cell": re.sub(r"_cell_\S+ +\S+\n", "", whole),
        "flat": first_number.sub(r"\g<1>0.0", whole),
        "endless": first_number.sub(r"\g<1>1e300", whole),
        "unknown": re.sub(r"\n[A-Z][a-z]?(\d+) [A-Z][a-z]? ", r"\nQq\1 Qq ", whole),
        "question": first_number.sub(r"\g<1>?", whole),
        "html": "<html><body>404 not found</body></html>",
    }
    names = [f"{name}_{copy}" for copy in range(2) for name in broken]
    for name in names:
        (place / "many" / f"{name}.cif").write_text(broken[name[:-2]])
    files = [f"many/{name}.cif" for pair in itertools.zip_longest(written, names) for name in pair if name]
    assert main(["predict", "--model=runs/quickstart", *files, "--csv=out.csv", "--json=out.json"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [name for name in names if not any(f"many/{name}.cif" in line for line in errors)] == []
    assert len(errors) == 20
    rows = list(csv.DictReader((place / "out.csv").open()))
    assert [row["structure"] for row in rows] == [f"many/{name}.cif" for name in written]
    assert all(np.isfinite(float(row["e_form (eV/atom)"])) for row in rows)
    found = json.loads((place / "out.json").read_text())
    assert len(found["structures"]) == 50 and len(found["errors"]) == 20


def test_python_takes_every_kind_of_structure(run, place):
    predictor, file = Predictor.load(run), place / "examples" / "SrTiO3.cif"
    structure = Structure.from_file(file)
    (crystal,) = read_crystals(file)
    kinds = [str(file), file, structure, crystal, structure.to_ase_atoms()]
    expected = predictor.predict(file)
    for kind in kinds:
        np.testing.assert_allclose(predictor.predict(kind), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(predictor.embed(kind), predictor.embed(file), rtol=0, atol=1e-5)
    assert predictor.predict(kinds).shape == (5, 1) and predictor.predict([]).shape == (0, 1)


def test_labels_of_a_folder_make_errors(place, capsys):
    model = Predictor.load("runs/quickstart")
    value = model.predict("examples/NaCl.cif")[0, 0]
    (place / "examples" / "id_prop.csv").write_text(f"NaCl,{value + 0.25}\nSrTiO3,\n")
    assert main(["predict", "--model=runs/quickstart", "examples", "--json=out/all.json"]) == 0
    assert re.search(r"^e_form +eV/atom +1 +0\.2500 +0\.2500 +-$", capsys.readouterr().out, re.MULTILINE)
    found = json.loads((place / "out" / "all.json").read_text())
    first, second = found["structures"]
    assert first["predictions"]["e_form"] == pytest.approx(value, abs=1e-5)
    assert first["labels"] == {"e_form": value + 0.25} and second["labels"] == {"e_form": None}
    assert found["units"] == {"e_form": "eV/atom"} and found["std_over"] is None and "std" not in first
    assert status_of(["predict", "examples", "--labels=a,b"]) == 1


def test_jsonl_with_labels_by_another_name(place, capsys):
    keys = ("id", "lattice", "species", "frac_coords", "formation_energy_per_atom")
    lines = [json.dumps({key: record[key] for key in keys}) for record in raw_records(3)]
    (place / "some.jsonl").write_text("\n".join([*lines, "{}"]))
    assert main(["predict", "some.jsonl", "--labels=formation_energy_per_atom", "--csv=some.csv"]) == 1
    header, *rows = csv.reader((place / "some.csv").read_text().splitlines())
    assert header[4] == "e_form label (eV/atom)"
    assert [float(row[4]) for row in rows] == [record["formation_energy_per_atom"] for record in raw_records(3)]


# Vectors


def test_vectors(place, capsys):
    model = Predictor.load("runs/quickstart")
    assert main(["embed", "examples", "--output=all.npz", "--atoms"]) == 0
    with np.load("all.npz") as found:
        ids, vectors, atoms, offset = (found[key] for key in ("ids", "vectors", "atom_vectors", "atom_offset"))
        assert found["species"].tolist() == [*[11] * 4, *[17] * 4, 14, 14, 38, 22, 8, 8, 8]
    assert ids.tolist() == ["examples/NaCl.cif", "examples/POSCAR_Si", "examples/SrTiO3.cif"]
    for first, end, vector in zip(offset, offset[1:], vectors, strict=False):
        np.testing.assert_allclose(atoms[first:end].mean(axis=0), vector, atol=1e-5)  # pooling is the mean
    own, of_atoms = model.embed(["examples/SrTiO3.cif", "examples/NaCl.cif"], atoms=True)
    np.testing.assert_allclose(own, vectors[[2, 0]], atol=1e-5)
    assert [array.shape[0] for array in of_atoms] == [5, 8] and model.embed("examples/NaCl.cif").shape == (1, 16)
    capsys.readouterr()
    assert main(["embed", "examples/SrTiO3.cif", "--nearest=2", "--among=all.npz", "--atoms", "--output=a.csv"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:4]]
    assert lines[0][2:] == ["1", "examples/SrTiO3.cif", "0.0000"] and float(lines[1][4]) > 0.1
    header, *rows = csv.reader((place / "a.csv").read_text().splitlines())
    assert header[:4] == ["id", "site", "element", "v0"] and [row[2] for row in rows] == ["Sr", "Ti", "O", "O", "O"]


def test_vectors_are_what_the_output_layers_read(run):
    """Through the layers after pooling, written out, they are the predictions."""
    model = Predictor.load(run)
    params = model.variables["params"]
    hidden = model.embed(EXAMPLES / "NaCl.cif").astype(np.float64)
    hidden = np.maximum(hidden @ params["dense_0"]["kernel"] + params["dense_0"]["bias"], 0)
    output = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    (s,) = model.targets
    assert output[0, 0] * s.std + s.mean == pytest.approx(model.predict(EXAMPLES / "NaCl.cif")[0, 0], abs=1e-4)


def test_standard_deviations_are_not_pretended(run):
    model = Predictor.load(run)
    value, std = model.predict(EXAMPLES / "NaCl.cif", return_std=True)
    assert std is None and value.shape == (1, 1)
    value, std = model.predict(EXAMPLES / "NaCl.cif", num_frame_samples=2, return_std=True)
    assert std.shape == (1, 1)


# Evaluation


def test_other_data_and_where_the_errors_are(place, capsys):
    assert main(["evaluate", "--model=runs/quickstart", "small", "--split=all", "--details"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^e_form +eV/atom +60 ", out, re.MULTILINE)
    counts = [int(x) for x in re.findall(r"^\d+ to \d+ +(\d+) ", out, re.MULTILINE)]
    assert sum(counts) == 60 and len(re.findall(r"^mp-\d+ ", out, re.MULTILINE)) == 10
    assert main(["evaluate", "--model=runs/quickstart", "--plot_elements=new/elements.png"]) == 0
    assert "wrote new/elements.png" in capsys.readouterr().out
    assert (place / "new" / "elements.png").read_bytes().startswith(b"\x89PNG")
    (place / "examples" / "id_prop.csv").write_text("NaCl,-2\nSrTiO3,-3.5\nnothing,1\n")
    assert main(["evaluate", "examples", "--output=e.csv"]) == 1  # one file is missing
    printed = capsys.readouterr()
    assert re.search(r"^e_form +eV/atom +2 ", printed.out, re.MULTILINE) and "error: " in printed.err
    assert (place / "e.csv").read_text().count("\n") == 3
    assert main(["evaluate", "examples", "--exclude_leaked"]) == 1
    assert "0 of 2 test crystals are left out" in capsys.readouterr().out


# Pictures


def test_pictures_are_drawn_and_what_cannot_be_is_told(place):
    files = {
        "frames.png": ["frames", "examples/SrTiO3.cif", "--atom=1", "--head=0"],
        "frames.html": ["frames", "examples/SrTiO3.cif", "--head=1", "--model=runs/quickstart"],
        "attention.svg": ["attention", "examples/SrTiO3.cif", "--dark"],
        "crystal.pdf": ["crystal", "examples/SrTiO3.cif"],
        "runs.png": ["runs", "runs/quickstart"],
    }
    for name, words in files.items():
        assert main(["show", *words, f"--output=new/{name}"]) == 0
        assert (place / "new" / name).read_bytes().startswith(show.BEGINNINGS[(place / name).suffix])
        assert main(["show", *words, f"--output=new/{name}"]) == 0  # its own figure may be replaced
    for words, message in (
        (["frames", "examples/SrTiO3.cif", "--atom=5"], "--atom=5: examples/SrTiO3.cif has atoms 0 to 4"),
        (["frames", "examples/SrTiO3.cif", "--head=9"], "--head=9: the model has heads 0 to 1"),
        (["attention", "examples/SrTiO3.cif", "--block=7"], "block 7 does not exist"),
        (["runs", "runs/quickstart", "--target=gap"], "no run has a validation error of gap"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(["show", *words, "--output=x.png"])
    assert status_of(["show", "crystal", "examples/SrTiO3.cif", "--output=x.gif"]) == 2


# Leaderboards


def test_a_contribution_to_jarvis(place, monkeypatch, capsys):
    assert status_of(["export", "jarvis", "runs/quickstart", "--output=out"]) == 1  # of a set that has no benchmark
    monkeypatch.setitem(export_jarvis.JARVIS, ("small", "e_form"), "e_form-small")
    assert main(["export", "jarvis", "runs/quickstart", "--output=out", "--author_email=a@b.org"]) == 0
    out = capsys.readouterr().out
    with zipfile.ZipFile("out/AI-SinglePropertyPrediction-e_form-small-test-mae.csv.zip") as archive:
        rows = list(csv.DictReader(io.StringIO(archive.read(archive.namelist()[0]).decode())))
    assert len(rows) == 6 and "6 test crystals" in out
    error = np.mean([abs(float(row["target"]) - float(row["prediction"])) for row in rows])
    assert f"MAE {error:.4f}" in out
    assert json.loads((place / "out" / "metadata.json").read_text())["author_email"] == "a@b.org"
    assert (place / "out" / "config.json").is_file()
    test_ids = {"test": {row["id"]: 0 for row in reversed(rows[:4])}}
    with zipfile.ZipFile("ids.json.zip", "w") as archive:
        archive.writestr("ids.json", json.dumps(test_ids))
    assert main(["export", "jarvis", "runs/quickstart", "--output=out", "--ids=ids.json.zip"]) == 0
    assert "4 test crystals" in capsys.readouterr().out


def test_results_for_matbench(place, run, monkeypatch, capsys):
    model = Predictor.load(run)
    dataset = evaluate.dataset_of(model, "run", str(run.parent / "data"))

    def load(path, *_):
        fold = Predictor.load(run)
        fold.config = dataclasses.replace(model.config, target_set=f"matbench_small-{path}")
        return fold

    def data(model, *_):
        rows = dataset.splits["train"][int(model.config.target_set[-1]) * 5 :][:5]
        return dataclasses.replace(dataset, splits={"test": rows})

    monkeypatch.setattr(export_matbench, "load_model", load)
    monkeypatch.setattr(export_matbench, "dataset_of", data)
    folds = [f"fold_{number}" for number in (1, 0, 2, 4, 3)]
    assert main(["export", "matbench", *folds, "--output=out", "--authors=A. Author"]) == 0
    assert capsys.readouterr().out.count("5 test crystals, MAE") == 5
    results = json.loads(gzip.decompress((place / "out" / "results.json.gz").read_bytes()))
    assert set(results["tasks"]["matbench_small"]["results"]["fold_4"]["scores"]) == {
        "mae",
        "rmse",
        "mape",
        "max_error",
    }
    assert json.loads((place / "out" / "info.json").read_text())["authors"] == "A. Author"
    assert status_of(["export", "matbench", *folds[:4], "fold_1", "--output=again"]) == 1  # a fold twice


# The machine


def test_doctor(place, capsys, monkeypatch):
    expected = Predictor.load("tiny").predict(doctor.rock_salt())[0]
    monkeypatch.setattr(doctor, "EXPECTED", tuple(expected))
    assert main(["doctor", "--json=d.json"]) == 0
    out = capsys.readouterr().out
    assert "all is well" in out and "no kernels for the CPU" in out and crystalframer_jax.__version__ in out
    assert {"versions", "devices", "kernels", "folders", "prediction"} == set(
        json.loads((place / "d.json").read_text())
    )
    monkeypatch.setattr(doctor, "EXPECTED", tuple(expected + 0.01))
    assert main(["doctor"]) == 1
    assert "tiny is off by 1.0e-02" in capsys.readouterr().err


def test_every_command_has_a_module():
    for found in COMMANDS.values():
        assert callable(getattr(command._module(found), found.function))
