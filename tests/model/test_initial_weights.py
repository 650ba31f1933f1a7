"""Size and initial weights of models."""

import jax
import numpy as np
import pytest
from support import batch_of, primitive, small_config
from tiny_models import CRYSTALFORMER, batch, named_leaves

from crystalframer_jax.config import validate_model
from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES
from crystalframer_jax.configs import default
from crystalframer_jax.model.encoder import width_init
from crystalframer_jax.model.regressor import CrystalFramer


@pytest.fixture(scope="module")
def params():
    """Initial parameters of the default model, as numpy arrays."""
    model = CrystalFramer(validate_model(default.get_config()).model)
    variables = jax.jit(model.init)(jax.random.key(0), batch_of([primitive("fcc")], 3.0))
    return jax.tree.map(np.asarray, variables["params"])


def test_number_of_parameters(params):
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 951_809


def assert_uniform(values, bound):
    """Uniform in +-bound: nothing outside, both ends reached, the right variance."""
    assert np.abs(values).max() <= bound
    assert values.min() < -0.99 * bound and values.max() > 0.99 * bound
    np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.05)


def xavier(inputs, outputs):
    return (6 / (inputs + outputs)) ** 0.5


T_FIXUP = 0.67 * 4**-0.25


@pytest.mark.parametrize("block", range(4))
def test_initial_weights_of_a_block(params, block):
    block = params[f"block_{block}"]
    attention = block["attention"]
    for name, gain in {"q": 1, "k": 1, "v": T_FIXUP, "out": T_FIXUP}.items():
        assert_uniform(attention[name]["kernel"], gain * xavier(128, 128))
        assert not attention[name]["bias"].any()
    for name in ("linear1", "linear2"):
        assert_uniform(block[name]["kernel"], T_FIXUP * xavier(128, 512))
        assert not block[name]["bias"].any()
    for encoding in (attention["w_dist"][0], *attention["w_angle"]):
        assert_uniform(encoding, 64**-0.5 * xavier(64, 8 * 16))
    np.testing.assert_allclose(attention["w_pos"].std(), 16**-0.5, rtol=0.3)  # 128 values


def test_initial_weights_around_the_blocks(params):
    np.testing.assert_allclose(params["embedding"].std(), 128**-0.5 * (9 * 4) ** -0.25, rtol=0.03)
    np.testing.assert_allclose(params["embedding"].mean(), 0, atol=0.003)
    assert_uniform(params["dense_0"]["kernel"], 128**-0.5)
    assert np.abs(params["dense_0"]["bias"]).max() <= 128**-0.5 and params["dense_0"]["bias"].std() > 0.03
    assert np.abs(params["output"]["kernel"]).max() <= 128**-0.5


def test_blocks_start_from_different_weights(params):
    kernels = [params[f"block_{block}"]["attention"]["q"]["kernel"] for block in range(4)]
    assert all(not np.allclose(kernels[0], other) for other in kernels[1:])


def initial_config(**changes):
    """Two blocks, 16 heads and 64 features."""
    sizes = {"model_dim": 64, "head_num": 16, "k_dim": 32, "v_dim": 4, "ff_dim": 48}
    return small_config(**(sizes | CRYSTALFORMER | {"value_pe_dist_real": 64, "embedding_dim": (8,)} | changes))


def initial(config):
    variables = jax.jit(CrystalFramer(config).init)(jax.random.key(1), batch())
    return jax.tree.map(np.asarray, variables["params"])


@pytest.fixture(scope="module")
def without_t_fixup():
    return initial(initial_config(t_fixup_init=False, gauss_state="x-xn2"))


@pytest.fixture(scope="module")
def with_t_fixup():
    return initial(initial_config(gauss_state="q-kdim", domain="multihead"))


def test_initial_weights_are_not_scaled_without_t_fixup(without_t_fixup):
    np.testing.assert_allclose(without_t_fixup["embedding"].std(), 64**-0.5, rtol=0.03)
    for block in ("block_0", "block_1"):
        block = without_t_fixup[block]
        attention = block["attention"]
        for name, width in {"q": 512, "k": 512, "v": 64, "out": 64}.items():
            assert_uniform(attention[name]["kernel"], xavier(64, width))
        for name in ("linear1", "linear2"):
            assert_uniform(block[name]["kernel"], xavier(64, 48))


def test_initial_weights_are_scaled_with_t_fixup(with_t_fixup):
    """By the number of blocks, here two; but not those of q and k."""
    np.testing.assert_allclose(with_t_fixup["embedding"].std(), 64**-0.5 * (9 * 2) ** -0.25, rtol=0.03)
    block, gain = with_t_fixup["block_1"], 0.67 * 2**-0.25
    for name in ("q", "k"):
        assert_uniform(block["attention"][name]["kernel"], xavier(64, 512))
    for name in ("v", "out"):
        assert_uniform(block["attention"][name]["kernel"], gain * xavier(64, 64))
    for name in ("linear1", "linear2"):
        assert_uniform(block[name]["kernel"], gain * xavier(64, 48))


def test_layer_norms_are_there_without_t_fixup_and_start_as_the_identity(with_t_fixup, without_t_fixup):
    norms = {name: leaf for name, leaf in named_leaves(without_t_fixup).items() if "norm" in name}
    blocks = [f"block_{i}/norm{j}" for i in (0, 1) for j in (1, 2)]
    assert norms.keys() == {f"{name}/{kind}" for name in [*blocks, "norm"] for kind in ("scale", "bias")}
    for name, leaf in norms.items():
        np.testing.assert_array_equal(leaf, np.full(64, name.endswith("scale")))
    assert not any("norm" in name for name in named_leaves(with_t_fixup))


def width_std(state, dim, heads, k_dim):
    """Standard deviation of the initial w_pos for each gauss_state."""
    std = {"q": k_dim**-0.5, "q-headdim": k_dim**-0.5, "1": k_dim**-0.5, "q-kdim": (heads * k_dim) ** -0.5}
    std |= {"x": dim**-0.5, "x-norm": dim**-0.5, "x-xavier": xavier(heads, dim) / 3**0.5}
    return (std | {"x-xn2": (2 / (heads * k_dim + dim)) ** 0.5})[state]


@pytest.mark.parametrize("state", ALLOWED_VALUES["gauss_state"])
def test_initial_weights_of_the_widths(state):
    """Of q (per head), or of the layer input."""
    config = initial_config(gauss_state=state, model_dim=96, head_num=48, k_dim=64)
    shapes = jax.eval_shape(CrystalFramer(config).init, jax.random.key(0), batch())
    shape = shapes["params"]["block_0"]["attention"]["w_pos"].shape
    assert shape == ((48, 96) if state.startswith("x") else (48, 64))
    w_pos = np.asarray(width_init(config)(jax.random.key(2), shape, np.float32))
    std = width_std(state, 96, 48, 64)
    np.testing.assert_allclose(w_pos.std(), std, rtol=0.06)
    if state == "x-xavier":
        assert_uniform(w_pos, xavier(48, 96))
    else:
        assert np.abs(w_pos).max() > 3 * std  # normal
    of_heads = w_pos.std(axis=1) / std
    if state == "x-xn2":  # a normal vector [d_k] per head mixes the rows of a Xavier matrix: heads differ in size
        assert 0.07 < of_heads.std() < 0.2
    else:
        assert of_heads.std() < 2 * (2 * shape[1]) ** -0.5


def test_blocks_start_with_the_widths_of_their_gauss_state(with_t_fixup, without_t_fixup):
    for params, state in ((with_t_fixup, "q-kdim"), (without_t_fixup, "x-xn2")):
        for block in ("block_0", "block_1"):
            std = params[block]["attention"]["w_pos"].std()
            np.testing.assert_allclose(std, width_std(state, 64, 16, 32), rtol=0.12)


def test_initial_encodings_of_the_real_heads_of_a_multihead_block(with_t_fixup, without_t_fixup):
    """In the official code the matrix [H d_v, D] has the rows of all heads, of which half are used."""
    for params, heads in ((without_t_fixup, 16), (with_t_fixup, 8)):
        (w_dist,) = params["block_0"]["attention"]["w_dist"]
        assert w_dist.shape == (heads, 4, 64)
        assert_uniform(w_dist, 64**-0.5 * xavier(64, 16 * 4))


def test_blocks_without_real_heads_have_no_encodings():
    config = initial_config(domain="RECI-real")
    params = jax.eval_shape(CrystalFramer(config).init, jax.random.key(0), batch())["params"]
    assert "w_dist" not in params["block_0"]["attention"]
    assert params["block_1"]["attention"]["w_dist"].shape == (1, 16, 4, 64)
