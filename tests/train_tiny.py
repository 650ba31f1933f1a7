"""scripts/train.py on the target set "small", in a process of its own, for tests that interrupt it.

Arguments: the seconds by which every step is delayed, and those of scripts/train.py.
"""

import runpy
import sys
import time
from pathlib import Path

from tiny import tiny_runs

from crystalframer_jax.training import loop


def delayed(make, seconds: float):
    """`make_train_step`, with steps that take longer."""

    def make_delayed(*args):
        step = make(*args)

        def train_step(*args, **kwargs):
            time.sleep(seconds)
            return step(*args, **kwargs)

        return train_step

    return make_delayed


if __name__ == "__main__":
    _, seconds, *arguments = sys.argv
    loop.make_train_step = delayed(loop.make_train_step, float(seconds))
    script = Path(__file__).parent.parent / "scripts" / "train.py"
    sys.argv = [str(script), *arguments]
    with tiny_runs():
        runpy.run_path(str(script), run_name="__main__")
