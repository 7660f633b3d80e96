#!/usr/bin/env bash
# From a fresh machine to the paper's claim on drawn scenes, on the CPU, in under 8 minutes after the
# installation: a teacher, SAMI, finetuning, numbers, a page. Arguments go to tools/sweep.py, such as
# --seeds 1; RUN and DATA are the folders, IMAGES how many are drawn.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
out=${RUN:-runs/demo} data=${DATA:-data/toy} images=${IMAGES:-2048}

echo "Drawing scenes with exact masks, in SA-1B's file layout"
python tools/make_toy_shards.py "$data/train" --images "$images" --shards 4 --size 128 --seed 0
python tools/make_toy_shards.py "$data/val" --images $((images / 32)) --shards 1 --size 128 --seed 1

sweep=(configs/sweeps/init_toy.yaml) own=(--out "$out" --set "evaluate.shards=$data/val/sa_*.tar")
for stage in teacher pretrain finetune; do
  own+=("$stage.data.shards=$data/train/sa_*.tar" "$stage.data.val_shards=$data/val/sa_*.tar")
done
own+=(--settings teacher SAMI random "random, SAMI's time" --jobs 2 "$@")
python tools/sweep.py run "${sweep[@]}" all "${own[@]}"
python tools/sweep.py table "${sweep[@]}" "${own[@]}"
shopt -s nullglob # of what --settings left out
page=$(python tools/report.py "$out"/{teacher,pretrain*} "$out"/*/finetune \
  "$out"/*_seed-0/evaluate "$out"/evaluate_* --comparison "$out/comparison.json" \
  --out "$out/report.html")
echo "the report: $page"
