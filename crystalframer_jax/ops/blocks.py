"""Functions of neighbor rows, evaluated for blocks of atoms, and of these for some columns after the others."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import CellRows, Rows
from crystalframer_jax.batching.shapes import ATOM_BLOCK, width_of
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.ops.reciprocal import WaveVectors

WORD = 32  # bits of a word, and neighbors in a word of them


def map_blocks(function: Callable[..., Any], rows: Rows, *per_atom: Any, like: Any, stored: Any = None) -> Any:
    """`function(rows, *per_atom)` evaluated for one block of atoms after the other, results joined along atoms.

    `per_atom` are pytrees of arrays [N, ...], and `function` returns one of arrays [n, ...]. `like` has the shapes and
    types of what comes out, [N, ...]: finding them by tracing takes as long as tracing for good. Blocks without any
    neighbor are left out and give zeros. Given `stored`, arrays [N, ...] that blocks write into, the call is
    `function(rows, *per_atom, first_atom, stored)`, and it returns `stored` after the result, as this does.
    """
    num_atoms = rows.index.shape[0]
    block = min(num_atoms, ATOM_BLOCK if jax.default_backend() == "cpu" else 128 * ATOM_BLOCK)
    extra = -num_atoms % block

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1)) if extra else x

    data = jax.tree.map(padded, (rows, *per_atom))
    longest = jnp.max(data[0].count.reshape(-1, block), axis=1)
    last = jnp.max(jnp.where(longest > 0, jnp.arange(1, len(longest) + 1, dtype=jnp.int32), 0))

    def one_block(number: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        results, stored = carry
        own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * block, block), data)
        found, stored = (function(*own), None) if stored is None else function(*own, number * block, stored)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=number * block, axis=0)
        return jax.tree.map(put, results, found), stored

    results = jax.tree.map(lambda x: jnp.zeros((num_atoms + extra, *x.shape[1:]), x.dtype), like)
    start = results, jax.tree.map(padded, stored)
    results, stored = jax.lax.fori_loop(jnp.int32(0), last, one_block, start)
    results, stored = jax.tree.map(lambda x: x[:num_atoms], (results, stored))
    return results if stored is None else (results, stored)


def over_columns(step: Callable[[Rows, jax.Array, Any], Any], rows: Rows, start: Any, width: int | None = None) -> Any:
    """carry = step(some columns of the rows, number of the first, carry) until the longest row ends, nearest first.

    `width` is how many columns at once, see `width_of`; `count` of the columns is what remains of the rows.
    """
    width = width or width_of(rows.index.shape[1])

    def turn(number: jax.Array, carry: Any) -> Any:
        first = number * width
        columns = _with_columns(rows, lambda x: jax.lax.dynamic_slice_in_dim(x, first, width, axis=1))
        return step(dataclasses.replace(columns, count=rows.count - first), first, carry)

    return jax.lax.fori_loop(jnp.int32(0), -(-jnp.max(rows.count) // width), turn, start)


def in_words(rows: Rows) -> Rows:
    """The rows with as many columns as whole words have bits."""
    extra = -rows.index.shape[1] % WORD
    return _with_columns(rows, lambda x: jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)))) if extra else rows


def first_columns(rows: Rows, number: int) -> Rows:
    """The rows with their first columns only."""
    return _with_columns(rows, lambda x: x[:, :number])


def _with_columns(rows: Rows, change: Callable[[jax.Array], jax.Array]) -> Rows:
    """The rows with their columns changed by a function of arrays [n, M, ...]."""
    columns = rows.index, rows.vector, rows.square, rows.reverse
    index, vector, square, reverse = jax.tree.map(change, columns)
    return dataclasses.replace(rows, index=index, vector=vector, square=square, reverse=reverse)


def directions(rows: Rows) -> jax.Array:
    """Unit vectors [n, M, 3] of the neighbors; zeros for the atom itself and padding."""
    distance = jnp.sqrt(rows.square)[..., None]
    return rows.vector / jnp.where(distance > 0, distance, 1)


class WeightedSums(NamedTuple):
    """sum_m exp(logit_m - largest) x_m of a block; `total` with x = 1. Rows without neighbors: zeros."""

    largest: jax.Array  # [n, H] logit, -inf of rows without any
    total: jax.Array  # [n, H]
    sums: Any  # arrays [n, H, ...]


def weighted_sums(
    rows: Rows, logits: Callable[[Rows], jax.Array], sums: Callable[[Rows, jax.Array], Any], zeros: Any
) -> WeightedSums:
    """Adds `sums(columns, weights [n, H, m])` to zeros [n, H, ...], with weights exp(logits(columns)) of any size."""

    def add(columns: Rows, _: Any, so_far: WeightedSums) -> WeightedSums:
        new = logits(columns)
        largest = jnp.maximum(so_far.largest, jnp.max(new, axis=-1))
        factor, weights = exp_relative(so_far.largest, largest), exp_relative(new, largest[..., None])
        total = factor * so_far.total + jnp.sum(weights, axis=-1)
        more = sums(columns, weights)
        return WeightedSums(largest, total, jax.tree.map(lambda s, x: times(s, factor) + x, so_far.sums, more))

    first = jax.tree.leaves(zeros)[0]
    total = jnp.zeros(first.shape[:2], first.dtype)
    return over_columns(add, rows, WeightedSums(jnp.full_like(total, -jnp.inf), total, zeros))


def exp_relative(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """exp(logits - reference), which is their log-sum-exp or the largest; 0 in the padding and in empty rows."""
    return jnp.exp(logits - jnp.where(jnp.isfinite(reference), reference, 0))


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [n, H, ...] times factors [n, H]."""
    return x * factor.reshape(*factor.shape, *(1,) * (x.ndim - factor.ndim))


def is_neighbor(rows: Rows) -> jax.Array:
    """Which columns are neighbors and not padding, [N, M]."""
    return jnp.arange(rows.index.shape[1]) < rows.count[:, None]


def attention_logits(
    q: jax.Array, k: jax.Array, a: jax.Array, rows: Rows, waves: WaveVectors | None = None
) -> jax.Array:
    """q . k_j / sqrt(d_k) + spatial_logits for the neighbors of a block of atoms, [n, H, M]; -inf in the padding.

    q [n, H, d_k] and a [n, H] belong to the block, k [N, H, d_k] to the whole batch.
    """
    logits = gathered_dots(q, k, rows) * q.shape[-1] ** -0.5 + spatial_logits(a, rows, waves)
    return jnp.where(is_neighbor(rows)[:, None, :], logits, -jnp.inf)


def spatial_logits(a: jax.Array, rows: Rows, waves: WaveVectors | None = None) -> jax.Array:
    """What the places of the atoms add to the logits, [n, H, M].

    a d^2 in real space (a [n, H] in 1/Å^2); with `waves` and CellRows the logarithm of the sum over the reciprocal
    lattice (a in Å^2).
    """
    if waves is not None:
        return waves.log_sums(a, cast(CellRows, rows))
    return a[:, :, None] * rows.square[:, None, :]


def gathered_dots(x: jax.Array, y: jax.Array, rows: Rows) -> jax.Array:
    """x_i . y_j for every neighbor j: x [n, H, d] of the block, y [N, H, d] of the batch -> [n, H, M]."""
    neighbors = jnp.asarray(y)[rows.index].swapaxes(1, 2)
    return jnp.einsum("nhmd,nhd->nhm", neighbors, x, precision=EXACT)


def gathered_sum(weights: jax.Array, y: jax.Array, rows: Rows) -> jax.Array:
    """sum_m weights_m y_j: weights [n, H, M] of the block, y [N, H, d] of the batch -> [n, H, d]."""
    neighbors = jnp.asarray(y)[rows.index].swapaxes(1, 2)
    return jnp.einsum("nhm,nhmd->nhd", weights, neighbors, precision=EXACT)
