"""Size and initial weights of the default model."""

import jax
import numpy as np
import pytest
from support import batch_of, primitive

from crystalframer_jax.config import model_config
from crystalframer_jax.configs import default
from crystalframer_jax.model.regressor import CrystalFramer


@pytest.fixture(scope="module")
def params():
    """Initial parameters of the default model, as numpy arrays."""
    model = CrystalFramer(model_config(default.get_config()))
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
