"""Hyperparameters of the official implementation, in both directions."""

import dataclasses

import numpy as np
import pytest
from official_states import golden

from crystalframer_jax import load_official
from crystalframer_jax.config import ConfigError, TrainConfig, validate
from crystalframer_jax.config.hyperparameters import NEUTRAL_VALUES, TRAINING_KEYS, WITHOUT_COUNTERPART
from crystalframer_jax.configs import default
from crystalframer_jax.official.config import OFFICIAL_ALONE, OURS_ALONE, config_from_official, official_from_config


def test_every_official_hyperparameter_comes_back():
    official, _ = golden("max")
    config, left_out = config_from_official(official)
    validate(config)
    assert not left_out and config.target_set == ""
    back = official_from_config(config)
    named_here = ("experiment_name",)  # of a run, and of no meaning to the model
    assert {key: back[key] for key in back if key not in named_here} == {
        key: value for key, value in official.items() if key not in named_here
    }
    again, _ = config_from_official(back)
    assert again == config


def test_official_spellings():
    official, _ = golden("max")
    changes = {"norm_type": "id", "scale_real": 1.7, "scale_reci": [2], "targets": ["a", "b"], "param_file": "x.json"}
    config, left_out = config_from_official(official | changes | {"target_set": "mp_flla_2015"})
    assert not left_out and config.norm_type == "no"
    assert (config.scale_real, config.scale_reci, config.targets) == ((1.7,), (2,), ("a", "b"))
    assert config.target_set == "mp_flla_2015"
    assert config_from_official(official | {"target_set": "jarvis__nowhere"})[0].target_set == ""
    assert official_from_config(config)["targets"] == ["a", "b"]


# Training settings of the official code, as its files give them.
AVAILABLE = [
    *({"optimizer": name} for name in ("adamw", "adam")),
    {"optimizer": "sgd", "momentum": 0.7, "lr": 0.1},
    *(
        {"lr_sch": f"inverse_sqrt_{name}", "sch_params": [100.0]}
        for name in ("nowarmup", "nowarmup_dmodel", "warmup", "warmup_lrmax")
    ),
    {"lr_sch": "const", "sch_params": []},
    {"lr_sch": "multistep", "sch_params": [100.0, 200.0]},
    *({"loss_func": name} for name in ("L1", "MSE", "Smooth_L1")),
    *({"normalize_targets": name} for name in ("scale_bias", "scale", "bias", "no")),
    {"clip_norm": 0.0, "clip_grad": 0.5, "weight_decay": 0.0, "adam_betas": [0.8, 0.9], "seed": 0},
    {"n_epochs": 20, "swa_epochs": 5, "freeze_bn_epochs": 7},
    {"train_filter_min": 60, "train_filter_max": 200},
    {"train_filter_max": 200},
    {"train_percent_check": 0.5, "val_percent_check": 0.25, "model_checkpoint_save_top_k": 3},
]


@pytest.mark.parametrize("changes", AVAILABLE, ids=str)
def test_training_settings_are_taken_over_in_both_directions(changes):
    official, _ = golden("max")
    config, left_out = config_from_official(official | changes)
    validate(config)
    assert not left_out
    for key, value in changes.items():
        assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
    back = official_from_config(config)
    assert {key: back[key] for key in changes} == changes
    assert config_from_official(back)[0] == config


def test_momentum_is_written_for_sgd_alone():
    """The JSON files of the official code do not have it; its script reads it for sgd."""
    official, _ = golden("max")
    config, left_out = config_from_official(official | {"optimizer": "adam", "momentum": 0.7})
    assert not left_out and config.momentum == 0.7
    assert "momentum" not in official_from_config(config)
    config = dataclasses.replace(config, optimizer="sgd")
    assert official_from_config(config)["momentum"] == 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lion"},
        {"optimizer": "lion", "adam_betas": [0.95, 0.98]},
        {"lr_sch": "polynomial", "sch_params": [100.0]},
        {"lr_sch": "multistep", "sch_params": []},
        {"lr_sch": "inverse_sqrt_warmup", "sch_params": [100.0, 200.0]},
        {"loss_func": "huber"},
        {"normalize_targets": "min_max"},
        {"momentum": 1.0},
        {"clip_grad": -1.0},
        {"adam_betas": [0.9, 1.0]},
        {"n_epochs": 20, "swa_epochs": 20},
        {"freeze_bn_epochs": -1},
        {"train_filter_min": 200, "train_filter_max": 60},
        {"train_percent_check": 1.5},
        {"val_percent_check": 0.0},
        {"model_checkpoint_save_top_k": 0},
        {"model_checkpoint_save_top_k": -1},
        {"seed": "abc"},
    ],
    ids=str,
)
def test_training_settings_that_are_not_available_do_not_keep_a_model_out(changes):
    official, _ = golden("max")
    config, left_out = config_from_official(official | {"lr": 0.1} | changes)
    validate(config)
    assert left_out == [f"{key}={value!r}" for key, value in changes.items()]
    for key in changes:
        assert getattr(config, key) == getattr(TrainConfig(), key)
    assert config.lr == 0.1, "the others are taken over"


def test_hyperparameters_of_the_model_are_not_guessed():
    """For absent keys the official code takes cos_abs=1, pooling=max, norm_type=bn and others, not our defaults."""
    official, state = golden("max")
    for key in official.keys() - set(TRAINING_KEYS) - set(WITHOUT_COUNTERPART):
        for without in ({k: v for k, v in official.items() if k != key}, official | {key: None}):
            with pytest.raises(ConfigError, match=rf"missing: {key}; give .*--config=FILE\.json"):
                config_from_official(without)
    for key in set(TRAINING_KEYS) | set(WITHOUT_COUNTERPART):
        config_from_official({k: v for k, v in official.items() if k != key})
    del official["pooling"], official["cos_abs"]
    with pytest.raises(ConfigError, match="missing: cos_abs, pooling;"):
        load_official(official, state)


def test_every_official_key_has_its_value_in_one_place():
    assert not OFFICIAL_ALONE.keys() & NEUTRAL_VALUES.keys()
    assert not OFFICIAL_ALONE.keys() & default.get_config().keys()
    assert default.get_config().keys() - golden("max")[0].keys() == {*OURS_ALONE, "momentum"}
    exported = official_from_config(TrainConfig()).keys()
    assert exported == golden("max")[0].keys()
    assert (OFFICIAL_ALONE | NEUTRAL_VALUES).keys() >= exported & WITHOUT_COUNTERPART.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({5: 1}, "the hyperparameter 5 is a int, not a name"),
        ({"targets": 5}, "targets=5 is neither a name nor"),
        ({"targets": ["a", 5]}, "targets=['a', 5] is neither a name nor"),
        ({"domain": {"real": 1}}, "domain={'real': 1} is not a number"),
        ({"use_cgcnn_feat": np.zeros(3)}, "use_cgcnn_feat=array([0., 0., 0.]) is not a number"),
        ({"embedding_dim": [[32]]}, "embedding_dim=[[32]] is not a number"),
        ({"domain": 5000 * "r"}, "domain='rrrr"),
        ({"scale_real": 5000 * [1.4]}, "scale_real=[1.4, 1.4,"),
        ({"value_pe_dist_coef": 10**400}, "value_pe_dist_coef=1000"),
        ({5000 * "k": 1}, "the hyperparameter 'kkk"),
    ],
    ids=str,
)
def test_hyperparameters_that_are_no_plain_values_are_errors_of_one_line(changes, words):
    official, _ = golden("max")
    with pytest.raises(ConfigError) as error:
        config_from_official(official | changes)
    assert words in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cgcnn_feat": True}, "use_cgcnn_feat=True is not available: the official code never defines"),
        ({"value_pe_wave_real": 4}, "value_pe_wave_real=4 is not available"),
        ({"value_pe_dist_reci": 64}, "value_pe_dist_reci=64 is not available"),
        ({"gauss_state": "x-xn"}, "gauss_state='x-xn'"),
        ({"frame_method": "max_wo_orthogonal"}, "frame_method='max_wo_orthogonal'"),
        ({"model_dim": "wide"}, "model_dim='wide' is of the wrong type"),
        ({"num_layer": 4}, "num_layer"),
    ],
)
def test_models_that_are_not_available_are_refused(changes, words):
    official, _ = golden("max")
    with pytest.raises(ConfigError) as error:
        config_from_official(official | changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"k_dim": 5}, "k_dim=5"),
        ({"v_dim": 5}, "v_dim=5"),
        ({"embedding_dim": ()}, "embedding_dim=()"),
        ({"pre_pooling_op": "w+relu"}, "embedding_dim=(128,)"),
    ],
)
def test_models_that_the_official_code_cannot_hold_are_not_written_for_it(changes, word):
    config = default.get_config()
    config.update(changes)
    with pytest.raises(ConfigError) as error:
        official_from_config(validate(config))
    assert word in str(error.value)
