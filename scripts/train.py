"""Train a model, or continue a training that was interrupted (the same command).

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.lr=1e-3 ...]

SIGTERM, SIGUSR1, Ctrl-C and the end of --max_minutes save the training and end it with exit status 0.

All devices of this machine share the work; several processes and machines do as docs/distributed.md says.
"""

from crystalframer_jax.cli.train import train_main

if __name__ == "__main__":
    raise SystemExit(train_main())
