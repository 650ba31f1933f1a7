"""What the kernels need of Pallas and its Triton backend; all that is specific to them is here.

A kernel works on whole arrays: its programs read and write the places that they name. Programs of one warp each, in one
row: they need no communication between warps.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    MISSING = ""
except ImportError as error:  # a version of JAX without it
    MISSING = f"jax {jax.__version__} has no Triton backend of Pallas ({error})"

OLDEST_GPU = 8.0  # compute capability (Ampere) that the backend compiles for


def device() -> jax.Device:
    """The device that computations of this thread run on."""
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    return chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]


def problem() -> str:
    """Why kernels cannot run on `device()`; empty if they can."""
    if MISSING:
        return MISSING
    here = device()
    if here.platform not in ("gpu", "cuda"):
        return f"there are no kernels for the {here.platform.upper()}"
    capability = str(getattr(here, "compute_capability", "unknown"))  # such as 9.0, of another maker gfx942
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < OLDEST_GPU:
        return f"{here.device_kind} has compute capability {capability}, not {OLDEST_GPU} or more"
    return ""


def run(kernel: Callable[..., None], programs: int, outputs: Any, *inputs: Any) -> Any:
    """`kernel(*inputs, outputs)` for every program; inputs and outputs are pytrees of arrays (outputs: their shapes).

    On other devices than GPUs of NVIDIA the kernel is interpreted: evaluated with ordinary operations, very slowly.
    """
    leaves, structure = jax.tree.flatten(outputs)
    name = getattr(kernel, "func", kernel).__name__

    def body(*refs: Any) -> None:
        number = len(refs) - len(leaves)
        kernel(*jax.tree.unflatten(inputs_structure, refs[:number]), jax.tree.unflatten(structure, refs[number:]))

    arrays, inputs_structure = jax.tree.flatten(inputs)
    call = functools.partial(pallas.pallas_call, body, grid=(programs,), out_shape=leaves, name=name)
    parameters = triton.CompilerParams(num_warps=1, num_stages=1)
    results = jax.lax.platform_dependent(*arrays, cuda=call(compiler_params=parameters), default=call(interpret=True))
    return jax.tree.unflatten(structure, results)


def program() -> jax.Array:
    """The number of this program, int32."""
    return pallas.program_id(0)


def load(array: Any, place: tuple, mask: jax.Array | None = None) -> jax.Array:
    """array[place]; 0 where not `mask`. Indices of a place are broadcast."""
    return triton.load(_at(array, place), mask=mask, other=None if mask is None else jnp.zeros((), array.dtype))


def store(array: Any, place: tuple, value: jax.Array, mask: jax.Array | None = None) -> None:
    """array[place] = value, where `mask`."""
    triton.store(_at(array, place), value, mask=mask)


def _at(array: Any, place: tuple) -> Any:
    """Reference to places; indices that are Python numbers would fail in interpret mode."""
    return array.at[tuple(jnp.int32(x) if isinstance(x, int) else x for x in place)]


def lanes(number: int) -> jax.Array:
    """0, 1, 2 ... up to the next power of 2 at or above `number`, int32; values in kernels have such lengths only."""
    return jax.lax.iota(jnp.int32, 1 << max(number - 1, 0).bit_length())
