"""The documentation names what is there: every hyperparameter, every file, every script."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from crystalframer_jax.config import WITHOUT_COUNTERPART
from crystalframer_jax.configs import default

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def keys_of_table():
    """{key: last cell of its row} of docs/hyperparameters.md."""
    rows = re.findall(r"^\| (`.*?) \|.*?\| (.*) \|$", (ROOT / "docs" / "hyperparameters.md").read_text(), re.MULTILINE)
    return {key: text for cell, text in rows for key in re.findall(r"`(\w+)`", cell)}


def test_the_table_of_hyperparameters_has_every_official_key():
    golden = np.load(ROOT / "tests" / "golden" / "max.npz")
    official = json.loads(golden["config_json"].tobytes())
    assert not set(official) - set(keys_of_table())


def test_the_table_of_hyperparameters_has_every_key_of_this_library_and_no_other():
    table, known = keys_of_table(), default.get_config()
    assert set(table) == set(known) | set(WITHOUT_COUNTERPART)
    for key, text in table.items():
        assert text.startswith("refused") == (key in WITHOUT_COUNTERPART), key


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
        sources = [ROOT / script, *(ROOT / "crystalframer_jax").glob("**/*cli.py")]
        source = "".join(file.read_text() for file in sources)
        for option in options:
            if option.startswith("--config."):
                assert option.removeprefix("--config.").split("=")[0] in known, line
            elif option.startswith("--"):
                name = option.split("=")[0]
                assert name in source or f'"{name.removeprefix("--")}"' in source, line
