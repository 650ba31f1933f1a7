"""Structure files with random changes: each gives crystals, or errors of one line, within 2 s and 1 GB.

A number that is reported names a file: `PYTHONPATH=tests python tests/structures/test_mutated_structures.py FOLDER
NUMBER NUMBER+1` writes and reads it again.
"""

import gzip
import random
import sys
import warnings
from pathlib import Path

import pytest
from mutations import changed, in_time, limit_memory, numbers_of_last_line

HERE = Path(__file__).parent
SIGNS = [
    "\u2212",
    "\u2013",
    "\u00a0",
    "\u0663",
    "\uff11",
    "\u00bd",
    "\u200b",
    "?",
    ".",
    "'",
    "loop_",
    "data_",
    "_",
    "/",
]


def originals() -> list[tuple[str, bytes]]:
    """Names and contents of sound files; packed ones are unpacked."""
    found = [file for folder in ("odd_files", "files") for file in sorted((HERE / folder).iterdir())]
    sound = []
    for file in found:
        content = file.read_bytes()
        sound.append((file.name.removesuffix(".gz"), gzip.decompress(content) if file.suffix == ".gz" else content))
    return [(name, content) for name, content in sound if len(content) < 10_000]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Changes bytes, or writes a sign that is not usual into the text."""
    if rng.random() < 0.7:
        return changed(content, rng)
    if content.startswith(b"\x1f\x8b"):
        return changed(content, rng)
    text = content.decode("utf-8")
    at = rng.randrange(len(text))
    return (text[:at] + rng.choice(SIGNS) + text[at + rng.randint(0, 1) :]).encode()


@pytest.mark.parametrize("part", range(2))
def test_some_mutated_structures(tmp_path, part):
    read_mutated(tmp_path, 150 * part, 150 * part + 150)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_mutated_structures(tmp_path, part):
    read_mutated(tmp_path, 500 * part, 500 * part + 500)


def read_mutated(folder: Path, first: int, end: int) -> None:
    crystals, errors = numbers_of_last_line(__file__, folder, first, end)
    assert crystals and errors


def _main(folder: Path, first: int, end: int) -> None:
    from crystalframer_jax.cli.predict import read_all

    sound, kinds = originals(), [0, 0]
    for name, content in sound:
        (folder / name).write_bytes(content)
        read_all([folder / name], [6.93])  # imports what is needed
    limit_memory()
    for number in range(first, end):
        print(number, flush=True)
        rng = random.Random(number)
        name, content = rng.choice(sound)
        content = mutated(content, rng)
        if packed := rng.random() < 0.1:
            content = mutated(gzip.compress(content), rng) if rng.random() < 0.5 else gzip.compress(content)
        file = folder / f"{number}" / (name + ".gz" if packed else name)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with in_time(f"{number} {name}"), warnings.catch_warnings(record=True) as stray:
            crystals, errors = read_all([file], [6.93])
            for read in crystals:
                assert read.crystal.formula
            for error in errors:
                assert "\n" not in error and len(error) < 2000 and "; " in error, error
                assert not any(word in error for word in ("KeyError", "ValueError", "TypeError", "Traceback")), error
            assert not stray
        kinds = [kinds[0] + len(crystals), kinds[1] + len(errors)]
    print("read", kinds[0], "crystals and", kinds[1], "errors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
