#!/usr/bin/env bash
# From a fresh machine to the paper's claim on drawn scenes, on the CPU, in under 8 minutes after the
# installation: a teacher, SAMI, finetuning, numbers, a page. Arguments go to tools/chain.py; RUN and
# DATA are the folders, PICTURES how many are drawn.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
out=${RUN:-runs/demo} data=${DATA:-data/toy} pictures=${PICTURES:-2048}

echo "Drawing scenes with exact masks, in SA-1B's file layout"
python tools/make_toy_shards.py "$data/train" --pictures "$pictures" --shards 4 --size 128 --seed 0
python tools/make_toy_shards.py "$data/val" --pictures $((pictures / 32)) --shards 1 --size 128 --seed 1

exec python tools/chain.py "$out" --train "$data/train/sa_*.tar" --val "$data/val/sa_*.tar" \
  --val-masks 4 "$@"
