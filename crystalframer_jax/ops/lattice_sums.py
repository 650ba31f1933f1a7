"""The lattice sums of one block: softmax over periodic neighbors, weighted sums of values and basis functions.

Encodings are linear in the basis functions, so the weighted basis is summed first and projected once per atom. The
gradient is written by hand: it recomputes the weights from the stored log-sum-exp and reaches k_j and v_j through
the reverse neighbors, by gathers only. Positions and frames get no gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.ops.basis import EXACT, AngleBasis, Bases
from crystalframer_jax.ops.blocks import (
    attention_logits,
    directions,
    exp_relative,
    gathered_dots,
    gathered_sum,
    is_neighbor,
    map_blocks,
    over_columns,
    spatial_logits,
    times,
    weighted_sums,
)
from crystalframer_jax.ops.random_bits import draw, kept
from crystalframer_jax.ops.reciprocal import WaveVectors

Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class SumOptions:
    """What is summed and how; static."""

    bases: Bases
    waves: WaveVectors | None = None  # attention in reciprocal space: rows are CellRows, and there are no bases
    dropout: float = 0.0  # share of the pairs of atoms whose weights are dropped, given seeds


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lattice_sums(
    options: SumOptions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    rows: Rows,
    frames: jax.Array | None,
    seeds: jax.Array | None = None,
) -> Sums:
    """Softmax-weighted sums over the neighbor rows.

    With p = softmax over the row of q . k_j / sqrt(d_k) + a d^2 this returns sum p v_j [N, H, d_v],
    sum p b_dist [N, H, D_dist] and sum over d > 0 of p b_angle for each frame axis [N, H, 3, D_angle].

    q, k [N, H, d_k]; v [N, H, d_v]; a [N, H] in 1/Å^2, negative; frames [N, H, 3, 3] with rows e1, e2, e3, or None
    if there is no angle basis. `seeds` [N, H] uint32 switch dropout on: all images of an atom j are dropped together.
    Pairs are drawn by the seeds of both atoms, wherever they stand in the batch.
    Padding atoms (empty rows) give zeros.
    """
    return _forward(options, q, k, v, a, rows, frames, seeds)[0]


def _forward(options, q, k, v, a, rows, frames, seeds):
    bases = options.bases

    def zeros(a):
        """Sums of values, distance and angle bases, without any neighbor."""
        distances, angles = bases.sizes
        return tuple(jnp.zeros((*a.shape, *shape), q.dtype) for shape in (v.shape[2:], (distances,), (3, angles)))

    def block(rows, q, a, frames, own_seeds):
        def sums(rows, weights):
            """The sums over some columns of the rows."""
            if seeds is not None:
                weights *= _kept(rows, own_seeds, seeds, options.dropout, weights.dtype)
            _, dist_sum, angle_sum = zeros(a)
            if bases.distance:
                dist_sum = jnp.einsum("nhm,nmt->nht", weights, bases.distance(jnp.sqrt(rows.square)), precision=EXACT)
            if bases.angle:
                cosine = _cosines(bases.angle, rows, frames)
                of_others = jnp.broadcast_to(_without_self(weights, rows)[:, :, None], cosine.shape)
                angle_sum = bases.angle.weighted_sum(cosine, of_others)
            return gathered_sum(weights, v, rows), dist_sum, angle_sum

        found = weighted_sums(rows, lambda rows: attention_logits(q, k, a, rows, options.waves), sums, zeros(a))
        inverse = 1 / jnp.where(found.total > 0, found.total, 1)
        log_sum = jnp.where(jnp.isfinite(found.largest), found.largest, 0) + jnp.log(found.total)
        return tuple(times(x, inverse) for x in found.sums), log_sum

    sums, log_sum = map_blocks(block, rows, q, a, frames, seeds, like=(zeros(a), a))
    return sums, (q, k, v, a, rows, frames, seeds, log_sum, sums)


def _backward(options, residuals, gradients):
    q, k, v, a, rows, frames, seeds, log_sum, sums = residuals
    bases = options.bases
    scale = q.shape[-1] ** -0.5
    # sum_m p dL/dp, needed by the derivative of the softmax, equals <sums, gradients>, also with dropout.
    mean_gradient = sum(jnp.sum(s * g, axis=tuple(range(2, s.ndim))) for s, g in zip(sums, gradients, strict=True))

    def rows_pass(rows, q, a, frames, own_seeds, log_sum, mean_gradient, gradients, first_atom, stored):
        """dL/dq and dL/da; dL/dlogit and the weight of every neighbor are stored."""
        value_grad, dist_grad, angle_grad = gradients

        def add(rows, first_column, carry):
            (q_grad, a_grad), stored = carry
            weights = exp_relative(attention_logits(q, k, a, rows, options.waves), log_sum[..., None])
            weight_grad = gathered_dots(value_grad, v, rows)
            if bases.distance:
                basis = bases.distance(jnp.sqrt(rows.square))
                weight_grad += jnp.einsum("nht,nmt->nhm", dist_grad, basis, precision=EXACT)
            if bases.angle:
                from_angles = bases.angle.combination(_cosines(bases.angle, rows, frames), angle_grad)
                weight_grad += _without_self(from_angles, rows)
            summed_weights = weights
            if seeds is not None:
                kept = _kept(rows, own_seeds, seeds, options.dropout, weights.dtype)
                weight_grad, summed_weights = weight_grad * kept, weights * kept
            logit_grad = weights * (weight_grad - mean_gradient[..., None])
            _, to_a = jax.vjp(lambda a: spatial_logits(a, rows, options.waves), a)
            gradients = q_grad + gathered_sum(logit_grad, k, rows) * scale, a_grad + to_a(logit_grad)[0]
            per_neighbor = [x.swapaxes(1, 2) for x in (logit_grad, summed_weights)]
            return gradients, [
                jax.lax.dynamic_update_slice(all, x, (first_atom, first_column, jnp.int32(0)))
                for all, x in zip(stored, per_neighbor, strict=True)
            ]

        return over_columns(add, rows, ((jnp.zeros_like(q), jnp.zeros_like(a)), stored))

    stored = [jnp.zeros((*rows.index.shape, q.shape[1]), q.dtype)] * 2
    (q_grad, a_grad), stored = map_blocks(
        rows_pass, rows, q, a, frames, seeds, log_sum, mean_gradient, gradients, like=(q, a), stored=stored
    )
    logit_grad, weights = (x.reshape(-1, x.shape[-1]) for x in stored)

    def reverse_pass(rows):
        """dL/dk_j and dL/dv_j: the rows that contain atom j are those of its own neighbors."""

        def add(rows, _, carry):
            def back(x):
                return jnp.where(is_neighbor(rows)[..., None], x[rows.reverse], 0).swapaxes(1, 2)

            k_grad, v_grad = carry
            k_grad += gathered_sum(back(logit_grad), q, rows) * scale
            return k_grad, v_grad + gathered_sum(back(weights), gradients[0], rows)

        return over_columns(add, rows, tuple(jnp.zeros((len(rows.count), *x.shape[1:]), x.dtype) for x in (k, v)))

    k_grad, v_grad = map_blocks(reverse_pass, rows, like=(k, v))
    return q_grad, k_grad, v_grad, a_grad, None, None, None


lattice_sums.defvjp(_forward, _backward)


def _kept(rows: Rows, own_seeds: jax.Array, seeds: jax.Array, dropout: float, dtype: jnp.dtype) -> jax.Array:
    """0 with probability `dropout`, else 1 / (1 - dropout), for every head and pair of atoms i, j: [n, H, M].

    Seeds of the atoms i [n, H] and of all atoms [N, H].
    """
    return kept(draw(own_seeds[:, :, None], jnp.asarray(seeds)[rows.index].swapaxes(1, 2)), dropout, dtype)


def _without_self(x: jax.Array, rows: Rows) -> jax.Array:
    """x [n, H, M] with 0 where the neighbor is the atom itself."""
    return jnp.where((rows.square > 0)[:, None, :], x, 0)


def _cosines(angle: AngleBasis, rows: Rows, frames: jax.Array) -> jax.Array:
    """Argument of the angle basis: e . u (or its modulus) for each frame axis, [n, H, 3, M]."""
    return angle.argument(jnp.einsum("nhed,nmd->nhem", frames, directions(rows), precision=EXACT))
