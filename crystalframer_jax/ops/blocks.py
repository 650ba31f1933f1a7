"""Evaluation of functions of neighbor rows in blocks of atoms, each block with no more columns than it needs."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import ATOM_BLOCK, CellRows, Rows, row_levels
from crystalframer_jax.ops.basis import EXACT
from crystalframer_jax.ops.reciprocal import WaveVectors


def map_blocks(function: Callable[..., Any], rows: Rows, *per_atom: Any) -> Any:
    """`function(rows, *per_atom)` evaluated for one block of atoms after the other, results joined along atoms.

    `rows` [N, M] are cut to the shortest of `row_levels(M)` that holds the rows of the block; blocks without any
    neighbor give zeros. `per_atom` are pytrees of arrays [N, ...], and `function` returns one of arrays [n, ...]
    whose shapes must not depend on the number of columns.
    """
    num_atoms, width = rows.index.shape
    block = ATOM_BLOCK if jax.default_backend() == "cpu" else min(num_atoms, 32 * ATOM_BLOCK)
    num_blocks = -(-num_atoms // block)
    extra = num_blocks * block - num_atoms
    levels = row_levels(width)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1)) if extra else x
        return x.reshape(num_blocks, block, *x.shape[1:])

    def cut_to(level: int) -> Callable[..., Any]:
        def of_columns(rows: Rows, *args: Any) -> Any:
            columns = {name: getattr(rows, name)[:, :level] for name in ("index", "vector", "reverse")}
            return function(dataclasses.replace(rows, **columns), *args)

        return of_columns

    def nothing(rows: Rows, *args: Any) -> Any:
        shapes = jax.eval_shape(cut_to(levels[0]), rows, *args)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    branches = [nothing, *(cut_to(level) for level in levels)]

    def one_block(data: tuple) -> Any:
        branch = jnp.searchsorted(jnp.array((0, *levels)), jnp.max(data[0].count))
        return jax.lax.switch(branch, branches, *data)

    results = jax.lax.map(one_block, jax.tree.map(split, (rows, *per_atom)))
    return jax.tree.map(lambda x: x.reshape(num_blocks * block, *x.shape[2:])[:num_atoms], results)


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
    return a[:, :, None] * jnp.sum(rows.vector**2, axis=-1)[:, None, :]


def gathered_dots(x: jax.Array, y: jax.Array, rows: Rows) -> jax.Array:
    """x_i . y_j for every neighbor j: x [n, H, d] of the block, y [N, H, d] of the batch -> [n, H, M]."""
    neighbors = jnp.asarray(y)[rows.index].swapaxes(1, 2)
    return jnp.einsum("nhmd,nhd->nhm", neighbors, x, precision=EXACT)


def gathered_sum(weights: jax.Array, y: jax.Array, rows: Rows) -> jax.Array:
    """sum_m weights_m y_j: weights [n, H, M] of the block, y [N, H, d] of the batch -> [n, H, d]."""
    neighbors = jnp.asarray(y)[rows.index].swapaxes(1, 2)
    return jnp.einsum("nhm,nhmd->nhd", weights, neighbors, precision=EXACT)
