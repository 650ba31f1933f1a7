"""Outputs, frames, widths and every gradient of the official implementation, from its golden files.

Each file holds the official hyperparameters (config_json), crystals (numbers, positions, lattice, sizes), parameters
(param/NAME) and what the official code made of them in float32: output [B, T], frames and Gaussian exponents of each
block (layerL/frames [n, H, 3, 3], layerL/alpha [n, H]), and grad/NAME of sum(loss_weights * output). No crystal has
symmetry, so no frame is a tie.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import AS_USERS_DO, atom_places, batch_of, config_from_official

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.official.state import official_from_variables, variables_from_official
from crystalframer_jax.structures.crystal import Crystal

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    "max",
    "max_large_cell",
    "max_single_atom_cells",
    "max_official_truncation",
    "max_scales_per_block",
    "crystalformer_real",
    "crystalformer_no_value_encoding",
    "crystalformer_reci",
    "crystalformer_multihead",
    "crystalformer_real_reci",
    "lattice",
    "max_bn",
    "pca_given_frames",
    "max_cos_abs",
    "max_gelu",
    "max_pool_max",
    "max_prepool_relu_two_targets",
    "lightweight_forward_only",
]

# A file of the same kind, too large to be kept here; looked for in the folder that the environment variable names.
EXTRA_FOLDER = "CRYSTALFRAMER_EXTRA_GOLDEN"
EXTRA_CASES = ["max_full_size"]

# Å. Beyond it an attention weight is below exp(-144 * 0.18) = 5e-12 of the atom's own: the widest Gaussian of these
# files (r0 = 1.4 Å) has the exponent -0.18 / Å^2. In the second block of max_scales_per_block (r0 = 2 Å) it is
# -0.094 / Å^2, and the neighbors between 12 and 14 Å change gradients by 1.4e-5.
RADIUS = 12.0
LARGER_RADIUS = {"max_scales_per_block": 14.0}
SHAPES = [BatchShape(64, 384, 4), BatchShape(64, 512, 4)]  # one shape for all: few compiled programs

# float64. In reciprocal space 1e-6 would not notice another lattice_range or lower bound: 5e-7 to 9e-7.
OUTPUT_TOLERANCE = 1e-6
RECIPROCAL_TOLERANCE = 1e-7
FRAME_TOLERANCE = 1e-5
ALPHA_TOLERANCE = 1e-6  # relative
GRADIENT_TOLERANCE = {np.float32: 5e-5, np.float64: 2e-5}  # relative L2 norm of each official parameter
# The official truncations were left as they are in this case, and they change its gradients by up to 6e-5.
TRUNCATED = "max_official_truncation"
TRUNCATED_GRADIENT_TOLERANCE = 2e-4
# In domain multihead the official gradients of the real heads (widths and encodings, and what lies before them) are
# wrong: they differ from finite differences of its own outputs, see test_multihead_gradients.py. These are right.
RIGHT_IN_MULTIHEAD = r"mlp\.|encoder\.layers\.1\.(linear|self_attn\.(out_proj|k_proj|v_proj))"
# Official names of what is no trained parameter, by their endings.
NOT_TRAINED = ("gauss_scale", "atten_scale", "running_mean", "running_var", "num_batches_tracked")
# BatchNorm takes away any constant, so these gradients are exactly 0, and rounding errors in the file.
ZERO_WITH_BATCH_NORM = ("encoder.layers.1.linear2.bias", "mlp.0.bias")


def path_of(name):
    return (GOLDEN if name in CASES else Path(os.environ[EXTRA_FOLDER])) / f"{name}.npz"


def crystals_of(golden):
    ends = np.cumsum(golden["sizes"])
    atoms = [slice(end - size, end) for size, end in zip(golden["sizes"], ends, strict=True)]
    return [
        Crystal(golden["numbers"][part], golden["positions"][part], lattice)
        for part, lattice in zip(atoms, golden["lattice"], strict=True)
    ]


def named(golden, prefix):
    return {key.removeprefix(prefix): golden[key] for key in golden.files if key.startswith(prefix)}


def evaluate(config, variables, batch, loss_weights, frames):
    """Outputs [B, T] in training mode, intermediates of the blocks, and gradients of sum(loss_weights * output)."""

    def loss(params):
        output, state = CrystalFramer(config).apply(
            {**variables, "params": params},
            batch,
            given_frames=frames,
            train=True,
            mutable=["intermediates", "batch_stats"],
        )
        return jnp.sum(output * loss_weights), (output, state["intermediates"])

    (_, (output, blocks)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return output, blocks, gradients


# Some are compiled as users do; the others without optimisation, in half the time. Those named max to
# max_official_truncation are one program.
OPTIMISED_CASES = (
    "max",
    "max_large_cell",
    "max_single_atom_cells",
    "max_official_truncation",
    "max_full_size",
    "crystalformer_real",
    "crystalformer_real_reci",
)
OPTIMISED = jax.jit(evaluate, static_argnums=0, compiler_options=AS_USERS_DO)
PLAIN = jax.jit(evaluate, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def run_case(name, dtype):
    golden = np.load(path_of(name), allow_pickle=False)
    config = config_from_official(json.loads(golden["config_json"].tobytes()))
    state = named(golden, "param/")
    radius = LARGER_RADIUS.get(name, RADIUS)
    batch = batch_of(crystals_of(golden), radius, dtype, SHAPES, num_targets=config.num_targets, parts=config.parts)
    places, frames = atom_places(batch), None
    if name == "pca_given_frames":  # the signs of eigenvectors are arbitrary
        frames = [np.zeros((*batch.species.shape, config.head_num, 3, 3), dtype) for _ in range(config.num_layers)]
        for block, given in enumerate(frames):
            given[places] = golden[f"layer{block}/frames"]
    weights = np.zeros(batch.targets.shape, dtype)
    weights[: len(golden["sizes"])] = golden.get("loss_weights", 1)
    with jax.enable_x64(dtype == np.float64):
        variables = jax.tree.map(lambda x: np.asarray(x, dtype), variables_from_official(state, config))
        compiled = OPTIMISED if dtype == np.float32 and name in OPTIMISED_CASES else PLAIN
        results = compiled(config, variables, batch, weights, frames)
        output, blocks, gradients = jax.tree.map(np.asarray, results)
    attention = [blocks[f"block_{block}"]["attention"] for block in range(config.num_layers)]
    by_name = official_from_variables(variables | {"params": gradients}, config)
    return SimpleNamespace(
        name=name,
        dtype=dtype,
        golden=golden,
        uses_frames=config.uses_frames,
        tolerance=OUTPUT_TOLERANCE if config.domain == "real" else RECIPROCAL_TOLERANCE,
        num_blocks=config.num_layers,
        output=output[: len(golden["sizes"])],
        frames=[block["frames"][0][places] if config.uses_frames else None for block in attention],
        alphas=[block["a"][0][places] for block in attention],
        gradients={name: value for name, value in by_name.items() if not name.endswith(NOT_TRAINED)},
    )


NEEDS_FOLDER = pytest.mark.skipif(
    not os.environ.get(EXTRA_FOLDER), reason=f"{EXTRA_FOLDER} is unset: it names a folder with more golden files"
)
# In float64 too; the other variations in float64 are among the slow tests.
IN_FLOAT64 = ("max", "max_large_cell", "max_single_atom_cells", "max_official_truncation", "crystalformer_real_reci")


def marks_of(name, dtype):
    """The marks of a golden file in one precision."""
    marks = [NEEDS_FOLDER] if name in EXTRA_CASES else []
    return [*marks, pytest.mark.slow] if name not in IN_FLOAT64 and dtype == np.float64 else marks


PARAMETERS = [
    pytest.param(name, dtype, id=f"{name}-{dtype.__name__}", marks=marks_of(name, dtype))
    for name in CASES + EXTRA_CASES
    for dtype in (np.float32, np.float64)
]


@pytest.fixture(scope="module")
def case(name, dtype):
    """One golden file evaluated in one precision."""
    return run_case(name, dtype)


pytestmark = pytest.mark.parametrize(("name", "dtype"), PARAMETERS, scope="module")


def test_outputs(case):
    assert case.output.dtype == case.dtype
    np.testing.assert_allclose(case.output, case.golden["output"], rtol=0, atol=case.tolerance)


def test_frames_and_alphas(case):
    """Of every block; the golden files of Crystalformer hold neither."""
    for block in range(case.num_blocks):
        assert (f"layer{block}/frames" in case.golden) == case.uses_frames
        if case.uses_frames:
            frames, alphas = case.golden[f"layer{block}/frames"], case.golden[f"layer{block}/alpha"]
            np.testing.assert_allclose(case.frames[block], frames, rtol=0, atol=FRAME_TOLERANCE)
            # In this case truncation changes the input of the second block, and its widths by 3e-6.
            if case.name != TRUNCATED:
                np.testing.assert_allclose(case.alphas[block], alphas, rtol=ALPHA_TOLERANCE)


def test_gradients(case):
    """Of every trained parameter; the gradients of the official code are wrong where c_dist is not 1."""
    official = named(case.golden, "grad/")
    if not official:
        pytest.skip("the file has no gradients")
    assert set(official) == set(case.gradients)
    if case.name == "max_bn":
        for name in ZERO_WITH_BATCH_NORM:
            assert max(np.linalg.norm(official.pop(name)), np.linalg.norm(case.gradients[name])) < 5e-5
    if case.name == "crystalformer_multihead":
        official = {name: value for name, value in official.items() if re.match(RIGHT_IN_MULTIHEAD, name)}
        assert len(official) == 12
    tolerance = TRUNCATED_GRADIENT_TOLERANCE if case.name == TRUNCATED else GRADIENT_TOLERANCE[case.dtype]
    errors = {
        name: np.linalg.norm(case.gradients[name] - gradient) / np.linalg.norm(gradient)
        for name, gradient in official.items()
    }
    # A NaN is not below the tolerance either.
    assert not {name: error for name, error in errors.items() if not error <= tolerance}
