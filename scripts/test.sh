#!/usr/bin/env bash
# Lint, type check and tests, in an environment of their own (.venv). Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "$0")/environment.sh" test

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
