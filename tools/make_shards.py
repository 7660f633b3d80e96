"""Turn a folder of pictures into shards, without re-encoding them.

python tools/make_shards.py SOURCE OUT [--prefix NAME] [--shard-size 1000] [--seed 0] [--workers N]

With folders below SOURCE, each picture's label is its first folder's place in alphabetical order
(ImageFolder); OUT/classes.json lists the names. Killed, the same command goes on: finished shards
stay. A shard is one tar of <number>.<extension> and, with labels, <number>.cls.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from rich.progress import track

from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import BadSample, UserError
from sami.core.exits import run_entry
from sami.core.images import IMAGE_EXTENSIONS, open_image

Picture = tuple[str, int]  # path below the source, label (-1 without labels)


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
    return [(str(file), number.get(file.parts[0], -1)) for file in files], classes


def write_shard(
    source: Path, path: Path, first: int, pictures: list[Picture]
) -> list[tuple[str, str]]:
    """One tar, under another name until it is whole and on the disk.

    Args:
        first: the number that the first picture is called by.

    Returns:
        The (path, reason) of pictures that cannot be used and were left out.
    """
    temporary, bad = path.with_name(f".{path.name}.writing"), []
    with temporary.open("wb") as file:
        with wds.TarWriter(file, mtime=0) as writer:
            for number, (name, label) in enumerate(pictures, first):
                try:
                    data = (source / name).read_bytes()
                    open_image(data)
                    Image.open(io.BytesIO(data)).verify()
                except BadSample as error:
                    bad.append((name, str(error)))
                    continue
                except (OSError, SyntaxError, ValueError) as error:
                    bad.append((name, f"unreadable ({type(error).__name__})"))
                    continue
                extension = Path(name).suffix.lower().lstrip(".")
                sample = {"__key__": f"{number:08d}", extension: data}
                writer.write(sample | ({"cls": label} if label >= 0 else {}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return bad


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
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another folder"
        ) from error
    found = json.loads(file.read_text())
    changed = [key for key in plan if plan[key] != found.get(key)]
    require(
        not changed,
        f"{out} holds shards made of other pictures or with other options "
        f"({', '.join(changed)} differ); use another OUT or --prefix, or delete them",
    )


def count_pictures(path: Path) -> int:
    """Pictures in a finished shard."""
    with tarfile.open(path) as tar:
        return sum(not name.endswith(".cls") for name in tar.getnames())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="folder with pictures, or with a folder per class"
    )
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--prefix", default="pictures", help="first part of the shards' names")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures per shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    require(args.shard_size > 0, f"--shard-size {args.shard_size} must be positive")
    require(args.workers > 0, f"--workers {args.workers} must be positive")
    require(
        re.fullmatch(r"[A-Za-z0-9_-]+", args.prefix) is not None,
        f"--prefix '{args.prefix}' may hold letters, digits, _ and - only",
    )
    pictures, classes = find_pictures(args.source)
    listing = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
    claim(
        args.out,
        {
            "prefix": args.prefix,
            "pictures": len(pictures),
            "listing": listing,
            "shard_size": args.shard_size,
            "seed": args.seed,
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
    try:
        with ProcessPoolExecutor(args.workers) as pool:
            jobs = pool.map(
                partial(write_shard, args.source),
                [paths[n] for n in missing],
                [starts[n] for n in missing],
                shares,
            )
            for left_out in track(jobs, "writing shards", total=len(missing)):
                bad += left_out
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed (out of memory?); the same command goes on, with fewer --workers"
        ) from error

    for name, reason in bad[:20]:
        print(f"left out: {name}: {reason}")
    if bad:
        print(f"left out in all: {dict(Counter(reason for _, reason in bad))}")
    written = sum(count_pictures(path) for path in paths)
    size = sum(path.stat().st_size for path in paths) / 1e6
    print(
        f"{written} pictures, {len(classes) or 'no'} classes, {len(paths)} shard(s), {size:.2f} GB"
    )
    last = f"{{000000..{len(paths) - 1:06d}}}" if len(paths) > 1 else "000000"
    print(f"--data.shards '{args.out}/{args.prefix}-{last}.tar'")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
