"""Turn a folder of images into shards, without re-encoding them.

python tools/make_shards.py SOURCE OUT [--prefix NAME] [--shard-size 1000] [--seed 0] [--workers N]
    [--like TRAIN | --classes FILE] [--labels FILE [--synsets meta.mat]]
python tools/make_shards.py SOURCE OUT --coco FILE [--keep-crowd] [--masks-drawn-on stored] ...

With folders below SOURCE, each image's class is its first folder; classes are numbered in
alphabetical order (ImageFolder), and OUT/classes.json lists the names. Held-out images need the
training set's numbers: --like names its shards or their folder, --classes its classes.json; a
folder that is not in it is an error. --labels takes the classes from a file instead: lines of
"name class", CSV (LOC_val_solution.csv), a class a line in the order of the names, or, with
--synsets, the numbers of ILSVRC2012's ground truth. Links are followed; hidden and system files and
folders are passed over.

With --coco, a file of COCO-format annotations, the images that it names come with their masks, in
SA-1B's layout; crowds (but see --keep-crowd), and what is malformed, are left out and counted.

.jpg, .jpeg, .png and .webp are copied byte by byte; .bmp, .gif (its first frame) and .tif become
PNG without a loss. Killed, the same command goes on: finished shards stay. If an image of a
finished shard changed since (by size or time), that is said. A shard is one tar of
<number>.<extension> and <number>.cls or <number>.json.
"""

import argparse
import os
import re
import sys
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np

from finetune.class_names import (
    Classes,
    class_folders,
    listed_classes,
    number_classes,
    question_names,
)
from finetune.coco import CocoSource, read_coco
from finetune.folders import count_words, find_images
from finetune.packing import (
    How,
    SourceImage,
    Written,
    claim,
    listing,
    pack_shard,
    stamp,
    unclaim,
)
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.images import DRAWN
from sami.core.labels import CLASSES
from sami.core.options import Options, require_least
from sami.core.paths import local_path, path_pattern
from sami.core.progress import track


def find(args: argparse.Namespace) -> tuple[list[SourceImage], list[str], CocoSource | None]:
    """The images that a command line asks for, the names of their classes, or COCO's source.

    Raises:
        UserError: there are none, or it cannot be told what they are.
    """
    if args.coco is not None:
        coco = CocoSource.of(read_coco(args.coco), args.source)
        images = [SourceImage(path, -1, one) for path, one in coco.entries]
        return images, [], coco
    known = Classes.read(args.classes) if args.classes else None
    known = Classes.beside(args.like) if args.like else known
    found, others = find_images(args.source)
    for path, reason in found.remarks[:20]:
        print(f"left out: {path}: {reason}")
    if found.remarks:
        print(f"left out in all: {len(found.remarks)} links")
    if others:
        print(f"not images: {count_words(others)}")
    if args.labels is not None:
        named = args.labels, found.files, args.source, args.synsets, known
        class_of, unused = listed_classes(*named)
        if unused:
            print(f"{unused} lines of {args.labels} are of no image in {args.source}")
    else:
        class_of = class_folders(found.files, args.source)
        if known is None and not args.these_are_classes:
            question_names(class_of, args.source)
        require(
            known is None or bool(class_of),
            f"{args.source} holds no folders, so that nothing tells the classes; give --labels, or "
            "leave out --like and --classes",
        )
    if not class_of:
        return [SourceImage(file) for file in found.files], [], None
    classes, numbers = number_classes(class_of, known, args.labels is not None)
    print(classes.describe(numbers))
    if known is None:
        print(f"numbered by themselves; held-out images of these classes need --like {args.out}")
    images = [SourceImage(file, label) for file, label in zip(class_of, numbers, strict=True)]
    return images, classes.names, None


def count_images(path: Path) -> int:
    """Images in a finished shard."""
    with tarfile.open(path) as tar:
        return sum(not name.endswith((".cls", ".json")) for name in tar.getnames())


def tell(written: Written) -> None:
    """What was left out of the shards, and what was done to images in them."""
    for name, reason in written.bad[:20]:
        print(f"left out: {name}: {reason}")
    if written.bad:
        print(f"left out in all: {dict(Counter(reason for _, reason in written.bad))}")
    if written.masks:
        print(f"masks left out in all: {dict(written.masks)}")
    for what, count in written.noted.items():
        print(f"{count} images {what}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """
    Raises:
        UserError: options that do not go together.
    """
    parser = Options(description=__doc__)
    add = parser.add_argument
    add("source", type=local_path, help="folder with images, or with a folder per class")
    add("out", type=local_path, help="folder for the shards")
    add("--coco", type=local_path, help="COCO-format annotations of the images")
    add("--keep-crowd", action="store_true", help="keep --coco's crowds as objects")
    turned = "where masks lie on an image turned by EXIF, if they fit both ways (docs/data.md)"
    add("--masks-drawn-on", choices=DRAWN, default="upright", help=turned)
    numbering = parser.add_mutually_exclusive_group()
    like = "training shards whose classes.json numbers the classes"
    numbering.add_argument("--like", type=path_pattern, help=like)
    numbering.add_argument("--classes", type=local_path, help="that classes.json, or another list")
    add("--labels", type=local_path, help="file that tells each image's class")
    add("--synsets", type=local_path, help="ILSVRC2012's meta.mat, for its numbers")
    sure = "folders such as train and val are classes"
    add("--these-are-classes", action="store_true", help=sure)
    add("--prefix", default="pictures", help="first part of the shards' names")
    add("--shard-size", type=int, default=1000, help="images per shard")
    add("--seed", type=int, default=0, help="of the order of the images")
    add("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    require_least(1, args, "shard_size", "workers")
    require(
        re.fullmatch(r"[A-Za-z0-9_-]+", args.prefix) is not None,
        f"--prefix '{args.prefix}' may hold letters, digits, _ and - only",
    )
    for name in ("like", "classes", "labels"):
        require(
            args.coco is None or getattr(args, name) is None,
            f"--{name} does not go with --coco, which makes masks and no classes",
        )
    require(args.coco is not None or not args.keep_crowd, "--keep-crowd goes with --coco")
    require(args.labels is not None or args.synsets is None, "--synsets goes with --labels")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    images, classes, coco = find(args)
    order = np.random.default_rng(args.seed).permutation(len(images))
    starts = range(0, len(images), args.shard_size)
    shares = [[images[i] for i in order[start : start + args.shard_size]] for start in starts]
    names = [f"{args.prefix}-{number:06d}.tar" for number in range(len(starts))]
    paths = [args.out / name for name in names]
    plan = {"prefix": args.prefix, "pictures": len(images), "listing": listing(images)}
    plan |= {"shard_size": args.shard_size, "seed": args.seed}
    if coco is not None:
        plan |= {"masks_drawn_on": args.masks_drawn_on, "keep_crowd": args.keep_crowd}
    with ThreadPoolExecutor(16) as pool:  # a network's file system answers many at once
        stamps = list(pool.map(partial(stamp, args.source), shares))
    own_classes = not (args.out / CLASSES).exists()
    claim(args.out, args.prefix, plan, dict(zip(names, stamps, strict=True)), classes)

    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if len(missing) < len(paths):
        print(f"{len(paths) - len(missing)} of {len(paths)} shards are there already")
    how = How(args.source, args.masks_drawn_on, args.keep_crowd)
    written = Written()
    try:
        with ProcessPoolExecutor(args.workers) as pool:
            jobs = pool.map(
                partial(pack_shard, how),
                [paths[n] for n in missing],
                [starts[n] for n in missing],
                [shares[n] for n in missing],
            )
            try:
                for shard in track(jobs, "writing shards", total=len(missing)):
                    written.add(shard)
            except UserError:
                pool.shutdown(cancel_futures=True)  # or all the others would be written first
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed (out of memory?); the same command goes on, with fewer --workers"
        ) from error

    tell(written)
    total = sum(count_images(path) for path in paths)
    reasons = Counter(reason for _, reason in written.bad)
    for line in coco.summary(total, reasons, "left out before") if coco else []:
        print(line)
    if not total:
        unclaim(args.out, args.prefix, paths, own_classes)
        masks = f"; masks: {count_words(written.masks)}" if written.masks else ""
        raise UserError(
            f"none of the {len(images)} images of {args.source} could be used, and nothing was "
            f"written: {count_words(reasons) or 'the shards there are empty'}{masks}"
        )
    size = sum(path.stat().st_size for path in paths) / 1e9
    what = "with masks" if args.coco else f"{len(classes) or 'no'} classes"
    print(f"{total} images, {what}, {len(paths)} shard(s), {size:.3g} GB")
    last = f"{{000000..{len(paths) - 1:06d}}}" if len(paths) > 1 else "000000"
    print(f"--data.shards '{args.out}/{args.prefix}-{last}.tar'")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
