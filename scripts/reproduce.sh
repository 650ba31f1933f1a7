#!/usr/bin/env bash
# Train every target of a benchmark of the paper, or every fold of matbench_phonons, one after the other, and compare the
# errors with the published ones, see docs/paper.md. Further arguments go to train.py.
#   [VARIANT=default|lightweight|crystalformer] scripts/reproduce.sh jarvis|megnet|oqmd|matbench_phonons|timing [FLAG OF train.py ...]
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  jarvis | megnet | oqmd | matbench_phonons | timing | -h | --help) ;;
  *)
    echo "usage: [VARIANT=default|lightweight|crystalformer] $0 jarvis|megnet|oqmd|matbench_phonons|timing [FLAG OF train.py ...]" >&2
    exit 2
    ;;
esac
source scripts/environment.sh
exec python scripts/reproduce.py "$@"
