"""Learning rates, optimizers and losses against their formulas in NumPy, and against PyTorch where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import GOLDEN

from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.config.hyperparameters import ALLOWED_VALUES
from crystalframer_jax.configs import default
from crystalframer_jax.official.state import load_official
from crystalframer_jax.training.loss import LOSSES, loss_per_crystal
from crystalframer_jax.training.optimizer import TO_ZERO, clip_by_global_norm, learning_rate, make_optimizer


def changed(**changes) -> ConfigDict:
    config = default.get_config()
    config.update(changes)
    validate(config)
    return config


# Learning rates

LR, WIDTH, TOTAL = 3e-3, 96, 9000
STEPS = np.arange(TOTAL + 100)
ONE_NUMBER = [name for name in ALLOWED_VALUES["lr_sch"] if name not in ("const", "multistep")]
SCHEDULES = [(name, (steps,)) for name in ONE_NUMBER for steps in (1.0, 37.5, 4000.0)]
SCHEDULES += [("const", ()), ("const", (4000.0,)), ("cosine", (0.0,)), ("cosine", (0.02,)), ("linear", (0.3,))]
SCHEDULES += [("multistep", steps) for steps in ((1.0,), (100.0, 2500.0, 2501.0), (7000, 500), (300.0, 300.0))]


def rate_by_formula(name: str, params: tuple, t: np.ndarray) -> np.ndarray:
    """The learning rate of steps t, in float64."""
    first = params[0] if params else None
    if name == "const":
        return np.full(t.shape, LR)
    if name == "multistep":
        return LR * np.prod([np.where(t >= step, 0.1, 1.0) for step in params], axis=0)
    if name in TO_ZERO:
        first = {0.02: 180, 0.3: 2700}.get(first, first)  # shares of TOTAL
        rising, left = t + 1, 1 - np.clip((t - first) / (TOTAL - first), 0, 1)
        falling = left if name == "linear" else np.sin(np.pi / 2 * left) ** 2
        return LR * np.where(t < first, rising / (first + 1), falling)
    if name.startswith("inverse_sqrt_nowarmup"):
        return LR / np.sqrt(1 + t / first) / (np.sqrt(WIDTH) if name.endswith("dmodel") else 1)
    rising, falling = (t + 1) / first**1.5, 1 / np.sqrt(t + 1)
    height = LR * np.sqrt(first) if name.endswith("lrmax") else 1 / np.sqrt(WIDTH)
    return height * np.where(t + 1 < first, rising, falling)


def schedule_config(name: str, params: tuple) -> ConfigDict:
    return changed(lr=LR, model_dim=WIDTH, lr_sch=name, sch_params=params)


@pytest.mark.parametrize(("name", "params"), SCHEDULES, ids=str)
def test_learning_rates_follow_their_formulas(dtype, name, params):
    accuracy = 1e-6 if dtype == np.float32 else 1e-12
    for hold_from in (None, 0, 999, 8999):
        rates = learning_rate(schedule_config(name, params), TOTAL, hold_from)(jnp.asarray(STEPS, jnp.int32))
        assert rates.dtype == dtype
        expected = rate_by_formula(name, params, STEPS if hold_from is None else np.minimum(STEPS, hold_from))
        np.testing.assert_allclose(
            rates, expected, rtol=accuracy, atol=accuracy * LR if name in ("cosine", "linear") else 0
        )


def test_rates_for_another_batch_size_grow_with_its_root():
    rates = [
        learning_rate(changed(lr=LR, batch_size=size, lr_batch_size=given), TOTAL)(7)
        for size, given in ((64, 0), (64, 64), (256, 64), (16, 64))
    ]
    np.testing.assert_allclose(np.divide(rates, rates[0]), [1, 1, 2, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("name", "params"), SCHEDULES, ids=str)
def test_one_step_has_the_rate_that_it_has_among_many(name, params):
    schedule = jax.jit(learning_rate(schedule_config(name, params), TOTAL, 7000))
    for step in (0, 1, 37, 38, 2500, 2501, 8000):
        rate = schedule(jnp.int32(step))
        assert rate.shape == ()
        np.testing.assert_allclose(rate, rate_by_formula(name, params, np.array(min(step, 7000))), rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "params", "step", "expected"),
    [
        ("inverse_sqrt_nowarmup", (1000.0,), 3000, LR / 2),
        ("inverse_sqrt_nowarmup_dmodel", (1000.0,), 0, LR / 96**0.5),
        ("inverse_sqrt_warmup", (2500.0,), 2499, 1 / 50 / 96**0.5),  # the peak
        ("inverse_sqrt_warmup_lrmax", (2500.0,), 2499, LR),
        ("inverse_sqrt_warmup_lrmax", (2500.0,), 1249, LR / 2),
        ("inverse_sqrt_warmup_lrmax", (2500.0,), 9999, LR / 2),
        ("multistep", (100.0, 200.0), 99, LR),
        ("multistep", (100.0, 200.0), 100, LR / 10),
        ("multistep", (100.0, 200.0), 200, LR / 100),
        ("cosine", (1000.0,), 0, LR / 1001),
        ("cosine", (1000.0,), 1000, LR),
        ("cosine", (1000.0,), 5000, LR / 2),
        ("cosine", (1000.0,), 9000, 0.0),
    ],
)
def test_learning_rates_that_one_can_calculate_by_hand(x64, name, params, step, expected):
    rate = learning_rate(schedule_config(name, params), TOTAL)(step)
    np.testing.assert_allclose(rate, expected, rtol=1e-12, atol=1e-18)


def test_a_warmup_longer_than_the_training_is_refused():
    learning_rate(schedule_config("cosine", (99.0,)), 100)
    with pytest.raises(ConfigError, match=r"sch_params=\(100\.0,\).*shorter than the training, 100 steps"):
        learning_rate(schedule_config("cosine", (100.0,)), 100)


@pytest.mark.parametrize(("name", "params"), [case for case in SCHEDULES if case[0] not in TO_ZERO], ids=str)
def test_learning_rates_are_those_of_torch(x64, name, params):
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler
    steps = params[0] if params else None
    factors = {
        "const": lambda t: 1.0,
        "inverse_sqrt_nowarmup": lambda t: (steps / (steps + t)) ** 0.5,
        "inverse_sqrt_nowarmup_dmodel": lambda t: WIDTH**-0.5 * (steps / (steps + t)) ** 0.5,
        "inverse_sqrt_warmup": lambda t: WIDTH**-0.5 * min((t + 1) ** -0.5, (t + 1) * steps**-1.5),
        "inverse_sqrt_warmup_lrmax": lambda t: steps**0.5 * min((t + 1) ** -0.5, (t + 1) * steps**-1.5),
    }
    lr = 1.0 if name == "inverse_sqrt_warmup" else LR
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    if name == "multistep":
        scheduler = schedulers.MultiStepLR(optimizer, milestones=list(params), gamma=0.1)
    else:
        scheduler = schedulers.LambdaLR(optimizer, factors[name])
    expected = []
    for _ in range(5000):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    rates = learning_rate(schedule_config(name, params), TOTAL)(jnp.arange(5000))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


# Optimizers

SETTINGS = {
    "plain": {"clip_norm": 0.0, "weight_decay": 0.0},
    "decay": {"clip_norm": 0.0, "weight_decay": 0.3},
    "clip_norm": {"clip_norm": 0.7, "weight_decay": 0.03},
    "clip_grad": {"clip_norm": 0.0, "clip_grad": 0.2, "weight_decay": 0.03},
    "both": {"clip_norm": 0.7, "clip_grad": 0.2, "weight_decay": 0.03},
    "default": {},
}
OFFICIAL = ("adamw", "adam", "sgd")
CASES = [(name, settings) for name in OFFICIAL for settings in SETTINGS.values()]
CASES += [("adamw", {"bias_weight_decay": rate, "weight_decay": 0.3}) for rate in (0.0, 0.2)]
CASES += [("adam", {"bias_weight_decay": 0.2}), ("sgd", {"bias_weight_decay": 0.2})]  # of no effect
CASES += [(name, {"adam_betas": (0.5, 0.7)}) for name in ("adamw", "adam")]
CASES += [("sgd", {"momentum": momentum, "weight_decay": 0.3}) for momentum in (0.0, 0.5)]

SHAPES = {"dense/kernel": (3, 4), "dense/bias": (4,), "output_norm/scale": (5,), "output_norm/bias": (5,)}
WEIGHTS = ("dense/kernel",)  # what is neither a bias nor of a normalisation
RATES = (0.1, 0.1, 0.03, 0.2, 0.05, 0.01)
Arrays = dict[str, np.ndarray]


def optimizer_problem() -> tuple[Arrays, list[Arrays]]:
    """Parameters, and gradients of six steps: some are clipped, by norm and still by component, and some are not."""
    rng = np.random.default_rng(7)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    scales = (30.0, 0.03, 1.0, 0.003, 0.1, 10.0)
    gradients = [{name: scale * rng.normal(size=shape) for name, shape in SHAPES.items()} for scale in scales]
    return params, gradients


def descend(config: ConfigDict) -> list[Arrays]:
    """Parameters after each step of make_optimizer."""
    arrays, gradients = optimizer_problem()
    params, optimizer, path = as_tree(arrays), make_optimizer(config), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient, rate in zip(gradients, RATES, strict=True):
        direction, state = update(as_tree(gradient), state, params)
        params = jax.tree.map(lambda p, d, rate=rate: p - rate * d, params, direction)
        path.append({name: np.asarray(params[name.split("/")[0]][name.split("/")[1]]) for name in SHAPES})
    return path


def as_tree(arrays: Arrays) -> dict[str, dict[str, jax.Array]]:
    """{"a/b": array} as {"a": {"b": array}}."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for name, value in arrays.items():
        layer, leaf = name.split("/")
        tree.setdefault(layer, {})[leaf] = jnp.asarray(value)
    return tree


def descend_by_formula(config: ConfigDict) -> list[Arrays]:
    """The same in NumPy: PyTorch's definitions of AdamW, Adam and SGD."""
    params, gradients = optimizer_problem()
    mean, square, velocity = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(3))
    beta1, beta2 = config.adam_betas
    path = []
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), start=1):
        norm = np.linalg.norm(np.concatenate([g.ravel() for g in gradient.values()]))
        for name in SHAPES:
            g, p = gradient[name].copy(), params[name].copy()
            if config.clip_norm and norm + 1e-6 > config.clip_norm:
                g *= config.clip_norm / (norm + 1e-6)
            if config.clip_grad:
                g = np.sign(g) * np.minimum(np.abs(g), config.clip_grad)
            if config.optimizer == "adamw":
                p *= 1 - rate * (config.weight_decay if name in WEIGHTS else config.bias_weight_decay)
            elif name in WEIGHTS:
                g += config.weight_decay * p
            if config.optimizer == "sgd":
                velocity[name] = config.momentum * velocity[name] + g
                p -= rate * velocity[name]
            else:
                mean[name] = beta1 * mean[name] + (1 - beta1) * g
                square[name] = beta2 * square[name] + (1 - beta2) * g**2
                deviation = np.sqrt(square[name] / (1 - beta2**step))
                p -= rate * mean[name] / (1 - beta1**step) / (deviation + 1e-8)
            params[name] = p
        path.append(dict(params))
    return path


def descend_with_torch(config: ConfigDict) -> list[Arrays]:
    """The same with PyTorch, set up as the official code does: nothing is said about the decay of biases and norms."""
    torch = pytest.importorskip("torch")
    arrays, gradients = optimizer_problem()
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in arrays.items()}
    groups = [
        {"params": [params[name] for name in SHAPES if name not in WEIGHTS]},
        {"params": [params[name] for name in WEIGHTS], "weight_decay": config.weight_decay},
    ]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
        optimizer = kind(groups, lr=1.0, betas=config.adam_betas)
    path = []
    for gradient, rate in zip(gradients, RATES, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in params.items():
            parameter.grad = torch.tensor(gradient[name])
        if config.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
        if config.clip_grad > 0:
            torch.nn.utils.clip_grad_value_(params.values(), config.clip_grad)
        optimizer.step()
        path.append({name: parameter.detach().numpy().copy() for name, parameter in params.items()})
    return path


def assert_same_path(found: list[Arrays], expected: list[Arrays]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-10, err_msg=f"step {step}, {name}")


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_optimizers_follow_their_formulas(x64, name, settings):
    config = changed(optimizer=name, **settings)
    assert_same_path(descend(config), descend_by_formula(config))


@pytest.mark.parametrize(
    ("name", "settings"), [(n, s) for n, s in CASES if n != "adamw" or "bias_weight_decay" not in s], ids=str
)
def test_optimizers_are_those_of_torch(x64, name, settings):
    config = changed(optimizer=name, **settings)
    assert_same_path(descend(config), descend_with_torch(config))


def test_every_setting_of_an_optimizer_makes_a_difference(x64):
    """Otherwise the two tests above would compare less than they seem to."""
    for name in OFFICIAL:
        ends = [descend(changed(optimizer=name, **settings))[-1]["dense/kernel"] for settings in SETTINGS.values()]
        for a, end in enumerate(ends):
            assert all(np.abs(end - other).max() > 1e-4 for other in ends[:a])


def official_names_as_parameters() -> dict:
    """Parameters that are 1 where the official code decays by its own rate, and 0 elsewhere.

    These are the parameters with "bias" in their official name, and those of normalisations (here BatchNorm, mlp.1).
    """
    golden = np.load(GOLDEN / "max_bn.npz")
    state = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    marked = {
        name: np.full(value.shape, float("bias" in name or "mlp.1." in name), np.float32)
        for name, value in state.items()
    }
    marked |= {name: np.array([1.0, 0.0], np.float32) for name in marked if name.endswith("gauss_scale")}
    return load_official(json.loads(golden["config_json"].tobytes()), marked).variables["params"]


@pytest.mark.parametrize(
    ("name", "of_biases", "of_weights"), [("adamw", 0.2, 0.03), ("adam", 0.0, 0.03 / (0.03 + 1e-8)), ("sgd", 0.0, 0.03)]
)
def test_biases_and_normalisations_are_those_of_the_official_code(name, of_biases, of_weights):
    """Without gradients a parameter of 1 moves by its decay alone."""
    is_bias = official_names_as_parameters()
    params = jax.tree.map(jnp.ones_like, is_bias)
    optimizer = make_optimizer(changed(optimizer=name, weight_decay=0.03, bias_weight_decay=0.2))
    directions, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    marks = jax.tree.leaves(is_bias)
    assert 0 < sum(int(np.sum(mark)) for mark in marks) < sum(mark.size for mark in marks)
    for (path, found), mark in zip(jax.tree_util.tree_leaves_with_path(directions), marks, strict=True):
        expected = np.where(mark == 1, of_biases, of_weights)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (1.0, 1 / (1 + 1e-6)), (5.0, 1 / (5 + 1e-6))])
def test_gradients_are_clipped_by_their_global_norm(x64, norm, factor):
    gradients = {"a": jnp.array([0.6 * norm]), "b": {"c": jnp.array([[0.0, 0.8 * norm]])}}
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    jax.tree.map(lambda c, g: np.testing.assert_allclose(c, factor * g, rtol=1e-12), clipped, gradients)


# Losses

FORMULAS = {  # name: (loss, derivative) of errors; of smooth L1 the two pieces meet at 1
    "L1": (np.abs, np.sign),
    "MSE": (lambda e: e**2, lambda e: 2 * e),
    "Smooth_L1": (
        lambda e: np.where(np.abs(e) < 1, e**2 / 2, np.abs(e) - 0.5),
        lambda e: np.where(np.abs(e) < 1, e, np.sign(e)),
    ),
}
TORCH_LOSSES = {"L1": "l1_loss", "MSE": "mse_loss", "Smooth_L1": "smooth_l1_loss"}


def loss_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, targets and what is known, [B, T]: small and large errors, 0 and 1; a row of which nothing is known.

    Unknown targets are NaN or infinite.
    """
    rng = np.random.default_rng(3)
    targets = rng.normal(size=(40, 3))
    errors = rng.normal(size=(40, 3)) * 10.0 ** rng.integers(-3, 3, (40, 3))
    targets[:3], errors[:3] = 0.5, [[0, 1, -1], [0.25, -0.25, 0], [1.25, -1.25, 3]]
    known = rng.random((40, 3)) < 0.7
    known[:3], known[3] = True, False
    predictions = targets + errors
    return predictions, np.where(known, targets, np.where(rng.random((40, 3)) < 0.8, np.nan, np.inf)), known


def loss_and_gradient(name: str) -> tuple[jax.Array, jax.Array]:
    predictions, targets, known = map(jnp.asarray, loss_problem())
    loss = loss_per_crystal(name, predictions, targets, known)
    return loss, jax.grad(lambda p: loss_per_crystal(name, p, targets, known).sum())(predictions)


def test_there_is_a_formula_for_every_loss():
    assert ALLOWED_VALUES["loss_func"] == tuple(LOSSES) == tuple(FORMULAS) == tuple(TORCH_LOSSES)


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_sum_the_known_targets_of_each_crystal(x64, name):
    predictions, targets, known = loss_problem()
    formula, derivative = FORMULAS[name]
    loss, gradient = loss_and_gradient(name)
    by_formula = [formula((p - t)[k]).sum() for p, t, k in zip(predictions, targets, known, strict=True)]
    np.testing.assert_allclose(loss, by_formula, rtol=1e-12)
    np.testing.assert_allclose(gradient[known], derivative((predictions - targets)[known]), rtol=1e-12)
    np.testing.assert_array_equal(gradient[~known], 0)
    assert loss[3] == 0


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_those_of_torch(x64, name):
    torch = pytest.importorskip("torch")
    predictions, targets, known = map(torch.tensor, loss_problem())
    predictions.requires_grad_()
    function = getattr(torch.nn.functional, TORCH_LOSSES[name])
    found = function(predictions[known], targets[known], reduction="none")
    found.sum().backward()
    loss, gradient = loss_and_gradient(name)
    crystals = np.nonzero(known.numpy())[0]
    np.testing.assert_allclose(loss, np.bincount(crystals, found.detach().numpy(), minlength=40), rtol=1e-12)
    np.testing.assert_allclose(gradient, predictions.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("targets", "known"), [((3,), (3, 1)), ((3, 1), (3,)), ((1, 3), (3, 1)), ((3, 2), (3, 2))])
def test_losses_refuse_to_broadcast(name, targets, known):
    with pytest.raises(ValueError, match="shapes differ"):
        loss_per_crystal(name, jnp.zeros((3, 1)), jnp.zeros(targets), jnp.ones(known, bool))


# Muon


def test_muon_makes_the_updates_of_block_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    config = changed(optimizer="muon", weight_decay=0.0, bias_weight_decay=0.0, clip_norm=0.0)
    shapes = {
        "block_0": {"q": {"kernel": (12, 24), "bias": (24,)}, "w_angle": (3, 2, 8, 16)},
        "output": {"kernel": (12, 12)},
    }
    keys = iter(jax.random.split(jax.random.key(0), 4))
    params = jax.tree.map(lambda shape: jnp.ones(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    block, of_block = updates["block_0"], gradient["block_0"]
    for name, update, given in (
        ("q", block["q"]["kernel"], of_block["q"]["kernel"]),
        ("w", block["w_angle"], of_block["w_angle"]),
    ):
        update, given = (np.asarray(x, np.float64).reshape(-1, *x.shape[-2:]) for x in (update, given))
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(max(update.shape[-2:])))
        assert (values > 0.6).all() and (values < 1.3).all(), name  # five steps of Newton and Schulz go as far
        assert (np.sum(update * given, axis=(-2, -1)) > 0).all(), name  # the direction of the gradient, not against it
    for update, given in (
        (block["q"]["bias"], of_block["q"]["bias"]),
        (updates["output"]["kernel"], gradient["output"]["kernel"]),
    ):
        np.testing.assert_array_equal(np.sign(update), np.sign(given))
        assert np.ptp(np.abs(update)) < 1e-4 * np.abs(update).max()  # Adam's first step has one size
