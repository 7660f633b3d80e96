"""Models side by side, by one protocol and one clock: size, speed, mIoU, beside what papers say.

python tools/compare.py configs/compare/paper.yaml [--shards PATTERN ... | --coco FILE --images DIR]
                        [--out DIR] [--device cuda] [--precision bf16] ...

Each row of the file is a checkpoint that finetune.model.load_model opens; one without a checkpoint
is listed with its paper's numbers. A finished row is kept in OUT/rows/ and not computed again,
unless its file or the protocol changes. OUT gets comparison.md, comparison.json and comparison.png:
latency against mIoU by one click. Papers' numbers are theirs, on their data and machines.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune.comparison import (
    ComparisonFile,
    Row,
    RowFiles,
    check_rows,
    compute_row,
)
from finetune.measures import TRIVIAL
from finetune.measuring import open_source
from finetune.model import TAKES_MODEL, load_model
from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.configfile import read_yaml
from sami.core.dataset import SampleSource
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.options import Options, require_least
from sami.core.paths import exists, expand_path, local_path, path_pattern
from sami.core.plots import new_figure, plain, save_png
from sami.core.processes import DEVICES, choose_device
from sami.core.shipped import HOME
from sami.core.tables import NONE, interval, show_table
from sami.core.weights import check_weights, find_weights
from sami.sweepfile import parse

PAPER = ("parameters", "latency", "box", "1 click", "3 clicks")  # columns that papers have, too
ONE_CLICK = "1 click"


def read_file(args: argparse.Namespace) -> tuple[ComparisonFile, list[Row]]:
    """The file with what the command line puts in its place.

    Raises:
        UserError: it is no comparison.
    """
    content = read_yaml(args.config, "", "configs/compare/")
    for name in ("shards", "coco", "images", "samples", "masks", "seeds", "seed", "rounds"):
        value = getattr(args, name)
        if value is not None:
            content[name] = value
    if args.coco is not None:
        content["shards"] = []
    require("rows" in content, f"{args.config} names no rows; see configs/compare/")
    is_list = isinstance(content["rows"], list)
    require(is_list, f"{args.config}: rows is no list; see docs/compare.md")
    file = ComparisonFile(**vars(parse(ComparisonFile, content, str(args.config))))
    rows = []
    for number, row in enumerate(file.rows, 1):
        where = f"row {number}"
        rows.append(Row(**vars(parse(Row, row, f"{args.config}: {where}", where))))
    check_rows(rows, file.reference, str(args.config))
    require(
        bool(file.shards) or file.coco is not None,
        f"{args.config} names no images; give --shards PATTERN, or --coco FILE --images DIR",
    )
    return file, rows


def data_of(source: SampleSource, coco: Path | None) -> list[Any]:
    """What the images are, whatever their files are called."""
    if coco is not None:
        return [sha256_of(coco), len(source)]
    return [[shard.count, shard.digest] for shard in source.shards]


def table(rows: list[Row], found: list[dict[str, Any] | None], reference: str | None) -> Any:
    """Head, and a line for each row and, in brackets of a star, its paper's numbers."""
    computed = [one for one in found if one]
    prompts = list(dict.fromkeys(r["prompt"] for one in computed for r in one["miou"]))
    sides = list(dict.fromkeys(side for one in computed for side in one["everything"]))
    prompts = prompts or list(PAPER[2:])
    head = ["model", "parameters, M", "encoder, GMAC", "encoder, ms", "decoder, ms", "images/s"]
    head += [f"mIoU by {name}, %" for name in prompts]
    head += [f"agreement with {reference}, %"] * (reference is not None)
    head += [f"everything {side}², ms" for side in sides]
    lines = []
    for row, one in zip(rows, found, strict=True):
        if one:
            cells = [f"{one['parameters'] / 1e6:.3g}", f"{one['encoder_macs'] / 1e9:.3g}"]
            cells += [f"{one['encoder_ms']:.1f}", f"{one['decoder_ms']:.1f}"]
            cells += [f"{one['images_per_second']:.1f} (batch {one['batch']})"]
            cells += [cell(one, name) for name in prompts]
            if reference is not None:
                shared = one.get("agreement", {}).get(ONE_CLICK)
                cells.append(interval(shared) if shared else NONE)
            cells += [
                f"{one['everything'][side]['ms']:.0f}" if side in one["everything"] else NONE
                for side in sides
            ]
            lines.append([row.name, *cells])
        else:
            lines.append([f"{row.name} (no weights)", *[NONE] * (len(head) - 1)])
        if row.paper:
            values = {name: f"{row.paper[name]:g}" for name in PAPER if name in row.paper}
            cells = [values.get("parameters", NONE), NONE, values.get("latency", NONE), NONE, NONE]
            cells += [values.get(name, NONE) for name in prompts]
            cells += [NONE] * (len(head) - 1 - len(cells))
            lines.append([f"  theirs: {row.paper.get('source', 'its paper')}", *cells])
    if computed:  # the best that needs no model, the same for all rows
        best = {r["prompt"]: r for r in computed[0]["miou"] if r["choice"] in TRIVIAL}
        cells = [interval(best[name]["miou"]["all"]) if name in best else NONE for name in prompts]
        rest = len(head) - 6 - len(cells)
        lines.append(["without a model", *[NONE] * 5, *cells, *[NONE] * rest])
    return head, lines


def cell(one: dict[str, Any], prompt: str) -> str:
    """mIoU of a row by a prompt with its interval; marked where it says nothing of the model."""
    by_choice = {r["choice"]: r["miou"]["all"] for r in one["miou"] if r["prompt"] == prompt}
    if "predicted" not in by_choice:
        return NONE
    trivial = next((info for name, info in by_choice.items() if name in TRIVIAL), None)
    below = trivial is not None and by_choice["predicted"]["mean"] <= trivial["mean"]
    return interval(by_choice["predicted"]) + " ↓" * below


def draw(rows: list[Row], found: list[dict[str, Any] | None], path: Path, device: str) -> None:
    """Latency of an image with one click against mIoU by one click; papers' numbers in grey."""
    figure = new_figure(8, 5)
    axis = figure.subplots()
    for row, one in zip(rows, found, strict=True):
        means = [
            r["miou"]["all"]
            for r in (one or {"miou": []})["miou"]
            if (r["prompt"], r["choice"]) == (ONE_CLICK, "predicted")
        ]
        if means:
            x, y = one["encoder_ms"] + one["decoder_ms"], 100 * means[0]["mean"]
            low, high = (100 * means[0][name] for name in ("low", "high"))
            axis.errorbar(x, y, [[y - low], [high - y]], marker="o", capsize=3)
            axis.annotate(plain(row.name), (x, y), (6, 6), textcoords="offset points")
        if {"latency", ONE_CLICK} <= row.paper.keys():
            x, y = row.paper["latency"], row.paper[ONE_CLICK]
            axis.plot(x, y, marker="o", color="0.7", linestyle="")
            axis.annotate(
                f"{plain(row.name)}, theirs",
                (x, y),
                (6, 6),
                textcoords="offset points",
                color="0.6",
            )
    axis.set_xscale("log")
    axis.set_xlabel(f"ms an image and a click, {device}; grey: the papers' machines")
    axis.set_ylabel("mIoU by 1 click, % (95 % interval)")
    save_png(figure, path)


def main() -> int:
    parser = Options(description=__doc__)
    add = parser.add_argument
    add("config", type=local_path, metavar="CONFIG")
    add("--shards", type=path_pattern, nargs="+", help="in place of the file's")
    add("--coco", type=local_path, help="likewise, with --images")
    add("--images", type=local_path, help="the folder of --coco's images")
    for name in ("samples", "masks", "seeds", "seed", "rounds"):
        add(f"--{name}", type=int, help="in place of the file's")
    add("--out", type=local_path, help="folder; default: the file's, or runs/compare/NAME")
    add("--keep-crowd", action="store_true", help="score --coco's crowds as objects")
    add("--masks-drawn-on", choices=DRAWN, default="upright", help="as of tools/evaluate.py")
    add("--workers", type=int, default=2, help="processes that decode")
    add("--device", default="auto", help=f"{DEVICES}; default: auto")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    require_least(1, args, "samples", "masks", "seeds", "rounds")
    require_least(0, args, "workers", "seed")
    file, rows = read_file(args)
    device = choose_device(args.device)
    for name in ("shards", "coco", "images", "samples", "masks", "seeds", "seed"):
        setattr(args, name, getattr(file, name))
    args.prompts, args.overlays = [str(one) for one in file.prompts], 0
    args.coco, args.images = (one and Path(one) for one in (args.coco, args.images))
    default = expand_path(file.out or f"runs/compare/{args.config.stem}", f"{args.config}: out")
    out = args.out or HOME / default

    # All weights are looked for before anything is measured.
    files = {}
    for row in rows:
        if row.checkpoint:
            place = Path(expand_path(row.checkpoint, row.name))
            here = place if place.is_absolute() else HOME / place
            wrong = check_weights(here, TAKES_MODEL, f"row '{row.name}':")
            if wrong is None:
                files[row.name] = find_weights(here, TAKES_MODEL, row.name).file
            elif exists(here):
                raise UserError(wrong)
            else:
                print(f"{wrong.split(';')[0]}: listed without weights")
    require(bool(files), f"{args.config}: none of the rows has weights here; put some there")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    machine += f", {torch.get_num_threads()} threads" * (device.type == "cpu")
    machine += f", {args.precision}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        source, _ = open_source(args, Path(folder))
        first = file.reference and files.get(file.reference)
        protocol = {k: value for k, value in asdict(file).items() if k not in ("rows", "out")}
        protocol |= {"machine": machine, "drawn": args.masks_drawn_on}
        protocol["keep_crowd"] = args.keep_crowd
        protocol["data"] = data_of(source, args.coco)
        protocol["reference"] = first and sha256_of(first)
        store, found, reference = RowFiles(out, protocol), [], None
        for row in rows:
            if row.name not in files:
                found.append(None)
                continue
            sha256 = sha256_of(files[row.name])
            one = store.read(sha256)
            print(f"{row.name}: {'kept from before' if one else files[row.name]}", flush=True)
            if one is None:
                if first and reference is None:
                    reference = load_model(first, file.reference).to(device)
                model = load_model(files[row.name], f"row '{row.name}':")
                one = compute_row(model, source, args, device, file, reference)
                store.write(sha256, one | {"checkpoint": row.checkpoint, "sha256": sha256})
            found.append(one)
    head, lines = table(rows, found, first and file.reference)
    caption = (
        f"On {machine}; {len(source)} images. In brackets: 95 % intervals. ↓: not above what needs "
        "no model, which says nothing of the encoder. theirs: the papers' numbers, on their data "
        "and machines."
    )
    show_table(args.config.stem, head, lines, caption)
    markdown = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]]
    write_text(out / "comparison.md", "\n".join([*markdown, "", caption, ""]))
    result = {"command": sys.argv, "machine": machine, "protocol": protocol}
    result["rows"] = [asdict(row) | {"measured": one} for row, one in zip(rows, found, strict=True)]
    write_text(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    draw(rows, found, out / "comparison.png", machine)
    print(f"{out}/comparison.md, comparison.json, comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
