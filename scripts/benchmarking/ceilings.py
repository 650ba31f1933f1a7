"""What the device reaches at best, measured: exponentials, float32 operations and bytes per second."""

import functools
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarking.floor import Work

PASSES = 30  # spread over seconds: one of them finds the machine less busy
TERMS = 16  # exponentials of each number, so that memory does not matter


def measure_ceilings() -> Work:
    """Rates per second of the default device, each the best of several passes.

    A matrix product in float32 at full precision; 16 exponentials of each number of an array, summed up in two ways of
    which the faster counts; x + 1 for a long array in place, bytes read plus bytes written.
    """
    on_cpu = jax.default_backend() == "cpu"
    matrix, long = (2048, 2**26) if on_cpu else (8192, 2**30)
    square = jnp.ones((matrix, matrix), jnp.float32)
    product = _shortest(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST), square)
    copy = _shortest(lambda x: x + 1, jnp.zeros(long, jnp.float32))
    numbers = jnp.linspace(0, 1, 2**20 if on_cpu else 2**29, dtype=jnp.float32)
    exponentials = min(_shortest(_elementwise, numbers), _shortest(_reduced, numbers))
    return Work(TERMS * numbers.size / exponentials, 2 * matrix**3 / product, 8 * long / copy)


def _elementwise(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.add, [jnp.exp(-i / TERMS * x) for i in range(1, TERMS + 1)])


def _reduced(x: jax.Array) -> jax.Array:
    total = functools.reduce(jnp.add, [jnp.sum(jnp.exp(-i / TERMS * x)) for i in range(1, TERMS + 1)])
    return jnp.broadcast_to(total, 1)


def _shortest(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of the shortest of several runs; each takes the place of its argument, if it can.

    The arrays are so large that a run takes milliseconds: its start does not count.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        in_place = jax.jit(function, donate_argnums=0).lower(x).compile()
    best = float("inf")
    for _ in range(PASSES + 1):
        given = jax.block_until_ready(jnp.copy(x))
        start = time.perf_counter()
        jax.block_until_ready(in_place(given))
        best = min(best, time.perf_counter() - start)
    return best
