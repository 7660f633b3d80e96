#!/usr/bin/env bash
# Sets up .venv if need be, then checks style and runs the tests. Arguments go to pytest.
# --slurm, first: also install Debian's slurm-wlm and munge, as root or with sudo, and run the batch
# scripts on a throw-away cluster; where that cannot be, these tests say so and skip.
slurm=
if [ "${1:-}" = --slurm ]; then
  slurm=1
  shift
fi
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
ruff format --check .
ruff check .
# Files side by side, the slowest first; one more than there are cores, because many only wait.
workers=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
exec python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
