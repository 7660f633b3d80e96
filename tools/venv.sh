# Sourced by the other scripts: makes .venv in the project, once, installs the project into it and
# puts it first on the PATH. Set PYTHON to choose the interpreter.
set -euo pipefail
case "${1:-}" in
  -h | --help)  # the head of the script that is run; before anything is installed
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -f pyproject.toml ]; then  # of an installed package: it would be written into
  echo "error: $0 is for a checkout of the project (git clone); an installed project has its Python already: call the tools in $PWD/tools by it" >&2
  exit 2
fi

if [ "$(sha256sum < pyproject.toml)" != "$(cat .venv/installed 2>/dev/null)" ]; then
  python=
  for candidate in ${PYTHON:-} python3.12 python3.13 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer found; install one, or name it with PYTHON=/path/to/python" >&2
    exit 2
  fi
  if ! "$python" -m venv .venv; then
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
  fi
  echo "Installing into .venv (torch and its libraries: some GB, once)"
  # pip says nothing for a minute and more; a log that stands still looks like a hang.
  (while sleep 20 >/dev/null 2>&1; do echo "still installing, $SECONDS s so far"; done) &
  saying=$!
  trap 'kill "$saying" 2>/dev/null' EXIT
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; then
    echo "error: the installation failed, see above; with the cause removed, run the same command again" >&2
    exit 2
  fi
  kill "$saying"
  trap - EXIT
  sha256sum < pyproject.toml > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
