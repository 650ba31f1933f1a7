"""One suite for all implementations of attention and frames; kernels are interpreted on the CPU.

Sums and gradients are compared with those of dense sums in float64, which know neither chunks, factorised Gaussians nor
reverse neighbors; frames with a search in float64 and, where there are ties, with those by XLA operations.
"""

import dataclasses
import functools
import warnings
from types import SimpleNamespace

import brute_force_frames
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_sums import dense_sums
from support import (
    atom_places,
    batch_of,
    primitive,
    random_crystal,
    random_rotation,
    random_variables,
    rows_from,
    rows_with,
    small_config,
)

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.kernels import backend
from crystalframer_jax.kernels import rows as kernel_rows
from crystalframer_jax.measuring import cases
from crystalframer_jax.model import attention, frames, implementation
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.implementation import KernelWarning
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.basis import AngleBasis, Bases, DistanceBasis

IMPLEMENTATIONS = ("xla", "pallas")
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-11}  # of sums and gradients, relative to the largest
TIE_TOLERANCE = 1e-4
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows, and what is summed over them."""

    rows: str
    heads: int
    k_dim: int
    v_dim: int
    distance: DistanceBasis | None
    angle: AngleBasis | None


def default_distance(size=64):
    return DistanceBasis(size, 14.0, 1.0)


CASES = {
    "default": Case("groups", 8, 16, 16, default_distance(), AngleBasis(64, 4.0)),
    "lightweight": Case("groups", 8, 16, 16, default_distance(), AngleBasis(16, 1.0)),
    "crystalformer": Case("groups", 8, 16, 16, default_distance(), None),
    "odd sizes": Case("crystals", 3, 5, 7, default_distance(10), AngleBasis(15, 1.5)),
    "moduli": Case("crystals", 2, 32, 24, default_distance(3), AngleBasis(64, 4.0, cos_abs=True)),
    "groups of one": Case("crystals", 1, 1, 1, None, AngleBasis(17, 0.5)),
    "two angles": Case("groups", 1, 2, 3, None, AngleBasis(2, 1.0)),
    "values only": Case("groups", 2, 3, 4, None, None),
    "1,000 neighbors": Case("long", 2, 4, 4, default_distance(), AngleBasis(16, 1.0)),
}


# Rows


def rows_of_groups(rng, sizes, padding):
    """Atoms in groups at random places, each a neighbor of all of its group, sorted by distance; then empty rows."""
    total, width = sum(sizes) + padding, max(sizes)
    index, reverse, count = np.zeros((total, width), int), np.zeros((total, width), int), np.zeros(total, int)
    vector = np.zeros((total, width, 3))
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        position = rng.uniform(-3, 3, (size, 3))
        difference = position[None, :] - position[:, None]
        order = np.argsort(np.linalg.norm(difference, axis=-1), axis=1)  # [i, column] -> j
        column = np.argsort(order, axis=1)  # [i, j] -> column
        atoms, i = slice(start, start + size), np.arange(size)[:, None]
        index[atoms, :size], vector[atoms, :size] = start + order, difference[i, order]
        reverse[atoms, :size] = (start + order) * width + column[order, i]
        count[atoms] = size
    return rows_from(index.astype(np.int32), vector, reverse.astype(np.int32), count.astype(np.int32))


@functools.cache
def make_rows(name):
    """float64 rows: empty ones, of one neighbor, of one chunk and a bit; of crystals; of 1,000 neighbors."""
    rng = np.random.default_rng(21)
    if name == "groups":
        return rows_of_groups(rng, (33, 9, 2, 1), padding=3)
    with jax.enable_x64(True):
        if name == "crystals":
            return batch_of([random_crystal(rng, size, 30.0) for size in (1, 6)], 7.0, np.float64).rows
        rows = batch_of([primitive("hcp")], 17.6, np.float64).rows
    return Rows(*(getattr(rows, field.name)[:3] for field in dataclasses.fields(Rows)))  # and one of padding


def test_rows_are_what_they_claim():
    assert sorted(set(make_rows("groups").count.tolist())) == [0, 1, 2, 9, kernel_rows.CHUNK + 1]
    assert set(make_rows("crystals").count.tolist()) > {0}
    assert 900 < make_rows("long").count[0] < 1100


# Sums and gradients


@functools.cache
def make_inputs(name):
    """float64 arguments of framed_attention, and a cotangent."""
    case, rows = CASES[name], make_rows(CASES[name].rows)
    rng = np.random.default_rng(22)
    atoms, heads = len(rows.count), case.heads
    sizes = Bases(case.distance, case.angle).sizes
    return SimpleNamespace(
        q=rng.normal(size=(atoms, heads, case.k_dim)),
        k=rng.normal(size=(atoms, heads, case.k_dim)),
        v=rng.normal(size=(atoms, heads, case.v_dim)),
        a=-rng.uniform(0.1, 0.6, (atoms, heads)),
        w_dist=rng.normal(size=(heads, case.v_dim, sizes[0])),
        w_angle=rng.normal(size=(3, heads, case.v_dim, sizes[1])),
        rows=rows,
        frames=np.array([[random_rotation(rng) for _ in range(heads)] for _ in range(atoms)]),
        cotangent=rng.normal(size=(atoms, heads, case.v_dim)),
    )


def output_and_gradients(name, attend):
    """Attention and its gradients for q, k, v, a, w_dist and w_angle, compiled; `attend` as framed_attention."""
    case = CASES[name]
    bases = Bases(case.distance, case.angle)

    def both(q, k, v, a, w_dist, w_angle, rows, frames, cotangent, seeds):
        def output(q, k, v, a, w_dist, w_angle):
            w_dist, w_angle = w_dist if case.distance else None, w_angle if case.angle else None
            params = ValueEncoding(w_dist, w_angle, bases, 1.5, 2.0)
            return attend(q, k, v, a, rows, frames if case.angle else None, params, seeds=seeds)

        found, pullback = jax.vjp(output, q, k, v, a, w_dist, w_angle)
        return found, pullback(cotangent)

    return jax.jit(both, compiler_options=FAST_TO_COMPILE)


@functools.cache
def implemented(name, kind, dropout=0.0):
    return output_and_gradients(name, functools.partial(framed_attention, implementation=kind, dropout=dropout))


def run(name, kind, dtype, dropout=0.0, seeds=None, **changes):
    """The results of one implementation, some of the inputs changed."""
    with jax.enable_x64(dtype == np.float64):
        inputs = in_precision(vars(make_inputs(name)) | changes, dtype)
        return [np.asarray(x) for x in jax.tree.leaves(implemented(name, kind, dropout)(**inputs, seeds=seeds))]


def in_precision(inputs, dtype):
    def convert(x):
        return x.astype(dtype) if x.dtype == np.float64 else x

    return {key: jax.tree.map(convert, value) for key, value in inputs.items()}


@functools.cache
def expected(name):
    """The same of dense sums in float64."""

    def attend(q, k, v, a, rows, frames, params, seeds):
        values, distances, angles = dense_sums(params.bases, q, k, v, a, rows, frames)
        if params.w_dist is not None:
            values += params.dist_coef * jnp.einsum("nht,hdt->nhd", distances, params.w_dist)
        if params.w_angle is not None:
            values += params.angle_coef * jnp.einsum("nhet,ehdt->nhd", angles, params.w_angle)
        return values

    with jax.enable_x64(True):
        results = output_and_gradients(name, attend)(**vars(make_inputs(name)), seeds=None)
        return [np.asarray(x) for x in jax.tree.leaves(results)]


def assert_equal(actual, wanted, tolerance, least_size=0.0):
    """To a tolerance relative to the largest number of each array, or to `least_size`."""
    for x, y in zip(actual, wanted, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(initial=least_size))


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "lightweight")) for name in CASES]
)
def test_attention_and_gradients_equal_those_of_dense_sums(name, kind):
    assert_equal(run(name, kind, np.float32), expected(name), TOLERANCE[np.float32])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_the_same_in_float64(kind):
    assert_equal(run("odd sizes", kind, np.float64), expected("odd sizes"), TOLERANCE[np.float64])


def test_dropout_is_the_same_for_all():
    heads = CASES["odd sizes"].heads
    seeds = np.random.default_rng(23).integers(0, 2**32, (len(make_rows("crystals").count), heads), dtype=np.uint32)
    first, second = (run("odd sizes", kind, np.float32, 0.3, seeds) for kind in IMPLEMENTATIONS)
    assert_equal(first, second, 1e-5)
    assert np.abs(first[0] - run("odd sizes", "xla", np.float32)[0]).max() > 0.1


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_results_repeat_to_the_bit(kind):
    for x, y in zip(run("odd sizes", kind, np.float32), run("odd sizes", kind, np.float32), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_stands_in_the_padding_does_not_matter():
    rows = make_rows("crystals")
    padding = np.arange(rows.index.shape[1]) >= rows.count[:, None]
    scrambled = rows_from(
        np.where(padding, len(padding) - 1, rows.index).astype(np.int32),
        np.where(padding[..., None], 1e3, rows.vector),
        np.where(padding, -7, rows.reverse).astype(np.int32),
        rows.count,
    )
    before, after = run("odd sizes", "pallas", np.float32), run("odd sizes", "pallas", np.float32, rows=scrambled)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.isfinite(x).all()


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_what_is_not_a_number_is_not_lost(kind):
    """Queries of one atom that are not numbers spoil its sums and all gradients that they enter, and nothing else."""
    q = make_inputs("odd sizes").q.copy()
    q[0, 0] = np.nan
    output, q_grad, k_grad, *_ = run("odd sizes", kind, np.float32, q=q)
    for x in (output, q_grad):
        assert np.isnan(x[0, 0]).all() and np.isfinite(x[1:]).all()
    assert np.isnan(k_grad[:, 0]).any() and np.isfinite(k_grad[:, 1:]).all()


def test_far_ends_of_rows_are_skipped():
    """With narrow Gaussians the far chunks of long rows add nothing, and infinite vectors there do not show."""
    rows = make_rows("long")
    narrow = np.full_like(make_inputs("1,000 neighbors").a, -2.0)  # exp(-2 * 6^2) = 5e-32 at 6 Å
    distance = np.linalg.norm(rows.vector, axis=-1)
    far = (
        np.arange(rows.index.shape[1]) // kernel_rows.CHUNK * kernel_rows.CHUNK >= np.sum(distance < 6, axis=1)[:, None]
    )
    assert far[0].sum() > 800
    poisoned = rows_with(rows, np.where(far[..., None], np.inf, rows.vector))
    for kind, skips in (("pallas", True), ("xla", False)):
        plain, with_poison = (
            run("1,000 neighbors", kind, np.float32, a=narrow, rows=some)[0] for some in (rows, poisoned)
        )
        assert np.isfinite(plain).all() and np.array_equal(plain, with_poison) == skips


# Frames


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", ["max", "max_static"])
def test_frames_equal_the_brute_force_search(method, kind):
    rng = np.random.default_rng(24)
    crystal = random_crystal(rng, 7, 40.0)
    batch = batch_of([crystal], 7.0)
    places = atom_places(batch)
    q, k = rng.normal(size=(2, len(batch.species), 3, 5)).astype(np.float32)
    a = -rng.uniform(0.5, 0.7, (len(batch.species), 3)).astype(np.float32)
    found = jax.jit(block_frames, static_argnums=(0, 5, 7))(method, q, k, a, batch, TIE_TOLERANCE, None, kind)
    arrays = [x[places].astype(float) for x in (q, k, a)]
    wanted = brute_force_frames.frames(method, *arrays, crystal.positions, crystal.lattice, 7.0)
    np.testing.assert_allclose(np.asarray(found)[places], np.broadcast_to(wanted, found[places].shape), atol=2e-6)


def test_kernels_draw_among_ties_as_xla_does():
    """What the crystal chooses is compared in test_chosen_frames.py."""
    batch = batch_of([primitive(name) for name in ("rock salt", "perovskite", "hcp", "fcc", "diamond")], 7.0)
    atoms = len(batch.species)
    q, k = np.ones((2, atoms, 4, 3), np.float32)
    a = np.full((atoms, 4), -0.25, np.float32)
    seeds = np.random.default_rng(25).integers(0, 2**32, a.shape, dtype=np.uint32)
    first, second = (
        np.asarray(jax.jit(block_frames, static_argnums=(0, 5, 7))("max", q, k, a, batch, TIE_TOLERANCE, seeds, kind))
        for kind in IMPLEMENTATIONS
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.ptp(first[:, :, 0], axis=1).max() > 0.5  # the heads differ


@pytest.mark.parametrize("factor", [1, 30])
def test_kernels_find_a_frame_where_scores_round_differently(factor):
    """Without a tolerance, or with scores so large that it is less than their rounding, each atom has its frame."""
    rows = make_rows("crystals")
    rows = dataclasses.replace(rows, vector=rows.vector.astype(np.float32), square=rows.square.astype(np.float32))
    rng = np.random.default_rng(27)
    q, k = factor * rng.normal(size=(2, len(rows.count), 8, 16)).astype(np.float32)
    a = np.full(q.shape[:2], -0.25, np.float32)
    batch = SimpleNamespace(rows=rows)
    found = jax.jit(lambda *qka: block_frames("max", *qka, batch, 0.0, implementation="pallas"))(q, k, a)
    lengths = np.linalg.norm(found, axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to((rows.count > 0)[:, None, None], lengths.shape), atol=1e-6)


# The model


@functools.cache
def model_gradient(kind, sharded=False):
    """Predictions of a small model, for a case of the benchmark, and their gradient, for one implementation."""
    config = small_config(num_layers=1)
    batch = cases.CASES["supercell-40"].batch()
    model, variables = CrystalFramer(config, kind), random_variables(config)

    def loss(params, batch):
        predictions = model.apply(variables | {"params": params}, batch)
        return jnp.sum(predictions), predictions

    function = jax.value_and_grad(loss, has_aux=True)
    if sharded:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec()
        function = jax.shard_map(function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    text = str(jax.make_jaxpr(function)(variables["params"], batch))
    results = jax.jit(function, compiler_options=FAST_TO_COMPILE)(variables["params"], batch)
    return jax.tree.map(np.asarray, results), text


def test_the_model_is_the_same_with_kernels():
    first, second = (jax.tree.leaves(model_gradient(kind)[0]) for kind in IMPLEMENTATIONS)
    assert_equal(first, second, 2e-5, least_size=0.01)


def test_kernels_work_inside_shard_map():
    first, second = (jax.tree.leaves(model_gradient("pallas", sharded)[0]) for sharded in (False, True))
    assert_equal(first, second, 1e-6, least_size=0.01)


def test_kernels_are_really_taken():
    names = ("forward_kernel", "rows_kernel", "reverse_kernel", "frames_kernel")
    assert all(name in model_gradient("pallas")[1] for name in names)
    assert not any(name in model_gradient("xla")[1] for name in names)


# The choice


@pytest.fixture
def gpu(monkeypatch):
    """The first device claims to be a GPU with kernels; what was found out about it before is forgotten, also later."""
    caches = (attention._check, frames._check_kernels, implementation._tell)
    for cache in caches:
        cache.cache_clear()
    device = SimpleNamespace(platform="gpu", device_kind="Testing 100", compute_capability="9.0")
    monkeypatch.setattr(backend, "device", lambda: device)
    yield device
    for cache in caches:
        cache.cache_clear()


def attend(kind="auto"):
    """The jaxpr of attention by an implementation."""
    inputs = in_precision(vars(make_inputs("values only")), np.float32)
    params = ValueEncoding(None, None, Bases(None, None))
    arrays = (inputs[name] for name in "qkva")
    return str(jax.make_jaxpr(lambda *x: framed_attention(*x, inputs["rows"], None, params, kind))(*arrays))


def test_a_gpu_gets_kernels_and_says_so_once(gpu, capsys):
    assert "forward_kernel" in attend() and "forward_kernel" in attend()
    assert capsys.readouterr().err == "attention: Pallas kernels on Testing 100\n"


def test_a_cpu_gets_xla_operations_and_says_nothing(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "pallas" not in attend()
    assert not capsys.readouterr().err


def broken(*arguments):
    raise RuntimeError("out of registers")


def wrong(*arguments):
    return jax.tree.map(lambda x: 1.01 * x, attention.lattice_sums(*arguments))


def swapped(*arguments):
    values, distances, angles = attention.lattice_sums(*arguments)
    return values, distances, angles[:, :, ::-1]


def test_the_check_notices_kernels_that_are_wrong(monkeypatch):
    options = attention.SumOptions(Bases(default_distance(4), AngleBasis(4, 1.0))), (1, 2), 3, np.dtype(np.float32)
    assert attention._check.__wrapped__(*options) == ""
    monkeypatch.setattr(attention.kernels, "lattice_sums", swapped)
    assert "differ" in attention._check.__wrapped__(*options)


@pytest.mark.slow
def test_the_check_in_float64_with_dropout(monkeypatch):
    options = attention.SumOptions(Bases(None, None), dropout=0.3), (1, 2), 3, np.dtype(np.float64)
    assert attention._check.__wrapped__(*options) == ""
    by_xla = attention.lattice_sums
    monkeypatch.setattr(
        attention.kernels, "lattice_sums", lambda *x: jax.tree.map(lambda y: y * (1 + 1e-8), by_xla(*x))
    )
    assert "differ" in attention._check.__wrapped__(*options)


def other_ties(by_kernel, scores, rows, tie_tolerance, seeds, seeing):
    return by_kernel(scores, rows, 0.3, seeds, seeing)


def no_choice(by_kernel, scores, rows, tie_tolerance, seeds, seeing):
    return by_kernel(scores, rows, tie_tolerance, seeds, None)


def own_attention(by_kernel, scores, rows, tie_tolerance, seeds, seeing):
    return by_kernel(scores, rows, tie_tolerance, seeds, seeing and scores)


@pytest.mark.parametrize(("seen_shape", "defects"), [(None, [other_ties]), ((2, 5), [no_choice, own_attention])])
def test_the_check_of_frames_has_ties(monkeypatch, seen_shape, defects):
    options = 1e-4, (2, 3), seen_shape, np.dtype(np.float32)
    assert frames._check_kernels.__wrapped__(*options) == ""
    by_kernel = frames.kernels.max_frames
    for defect in defects:
        monkeypatch.setattr(frames.kernels, "max_frames", functools.partial(defect, by_kernel))
        assert "differ" in frames._check_kernels.__wrapped__(*options)


@pytest.mark.parametrize(
    ("kernel", "reason"), [(broken, "RuntimeError: out of registers"), (wrong, "its results differ from those of XLA")]
)
def test_kernels_that_fail_are_replaced_with_one_warning(gpu, monkeypatch, kernel, reason):
    monkeypatch.setattr(attention.kernels, "lattice_sums", kernel)
    with pytest.warns(KernelWarning, match=f"attention: XLA operations on Testing 100, no kernels: {reason}"):
        assert "forward_kernel" not in attend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "forward_kernel" not in attend()
    with pytest.raises(ValueError, match=f"implementation='pallas' does not work for attention: {reason}"):
        attend("pallas")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_capability": "7.5"}, "Testing 100 has compute capability 7.5, not 8.0 or more"),
        ({"compute_capability": "gfx942"}, "Testing 100 has compute capability gfx942"),
        ({"platform": "tpu"}, "there are no kernels for the TPU"),
    ],
)
def test_devices_without_kernels(gpu, change, reason):
    vars(gpu).update(change)
    assert reason in backend.problem()
    with pytest.warns(KernelWarning, match=reason):
        assert "forward_kernel" not in attend()


def test_the_default_device_decides():
    with jax.default_device(jax.devices("cpu")[0]):
        assert backend.device() == jax.devices("cpu")[0]
    assert backend.device() == jax.local_devices()[0]


def test_a_version_of_jax_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(backend, "MISSING", "jax 0.99 has no Triton backend of Pallas (gone)")
    with pytest.warns(KernelWarning, match=r"jax 0\.99 has no Triton"):
        assert "forward_kernel" not in attend()
