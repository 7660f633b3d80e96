#!/usr/bin/env bash
# From a fresh machine to the paper's claim on drawn scenes, on the CPU, in under 8 minutes after the
# installation: a teacher, SAMI, finetuning, numbers, a page. Arguments go to tools/chain.py.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
out=${RUN:-runs/demo} data=${DATA:-data/toy}

echo "Drawing scenes with exact masks, in SA-1B's file layout"
python tools/make_toy_shards.py "$data/train" --pictures 2048 --shards 4 --size 128 --seed 0
python tools/make_toy_shards.py "$data/val" --pictures 64 --shards 1 --size 128 --seed 1

exec python tools/chain.py "$out" --train "$data/train/sa_*.tar" --val "$data/val/sa_*.tar" \
  --val-masks 4 "$@"
