"""What the heads of a block see from the atoms of a crystal: neighbors, attention weights and frames."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from crystalframer_jax.batching.batch import Batch, Layout, pack, unpacked
from crystalframer_jax.batching.shapes import request_shapes
from crystalframer_jax.batching.table import table_of
from crystalframer_jax.config import ConfigError, ModelConfig
from crystalframer_jax.inference.forward import working_precision
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import Tree
from crystalframer_jax.structures.files import only_crystal


class View(NamedTuple):
    """What the H heads of a block see from an atom, of its M neighbors, itself among them."""

    species: np.ndarray  # [M + 1] int atomic number of the neighbors and, last, of the atom
    vectors: np.ndarray  # [M, 3] from the atom to its neighbors, Å
    weights: np.ndarray  # [H, M] of the attention; the sum of each head is 1
    frames: np.ndarray | None  # [H, 3, 3] with rows e1, e2, e3; None for models without


def views(predictor: Predictor, structure: Any, block: int) -> list[View]:
    """Looks at every atom of a structure, in its order, as a block of a model does (paper, equations of the attention).

    Args:
      predictor: the model.
      structure: pymatgen Structure, ASE Atoms, Crystal or path of a structure file with one structure.
      block: which of the model's blocks, from 0.

    Raises ConfigError for a block that the model has not, or whose heads attend in reciprocal space, where weights
    belong to pairs of atoms of the cell; CrystalError for a structure that cannot be used.
    """
    config = predictor.model
    if not 0 <= block < config.num_layers:
        raise ConfigError(f"block {block} does not exist; this model has blocks 0 to {config.num_layers - 1}")
    if config.domain_of_block(block) != "real":
        raise ConfigError(
            f"block {block} attends in reciprocal space (domain={config.domain!r}), so no weight is that of a neighbor"
        )
    table, first = table_of([only_crystal(structure)], predictor.cutoff), np.array([0])
    (shape,) = request_shapes(table, [first], predictor.parts)
    batch, places = pack(table, first, shape), Layout(table, first, shape).place
    with working_precision(config):
        seen, rows = jax.tree.map(np.asarray, _seen(config, block, predictor.weights_at_work, batch))
    return [_view(seen, rows, np.asarray(batch.species), place) for place in places.tolist()]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seen(config: ModelConfig, block: int, variables: Tree, batch: Batch) -> tuple[dict[str, Any], Any]:
    """Returns queries, keys, exponents and frames of a block for a batch, and its neighbor rows."""
    _, state = CrystalFramer(config, "xla").apply(
        variables, batch, mutable=["intermediates"], capture_intermediates=lambda module, _: module.name in ("q", "k")
    )
    found = state["intermediates"][f"block_{block}"]["attention"]
    shape = (len(batch.species), config.head_num, config.k_dim)
    seen = {name: found[name]["__call__"][0].reshape(shape) for name in ("q", "k")}
    return seen | {name: found[name][0] for name in ("a", "frames")}, unpacked(batch).rows


def _view(seen: dict[str, Any], rows: Any, species: np.ndarray, place: int) -> View:
    """Makes the view of the atom that stands at a place of a batch."""
    neighbors = slice(rows.count[place])
    index, vectors = rows.index[place, neighbors], rows.vector[place, neighbors].astype(float)
    q, keys = seen["q"][place].astype(float), seen["k"][index].astype(float)
    logits = np.einsum("hk,mhk->hm", q, keys) / np.sqrt(q.shape[-1])
    logits += seen["a"][place][:, None] * np.sum(vectors**2, axis=1)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    frames = None if seen["frames"] is None else seen["frames"][place].astype(float)
    return View(species[[*index, place]], vectors, weights / weights.sum(axis=1, keepdims=True), frames)
