"""Gradients of whole models, against finite differences."""

import functools

import jax
import numpy as np
import pytest
from support import atom_places, random_variables
from tiny_models import CRYSTALFORMER, FRAME_METHODS, WEIGHTS, batch, evaluate, named_leaves, tiny_config

from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES


def weighted_sum(*arguments):
    return float(np.sum(WEIGHTS * np.asarray(evaluate(*arguments)[0])))


def assert_gradients_equal_finite_differences(config, variables, gradients, train=False, given_frames=None):
    """Along random directions in the space of all parameters, of which each gets a part of length 1."""
    rng, step = np.random.default_rng(42), 2e-6
    sizes = {name: np.linalg.norm(gradient) for name, gradient in named_leaves(gradients).items()}
    vanishing = without_effect(config, train)
    assert {name for name, size in sizes.items() if size < 1e-12} == vanishing
    assert min(size for name, size in sizes.items() if name not in vanishing) > 1e-4  # far above the tolerance
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), variables["params"])
        direction = jax.tree.map(lambda x: x / np.linalg.norm(x), direction)
        ends = []
        for sign in (1, -1):
            params = jax.tree.map(lambda x, d, sign=sign: x + sign * step * d, variables["params"], direction)
            arguments = config, {**variables, "params": params}, batch(np.float64), train, given_frames
            ends.append(weighted_sum(*arguments))
        products = jax.tree.map(lambda g, d: np.sum(g * d), gradients, direction)
        assert abs((ends[0] - ends[1]) / (2 * step) - sum(jax.tree.leaves(products))) < 1e-8


def without_effect(config, train):
    """Parameters with the gradient zero, because what they add is subtracted again."""
    last = config.num_layers - 1
    names = {f"block_{block}/attention/k/bias" for block in range(last + 1)}  # the same for all logits of a row
    if train and config.norm_type == "bn":
        names |= {"dense_0/bias", "pre_pooling/bias", f"block_{last}/linear2/bias"}
    return names


@functools.cache
def framed(method):
    """A model with these frames: its configuration, variables, gradients and frames."""
    config = tiny_config(frame_method=method, num_layers=1)
    with jax.enable_x64(True):
        variables = random_variables(config, dtype=np.float64)
        _, gradients, frames = evaluate(config, variables, batch(np.float64))
    return config, variables, gradients, frames


@pytest.mark.parametrize("method", FRAME_METHODS)
def test_gradients_equal_finite_differences_with_every_frame_method(method, x64):
    """Frames are held fixed; they have no gradient, so that the one with computed frames is the same."""
    _, variables, gradients, frames = framed(method)
    config = framed("max")[0]  # given frames: the method does not matter, one program for all
    _, with_given, _ = evaluate(config, variables, batch(np.float64), False, frames)
    for (name, expected), actual in zip(named_leaves(with_given).items(), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=1e-10 * max(np.abs(expected).max(), 1e-2), err_msg=name
        )
    assert_gradients_equal_finite_differences(config, variables, with_given, False, frames)


def test_frame_methods_give_different_frames_and_predictions():
    """Else the test above would try one method five times."""
    places = atom_places(batch(np.float64))
    for i, first in enumerate(FRAME_METHODS):
        for second in FRAME_METHODS[:i]:
            assert np.abs(framed(first)[3][0][places] - framed(second)[3][0][places]).max() > 0.1, (first, second)
    sizes = [float(np.linalg.norm(framed(method)[2]["embedding"])) for method in FRAME_METHODS]
    assert np.diff(np.sort(sizes)).min() > 1e-4


def test_frames_have_no_gradient(x64):
    """Where frames depend on the parameters, the finite difference with computed frames is another."""
    config, variables, gradients, _ = framed("weighted_pca")
    kernel, step = variables["params"]["block_0"]["attention"]["q"]["kernel"], 1e-5
    direction = np.random.default_rng(43).normal(size=kernel.shape)
    ends = []
    for sign in (1, -1):
        params = jax.tree.map(lambda x: x, variables["params"])
        params["block_0"]["attention"]["q"]["kernel"] = kernel + sign * step * direction
        ends.append(weighted_sum(config, {**variables, "params": params}, batch(np.float64)))
    difference = (ends[0] - ends[1]) / (2 * step)
    gradient = np.sum(gradients["block_0"]["attention"]["q"]["kernel"] * direction)
    assert abs(difference - gradient) > 1e-4


DIFFERENTIATED = {  # changes of the configuration, and whether in training mode
    "lightweight": (
        {
            "value_pe_angle_real": 16,
            "value_pe_angle_wscale": 1.0,
            "value_pe_dist_coef": 1.5,
            "value_pe_angle_coef": 6.0,
            "frame_method": "max_static",
            "num_layers": 1,
            "gauss_state": "1",
            "norm_type": "in",
        },
        False,
    ),
    "layer norms, ln, |cos|, max pooling": (
        {
            "t_fixup_init": False,
            "norm_type": "ln",
            "pre_pooling_op": "w+bn+relu",
            "embedding_dim": (8, 8),
            "cos_abs": 1,
            "frame_method": "lattice",
            "pooling": "max",
            "num_layers": 1,
        },
        False,
    ),
    "reci": (CRYSTALFORMER | {"num_layers": 1, "domain": "reci", "gauss_state": "q-kdim"}, False),
    "RECI": (CRYSTALFORMER | {"num_layers": 1, "domain": "RECI", "t_fixup_init": False}, False),
    "multihead": (CRYSTALFORMER | {"num_layers": 1, "domain": "multihead", "gauss_state": "x-xn2"}, False),
    "real-reci": (CRYSTALFORMER | {"domain": "real-reci", "norm_type": "bn", "pre_pooling_op": "w+bn+relu"}, True),
    "reci-real": (CRYSTALFORMER | {"domain": "reci-real", "gauss_state": "x", "norm_type": "bn"}, False),
    "real-RECI": (CRYSTALFORMER | {"domain": "real-RECI", "dropout": 0.2}, True),
    "RECI-real": (CRYSTALFORMER | {"domain": "RECI-real", "normalize_gauss": False}, False),
}


def test_every_domain_is_differentiated():
    domains = {tiny_config(**changes).domain for changes, _ in DIFFERENTIATED.values()}
    assert domains == set(ALLOWED_VALUES["domain"])


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_equal_finite_differences(name, x64):
    changes, train = DIFFERENTIATED[name]
    if changes.get("pre_pooling_op"):
        changes = {"embedding_dim": (8, 8)} | changes
    config = tiny_config(lattice_range=1, scale_reci=(1.2,), **changes)
    variables = random_variables(config, dtype=np.float64)
    _, gradients, _ = evaluate(config, variables, batch(np.float64), train)
    assert_gradients_equal_finite_differences(config, variables, gradients, train)
