"""Write a run as a checkpoint that the official PyTorch implementation can load.

python scripts/export_torch_checkpoint.py RUN FILE.ckpt [--weights=last]
"""

from crystalframer_jax.cli.convert import export_main

if __name__ == "__main__":
    raise SystemExit(export_main())
