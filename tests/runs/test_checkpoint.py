"""Checkpoints: what is kept, that any damage is found, and what a kill, a full disk or a reader beside can do."""

import contextlib
import dataclasses
import errno
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_equal_trees

from crystalframer_jax.runs import checksums
from crystalframer_jax.runs.checkpoints import (
    DAMAGED_FOLDER,
    FOLDER,
    MODEL_FIELDS,
    CheckpointError,
    Checkpoints,
    on_this_device,
)
from crystalframer_jax.training.state import TrainState


def state_of(step: int, width: int = 4, dtype: type = np.float32) -> TrainState:
    """A state with numbers of this step: trees with empty parts, and int32 scalars."""
    rng = np.random.default_rng(step)

    def tree() -> dict:
        layer = {"kernel": jnp.array(rng.normal(size=(width, 50)), dtype), "bias": jnp.array(rng.normal(size=3), dtype)}
        return {"layer": layer, "count": jnp.array(rng.integers(0, 9, 2), jnp.int32), "empty": {}}

    fields = {field.name: tree() for field in dataclasses.fields(TrainState)}
    fields |= {f.name: jnp.int32(step) for f in dataclasses.fields(TrainState) if f.type is jax.Array}
    optimizer = optax.chain(optax.clip(1.0), optax.adam(lambda count: 0.1 / (1 + count)))
    fields["opt_state"] = optimizer.init({"layer": fields["params"]["layer"]})
    return TrainState(**fields | {"swa_batch_stats": {}})


def model_of(state: TrainState) -> dict:
    return {name: getattr(state, name) for name in MODEL_FIELDS if hasattr(state, name)}


def like_of(state: TrainState) -> TrainState:
    return on_this_device(jax.eval_shape(lambda: state))


@contextlib.contextmanager
def writer(workdir: Path, **kept) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(workdir, writable=True, **kept)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


@contextlib.contextmanager
def reader(workdir: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(workdir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def fill(workdir: Path, losses: dict[int, float | None], **kept) -> None:
    """Save states of steps with these validation losses."""
    with writer(workdir, **kept) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state_of(step), {"step": step}, loss)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A run with the checkpoints 3 (the best), 6 and 9; not to be changed."""
    workdir = tmp_path_factory.mktemp("three")
    fill(workdir, {3: 0.1, 6: 0.3, 9: 0.2})
    return workdir


@pytest.fixture
def run(three, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(three, tmp_path / "run"))


def kept_in(workdir: Path) -> list[str]:
    return sorted((path.name for path in (workdir / FOLDER).iterdir()), key=lambda name: (len(name), name))


def flip_bit(file: Path, bit: int = 100) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def largest(workdir: Path, step: int) -> Path:
    files = (path for path in (workdir / FOLDER / str(step)).rglob("*") if path.is_file())
    return max(files, key=lambda path: (path.stat().st_size, path))


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Writing and reading


def test_the_newest_the_best_and_no_others_are_kept(tmp_path):
    saves = {2: None, 3: 0.3, 4: None, 6: 0.1, 7: None, 9: 0.2, 10: None, 12: 0.4, 13: None}
    kept_after = {
        2: "2",
        3: "2 3",
        4: "3 4",
        6: "4 6",
        7: "6 7",
        9: "6 7 9",
        10: "6 9 10",
        12: "6 10 12",
        13: "6 12 13",
    }
    with writer(tmp_path) as checkpoints, reader(tmp_path) as other:
        assert checkpoints.last() is None and checkpoints.best() is None and other.best() is None
        for step, loss in saves.items():
            checkpoints.save(state_of(step), {}, loss)
            checkpoints.wait()
            assert " ".join(kept_in(tmp_path)) == kept_after[step]
            best = min((value, s) for s, value in saves.items() if s <= step and value)[1] if step > 2 else None
            assert (checkpoints.last(), checkpoints.best(), other.last(), other.best()) == (step, best, step, best)


@pytest.mark.parametrize(("keep_best", "keep_last", "kept"), [(0, 1, "5"), (2, 1, "1 3 5"), (1, 3, "1 3 4 5")])
def test_how_many_are_kept_can_be_chosen(tmp_path, keep_best, keep_last, kept):
    fill(tmp_path, {1: 0.1, 2: 0.4, 3: 0.2, 4: 0.5, 5: np.nan}, keep_best=keep_best, keep_last=keep_last)
    assert " ".join(kept_in(tmp_path)) == kept


def test_every_file_is_in_the_checksums_as_sha256sum_writes_it(three):
    tool = shutil.which("sha256sum") or pytest.skip("no sha256sum here")
    for step in (3, 6, 9):
        folder = three / FOLDER / str(step)
        subprocess.run([tool, "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files.remove("SHA256SUMS")
        expected = subprocess.run([tool, *files], cwd=folder, check=True, capture_output=True, text=True).stdout
        assert (folder / "SHA256SUMS").read_text() == expected and len(files) > 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_every_bit_comes_back(tmp_path, x64, dtype):
    state = state_of(5, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(dtype), np.dtype(np.int32)}
    meta = {"epoch": 0, "seconds": 0.1 + 0.2, "targets": [{"name": "a", "unit": "Å"}]}
    with writer(tmp_path) as checkpoints:
        checkpoints.save(state, meta, 1 / 3)
        restored, found = checkpoints.restore_latest(like_of(state))
    assert_equal_trees(restored, state)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(state)] and found == meta
    with reader(tmp_path) as other:
        assert_equal_trees(other.restore_model(5, on_this_device(model_of(state))), model_of(state))
        assert other.meta(5) == meta
    assert checksums.problem(tmp_path / FOLDER / "5") is None  # reading changes nothing


@pytest.mark.parametrize("kind", ["donated", "NumPy"])
def test_the_arrays_may_be_overwritten_as_soon_as_save_returns(tmp_path, kind):
    zero = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x, tree), donate_argnums=0)
    with writer(tmp_path, keep_last=1) as checkpoints:
        for step in range(1, 5):
            state, expected, meta = state_of(step, width=5000), state_of(step, width=5000), {"a": [1]}
            if kind == "NumPy":
                state = jax.tree.map(np.array, state)
            checkpoints.save(state, meta, None)
            meta["a"].append(2)
            if kind == "NumPy":
                for leaf in jax.tree.leaves(state):
                    leaf[...] = 0
            else:
                jax.block_until_ready(zero(state))
            restored, found = checkpoints.restore_latest(like_of(expected))
            assert_equal_trees(restored, expected)
            assert found == {"a": [1]}


def test_weights_alone_have_checksums_too(tmp_path):
    model = jax.tree.map(np.asarray, model_of(state_of(7)))
    with writer(tmp_path) as checkpoints:
        checkpoints.save_weights(7, model, {"epoch": 3})
        assert kept_in(tmp_path) == ["7"]
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore_latest(like_of(state_of(7)))
        assert "weights only" in one_line(error)
    assert checksums.problem(tmp_path / FOLDER / "7") is None and kept_in(tmp_path) == ["7"]
    with reader(tmp_path) as other:
        assert (other.last(), other.best(), other.meta(7)) == (7, None, {"epoch": 3})
        assert_equal_trees(other.restore_model(7, on_this_device(model)), model)


def test_a_step_that_is_there_already(run, capfd):
    def content() -> tuple:
        with reader(run) as other:
            return other.meta(9)["step"], other.best()

    with writer(run) as checkpoints:
        for loss, new, expected in [
            (0.2, 1, (9, 3)),  # the same again is skipped
            (None, 2, (9, 3)),  # so is one inside an epoch
            (0.05, 3, (3, 9)),  # the validation of its epoch is new
        ]:
            checkpoints.save(state_of(9), {"step": new}, loss)
            checkpoints.wait()
            assert content() == expected and kept_in(run)[-2:] == ["6", "9"]
        assert capfd.readouterr() == ("", "")
        flip_bit(largest(run, 9))
        checkpoints.save(state_of(9), {"step": 4}, 0.05)
    assert content() == (4, 9) and "it is written again" in capfd.readouterr().err
    assert (run / DAMAGED_FOLDER / "9").is_dir()


# Damage


def test_fifty_random_damages_are_all_found(run):
    rng = random.Random(20261122)
    folder = run / FOLDER / "9"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    like = on_this_device(model_of(state_of(9)))
    with reader(run) as checkpoints:
        for number in range(50):
            file = folder / "SHA256SUMS" if number < 5 else rng.choices(files, sizes)[0]
            content = file.read_bytes()
            if rng.random() < 0.5:
                flip_bit(file, rng.randrange(8 * len(content)))
            else:
                os.truncate(file, rng.randrange(len(content)))
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore_model(9, like)
            message = one_line(error)
            assert f"use another checkpoint: {run / FOLDER / '6'}" in message
            assert file.name == "SHA256SUMS" or str(file.relative_to(folder)) in message
            file.write_bytes(content)
        checkpoints.restore_model(9, like)


def test_deleted_and_additional_files_are_found(run):
    folder = run / FOLDER / "9"
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        moved = run / "moved"
        file.rename(moved)
        assert file.name in checksums.problem(folder)
        moved.rename(file)
    for name in ("new", "model/d/new", "SHA256SUMS.orig", "model/new/new"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        assert name in checksums.problem(folder)
        (folder / name).unlink()
    assert checksums.problem(folder) is None


@pytest.mark.parametrize(
    ("flipped", "bare", "goes_on"), [([9], [], 6), ([6, 9], [], 3), ([], [9], 6), ([6], [9], 3), ([3, 6], [], 9)]
)
def test_a_training_goes_on_from_the_newest_whole_checkpoint(run, capfd, flipped, bare, goes_on):
    names = {step: str(largest(run, step).relative_to(run / FOLDER / str(step))) for step in flipped}
    for step in flipped:
        flip_bit(largest(run, step))
    for step in bare:
        (run / FOLDER / str(step) / "SHA256SUMS").unlink()
        names[step] = "no SHA256SUMS"
    moved = [step for step in (9, 6, 3) if step > goes_on]
    with writer(run) as checkpoints:
        restored, meta = checkpoints.restore_latest(like_of(state_of(1)))
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == len(moved)
        for line, step in zip(lines, moved, strict=True):
            for part in (names[step], f"moved to {run / DAMAGED_FOLDER / str(step)}", f"from step {goes_on}"):
                assert part in line
        assert_equal_trees(restored, state_of(goes_on))
        assert meta == {"step": goes_on}
        assert kept_in(run) == [str(step) for step in (3, 6, 9) if step <= goes_on]
        checkpoints.save(state_of(12), {"step": 12}, 0.5)
        assert int(checkpoints.restore_latest(like_of(state_of(1)))[0].step) == 12
    assert capfd.readouterr().err == ""


def test_damaged_checkpoints_of_equal_number_do_not_collide(run, capfd):
    with writer(run) as checkpoints:
        for _ in range(3):
            flip_bit(largest(run, 9))
            checkpoints.restore_latest(like_of(state_of(1)))
            checkpoints.save(state_of(9), {}, None)
            checkpoints.wait()
    assert sorted(path.name for path in (run / DAMAGED_FOLDER).iterdir()) == ["9", "9-2", "9-3"]


def test_no_usable_checkpoint_is_an_error_and_no_new_start(run):
    flip_bit(largest(run, 3))
    flip_bit(largest(run, 6))
    (run / FOLDER / "9" / "SHA256SUMS").unlink()
    with writer(run) as checkpoints:
        for _ in range(2):
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore_latest(like_of(state_of(1)))
            assert all(part in one_line(error) for part in (f"{run / FOLDER}", "3: ", "6: ", "9: it has no SHA256SUMS"))
            assert kept_in(run) == ["3", "6", "9"]
        shutil.move(run / FOLDER, run / DAMAGED_FOLDER)
        (run / FOLDER).mkdir()
        with pytest.raises(CheckpointError, match=f"are in {run / DAMAGED_FOLDER}"):
            checkpoints.restore_latest(like_of(state_of(1)))


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints folder"):
        Checkpoints(tmp_path)
    with writer(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(like_of(state_of(1))) is None


def test_a_damaged_best_checkpoint_gives_way_to_the_next(run, capfd):
    flip_bit(largest(run, 3))
    with reader(run) as other:
        assert other.best() == 3
        with pytest.raises(CheckpointError, match="cannot be used"):
            other.restore_model(3, model_of(state_of(3)))
    with writer(run) as checkpoints:
        assert checkpoints.best() == checkpoints.best() == 9
    (line,) = capfd.readouterr().err.splitlines()
    assert "the best checkpoint is that of step 9" in line and (run / DAMAGED_FOLDER / "3").is_dir()


def test_a_damaged_loss_does_not_choose_the_best(run, capfd):
    flip_bit(run / FOLDER / "6" / "metrics" / "metadata", 8 * 20)
    with reader(run) as other, pytest.raises(CheckpointError) as error:
        other.best()
    assert "metrics/metadata" in one_line(error) and f"{run / FOLDER / '6'} cannot" in one_line(error)
    with writer(run) as checkpoints:
        assert checkpoints.best() == 3
    assert "metrics/metadata" in capfd.readouterr().err and kept_in(run) == ["3", "9"]


def changed(**changes) -> TrainState:
    return like_of(dataclasses.replace(state_of(1), **changes))


@pytest.mark.parametrize(
    ("like", "what"),
    [
        (changed(params=state_of(1, width=5).params), r"params.layer.kernel is float32 \[4, 50\].*float32 \[5, 50\]"),
        (changed(batch_stats=state_of(1).batch_stats | {"new": jnp.zeros(2)}), "batch_stats.new is missing"),
        (changed(calibration={}), "calibration.count is int32.*missing"),
        (changed(swa_batch_stats={"new": {}}), "swa_batch_stats"),
        (changed(opt_state={"count": jnp.int32(0)}), "opt_state.*missing"),
    ],
    ids=["shape", "more", "fewer", "empty", "optimizer"],
)
def test_another_model_is_no_damage(run, capfd, like, what):
    with writer(run) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore_latest(like)
    assert re.search(what, one_line(error)) and "another model than config.json" in one_line(error)
    assert kept_in(run) == ["3", "6", "9"] and not (run / DAMAGED_FOLDER).exists()
    assert capfd.readouterr() == ("", "")


def test_arrays_keep_the_type_they_were_stored_in(tmp_path, x64):
    double, single = state_of(5, dtype=np.float64), like_of(state_of(5, dtype=np.float32))
    with writer(tmp_path) as checkpoints:
        checkpoints.save(double, {}, None)
        restored, _ = checkpoints.restore_latest(single)
        assert restored.params["layer"]["kernel"].dtype == np.float64
        assert_equal_trees(restored, double)
        with jax.enable_x64(False), pytest.raises(CheckpointError, match=r"layer.bias is float64 \[3\] there"):
            checkpoints.restore_latest(single)


# Readers


def test_reading_again_and_again_takes_no_more_memory(three):
    """Python blocks: each array that is read by Orbax leaves more than a hundred behind."""
    like = on_this_device(model_of(state_of(9)))
    with reader(three) as checkpoints:
        for _ in range(3):
            checkpoints.restore_model(9, like)
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(20):
            checkpoints.restore_model(9, like)
        gc.collect()
    assert sys.getallocatedblocks() - before < 10 * 20 * len(jax.tree.leaves(like))


def test_reading_needs_no_orbax():
    """Its import takes a part of the time to the first prediction."""
    code = "import sys, crystalframer_jax.inference.predictor; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_checkpoint_that_vanishes_while_it_is_read(run, monkeypatch):
    like = on_this_device(model_of(state_of(9)))
    verify = checksums.problem

    def verify_then_vanish(folder: Path, under: str = "") -> str | None:
        wrong = verify(folder, under)
        shutil.rmtree(folder, ignore_errors=True)
        return wrong

    monkeypatch.setattr(checksums, "problem", verify_then_vanish)
    with reader(run) as checkpoints:
        for read in (lambda: checkpoints.restore_model(9, like), lambda: checkpoints.meta(9), checkpoints.best):
            with pytest.raises(CheckpointError) as error:
                read()
            assert "try again" in one_line(error) and str(run / FOLDER) in one_line(error)


def test_a_step_that_is_not_there(three):
    with (
        reader(three) as checkpoints,
        pytest.raises(CheckpointError, match=r"999 is not there.*\(there are: 3, 6, 9\)"),
    ):
        checkpoints.meta(999)


def test_checkpoints_of_an_old_version_are_named(run):
    for step in (3, 6, 9):
        (run / FOLDER / str(step) / "SHA256SUMS").unlink()
    with reader(run) as checkpoints:
        for read in (checkpoints.last, checkpoints.best, lambda: checkpoints.meta(6)):
            with pytest.raises(CheckpointError) as error:
                read()
            assert "has no SHA256SUMS" in one_line(error) and "there is no other checkpoint" in one_line(error)


def test_readers_beside_a_training_get_whole_checkpoints_or_are_told_to_try_again(tmp_path):
    fill(tmp_path, {1: 1.0}, keep_last=1, keep_best=0)
    done = threading.Event()

    def train() -> None:
        fill(tmp_path, {step: 1 / step for step in range(2, 16)}, keep_last=1, keep_best=0)
        done.set()

    training = threading.Thread(target=train)
    training.start()
    seen = set()
    with reader(tmp_path) as checkpoints:
        while not done.is_set():
            try:
                step = checkpoints.last()
                assert step is not None
                model = checkpoints.restore_model(step, on_this_device(model_of(state_of(step))))
                assert checkpoints.meta(step) == {"step": step}
            except CheckpointError as error:
                assert "try again" in str(error)
                continue
            assert_equal_trees(model, model_of(state_of(step)))
            seen.add(step)
    training.join()
    assert len(seen) > 3


# Killed processes


def save_until_killed(workdir: str) -> None:
    """For a process of its own: save, and print the steps that were verified, a line each."""
    with writer(Path(workdir)) as checkpoints:
        for step in range(1, 1000):
            checkpoints.save(state_of(step, width=100), {"step": step}, 1 / step if step % 3 else None)
            print(step - 1, flush=True)  # saving waits for the step before


def test_a_kill_at_any_moment_leaves_the_newest_verified_checkpoint(tmp_path, capfd):
    rng = random.Random(7)
    processes = []
    for number in range(4):
        call = f"from runs import test_checkpoint; test_checkpoint.save_until_killed({str(tmp_path / str(number))!r})"
        processes.append(forks.Fork("-c", call))
    for number, process in enumerate(processes):
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        output, errors = process.communicate()
        lines += output.splitlines()
        assert (process.returncode, errors) == (-signal.SIGKILL, "")
        verified = max(map(int, lines))
        with writer(tmp_path / str(number)) as checkpoints:
            found = checkpoints.restore_latest(like_of(state_of(1, width=100)))
            if found is None:
                assert verified == 0
                continue
            step = int(found[0].step)
            assert step >= verified and found[1] == {"step": step}
            assert_equal_trees(found[0], state_of(step, width=100))
            assert all(name.isdigit() for name in kept_in(tmp_path / str(number)))
            checkpoints.save(state_of(step + 1, width=100), {}, None)
    assert capfd.readouterr() == ("", "")


def test_what_killed_processes_leave_is_cleared_away(run):
    unfinished = run / FOLDER / "unfinished"
    shutil.copytree(run / FOLDER / "9", unfinished / "12")  # killed before it got its place
    shutil.copytree(run / FOLDER / "9", unfinished / "15")
    (unfinished / "15" / "SHA256SUMS").unlink()  # killed before its checksums
    shutil.copytree(run / FOLDER / "9", unfinished / "18.orbax-checkpoint-tmp")
    shutil.copytree(run / FOLDER / "9", unfinished / "deleted-2")
    (run / FOLDER / "3").rename(unfinished / "3")  # killed while it replaced another checkpoint of its step
    (run / FOLDER / "21.orbax-checkpoint-tmp-0").mkdir()
    with reader(run) as other:
        assert other.last() == 9 and unfinished.exists()
    with writer(run) as checkpoints:
        assert kept_in(run) == ["3", "6", "9", "12"] and checkpoints.last() == 12


# Failing disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk(small_disk, capfd):
    width = 1500  # 2 MB a checkpoint
    like = like_of(state_of(1, width))
    with writer(small_disk) as checkpoints:
        checkpoints.save(state_of(1, width), {"step": 1}, 1.0)
        checkpoints.save(state_of(2, width), {"step": 2}, 0.5)
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(state_of(3, width), {"step": 3}, 0.5)
        message = one_line(error)
        for part in (f"{small_disk / FOLDER / '2'} could not", "No space left", "step 1 is intact", "same command"):
            assert part in message
        assert kept_in(small_disk) == ["1"] and checkpoints.last() == checkpoints.best() == 1
        checkpoints.wait()  # told once
        assert_equal_trees(checkpoints.restore_latest(like)[0], state_of(1, width))
        remount(small_disk, "size=30m")
        checkpoints.save(state_of(2, width), {"step": 2}, 0.5)
        checkpoints.wait()
        remount(small_disk, "ro")
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(state_of(3, width), {"step": 3}, 0.5)
        assert "Read-only file system" in one_line(error) and "step 2 is intact" in one_line(error)
        assert_equal_trees(checkpoints.restore_latest(like)[0], state_of(2, width))
        remount(small_disk, "rw")
    assert kept_in(small_disk) == ["1", "2"] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_the_checksums(run, monkeypatch, number):
    def fail(folder: Path) -> None:
        (folder / "SHA256SUMS").write_text("")
        raise OSError(number, os.strerror(number), "file")

    with writer(run) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, "write", fail)
            checkpoints.save(state_of(12), {}, 0.01)
            with pytest.raises(CheckpointError) as error:
                checkpoints.wait()
        assert os.strerror(number) in one_line(error) and "step 9 is intact" in one_line(error)
        assert kept_in(run) == ["3", "6", "9"] and checkpoints.best() == 3
        checkpoints.save(state_of(12), {}, 0.01)
    assert kept_in(run) == ["9", "12"]


# Names, and what is no file


def exchange(workdir: Path, one: int, other: int) -> None:
    folder = workdir / FOLDER
    (folder / str(one)).rename(folder / "aside")
    (folder / str(other)).rename(folder / str(one))
    (folder / "aside").rename(folder / str(other))


def test_exchanged_folders_are_found(run):
    exchange(run, 6, 9)
    with reader(run) as checkpoints:
        for step, other in ((6, 9), (9, 6)):
            with pytest.raises(CheckpointError) as error:
                checkpoints.meta(step)
            assert f"it is the checkpoint of step {other}; give it that name back" in one_line(error)
        assert checkpoints.meta(3) == {"step": 3}
    with writer(run) as checkpoints:
        assert checkpoints.restore_latest(like_of(state_of(1)))[1] == {"step": 3}
        assert kept_in(run) == ["3"]
    assert sorted(path.name for path in (run / DAMAGED_FOLDER).iterdir()) == ["6", "9"]  # nothing is lost


def test_a_folder_of_another_number_is_no_checkpoint(run, capfd):
    (run / FOLDER / "9").rename(run / FOLDER / "90")
    with reader(run) as checkpoints, pytest.raises(CheckpointError, match="it is the checkpoint of step 9"):
        checkpoints.restore_model(90, on_this_device(model_of(state_of(9))))
    with writer(run) as checkpoints:
        assert checkpoints.best() == 3
        checkpoints.save(state_of(90), {}, 0.01)
        checkpoints.wait()
        assert checkpoints.best() == 90
    assert "give it that name back; moved to" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "the step a link"])
def test_what_is_no_file_is_not_read(run, tmp_path, kind):
    path = run / FOLDER / "9"
    if kind == "the step a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path / "model" / "pipe")
    else:
        (path / "model" / "link").symlink_to(path / "SHA256SUMS" if kind == "link to a file" else path / "meta")
    with reader(run) as checkpoints:
        for read in (lambda: checkpoints.restore_model(9, on_this_device(model_of(state_of(9)))), checkpoints.best):
            with pytest.raises(CheckpointError, match="is a link or no regular file"):
                read()


@pytest.mark.parametrize("content", ["null", "[]", '{"validation_loss": "0.1"}', '{"validation_loss": NaN}', "{}"])
def test_scores_that_somebody_made_anew(run, content):
    folder = run / FOLDER / "3"
    (folder / "metrics" / "metadata").write_text(content)
    (folder / checksums.NAME).unlink()
    checksums.write(folder)
    with reader(run) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.best()
    assert "metrics/metadata is damaged" in one_line(error)


# Death at every change of names

DYING = ((os, "rename"), (os, "replace"), (shutil, "rmtree"))


def die_at_every_call(folder: str) -> None:
    """For a process of its own: save in children that die at the first, second, ... call that changes names.

    A child that lives to its end is the last one. They are forked before JAX has started a thread.
    """
    for number in range(1, 1000):
        child = os.fork()
        if not child:
            left = [number]
            for module, name in DYING:
                setattr(module, name, dying(getattr(module, name), left, folder))
            try:
                fill(Path(folder) / str(number), {3: 0.2, 6: 0.1}, keep_last=1)
                with writer(Path(folder) / str(number), keep_last=1) as checkpoints:
                    checkpoints.save(state_of(6), {"step": 6}, 0.05)  # replaces the one that is there
            except BaseException:
                os._exit(7)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        if status == 0:
            print(number, flush=True)
            return


def dying(function, left: list[int], folder: str):
    def function_or_death(path, *args, **kwargs):
        if folder in str(path) and Path(path).parent.name in (FOLDER, "unfinished"):  # not Orbax, inside of these
            left[0] -= 1
            if not left[0]:
                os._exit(9)
        return function(path, *args, **kwargs)

    return function_or_death


def test_death_at_any_change_of_names_leaves_a_whole_checkpoint(tmp_path, capfd):
    call = f"from runs import test_checkpoint; test_checkpoint.die_at_every_call({str(tmp_path)!r})"
    process = forks.run("-c", call)
    assert process.returncode == 0, process.stderr
    calls = int(process.stdout)
    assert calls > 10
    like, newest = like_of(state_of(1)), []
    for number in range(1, calls + 1):
        with writer(tmp_path / str(number)) as checkpoints:
            found = checkpoints.restore_latest(like)
            step = found[1]["step"] if found else 0
            if found:
                assert_equal_trees(found[0], state_of(step))
            newest.append(step)
            checkpoints.save(state_of(step + 1), {"step": step + 1}, 0.01)
            checkpoints.wait()
            assert checkpoints.best() == checkpoints.last() == step + 1
            assert all(name.isdigit() for name in kept_in(tmp_path / str(number)))
        assert not (tmp_path / str(number) / DAMAGED_FOLDER).exists()
    assert newest == sorted(newest) and set(newest) == {0, 3, 6}  # it never goes back
