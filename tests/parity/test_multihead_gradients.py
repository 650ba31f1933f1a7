"""Gradients in domain multihead, where the official ones are wrong, against differences of the float64 reference."""

import json

import brute_force
import numpy as np
import pytest
from test_golden import crystals_of, named, run_case

NAME = "crystalformer_multihead"
STEP = 1e-5
PARAMETERS = [
    "input_embeddings.weight",
    "encoder.layers.0.linear1.weight",
    *(
        f"encoder.layers.{block}.self_attn.{name}"
        for block in (0, 1)
        for name in ("q_proj_weight", "lattice_pos_weights", "pe_dist_proj")
    ),
]


@pytest.fixture(scope="module")
def case():
    return run_case(NAME, np.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_equal_differences_of_the_reference(case, name):
    golden = case.golden
    config, state = json.loads(golden["config_json"].tobytes()), named(golden, "param/")
    direction = np.random.default_rng(0).normal(size=state[name].shape)

    def loss(amount):
        moved = state | {name: state[name].astype(np.float64) + amount * direction}
        outputs = [
            brute_force.predict(config, moved, c.species, c.positions, c.lattice, radius=9.0)["output"]
            for c in crystals_of(golden)
        ]
        return np.sum(golden["loss_weights"] * outputs)

    difference = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    scale = np.linalg.norm(case.gradients[name])
    assert abs(np.sum(direction * case.gradients[name]) - difference) < 1e-5 * scale
    if name != "input_embeddings.weight":  # the official gradient is not
        assert abs(np.sum(direction * golden[f"grad/{name}"]) - difference) > 1e-4 * scale
