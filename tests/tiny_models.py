"""Crystals without symmetry and models smaller still than those of support.py, for tests that compile many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import AS_USERS_DO, batch_of, random_crystal, small_config

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.config import BatchParts
from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw, seed_of

RADIUS = 5.0  # Å: rows below 48
SHAPE = BatchShape(16, 48, 4)
LARGER = BatchShape(32, 48, 6)
CRYSTALFORMER = {"value_pe_angle_real": 0, "frame_method": "no"}
FRAME_METHODS = [method for method in ALLOWED_VALUES["frame_method"] if method != "no"]


def tiny_config(**changes):
    """A smaller model still, and a smooth one."""
    sizes = {"model_dim": 8, "ff_dim": 8, "embedding_dim": (8,), "value_pe_dist_real": 4, "value_pe_angle_real": 4}
    return small_config(**(sizes | {"t_activation": "gelu"} | changes))


@functools.cache
def crystals():
    """Three crystals without symmetry, of 4, 3 and 5 atoms."""
    rng = np.random.default_rng(41)
    return [random_crystal(rng, size, 20.0) for size in (4, 3, 5)]


@functools.cache
def batch(dtype=np.float32, shape=SHAPE):
    """The crystals with everything that any model needs, and padding."""
    return batch_of(crystals(), RADIUS, dtype, shape, parts=BatchParts(cells=True, lattice_frames=True, scatter=True))


def named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


WEIGHTS = ((1.0,), (-0.7,), (0.5,), (0.0,))  # of the crystals; the last is padding


def evaluate(config, variables, batch, train=False, given_frames=None):
    """Predictions, the gradients of their weighted sum by the parameters, and the frames."""
    compiled = evaluate_as_users_do if config.pooling == "max" else evaluate_in_haste
    return compiled(config, variables, batch, train, given_frames)


def evaluate_both(config, variables, batch, train, given_frames):
    def weighted(params):
        predictions, state = CrystalFramer(config).apply(
            {**variables, "params": params},
            batch,
            given_frames=given_frames,
            train=train,
            dropout_seeds=draw(seed_of(5), jnp.arange(len(batch.crystal_sizes))),
            mutable=["intermediates", "batch_stats"],
        )
        blocks = [state["intermediates"][f"block_{block}"]["attention"] for block in range(config.num_layers)]
        frames = [block["frames"][0] if "frames" in block else None for block in blocks]
        return jnp.sum(jnp.asarray(WEIGHTS, predictions.dtype) * predictions), (predictions, frames)

    gradients, (predictions, frames) = jax.grad(weighted, has_aux=True)(variables["params"])
    return predictions, gradients, frames


evaluate_in_haste = jax.jit(evaluate_both, static_argnums=(0, 3))
# In haste the largest feature is rounded once as the maximum and once as the feature, which then gets no gradient.
evaluate_as_users_do = jax.jit(evaluate_both, static_argnums=(0, 3), compiler_options=AS_USERS_DO)
