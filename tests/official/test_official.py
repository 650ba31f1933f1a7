"""Parameters of the official implementation, by name and shape, in both directions."""

import dataclasses

import numpy as np
import pytest
from official_states import assert_same, distinct_variables, golden, leaves
from support import random_crystal, small_config

from crystalframer_jax import load_official
from crystalframer_jax.config import ModelConfig, validate_model
from crystalframer_jax.errors import UserError
from crystalframer_jax.official.config import config_from_official
from crystalframer_jax.official.state import OfficialStateError, official_from_variables, variables_from_official

WITHOUT_FRAMES = {"value_pe_angle_real": 0, "frame_method": "no"}
CONFIGS = {
    "max": {},
    "multihead": {"domain": "multihead", **WITHOUT_FRAMES},
    "reci": {"domain": "reci", **WITHOUT_FRAMES},
    "real-reci": {"domain": "real-reci", **WITHOUT_FRAMES},
    "bn": {"norm_type": "bn", "pre_pooling_op": "w+bn+relu", "embedding_dim": (12, 10)},
    "ln": {"norm_type": "ln", "pre_pooling_op": "w+bn+relu", "embedding_dim": (12, 10, 6)},
    "in": {"norm_type": "in", "pre_pooling_op": "w+bn+relu", "embedding_dim": (12, 10)},
    "layer norms": {"t_fixup_init": False},
    "gauss_state x": {"gauss_state": "x"},
    "not normalised": {"normalize_gauss": False},
    "lightweight": {"value_pe_angle_real": 16, "value_pe_angle_wscale": 1.0, "value_pe_dist_coef": 1.5},
    "two targets": {"targets": "a,b", "pre_pooling_op": "w+relu", "embedding_dim": (12, 10)},
    "wider heads": {"k_dim": 5, "v_dim": 3},
}


@pytest.fixture(params=CONFIGS, name="config")
def config_of_each_kind(request) -> ModelConfig:
    return small_config(**CONFIGS[request.param])


# Parameters


def test_variables_come_back_with_the_same_bits(config):
    variables = distinct_variables(config)
    state = official_from_variables(variables, config)
    assert_same(variables_from_official(state, config), variables)
    assert_same(official_from_variables(variables_from_official(state, config), config), state)


@pytest.mark.parametrize("name", ["max", "crystalformer_multihead", "crystalformer_real_reci", "max_bn"])
def test_an_official_state_dict_comes_back(name):
    """The golden files have the names and shapes of the official code."""
    official, state = golden(name)
    config = validate_model(config_from_official(official)[0]).model
    back = official_from_variables(variables_from_official(state, config), config)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    for key, value in state.items():
        assert back[key].dtype == value.dtype, key
        if key.endswith("num_batches_tracked"):
            assert back[key] == 0
        elif key.endswith("pe_dist_proj") and "multihead" in name:
            half = value.shape[1] // 2
            np.testing.assert_array_equal(back[key][:, :half], value[:, :half])
            assert not back[key][:, half:].any() and value[:, half:].any()
        else:
            np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("name", "official", "ours"),
    [
        ("layer norms", "encoder.layers.1.norm1.weight", "params/block_1/norm1/scale"),
        ("layer norms", "encoder.layers.0.norm2.bias", "params/block_0/norm2/bias"),
        ("layer norms", "encoder.norm.weight", "params/norm/scale"),
        ("layer norms", "encoder.norm.bias", "params/norm/bias"),
        ("gauss_state x", "encoder.layers.1.self_attn.lattice_pos_weights", "params/block_1/attention/w_pos"),
        ("ln", "proj_before_pooling.1.weight", "params/pre_pooling_norm/scale"),
        ("ln", "mlp.1.bias", "params/dense_0_norm/bias"),
        ("ln", "mlp.4.weight", "params/dense_1_norm/scale"),
        ("bn", "proj_before_pooling.1.running_mean", "batch_stats/pre_pooling_norm/mean"),
        ("bn", "proj_before_pooling.1.running_var", "batch_stats/pre_pooling_norm/var"),
        ("bn", "mlp.1.running_mean", "batch_stats/dense_0_norm/mean"),
        ("bn", "mlp.1.running_var", "batch_stats/dense_0_norm/var"),
    ],
)
def test_where_parameters_of_normalisations_belong(name, official, ours):
    """What the golden files of the repository do not cover; the names are those of torch.nn in the official model."""
    config = small_config(**CONFIGS[name])
    variables = distinct_variables(config)
    np.testing.assert_array_equal(official_from_variables(variables, config)[official], leaves(variables)[ours])


def test_parameters_without_trained_counterpart():
    """Instance norm has none, and widths that are not normalised are not calibrated."""
    for name, words in (("in", ("mlp.1.", "proj_before_pooling.1.")), ("max", ("norm",)), ("reci", ("pe_dist",))):
        config = small_config(**CONFIGS[name])
        state = official_from_variables(distinct_variables(config), config)
        assert not [key for key in state if any(word in key for word in words)]
    config = small_config(**CONFIGS["not normalised"])
    state = official_from_variables(distinct_variables(config), config)
    for block in range(2):
        np.testing.assert_array_equal(state[f"encoder.layers.{block}.self_attn.gauss_scale"], [0, 0])
        np.testing.assert_array_equal(state[f"encoder.layers.{block}.self_attn.atten_scale"], [0])


def test_what_trained_parameters_change():
    """No calibration, no running averages, no unused names."""
    config = small_config(**CONFIGS["bn"])
    variables = distinct_variables(config)
    state = official_from_variables(variables, config)
    changed = official_from_variables(variables | {"params": distinct_variables(config, 1)["params"]}, config)
    endings = ("gauss_scale", "atten_scale", "running_mean", "running_var", "num_batches_tracked")
    trained = {name for name in state if not name.endswith(endings)}
    for name, value in changed.items():
        assert (value != state[name]).all() if name in trained else (value == state[name]).all(), name


def test_batch_norm_is_the_affine_map_of_its_running_averages():
    """A model with BatchNorm predicts what the same model without predicts with the maps folded into its layers."""
    official, state = golden("max_bn")
    rng = np.random.default_rng(0)
    official |= {"pre_pooling_op": "w+bn+relu", "embedding_dim": [8, 6], "cutoff_radius": 4.0}
    for name, shape in (("proj_before_pooling.0", (8, 32)), ("mlp.0", (6, 8)), ("mlp.3", (1, 6))):
        state[f"{name}.weight"], state[f"{name}.bias"] = rng.normal(size=shape) / 4, rng.normal(size=shape[0])
    folded = {name: value for name, value in state.items() if not name.startswith("mlp.1.")}
    for dense, norm, width in (("proj_before_pooling.0", "proj_before_pooling.1", 8), ("mlp.0", "mlp.1", 6)):
        scale, bias, mean = rng.normal(size=(3, width))
        variance = rng.uniform(0.5, 2, width)
        endings = ("weight", "bias", "running_mean", "running_var")
        for name, value in zip(endings, (scale, bias, mean, variance), strict=True):
            state[f"{norm}.{name}"] = value
        factor = scale / np.sqrt(variance + 1e-5)
        folded[f"{dense}.weight"] = factor[:, None] * state[f"{dense}.weight"]
        folded[f"{dense}.bias"] = factor * (state[f"{dense}.bias"] - mean) + bias
    crystals = [random_crystal(rng, n) for n in (2, 4)]
    expected = load_official(official | {"norm_type": "no"}, _float32(folded)).predict(crystals)
    np.testing.assert_allclose(load_official(official, _float32(state)).predict(crystals), expected, rtol=0, atol=3e-6)
    assert abs(expected[0, 0] - expected[1, 0]) > 1e-3


def _float32(state: dict) -> dict:
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


def test_a_model_that_was_never_trained_is_refused():
    config = small_config()
    state = official_from_variables(distinct_variables(config), config)
    state["encoder.layers.1.self_attn.gauss_scale"] = np.zeros(2, np.float32)
    with pytest.raises(OfficialStateError, match=r"never trained.*layers\.1\.self_attn\.gauss_scale") as error:
        variables_from_official(state, config)
    assert "layers.0." not in str(error.value)
    free = small_config(normalize_gauss=False)
    assert variables_from_official(state, free)["calibration"] == {}


def test_all_that_does_not_fit_is_listed():
    config = small_config(t_fixup_init=False)
    state = official_from_variables(distinct_variables(config), config)
    del state["encoder.norm.weight"], state["mlp.0.bias"]
    state["encoder.layers.0.norm1.bias"] = np.zeros(15, np.float32)
    state["model_xrd.weight"] = np.zeros(1, np.float32)
    with pytest.raises(ValueError) as error:
        variables_from_official(state, config)
    assert isinstance(error.value, UserError)
    problems = str(error.value).split(": ", 1)[1].split("; ")
    assert sorted(problems) == [
        "encoder.layers.0.norm1.bias has shape [15], expected [16]",
        "missing encoder.norm.weight [16]",
        "missing mlp.0.bias [16]",
        "unexpected model_xrd.weight",
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.full(16, np.nan, np.float32), "has values that are not finite in float32"),
        (np.full(16, 1e39), "has values that are not finite in float32"),
        (np.ones(16, np.complex64), "is complex64, not floating-point"),
        (np.ones(16, np.int64), "is int64, not floating-point"),
        (np.ones(16, bool), "is bool, not floating-point"),
    ],
    ids=["nan", "too large", "complex", "integer", "boolean"],
)
def test_numbers_that_no_model_has_are_refused_by_name(value, words):
    config = small_config()
    state = official_from_variables(distinct_variables(config), config)
    with pytest.raises(OfficialStateError) as error:
        variables_from_official(state | {"mlp.0.bias": value}, config)
    assert str(error.value).endswith(f": mlp.0.bias {words}")


def test_errors_are_short_whatever_the_hyperparameters_ask_for():
    """And nothing of that size is allocated."""
    config = small_config()
    state = official_from_variables(distinct_variables(config), config)
    with pytest.raises(OfficialStateError, match=r"^the state dict has 2 blocks, num_layers=10000$"):
        variables_from_official(state, dataclasses.replace(config, num_layers=10_000))
    with pytest.raises(OfficialStateError, match="has 0 blocks, num_layers=2"):
        variables_from_official({}, config)
    with pytest.raises(OfficialStateError) as error:
        variables_from_official(state | {f"model_xrd.{i}" + 1000 * "x": np.zeros(1) for i in range(25)}, config)
    assert str(error.value).endswith("; and 15 more") and len(str(error.value)) < 3000
    for changes in (
        {"model_dim": 2**40, "k_dim": 2**39, "v_dim": 2**39},
        {"model_dim": 10**25, "k_dim": 10**25, "v_dim": 10**25},
        {"value_pe_dist_real": 2**35, "value_pe_angle_real": 2**35},
        {"ff_dim": 2**35},
        {"num_targets": 2**40},
    ):
        with pytest.raises(OfficialStateError, match="expected") as error:
            variables_from_official(state, dataclasses.replace(config, **changes))
        assert len(str(error.value)) < 3000


def test_variables_of_another_model_are_refused():
    config = small_config()
    variables = distinct_variables(small_config(norm_type="bn", embedding_dim=(17,)))
    with pytest.raises(OfficialStateError) as error:
        official_from_variables(variables, config)
    for part in ("unexpected params/dense_0_norm/scale", "params/dense_0/bias has shape [17], expected [16]"):
        assert part in str(error.value)
    with pytest.raises(OfficialStateError, match="missing calibration/block_0/attention/scale"):
        official_from_variables({"params": distinct_variables(config)["params"]}, config)


# Scaling of the targets


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (np.zeros(1), np.ones(3), "target_std has 3 numbers for 1 targets"),
        (np.array([np.nan]), np.ones(1), "target_mean = nan: finite"),
        (np.zeros(1, np.complex64), np.ones(1), "target_mean = 0j: finite"),
        (np.zeros(1), np.zeros(1), "target_std = 0.0 must be positive"),
        (np.zeros(1), -np.ones(1), "target_std = -1.0 must be positive"),
        (np.zeros(1), np.array([np.inf]), "target_std = inf: finite"),
        (np.zeros(1), np.ones(10**5), "target_std has 100000 numbers"),
    ],
)
def test_scaling_that_does_not_fit_the_targets(mean, std, words):
    official, state = golden("max")
    with pytest.raises(OfficialStateError) as error:
        load_official(official, state | {"target_mean": mean, "target_std": std})
    assert words in str(error.value)


@pytest.mark.parametrize("present", [(), ("target_mean",), ("target_std",)])
def test_without_both_mean_and_standard_deviation_the_output_is_raw(present):
    official, state = golden("max")
    (target,) = load_official(official, state | {name: np.full(1, 3.0) for name in present}).targets
    assert (target.unit, target.mean, target.std) == ("raw output", 0.0, 1.0)
    (target,) = load_official(official, state | {"target_mean": np.full(1, 3.0), "target_std": np.full(1, 2.0)}).targets
    assert (target.unit, target.mean, target.std) == ("label units", 3.0, 2.0)
