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
