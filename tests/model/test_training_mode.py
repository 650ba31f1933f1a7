"""What differs in training: dropout and BatchNorm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support import atom_places, random_variables
from tiny_models import CRYSTALFORMER, LARGER, SHAPE, batch, tiny_config

from crystalframer_jax.model.encoder import EncoderBlock, SelfAttention
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.random_bits import draw, seed_of
from crystalframer_jax.training.averages import make_batch_statistics

# Dropout: of pairs of atoms in the attention, of the result of the attention, and twice in the feed-forward layers

DROPOUT = 0.25
DRAWS = 400


def random_input(shape=SHAPE):
    """Layer input [N, D]; the atoms of the crystals have the same in every shape."""
    x = np.zeros((shape.num_atoms, 8), np.float32)
    x[atom_places(batch(shape=shape))] = np.random.default_rng(44).normal(size=(12, 8))
    return x


@functools.partial(jax.jit, static_argnums=0)
def draw_results(layer, variables, x, batch):
    """Results [DRAWS, N, D] of a layer in training mode."""

    def once(seed):
        return layer.apply(variables, x, batch, dropout_seeds=draw(seed, batch.crystal_place))

    return jax.lax.map(once, draw(seed_of(6), jnp.arange(DRAWS)))


def drawn(layer, variables, shape=SHAPE):
    """Results [DRAWS, 12, D] of a layer in training mode for random input of the atoms of the crystals."""
    packed = batch(shape=shape)
    return np.asarray(draw_results(layer, variables, random_input(shape), packed))[:, atom_places(packed)]


def dropping(**changes):
    """A layer without frames, half of its heads in reciprocal space."""
    sizes = {"dropout": DROPOUT, "domain": "multihead", "scale_real": (3.0,), "lattice_range": 1, "num_layers": 1}
    return tiny_config(**(sizes | CRYSTALFORMER | changes))


@functools.cache
def attention_layer():
    """An attention layer that drops, and its variables."""
    params = random_variables(dropping())["params"]["block_0"]["attention"]
    calibration = {"scale": np.float32(1), "shift": np.float32(0)}
    return SelfAttention(dropping(), 0), {"params": params, "calibration": calibration}


@functools.cache
def attention_draws(shape):
    return drawn(*attention_layer(), shape)


def test_dropout_of_the_attention_preserves_the_mean():
    """The result of the layer is linear in what is dropped."""
    layer, variables = attention_layer()
    undropped = jax.jit(lambda v, x, b: layer.apply(v, x, b))
    expected = undropped(variables, random_input(), batch())[atom_places(batch())]
    results = attention_draws(SHAPE)
    spread = results.std(axis=0)
    assert spread.min() > 0.02
    deviations = (results.mean(axis=0) - expected) / (spread / DRAWS**0.5)
    assert np.abs(deviations).max() < 4.5
    assert len(np.unique(results[:, 0, 0])) > 20  # draws differ


def test_dropout_of_the_attention_does_not_depend_on_the_padding():
    np.testing.assert_allclose(attention_draws(LARGER), attention_draws(SHAPE), rtol=0, atol=1e-5)


def added_by_block(**biases):
    """What a block adds to its input if all of its weights are zero but that linear2 is the identity."""
    config = dropping(t_activation="relu")
    params = jax.tree.map(np.zeros_like, random_variables(config)["params"]["block_0"])
    params["attention"]["out"]["bias"] += biases.get("attention", 0)
    params["linear1"]["bias"] += biases.get("hidden", 0)
    params["linear2"]["kernel"] += np.eye(8, dtype=np.float32) * ("hidden" in biases)
    variables = {"params": params, "calibration": {"attention": {"scale": np.float32(1), "shift": np.float32(0)}}}
    return drawn(EncoderBlock(config, 0), variables) - random_input()[atom_places(batch())]


def assert_kept(added, probability):
    """0 or the inverse probability, independently."""
    kept = added > 0.5
    np.testing.assert_allclose(added, np.where(kept, 1 / probability, 0), atol=1e-5)
    error = (probability * (1 - probability) / kept.size) ** 0.5
    assert abs(kept.mean() - probability) < 4 * error < 0.02


def test_features_of_the_attention_are_dropped_before_they_are_added():
    assert_kept(added_by_block(attention=1.0), 1 - DROPOUT)


def test_features_of_the_feed_forward_layers_are_dropped_twice():
    """Once inside, once before they are added, independently."""
    assert_kept(added_by_block(hidden=1.0), (1 - DROPOUT) ** 2)


def test_nothing_is_dropped_outside_training_and_everything_in_it_depends_on_the_seed():
    configs = [dropping(dropout=dropout) for dropout in (0.0, DROPOUT)]
    variables = random_variables(configs[0])
    without, with_dropout = (jax.jit(CrystalFramer(config).apply)(variables, batch()) for config in configs)
    np.testing.assert_array_equal(with_dropout, without)

    @jax.jit
    def trained(seed):
        seeds = draw(seed, batch().crystal_place)
        return CrystalFramer(configs[1]).apply(variables, batch(), train=True, dropout_seeds=seeds)

    first, again, second = (np.asarray(trained(seed_of(number)))[:3, 0] for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).min() > 1e-3
    assert np.abs(first - without[:3, 0]).min() > 1e-3


# BatchNorm

BATCH_NORM = {
    "norm_type": "bn",
    "pre_pooling_op": "w+bn+relu",
    "embedding_dim": (8, 6),
    "num_layers": 1,
} | CRYSTALFORMER


@functools.partial(jax.jit, static_argnums=2)
def normalised(variables, batch, train):
    """Predictions, running averages afterwards, and the results of the layers before the normalisations."""

    def is_dense(module, _):
        return module.name in ("pre_pooling", "dense_0")

    model = CrystalFramer(tiny_config(**BATCH_NORM))
    mutable = ["batch_stats", "intermediates"]
    output, state = model.apply(variables, batch, train=train, mutable=mutable, capture_intermediates=is_dense)
    inputs = {f"{name}_norm": state["intermediates"][name]["__call__"][0] for name in ("pre_pooling", "dense_0")}
    return output, state["batch_stats"], inputs


@functools.cache
def batch_norm_variables():
    """Random ones, with running averages that are not those of any batch."""
    variables = random_variables(tiny_config(**BATCH_NORM))
    rng = np.random.default_rng(45)
    for averages in variables["batch_stats"].values():
        averages["mean"] = rng.normal(size=averages["mean"].shape).astype(np.float32)
        averages["var"] = rng.uniform(0.5, 2, averages["var"].shape).astype(np.float32)
    return variables


def batch_means_and_variances():
    """Of the inputs of each BatchNorm, over the 12 atoms or the 3 crystals."""
    _, _, inputs = normalised(batch_norm_variables(), batch(), True)
    real = {"pre_pooling_norm": atom_places(batch()), "dense_0_norm": np.arange(3)}
    of_real = {name: np.asarray(inputs[name])[places] for name, places in real.items()}
    return {name: {"mean": x.mean(axis=0), "var": x.var(axis=0)} for name, x in of_real.items()}


def test_batch_norm_in_training_is_that_of_the_batch():
    """By the definition: nothing else normalises the last layers."""
    variables = batch_norm_variables()
    output, _, inputs = normalised(variables, batch(), True)
    params, statistics = variables["params"], batch_means_and_variances()["dense_0_norm"]
    x = (np.asarray(inputs["dense_0_norm"])[:3] - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    x = np.maximum(x * params["dense_0_norm"]["scale"] + params["dense_0_norm"]["bias"], 0)
    expected = x @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(output[:3], expected, rtol=0, atol=1e-5)
    in_evaluation, _, _ = normalised(variables, batch(), False)
    assert np.abs(in_evaluation[:3] - expected).max() > 0.1


def test_running_averages_move_by_a_tenth():
    before = batch_norm_variables()["batch_stats"]
    _, after, _ = normalised(batch_norm_variables(), batch(), True)
    assert after.keys() == {"pre_pooling_norm", "dense_0_norm"}
    for name, statistics in batch_means_and_variances().items():
        for kind, value in statistics.items():
            expected = 0.9 * before[name][kind] + 0.1 * value
            np.testing.assert_allclose(after[name][kind], expected, rtol=0, atol=1e-6, err_msg=f"{name} {kind}")


def test_evaluation_uses_the_running_averages_and_leaves_them():
    variables = batch_norm_variables()
    output, after, inputs = normalised(variables, batch(), False)
    jax.tree.map(np.testing.assert_array_equal, after, variables["batch_stats"])
    params, averages = variables["params"], variables["batch_stats"]["dense_0_norm"]
    x = (np.asarray(inputs["dense_0_norm"]) - averages["mean"]) / np.sqrt(averages["var"] + 1e-5)
    x = np.maximum(x * params["dense_0_norm"]["scale"] + params["dense_0_norm"]["bias"], 0)
    expected = x @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(output[:3], expected[:3], rtol=0, atol=1e-5)


def test_padding_is_no_part_of_a_batch_norm():
    """Neither padding atoms nor padding crystals."""
    output, averages, _ = normalised(batch_norm_variables(), batch(), True)
    larger_output, larger_averages, _ = normalised(batch_norm_variables(), batch(shape=LARGER), True)
    np.testing.assert_allclose(larger_output[:3], output[:3], rtol=0, atol=1e-5)
    assert np.isfinite(larger_output).all()
    for actual, expected in zip(jax.tree.leaves(larger_averages), jax.tree.leaves(averages), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_batch_statistics_are_those_of_the_batch_alone():
    """What the averages over a training set are made of."""
    model = CrystalFramer(tiny_config(**BATCH_NORM))
    statistics = make_batch_statistics(model)(batch_norm_variables(), batch())
    for name, expected in batch_means_and_variances().items():
        for kind, value in expected.items():
            np.testing.assert_allclose(statistics[name][kind], value, rtol=1e-4, atol=1e-6)
