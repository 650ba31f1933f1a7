"""What `doctor --gpu` measures, at a small size on a CPU."""

import itertools

import numpy as np
import pytest

from crystalframer_jax.cli import doctor
from crystalframer_jax.inference.embedding import nearest
from crystalframer_jax.measuring import gpu
from crystalframer_jax.measuring.gpu import SMALL, measure_gpu


@pytest.fixture
def one_variant(monkeypatch):
    monkeypatch.setattr(gpu, "VARIANTS", {"lightweight": {}})


def test_checks_against_float64_and_what_is_left_out(one_variant, monkeypatch):
    said: list[str] = []
    clock = itertools.chain([0.0, 0.0], itertools.repeat(1000.0))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    found = measure_gpu(SMALL, ("xla", "none"), say=said.append)
    assert said == ["sums and gradients, lightweight ..."]
    right, wrong = found["checks"]
    assert 0 < right["sums"] < 1e-5 and 0 < right["gradients"] < 1e-4 and right["same_frames"] == 1
    assert "'none'" in wrong["failure"]
    assert found["left_out"][0] == "training step, lightweight" and not found["times"]
    text = doctor.gpu_table(found)
    assert "failed: ValueError" in text and "sums against float64" in text


@pytest.mark.slow
def test_all_of_it(one_variant):
    found = measure_gpu(SMALL, ("xla", "pallas"), limit=3600)
    assert not found["left_out"] and not any(record["failure"] for record in (*found["checks"], *found["times"]))
    assert all(record["sums"] < 1e-5 for record in found["checks"])
    cases = [(record["measure"], record["implementation"]) for record in found["times"]]
    assert cases == [
        *[(m, k) for m in ("training step", "prediction") for k in ("xla", "pallas")],
        ("prediction", "pallas"),
    ]
    assert "ms, compiled in" in doctor.gpu_table(found)


def test_the_nearest_of_others():
    rng = np.random.default_rng(0)
    others = rng.normal(size=(300, 5)) * [1, 10, 100, 0, 1e-3] + 7
    rows, distances = nearest(others[:70], others, 3)
    assert rows.shape == distances.shape == (70, 3) and rows[:, 0].tolist() == list(range(70))
    used = others[:, [0, 1, 2, 4]] / others[:, [0, 1, 2, 4]].std(axis=0)
    apart = np.linalg.norm(used[:70, None] - used, axis=-1) / 8**0.5
    np.testing.assert_allclose(distances, np.sort(apart, axis=1)[:, :3], atol=1e-12)
    assert (apart**2).mean() == pytest.approx(1, rel=0.2)
