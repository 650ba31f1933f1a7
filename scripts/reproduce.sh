#!/usr/bin/env bash
# Train every target of a benchmark of the paper, one after the other, and compare the errors with the published ones:
#   scripts/reproduce.sh jarvis                      into runs/jarvis/default/TARGET; also: megnet, oqmd
#   VARIANT=lightweight scripts/reproduce.sh jarvis  default (the default), lightweight or crystalformer
#   scripts/reproduce.sh timing                      3 epochs of each variant on JARVIS formation energies: crystals/s
# Further arguments go to train.py. Stopped (Ctrl-C, SIGTERM) and run again, it continues; finished runs are only
# reported. A target that fails does not keep the others from running.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  jarvis | megnet | oqmd | timing) ;;
  *)
    echo "usage: [VARIANT=default|lightweight|crystalformer] $0 jarvis|megnet|oqmd|timing [FLAG OF train.py ...]" >&2
    exit 2
    ;;
esac
source scripts/environment.sh
exec python scripts/reproduce.py "$@"
