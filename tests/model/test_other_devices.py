"""The XLA operations are lowered for hardware that nobody has tried them on."""

import jax
import jax.numpy as jnp
import pytest
from support import random_variables
from tiny_models import batch, tiny_config

from crystalframer_jax.model.regressor import CrystalFramer


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_predictions_and_gradients_are_lowered(platform):
    config = tiny_config()
    variables, model = random_variables(config), CrystalFramer(config, "xla")

    def total(params, batch):
        return jnp.sum(model.apply({**variables, "params": params}, batch))

    traced = jax.jit(jax.value_and_grad(total)).trace(variables["params"], batch())
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in lowered and "custom_call @triton" not in lowered
