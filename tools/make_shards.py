"""Turn a folder of pictures into shards, without re-encoding them.

python tools/make_shards.py SOURCE OUT [--coco FILE] [--prefix NAME] [--shard-size 1000]
                                       [--seed 0] [--workers N]

With folders below SOURCE, each picture's label is its first folder's place in alphabetical order
(ImageFolder); OUT/classes.json lists the names. With --coco, a file of COCO-format annotations,
the pictures that it names come with their masks, in SA-1B's layout; crowds, and what is malformed,
are left out and counted. Killed, the same command goes on: finished shards stay. A shard is one tar
of <number>.<extension> and <number>.cls or <number>.json.
"""

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from PIL import Image

from finetune.coco import read_coco, to_sa1b
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import BadSample, UserError, not_written, raise_if_machine
from sami.core.exits import run_entry
from sami.core.images import DRAWN, IMAGE_EXTENSIONS, Drawn, drawn_on, open_image
from sami.core.options import Options
from sami.core.paths import local_path
from sami.core.progress import track


class Picture(NamedTuple):
    """A picture to be written: its path below the source and what comes with it."""

    path: str
    label: int = -1  # none
    image: dict[str, Any] | None = None  # COCO's entry and annotations
    annotations: Sequence[dict[str, Any]] = ()


def find_pictures(source: Path) -> tuple[list[Picture], list[str]]:
    """All pictures below a folder, in order of their paths, and the names of the classes.

    Raises:
        UserError: no folder, no picture, or pictures both beside and inside of class folders.
    """
    require(source.is_dir(), f"{source} is not a folder; name one with pictures")
    files = sorted(
        path.relative_to(source)
        for path in source.rglob("*")
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        and not path.name.startswith(".")
        and path.is_file()
    )
    require(bool(files), f"{source} holds no picture ({', '.join(IMAGE_EXTENSIONS)})")
    classes = sorted({file.parts[0] for file in files if len(file.parts) > 1})
    loose = [file for file in files if len(file.parts) == 1]
    require(
        not classes or not loose,
        f"{source} holds pictures both in folders (classes) and beside them, such as "
        f"{loose[0] if loose else ''}; move the loose ones away",
    )
    number = {name: index for index, name in enumerate(classes)}
    return [Picture(str(file), number.get(file.parts[0], -1)) for file in files], classes


def find_annotated(source: Path, coco: Path) -> list[Picture]:
    """The pictures that a COCO-format file names and annotates, in order of their paths.

    Raises:
        UserError: no such folder or file, or none of its pictures is there.
    """
    require(source.is_dir(), f"{source} is not a folder; name the one with the pictures")
    entries = read_coco(coco)
    annotated = {name: entry for name, entry in entries.items() if entry[1]}
    there = [name for name in sorted(annotated) if (source / name).is_file()]
    print(
        f"{len(entries)} pictures in {coco}: {len(entries) - len(annotated)} without annotations, "
        f"{len(annotated) - len(there)} not in {source}"
    )
    first = next(iter(annotated), "none")
    require(
        bool(there),
        f"{source} holds none of the annotated pictures of {coco} (the first is {first}); name the "
        "folder that their file_name is relative to",
    )
    return [Picture(name, -1, *annotated[name]) for name in there]


def write_shard(
    source: Path, default: Drawn, path: Path, first: int, pictures: list[Picture]
) -> tuple[list[tuple[str, str]], Counter[str], int]:
    """One tar, under another name until it is whole and on the disk.

    Args:
        default: where masks lie if their picture's size does not tell.
        first: the number that the first picture is called by.

    Returns:
        The (path, reason) of pictures that cannot be used, and the reasons of masks, all left out;
        and of how many pictures ``default`` decided.
    """
    temporary, bad, bad_masks = path.with_name(f".{path.name}.writing"), [], Counter()
    unsure = 0
    with temporary.open("wb") as file:
        with wds.TarWriter(file, mtime=0) as writer:
            for number, picture in enumerate(pictures, first):
                try:
                    made = make_sample(source, picture, f"{number:08d}", default)
                except BadSample as error:
                    bad.append((picture.path, str(error)))
                    continue
                sample, left_out, guessed = made
                bad_masks += left_out
                unsure += guessed
                writer.write(sample)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return bad, bad_masks, unsure


def make_sample(
    source: Path, picture: Picture, key: str, default: Drawn
) -> tuple[dict[str, Any], Counter[str], bool]:
    """A picture's members, the masks left out by reason, and whether ``default`` decided.

    Raises:
        BadSample: it cannot be used.
    """
    try:
        data = (source / picture.path).read_bytes()
        encoded = open_image(data)
        Image.open(io.BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise_if_machine(error, source / picture.path)
        raise BadSample(f"unreadable ({type(error).__name__})") from error
    extension = Path(picture.path).suffix.lower().lstrip(".")
    sample = {"__key__": key, extension: data}
    if picture.image is None:
        return sample | ({"cls": picture.label} if picture.label >= 0 else {}), Counter(), False
    size = picture.image["width"], picture.image["height"]
    drawn, unsure = drawn_on(encoded, *size, None, default)
    told, left_out = to_sa1b(picture.image, picture.annotations, f"{key}.{extension}")
    if not told["annotations"]:
        raise BadSample("no usable mask")
    if encoded.orientation != 1:
        told["image"]["drawn_on"] = drawn  # decided here, once
    return sample | {"json": json.dumps(told).encode()}, left_out, unsure


def claim(out: Path, plan: dict[str, object]) -> None:
    """Make OUT this plan's folder.

    Raises:
        UserError: it holds shards of another plan, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = out / f"{plan['prefix']}.plan.json"
        if not file.exists():
            write_text(file, json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise not_written(error, str(out), "name another folder") from error
    found = json.loads(file.read_bytes())
    changed = [key for key in plan if plan[key] != found.get(key)]
    require(
        not changed,
        f"{out} holds shards made of other pictures or with other options "
        f"({', '.join(changed)} differ); use another OUT or --prefix, or delete them",
    )


def count_pictures(path: Path) -> int:
    """Pictures in a finished shard."""
    with tarfile.open(path) as tar:
        return sum(not name.endswith((".cls", ".json")) for name in tar.getnames())


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument(
        "source", type=local_path, help="folder with pictures, or with a folder per class"
    )
    parser.add_argument("out", type=local_path, help="folder for the shards")
    parser.add_argument("--coco", type=local_path, help="COCO-format annotations of the pictures")
    parser.add_argument("--prefix", default="pictures", help="first part of the shards' names")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures per shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pictures")
    parser.add_argument(
        "--masks-drawn-on",
        choices=DRAWN,
        default="upright",
        help="where masks lie on a picture turned by EXIF, if they fit both ways (docs/data.md)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    require(args.shard_size > 0, f"--shard-size {args.shard_size} must be positive")
    require(args.workers > 0, f"--workers {args.workers} must be positive")
    require(
        re.fullmatch(r"[A-Za-z0-9_-]+", args.prefix) is not None,
        f"--prefix '{args.prefix}' may hold letters, digits, _ and - only",
    )
    if args.coco is None:
        pictures, classes = find_pictures(args.source)
    else:
        pictures, classes = find_annotated(args.source, args.coco), []
    listing = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
    claim(
        args.out,
        {
            "prefix": args.prefix,
            "pictures": len(pictures),
            "listing": listing,
            "shard_size": args.shard_size,
            "seed": args.seed,
            "masks_drawn_on": args.masks_drawn_on,
        },
    )
    if classes:
        write_text(args.out / "classes.json", json.dumps(classes, indent=1) + "\n")

    order = np.random.default_rng(args.seed).permutation(len(pictures))
    starts = range(0, len(pictures), args.shard_size)
    paths = [args.out / f"{args.prefix}-{number:06d}.tar" for number in range(len(starts))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if len(missing) < len(paths):
        print(f"{len(paths) - len(missing)} of {len(paths)} shards are there already")
    shares = [
        [pictures[i] for i in order[starts[n] : starts[n] + args.shard_size]] for n in missing
    ]
    bad: list[tuple[str, str]] = []
    bad_masks: Counter[str] = Counter()
    unsure = 0
    try:
        with ProcessPoolExecutor(args.workers) as pool:
            jobs = pool.map(
                partial(write_shard, args.source, args.masks_drawn_on),
                [paths[n] for n in missing],
                [starts[n] for n in missing],
                shares,
            )
            for bad_pictures, reasons, guessed in track(jobs, "writing shards", total=len(missing)):
                bad += bad_pictures
                bad_masks += reasons
                unsure += guessed
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed (out of memory?); the same command goes on, with fewer --workers"
        ) from error

    for name, reason in bad[:20]:
        print(f"left out: {name}: {reason}")
    if bad:
        print(f"left out in all: {dict(Counter(reason for _, reason in bad))}")
    if bad_masks:
        print(f"masks left out in all: {dict(bad_masks)}")
    if unsure:
        print(
            f"{unsure} pictures are turned by EXIF and their masks fit both ways: taken as drawn "
            f"on the {args.masks_drawn_on} picture (--masks-drawn-on)"
        )
    written = sum(count_pictures(path) for path in paths)
    size = sum(path.stat().st_size for path in paths) / 1e9
    what = "with masks" if args.coco else f"{len(classes) or 'no'} classes"
    print(f"{written} pictures, {what}, {len(paths)} shard(s), {size:.3g} GB")
    last = f"{{000000..{len(paths) - 1:06d}}}" if len(paths) > 1 else "000000"
    print(f"--data.shards '{args.out}/{args.prefix}-{last}.tar'")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
