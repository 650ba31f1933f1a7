"""Prepare a target set for training. See --help."""

from crystalframer_jax.cli.prepare import prepare_main

raise SystemExit(prepare_main())
