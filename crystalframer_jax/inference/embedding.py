"""Vectors of crystals and of their atoms: what a model has made of them before its output layers."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from crystalframer_jax.batching.batch import Batch, pack
from crystalframer_jax.batching.shapes import BatchShape, shared_out
from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import Tree

QUERIES = 64  # that are compared with all others at a time


class Vectors(NamedTuple):
    """Vectors of C crystals with A atoms in all, in the order of the crystals and their sites."""

    crystals: np.ndarray  # [C, D] pooled over the atoms
    atoms: np.ndarray  # [A, D]


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig) -> Any:
    model = CrystalFramer(config)

    def vectors(variables: Tree, batch: Batch) -> Any:
        return model.apply(variables, batch, only_vectors=True)

    return jax.jit(vectors)


def vectors_of(
    config: ModelConfig, variables: Tree, table: CrystalTable, groups: Iterable[np.ndarray], shapes: list[BatchShape]
) -> Vectors:
    """Computes the vectors of all rows of a table, in `groups` that are in order, on one device."""
    crystals: list[np.ndarray] = []
    atoms: list[np.ndarray] = []
    for group in groups:
        shape = shared_out(table, group, shapes).shape
        batch = pack(table, group, shape, np.full((len(group), config.num_targets), np.nan))
        of_atoms, pooled = jax.device_get(_compiled(config)(variables, batch))
        crystals.append(pooled[: len(group)])
        places = np.flatnonzero(np.asarray(batch.species) > 0)
        order = np.lexsort((batch.atom_in_crystal[places], batch.crystal_of_atom[places]))
        atoms.append(of_atoms[places[order]])
    return Vectors(np.concatenate(crystals), np.concatenate(atoms))


def nearest(vectors: np.ndarray, others: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds for each of vectors [B, D] the nearest of others [C, D]: rows and distances, both [B, number].

    Distances are Euclidean, of features in units of their standard deviation among the others; the unit is such that
    two of the others at random are 1 apart, root mean square.
    """
    spread = others.std(axis=0)
    is_used = spread > 0
    scale = spread[is_used] * np.sqrt(2 * max(1, is_used.sum()))
    x, y = (array[:, is_used].astype(np.float64) / scale for array in (vectors, others))
    rows, distances = [], []
    for start in range(0, len(x), QUERIES):
        apart = np.linalg.norm(x[start : start + QUERIES, None] - y, axis=-1)
        order = np.argsort(apart, axis=1, kind="stable")[:, :number]
        rows.append(order)
        distances.append(np.take_along_axis(apart, order, axis=1))
    empty = np.zeros((0, min(number, len(others))))
    return np.concatenate([empty.astype(int), *rows]), np.concatenate([empty, *distances])
