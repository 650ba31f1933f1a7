"""Run directories with a file changed at random: each gives the model that was there, or an error of one line.

Each within 2 s and 1 GB, in a process of its own. A number that is reported names a change:
`PYTHONPATH=tests python tests/runs/test_mutated_runs.py FOLDER NUMBER NUMBER+1` makes and reads it again.
"""

import contextlib
import json
import random
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from mutations import changed, in_time, limit_memory, numbers_of_last_line
from test_run_directory import CONFIG, DATA, write_run

from crystalframer_jax.errors import UserError
from crystalframer_jax.files import read_json, write_json
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.runs import checksums
from crystalframer_jax.runs.claims import check_workdir
from crystalframer_jax.runs.run_directory import check_config, check_data, sealed
from crystalframer_jax.training.logging import read_metrics

WRONG = [None, True, [], {}, "", "\ud800", "x" * 100_000, -1, 0, 0.5, 10**9, 10**30, 1e308, float("nan"), float("inf")]
WRONG += [[[[[]]]], {"a": {"a": 1}}, "best", "../../x", "/", list(range(100_000))]


@pytest.mark.parametrize("part", range(2))
def test_some_mutated_runs(tmp_path, part):
    read_mutated(tmp_path, 120 * part, 120 * part + 120)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_mutated_runs(tmp_path, part):
    read_mutated(tmp_path, 500 * part, 500 * part + 500)


def read_mutated(folder: Path, first: int, end: int) -> None:
    models, errors = numbers_of_last_line(__file__, folder, first, end)
    assert models > (end - first) / 10 and errors > (end - first) / 10


def original(folder: Path) -> Path:
    """A run as a training leaves it, with the files that say how it went."""
    run = write_run(folder)
    for epoch in range(3):
        line = {"epoch": epoch, "step": 3 * epoch + 3, "loss": 0.5, "val_loss": 0.25, "lr": 1e-3, "crystals_per_s": 9.5}
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(line | {"val_mae": {"e_form": 0.25}}) + "\n")
    (run / "predictions_test.csv").write_text("id,target,prediction\na,1.5,1.25\n")
    return run


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def other_json(content: bytes, rng: random.Random) -> bytes:
    """Puts something else in a place of the JSON of a line, or leaves it out."""
    try:
        lines = [json.loads(line) for line in content.splitlines()] if content[:2] != b"{\n" else [json.loads(content)]
    except ValueError:
        return changed(content, rng)
    places: list[tuple[Any, Any]] = []

    def collect(parent: Any) -> None:
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            places.append((parent, key))
            if isinstance(parent[key], dict | list):
                collect(parent[key])

    collect(lines)
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(WRONG)
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def made_anew(run: Path) -> None:
    """Makes checksums and seal fit again, as somebody who means harm would."""
    for folder in (run / "checkpoints").iterdir():
        (folder / checksums.NAME).unlink()
        checksums.write(folder)
    with contextlib.suppress(UserError):
        write_json(run / "summary.json", sealed(read_json(run / "summary.json")))


def model_in(run: Path) -> tuple[Any, ...]:
    """All that predictions of a run depend on."""
    model = load_model(run)
    assert isinstance(model, Predictor)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.variables)]
    draws = model.config.num_frame_samples
    return model.config.model, model.cutoff, draws, model.targets, model.weights, model.step, leaves


def other_uses(run: Path) -> list[Callable[[], object]]:
    """What else reads the files: a training that goes on."""
    dataset: Any = types.SimpleNamespace(**DATA, name=DATA["target_set"])
    uses: list[Callable[[], object]] = [lambda: check_workdir(run), lambda: check_config(CONFIG, run)]
    return [*uses, lambda: check_data(dataset, run), lambda: read_metrics(run)]


def _main(folder: Path, first: int, end: int) -> None:
    sound, kinds = original(folder / "run"), [0, 0]
    expected = model_in(sound)
    for use in other_uses(sound):
        use()
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
    texts = [file for file in files if file.suffix == ".json" or file.name in ("metadata", "_METADATA")]
    limit_memory()
    for number in range(first, end):
        print(number, flush=True)
        rng = random.Random(number)
        run = Path(shutil.copytree(sound, folder / f"{number}"))
        file = rng.choice(rng.choice([files, texts]))
        change = rng.choice([changed, truncated, other_json, other_json])
        (run / file).write_bytes(change((run / file).read_bytes(), rng))
        is_anew = file in texts and rng.random() < 0.5
        if is_anew:
            made_anew(run)
            if rng.random() < 0.5:
                (run / "config.json").unlink()  # the configuration is that of the checkpoint
        with in_time(f"{number} {file} {change.__name__}{', made anew' if is_anew else ''}"):
            try:
                found = model_in(run)
                assert found == expected or is_anew, f"{found[:-1]} instead of {expected[:-1]}"
                kinds[0] += 1
            except UserError as error:
                kinds[1] += 1
                assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            for use in other_uses(run):
                with contextlib.suppress(UserError):
                    use()
        shutil.rmtree(run)
    print("read", kinds[0], "models and", kinds[1], "errors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
