"""Models that come with the package, by name: a file each in crystalframer_jax/models, listed in its index.json.

Another model is put there by `write_model` and an entry in the index: name, file, SHA-256, and what its card says; in
"seen" the file by which crystals are known again that it was trained on.
"""

import dataclasses
import hashlib
import importlib.resources
import io
import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from crystalframer_jax.config import TrainConfig, validate_given
from crystalframer_jax.data.seen import SeenCrystals
from crystalframer_jax.files import parse_json, replacing
from crystalframer_jax.parallel.devices import Tree
from crystalframer_jax.runs.checkpoints import CheckpointError
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_directory import as_json

META = "meta"  # name of the JSON among the arrays


class ShippedModel(NamedTuple):
    """What a file holds, and the card."""

    config: TrainConfig
    variables: Tree  # params, calibration, batch_stats
    meta: dict[str, Any]  # that of the checkpoint it was made of
    card: str
    seen: SeenCrystals | None  # its training crystals; None: not known


def model_names() -> list[str]:
    """Lists the models of the package."""
    return sorted(_index())


def is_model_name(path: str | Path) -> bool:
    """Tells whether a model of the package is meant, and not a directory of that name."""
    return str(path) in _index() and not Path(path).exists()


def read_model(name: str) -> ShippedModel:
    """Reads a model of the package; CheckpointError if its file is missing or is not the one that was shipped."""
    entry = _index()[name]
    content = _content_of(name, entry)
    with np.load(io.BytesIO(content)) as arrays:
        meta = checked(parse_json(bytes(arrays[META]), name), name, "config", "targets")
        variables = unflatten_dict({tuple(key.split("/")): arrays[key] for key in arrays.files if key != META})
    return ShippedModel(
        config=validate_given(meta["config"]),
        variables={kind: variables.get(kind, {}) for kind in ("params", "calibration", "batch_stats")},
        meta=meta,
        card=card_text(name, entry),
        seen=_seen_by(name, entry["seen"]) if "seen" in entry else None,
    )


def _content_of(name: str, entry: Mapping[str, str]) -> bytes:
    """Reads a file of a model with that checksum."""
    file = _folder() / entry["file"]
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        wrong = "damaged" if content else "missing"
        raise CheckpointError(f"{name}: {file}, a file of the package, is {wrong}; install the package again")
    return content


def write_model(file: Path, variables: Tree, config: TrainConfig, meta: Mapping[str, Any]) -> str:
    """Writes a model as `read_model` reads it; `meta` is that of its checkpoint. Returns the SHA-256 of the file."""
    told = {key: value for key, value in meta.items() if key in ("targets", "training_set", "data", "step")}
    config = dataclasses.replace(config, data_dir="", pretrained_model="")  # places on the machine it was made on
    text = json.dumps(told | {"config": as_json(config)}, sort_keys=True)
    arrays: dict[str, Any] = {"/".join(path): np.asarray(array) for path, array in flatten_dict(variables).items()}
    content = io.BytesIO()
    arrays[META] = np.frombuffer(text.encode(), np.uint8)
    np.savez_compressed(content, **arrays)
    with replacing(file) as temporary:
        temporary.write_bytes(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _seen_by(name: str, entry: Mapping[str, str]) -> SeenCrystals:
    """Reads the training crystals of a model."""
    with np.load(io.BytesIO(_content_of(name, entry))) as arrays:
        return SeenCrystals(np.array(arrays["ids"].tobytes().decode().split("\n")), arrays["traces"])


def write_seen(file: Path, seen: SeenCrystals) -> dict[str, str]:
    """Writes the training crystals of a model; returns "seen" of its entry in the index."""
    content, ids = io.BytesIO(), "\n".join(seen.ids.tolist())
    np.savez_compressed(content, ids=np.frombuffer(ids.encode(), np.uint8), traces=seen.traces)
    with replacing(file) as temporary:
        temporary.write_bytes(content.getvalue())
    return {"file": file.name, "sha256": hashlib.sha256(content.getvalue()).hexdigest()}


def card_text(name: str, entry: Mapping[str, Any]) -> str:
    """Makes the card of a model from its entry in the index."""
    width = max(map(len, entry["card"]))
    lines = [f"{key:{width}}  {value}" for key, value in entry["card"].items()]
    return "\n".join([f"{name}, version {entry['version']}", *lines])


def card_line(name: str) -> str:
    """Tells in a line what a model predicts and how well."""
    return _index()[name]["card"]["in short"]


def _folder() -> Traversable:
    return importlib.resources.files("crystalframer_jax").joinpath("models")


def _index() -> dict[str, Any]:
    file = _folder() / "index.json"
    return parse_json(file.read_bytes(), file)
