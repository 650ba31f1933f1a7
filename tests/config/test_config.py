"""Configurations: what can be run is accepted, and what cannot is refused with the key and what is allowed."""

import dataclasses
import importlib
import json
import typing

import numpy as np
import pytest
from support import ROOT

from crystalframer_jax.config import BatchParts, ConfigError, check_overrides, validate, validate_model
from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES, KEYS, TRAINING_KEYS, WITHOUT_COUNTERPART
from crystalframer_jax.configs import default
from crystalframer_jax.data.registry import TARGET_SETS, target_set
from crystalframer_jax.inference.evaluation import frame_draws
from crystalframer_jax.runs.run_directory import as_json
from crystalframer_jax.structures.neighbors import LatticeBox

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "variants"))

PAPER = ("jarvis", "megnet", "oqmd")  # see test_paper_configs.py

# One value that is not available for each key of ALLOWED_VALUES, of the type of the key.
REFUSED = {
    "task": "ranking",
    "domain": "reci-multihead",
    "frame_method": "max_wo_orthogonal",
    "t_activation": "tanh",
    "pooling": "sum",
    "pre_pooling_op": "w",
    "norm_type": "gn",
    "gauss_state": "x-xn",
    "cos_abs": 2,
    "precision": "float16",
    "optimizer": "lion",
    "lr_sch": "polynomial",
    "loss_func": "huber",
    "ties": "first",
    "ensemble_combine": "mode",
    "normalize_targets": "min_max",
}
CRYSTALFORMER = {"value_pe_angle_real": 0}

# Changes of the default configuration that do not go together, and words that the message must hold.
IMPOSSIBLE = [
    ({"targets": ""}, ["targets"]),
    ({"targets": "e_form, e_form"}, ["targets", "different"]),
    ({"freeze_bn_epochs": 2000}, ["freeze_bn_epochs=2000", "smaller than n_epochs=2000"]),
    ({"seed": 2**32}, ["seed=4294967296", "below"]),
    ({"gauss_lb_real": 1.0}, ["gauss_lb_real", "below 1"]),
    ({"gauss_lb_reci": 1.0}, ["gauss_lb_reci", "below 1"]),
    ({"dropout": 1.0}, ["dropout", "below 1"]),
    ({"head_num": 7}, ["head_num=7", "model_dim=128"]),
    ({"head_num": 7, "k_dim": 16}, ["head_num=7", "model_dim=128"]),
    (
        CRYSTALFORMER | {"domain": "multihead", "head_num": 5, "k_dim": 16, "v_dim": 16},
        ["head_num=5", "even", "multihead"],
    ),
    ({"scale_real": (1.4,) * 5}, ["scale_real", "4 blocks"]),
    ({"scale_real": ()}, ["scale_real"]),
    ({"scale_real": (1.4, 1.4, 0.0, 1.4)}, ["scale_real", "positive"]),
    ({"scale_reci": (2.2,) * 5}, ["scale_reci", "4 blocks"]),
    ({"scale_reci": ()}, ["scale_reci"]),
    ({"scale_reci": (2.2, -2.2)}, ["scale_reci", "positive"]),
    ({"value_pe_dist_max": 0.0}, ["value_pe_dist_max"]),
    ({"value_pe_angle_real": 1}, ["value_pe_angle_real=1", "at least 2"]),
    ({"frame_method": "no"}, ["value_pe_angle_real=64", "frame_method"]),
    ({"pre_pooling_op": "w+relu", "embedding_dim": ()}, ["pre_pooling_op", "embedding_dim"]),
    ({"pre_pooling_op": "w+bn+relu", "embedding_dim": ()}, ["pre_pooling_op", "embedding_dim"]),
    ({"swa_epochs": 2000}, ["swa_epochs=2000", "n_epochs=2000"]),
    ({"n_epochs": 20}, ["swa_epochs=50", "n_epochs=20"]),
    ({"lr_sch": "multistep", "sch_params": ()}, ["sch_params=()", "multistep", "steps of its drops"]),
    ({"lr_sch": "multistep", "sch_params": (100.0, 0.0)}, ["sch_params=(100.0, 0.0)", "multistep"]),
    ({"lr_sch": "cosine", "sch_params": (-1.0,)}, ["sch_params=(-1.0,)", "cosine"]),
    ({"adam_betas": (0.9,)}, ["adam_betas"]),
    ({"adam_betas": (0.9, 1.0)}, ["adam_betas"]),
    ({"adam_betas": (-0.1, 0.9)}, ["adam_betas"]),
    ({"ema_decay": 1.0}, ["ema_decay=1.0", "below 1"]),
    ({"momentum": 1.0}, ["momentum=1.0", "below 1"]),
    ({"train_percent_check": 1.01}, ["train_percent_check=1.01", "share"]),
    ({"val_percent_check": 50.0}, ["val_percent_check=50.0", "share"]),
    ({"train_filter_min": 60, "train_filter_max": 59}, ["train_filter_max=59", "train_filter_min=60"]),
    ({"reinit_layers": "output"}, ["reinit_layers='output'", "pretrained_model"]),
    ({"embedding_dim": (128, 0)}, ["embedding_dim"]),
]
IMPOSSIBLE += [
    ({"lr_sch": name, "sch_params": params}, [f"sch_params={params}", f"lr_sch='{name}'", "one number of steps"])
    for name in ALLOWED_VALUES["lr_sch"]
    for params in ((), (100.0, 200.0))
    if name not in ("const", "multistep")
]
IMPOSSIBLE += [
    ({"lr_sch": name, "sch_params": (0.0,)}, ["sch_params=(0.0,)", f"lr_sch='{name}'", "positive"])
    for name in ALLOWED_VALUES["lr_sch"]
    if name.startswith("inverse_sqrt")
]
IMPOSSIBLE += [
    ({"domain": domain, "frame_method": method}, [f"domain='{domain}'", "no frames", "value_pe_angle_real=0"])
    for domain in ALLOWED_VALUES["domain"]
    for method in ("max", "max_static", "weighted_pca", "pca", "lattice")
    if domain != "real"
]


def changed(**changes):
    config = default.get_config()
    config.update(changes)
    return config


def with_limit(limit) -> list[str]:
    """The keys whose rows have a limit."""
    return [key for key, row in KEYS.items() if limit in row.metadata["limits"]]


def refusal(config) -> str:
    """The one-line message with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        validate(config)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_can_be_run(name):
    module = importlib.import_module(f"crystalframer_jax.configs.{name}")
    config = module.get_config()
    validate(config)
    if config.target_set in TARGET_SETS:
        for target in validate(config).targets:
            assert target_set(config.target_set).target(target).unit
    else:
        assert name in PAPER, "an experiment on data that nobody can get"
    if name != "default":
        assert f"crystalframer train --config={name}" in module.__doc__, "the file states the command that runs it"


def test_an_unknown_key_is_refused_with_the_nearest_name():
    config = default.get_config()
    config.value_pe_dist_rael = 64
    assert "'value_pe_dist_rael'" in refusal(config) and "'value_pe_dist_real'" in refusal(config)


def test_an_unknown_key_that_resembles_none_is_refused_without_a_guess():
    config = default.get_config()
    config.zzzz = 1
    assert "'zzzz'" in refusal(config) and "did you mean" not in refusal(config)


@pytest.mark.parametrize("key", sorted(WITHOUT_COUNTERPART))
def test_official_keys_without_counterpart_say_what_replaces_them(key):
    config = default.get_config()
    assert key not in config
    config[key] = 1
    assert refusal(config).startswith(key) and WITHOUT_COUNTERPART[key] in refusal(config)


@pytest.mark.parametrize("value", [True, False])
def test_the_undefined_atom_features_are_refused_with_the_reason(value):
    config = default.get_config()
    config.use_cgcnn_feat = value
    assert "use_cgcnn_feat" in refusal(config) and "never defines these atom features" in refusal(config)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("scale_recip", "scale_reci"),
        ("normalise_gauss", "normalize_gauss"),
        ("latice_range", "lattice_range"),
        ("frame_metod", "frame_method"),
        ("num_frame_sample", "num_frame_samples"),
    ],
)
def test_the_nearest_name_is_the_one_that_was_meant(misspelt, meant):
    config = default.get_config()
    config[misspelt] = config[meant]
    assert f"did you mean '{meant}'?" in refusal(config)


def test_a_missing_key_is_refused():
    config = default.get_config()
    del config.tie_tolerance
    assert "tie_tolerance is missing" in refusal(config)


def test_a_value_is_listed_here_for_every_key_with_allowed_values():
    assert REFUSED.keys() == ALLOWED_VALUES.keys()


@pytest.mark.parametrize("key", sorted(ALLOWED_VALUES))
def test_values_that_are_not_available_are_refused_with_the_allowed_ones(key):
    for value in ALLOWED_VALUES[key]:
        without_frames = (key == "frame_method" and value == "no") or (key == "domain" and value != "real")
        validate(changed(**{key: value}, **(CRYSTALFORMER if without_frames else {})))
    message = refusal(changed(**{key: REFUSED[key]}))
    assert f"{key}={REFUSED[key]!r}" in message
    for value in ALLOWED_VALUES[key]:
        assert repr(value) in message


@pytest.mark.parametrize("key", with_limit(">0"))
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_must_be_positive(key, value):
    assert f"{key}={value}" in refusal(changed(**{key: value})) and "positive" in refusal(changed(**{key: value}))


@pytest.mark.parametrize("key", with_limit(">=0"))
def test_numbers_that_must_not_be_negative(key):
    assert f"{key}=-1" in refusal(changed(**{key: -1})) and "negative" in refusal(changed(**{key: -1}))


@pytest.mark.parametrize(
    "key",
    ["lr", "weight_decay", "cutoff_radius", "adaptive_cutoff_sigma", "dropout", "ema_decay", "checkpoint_minutes"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(key, value):
    assert f"{key}={value}" in refusal(changed(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("t_fixup_init", 1),
        ("normalize_gauss", "yes"),
        ("num_layers", 4.0),
        ("lattice_range", True),
        ("cos_abs", True),
        ("domain", 3),
        ("dropout", "0.1"),
        ("scale_reci", 2.2),
        ("scale_real", (1.4, "1.4")),
        ("embedding_dim", (128.0,)),
        ("precision", ("float32",)),
        ("optimizer", ("sgd",)),
        ("sch_params", 4000.0),
        ("sch_params", ("4000",)),
        ("momentum", "0.9"),
        ("ema_decay", None),
        ("train_percent_check", "half"),
        ("val_percent_check", (1.0,)),
        ("train_filter_max", 60.0),
        ("freeze_bn_epochs", 1.5),
        ("model_checkpoint_save_top_k", True),
        ("keep_last_checkpoints", 2.0),
        ("checkpoint_minutes", "10"),
        ("ensemble_size", 3.0),
        ("reinit_layers", ("output",)),
        ("frozen_layers", 0),
    ],
)
def test_values_of_another_type_are_refused(key, value):
    config = default.get_config()
    with config.ignore_type():
        config[key] = value
    assert f"{key}={value!r} is of the wrong type; the default is {default.get_config()[key]!r}" in refusal(config)


@pytest.mark.parametrize(("changes", "words"), IMPOSSIBLE, ids=[str(changes) for changes, _ in IMPOSSIBLE])
def test_impossible_combinations_are_refused(changes, words):
    message = refusal(changed(**changes))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "changes",
    [
        {"head_num": 7, "k_dim": 16, "v_dim": 16},
        CRYSTALFORMER | {"domain": "multihead", "head_num": 6, "k_dim": 16, "v_dim": 16},
        CRYSTALFORMER | {"domain": "real-reci", "head_num": 5, "k_dim": 16, "v_dim": 16},
        {"scale_real": (1.4, 1.5, 1.6, 1.7)},
        {"scale_real": (1.4, 1.5), "scale_reci": (2.2, 2.0, 1.8)},
        {"adaptive_cutoff_sigma": 3.5},
        {"adaptive_cutoff_sigma": 0.0},
        {"adaptive_cutoff_sigma": 3.5, "cutoff_radius": 7.0},
        {"value_pe_dist_max": 0.0, "value_pe_dist_real": 0},
        {"frame_method": "no", "value_pe_angle_real": 0},
        {"n_epochs": 20, "swa_epochs": 19},
        {"n_epochs": 20, "swa_epochs": 0},
        {"embedding_dim": ()},
        {"pre_pooling_op": "relu", "embedding_dim": ()},
        {"targets": "e_form, e_above_hull"},
        {"dropout": 0.99, "gauss_lb_reci": 0.99},
        {"t_fixup_init": False, "normalize_gauss": False, "scale_grad": 5.0},
        {"lr_sch": "const", "sch_params": ()},
        {"lr_sch": "const", "sch_params": (1.0, 2.0)},
        {"lr_sch": "multistep", "sch_params": (100.0, 200.0)},
        {"lr_sch": "multistep", "sch_params": (200, 100)},
        {"lr_sch": "cosine", "sch_params": (0.0,)},
        {"adam_betas": (0.0, 0.999)},
        {"ema_decay": 0.9999, "momentum": 0.0},
        {"ema_decay": 0.0, "momentum": 0.99},
        {"train_percent_check": 0.01, "val_percent_check": 1},
        {"train_filter_min": 60, "train_filter_max": 60},
        {"train_filter_min": 60, "train_filter_max": 0},
        {"freeze_bn_epochs": 1999, "keep_last_checkpoints": 1, "checkpoint_minutes": 0.5},
        {"frozen_layers": "embedding,block_0/attention"},
        {"reinit_layers": "output,dense_0", "pretrained_model": "runs/quickstart"},
    ],
    ids=str,
)
def test_neighbors_of_the_impossible_combinations_are_accepted(changes):
    validate(changed(**changes))


def test_a_trained_model_does_not_depend_on_how_it_was_trained():
    """validate_model judges the model alone, and whatever is not judged there is judged by validate."""
    training = {"optimizer": "lion", "swa_epochs": 5000, "lr": -1.0, "batch_size": 0, "loss_func": "huber"}
    for key, value in training.items():
        config = changed(**{key: value})
        assert key in TRAINING_KEYS
        validate_model(config)
        assert f"{key}={value!r}" in refusal(config)
    with pytest.raises(ConfigError, match="domain='real-real'"):
        validate_model(changed(domain="real-real"))


def test_targets_are_names_separated_by_commas():
    assert validate(changed(targets="e_form")).targets == ("e_form",)
    assert validate(changed(targets=" e_form,e_above_hull ,")).targets == ("e_form", "e_above_hull")


def test_targets_and_target_sets_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"'band_gap'.*mp_flla_2015.*e_form, e_above_hull"):
        target_set("mp_flla_2015").target("band_gap")
    with pytest.raises(ConfigError, match=r"target_set='oqmd'.*mp_flla_2015"):
        target_set("oqmd")


def test_misspelt_overrides_of_the_command_line_are_refused():
    check_overrides(["scripts/train.py", "--config=configs/quickstart.py", "--config.lr=1e-3", "--workdir=x"])
    check_overrides(["-config.n_epochs=3"])
    with pytest.raises(ConfigError, match=r"'n_epoch'.*'n_epochs'"):
        check_overrides(["scripts/train.py", "--config.n_epoch=3"])
    with pytest.raises(ConfigError, match="minimum_range has no counterpart"):
        check_overrides(["--config.minimum_range=True"])


def test_every_official_hyperparameter_is_known():
    golden = np.load(ROOT / "tests" / "golden" / "max.npz")
    official = json.loads(golden["config_json"].tobytes())
    assert len(official) > 60
    unknown = official.keys() - default.get_config().keys() - WITHOUT_COUNTERPART.keys()
    assert not unknown


def test_the_defaults_that_the_paper_states():
    """The JARVIS setting; 951,809 parameters are checked where the model is built."""
    config = default.get_config()
    stated = {"num_layers": 4, "model_dim": 128, "head_num": 8, "ff_dim": 512, "batch_size": 256, "n_epochs": 2000}
    stated |= {"lr": 5e-4, "adam_betas": (0.9, 0.98), "sch_params": (4000.0,), "weight_decay": 1e-5, "clip_norm": 1.0}
    stated |= {"bias_weight_decay": 0.01, "swa_epochs": 50, "value_pe_dist_real": 64, "value_pe_angle_real": 64}
    stated |= {"scale_real": (1.4,), "gauss_lb_real": 0.5, "positive_func_beta": 0.1, "adaptive_cutoff_sigma": -3.5}
    stated |= {"scale_reci": (2.2,), "gauss_lb_reci": 0.5, "lattice_range": 2, "value_pe_angle_wscale": 4.0}
    stated |= {"frame_method": "max", "domain": "real", "dropout": 0.0, "t_fixup_init": True, "norm_type": "no"}
    assert {key: config[key] for key in stated} == stated


def test_the_radius_is_that_of_the_widest_gaussian_or_the_one_given():
    assert validate(changed()).cutoff == pytest.approx(6.9296, abs=1e-4)  # 3.5 * 1.4 / sqrt(0.5)
    assert validate(changed(scale_real=(1.4, 1.4, 2.8, 1.4))).cutoff == pytest.approx(2 * 6.929646, abs=1e-5)
    assert validate(changed(adaptive_cutoff_sigma=-7.0)).cutoff == pytest.approx(2 * 6.929646, abs=1e-5)
    assert validate(changed(gauss_lb_real=0.125)).cutoff == pytest.approx(2 * 6.929646, abs=1e-5)
    assert validate(changed(cutoff_radius=8)).cutoff == 8.0


def test_the_sign_of_adaptive_cutoff_sigma_makes_no_difference():
    for sigma in (3.5, 5.0):
        assert validate(changed(adaptive_cutoff_sigma=sigma)).cutoff == pytest.approx(sigma * 1.4 / 0.5**0.5)
        assert validate(changed(adaptive_cutoff_sigma=-sigma)).cutoff == pytest.approx(sigma * 1.4 / 0.5**0.5)


def test_without_adaptive_cutoff_the_neighbors_are_a_box_of_images():
    assert validate(changed(adaptive_cutoff_sigma=0.0)).cutoff == LatticeBox(2)
    assert validate(changed(adaptive_cutoff_sigma=0.0, lattice_range=1)).cutoff == LatticeBox(1)
    assert validate(changed(adaptive_cutoff_sigma=0.0, cutoff_radius=6.5)).cutoff == 6.5


def test_the_model_part_of_a_configuration():
    model = validate_model(changed(scale_real=[1.4, 1.5, 1.6, 1.7], embedding_dim=[64, 32], targets="a,b")).model
    assert (model.k_dim, model.v_dim) == (16, 16)
    assert (model.num_targets, model.embedding_dim, model.scale_of_block(2)) == (2, (64, 32), 1.6)
    assert model.uses_frames and hash(model) == hash(model)
    model = validate_model(changed(k_dim=24, value_pe_angle_real=0, frame_method="no")).model
    assert (model.k_dim, model.v_dim, model.scale_of_block(3)) == (24, 16, 1.4)
    assert not model.uses_frames


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"targets": " a, b", "scale_real": [1.4, 1.5], "k_dim": 24},
        {"embedding_dim": (), "sch_params": (100, 200.0), "lr_sch": "multistep", "lr": 1},
        {"targets": ["a", "b"], "pretrained_model": "runs/a", "value_pe_angle_real": 0, "frame_method": "no"},
    ],
    ids=str,
)
def test_a_frozen_configuration_is_stored_as_the_user_gave_it(changes):
    config = default.get_config()
    with config.ignore_type():
        config.update({"targets": changes.get("targets", config.targets)})
    config.update({key: value for key, value in changes.items() if key != "targets"})
    given = json.loads(config.to_json())
    targets = given["targets"] if isinstance(given["targets"], list) else given["targets"].split(",")
    frozen = validate(config)
    stored = as_json(frozen)
    assert json.loads(json.dumps(stored)) == stored
    assert stored == given | {"targets": ",".join(name.strip() for name in targets)}
    assert validate(stored) == validate(frozen) == frozen and hash(validate(stored)) == hash(frozen)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.lr = 1.0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_stored_as_they_are(name):
    config = importlib.import_module(f"crystalframer_jax.configs.{name}").get_config()
    assert as_json(validate(config)) == json.loads(config.to_json())


@pytest.mark.parametrize("key", KEYS)
def test_the_default_of_a_row_is_of_its_type(key):
    default_value, kind = KEYS[key].default, KEYS[key].type
    of_elements = typing.get_args(kind)[:1] or (kind,)
    values = default_value if typing.get_origin(kind) is tuple else (default_value,)
    assert values is default_value or not isinstance(default_value, tuple)
    assert [type(value) for value in values] == [*of_elements] * len(values)


def test_the_domains_of_an_interleaving_take_turns():
    def domains(domain):
        model = validate_model(changed(domain=domain, **CRYSTALFORMER)).model
        return [model.domain_of_block(block) for block in range(4)]

    for domain in ("real", "reci", "RECI", "multihead"):
        assert domains(domain) == [domain] * 4
    assert domains("real-reci") == ["real", "reci", "real", "reci"]
    assert domains("RECI-real") == ["RECI", "real", "RECI", "real"]


def test_several_scales_take_turns():
    model = validate_model(changed(scale_real=(1.4, 1.5), scale_reci=(2.2, 2.0, 1.8))).model
    assert [model.scale_of_block(block) for block in range(4)] == [1.4, 1.5, 1.4, 1.5]
    assert [model.reciprocal_scale_of_block(block) for block in range(4)] == [2.2, 2.0, 1.8, 2.2]
    model = validate_model(changed()).model
    assert [model.reciprocal_scale_of_block(block) for block in range(4)] == [2.2] * 4


@pytest.mark.parametrize("domain", ALLOWED_VALUES["domain"])
def test_reciprocal_domains_need_the_atoms_of_each_cell(domain):
    parts = validate_model(changed(domain=domain, **CRYSTALFORMER)).model.parts
    assert parts == BatchParts(cells=domain != "real", lattice_frames=False, scatter=False, dtype="float32")


@pytest.mark.parametrize("method", ALLOWED_VALUES["frame_method"])
def test_lattice_and_pca_frames_need_parts_of_their_own(method):
    angles = 0 if method == "no" else 64
    model = validate_model(changed(frame_method=method, value_pe_angle_real=angles)).model
    assert model.parts == BatchParts(
        cells=False, lattice_frames=method == "lattice", scatter=method == "pca", dtype="float32"
    )
    assert model.uses_frames == (method != "no")
    without_angles = validate_model(changed(frame_method=method, value_pe_angle_real=0)).model
    assert without_angles.parts == BatchParts() and not without_angles.uses_frames


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")]
)
def test_batches_have_the_type_of_the_lattice_sums(precision, dtype):
    model = validate_model(changed(precision=precision)).model
    assert model.parts.dtype == model.dtype.name == dtype


# Bounds: what nobody needs would take all memory, or no end

ABSURD = {
    "num_layers": 10**9,
    "model_dim": 2**31,
    "ff_dim": 10**12,
    "head_num": 10**6,
    "k_dim": 10**7,
    "embedding_dim": (128, 10**9),
    "lattice_range": 10**5,
    "cutoff_radius": 1000.0,
    "num_frame_samples": 10**9,
    "value_pe_dist_real": 10**8,
    "value_pe_angle_real": 10**8,
    "batch_size": 10**9,
    "n_epochs": 10**12,
    "ensemble_size": 10**6,
    "seed": 10**5000,  # more digits than Python writes
    "lr": 10**400,  # no float
    "sch_params": (1.0,) * 10_000,
    "targets": ",".join(f"t{number}" for number in range(2000)),
    "data_dir": "x" * 10_000,
    "target_set": "x" * 10_000,
}


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_are_refused_by_name(key):
    for check in (validate, validate_model):  # of a user, of a run directory
        with pytest.raises(ConfigError, match=key) as error:
            check(changed().to_dict() | {key: ABSURD[key]})
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("key", KEYS)
def test_no_integer_is_without_bounds(key):
    default = KEYS[key].default
    first = default[0] if isinstance(default, tuple) else default
    if isinstance(first, int) and not isinstance(first, bool):
        value = (2**40,) if isinstance(default, tuple) else 2**40
        with pytest.raises(ConfigError, match=key):
            validate(changed().to_dict() | {key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 200, "model_dim": 8192}, "parameters"),
        ({"ff_dim": 1_000_000, "model_dim": 1024}, "parameters"),
        ({"embedding_dim": (60_000, 60_000)}, "parameters"),
        ({"value_pe_dist_real": 4000, "value_pe_angle_real": 4000, "v_dim": 60_000, "k_dim": 1}, "parameters"),
        ({"scale_real": (30.0,)}, "a cutoff of 148.492 Å"),
        ({"gauss_lb_real": 1e-300}, "make a cutoff of"),
        ({"adaptive_cutoff_sigma": -1e9}, "make a cutoff of"),
    ],
)
def test_absurd_combinations_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        validate_model(changed().to_dict() | changes)
    assert all(key in str(error.value) for key in changes if key[:8] != "value_pe")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 24, "model_dim": 1024, "ff_dim": 4096, "head_num": 16},  # 300 million parameters
        {"cutoff_radius": 20.0},
        {"num_frame_samples": 1024},
        {"n_epochs": 100_000},
        {"batch_size": 16_384},
        {"lattice_range": 4, "domain": "reci", "value_pe_angle_real": 0},
        {"ensemble_size": 100},
        {"seed": 2**32 - 1},
    ],
    ids=str,
)
def test_what_somebody_may_want_is_within_the_bounds(changes):
    validate(changed().to_dict() | changes)


@pytest.mark.parametrize("targets", [3, None, [3], {"a": 1}, [["a"]]])
def test_targets_of_another_type_are_refused(targets):
    with pytest.raises(ConfigError, match="targets="):
        validate_model(changed().to_dict() | {"targets": targets})


@pytest.mark.parametrize("samples", [0, -1, 10**9, 10_001])
def test_draws_of_frames_on_the_command_line_are_within_bounds(samples):
    with pytest.raises(ConfigError, match=f"num_frame_samples={samples}"):
        frame_draws(validate(changed()), samples)
