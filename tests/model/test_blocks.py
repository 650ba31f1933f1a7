"""Blocks of equal settings share one compiled body in a loop: the same results as block after block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_variables
from tiny_models import CRYSTALFORMER, batch, named_leaves, tiny_config

from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw, seed_of

CONFIGS = {
    "equal blocks": {"num_layers": 2, "t_fixup_init": False},
    "blocks of two kinds": {"num_layers": 4, "scale_real": (1.4, 2.0)} | CRYSTALFORMER,
    "two domains": {"num_layers": 4, "domain": "real-reci", "lattice_range": 1} | CRYSTALFORMER,
    "dropout": {"num_layers": 2, "dropout": 0.3} | CRYSTALFORMER,
}


def run(config, one_by_one, variables, batch, **others):
    """Predictions in training with drawn frames and all else that changes; blocks `one_by_one` or in the loop."""
    return CrystalFramer(config).apply(
        variables,
        batch,
        train=True,
        dropout_seeds=draw(seed_of(4), jnp.arange(len(batch.crystal_sizes))),
        mutable=["batch_stats", "calibration"] + ["intermediates"] * one_by_one,
        **others,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def evaluate(config, one_by_one, variables, batch):
    """Predictions while the widths are calibrated, the gradients of a sum of them, and the calibration."""
    seeds = draw(seed_of(3), jnp.arange(len(batch.crystal_sizes)))

    def summed(params):
        given = {**variables, "params": params}, batch
        found, changed = run(config, one_by_one, *given, frame_seeds=seeds, calibrate=True)
        return jnp.sum(jnp.sin(found)), (found, changed["calibration"])

    gradients, (predictions, calibration) = jax.grad(summed, has_aux=True)(variables["params"])
    return {"predictions": predictions, "gradients": gradients, "calibration": calibration}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loop_over_blocks_gives_what_block_after_block_does(name, x64):
    config = tiny_config(precision="float64", **CONFIGS[name])
    assert config.period_of_blocks < config.num_layers
    variables = random_variables(config, dtype=np.float64)
    given = variables, batch(np.float64)
    found, expected = (named_leaves(evaluate(config, one_by_one, *given)) for one_by_one in (False, True))
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_allclose(found[leaf], value, rtol=1e-9, atol=1e-11, err_msg=leaf)


def test_given_frames_go_to_their_blocks(x64):
    config = tiny_config(precision="float64", num_layers=2)
    packed, rng = batch(np.float64), np.random.default_rng(2)
    frames = jnp.asarray(np.linalg.qr(rng.normal(size=(2, len(packed.species), config.head_num, 3, 3)))[0])
    variables = random_variables(config, dtype=np.float64)
    compiled = jax.jit(run, static_argnums=(0, 1))
    found, expected, other = (
        np.asarray(compiled(config, one_by_one, variables, packed, given_frames=given)[0])
        for one_by_one, given in ((False, [*frames]), (True, [*frames]), (False, [*frames[::-1]]))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "period"),
    [
        ({"num_layers": 4}, 1),
        ({"num_layers": 4, "scale_real": (1.4, 2.0)}, 2),
        ({"num_layers": 3, "scale_real": (1.4, 2.0)}, 3),
        ({"num_layers": 4, "scale_real": (1.4, 1.4)}, 1),
        ({"num_layers": 4, "domain": "real-reci"} | CRYSTALFORMER, 2),
        ({"num_layers": 6, "domain": "real-reci", "scale_real": (1.0, 1.5, 2.0)} | CRYSTALFORMER, 6),
    ],
)
def test_period_of_blocks(changes, period):
    assert tiny_config(**changes).period_of_blocks == period
