"""One of two processes that work together, for the tests of how both end; starts without what training needs.

Arguments: CASE, the number of the process, the port of process 0.
"""

import os
import signal
import sys
import time

import jax
import numpy as np

from crystalframer_jax.errors import UserError
from crystalframer_jax.parallel.interruption import TrainingInterrupted
from crystalframer_jax.parallel.processes import failing_together, start

SECONDS = 5


def work(case: str, process: int, port: str) -> None:
    """Take 10 steps together with the other process; CASE is what happens at the fifth, and to which process."""
    start(f"127.0.0.1:{port}", 2, process)
    with failing_together(SECONDS) as watchdog:
        if case == f"early {process}":
            raise UserError("too early; wait")
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        split, same = jax.P("data"), jax.P()
        total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=split, out_specs=same))
        ones = np.ones(2, np.float32)
        x = jax.make_array_from_callback((2,), jax.NamedSharding(mesh, split), lambda index: ones[index])
        for step in range(10):
            if step == 5:
                print("step 5", flush=True)
                happen(case, process)
            watchdog.report(f"step {step}")
            assert float(total(x)[0]) == 2
            time.sleep(0.2)  # for a heartbeat to tell of a step, not of the start
        time.sleep(2 * (process == 0))
    print("end", flush=True)


def happen(case: str, process: int) -> None:
    what, _, whom = case.partition(" ")
    if whom and int(whom) != process:
        return
    match what:
        case "error":
            raise UserError("the fifth step is wrong; mend it")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "exit":
            sys.exit("error: left")
        case "ctrl-c":
            raise KeyboardInterrupt
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "halted":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stuck":
            time.sleep(600)
        case "suspended":
            time.sleep(2)
        case "interrupted":
            raise TrainingInterrupted("stopped by SIGTERM")


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
