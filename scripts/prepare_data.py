"""Prepare a target set for training. See --help."""

import sys

from crystalframer_jax.cli.prepare import prepare_main

sys.exit(prepare_main())
