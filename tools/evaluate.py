"""mIoU, AP and AR of a model that segments, on shards of SA-1B's layout or COCO-format annotations.

python tools/evaluate.py MODEL --shards PATTERN [PATTERN ...] [--out DIR] ...
python tools/evaluate.py MODEL --coco FILE --images DIR [--out DIR] ...
python tools/evaluate.py MODEL --coco FILE --images DIR --boxes DETECTIONS.json [--proposals 32] ...

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

--boxes names a detector's boxes in COCO's results format: AP of a mask for each box, which keeps
the detector's category and score, by COCO's rules or, on its file, LVIS's. --choose says which
mask: predicted, by predicted IoU (as EfficientViT-SAM), or box, by IoU with the box (as
EfficientSAM). --out gets instances.json, the masks in the same format. --proposals N: AR of all
masks of N x N clicks. With either, mIoU is measured only if --prompts is given.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.box_masks import CHOOSE
from finetune.candidates import SamCandidate
from finetune.coco import CocoSource
from finetune.evaluation import EvalSample
from finetune.instances import BoxedImages, measure_instances
from finetune.measures import PAPER, SOURCE
from finetune.measuring import measure, open_source, promptings_of
from finetune.model import TAKES_MODEL, load_model
from finetune.pictures import draw_masks
from finetune.prompting import PromptSpec
from finetune.proposals import measure_proposals, propose_by_clicks
from finetune.sam import Sam
from finetune.score_tables import show_instances, show_miou, show_proposals
from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.dataset import SampleSource
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.options import Options, require_least
from sami.core.paths import is_file, local_path, path_pattern
from sami.core.processes import DEVICES, choose_device
from sami.core.weights import find_weights

RESULT, INSTANCES = "evaluation.json", "instances.json"
USUAL = "box 1 3 centre-1 centre-3"


def measure_prompts(
    model: Sam,
    source: SampleSource,
    data: str | None,
    specs: tuple[PromptSpec, ...],
    args: argparse.Namespace,
    device: torch.device,
    result: dict[str, Any],
) -> list[EvalSample]:
    """mIoU into the table and the result; images to be drawn."""
    asked = SamCandidate(model), source, specs, args, device
    measured, shown, unusable, noted = measure(*asked)
    rows, images = measured.rows(args.seed), len(measured.areas)
    objects = sum(map(len, measured.areas))
    data = data if images == len(source) else None
    show_miou(rows, data)
    left_out = f", {unusable.total()} unusable {dict(unusable)}" if unusable else ""
    print(f"{args.model}: {images} images{left_out}, {objects} objects")
    if noted:
        print(f"noted: {dict(noted)}")
    coco = source if isinstance(source, CocoSource) else None
    for line in coco.summary(images, unusable, "beyond --samples") if coco else []:
        print(line)
    result |= {
        "pictures": images,
        "unusable": unusable.total(),
        "unusable_by_reason": dict(unusable),
        "noted": dict(noted),
        "in_the_json": coco and coco.counts | {"remarks": coco.remarks},
        "objects": objects,
        "results": rows,
        "data": data,
        "paper": data and {"source": SOURCE, "data": data, "figures": PAPER[data]},
    }
    return shown


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
    add("--prompts", nargs="+", help=f"default: {USUAL}; with --boxes or --proposals none")
    add("--boxes", type=local_path, help="a detector's, in COCO's results format: AP")
    add("--choose", choices=CHOOSE, default=CHOOSE[0], help="a box's mask, by which IoU")
    add("--proposals", type=int, metavar="N", help="AR of all masks of N x N clicks")
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
    require_least(1, args, "seeds", "samples", "masks", "proposals")
    require_least(0, args, "overlays", "workers", "seed")
    require(
        args.out is None or not (args.out / RESULT).exists(),
        f"{args.out} holds an evaluation already; name another --out, or delete it",
    )
    is_folder = args.out is None or not is_file(args.out)
    require(is_folder, f"--out {args.out} is a file; name a folder")
    more = args.boxes is not None or args.proposals is not None
    require(args.coco is not None or not more, "--boxes and --proposals go with --coco")
    if args.prompts is None:
        args.prompts = [] if more else USUAL.split()
    device = choose_device(args.device)

    weights = find_weights(args.model, TAKES_MODEL, "MODEL")
    if weights.note:
        print(weights.note)
    model = load_model(weights.file, "MODEL").to(device)
    specs = promptings_of(args.prompts, args.seeds, model)
    info = {"path": args.model, "sha256": sha256_of(weights.file), "step": weights.step}
    result = {"model": info | asdict(model.shape), "command": sys.argv}
    result |= {"masks_drawn_on": args.masks_drawn_on, "results": []}
    shown, written = [], [RESULT]
    with tempfile.TemporaryDirectory() as folder:
        source, data = open_source(args, Path(folder))
        if args.boxes is not None:  # what may be wrong with another file is told first
            boxed = BoxedImages.of(source, args)
            found = measure_instances(SamCandidate(model), boxed, args, device)
            show_instances(found.report)
            result["instances"] = found.report
            if args.out is not None:
                written.append(INSTANCES)
                args.out.mkdir(parents=True, exist_ok=True)
                write_text(args.out / INSTANCES, json.dumps(found.results) + "\n")
        if args.proposals is not None:
            propose = propose_by_clicks(model, args.proposals)
            result["proposals"] = measure_proposals(propose, source, args, device)
            show_proposals(result["proposals"], args.proposals)
        if specs:
            shown = measure_prompts(model, source, data, specs, args, device, result)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        if shown:
            print(f"drawing {len(shown)} images (--overlays 0 for none)", flush=True)
            drawn = tuple(spec for spec in specs if spec.draw == 0)
            draw_masks(args.out / "masks.png", model, shown, device, str(args.model), drawn)
            written.append("masks.png")
        write_text(args.out / RESULT, json.dumps(result, indent=1) + "\n")
        print(" and ".join(f"{args.out}/{name}" for name in written))
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
