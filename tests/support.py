"""What several test files need: crystals, small models, and batches in float32 or float64."""

import dataclasses
import functools
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

import crystalframer_jax
from crystalframer_jax.batching.batch import Batch, Rows, pack, unpacked
from crystalframer_jax.batching.shapes import BatchShape, shape_for, shared_out
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.config import NO_PARTS, BatchParts, ModelConfig, validate
from crystalframer_jax.configs import default
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import TO_RUN_OFTEN
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, neighbor_rows

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GOLDEN = ROOT / "tests" / "golden"
BUNDLED = Path(crystalframer_jax.__file__).parent / "data" / "bundled" / "mp_flla_2015.jsonl.gz"

# Programs

AS_USERS_DO = {  # options of jax.jit that undo the haste of conftest.py
    **TO_RUN_OFTEN,
    "xla_llvm_disable_expensive_passes": False,
    "xla_backend_extra_options": "",
}


# Configurations


def small_config(**changes) -> ModelConfig:
    """Two blocks of two heads, small enough to compile in seconds; otherwise the default model."""
    config = default.get_config()
    config.update(num_layers=2, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    config.update(changes)
    return validate(config).model


def config_from_official(official: dict) -> ModelConfig:
    """The model of a dictionary of official hyperparameters; those that the library does not know are left out."""
    config: ConfigDict = default.get_config()
    known = {key: value for key, value in official.items() if key in config and value is not None}
    known.pop("target_set", None)
    if not isinstance(known["targets"], str):
        known["targets"] = ",".join(known["targets"])
    config.update({key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})
    return validate(config).model


# Crystals


@functools.cache
def _bundled_records() -> dict[str, dict]:
    with gzip.open(BUNDLED, "rt") as lines:
        return {record["id"]: record for record in map(json.loads, lines)}


def real_crystals(ids: Sequence[str]) -> list[Crystal]:
    """Crystals of the bundled Materials Project set by id."""
    from pymatgen.core import Element

    crystals = []
    for id in ids:
        record = _bundled_records()[id]
        species = [Element(symbol).Z for symbol in record["species"]]
        lattice = np.array(record["lattice"])
        crystals.append(Crystal(species, np.array(record["frac_coords"]) @ lattice, lattice, id=id))
    return crystals


def random_crystal(rng: np.random.Generator, num_atoms: int, volume_per_atom: float = 20.0) -> Crystal:
    """A crystal without symmetry: a skewed cell and atoms at random places at least 1.5 Å apart."""
    while True:
        lattice = np.eye(3) + 0.25 * rng.normal(size=(3, 3))
        if np.linalg.cond(lattice) < 3:
            break
    lattice *= np.cbrt(num_atoms * volume_per_atom / abs(np.linalg.det(lattice)))
    fractional = np.zeros((0, 3))
    images = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3)
    while len(fractional) < num_atoms:
        new = rng.random(3)
        vectors = ((fractional - new)[:, None] + images) @ lattice
        if np.linalg.norm(vectors, axis=-1).min(initial=np.inf) > 1.5:
            fractional = np.vstack([fractional, new])
    return Crystal(rng.integers(1, 99, num_atoms), fractional @ lattice, lattice, id=f"random{num_atoms}")


def primitive(name: str) -> Crystal:
    """A textbook crystal in its primitive cell; SYMMETRIC lists the names."""
    species, fractional, lattice = SYMMETRIC[name]
    return Crystal(species, np.array(fractional) @ lattice, lattice, id=name)


_FACE_CENTRED = 0.5 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
_HEXAGONAL = np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 1]])
SYMMETRIC = {
    "rock salt": ([11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]], 5.64 * _FACE_CENTRED),
    "diamond": ([14, 14], [[0, 0, 0], [0.25, 0.25, 0.25]], 5.43 * _FACE_CENTRED),
    "perovskite": (
        [38, 22, 8, 8, 8],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
        3.905 * np.eye(3),
    ),
    "fcc": ([13], [[0, 0, 0]], 4.05 * _FACE_CENTRED),
    "hcp": ([12, 12], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]], np.diag([3.21, 3.21, 5.21]) @ _HEXAGONAL),
}


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A proper rotation [3, 3], uniformly distributed."""
    matrix, upper = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix = matrix * np.sign(np.diag(upper))
    return matrix * np.sign(np.linalg.det(matrix))


def rotated(crystal: Crystal, rotation: np.ndarray) -> Crystal:
    """The crystal turned as a whole by `rotation` [3, 3]."""
    return dataclasses.replace(crystal, positions=crystal.positions @ rotation.T, lattice=crystal.lattice @ rotation.T)


# Batches


def batch_of(
    crystals: Sequence[Crystal],
    cutoff: float | LatticeBox,
    dtype: type = np.float32,
    shapes: BatchShape | list[BatchShape] | None = None,
    targets: np.ndarray | None = None,
    num_targets: int = 1,
    parts: BatchParts = NO_PARTS,
) -> Batch:
    """Crystals packed in the given order and unpacked (numpy); without `shapes` into one that holds them."""
    rows = [neighbor_rows(crystal, cutoff) for crystal in crystals]
    table, indices = make_table(crystals, rows), np.arange(len(crystals))
    parts = dataclasses.replace(parts, dtype=np.dtype(dtype).name)
    if shapes is None:
        shapes = shape_for(table, indices, parts)
    shapes = [shapes] if isinstance(shapes, BatchShape) else shapes
    largest = shape_for(table, indices, parts).cell_length
    shapes = [dataclasses.replace(shape, cell_length=max(largest, shape.cell_length), parts=parts) for shape in shapes]
    targets = np.full((len(crystals), num_targets), np.nan) if targets is None else targets
    packed = pack(table, indices, shared_out(table, indices, shapes).shape, targets)
    with jax.enable_x64(dtype == np.float64):
        return jax.tree.map(np.array, _unpacked(packed))


_unpacked = jax.jit(unpacked)


def rows_with(rows: Rows, vector: np.ndarray, **changes) -> Rows:
    """The rows with other vectors to the neighbors [N, M, 3]."""
    return dataclasses.replace(rows, vector=vector, square=(vector**2).sum(axis=-1), **changes)


def rows_from(index: np.ndarray, vector: np.ndarray, reverse: np.ndarray, count: np.ndarray) -> Rows:
    """Rows made by hand."""
    return Rows(index, vector, (vector**2).sum(axis=-1), reverse, count)


def atom_places(batch: Batch) -> np.ndarray:
    """Where the atoms of the crystals stand in the batch, one crystal after the other, [number of real atoms]."""
    order = np.lexsort((batch.atom_in_crystal, batch.crystal_of_atom))
    return order[np.asarray(batch.species)[order] > 0]


# Parameters


def random_variables(config: ModelConfig, seed: int = 0, dtype: type = np.float32) -> dict:
    """Random variables of a model whose layers all matter: features, encodings and outputs of the order of one.

    With the weights that training starts from, predictions hardly differ between crystals and between frames.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "shift", "mean", "var"):  # of calibration and normalisations
            return np.full(leaf.shape, name in ("scale", "var"), dtype)
        std = {"embedding": 1.0, "bias": 0.1, "w_pos": config.k_dim**-0.5, "w_dist": 0.5, "w_angle": 0.5}
        return (std.get(name, leaf.shape[0] ** -0.5) * rng.normal(size=leaf.shape)).astype(dtype)

    batch = batch_of([primitive("fcc")], 3.0, parts=config.parts)
    shapes = jax.eval_shape(CrystalFramer(config).init, jax.random.key(0), batch)
    return jax.tree_util.tree_map_with_path(draw, shapes)
