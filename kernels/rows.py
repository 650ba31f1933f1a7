"""Neighbor rows inside a kernel: one program has one atom and head, and takes its row in chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.kernels.backend import lanes, load, program

CHUNK = 32  # neighbors at once, one for each thread of a warp


class Inputs(NamedTuple):
    """What kernels read, None for what one does not; arrays, or in kernels references to them."""

    q: Any  # [N, H, d_k]
    k: Any  # [N, H, d_k]
    v: Any  # [N, H, d_v]
    a: Any  # [N, H] 1/Å^2
    rows: Rows
    frames: Any  # [N, H, 3, 3]
    seeds: Any  # [N, H] uint32


class Chunk(NamedTuple):
    """Some neighbors of one atom, [C] each."""

    column: jax.Array
    real: jax.Array  # not padding
    neighbor: jax.Array  # atom j, 0 for padding
    vector: tuple[jax.Array, jax.Array, jax.Array]  # Å
    square: jax.Array  # d^2, Å^2


class Place(NamedTuple):
    """What a program is for."""

    atom: jax.Array
    head: jax.Array


def place(heads: int) -> Place:
    """The atom and the head of this program."""
    number = program()
    return Place(jax.lax.div(number, jnp.int32(heads)), jax.lax.rem(number, jnp.int32(heads)))


def over_chunks(rows: Rows, atom: jax.Array, step: Callable[[Chunk, Any], Any], start: Any) -> Any:
    """carry = step(chunk, carry) for the chunks of the row of an atom, nearest neighbors first."""
    count = load(rows.count, (atom,))
    lane = lanes(CHUNK)

    def body(number: jax.Array, carry: Any) -> Any:
        column = number * CHUNK + lane
        real = column < count
        vector = tuple(load(rows.vector, (atom, column, axis), real) for axis in range(3))
        square = load(rows.square, (atom, column), real)
        return step(Chunk(column, real, load(rows.index, (atom, column), real), vector, square), carry)

    return jax.lax.fori_loop(jnp.int32(0), jax.lax.div(count + (CHUNK - 1), jnp.int32(CHUNK)), body, start)


def vector_of(array: Any, at: Place) -> jax.Array:
    """array[atom, head, :] of [N, H, D], padded with zeros to a power of 2."""
    size = array.shape[-1]
    lane = lanes(size)
    return load(array, (at.atom, at.head, lane), lane < size)


def gathered(array: Any, chunk: Chunk, head: jax.Array) -> jax.Array:
    """array[j, head, :] of [N, H, D] for the neighbors j of a chunk, [D, C] padded with zeros."""
    size = array.shape[-1]
    lane = lanes(size)
    mask = (lane < size)[:, None] & chunk.real[None, :]
    return load(array, (chunk.neighbor[None, :], head, lane[:, None]), mask)


def logits_of(q: jax.Array, keys: jax.Array, a: jax.Array, scale: float, chunk: Chunk) -> jax.Array:
    """q . k_j * scale + a d^2 of a chunk [C]; -inf for padding."""
    logits = jnp.sum(keys * q[:, None], axis=0) * scale + a * chunk.square
    return jnp.where(chunk.real, logits, -jnp.inf)
