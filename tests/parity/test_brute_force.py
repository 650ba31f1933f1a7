"""Whole models with unusual hyperparameters against the float64 reference in brute_force.py."""

import brute_force
import jax
import numpy as np
import pytest
from support import atom_places, batch_of, config_from_official, random_crystal

from crystalframer_jax.configs import default
from crystalframer_jax.inference.official import variables_from_official
from crystalframer_jax.model.regressor import CrystalFramer

RADIUS = 9.0  # Å, in both: the reference takes whole lattice images beyond it, of which nothing is left at r0 = 1 Å
SMALL = {"num_layers": 2, "model_dim": 12, "head_num": 2, "ff_dim": 10, "scale_real": (1.0, 0.8)}
CASES = {
    "own key and value widths, two targets": {
        "k_dim": 5,
        "v_dim": 3,
        "embedding_dim": (9, 7),
        "pre_pooling_op": "w+relu",
        "targets": "a,b",
        "t_activation": "gelu",
        "value_pe_dist_coef": 1.5,
        "value_pe_angle_coef": 6.0,
        "value_pe_angle_real": 10,
        "cos_abs": 1,
        "gauss_lb_real": 0.6,
    },
    "narrow Gaussians, max pooling": {
        "pooling": "max",
        "pre_pooling_op": "relu",
        "embedding_dim": (),
        "value_pe_dist_real": 7,
        "value_pe_dist_max": 6.0,
        "value_pe_dist_wscale": 2.0,
        "value_pe_angle_real": 32,
        "value_pe_angle_wscale": 1.0,
        "positive_func_beta": 0.3,
    },
}


def random_state(config, rng):
    """A state dict under official names whose outputs are of order 1."""
    dim, heads = config.model_dim, config.head_num
    shapes = {"input_embeddings.weight": (dim, 98)}
    for block in range(config.num_layers):
        prefix = f"encoder.layers.{block}."
        attention = prefix + "self_attn."
        k, v = heads * config.k_dim, heads * config.v_dim
        shapes |= {f"{attention}{name}_proj_weight": (width, dim) for name, width in zip("qkv", (k, k, v), strict=True)}
        shapes |= {attention + "in_proj_bias": (2 * k + v,), attention + "lattice_pos_weights": (k,)}
        shapes |= {attention + "out_proj.weight": (dim, v), attention + "out_proj.bias": (dim,)}
        shapes[attention + "pe_dist_proj"] = (1, heads, config.v_dim, config.value_pe_dist_real)
        for axis in (1, 2, 3):
            shapes[f"{attention}proj_angle{axis}"] = (1, heads, config.v_dim, config.value_pe_angle_real)
        shapes |= {prefix + "linear1.weight": (config.ff_dim, dim), prefix + "linear1.bias": (config.ff_dim,)}
        shapes |= {prefix + "linear2.weight": (dim, config.ff_dim), prefix + "linear2.bias": (dim,)}
    layers = [f"mlp.{3 * i}" for i in range(len(config.embedding_dim) + 1)]
    if config.pre_pooling_op == "w+relu":
        layers = ["proj_before_pooling.0", *layers[:-1]]
    widths = [dim, *config.embedding_dim, config.num_targets]
    for name, inputs, outputs in zip(layers, widths, widths[1:], strict=False):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    state = {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    for block in range(config.num_layers):
        state[f"encoder.layers.{block}.self_attn.gauss_scale"] = np.array([1.7, 0.2])
    return state


@pytest.mark.parametrize("name", CASES)
def test_model_equals_brute_force(name, x64):
    rng = np.random.default_rng(0)
    official = default.get_config().to_dict() | SMALL | CASES[name]
    config = config_from_official(official)
    state = random_state(config, rng)
    crystals = [random_crystal(rng, n) for n in (1, 3, 5)]
    batch = batch_of(crystals, RADIUS, np.float64, num_targets=config.num_targets)

    variables = variables_from_official(state, config)
    model = CrystalFramer(config)
    output, seen = jax.jit(lambda v, b: model.apply(v, b, mutable=["intermediates"]))(variables, batch)
    frames = np.asarray(seen["intermediates"]["block_1"]["attention"]["frames"][0])[atom_places(batch)]
    outputs, start = [], 0
    for i, crystal in enumerate(crystals):
        reference = brute_force.predict(
            official, state, crystal.species, crystal.positions, crystal.lattice, radius=RADIUS
        )
        np.testing.assert_allclose(output[i], reference["output"], atol=1e-8)
        np.testing.assert_allclose(frames[start : start + crystal.num_atoms], reference["frames"][1], atol=1e-8)
        outputs.append(reference["output"])
        start += crystal.num_atoms
    assert np.std(outputs, axis=0).min() > 0.05  # the crystals can be told apart
