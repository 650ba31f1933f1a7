# Sourced by the other scripts: makes the Python environment .venv of this checkout if it is missing or older than
# pyproject.toml, and puts it first in PATH. Variables: PYTHON (interpreter to make it with), VENV (its folder).
# Usage: source scripts/environment.sh [EXTRA], with an extra of pyproject.toml.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
EXTRA=${1:-}
STAMP="$VENV/installed${EXTRA:+-$EXTRA}"

if [ ! -e "$STAMP" ] || [ pyproject.toml -nt "$STAMP" ]; then
  PYTHON=${PYTHON:-python3}
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is older than Python 3.11; name another with PYTHON=python3.12 $0" >&2
    exit 1
  fi
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  echo "installing into $VENV (one or two minutes the first time) ..."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${EXTRA:+[$EXTRA]}"
  touch "$STAMP"
fi
export PATH="$PWD/$VENV/bin:$PATH"
case $VENV in /*) export PATH="$VENV/bin:$PATH" ;; esac
