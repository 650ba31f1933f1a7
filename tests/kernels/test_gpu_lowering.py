"""Training steps and forward passes with kernels, lowered and compiled for a GPU on a machine that has none.

The compile check needs the GPU compiler of JAX beside the CPU installation; the versions must be those of jax:

    pip install --no-deps jax-cuda12-plugin==X jax-cuda12-pjrt==X
    scripts/test.sh -m slow tests/kernels/test_gpu_lowering.py
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support import batch_of, primitive

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import validate, validate_model
from crystalframer_jax.configs import default, jarvis, megnet, mp_flla, oqmd, quickstart
from crystalframer_jax.configs.variants import VARIANTS
from crystalframer_jax.inference.forward import make_forward
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.parallel.devices import AXIS, ONE_DEVICE, Devices
from crystalframer_jax.training.step import initial_state, make_loss, make_recipe, make_train_step

OTHERS = {  # than those of configs/
    "max_static": lambda: changed(frame_method="max_static"),
    "pca": lambda: changed(frame_method="pca"),
    "weighted_pca": lambda: changed(frame_method="weighted_pca"),
    "dropout": lambda: changed(dropout=0.1),
    "odd sizes": lambda: changed(head_num=3, k_dim=5, v_dim=7, value_pe_angle_real=15, value_pe_dist_real=10),
    "moduli": lambda: changed(cos_abs=1),
}
# There another attention than that of the scores chooses. Lightweight models are lowered as the quickstart.
FAST = [("max_static", "evaluation")]
SLOW = [*OTHERS, "jarvis:lightweight"]
CONFIGS = {
    "default": default.get_config,
    "mp_flla": mp_flla.get_config,
    "quickstart": quickstart.get_config,
    **{
        f"{file.__name__.rpartition('.')[2]}:{variant}": functools.partial(file.get_config, variant)
        for file in (jarvis, megnet, oqmd)
        for variant in VARIANTS
    },
    **OTHERS,
}
GPU = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 3 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def changed(**changes):
    """The default configuration with two blocks, and other changes."""
    config = default.get_config()
    config.update(num_layers=2, **changes)
    return config


def small_batch(config):
    return batch_of([primitive("perovskite")], 6.0, num_targets=len(config.targets), parts=config.model.parts)


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def training_step(config, devices=ONE_DEVICE):
    """The step of a training with kernels on some devices, its state and the share of a device, both as shapes."""
    config = validate(config)
    model, recipe = config.model, make_recipe(config, 10)
    statistics = tuple(TargetStatistics(name, "", 0.0, 1.0) for name in config.targets)
    loss = make_loss(CrystalFramer(model, "pallas"), recipe, statistics, 0, devices.axis)
    batch = small_batch(config)
    state = jax.eval_shape(
        lambda batch: initial_state(CrystalFramer(model, "xla"), recipe, batch, jax.random.key(0)), batch
    )
    return make_train_step(recipe, loss, devices=devices), shapes_of((state, batch))


def forward_pass(config, devices=ONE_DEVICE):
    """The same of the forward pass of evaluation, where the crystal chooses among ties."""
    config = validate(config)
    batch = small_batch(config)
    variables = jax.eval_shape(CrystalFramer(config.model, "xla").init, jax.random.key(0), batch)
    return make_forward(CrystalFramer(config.model, "pallas"), devices), shapes_of((variables, batch))


PROGRAMS = {"training": training_step, "evaluation": forward_pass}


@functools.cache
def different_models():
    """The name of the first of CONFIGS for every different model; the number of targets does not matter."""
    models = {}
    for name, get_config in CONFIGS.items():
        models.setdefault(dataclasses.replace(validate_model(get_config()).model, num_targets=1), name)
    return list(models.values())


def kernel_calls(text):
    """How often each kernel is called in a lowered program."""
    return collections.Counter(re.findall(r"__gpu\$xla\.gpu\.triton.*?name = \"(\w+)\"", text))


def expected_calls(config, program="training"):
    """One of each kind in every block that is compiled, in one without frames no search for them."""
    kernels = ("forward_kernel", *(("rows_kernel", "reverse_kernel") if program == "training" else ()))
    return dict.fromkeys(
        kernels + ("frames_kernel",) * (config.value_pe_angle_real > 0), validate_model(config).model.period_of_blocks
    )


def test_every_configuration_is_among_them():
    assert len(CONFIGS) > 15 and {"default", "quickstart", "jarvis:crystalformer"} < set(different_models())


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param(name, program, marks=[pytest.mark.slow] * (name in SLOW and (name, program) not in FAST))
        for name, program in itertools.product(different_models(), PROGRAMS)
    ],
)
def test_programs_are_lowered_for_a_gpu(name, program):
    config = CONFIGS[name]()
    function, shapes = PROGRAMS[program](config)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 1, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        text = function.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert kernel_calls(text) == expected_calls(config, program)
    assert "stablehlo.dot" in text and "scatter" not in text  # sums by index have no fixed order


def compile_for_gpu(name, program, number):
    """Compile a program for some GPUs; prints how often it calls each kernel and collective operation."""
    from jax.experimental import topologies

    gpus = topologies.get_topology_desc(platform="cuda", target_config=GPU, topology=f"1x1x{number}").devices
    devices = Devices(tuple(gpus) if number > 1 else ())
    step, (state, batch) = PROGRAMS[program](CONFIGS[name](), devices)
    whole = part = jax.sharding.SingleDeviceSharding(gpus[0])
    if number > 1:
        whole, part = (jax.NamedSharding(devices.mesh, spec) for spec in (jax.P(), jax.P(AXIS)))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype), batch)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=part), batch)
    text = step.trace(state, batch).lower().compile().as_text()
    collectives = re.findall(r"= \S+ (all-[a-z-]+|reduce-scatter|collective-[a-z-]+)-done\(", text)
    print(json.dumps(kernel_calls(text) + collections.Counter(collectives)))


def compiled_calls(name, program="training", number=1):
    """What `compile_for_gpu` prints, in a process of its own."""
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("the GPU compiler is not installed: see the head of this file")
    code = f"import test_gpu_lowering; test_gpu_lowering.compile_for_gpu({name!r}, {program!r}, {number})"
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", different_models())
def test_programs_are_compiled_for_a_gpu(name, program):
    assert compiled_calls(name, program) == expected_calls(CONFIGS[name](), program)


@pytest.mark.slow
def test_a_training_step_is_compiled_for_eight_gpus():
    """They exchange the shares of the gradient once, and the sums once."""
    expected = expected_calls(CONFIGS["default"]()) | {"all-to-all": 1, "all-gather": 1}
    assert compiled_calls("default", number=8) == expected
