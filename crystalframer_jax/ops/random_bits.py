"""Random numbers that are the same however a batch is padded or cut into blocks."""

import jax
import jax.numpy as jnp


def row_seeds(keys: jax.Array, crystal_of_atom: jax.Array, atom_in_crystal: jax.Array, heads: int) -> jax.Array:
    """A random uint32 for every atom and head, [N, H], from the key of its crystal and its number in the crystal.

    keys: [B] random keys. How the batch is padded does not matter.
    """
    of_crystal = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    of_atom = draw(of_crystal[crystal_of_atom], atom_in_crystal)
    return draw(of_atom[:, None], jnp.arange(1, heads + 1))


def keys_by_place(key: jax.Array, places: jax.Array) -> jax.Array:
    """Another key for every one of the `places` [B] in a batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, places)


def fold_in_all(keys: jax.Array, number: int) -> jax.Array:
    """Every one of the keys [B] folded with a number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def draw(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    """A random uint32 for every seed and number (uint32, or converted), which are broadcast."""
    return mix(seeds + numbers.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))


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
