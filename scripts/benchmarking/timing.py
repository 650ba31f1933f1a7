"""Programs that are compared: compiled one after the other, then run in turns."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

LEAST_ROUNDS, MOST_ROUNDS = 5, 50


@dataclasses.dataclass
class Program:
    """A function that is compiled for its arguments and run again and again.

    `advance(arguments, result)` gives the arguments of the next run, where a run consumes its own.
    """

    function: Any  # as jax.jit returns it
    arguments: Callable[[], tuple]
    advance: Callable[[tuple, Any], tuple] = lambda arguments, result: arguments


@dataclasses.dataclass
class Timing:
    """What was measured of a program; `failure` says why there is nothing."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of each round
    core_seconds: list[float] = dataclasses.field(default_factory=list)  # that cores spent on the process meanwhile
    compile_seconds: float | None = None  # tracing, lowering and compiling
    memory_bytes: int | None = None  # arguments, outputs and temporaries, shared buffers once
    failure: str = ""

    @property
    def median(self) -> float | None:
        """Median seconds of a run."""
        return float(np.median(self.seconds)) if self.seconds and not self.failure else None

    @property
    def core_median(self) -> float | None:
        """Median core-seconds of a run."""
        return float(np.median(self.core_seconds)) if self.median else None

    def ratio_to(self, other: "Timing | None") -> float | None:
        """Median over the rounds of how many times longer this took than the other; None without one of them."""
        if other is None or self.median is None or other.median is None:
            return None
        return float(np.median(np.array(self.seconds) / np.array(other.seconds)))


def take_turns(programs: Sequence[Program], rounds: int = 0, seconds: float = 20.0) -> list[Timing]:
    """Compiles every program, runs each once to warm up, then measures them in turns.

    `rounds` 0: as many as fit into `seconds`, from 5 to 50. A program that fails, whatever the reason (no memory, not
    available on this device), gets a `failure` and the others go on.
    """
    timings = [Timing() for _ in programs]
    ready: dict[int, tuple[Any, tuple]] = {}
    for i, program in enumerate(programs):
        with reported(timings[i]):
            arguments = program.arguments()
            start = time.perf_counter()
            with without_compilation_cache():
                compiled = program.function.lower(*arguments).compile()
            timings[i].compile_seconds = time.perf_counter() - start
            timings[i].memory_bytes = memory_bytes(compiled)
            ready[i] = compiled, arguments

    def run(i: int) -> None:
        """Runs a program; one that fails is not ready any more."""
        compiled, arguments = ready.pop(i)
        with reported(timings[i]):
            start, core_start = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(compiled(*arguments))
            timings[i].seconds.append(time.perf_counter() - start)
            timings[i].core_seconds.append(time.process_time() - core_start)
            ready[i] = compiled, programs[i].advance(arguments, result)

    start = time.perf_counter()
    for i in list(ready):
        run(i)
    warm_up = time.perf_counter() - start
    for timing in timings:
        timing.seconds.clear()
        timing.core_seconds.clear()
    for _ in range(rounds or int(np.clip(seconds / max(warm_up, 1e-6), LEAST_ROUNDS, MOST_ROUNDS))):
        for i in list(ready):
            run(i)
    return timings


@contextlib.contextmanager
def reported(timing: Timing) -> Iterator[None]:
    """Writes the first line of what goes wrong inside into a timing."""
    try:
        yield
    except Exception as error:  # of many kinds: the compiler, the allocator, an implementation that is not there
        lines = str(error).strip().splitlines() or [""]
        timing.failure = f"{type(error).__name__}: {lines[0]}".rstrip(": ")[:200]


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compiles anew, whatever earlier processes have compiled."""
    switch = "jax_enable_compilation_cache"
    before = getattr(jax.config, switch)
    jax.config.update(switch, False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    try:
        yield
    finally:
        jax.config.update(switch, before)
        compilation_cache.reset_cache()


def memory_bytes(compiled: Any) -> int | None:
    """Adds up arguments, outputs and temporaries of a compiled program; None where the compiler does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return int(total - found.alias_size_in_bytes)
