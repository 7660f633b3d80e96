#!/usr/bin/env bash
# Checks the oldest releases that pyproject.toml allows, and the project as a wheel, outside of its
# checkout: installs both into .venv-oldest (torch once more: some GB) and runs a part of the tests.
# Set PYTHON to choose the interpreter. `--install` only installs.
set -euo pipefail
[[ "${1:-}" != @(-h|--help) ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$PWD/.venv-oldest
python=${PYTHON:-python3}

if [ "$(sha256sum < pyproject.toml)" != "$(cat "$venv/installed" 2>/dev/null)" ]; then
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" - > "$venv/oldest.txt" <<'P'
import re, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for word in project["dependencies"] + project["optional-dependencies"]["dev"]:
    name, oldest = re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", word).groups()
    print(f"{name}=={oldest}")
P
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$venv/oldest.txt" '.[dev]'
  rm -rf build # what building the wheel left
  sha256sum < pyproject.toml > "$venv/installed"
fi
[ "${1:-}" != --install ] || exit 0

# The wheel, from another folder: its configurations and tools are there.
(
  away=$(mktemp -d)
  trap 'rm -rf "$away"' EXIT
  cd "$away"
  export PYTHONPATH=
  "$venv/bin/python" -m sami.pretrain --config configs/pretrain/toy.yaml --print_config > toy.yaml
  grep -q 'dir: runs/toy' toy.yaml
  tools=$("$venv/bin/python" -c 'from sami.core.shipped import shipped; print(shipped("tools"))')
  case $tools in "$venv"/*) ;; *) echo "error: $tools is not in $venv" >&2; exit 1 ;; esac
  "$venv/bin/python" "$tools/sweep.py" list configs/sweeps/mask_ratio.yaml > /dev/null
)
# Old releases warn of their own dependencies; those warnings are not ours to mend.
exec "$venv/bin/python" -m pytest -q -o filterwarnings=default -p no:cacheprovider \
  tests/test_optim.py tests/test_images.py tests/test_encoder.py tests/test_model.py \
  tests/test_average_precision.py tests/test_lvis.py \
  tests/test_model_stage2.py tests/test_tiny_vit.py tests/test_losses.py tests/test_checkpoint.py tests/test_dataset.py \
  tests/test_classify.py tests/test_cost.py::test_classification tests/test_entrypoints.py::test_run_folder \
  tests/test_train.py::test_compiled_it_goes_on_too "$@"
