"""The documentation names what is there: every hyperparameter, every file, every script."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_sets import raw_records
from support import random_variables, small_config

from crystalframer_jax.cli.arguments import shipped_configs
from crystalframer_jax.cli.command import COMMANDS, GROUPS
from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES, WITHOUT_COUNTERPART
from crystalframer_jax.configs import default
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


HYPERPARAMETERS = (ROOT / "docs" / "hyperparameters.md").read_text()


def rows_of_table():
    """[(keys, default, text)] of the rows about hyperparameters in docs/hyperparameters.md."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", HYPERPARAMETERS, re.MULTILINE)
    return [(re.findall(r"`(\w+)`", cell), value, text) for cell, value, text in rows]


def keys_of_table():
    """{key: last cell of its row} of docs/hyperparameters.md."""
    return {key: text for keys, _, text in rows_of_table() for key in keys}


def test_the_table_of_hyperparameters_has_every_official_key():
    golden = np.load(ROOT / "tests" / "golden" / "max.npz")
    official = json.loads(golden["config_json"].tobytes())
    assert not set(official) - set(keys_of_table())


def test_the_table_of_hyperparameters_has_every_key_of_this_library_and_no_other():
    table, known = keys_of_table(), default.get_config()
    assert set(table) == set(known) | set(WITHOUT_COUNTERPART)
    for key, text in table.items():
        assert text.startswith("refused") == (key in WITHOUT_COUNTERPART), key


def test_the_table_of_hyperparameters_has_the_defaults():
    """One for each key of a row, or one for all of them."""
    known = default.get_config()
    for keys, cell, _ in rows_of_table():
        if keys[0] in WITHOUT_COUNTERPART:
            assert cell == "-", keys
            continue
        given = [literal(value) for value in re.split(r", (?![^(]*\))", cell)]
        given = given * len(keys) if len(given) == 1 else given
        assert given == [known[key] for key in keys], keys


def literal(text):
    """A number, tuple or truth value, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@pytest.mark.parametrize("key", ["lr_sch", "normalize_targets"])
def test_values_that_have_a_table_of_their_own_are_all_in_it(key):
    table = HYPERPARAMETERS.split(f"| value of `{key}` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| (\w+) \|", table, re.MULTILINE)) == sorted(ALLOWED_VALUES[key])


@pytest.mark.parametrize(
    "key", ["domain", "frame_method", "pooling", "pre_pooling_op", "optimizer", "loss_func", "task"]
)
def test_values_are_named_beside_their_key(key):
    assert set(ALLOWED_VALUES[key]) <= set(re.findall(r"`(.*?)`", keys_of_table()[key]))


def test_the_layers_named_are_layers_of_the_model():
    sentence = re.search(r"name layers as in the tree of parameters: (.*?);", HYPERPARAMETERS, re.DOTALL)
    paths = jax.tree_util.tree_leaves_with_path(random_variables(small_config())["params"])
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    for layer in re.findall(r"`(.*?)`", sentence[1]):
        assert any(f"{name}/".startswith(f"{layer}/") for name in names), layer


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"(?:scripts|configs|examples)/[\w./]+\.(?:py|sh|cif)\b", text)
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    for name in named:
        assert (ROOT / name).exists(), name
    for link in filter(None, links):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_on_command_lines_exist(page):
    """`--config.KEY` are hyperparameters; the other options are those of the script."""
    known = default.get_config()
    for line in re.findall(r"^python (scripts/\w+\.py .*)$", page.read_text(), re.MULTILINE):
        script, *options = line.split()
        sources = [ROOT / script, *(ROOT / "crystalframer_jax" / "cli").glob("*.py")]
        source = "".join(file.read_text() for file in sources)
        for option in options:
            if option.startswith("--config."):
                assert option.removeprefix("--config.").split("=")[0] in known, line
            elif option.startswith("--"):
                name = option.split("=")[0]
                assert name in source or f'"{name.removeprefix("--")}"' in source, line


def test_the_table_of_classes_is_made_and_read(tmp_path, monkeypatch):
    """The block of docs/training.md is run."""
    text = (ROOT / "docs" / "training.md").read_text().split("## Classes\n")[1]
    block = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(block[1], {})
    records = [*custom_source(tmp_path / "hull.jsonl", CustomData(targets=("on_hull",))).records()]
    energies = [raw["e_above_hull"] for raw in raw_records()]
    assert [record.labels for record in records] == [(float(energy == 0),) for energy in energies]


def test_the_site_builds_without_a_warning(tmp_path):
    """Every page is reached from the first, every link within the site has its place, docstrings are read."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", ROOT / "docs"]
    built = subprocess.run([*command, tmp_path / "site"], capture_output=True, text=True, timeout=600)
    assert built.returncode == 0 and built.stderr == "", built.stderr
    front = (tmp_path / "site" / "index.html").read_text()
    assert all(f'href="{page.stem}.html"' in front for page in PAGES[1:] if page.stem != "index")
    assert "load" in (tmp_path / "site" / "api" / "inference.html").read_text()
    assert (tmp_path / "site" / "searchindex.js").exists()


def command_lines(page):
    """The words of the command lines of a page, without comments; a line that ends in a backslash goes on."""
    text = re.sub(r"\\\n *", "", page.read_text())
    lines = re.findall(r"^(?:srun )?crystalframer ((?:[a-z]+) .*|doctor)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_ones(page):
    """Every subcommand takes the arguments; hyperparameters and configurations exist."""
    known = default.get_config()
    for words in command_lines(page):
        name = " ".join(words[: 1 + (words[:1] in GROUPS)])
        others = [word for word in words[name.count(" ") + 1 :] if not word.startswith("--config.")]
        for word in words:
            if word.startswith("--config."):
                assert word.removeprefix("--config.").split("=")[0] in known, words
        arguments = COMMANDS[name].parser().parse_args(others)
        if name == "train" and not arguments.config.startswith(("runs/", "configs/", "...")):
            assert arguments.config.split(":")[0] in shipped_configs(), words
