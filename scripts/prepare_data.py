"""Prepare a target set for training. See --help."""

import sys

from crystalframer_jax.data.prepare_cli import prepare_main

sys.exit(prepare_main())
