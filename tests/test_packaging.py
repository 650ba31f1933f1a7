"""The wheel: complete, and usable away from the repository."""

import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SOURCES = ("crystalframer_jax", "configs", "kernels", "pyproject.toml", "README.md", "LICENSE")

# What a user does first, without the repository at hand.
USE = """
import json
from pathlib import Path
import crystalframer_jax
import crystalframer_jax.kernels
from crystalframer_jax import Predictor, load_official
from crystalframer_jax.config import validate
from crystalframer_jax.configs import default, mp_flla, quickstart
from crystalframer_jax.data.registry import target_set

for module in (default, mp_flla, quickstart):
    validate(module.get_config())
known = target_set("mp_flla_2015")
records = list(known.source.open(known.targets).records())
assert target_set("jarvis__megnet").official_splits["test"].count == 4239
files = [module.__file__ for module in (crystalframer_jax, crystalframer_jax.kernels, quickstart)]
print(json.dumps({"files": files, "records": len(records), "path": list(crystalframer_jax.__path__)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources: building leaves files beside them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = target.iterdir()
    return file


def test_the_wheel_holds_every_module_and_the_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {"crystalframer_jax": "crystalframer_jax"}
    packages |= {name: f"crystalframer_jax/{name}" for name in ("configs", "kernels")}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in packages.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".gz", ".json", ".npz") or path.name == "py.typed"
    }
    assert "crystalframer_jax/data/bundled/mp_flla_2015.jsonl.gz" in expected and len(expected) > 30
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "crystalframer = crystalframer_jax.cli.command:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_the_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # a wheel of pure Python is installed by unpacking it
        archive.extractall(packages)
    # The dependencies are those of this environment; the .pth files there, of an editable install, are not followed.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    used = subprocess.run([python, "-c", USE], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    assert used.returncode == 0, used.stderr
    found = json.loads(used.stdout)
    assert found["records"] == 3938 and len(found["path"]) == 1
    for file in found["files"]:
        assert Path(file).is_relative_to(packages.resolve()), file


def test_constraints_name_a_version_within_bounds_for_every_dependency():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    tested = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    of_extras = [text for extra in ("ase", "torch") for text in project["optional-dependencies"][extra]]
    for needed in map(Requirement, project["dependencies"] + of_extras):
        for python in ("3.11", "3.12"):
            found = [
                one.specifier
                for one in tested
                if canonicalize_name(one.name) == canonicalize_name(needed.name)
                and (one.marker is None or one.marker.evaluate({"python_version": python}))
            ]
            assert len(found) == 1, f"{needed.name} under Python {python}"
            assert needed.specifier.contains(str(found[0]).removeprefix("=="))


@pytest.mark.slow
def test_the_installed_command_predicts_offline_with_a_home_that_cannot_be_written(wheel, tmp_path):
    """pip makes the command; files are predicted by the model of the package, and its configurations have names."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    pip = [environment / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, timeout=300)
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    (tmp_path / "file").write_text("")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    clean |= {
        "HOME": str(tmp_path / "file"),
        "XDG_CACHE_HOME": str(tmp_path / "file"),
        "https_proxy": "http://0.0.0.0:9",
    }

    def command(*words: object) -> subprocess.CompletedProcess:
        words = (environment / "bin" / "crystalframer", *words)
        return subprocess.run(words, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)

    shutil.copy(ROOT / "examples" / "NaCl.cif", tmp_path)
    found = command("predict", "NaCl.cif")
    assert found.returncode == 0 and "model mp-2018" in found.stderr and "e_form (eV/atom)" in found.stdout
    assert command("--version").stdout.startswith("crystalframer_jax ")
    assert command("doctor").returncode == 0
    wrong = command("train", "--config=recommended:lightweight", f"--workdir={tmp_path / 'run'}", "--config.lrr=1")
    assert wrong.returncode == 2 and "'lr'" in wrong.stderr
