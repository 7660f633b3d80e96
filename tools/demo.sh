#!/usr/bin/env bash
# From a fresh machine to a pretrained encoder on drawn scenes, on the CPU, in about two minutes
# after the installation. Arguments are overrides of configs/pretrain/toy.yaml.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
run=${RUN:-runs/demo} data=${DATA:-data/toy}

echo "1/2  Drawing scenes with exact masks, in SA-1B's file layout"
python tools/make_toy_shards.py "$data/train" --pictures 1024 --shards 4 --size 256 --seed 0
python tools/make_toy_shards.py "$data/val" --pictures 128 --shards 1 --size 256 --seed 1

echo "2/2  SAMI pretraining. No trained SAM is at hand, so the teacher is a small SAM encoder with"
echo "     RANDOM weights: this shows that everything works, not what SAM's features would give."
python sami/pretrain.py --config configs/pretrain/toy.yaml --run.dir "$run" \
  --data.shards "$data/train/sa_*.tar" --data.val_shards "$data/val/sa_*.tar" "$@"

echo
echo "The picture:  $(realpath "$run"/pictures/reconstruction-*.png | tail -n 1)"
echo "The metrics:  $(realpath "$run")/metrics.jsonl   (val_r2: 0 is the best constant map, 1 is perfect)"
echo "The encoder:  $(realpath "$run")/encoder.safetensors"
echo "The summary:  $(realpath "$run")/summary.json"
