"""Checkpoint files of the official PyTorch implementation (PyTorch Lightning), read without executing anything."""

import argparse
import dataclasses
import importlib
import pathlib
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.errors import UserError
from crystalframer_jax.files import replacing
from crystalframer_jax.official.pickle_limits import check_pickle

Arrays = dict[str, np.ndarray]

MODEL, AVERAGE, AVERAGED_STEPS = "model.", "swa_model.module.", "swa_model.n_averaged"
SCALING = ("target_mean", "target_std")
MAX_COUNT = 2**53
LARGEST_PICKLE = 16 * 1024**2  # bytes, without the tensors, which are beside it
MOST_TIMES = 8  # so many times the size of its file all arrays may have: tensors may share memory

# Classes that a file may hold beside tensors and plain Python values: they only store what they are given.
HARMLESS = (argparse.Namespace, (pathlib.PurePosixPath, "pathlib.PosixPath"))


class TorchFileError(UserError, ValueError):
    """A file that is no checkpoint of the official implementation, or that cannot be read."""


@dataclasses.dataclass(frozen=True)
class OfficialCheckpoint:
    """A checkpoint of the official implementation."""

    hyper_parameters: dict[str, Any]  # under their official names; empty in a file of parameters alone
    state: Arrays  # under the official names, without the prefix "model."
    swa_state: Arrays | None = None  # the same of the averaged weights; None if nothing was averaged yet
    target_mean: np.ndarray | None = None  # [T] of the training labels
    target_std: np.ndarray | None = None  # [T]
    epoch: int = 0  # where the training was
    step: int = 0


def read_checkpoint(path: str | Path) -> OfficialCheckpoint:
    """Reads a Lightning checkpoint, or a file of a state dict alone (names with or without the prefix "model.").

    Nothing in the file is executed, and no more memory is taken than the file is large. Raises TorchFileError if the
    file is missing, damaged, or holds anything else.
    """
    path = Path(path)
    content = _load(path)
    if not isinstance(content, Mapping):
        raise TorchFileError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state dict")
    if "state_dict" not in content:
        content = {"state_dict": content}
    state = _arrays(path, content["state_dict"])
    mean, std = (state.pop(name, None) for name in SCALING)
    average = {name.removeprefix(AVERAGE): state.pop(name) for name in list(state) if name.startswith(AVERAGE)}
    steps = state.pop(AVERAGED_STEPS, None)
    if steps is None and average:
        raise TorchFileError(f"{path} has averaged weights without {AVERAGED_STEPS}, the number of their steps")
    if steps is not None and (steps.shape != () or steps.dtype.kind not in "iu" or steps < 0):
        raise TorchFileError(f"{path}: {AVERAGED_STEPS} is {steps.dtype} {list(steps.shape)}, not a count")
    model = {name.removeprefix(MODEL): value for name, value in state.items()}
    if len(model) != len(state):
        name = next(name for name in state if MODEL + name in state)
        raise TorchFileError(f"{path} holds both {name:.200} and {MODEL + name:.200}; one of them is the model")
    hyper_parameters = content.get("hyper_parameters", {})
    if isinstance(hyper_parameters, argparse.Namespace):
        hyper_parameters = vars(hyper_parameters)
    if not isinstance(hyper_parameters, Mapping):
        raise TorchFileError(f"{path}: hyper_parameters are a {type(hyper_parameters).__name__}, not a dictionary")
    counts = {key: content.get(key, 0) for key in ("epoch", "global_step")}
    for key, value in counts.items():
        if not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise TorchFileError(f"{path}: {key}={reprlib.repr(value)} is not a count")
    swa_state = average if steps else None
    return OfficialCheckpoint(dict(hyper_parameters), model, swa_state, mean, std, *counts.values())


def write_checkpoint(path: str | Path, checkpoint: OfficialCheckpoint) -> None:
    """Writes a Lightning checkpoint that the official `RegressionModel.load_from_checkpoint` accepts.

    The file holds the model, its average where swa_epochs asks for one, and the statistics of the targets; nothing that
    a training could go on from. It is complete or not there.
    """
    path, torch = Path(path), _torch()
    state: dict[str, Any] = {MODEL + name: value for name, value in checkpoint.state.items()}
    if checkpoint.hyper_parameters["swa_epochs"] > 0:
        # Without an average the official model holds its initial weights there, zero steps in the average.
        average = checkpoint.state if checkpoint.swa_state is None else checkpoint.swa_state
        state[AVERAGED_STEPS] = np.int64(checkpoint.swa_state is not None)
        state |= {AVERAGE + name: value for name, value in average.items()}
    state |= {"target_std": checkpoint.target_std, "target_mean": checkpoint.target_mean}
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items() if value is not None}
    content = {
        "epoch": checkpoint.epoch,
        "global_step": checkpoint.step,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()},
        "hparams_name": None,
        "hyper_parameters": checkpoint.hyper_parameters,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _torch() -> Any:
    """Imports PyTorch, which is optional."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError('checkpoints of PyTorch need PyTorch: pip install ".[torch]"') from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):  # CVE-2025-32434
        raise UserError(
            f"PyTorch {torch.__version__} can be made to execute code by a checkpoint file; version 2.6 or newer is "
            'needed: pip install --upgrade ".[torch]"'
        )
    return torch


def _load(path: Path) -> Any:
    """Reads a file written by torch.save."""
    if not path.is_file():
        raise TorchFileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    with path.open("rb") as stream:
        start = stream.read(4)
    if not start:
        raise TorchFileError(f"{path} is empty")
    if start != b"PK\x03\x04":
        raise TorchFileError(f"{path} is not a PyTorch file: it does not begin like one of torch.save (1.6 or newer)")
    if not zipfile.is_zipfile(path):
        raise TorchFileError(f"{path} is damaged: its end is missing; copy it again")
    torch = _torch()
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(HARMLESS):
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not classes:
                return torch.load(path, map_location="cpu", weights_only=True)
    except TorchFileError:
        raise
    except Exception as error:  # PyTorch raises many kinds for a damaged file
        reason = str(error).split("\n")[0][:200]
        raise TorchFileError(f"{path} is damaged or not a PyTorch file ({reason})") from error
    raise TorchFileError(
        f"{path} asks for {', '.join(sorted(classes)):.200}, which could execute code; nothing of the file was "
        "executed. A checkpoint of the official implementation holds tensors and plain values only"
    )


def _check_archive(path: Path) -> None:
    """Raises TorchFileError if reading the archive would take more memory than its size on disk, or if it is torn."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise TorchFileError(f"{path} is a compressed archive; torch.save does not compress")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise TorchFileError(f"{path} is damaged: the files inside claim to be larger than the archive")
        torn = archive.testzip()  # PyTorch does not look at the checksums
        if torn is None:
            for member in members:
                if member.filename.lower().endswith(".pkl"):  # PyTorch does not tell cases apart
                    _check_objects(path, archive, member)
    if torn:
        raise TorchFileError(f"{path} is damaged: the checksum of {torn:.200} inside is wrong; copy it again")


def _check_objects(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises TorchFileError if the objects in a pickle are no such as a checkpoint has, before they are made."""
    try:
        if member.file_size > LARGEST_PICKLE:
            raise ValueError(f"it has more than {LARGEST_PICKLE:,} bytes")
        check_pickle(archive.read(member))
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        reason = f"{member.filename:.200}: {str(error)[:200]}"
        raise TorchFileError(f"{path} is damaged or not a PyTorch file ({reason})") from error


def _arrays(path: Path, state: Any) -> Arrays:
    """Makes arrays of tensors by name: 16 and 8 bit floats become float32, everything else stays as it is."""
    torch = _torch()
    if not isinstance(state, Mapping):
        raise TorchFileError(f"{path}: state_dict is a {type(state).__name__}, not a dictionary")
    arrays, room = {}, MOST_TIMES * path.stat().st_size
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind, shown = type(value).__name__, name if isinstance(name, str) else reprlib.repr(name)
            raise TorchFileError(f"{path} holds {shown:.200}, a {kind}; a state dict has tensors by name")
        try:
            room -= value.numel() * value.element_size()
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise TypeError("more values than are stored")
            if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
                value = value.float()
            if room < 0:
                raise TypeError(f"with those before it, more than {MOST_TIMES} times the size of the file")
            arrays[name] = value.detach().numpy()
        except (RuntimeError, TypeError) as error:  # sparse, quantized and other special tensors
            reason = f"{value.dtype}, {value.layout}: {str(error).split('.')[0][:100]}"
            raise TorchFileError(f"{path}: {name:.200} is not an ordinary tensor ({reason})") from error
    return arrays
