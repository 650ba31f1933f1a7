"""The notebooks of the documentation run, and are kept with their output."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def read(file):
    return nbformat.read(file, as_version=4)


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_kept_with_their_output(file):
    """In order, with pictures, without errors, warnings, or places of the machine that they ran on."""
    cells = [cell for cell in read(file).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(pictures, cells)) > 3
    text = str([cell.outputs for cell in cells])
    assert not re.search(r"Warning|Traceback|site-packages|/home/|/root/|/work/", text)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(file, monkeypatch):
    """As users run them, with as many pictures as they are kept with."""
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    kept, new = read(file), read(file)
    NotebookClient(new, timeout=600, kernel_name="python3", resources={"metadata": {"path": file.parent}}).execute()
    for old, cell in zip(kept.cells, new.cells, strict=True):
        assert pictures(cell) == pictures(old), cell.source
