"""Kernels for the lattice sums of one block and their gradient, see crystalframer_jax.ops.lattice_sums.

Every program has one atom and one head. The forward kernel goes through the row twice: for the log-sum-exp, and for the
sums. The gradient recomputes the weights from it: one kernel goes along the rows, and leaves dL/dlogit of every
neighbor for another, which collects it, and the weights once more, at the reverse neighbors. There are no atomic
operations: the same inputs give the same bits.

Chunks of neighbors whose weights add up to less than NEGLIGIBLE roundings of 1, the sum of the whole row, are skipped
by the forward and the rows kernel: a row loses less weight than that times the number of its chunks. Rows are sorted by
distance, so these chunks are the far ends of rows.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crystalframer_jax.kernels.backend import lanes, load, run, store
from crystalframer_jax.kernels.rows import (
    CHUNK,
    Chunk,
    Inputs,
    Place,
    gathered,
    logits_of,
    over_chunks,
    place,
    vector_of,
)
from crystalframer_jax.ops.basis import AngleBasis, DistanceBasis
from crystalframer_jax.ops.lattice_sums import SumOptions, Sums
from crystalframer_jax.ops.random_bits import draw, kept

NEGLIGIBLE = 1e-3  # weight of a chunk, in units of the rounding of 1 (1.2e-10 in float32)


class Totals(NamedTuple):
    """The sums of the forward kernel, or what the gradient is with respect to them; None without the encoding."""

    values: Any  # [N, H, d_v]
    distances: Any  # [N, H, D]
    angles: Any  # [N, H, 3, A, B] without the constant of the angle basis


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lattice_sums(options: SumOptions, *inputs: Any) -> Sums:
    """What crystalframer_jax.ops.lattice_sums.lattice_sums returns for the Inputs in real space, by kernels."""
    return _forward(options, *inputs)[0]


def _forward(options, *arrays):
    inputs, bases = Inputs(*arrays), options.bases
    atoms, heads = inputs.a.shape

    def like(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((atoms, heads, *shape), inputs.q.dtype)

    outputs = Totals(
        like(inputs.v.shape[-1]),
        like(bases.distance.size) if bases.distance else None,
        like(3, *bases.angle.constant.shape) if bases.angle else None,
    )
    kernel = functools.partial(forward_kernel, options)
    totals, log_sum = run(kernel, atoms * heads, (outputs, like()), inputs)
    sums = (
        totals.values,
        totals.distances if bases.distance else jnp.zeros((atoms, heads, 0), inputs.q.dtype),
        _with_constant(bases.angle, totals.angles).reshape(atoms, heads, 3, -1)
        if bases.angle
        else jnp.zeros((atoms, heads, 3, 0), inputs.q.dtype),
    )
    return sums, (inputs, log_sum, sums)


def _backward(options, residuals, gradients):
    (inputs, log_sum, sums), bases = residuals, options.bases
    atoms, heads = inputs.a.shape
    # sum_m p dL/dp, needed by the derivative of the softmax, equals <sums, gradients>, also with dropout.
    mean = sum(jnp.sum(s * g, axis=tuple(range(2, s.ndim))) for s, g in zip(sums, gradients, strict=True))
    grads = Totals(
        gradients[0],
        gradients[1] if bases.distance else None,
        _with_constant(bases.angle, gradients[2].reshape(atoms, heads, 3, *bases.angle.constant.shape))
        if bases.angle
        else None,
    )
    shape_of = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    per_neighbor = jax.ShapeDtypeStruct((atoms, heads, inputs.rows.index.shape[1]), inputs.q.dtype)
    logit_grad, q_grad, a_grad = run(
        functools.partial(rows_kernel, options),
        atoms * heads,
        (per_neighbor, shape_of(inputs.q), shape_of(inputs.a)),
        *(inputs, log_sum, mean, grads),
    )
    k_grad, v_grad = run(
        functools.partial(reverse_kernel, options),
        atoms * heads,
        (shape_of(inputs.k), shape_of(inputs.v)),
        *(inputs._replace(frames=None), log_sum, grads.values, logit_grad),
    )
    return q_grad, k_grad, v_grad, a_grad, None, None, None


lattice_sums.defvjp(_forward, _backward)


def _with_constant(basis: AngleBasis, sums: jax.Array) -> jax.Array:
    """Angle sums [..., A, B] times the constant of the basis."""
    return sums * jnp.asarray(basis.constant, sums.dtype)


def forward_kernel(options: SumOptions, inputs: Inputs, outputs: tuple[Totals, Any]) -> None:
    """Totals and log-sum-exp [N, H] of the row of one atom and head."""
    bases, (totals, log_sum) = options.bases, outputs
    at = place(inputs.a.shape[1])
    logits = _row_logits(inputs, at)

    def collect(chunk: Chunk, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        largest, total = carry
        logit = logits(chunk)
        new = jnp.maximum(largest, jnp.max(logit, axis=0))
        return new, total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logit - new), axis=0)

    dtype = inputs.q.dtype
    lowest = jnp.asarray(jnp.finfo(dtype).min, dtype)  # not -inf: the first difference would not be a number
    largest, total = over_chunks(inputs.rows, at.atom, collect, (lowest, jnp.zeros((), dtype)))
    row_sum = largest + jnp.log(total)  # -inf for an empty row
    store(log_sum, tuple(at), row_sum)

    def weights_of(chunk: Chunk) -> jax.Array:
        return jnp.exp(logits(chunk) - row_sum)

    def add_values(chunk: Chunk, weights: jax.Array) -> jax.Array:
        return weights * gathered(inputs.v, chunk, at.head)

    def add_distances(basis: DistanceBasis, chunk: Chunk, weights: jax.Array) -> jax.Array:
        return weights * _distance_gaussians(basis, jnp.sqrt(chunk.square))

    def add_angles(basis: AngleBasis, axis: int, chunk: Chunk, weights: jax.Array) -> jax.Array:
        distance = jnp.sqrt(chunk.square)
        first, second = _angle_factors(basis, _cosine(inputs.frames, at, axis, chunk, distance))
        return (jnp.where(distance > 0, weights, 0) * first)[:, None, :] * second[None, :, :]

    def total_of(terms: Any, *sizes: int) -> jax.Array:
        """Sum of terms [..., C] over the row; the sum over the neighbors of a chunk is left to the end."""

        def add(chunk: Chunk, total: jax.Array) -> jax.Array:
            weights = weights_of(chunk)

            def added(total: jax.Array) -> jax.Array:
                return total + terms(chunk, weights * _kept(options, inputs, at, Place(chunk.neighbor, at.head)))

            return jax.lax.cond(_matter(weights), added, lambda total: total, total)

        start = jnp.zeros((*(lanes(size).shape[0] for size in sizes), CHUNK), dtype)
        return jnp.sum(over_chunks(inputs.rows, at.atom, add, start), axis=-1)

    store_vector(totals.values, at, total_of(add_values, inputs.v.shape[-1]))
    if bases.distance:
        total = total_of(functools.partial(add_distances, bases.distance), bases.distance.size)
        store_vector(totals.distances, at, total)
    if bases.angle:
        for axis in range(3):
            where, mask = _angle_place(bases.angle, at, axis)
            total = total_of(functools.partial(add_angles, bases.angle, axis), *bases.angle.constant.shape)
            store(totals.angles, where, total, mask)


def rows_kernel(options: SumOptions, inputs: Inputs, log_sum: Any, mean: Any, grads: Totals, outputs: tuple) -> None:
    """dL/dlogit [N, H, M] of every neighbor, dL/dq and dL/da, for the row of one atom and head.

    `mean` [N, H] is the sum of p dL/dp over the row, `grads` are the gradients with respect to the Totals.
    """
    bases, (logit_grads, q_grads, a_grads) = options.bases, outputs
    at = place(inputs.a.shape[1])
    logits = _row_logits(inputs, at)
    row_sum, row_mean = load(log_sum, tuple(at)), load(mean, tuple(at))
    value_grad = vector_of(grads.values, at)
    scale = inputs.q.shape[-1] ** -0.5

    def step(chunk: Chunk, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights = jnp.exp(logits(chunk) - row_sum)

        def gradient(chunk: Chunk, weights: jax.Array) -> jax.Array:
            weight_grad = jnp.sum(gathered(inputs.v, chunk, at.head) * value_grad[:, None], axis=0)
            distance = jnp.sqrt(chunk.square)
            if bases.distance:
                coefficients = vector_of(grads.distances, at)
                weight_grad += jnp.sum(_distance_gaussians(bases.distance, distance) * coefficients[:, None], axis=0)
            if bases.angle:
                from_angles = jnp.zeros_like(weight_grad)
                for axis in range(3):
                    first, second = _angle_factors(bases.angle, _cosine(inputs.frames, at, axis, chunk, distance))
                    coefficients = load(grads.angles, *_angle_place(bases.angle, at, axis))
                    half = jnp.sum(coefficients[:, :, None] * second[None, :, :], axis=1)
                    from_angles += jnp.sum(half * first, axis=0)
                weight_grad += jnp.where(distance > 0, from_angles, 0)
            weight_grad *= _kept(options, inputs, at, Place(chunk.neighbor, at.head))
            return weights * (weight_grad - row_mean)

        logit_grad = jax.lax.cond(_matter(weights), gradient, lambda _, w: jnp.zeros_like(w), chunk, weights)
        store(logit_grads, (at.atom, at.head, chunk.column), logit_grad, chunk.real)
        q_grad, a_grad = carry
        q_grad += jnp.sum(logit_grad * gathered(inputs.k, chunk, at.head), axis=1)
        return q_grad, a_grad + jnp.sum(logit_grad * chunk.square, axis=0)

    dtype = inputs.q.dtype
    start = jnp.zeros(lanes(inputs.q.shape[-1]).shape, dtype), jnp.zeros((), dtype)
    q_grad, a_grad = over_chunks(inputs.rows, at.atom, step, start)
    store_vector(q_grads, at, q_grad * scale)
    store(a_grads, tuple(at), a_grad)


def reverse_kernel(
    options: SumOptions, inputs: Inputs, log_sum: Any, value_grads: Any, logit_grads: Any, outputs: tuple
) -> None:
    """dL/dk and dL/dv of one atom and head: the rows that contain the atom are those of its own neighbors."""
    k_grads, v_grads = outputs
    at = place(inputs.a.shape[1])
    width = inputs.rows.index.shape[1]
    k, scale = vector_of(inputs.k, at), inputs.q.shape[-1] ** -0.5

    def step(chunk: Chunk, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        queries = gathered(inputs.q, chunk, at.head)
        there = chunk.neighbor, at.head
        logits = jnp.sum(queries * k[:, None], axis=0) * scale + load(inputs.a, there, chunk.real) * chunk.square
        weights = jnp.where(chunk.real, jnp.exp(logits - load(log_sum, there, chunk.real)), 0)
        weights *= _kept(options, inputs, Place(chunk.neighbor, at.head), at)
        column = load(inputs.rows.reverse, (at.atom, chunk.column), chunk.real) - chunk.neighbor * width
        logit_grad = load(logit_grads, (*there, jnp.where(chunk.real, column, 0)), chunk.real)
        k_grad, v_grad = carry
        k_grad += jnp.sum(logit_grad * queries, axis=1)
        v_grad += jnp.sum(weights * gathered(value_grads, chunk, at.head), axis=1)
        return k_grad, v_grad

    start = tuple(jnp.zeros(lanes(x.shape[-1]).shape, inputs.q.dtype) for x in (inputs.k, inputs.v))
    k_grad, v_grad = over_chunks(inputs.rows, at.atom, step, start)
    store_vector(k_grads, at, k_grad * scale)
    store_vector(v_grads, at, v_grad)


def store_vector(array: Any, at: Place, value: jax.Array) -> None:
    """array[atom, head, :] = value, which is padded to a power of 2."""
    size = array.shape[-1]
    lane = lanes(size)
    store(array, (at.atom, at.head, lane), value, lane < size)


def _row_logits(inputs: Inputs, at: Place) -> Any:
    """The logits of a chunk of the row, as a function of it."""
    q, a, scale = vector_of(inputs.q, at), load(inputs.a, tuple(at)), inputs.q.shape[-1] ** -0.5
    return lambda chunk: logits_of(q, gathered(inputs.k, chunk, at.head), a, scale, chunk)


def _matter(weights: jax.Array) -> jax.Array:
    """Whether the weights of a chunk are not negligible; also if they are not numbers, which must not get lost."""
    return ~(jnp.sum(weights, axis=0) <= NEGLIGIBLE * float(jnp.finfo(weights.dtype).eps))


def _kept(options: SumOptions, inputs: Inputs, row: Place, neighbor: Place) -> jax.Array | float:
    """Factors of the weights that drop pairs of atoms, see crystalframer_jax.ops.lattice_sums."""
    if inputs.seeds is None:
        return 1.0
    bits = draw(load(inputs.seeds, tuple(row)), load(inputs.seeds, tuple(neighbor)))
    return kept(bits, options.dropout, inputs.q.dtype)


def _distance_gaussians(basis: DistanceBasis, distance: jax.Array) -> jax.Array:
    """[D, C], D padded."""
    spacing = basis.r_max / basis.size
    centers = (lanes(basis.size) + 1).astype(distance.dtype) * spacing
    return _gaussians(distance, centers, 0.5 / (basis.width_scale * spacing) ** 2)


def _cosine(frames: Any, at: Place, axis: int, chunk: Chunk, distance: jax.Array) -> jax.Array:
    """e . u of one axis for a chunk, [C]; 0 for the atom itself."""
    along = sum(load(frames, (at.atom, at.head, axis, x)) * chunk.vector[x] for x in range(3))
    return along / jnp.where(distance > 0, distance, 1)


def _angle_factors(basis: AngleBasis, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factors of the angle basis [A, C] and [B, C], see AngleBasis; A and B padded, with finite numbers."""
    c = basis.argument(cosine)
    middles, offsets, origin = basis.groups
    groups, members = lanes(len(middles)), lanes(len(offsets))
    spacing = float(basis.centers[1] - basis.centers[0])
    middle = float(middles[0]) + jnp.minimum(groups, len(middles) - 1).astype(c.dtype) * (spacing * len(offsets))
    offset = float(offsets[0]) + jnp.minimum(members, len(offsets) - 1).astype(c.dtype) * spacing
    slope = (2 * basis.sharpness / math.log(2)) * offset
    first = _gaussians(c, middle, basis.sharpness)
    second = jnp.exp2((c[None, :] - origin) * slope[:, None])
    return first, second


def _gaussians(x: jax.Array, centers: jax.Array, sharpness: float) -> jax.Array:
    """exp(-sharpness (x - center)^2), [centers, C]."""
    scaled = (x[None, :] - centers[:, None]) * math.sqrt(sharpness / math.log(2))
    return jnp.exp2(-(scaled * scaled))


def _angle_place(basis: AngleBasis, at: Place, axis: int) -> tuple[tuple, jax.Array]:
    """Place of the [A, B] coefficients of one axis in [N, H, 3, A, B], and which of them are not padding."""
    number_of_groups, group_size = basis.constant.shape
    groups, members = lanes(number_of_groups)[:, None], lanes(group_size)[None, :]
    return (at.atom, at.head, axis, groups, members), (groups < number_of_groups) & (members < group_size)
