"""compute_frames: the frames of one structure, without a model."""

from typing import Any

import jax
import numpy as np

from crystalframer_jax.batching.batch import Layout, pack, unpacked
from crystalframer_jax.batching.shapes import request_shapes
from crystalframer_jax.batching.table import table_of
from crystalframer_jax.config import BatchParts, ConfigError
from crystalframer_jax.config.hyperparameters import LARGEST_CUTOFF
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.ops.frames import METHODS, Attention
from crystalframer_jax.ops.random_bits import draw, row_seeds, seed_of
from crystalframer_jax.structures.files import only_crystal

_compiled = jax.jit(block_frames, static_argnums=(0, 5))
_unpacked = jax.jit(unpacked)


def compute_frames(
    structure: Any,
    method: str = "max",
    *,
    q: np.ndarray | None = None,
    k: np.ndarray | None = None,
    a: np.ndarray | None = None,
    cutoff_radius: float = 6.93,
    tie_tolerance: float = 1e-4,
    seed: int | None = None,
) -> np.ndarray:
    """Computes the frames of every atom, [N, H, 3, 3] float64 with rows e1, e2, e3; atoms in the order of the file.

    Paper, section on frames; docs/model.md says where this differs from the official code.

    Args:
      structure: pymatgen Structure, ASE Atoms, Crystal or path of a structure file with one structure.
      method: "max", "max_static", "weighted_pca", "pca" or "lattice".
      q, k: queries and keys [N, H, d_k], which the dynamic methods (max, weighted_pca) weigh neighbors by. Without
        them the weights depend on the distance only, and H = 1.
      a: exponents [N, H] of the attention Gaussians, negative, 1/Å^2; without them -1 / (2 * 1.4^2), the mean width of
        an untrained model.
      cutoff_radius: of the neighbors, Å.
      tie_tolerance: neighbors whose score is this close to the best are equally good: the crystal chooses, see
        docs/model.md (without q and k by weights that depend on distance and species), or a `seed` draws.

    Raises ConfigError for an unknown method or a cutoff that is not positive, CrystalError for a structure that cannot
    be used, ValueError for arrays of the wrong shape.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} does not exist; allowed: {', '.join(METHODS)}")
    if not 0 < cutoff_radius <= LARGEST_CUTOFF:
        raise ConfigError(f"cutoff_radius={cutoff_radius!r} must be a positive number of Å, at most {LARGEST_CUTOFF:g}")
    if not tie_tolerance >= 0:
        raise ConfigError(f"tie_tolerance={tie_tolerance!r} must not be negative")
    crystal = only_crystal(structure)
    tells_species = q is None and k is None
    q, k, a = _weights(crystal.num_atoms, q, k, a)
    seen_k = np.broadcast_to(crystal.species[:, None, None] / 98, k.shape)
    with jax.enable_x64(True):
        table = table_of([crystal], cutoff_radius)
        parts = BatchParts(
            lattice_frames=method == "lattice", scatter=method == "pca", dtype="float64", tie_tolerance=tie_tolerance
        )
        first = np.array([0])
        (shape,) = request_shapes(table, [first], parts)
        batch, layout = pack(table, first, shape), Layout(table, first, shape)
        scores: Any = [layout.per_atom(x, np.float64) for x in (q, k, a)]
        seen_q, seen_k = (np.ones_like(scores[0]), layout.per_atom(seen_k, np.float64)) if tells_species else scores[:2]
        seeing = Attention(seen_q, seen_k, scores[2])
        seeds = None
        if seed is not None:
            of_crystals = draw(seed_of(seed), batch.crystal_place)
            seeds = row_seeds(of_crystals, batch.crystal_of_atom, batch.atom_in_crystal, q.shape[1])
        frames = _compiled(method, *scores, _unpacked(batch), tie_tolerance, seeds, attention=seeing)
        return np.asarray(frames)[layout.place]


def _weights(num_atoms: int, q: Any, k: Any, a: Any) -> tuple[Any, Any, Any]:
    """Returns q, k and a with what is missing filled in; ValueError if their shapes do not go together."""
    if (q is None) != (k is None):
        raise ValueError("give q and k together")
    if a is not None and np.ndim(a) != 2:
        raise ValueError(f"a has {np.ndim(a)} dimensions; it must be [{num_atoms}, H]")
    heads = np.shape(a)[1] if a is not None else 1
    q = np.zeros((num_atoms, heads, 1)) if q is None else np.asarray(q, np.float64)
    k = np.zeros_like(q) if k is None else np.asarray(k, np.float64)
    a = np.full(q.shape[:2], -0.5 / 1.4**2) if a is None else np.asarray(a, np.float64)
    if q.ndim != 3 or q.shape != k.shape or a.shape != q.shape[:2] or len(q) != num_atoms:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must be [{num_atoms}, H, d_k] and a {a.shape} [{num_atoms}, H]: "
            f"the structure has {num_atoms} atoms"
        )
    if not (a < 0).all():
        raise ValueError("a must be negative: attention falls off with distance")
    if not (np.isfinite(q).all() and np.isfinite(k).all() and np.isfinite(a).all()):
        raise ValueError("q, k and a must be finite")
    return q, k, a
