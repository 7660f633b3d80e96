"""mIoU of a model that segments, on shards of SA-1B's layout or on COCO-format annotations.

python tools/evaluate.py MODEL --shards PATTERN [PATTERN ...] [--out DIR] ...
python tools/evaluate.py MODEL --coco FILE --images DIR [--out DIR] ...

MODEL is a run folder of finetune/train.py (its newest checkpoint, as long as it has not ended), its
model.safetensors, a released EfficientSAM .pt or .pt.zip, or SAM's .pth. Prompts (--prompts): box,
the mask's tight one; a number of clicks, drawn uniformly in the mask, as EfficientSAM's table 4 has
it, in --seeds draws; centre-N, a click farthest from the mask's boundary and then N - 1 where most
is wrong, as Segment Anything has it.

Scored at the image's own size are the mask with the highest predicted IoU, and the oracle, the
best of three, and beside them what needs no model: the box filled, or a disc at the clicks. Small,
medium and large objects are COCO's: below 32 x 32 and 96 x 96 pixels. The brackets hold 95 % of
1,000 bootstrap samples of the images. On the whole of COCO val2017 or LVIS v1 val the paper's
figures stand below. --out gets evaluation.json and masks drawn over images.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.candidates import SamCandidate
from finetune.coco import CocoSource
from finetune.evaluation import CHOICES
from finetune.measures import PAPER, SIZES, SOURCE, TRIVIAL
from finetune.measuring import measure, open_source, promptings_of
from finetune.model import TAKES_MODEL, load_model
from finetune.pictures import draw_masks
from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.options import Options, require_least
from sami.core.paths import local_path, path_pattern
from sami.core.processes import DEVICES, choose_device
from sami.core.tables import interval, percent, show_table
from sami.core.weights import find_weights

RESULT = "evaluation.json"


def show(rows: list[dict[str, Any]], data: str | None) -> None:
    """Ours, under it what needs no model and, on the paper's own data set, the paper's figures."""
    table = []
    for row in rows:
        whole, *sizes = row["miou"].values()
        name = row["prompt"] if row["choice"] == CHOICES[0] else ""
        cells = [interval(whole), *(percent(info["mean"]) for info in sizes)]
        table.append([name, row["choice"], *cells])
        if row["choice"] in TRIVIAL and data is not None:
            for model, info in PAPER[data].items():
                if row["prompt"] in info:
                    figure = f"{info[row['prompt']]:.1f}"
                    table.append(["", f"{model} *", figure, *["-"] * len(sizes)])
    caption = (
        "In brackets: 95 % intervals. predicted: the mask that the model thinks best; oracle: the "
        "best of three. Without a model: the box filled; a disc at the clicks, of the one size "
        "that is best for these objects."
    )
    if data is not None:
        caption += f" *: the paper's ({SOURCE}, on {data}), not ours."
    show_table("mIoU in %", ["prompt", "mask", *SIZES], table, caption, words=2)


def main() -> int:
    parser = Options(description=__doc__)
    add = parser.add_argument
    add("model", type=path_pattern, metavar="MODEL")
    data = parser.add_mutually_exclusive_group(required=True)
    such = "such as 'data/sa1b/sa_00099*.tar'"
    data.add_argument("--shards", type=path_pattern, nargs="+", help=such)
    data.add_argument("--coco", type=local_path, help="annotations in COCO's or LVIS's format")
    add("--images", type=local_path, help="the folder of --coco's images")
    add("--keep-crowd", action="store_true", help="score --coco's crowds as objects")
    turned = "where masks lie on an image turned by EXIF, if they fit both ways (docs/data.md)"
    add("--masks-drawn-on", choices=DRAWN, default="upright", help=turned)
    usual = "box 1 3 centre-1 centre-3"
    add("--prompts", nargs="+", default=usual.split(), help=f"default: {usual}")
    add("--seeds", type=int, default=3, help="draws of random clicks")
    add("--seed", type=int, default=0, help="of all that is drawn")
    add("--samples", type=int, help="at most so many images, the first ones")
    add("--masks", type=int, help="at most so many objects of an image")
    add("--out", type=local_path, help="folder for the result and the images")
    add("--overlays", type=int, default=8, help="images that are drawn")
    add("--workers", type=int, default=2, help="processes that decode")
    add("--device", default="auto", help=f"{DEVICES}; default: auto")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    require_least(1, args, "seeds", "samples", "masks")
    require_least(0, args, "overlays", "workers", "seed")
    require(
        args.out is None or not (args.out / RESULT).exists(),
        f"{args.out} holds an evaluation already; name another --out, or delete it",
    )
    device = choose_device(args.device)

    weights = find_weights(args.model, TAKES_MODEL, "MODEL")
    if weights.note:
        print(weights.note)
    model = load_model(weights.file, "MODEL").to(device)
    specs = promptings_of(args.prompts, args.seeds, model)
    with tempfile.TemporaryDirectory() as folder:
        source, data = open_source(args, Path(folder))
        asked = SamCandidate(model), source, specs, args, device
        measured, shown, unusable, noted = measure(*asked)
    rows, images = measured.rows(args.seed), len(measured.areas)
    objects = sum(map(len, measured.areas))
    data = data if images == len(source) else None
    show(rows, data)
    left_out = f", {unusable.total()} unusable {dict(unusable)}" if unusable else ""
    print(f"{args.model}: {images} images{left_out}, {objects} objects")
    if noted:
        print(f"noted: {dict(noted)}")
    coco = source if isinstance(source, CocoSource) else None
    for line in coco.summary(images, unusable, "beyond --samples") if coco else []:
        print(line)
    if args.out is not None:
        info = {"path": args.model, "sha256": sha256_of(weights.file), "step": weights.step}
        result = {
            "model": info | asdict(model.shape),
            "command": sys.argv,
            "pictures": images,
            "unusable": unusable.total(),
            "unusable_by_reason": dict(unusable),
            "noted": dict(noted),
            "in_the_json": coco and coco.counts | {"remarks": coco.remarks},
            "masks_drawn_on": args.masks_drawn_on,
            "objects": objects,
            "results": rows,
            "data": data,
            "paper": data and {"source": SOURCE, "data": data, "figures": PAPER[data]},
        }
        args.out.mkdir(parents=True, exist_ok=True)
        if shown:
            print(f"drawing {len(shown)} images (--overlays 0 for none)", flush=True)
            drawn = tuple(spec for spec in specs if spec.draw == 0)
            draw_masks(args.out / "masks.png", model, shown, device, str(args.model), drawn)
        write_text(args.out / RESULT, json.dumps(result, indent=1) + "\n")
        print(f"{args.out}/{RESULT}" + f" and {args.out}/masks.png" * bool(shown))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
