"""Frames: three orthonormal axes for every atom and head, from its neighbours (paper, section on dynamic frames).

Frames carry no gradient.
"""

import jax
import jax.numpy as jnp

from crystalframer_jax.batch import Rows
from crystalframer_jax.model.basis import EXACT
from crystalframer_jax.model.blocks import attention_logits, map_blocks

PARALLEL = 0.9999  # |cos| from which a neighbour cannot give the second axis
SMALLEST = 1e-5  # of 1 - |cos| inside the logarithm


def max_frames(
    q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows, tie_tolerance: float, seeds: jax.Array | None = None
) -> jax.Array:
    """Max frames of one attention block: [N, H, 3, 3] with rows e1, e2, e3, right-handed; zeros for padding.

    e1 points to the neighbour with the largest attention logit; e2 to the one with the largest
    logit + log(1 - |e1 . u|), made orthogonal to e1; e3 = e1 x e2. Arguments as in `lattice_sums`.

    Neighbours within `tie_tolerance` of the best score are ties, as symmetry makes them: the first in canonical order
    is taken, or, given `seeds` [N, H] uint32, one at random (uniformly). The canonical order does not change when the
    crystal is rotated, but among neighbours at the same distance it follows the order of the atoms and the cell.
    """
    q, k, a = jax.lax.stop_gradient((q, k, a))

    def block(rows: Rows, q: jax.Array, a: jax.Array, seeds: jax.Array | None) -> jax.Array:
        return _max_frames_of_block(q, k, a, rows, tie_tolerance, seeds)

    return map_blocks(block, rows, q, a, seeds)


def row_seeds(key: jax.Array, crystal_of_atom: jax.Array, atom_in_crystal: jax.Array, heads: int) -> jax.Array:
    """A random uint32 for every atom and head, [N, H], from the key and the places of crystal and atom in the batch.

    How the batch is padded does not matter.
    """

    def of_atom(crystal: jax.Array, atom: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, crystal), atom), (heads,))

    return jax.vmap(of_atom)(crystal_of_atom, atom_in_crystal)


def _max_frames_of_block(
    q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows, tie_tolerance: float, seeds: jax.Array | None
) -> jax.Array:
    vector = rows.vector
    distance = jnp.sqrt(jnp.sum(vector**2, axis=-1))  # [n, M]
    unit = vector / jnp.where(distance > 0, distance, 1)[..., None]
    logits = jnp.where((distance > 0)[:, None, :], attention_logits(q, k, a, rows), -jnp.inf)

    e1 = _directions(unit, _pick(logits, tie_tolerance, seeds))  # [n, H, 3]
    parallel = jnp.abs(jnp.einsum("nhd,nmd->nhm", e1, unit, precision=EXACT))
    scores = logits + jnp.log(jnp.maximum(1 - parallel, SMALLEST))
    scores = jnp.where(parallel < PARALLEL, scores, -jnp.inf)
    u2 = _directions(unit, _pick(scores, tie_tolerance, None if seeds is None else _mix(seeds)))
    e2 = u2 - jnp.sum(u2 * e1, axis=-1, keepdims=True) * e1
    norm = jnp.linalg.norm(e2, axis=-1, keepdims=True)
    e2 = e2 / jnp.where(norm > 0, norm, 1)
    return jnp.stack([e1, e2, jnp.cross(e1, e2)], axis=-2)


def _pick(scores: jax.Array, tie_tolerance: float, seeds: jax.Array | None) -> jax.Array:
    """Column of the best score of every row [n, H, M] -> [n, H]; among ties the first, or a random one."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    tied = (scores >= best - tie_tolerance) & (scores > -jnp.inf)
    if seeds is None:
        return jnp.argmax(tied, axis=-1)
    columns = jnp.arange(scores.shape[-1], dtype=jnp.uint32)
    priority = _mix(seeds[..., None] + columns * jnp.uint32(0x9E3779B9))
    return jnp.argmax(jnp.where(tied, priority | 1, 0), axis=-1)


def _mix(bits: jax.Array) -> jax.Array:
    """Scramble uint32 values (the finaliser of MurmurHash3): random-looking and much cheaper than a PRNG call."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _directions(unit: jax.Array, column: jax.Array) -> jax.Array:
    """unit [n, M, 3] at column [n, H]: [n, H, 3]."""
    return jnp.take_along_axis(unit, column[..., None], axis=1)
