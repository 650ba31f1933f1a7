"""Checkpoint files of the official implementation: read without executing them, and written."""

import os
import sys
import zipfile
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from official_files import SCALING, lightning, saved, torch
from official_states import assert_same

from crystalframer_jax.errors import UserError
from crystalframer_jax.official import pickle_limits
from crystalframer_jax.official.checkpoint_file import (
    OfficialCheckpoint,
    TorchFileError,
    read_checkpoint,
    write_checkpoint,
)


class Malicious:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path, official, states, zipped):
    trace, file = tmp_path / "trace", tmp_path / "model.ckpt"
    content = lightning(official, states[0], None, callbacks=Malicious(trace))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TorchFileError) as error:
        read_checkpoint(file)
    assert ("posix.mkdir" in str(error.value) and "nothing of the file was executed" in str(error.value)) == zipped
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the file does what it says
    assert trace.exists()


def test_classes_that_only_hold_values_are_read(tmp_path, official, states):
    file = saved(tmp_path, lightning(Namespace(**official), states[0], None))
    assert read_checkpoint(file).hyper_parameters == official
    with pytest.raises(TorchFileError, match=r"fractions\.Fraction"):
        read_checkpoint(saved(tmp_path, lightning(official | {"lr": Fraction(1, 2)}, states[0], None)))


def test_half_precision_becomes_float32(tmp_path):
    values = {"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.tensor([0.1], dtype=torch.float64)}
    expected = {"a": np.array([1.5], np.float32), "b": np.array([0.1])}
    assert_same(read_checkpoint(saved(tmp_path, values)).state, expected)


def test_files_that_are_no_checkpoints_are_errors_of_one_line(tmp_path, averaged_file, states):
    whole = averaged_file.read_bytes()
    torn = bytearray(whole)
    torn[whole.index(states[0]["mlp.0.weight"].tobytes())] ^= 1  # the lowest bit of a weight
    cases = {
        "empty": (b"", "empty"),
        "text": (b"hello", "not a PyTorch file"),
        "truncated": (whole[: len(whole) // 2], "damaged"),
        "no-end": (whole[:-40], "damaged"),
        "torn": (bytes(torn), "checksum"),
    }
    for name, (content, word) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TorchFileError) as error:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and word in str(error.value) and "\n" not in str(error.value)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(TorchFileError, match=r"does not exist|not a file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        {"a": 1.0},
        {"state_dict": [1]},
        {"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": 3},
        {"state_dict": {"a": torch.zeros(1)}, "epoch": "x"},
        {"state_dict": {"a": torch.zeros(1)}, "global_step": 10**300},
    ],
)
def test_files_of_other_content_are_errors(tmp_path, content):
    with pytest.raises(TorchFileError, match=r"model\.ckpt"):
        read_checkpoint(saved(tmp_path, content))


SPECIAL = {
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
    "expanded": torch.zeros(1).expand(10**7, 10**7),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_tensors_are_named_and_refused(tmp_path, kind):
    file = saved(tmp_path, {"state_dict": {"model.a": SPECIAL[kind]}})
    with pytest.raises(TorchFileError, match=r"model\.ckpt: model\.a is not an ordinary tensor") as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swa_model.n_averaged": torch.ones(2, dtype=torch.int64)}, "swa_model.n_averaged is int64 [2], not a count"),
        ({"swa_model.n_averaged": torch.tensor(1.5)}, "swa_model.n_averaged is float32 [], not a count"),
        ({"swa_model.n_averaged": torch.tensor(-1)}, "swa_model.n_averaged is int64 [], not a count"),
        ({"swa_model.n_averaged": None}, "holds swa_model.n_averaged, a NoneType"),
        ({"mlp.0.bias": torch.zeros(1)}, "holds both mlp.0.bias and model.mlp.0.bias"),
        ({5: torch.zeros(1)}, "holds 5, a Tensor"),
    ],
)
def test_state_dicts_that_contradict_themselves(tmp_path, official, states, changes, words):
    content = lightning(official, *states, averaged_steps=2)
    content["state_dict"] |= changes
    with pytest.raises(TorchFileError) as error:
        read_checkpoint(saved(tmp_path, content))
    assert words in str(error.value)
    del content["state_dict"]["swa_model.n_averaged"]
    for key in changes:
        content["state_dict"].pop(key, None)
    with pytest.raises(TorchFileError, match=r"averaged weights without swa_model\.n_averaged"):
        read_checkpoint(saved(tmp_path, content))


def test_archives_that_unpack_to_more_than_they_are(tmp_path, averaged_file, monkeypatch):
    """They are refused before PyTorch sees them."""
    monkeypatch.setattr(torch, "load", None)
    compressed = tmp_path / "compressed.ckpt"
    with zipfile.ZipFile(averaged_file) as archive, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
    with pytest.raises(TorchFileError, match="is a compressed archive"):
        read_checkpoint(compressed)
    content = bytearray(averaged_file.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the directory at the end: sizes at 20 and 24
    content[entry + 20 : entry + 28] = 2 * (2**30).to_bytes(4, "little")
    (tmp_path / "large.ckpt").write_bytes(content)
    with pytest.raises(TorchFileError, match="claim to be larger than the archive"):
        read_checkpoint(tmp_path / "large.ckpt")


def test_pytorch_that_is_missing_or_too_old(averaged_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(UserError, match=r'pip install "\.\[torch\]"'):
            read_checkpoint(averaged_file)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(UserError, match=r"2\.6 or newer"):
        read_checkpoint(averaged_file)


def test_a_file_is_complete_or_not_there(tmp_path, states, official, monkeypatch):
    checkpoint = OfficialCheckpoint(official, states[0], None, *SCALING.values())
    write_checkpoint(tmp_path / "new" / "a.ckpt", checkpoint)
    before = (tmp_path / "new" / "a.ckpt").read_bytes()

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "new" / "a.ckpt", checkpoint)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]
    assert (tmp_path / "new" / "a.ckpt").read_bytes() == before


# Objects without end


def pickled(folder: Path, objects: bytes, where: str) -> Path:
    """A checkpoint whose pickle has the objects that these operations make: as a key, or as a value."""
    file = saved(folder, {"model.a": torch.zeros(1), "callbacks": "HERE"})
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    text = b"X\x04\x00\x00\x00HERE"
    assert text in members[name]
    made = objects if where == "value" else b"}" + objects + b"Ns"  # a dictionary {objects: None}
    content = members[name].replace(text, made)
    with zipfile.ZipFile(file, "w") as archive:
        for member, value in members.items():
            archive.writestr(member, content if member == name else value)
    return file


def put(number: int) -> bytes:
    return b"r" + (1000 + number).to_bytes(4, "little")


def get(number: int) -> bytes:
    return b"j" + (1000 + number).to_bytes(4, "little")


# Operations of pickle: ")" and "]" make an empty tuple and list, \x85 and \x86 a tuple of the last one and two, "(...e"
# extends a list, \x8b is a long integer, "0" drops what was made.
ENDLESS = {
    "tuples": (b")" + b"".join(put(n) + get(n) + b"\x86" for n in range(60)), "unfolds to more than"),
    "lists": (
        b"]" + put(0) + b"".join(b"]" + put(n + 1) + b"(" + 2 * get(n) + b"e" for n in range(60)),
        "unfolds to more than",
    ),
    "deep": (b")" + b"\x85" * 100_000, "nested more than 100"),
    "a little too deep": (b")" + b"\x85" * 101, "nested more than 100"),
    "many": (b")0" * 30_000 + b")", "operations"),
    "long number": (b"\x8b" + (10**6).to_bytes(4, "little") + b"\x01" * 10**6, "thousands of digits"),
    "no stack": (b"0000000000", "stack"),
}


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_objects_without_end_are_refused_before_they_are_made(tmp_path, monkeypatch, kind, where):
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle_limits, "MOST_OPERATIONS", 50_000 if kind == "many" else 2_000_000)
    operations, words = ENDLESS[kind]
    with pytest.raises(TorchFileError, match=words) as error:
        read_checkpoint(pickled(tmp_path, operations, where))
    message = str(error.value)
    assert "data.pkl" in message and "\n" not in message and len(message) < 600


def test_what_checkpoints_hold_is_within_the_limits(tmp_path, states, official):
    nested = {"a": [{"b": [(1, 2.0, None, True, "c", {4: {5, 6}})]}]}
    content = lightning(official, *states, averaged_steps=2, callbacks=nested, many=[list(range(50_000))] * 3)
    assert read_checkpoint(saved(tmp_path, content)).step == 123


def test_tensors_that_share_memory_take_no_more_than_their_file(tmp_path):
    half = torch.zeros(10**6, dtype=torch.float16)  # each would be converted, 4 MB
    content = {f"model.{number}": half.view(1000, 1000) for number in range(100)}
    with pytest.raises(TorchFileError, match=r"more than 8 times the size of the file"):
        read_checkpoint(saved(tmp_path, content))
