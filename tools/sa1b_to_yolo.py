"""Turn shards in SA-1B's layout into the folder that ultralytics trains FastSAM on.

python tools/sa1b_to_yolo.py PATTERN [PATTERN ...] --val PATTERN [PATTERN ...] --out OUT
    [--min-area 100] [--workers N]

OUT/data.yaml names the training set (PATTERN), the held-out one (--val) and the one class, object.
Every shard becomes OUT/train/SHARD or OUT/val/SHARD with images/, copied byte by byte, and labels/,
a polygon for each mask. Holes and parts are joined to the polygon by bridges, so that the mask that
ultralytics fills has them; those under --min-area pixels are filled, or left out. What cannot be
used is left out and counted.

Killed, the same command goes on. More shards may be added to OUT later. How to train is in
configs/fastsam/yolov8x_seg.yaml and docs/fastsam.md; this tool does not need ultralytics.
"""

import argparse
import glob
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.folders import count_words
from finetune.packing import COPIED, as_png
from finetune.polygons import outline
from finetune.rle import area, box, decode_counts, most_frequent, parse_annotations
from finetune.rle import sample as sample_mask
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import BadSample, UserError, not_written
from sami.core.exits import run_entry
from sami.core.images import drawn_on, open_image
from sami.core.index import Shard, open_sources
from sami.core.options import Options, require_least
from sami.core.overlap import find_overlap
from sami.core.paths import local_path, path_pattern
from sami.core.patterns import expand
from sami.core.progress import track
from sami.core.reading import RawSample, read_samples
from sami.core.scanning import IMAGE

TOGETHER = 32  # images of one piece of work
INPUT = 1024  # longest side that FastSAM trains at, in pixels
TOLERANCE = 0.5  # pixels of that input by which a polygon may leave its mask's outline
DONE = "done.json"
IMAGES, OBJECTS, BAD, MASKS, SHAPES = "images", "objects", "bad images", "bad masks", "shapes"
DATA = """\
# For ultralytics: written by tools/sa1b_to_yolo.py. Paths are relative to this file.
train: train
val: val
names:
  0: object
"""
Counts = dict[str, Counter[str]]


@dataclass(frozen=True)
class Target:
    """Where a shard goes.

    Attributes:
        stamp: of its content and of how it is converted.
    """

    shard: Shard
    folder: Path
    min_area: int
    stamp: str

    @staticmethod
    def of(shard: Shard, folder: Path, min_area: int) -> "Target":
        how = f"{shard.digest} {min_area} {INPUT} {TOLERANCE}"
        stamp = hashlib.sha256(how.encode()).hexdigest()[:16]
        return Target(shard, folder / file_name(shard.name), min_area, stamp)

    @property
    def unfinished(self) -> Path:
        """Where it is written first; hidden, so that ultralytics passes over it."""
        return self.folder.with_name(f".{self.folder.name}-{self.stamp}.writing")

    @property
    def starts(self) -> range:
        """The first row of each piece of its work."""
        return range(0, self.shard.count, TOGETHER)

    def piece(self, start: int) -> Path:
        """The counts of a piece; they are there once it is done."""
        return self.unfinished / f"piece-{start:08d}.json"

    def counts(self) -> Counts | None:
        """What a finished shard holds; None if it is not finished.

        Raises:
            UserError: it was made of other images or with other options.
        """
        if not self.folder.exists():
            return None
        content = read_counts(self.folder / DONE)
        if content.pop("stamp", None) != self.stamp:
            raise UserError(
                f"{self.folder} was made of another shard or with another --min-area; delete it to "
                "make it anew, or use another OUT"
            )
        return to_counts(content)

    def begin(self) -> list[int]:
        """Make the folder to write into; returns the pieces that are missing in it."""
        for stale in self.folder.parent.glob(f".{glob.escape(self.folder.name)}-*.writing"):
            if stale != self.unfinished:  # of other options
                shutil.rmtree(stale)
        for name in ("images", "labels"):
            (self.unfinished / name).mkdir(parents=True, exist_ok=True)
        return [start for start in self.starts if not self.piece(start).exists()]

    def finish(self) -> None:
        """Count together, and give the folder its name."""
        counts = empty_counts()
        for start in self.starts:
            add_counts(counts, to_counts(read_counts(self.piece(start))))
        write_text(self.unfinished / DONE, json.dumps({"stamp": self.stamp} | counts))
        for start in self.starts:
            self.piece(start).unlink()
        self.unfinished.rename(self.folder)


def file_name(key: str) -> str:
    """A key as one part of a path, different for different keys, and not hidden."""
    name = key.replace("%", "%25").replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def empty_counts() -> Counts:
    return {name: Counter() for name in (IMAGES, OBJECTS, BAD, MASKS, SHAPES)}


def to_counts(content: dict[str, dict[str, int]]) -> Counts:
    return empty_counts() | {name: Counter(found) for name, found in content.items()}


def add_counts(counts: Counts, more: Counts) -> None:
    for name, found in more.items():
        counts[name] += found


def read_counts(file: Path) -> dict:
    """
    Raises:
        UserError: it is not there or damaged.
    """
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{file.parent} is damaged or of another program ({file.name}); delete it, and the "
            "same command makes it anew"
        ) from error


# ---- One image


def convert(sample: RawSample, min_area: int, counts: Counts) -> tuple[bytes, str, str]:
    """An image's bytes, their extension, and its lines of labels.

    Raises:
        BadSample: image or annotation cannot be used, or no mask is left.
    """
    data, info = sample.part(IMAGE), parse_annotations(sample.part("json"))
    encoded = open_image(data)
    orientation = encoded.orientation
    drawn, _ = drawn_on(encoded, info.width, info.height, info.drawn_on, "upright")
    tolerance = TOLERANCE * max(1.0, max(info.height, info.width) / INPUT)
    lines, left_out, shapes = [], info.left_out.copy(), Counter()
    for mask in info.masks:
        try:
            ends = decode_counts(mask.counts, info.height, info.width)
        except BadSample as error:
            left_out[str(error)] += 1
            continue
        if not area(ends):
            left_out["mask is empty"] += 1
            continue
        x0, y0, x1, y1 = box(ends, info.height)
        inside = sample_mask(ends, info.height, info.width, np.arange(y0, y1), np.arange(x0, x1))
        ring, done = outline(inside, tolerance, min_area)
        shapes += done
        points = ((ring + [x0, y0]) / [info.width, info.height]).clip(0, 1)
        lines.append("0 " + " ".join(f"{value:.5f}" for value in points.ravel()))
    if not lines:
        raise BadSample(most_frequent(left_out))
    extension = COPIED.get(encoded.format)
    if extension is None or orientation != 1:  # programs differ in whether they turn images
        data, extension = as_png(open_image(data), drawn), "png"
        shapes["images turned by EXIF or of another kind, now PNG"] += 1
    else:
        encoded.decode(drawn)  # ultralytics would stop at a damaged one
    counts[IMAGES]["written"] += 1
    counts[OBJECTS]["written"] += len(lines)
    counts[MASKS] += left_out
    counts[SHAPES] += shapes
    return data, extension, "\n".join(lines) + "\n"


def convert_piece(job: tuple[Target, int]) -> None:
    """A few images of a shard, from a row on.

    Raises:
        UserError: they cannot be written.
    """
    target, start = job
    rows = np.arange(start, min(start + TOGETHER, target.shard.count))
    counts = empty_counts()
    try:
        for sample in read_samples(target.shard, rows, (IMAGE, "json")):
            try:
                data, extension, text = convert(sample, target.min_area, counts)
            except BadSample as error:
                counts[BAD][str(error)] += 1
                continue
            name = file_name(sample.key.removeprefix(f"{target.shard.name}/"))
            (target.unfinished / "labels" / f"{name}.txt").write_text(text)
            (target.unfinished / "images" / f"{name}.{extension}").write_bytes(data)
        write_text(target.piece(start), json.dumps(counts))
    except OSError as error:
        remedy = "mend that, and the same command goes on"
        raise not_written(error, str(target.unfinished), remedy) from error


# ---- All shards


def convert_all(targets: list[Target], workers: int) -> None:
    """Write what is missing, with progress.

    Raises:
        UserError: something cannot be written, or a worker was killed.
    """
    missing = {target.folder: set(target.begin()) for target in targets}
    jobs = [(target, start) for target in targets for start in sorted(missing[target.folder])]
    for target in targets:
        if not missing[target.folder]:  # it ended between the last piece and the name
            target.finish()
    try:
        with ProcessPoolExecutor(workers) as pool:
            done = zip(jobs, pool.map(convert_piece, jobs), strict=True)
            try:
                what = f"converting {TOGETHER} images at a time"
                for (target, start), _ in track(done, what, total=len(jobs)):
                    missing[target.folder].remove(start)
                    if not missing[target.folder]:
                        target.finish()
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed (out of memory?); the same command goes on, with fewer --workers"
        ) from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Options(description=__doc__)
    add = parser.add_argument
    add("patterns", type=path_pattern, nargs="+", help="shards to train on: 'data/sa1b/sa_*.tar'")
    add("--val", type=path_pattern, nargs="+", required=True, help="held-out shards")
    add("--out", type=local_path, required=True, help="folder for data.yaml, train/ and val/")
    small = "pixels: smaller holes are filled, smaller parts of a mask left out (SAM, appendix B)"
    add("--min-area", type=int, default=100, help=small)
    add("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    require_least(0, args, "min_area")
    require_least(1, args, "workers")
    return args


def find(args: argparse.Namespace) -> dict[str, list[Target]]:
    """The shards by train and val, and where they go.

    Raises:
        UserError: a pattern that means no shard, shards without an image, or held-out images that
            are trained on.
    """
    shards = {}
    for split, patterns in (("train", args.patterns), ("val", args.val)):
        key = {"train": "PATTERN", "val": "--val"}[split]
        (source,) = open_sources(expand(patterns, key), args.out / "index")
        shards[split] = source.shards
    overlap = find_overlap(shards["train"], shards["val"], "PATTERN", "--val")
    require(overlap is None, f"{overlap}; name other shards for --val")
    targets = {}
    for split, other in (("train", "val"), ("val", "train")):
        made = [Target.of(shard, args.out / split, args.min_area) for shard in shards[split]]
        twice = [t.folder for t in made if (args.out / other / t.folder.name).exists()]
        require(
            not twice,
            f"{twice and twice[0].name} is in {args.out / other} already; delete it there, or use "
            "another OUT",
        )
        targets[split] = made
    return targets


def report(out: Path, split: str, made: list[Target]) -> None:
    """Print what became of one split's shards.

    Raises:
        UserError: nothing; its folders are deleted.
    """
    counts = empty_counts()
    for target in made:
        add_counts(counts, target.counts())
    images, objects = counts[IMAGES].total(), counts[OBJECTS].total()
    if not images:
        for target in made:
            shutil.rmtree(target.folder)
        raise UserError(
            f"none of the images of {split} could be used ({count_words(counts[BAD])}); name "
            "shards with SA-1B's .json beside the images"
        )
    print("; ".join([f"{split}: {images} images, {objects} objects", *words(counts[SHAPES])]))
    for name, what in ((BAD, "images"), (MASKS, "masks")):
        for left_out in words(counts[name]):
            print(f"{split}: {what} left out: {left_out}")
    others = {path.name for path in (out / split).iterdir() if path.name[0] != "."}
    others -= {target.folder.name for target in made}
    if others:
        print(f"{split}: {len(others)} other shards in {out / split} belong to it too")


def words(counts: Counter[str]) -> list[str]:
    return [count_words(counts)] if counts else []


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        (args.out / "index").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(error, str(args.out), "name another folder") from error
    targets = find(args)
    everything = [target for made in targets.values() for target in made]
    missing = [target for target in everything if target.counts() is None]
    if len(missing) < len(everything):
        print(f"{len(everything) - len(missing)} of {len(everything)} shards are there already")
    convert_all(missing, args.workers)
    for split, made in targets.items():
        report(args.out, split, made)
    write_text(args.out / "data.yaml", DATA)
    print(f"yolo train cfg=configs/fastsam/yolov8x_seg.yaml data={args.out / 'data.yaml'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
