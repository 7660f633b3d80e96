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

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.coco import CocoSource, read_coco
from finetune.evaluation import CHOICES, EvalDataset, score
from finetune.measures import PAPER, SIZES, SOURCE, TRIVIAL, Measured, data_set
from finetune.model import TAKES_MODEL, load_model
from finetune.pictures import draw_masks
from finetune.prompting import PromptSpec
from finetune.rle import area
from finetune.sam import Sam
from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.dataset import SampleSource, ShardSource, load
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.index import open_sources
from sami.core.options import Options, require_least
from sami.core.paths import local_path, path_pattern
from sami.core.patterns import expand
from sami.core.processes import DEVICES, choose_device
from sami.core.progress import track
from sami.core.reading import RawSample
from sami.core.tables import interval, percent, show_table
from sami.core.weights import find_weights

RESULT = "evaluation.json"


def open_source(args: argparse.Namespace, folder: Path) -> tuple[SampleSource, str | None]:
    """The samples that a command line names, and which of the paper's data sets they are, whole.

    Args:
        folder: where shards without an index are indexed.
    """
    if args.coco is not None:
        require(args.images is not None, "--coco needs --images, the folder of its images")
        info = read_coco(args.coco)
        source = CocoSource.of(info, args.images, args.samples, args.keep_crowd)
        annotations = [len(one.annotations) for one in info.entries.values()]
        whole = args.masks is None and len(source) == sum(map(bool, annotations))
        whole = whole and not args.keep_crowd
        return source, data_set(len(info.entries), sum(annotations)) if whole else None
    require(not args.keep_crowd, "--keep-crowd goes with --coco")
    sources = open_sources(expand(args.shards, "--shards"), folder, print)
    shards = [shard for source in sources for shard in source.shards]
    count = sum(shard.count for shard in shards)
    require(count > 0, f"--shards {' '.join(args.shards)} hold no samples")
    return ShardSource.first(shards, EvalDataset.fields, args.samples), None


def promptings_of(words: list[str], seeds: int, model: Sam) -> tuple[PromptSpec, ...]:
    """What ``--prompts`` asks for.

    Raises:
        UserError: an unknown word, or more clicks than the model takes.
    """
    found: list[PromptSpec] = []
    for word in dict.fromkeys(words):
        try:
            found += PromptSpec.parse(word, seeds)
        except ValueError as error:
            raise UserError(
                f"--prompts {word} is none of box, a number of clicks such as 3, or centre-3"
            ) from error
        most = model.max_points
        require(
            most is None or found[-1].clicks <= most,
            f"--prompts {word}: this model takes {most} points at most; ask for fewer",
        )
    return tuple(found)


def measure(
    model: Sam,
    source: SampleSource,
    specs: tuple[PromptSpec, ...],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[Measured, list, Counter[str], Counter[str]]:
    """Every image's IoU, and the first few images to be drawn; why others were left out, and
    what is to be told of those that were used."""
    asked = specs, args.masks, args.seed, args.masks_drawn_on
    dataset = EvalDataset(source, model.shape, *asked)
    measured, shown = Measured(specs), []
    unusable, noted = Counter(), Counter()
    batches = load(dataset, [[number] for number in range(len(source))], args.workers, device)
    bf16 = args.precision == "bf16"
    for (sample,) in track(batches, "evaluating", total=len(source)):
        if isinstance(sample, RawSample):
            unusable[sample.reason] += 1
            continue
        noted.update(sample.notes)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            iou = score(model, sample, device, specs)
        areas = np.array([area(ends) for ends in sample.ends])
        measured.add(iou.cpu().numpy(), areas, sample.trivial)
        if len(shown) < args.overlays:
            shown.append(sample)
    remedy = "are these SA-1B's JSON?" if args.coco is None else "crowds are kept by --keep-crowd"
    require(bool(measured.areas), f"none of the images could be used ({dict(unusable)}); {remedy}")
    return measured, shown, unusable, noted


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
        measured, shown, unusable, noted = measure(model, source, specs, args, device)
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
