#!/usr/bin/env bash
# Lint, type check and tests, in an environment of their own (.venv). Arguments go to pytest: scripts/test.sh -k frames
# Another interpreter: PYTHON=python3.12 VENV=.venv312 scripts/test.sh
# With PyTorch, for the tests of its checkpoints, which are skipped without: EXTRA=test,torch scripts/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRA=${EXTRA:-test}
unset PYTHONDONTWRITEBYTECODE  # the package is read by many processes: compiled once for all
source scripts/environment.sh

ruff check .
ruff format --check .
mypy & # meanwhile
types=$!
# The third process has the tests that wait for others (tests/scheduling.py). In the end it names what took over 20 s: none
# should on two quiet cores (tests/durations.md).
python -m pytest -n 3 --dist worksteal --durations=0 --durations-min=20 "$@"
wait $types
