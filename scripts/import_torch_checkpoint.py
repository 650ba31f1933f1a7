"""Make a run directory of a checkpoint of the official PyTorch implementation.

python scripts/import_torch_checkpoint.py FILE.ckpt --workdir=RUN [--target_set=NAME]
"""

from crystalframer_jax.cli.convert import import_main

if __name__ == "__main__":
    raise SystemExit(import_main())
