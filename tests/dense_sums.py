"""Lattice sums as they are defined, in JAX, which derives their gradient."""

import jax
import jax.numpy as jnp
import numpy as np


def dense_sums(bases, q, k, v, a, rows, frames, kept=None):
    """What lattice_sums returns, without any of the means that make the library fast.

    kept [N, H, N]: factors of the weights of pairs of atoms after the softmax, for dropout.
    """
    distance = jnp.linalg.norm(rows.vector, axis=-1)
    is_neighbor = jnp.arange(rows.vector.shape[1]) < rows.count[:, None]
    is_other = is_neighbor & (distance > 0)
    logits = jnp.einsum("nhd,nmhd->nhm", q, k[rows.index]) / np.sqrt(q.shape[-1])
    logits += a[..., None] * distance[:, None] ** 2
    # Not -inf: the derivative of a softmax over nothing would be NaN.
    weights = jax.nn.softmax(jnp.where(is_neighbor[:, None], logits, -1e30), axis=-1) * is_neighbor[:, None]
    if kept is not None:
        weights = weights * jnp.take_along_axis(kept, rows.index[:, None, :], axis=-1)
    values = jnp.einsum("nhm,nmhd->nhd", weights, v[rows.index])
    distance_sum, angle_sum = jnp.zeros((*a.shape, 0)), jnp.zeros((*a.shape, 3, 0))
    if bases.distance:
        spacing = bases.distance.r_max / bases.distance.size
        offset = distance[..., None] - spacing * jnp.arange(1, bases.distance.size + 1)
        gaussians = jnp.exp(-(offset**2) / (2 * (bases.distance.width_scale * spacing) ** 2))
        distance_sum = jnp.einsum("nhm,nmt->nht", weights, gaussians)
    if bases.angle:
        unit = rows.vector / jnp.where(distance > 0, distance, 1)[..., None]
        cosine = jnp.einsum("nhed,nmd->nhem", frames, unit)
        cosine = jnp.abs(cosine) if bases.angle.cos_abs else cosine
        centers = jnp.linspace(0 if bases.angle.cos_abs else -1, 1, bases.angle.size)
        sigma = bases.angle.width_scale * (centers[1] - centers[0])
        gaussians = jnp.exp(-((cosine[..., None] - centers) ** 2) / (2 * sigma**2))
        angle_sum = jnp.einsum("nhm,nhemt->nhet", weights * is_other[:, None], gaussians)
    return values, distance_sum, angle_sum
