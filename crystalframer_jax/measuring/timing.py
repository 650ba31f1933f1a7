"""Programs that are compared: compiled one after the other, then run in turns."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

LEAST_ROUNDS, MOST_ROUNDS = 5, 50

Record = dict[str, Any]  # an object of the JSON file, a row of a table


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
    compile_seconds: float | None = None  # tracing, lowering and compiling
    memory_bytes: int | None = None  # arguments, outputs and temporaries, shared buffers once
    failure: str = ""

    @property
    def median(self) -> float | None:
        """Median seconds of a run."""
        return float(np.median(self.seconds)) if self.seconds and not self.failure else None

    def ratio_to(self, other: "Timing | None") -> float | None:
        """Median over the rounds of how many times longer this took than the other; None without one of them."""
        if other is None or self.median is None or other.median is None:
            return None
        return float(np.median(np.array(self.seconds) / np.array(other.seconds)))

    def record(self, crystals: int) -> Record:
        """Describes the runs of a program on some crystals."""
        return {
            "rounds": len(self.seconds),
            "median_s": self.median,
            "crystals_per_s": quotient(crystals, self.median),
            "compile_s": self.compile_seconds,
            "compile_per_run": quotient(self.compile_seconds, self.median),
            "memory_bytes": self.memory_bytes,
            "failure": self.failure,
        }


def quotient(x: float | None, y: float | None) -> float | None:
    """Divides; None without one of the two."""
    return x / y if x and y else None


def take_turns(programs: Sequence[Program], rounds: int = 0, seconds: float = 20.0) -> list[Timing]:
    """Compiles every program, runs each once to warm up, then measures them in turns.

    `rounds` 0: as many as fit into `seconds`, from 5 to 50. A program that fails, whatever the reason (no memory, not
    available on this device), gets a `failure` and the others go on.
    """
    timings = [Timing() for _ in programs]
    runs = [runs_of(*both) for both in zip(programs, timings, strict=True)]

    def take_turn() -> float:
        start = time.perf_counter()
        for run in runs:
            next(run, None)
        return time.perf_counter() - start

    take_turn()  # compiles
    warm_up = take_turn()
    for timing in timings:
        timing.seconds.clear()
    for _ in range(rounds or int(np.clip(seconds / max(warm_up, 1e-6), LEAST_ROUNDS, MOST_ROUNDS))):
        take_turn()
    return timings


def runs_of(program: Program, timing: Timing) -> Iterator[None]:
    """Compiles a program, then runs it once each time it is asked to go on, until it fails."""
    try:
        arguments = program.arguments()
        start = time.perf_counter()
        compiled = program.function.lower(*arguments).compile()
        timing.compile_seconds = time.perf_counter() - start
        if found := compiled.memory_analysis():  # not every compiler says
            total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
            timing.memory_bytes = int(total - found.alias_size_in_bytes)
        while True:
            yield
            start = time.perf_counter()
            result = jax.block_until_ready(compiled(*arguments))
            timing.seconds.append(time.perf_counter() - start)
            arguments = program.advance(arguments, result)
            del result  # its memory is for the others
    except Exception as error:  # of many kinds: the compiler, the allocator, an implementation that is not there
        timing.failure = reason_of(error)


def reason_of(error: Exception) -> str:
    """Tells an error in a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")[:200]
