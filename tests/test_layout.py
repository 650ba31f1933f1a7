"""The rooms of CONTRIBUTING.md: every file imports only what stands above its package, and nothing runs in a circle."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = "crystalframer_jax"
FOLDERS = {"configs": ROOT / "configs", "kernels": ROOT / "kernels"}  # that are mapped into the package
LONGEST = 400  # lines


def order() -> list[str]:
    """The rooms in the order of CONTRIBUTING.md."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return [line.split()[0] for line in block[1].splitlines()]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for name, folder in {"": ROOT / PACKAGE, **FOLDERS}.items():
        for file in folder.rglob("*.py"):
            parts = [PACKAGE, *filter(None, [name]), *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def room(module: str) -> str:
    """The package of a module, or the module itself at the top."""
    return module.split(".")[1]


KNOWN = {name: file for name, file in modules().items() if name != PACKAGE}


@pytest.mark.parametrize("module", KNOWN)
def test_imports_run_one_way(module):
    rooms = order()
    for imported in imports(KNOWN[module], KNOWN):
        assert rooms.index(room(imported)) <= rooms.index(room(module)), f"{module} imports {imported}"


def test_every_room_is_in_the_list():
    assert sorted(order()) == sorted({room(module) for module in KNOWN})


def test_no_module_imports_itself_through_others():
    graph = {module: {x for x in imports(file, KNOWN) if x != module} for module, file in KNOWN.items()}
    TopologicalSorter(graph).prepare()  # CycleError otherwise


def test_a_way_back_is_noticed(tmp_path):
    (tmp_path / "wrong.py").write_text("def f():\n    from crystalframer_jax.training import loop\n")
    assert list(imports(tmp_path / "wrong.py", KNOWN)) == [f"{PACKAGE}.training.loop"]
    assert order().index("training") > order().index("structures")


def test_no_file_is_long():
    long = [f"{name}: {len(file.read_text().splitlines())}" for name, file in KNOWN.items()]
    assert not [text for text in long if int(text.split()[1]) > LONGEST]


@pytest.mark.parametrize("package", sorted(file.parent.name for file in (ROOT / PACKAGE).rglob("__init__.pyi")))
def test_packages_give_their_public_names(package):
    """The names that a type checker sees in __init__.pyi are those that the package gives."""
    module = importlib.import_module(PACKAGE if package == PACKAGE else f"{PACKAGE}.{package}")
    names = re.findall(r"^from \.\w+ import (\w+) as \1$", Path(module.__file__ + "i").read_text(), re.MULTILINE)
    assert names and sorted(names) == sorted(module.__all__)
    for name in names:
        assert getattr(module, name) is not None and not inspect.ismodule(getattr(module, name)), name


def test_tests_have_the_same_folders():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - {"parity", "properties", "scripts"} <= {room(module) for module in KNOWN}
