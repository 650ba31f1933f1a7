"""python -m crystalframer_jax is the command `crystalframer`."""

from crystalframer_jax.cli.command import main

if __name__ == "__main__":
    raise SystemExit(main())
