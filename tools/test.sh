#!/usr/bin/env bash
# Sets up .venv if need be, then checks style and runs the tests. Arguments go to pytest, among them
#   --quick   without the tests that start a program or take seconds: under two minutes on two cores
# First may stand
#   --slurm   also install Debian's slurm-wlm and munge, as root or with sudo, and run the batch scripts
#             on a throw-away cluster; where that cannot be, these tests say so and skip
#   --oldest  also check the oldest releases that pyproject.toml allows (tools/oldest.sh)
slurm= oldest=
while :; do
  case "${1:-}" in
    --slurm) slurm=1 ;;
    --oldest) oldest=1 ;;
    *) break ;;
  esac
  shift
done
# No test fails because a machine is slow, but what hangs is ended (tests/runs.py): on a very slow one
# SAMI_TEST_TIMEOUT_SCALE=5 bash tools/test.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if [ -n "$slurm" ]; then
  export SAMI_SLURM=1 PATH="$PATH:/usr/sbin:/sbin"
  if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    root=$([ "$(id -u)" -eq 0 ] || echo sudo -n)
    # Debian starts no daemons for them: the tests start their own.
    $root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 sh -c \
      'apt-get update -qq && apt-get install -y -qq slurm-wlm munge' >/dev/null ||
      echo "slurm-wlm and munge cannot be installed here: the tests of slurm/ will be skipped" >&2
  fi
fi
if [ -n "$oldest" ]; then # it waits for the network, mostly: beside the tests
  log=$(mktemp)
  bash tools/oldest.sh --install > "$log" 2>&1 &
  installing=$!
fi
ruff format --check .
ruff check .
# Files side by side, the slowest first; one more than there are cores, because many only wait: not
# those of --quick, and each worker imports everything.
more=$([[ " $* " == *" --quick "* ]] && echo 0 || echo 1)
workers=$(($(nproc) < 4 ? $(nproc) + more : 4))
python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
if [ -n "$oldest" ]; then
  wait "$installing" || { cat "$log"; exit 1; }
  echo "The oldest releases that pyproject.toml allows"
  bash tools/oldest.sh
fi
