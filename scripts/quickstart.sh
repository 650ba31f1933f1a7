#!/usr/bin/env bash
# Train a small model on the bundled Materials Project set (a few minutes) and predict a CIF file with it.
# Makes its own environment in .venv; run again, it continues or reuses the run in runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ] && [ "$1" != -h ] && [ "$1" != --help ]; then
  echo "error: $0 takes no arguments; see $0 --help" >&2
  exit 2
fi
source scripts/environment.sh

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
echo
python scripts/predict.py runs/quickstart examples/NaCl.cif
