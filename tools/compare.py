"""Models side by side, by one protocol and one clock: size, speed, mIoU, beside what papers say.

python tools/compare.py configs/compare/paper.yaml [--shards PATTERN ... | --coco FILE --images DIR]
                        [--out DIR] [--device cuda] [--precision bf16] ...

Each row of the file is a checkpoint that finetune.model.load_model opens, or FastSAM's .pt; one
without a checkpoint is listed with its paper's numbers. A finished row is kept in OUT/rows/ and not
computed again, unless its file or the protocol changes. OUT gets comparison.md, comparison.json and
comparison.png: latency against mIoU by one click. Papers' numbers are theirs, on their data and
machines.
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
from finetune.candidates import TAKES_CANDIDATE, open_candidate, require_package
from finetune.comparison import (
    SEE,
    ComparisonFile,
    Row,
    RowFiles,
    check_file,
    check_rows,
    compute_row,
)
from finetune.comparison_table import draw, table
from finetune.instances import BoxedImages
from finetune.measuring import open_source
from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.configfile import read_yaml
from sami.core.dataset import SampleSource
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.options import Options, require_least
from sami.core.paths import exists, expand_path, is_file, local_path, path_pattern
from sami.core.plots import save_png
from sami.core.processes import DEVICES, choose_device
from sami.core.shipped import HOME
from sami.core.tables import show_table
from sami.core.weights import check_weights, find_weights
from sami.sweepfile import parse

# Of a comparison's file, what the command line may put in its place.
NUMBERS = ("samples", "masks", "seeds", "seed", "rounds", "proposals")
OPTIONS = ("shards", "coco", "images", "boxes", "choose", *NUMBERS)


def read_file(args: argparse.Namespace) -> tuple[ComparisonFile, list[Row]]:
    """The file with what the command line puts in its place.

    Raises:
        UserError: it is no comparison.
    """
    content = read_yaml(args.config, "", "configs/compare/")
    for name in OPTIONS:
        value = getattr(args, name)
        if value is not None:
            content[name] = str(value) if isinstance(value, Path) else value
    require(args.coco is None or not args.shards, "--shards and --coco exclude each other")
    if args.coco is not None:
        content["shards"] = []
    if args.shards:
        content |= dict.fromkeys(("coco", "images"))
    require("rows" in content, f"{args.config} names no rows; see configs/compare/")
    is_list = isinstance(content["rows"], list)
    require(is_list, f"{args.config}: rows is no list; {SEE}")
    file = ComparisonFile(**vars(parse(ComparisonFile, content, str(args.config), see=SEE)))
    rows = []
    for number, row in enumerate(file.rows, 1):
        where = f"{args.config}: row {number}"
        only_lacks = row.keys() <= {"checkpoint", "paper"}
        require(not only_lacks, f"{where} has no name; {SEE}")
        row = {key: value for key, value in row.items() if key != "paper" or value is not None}
        rows.append(Row(**vars(parse(Row, row, where, see=SEE))))
    check_rows(rows, file.reference, str(args.config))
    check_file(file, str(args.config))
    return file, rows


def find_files(rows: list[Row]) -> dict[str, Path]:
    """The file of each row's weights by its name, before anything is measured.

    A row whose weights are not there is left out, and named.

    Raises:
        UserError: something else is there, or a package that they need is missing.
    """
    files = {}
    for row in (row for row in rows if row.checkpoint):
        option = f"row '{row.name}':"
        place = Path(expand_path(row.checkpoint, row.name))
        here = place if place.is_absolute() else HOME / place
        wrong = check_weights(here, TAKES_CANDIDATE, option)
        if wrong is None:
            files[row.name] = find_weights(here, TAKES_CANDIDATE, row.name).file
            require_package(files[row.name], option)
        elif exists(here):
            raise UserError(wrong)
        else:
            print(f"{wrong.split(';')[0]}: listed without weights")
    return files


def data_of(source: SampleSource, coco: Path | None) -> list[Any]:
    """What the images are, whatever their files are called."""
    if coco is not None:
        return [sha256_of(coco), len(source)]
    return [[shard.count, shard.digest] for shard in source.shards]


def main() -> int:
    parser = Options(description=__doc__)
    add = parser.add_argument
    add("config", type=local_path, metavar="CONFIG")
    add("--shards", type=path_pattern, nargs="+", help="in place of the file's")
    add("--coco", type=local_path, help="likewise, with --images")
    add("--images", type=local_path, help="the folder of --coco's images")
    add("--boxes", type=local_path, help="a detector's, in place of the file's: AP (with --coco)")
    add("--choose", choices=CHOOSE, help="likewise: a box's mask, by which IoU")
    for name in NUMBERS:
        add(f"--{name}", type=int, help="in place of the file's")
    add("--out", type=local_path, help="folder; default: the file's, or runs/compare/NAME")
    add("--keep-crowd", action="store_true", help="score --coco's crowds as objects")
    add("--masks-drawn-on", choices=DRAWN, default="upright", help="as of tools/evaluate.py")
    add("--workers", type=int, default=2, help="processes that decode")
    add("--device", default="auto", help=f"{DEVICES}; default: auto")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    require_least(1, args, "samples", "masks", "seeds", "rounds", "proposals")
    require_least(0, args, "workers", "seed")
    file, rows = read_file(args)
    device = choose_device(args.device)
    for name in OPTIONS:
        setattr(args, name, getattr(file, name))
    args.prompts, args.overlays = [str(one) for one in file.prompts], 0
    for name in ("coco", "images", "boxes"):
        setattr(args, name, getattr(args, name) and Path(getattr(args, name)))
    default = expand_path(file.out or f"runs/compare/{args.config.stem}", f"{args.config}: out")
    out = args.out or HOME / default

    require(not is_file(out), f"--out {out} is a file; name a folder")
    files = find_files(rows)
    require(bool(files), f"{args.config}: none of the rows has weights here; put some there")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    machine += f", {threads} thread{'s' * (threads > 1)}" * (device.type == "cpu")
    machine += f", {args.precision}, torch {torch.__version__}"
    with tempfile.TemporaryDirectory() as folder:
        source, _ = open_source(args, Path(folder))
        first = file.reference and files.get(file.reference)
        if file.reference and first is None:
            print(f"the reference '{file.reference}' has no weights here: no agreement is measured")
        boxed = BoxedImages.of(source, args) if args.boxes else None
        left = ("rows", "out", "boxes", "choose", "proposals")
        protocol = {k: value for k, value in asdict(file).items() if k not in left}
        protocol |= {"machine": machine, "drawn": args.masks_drawn_on}
        protocol["keep_crowd"] = args.keep_crowd
        protocol["data"] = data_of(source, args.coco)
        protocol["reference"] = first and sha256_of(first)
        if boxed is not None:
            protocol |= {"boxes": sha256_of(args.boxes), "choose": file.choose}
        if file.proposals is not None:
            protocol["proposals"] = file.proposals
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
                    reference = open_candidate(first, f"row '{file.reference}':", device)
                given = files[row.name], f"row '{row.name}':"
                one = compute_row(*given, source, args, device, file, reference, boxed)
                store.write(sha256, one | {"checkpoint": row.checkpoint, "sha256": sha256})
            found.append(one)
    head, lines = table(rows, found, first and file.reference)
    caption = (
        f"On {machine}; {len(source)} images. In brackets: 95 % intervals. ↓: not above what needs "
        "no model, which says nothing of the encoder. theirs: the papers' numbers, on their data "
        "and machines."
    )
    pairs = zip(rows, found, strict=True)
    others = [row.name for row, one in pairs if one and one["precision"] != args.precision]
    caption += f" In fp32: {', '.join(others)}." * bool(others)
    show_table(args.config.stem, head, lines, caption)
    markdown = [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines]]
    write_text(out / "comparison.md", "\n".join([*markdown, "", caption, ""]))
    result = {"command": sys.argv, "machine": machine, "protocol": protocol}
    result["rows"] = [asdict(row) | {"measured": one} for row, one in zip(rows, found, strict=True)]
    write_text(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    save_png(draw(rows, found, machine), out / "comparison.png")
    print(f"{out}/comparison.md, comparison.json, comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
