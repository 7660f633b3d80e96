"""Draw a data set: textured, overlapping shapes with exact masks, in SA-1B's file layout.

python tools/make_toy_shards.py OUT [--images 1024] [--shards 4] [--size 256] [--seed 0]

An image is a function of (seed, its number) alone. Each shard holds sa_<id>.jpg and sa_<id>.json
(COCO run lengths), as the tars of SA-1B do.
"""

import argparse
import io
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from sami.core.config import require
from sami.core.exits import run_entry
from sami.core.options import Options, require_least
from sami.core.order import sample_rng
from sami.core.paths import local_path
from sami.core.progress import track

MIN_AREA = 100  # pixels; as in SA-1B, smaller ones are not annotated
MAX_OBJECTS = 16


def draw_scene(
    seed: int, number: int, height: int, width: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """An image and the masks of what is visible of its objects.

    Returns:
        uint8 [H, W, 3], and bool [H, W] per object, disjoint, back to front; those under
        MIN_AREA are in the image and not among the masks.
    """
    rng = sample_rng(seed, 0, f"scene/{number}")
    image = _texture(rng, np.arange(height)[:, None], np.arange(width)[None, :])
    labels = np.zeros((height, width), dtype=np.int32)
    count = int(rng.integers(4, MAX_OBJECTS + 1))
    for label in range(1, count + 1):
        shape, (top, left) = _shape(rng, height, width)
        rows = np.arange(top, top + shape.shape[0])[:, None]
        columns = np.arange(left, left + shape.shape[1])[None, :]
        texture = _texture(rng, rows, columns)
        light = 1 + 0.25 * (_across(rng, rows, columns, 1.0) - 0.5)
        region = (slice(top, top + shape.shape[0]), slice(left, left + shape.shape[1]))
        image[region][shape] = (texture * light[..., None])[shape]
        labels[region][shape] = label
    image += rng.normal(0, 0.015, (height, width, 1))
    masks = [labels == label for label in range(1, count + 1)]
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels, [mask for mask in masks if mask.sum() >= MIN_AREA]


def annotate(
    number: int, masks: list[np.ndarray], height: int, width: int, seed: int
) -> dict[str, Any]:
    """The JSON of an image, with SA-1B's keys; masks as COCO run lengths."""
    rng = sample_rng(seed, 0, f"points/{number}")
    annotations = []
    for index, mask in enumerate(masks):
        coded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        inside = np.flatnonzero(mask)
        y, x = divmod(int(inside[rng.integers(len(inside))]), width)
        annotations.append(
            {
                "id": number * 1000 + index,
                "segmentation": {"size": [height, width], "counts": coded["counts"].decode()},
                "bbox": [float(value) for value in coco_mask.toBbox(coded)],
                "area": int(coco_mask.area(coded)),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "crop_box": [0.0, 0.0, float(width), float(height)],
                "point_coords": [[float(x), float(y)]],
            }
        )
    name = f"sa_{number}.jpg"
    image = {"image_id": number, "width": width, "height": height, "file_name": name}
    return {"image": image, "annotations": annotations}


def write_shard(out: Path, seed: int, height: int, width: int, shard: int, numbers: range) -> Path:
    """One tar, under another name until it is whole; equal arguments give equal bytes."""
    path = out / f"sa_{shard:06d}.tar"
    temporary = out / f".{path.name}.writing"
    with wds.TarWriter(str(temporary), mtime=0) as writer:
        for number in numbers:
            image, masks = draw_scene(seed, number, height, width)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=92)
            annotation = json.dumps(annotate(number, masks, height, width, seed)).encode()
            writer.write({"__key__": f"sa_{number}", "jpg": buffer.getvalue(), "json": annotation})
    temporary.replace(path)
    return path


def _shape(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A random shape's mask, cropped to the image, and its top left corner."""
    radius = min(height, width) * 0.5 * math.exp(rng.uniform(math.log(0.06), math.log(0.75)))
    centre = rng.uniform(0, 1, 2) * (width, height)
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.7, 0.7))
    kind = rng.choice(["ellipse", "rectangle", "polygon", "star", "blob", "ring"])
    turn = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    reach = np.ones_like(turn)
    if kind == "rectangle":
        turn = np.array([0.25, 0.75, 1.25, 1.75]) * math.pi
        reach = np.full(4, 1.2)
    elif kind == "polygon":
        turn = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
        reach = rng.uniform(0.6, 1.2, len(turn))
    elif kind == "star":
        turn = np.linspace(0, 2 * math.pi, 2 * int(rng.integers(4, 8)), endpoint=False)
        reach = np.where(np.arange(len(turn)) % 2, rng.uniform(0.3, 0.6), 1.2)
    elif kind == "blob":
        reach = 1 + sum(
            rng.uniform(-0.2, 0.2) * np.cos(k * turn + rng.uniform(0, 6)) for k in (2, 3, 4, 5)
        )
    local = np.stack([np.cos(turn) * reach * stretch, np.sin(turn) * reach / stretch], 1) * radius
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = local @ rotation + centre
    left, top = np.maximum(np.floor(points.min(0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 1, (width, height))
    if right <= left or bottom <= top:
        return np.zeros((1, 1), dtype=bool), (0, 0)
    canvas = Image.new("1", (int(right - left), int(bottom - top)))
    pen = ImageDraw.Draw(canvas)
    pen.polygon([tuple(p) for p in points - (left, top)], fill=1)
    if kind == "ring":
        inner = (points - centre) * rng.uniform(0.35, 0.7) + centre
        pen.polygon([tuple(p) for p in inner - (left, top)], fill=0)
    return np.asarray(canvas), (int(top), int(left))


def _texture(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Two colours mixed by a random pattern: float [h, w, 3] in about 0..1."""
    first, second = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    second = first + (second - first) * rng.uniform(0.15, 1)  # now and then hardly to be told apart
    kind = rng.choice(["stripes", "checks", "dots", "noise", "ramp", "plain"])
    period = math.exp(rng.uniform(math.log(5), math.log(40)))
    if kind == "stripes":
        mix = 0.5 + 0.5 * np.sin(2 * math.pi * _across(rng, rows, columns, 1 / period))
    elif kind == "checks":
        mix = ((rows // period + columns // period) % 2).astype(float)
    elif kind == "dots":
        y, x = (places % period / period - 0.5 for places in (rows, columns))
        mix = (y**2 + x**2 < 0.09).astype(float)
    elif kind == "noise":
        size = (max(2, int(columns.size / period)), max(2, int(rows.size / period)))
        coarse = Image.fromarray(rng.uniform(0, 1, size[::-1]).astype(np.float32))
        mix = np.asarray(coarse.resize((columns.size, rows.size), Image.Resampling.BICUBIC))
    else:
        mix = _across(rng, rows, columns, 1.0) * (kind == "ramp")
    mix = np.broadcast_to(mix, (rows.size, columns.size))[..., None]
    return first + (second - first) * mix


def _across(
    rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray, scale: float
) -> np.ndarray:
    """Position along a random direction [h, w]: in periods, or, for scale 1, from 0 to 1."""
    angle = rng.uniform(0, 2 * math.pi)
    along = rows * math.sin(angle) + columns * math.cos(angle)
    if scale != 1.0:
        return along * scale
    return (along - along.min()) / max(float(np.ptp(along)), 1.0)


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) < 16:
        raise argparse.ArgumentTypeError(f"{text} is no side or HEIGHTxWIDTH of 16 pixels or more")
    return sides[0], sides[-1]


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("out", type=local_path, help="folder for the shards")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--size", type=_size, default=(256, 256), help="a side, or HEIGHTxWIDTH")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    require(
        0 < args.shards <= args.images,
        f"--shards {args.shards} must be positive and at most --images {args.images}",
    )
    require_least(1, args, "workers")
    require(
        not args.out.exists() or args.out.is_dir(),
        f"{args.out} is a file; name a folder for the shards",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    bounds = [args.images * shard // args.shards for shard in range(args.shards + 1)]
    shares = [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]
    write = partial(write_shard, args.out, args.seed, *args.size)
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = pool.map(write, range(args.shards), shares)
        for _ in track(jobs, "drawing", total=args.shards):
            pass
    numbers = f"{{000000..{args.shards - 1:06d}}}" if args.shards > 1 else "000000"
    print(f"{args.images} images in {args.shards} shard(s): {args.out}/sa_{numbers}.tar")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
