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
  jarvis | megnet | oqmd) config=configs/$1.py ;;
  timing) config=configs/jarvis.py ;;
  *)
    echo "usage: [VARIANT=default|lightweight|crystalformer] $0 jarvis|megnet|oqmd|timing [FLAG OF train.py ...]" >&2
    exit 2
    ;;
esac
benchmark=$1
shift
if [ "$benchmark" = timing ]; then set -- --config.n_epochs=3 --config.swa_epochs=0 "$@"; fi
source scripts/environment.sh

# What there is to train, a line each: variant, target set, target.
jobs=$(python - "$benchmark" "${VARIANT:-default}" << 'EOF'
import importlib
import sys

from crystalframer_jax.config import ConfigError
from crystalframer_jax.configs.variants import VARIANTS

benchmark, variant = sys.argv[1:]
timing = benchmark == "timing"
module = importlib.import_module(f"crystalframer_jax.configs.{'jarvis' if timing else benchmark}")
try:
    module.get_config(variant)
except ConfigError as error:
    sys.exit(f"error: {error}")
for variant in VARIANTS if timing else [variant]:
    for target in module.BENCHMARKS[:1] if timing else module.BENCHMARKS:
        print(variant, target.target_set, target.target)
EOF
)

child=
stopped=
forward() { # A signal goes on to the training, which saves what it has done and ends.
  stopped=1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2> /dev/null || true; fi
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP
trap 'forward USR1' USR1

train() { # Exit status of train.py in $status.
  set -m # a process group of its own: Ctrl-C reaches the training once, through forward
  python scripts/train.py "$@" < /dev/null &
  child=$!
  set +m
  if [ -n "$stopped" ]; then forward TERM; fi # a signal that came before there was a child
  while true; do
    status=0
    wait "$child" || status=$?
    if ! kill -0 "$child" 2> /dev/null; then break; fi # else a signal has interrupted the waiting
  done
  child=
}

failed=()
while read -r variant target_set target; do
  run=runs/$benchmark/$variant/$target
  echo "== $run"
  train "--config=$config:$variant" "--workdir=$run" "--config.target_set=$target_set" "--config.targets=$target" "$@"
  echo
  if [ -n "$stopped" ] || ((status == 130 || status == 143)) || { ((status == 0)) && [ ! -e "$run/summary.json" ]; }; then
    echo "stopped in $run; the same command continues there"
    exit 0
  fi
  if ((status)); then failed+=("$run (exit status $status)"); fi
done <<< "$jobs"

python - "$benchmark" "$jobs" << 'EOF'
import importlib
import json
import sys
from pathlib import Path

from crystalframer_jax.training.logging import read_metrics
from crystalframer_jax.text import table

benchmark, jobs = sys.argv[1:]
jobs = [line.split() for line in jobs.splitlines()]
runs = [(variant, target, Path("runs", benchmark, variant, target)) for variant, _, target in jobs]
if benchmark == "timing":
    speeds = {variant: [f"{line['crystals_per_s']:,.1f}" for line in read_metrics(run)] for variant, _, run in runs}
    epochs = max(map(len, speeds.values()))
    header = ["crystals/s", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    rows = [[variant, *speed, *["-"] * (epochs - len(speed))] for variant, speed in speeds.items()]
else:
    benchmarks = {b.target: b for b in importlib.import_module(f"crystalframer_jax.configs.{benchmark}").BENCHMARKS}
    header = [f"{benchmark}, {runs[0][0]}", "unit", "test MAE", "published"]
    rows = []
    for variant, target, run in runs:
        summary = run / "summary.json"
        mae = f"{json.loads(summary.read_text())['test'][target]['mae']:.5f}" if summary.exists() else "-"
        rows.append([target, benchmarks[target].unit, mae, benchmarks[target].published_mae.get(variant, "-")])
print(table(header, [[str(cell) for cell in row] for row in rows]))
EOF

if ((${#failed[@]})); then
  printf '\nfailed:\n' >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
