# Sourced by quickstart.sh and test.sh, in the root of the checkout: makes the Python environment if it is missing or
# older than pyproject.toml, and puts it first in PATH. Settings from outside:
#   PYTHON   interpreter to make it with (default: the newest of python3.13, 3.12, 3.11 or python3 that is there)
#   VENV     folder of the environment (default: .venv)
#   EXTRA    extras of pyproject.toml to install, separated by commas (test.sh: test)

case ${1:-} in # of whichever script sources this
  -h | --help)
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "scripts/$(basename "$0")"
    exit
    ;;
esac

VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac

suits() { command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }
version_of() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")'; }

if [ -z "${PYTHON:-}" ]; then
  for PYTHON in python3 python3.13 python3.12 python3.11; do
    if suits "$PYTHON"; then break; fi
  done
fi
if ! suits "$PYTHON"; then
  echo "error: Python 3.11 or newer is needed and $PYTHON is not; name one: PYTHON=/path/to/python3.12 $0" >&2
  exit 1
fi

STAMP=$VENV/installed-$(version_of "$PYTHON")${EXTRA:+-$EXTRA}
if [ ! -e "$STAMP" ] || [ pyproject.toml -nt "$STAMP" ]; then
  if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1 ||
    [ "$(version_of "$VENV/bin/python")" != "$(version_of "$PYTHON")" ]; then
    "$PYTHON" -m venv --clear "$VENV" || exit 1
  fi
  echo "installing into ${VENV#"$PWD"/} (one or two minutes the first time) ..."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${EXTRA:+[$EXTRA]}" || exit 1
  touch "$STAMP"
fi
export PATH="$VENV/bin:$PATH"
