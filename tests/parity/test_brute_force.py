"""Whole models with unusual hyperparameters against the float64 reference in brute_force.py."""

import brute_force
import jax
import numpy as np
import pytest
from support import atom_places, batch_of, config_from_official, random_crystal

from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES
from crystalframer_jax.configs import default
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.official.state import variables_from_official
from crystalframer_jax.structures.neighbors import LatticeBox

# Å, in both. The reference takes whole lattice images beyond it: at these scales what it adds has weights of exp(-20)
# and less. Rows have fewer than 48 neighbors, the shortest length that is compiled.
RADIUS = 6.0
SMALL = {"num_layers": 2, "model_dim": 12, "head_num": 2, "ff_dim": 10, "scale_real": (0.67, 0.55)}
VOLUME_PER_ATOM = 28.0  # Å^3
CRYSTALFORMER = {"value_pe_angle_real": 0, "frame_method": "no", "value_pe_dist_real": 9}
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
    "max_static frames in a box of images, layer norms, bn": {
        "frame_method": "max_static",
        "adaptive_cutoff_sigma": 0.0,
        "lattice_range": 1,
        "scale_real": (1.4, 3.0),
        "t_fixup_init": False,
        "pre_pooling_op": "w+bn+relu",
        "norm_type": "bn",
        "embedding_dim": (9, 7),
        "value_pe_angle_real": 8,
    },
    "lattice frames, widths not normalised, ln": {
        "frame_method": "lattice",
        "normalize_gauss": False,
        "positive_func_beta": 0.5,
        "norm_type": "ln",
        "embedding_dim": (9,),
        "value_pe_angle_real": 8,
        "value_pe_dist_real": 0,
    },
    "weighted_pca frames, widths from the input": {
        "frame_method": "weighted_pca",
        "gauss_state": "x",
        "k_dim": 3,
        "value_pe_angle_real": 8,
        "embedding_dim": (9,),
    },
    "pca frames, one width, in": {
        "frame_method": "pca",
        "gauss_state": "1",
        "norm_type": "in",
        "pre_pooling_op": "w+bn+relu",
        "embedding_dim": (9, 7),
        "value_pe_angle_real": 8,
    },
    "reci": CRYSTALFORMER
    | {
        "domain": "reci",
        "gauss_state": "q-kdim",
        "gauss_lb_reci": 0.3,
        "lattice_range": 1,
        "num_layers": 1,
        "scale_real": (0.6,),
        "scale_reci": (1.1,),
    },
    "RECI, several scales, norms of all kinds": CRYSTALFORMER
    | {
        "domain": "RECI",
        "gauss_state": "x-xn2",
        "t_fixup_init": False,
        "norm_type": "ln",
        "pre_pooling_op": "w+bn+relu",
        "embedding_dim": (9, 7),
        "num_layers": 3,
        "scale_reci": (1.2, 0.9),
    },
    "multihead with four heads": CRYSTALFORMER
    | {
        "domain": "multihead",
        "head_num": 4,
        "k_dim": 2,
        "v_dim": 5,
        "scale_reci": (1.2, 0.9),
        "gauss_lb_real": 0.6,
        "gauss_lb_reci": 0.3,
        "norm_type": "bn",
        "embedding_dim": (9,),
    },
    "real-reci, one scale for all": CRYSTALFORMER
    | {"domain": "real-reci", "normalize_gauss": False, "scale_real": (0.6,), "scale_reci": (1.3,)},
    "reci-real in a box of images": CRYSTALFORMER
    | {"domain": "reci-real", "adaptive_cutoff_sigma": 0.0, "lattice_range": 1, "scale_real": (1.4, 3.0)},
    "real-RECI, widths from the input": CRYSTALFORMER
    | {"domain": "real-RECI", "gauss_state": "x-norm", "scale_reci": (1.2, 0.9), "num_layers": 3},
    "RECI-real, one width": CRYSTALFORMER | {"domain": "RECI-real", "gauss_state": "1", "dropout": 0.3},
}
SIGNS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # that leave a frame right-handed


def random_state(config, rng):
    """A state dict under official names whose outputs are of order 1."""
    dim = config.model_dim
    shapes = {"input_embeddings.weight": (dim, 98)}
    norms = [] if config.t_fixup_init else ["encoder.norm"]
    for block in range(config.num_layers):
        prefix = f"encoder.layers.{block}."
        shapes |= attention_shapes(config, prefix + "self_attn.", config.domain_of_block(block))
        shapes |= {prefix + "linear1.weight": (config.ff_dim, dim), prefix + "linear1.bias": (config.ff_dim,)}
        shapes |= {prefix + "linear2.weight": (dim, config.ff_dim), prefix + "linear2.bias": (dim,)}
        norms += [] if config.t_fixup_init else [prefix + "norm1", prefix + "norm2"]
    shapes |= {f"{name}.{kind}": (dim,) for name in norms for kind in ("weight", "bias")}
    layers = [f"mlp.{3 * i}" for i in range(len(config.embedding_dim) + 1)]
    normed = [f"mlp.{3 * i + 1}" for i in range(len(config.embedding_dim))]
    if config.pre_pooling_op.startswith("w"):
        layers = ["proj_before_pooling.0", *layers[:-1]]
        first = ["proj_before_pooling.1"] if config.pre_pooling_op == "w+bn+relu" else [None]
        normed = [*first, *normed[:-1]]
    widths = [dim, *config.embedding_dim, config.num_targets]
    for name, inputs, outputs in zip(layers, widths, widths[1:], strict=False):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    state = {name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    state["input_embeddings.weight"] *= 98**0.5
    for name, width in zip(normed, config.embedding_dim, strict=True):
        if name and config.norm_type in ("bn", "ln"):
            state |= {f"{name}.weight": 1 + 0.3 * rng.normal(size=width), f"{name}.bias": rng.normal(size=width)}
        if name and config.norm_type == "bn":
            state[f"{name}.running_mean"] = 0.3 * rng.normal(size=width)
            state[f"{name}.running_var"] = rng.uniform(0.3, 2, width)
    for name in norms:
        state[f"{name}.weight"] += 1
    for block in range(config.num_layers):
        state[f"encoder.layers.{block}.self_attn.gauss_scale"] = np.array([1.7, 0.2])
    return state


def attention_shapes(config, prefix, domain):
    """Official shapes of an attention layer; the distance weights of `multihead` are stored for all heads."""
    dim, heads = config.model_dim, config.head_num
    k, v = heads * config.k_dim, heads * config.v_dim
    shapes = {f"{prefix}{name}_proj_weight": (width, dim) for name, width in zip("qkv", (k, k, v), strict=True)}
    shapes |= {prefix + "in_proj_bias": (2 * k + v,), prefix + "out_proj.weight": (dim, v)}
    shapes |= {prefix + "out_proj.bias": (dim,)}
    shapes[prefix + "lattice_pos_weights"] = (heads, dim) if config.gauss_state.startswith("x") else (k,)
    if domain in ("real", "multihead"):
        if config.value_pe_dist_real:
            shapes[prefix + "pe_dist_proj"] = (1, heads, config.v_dim, config.value_pe_dist_real)
        for axis in (1, 2, 3) if config.value_pe_angle_real else ():
            shapes[f"{prefix}proj_angle{axis}"] = (1, heads, config.v_dim, config.value_pe_angle_real)
    return shapes


def test_cases_cover_what_can_be_chosen():
    """Every value of the keys that choose other mathematics, and every frame method, is tried by a case."""
    tried = [default.get_config().to_dict() | SMALL | case for case in CASES.values()]
    for key in ("domain", "frame_method", "t_activation", "pooling", "pre_pooling_op", "norm_type", "cos_abs"):
        assert {config[key] for config in tried} == set(ALLOWED_VALUES[key]), key
    alike = {"q": "q", "q-headdim": "q", "q-kdim": "q", "1": "1"}  # they differ at most in the initial weights
    states = {alike.get(state, "x") for state in ALLOWED_VALUES["gauss_state"]}
    assert {alike.get(config["gauss_state"], "x") for config in tried} == states


def assert_equal_up_to_signs(frames, expected):
    """Axes with the one or other sign, right-handed."""
    errors = np.abs(frames[..., None, :, :] - SIGNS[:, :, None] * expected[..., None, :, :]).max(axis=(-2, -1))
    np.testing.assert_allclose(errors.min(axis=-1), 0, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_model_equals_brute_force(name, x64):
    rng = np.random.default_rng(0)
    official = default.get_config().to_dict() | SMALL | CASES[name]
    config = config_from_official(official)
    state = random_state(config, rng)
    principal, boxed = config.frame_method in ("pca", "weighted_pca"), official["adaptive_cutoff_sigma"] == 0
    sizes = (4, 3, 5) if principal else (1, 2, 2) if boxed else (1, 3, 5)
    crystals = [random_crystal(rng, size, VOLUME_PER_ATOM) for size in sizes]
    cutoff = LatticeBox(config.lattice_range) if boxed else RADIUS
    batch = batch_of(crystals, cutoff, np.float64, num_targets=config.num_targets, parts=config.parts)

    variables = variables_from_official(state, config)
    model = CrystalFramer(config)
    output, seen = jax.jit(lambda v, b: model.apply(v, b, mutable=["intermediates"]))(variables, batch)
    assert output.dtype == np.float64
    places = atom_places(batch)
    attention = [seen["intermediates"][f"block_{block}"]["attention"] for block in range(config.num_layers)]
    outputs, ends = [], np.cumsum([crystal.num_atoms for crystal in crystals])
    for i, (crystal, of_crystal) in enumerate(zip(crystals, np.split(places, ends[:-1]), strict=True)):
        frames = [None if "frames" not in a else a["frames"][0] for a in attention]
        frames = [None if f is None else np.asarray(f)[of_crystal] for f in frames]
        arguments = official, state, crystal.species, crystal.positions, crystal.lattice, RADIUS
        reference = brute_force.predict(*arguments, frames if principal else None)
        np.testing.assert_allclose(output[i], reference["output"], atol=1e-8)
        for block in range(config.num_layers):
            np.testing.assert_allclose(attention[block]["a"][0][of_crystal], reference["alphas"][block], atol=1e-8)
            if config.uses_frames:
                np.testing.assert_allclose(frames[block], reference["frames"][block], atol=1e-8)
        if principal:  # of the first block: those of the others depend on the signs
            assert_equal_up_to_signs(frames[0], brute_force.predict(*arguments)["frames"][0])
        outputs.append(reference["output"])
    assert np.std(outputs, axis=0).min() > 0.05  # the crystals can be told apart
