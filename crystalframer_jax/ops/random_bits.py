"""Random numbers that are the same however a batch is padded or cut into blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seed_of(*numbers: int) -> np.uint32:
    """A random uint32 that some numbers >= 0 stand for."""
    return np.random.SeedSequence(numbers).generate_state(1)[0]


def draw(seeds: Any, numbers: Any) -> jax.Array:
    """A random uint32 for every seed (uint32) and number (an integer), which are broadcast."""
    return mix(seeds + jnp.asarray(numbers).astype(jnp.uint32) * jnp.uint32(0x9E3779B9))


def row_seeds(seeds: jax.Array, crystal_of_atom: jax.Array, atom_in_crystal: jax.Array, heads: int) -> jax.Array:
    """A random uint32 for every atom and head, [N, H], from the seed of its crystal and its number in the crystal.

    seeds: [B] uint32. How the batch is padded does not matter.
    """
    of_atom = draw(seeds[crystal_of_atom], atom_in_crystal)
    return draw(of_atom[:, None], jnp.arange(1, heads + 1))


def thinned(x: jax.Array, seeds: jax.Array, dropout: float) -> jax.Array:
    """Features [N, D], each 0 with probability `dropout` and else divided by 1 - dropout, from seeds [N, 1] uint32."""
    return x * kept(draw(seeds, jnp.arange(x.shape[1])), dropout, x.dtype)


def kept(bits: jax.Array, dropout: float, dtype: jnp.dtype) -> jax.Array:
    """0 for a share `dropout` of random uint32 `bits`, else 1 / (1 - dropout)."""
    return (bits >= jnp.uint32(min(round(dropout * 2**32), 2**32 - 1))).astype(dtype) / (1 - dropout)


def mix(bits: jax.Array) -> jax.Array:
    """Scramble uint32 values (the finaliser of MurmurHash3): random-looking and much cheaper than a PRNG call."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
