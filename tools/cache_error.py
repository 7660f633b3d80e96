"""What it costs to cut a crop's features out of the whole picture's, instead of asking the teacher.

python tools/cache_error.py SHARDS [SHARDS ...] --checkpoint FILE [--teacher sam_vit_h]
    [--image-size 1024] [--pictures 64] [--grid 14] ...

For each picture the teacher sees the whole of it once, as tools/cache_teacher.py has it, and then
each view as training without a cache has it. Printed is, per view and per way of storing, how far
the target that is cut out is from the target that the teacher gives: the squared difference as a
share of the targets' variance about their mean at each position (0 is equal; 1 is as far off as
that mean), and the mean cosine. The first row, "whole", stores and pools but cuts nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from sami.caching import prepare
from sami.core.config import require
from sami.core.errors import BadSample
from sami.core.exits import run_entry
from sami.core.images import Box, cut, open_image
from sami.core.options import Options
from sami.core.order import sample_rng
from sami.core.paths import path_pattern
from sami.core.processes import DEVICES, choose_device
from sami.core.progress import track
from sami.core.shards import PICTURE, RawSample, expand, open_sources, read_range
from sami.core.tables import show_table
from sami.data import centre_square, random_region
from sami.features import Cache, FeatureBatch, pack, quantise, region_weights, see_whole
from sami.sam_encoder import SAM_SHAPES
from sami.teacher import Teacher, TeacherConfig, describe_teacher, load_teacher, to_grid

Choose = Callable[[tuple[int, int], np.random.Generator], tuple[Box, bool]]
VIEWS: dict[str, Choose] = {
    "whole, squeezed to a square": lambda size, rng: ((0, 0, *size), False),
    "the same, mirrored": lambda size, rng: ((0, 0, *size), True),
    "central square": lambda size, rng: (centre_square(*size), False),
    "crops of 50 to 100 % of the area": lambda size, rng: (
        random_region(*size, (0.5, 1.0), rng),
        False,
    ),
    "crops of 20 to 50 %": lambda size, rng: (random_region(*size, (0.2, 0.5), rng), False),
    "as trained: 20 to 100 %, half mirrored": lambda size, rng: (
        random_region(*size, (0.2, 1.0), rng),
        bool(rng.random() < 0.5),
    ),
}


class Difference:
    """Sums over pictures of two ways to the same target."""

    def __init__(self) -> None:
        self.error = self.cosine = self.square = self.total = 0.0
        self.pictures = 0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Targets [1, N, C] of one picture."""
        found, wanted = found.double().cpu(), wanted.double().cpu()
        self.error += float((found - wanted).square().sum())
        self.cosine += float(F.cosine_similarity(found, wanted, dim=-1).mean())
        self.square += float(wanted.square().sum())
        self.total = self.total + wanted
        self.pictures += 1

    def measures(self) -> tuple[float, float]:
        """Squared difference as a share of the variance about the mean, and the mean cosine."""
        variance = self.square - float(self.total.square().sum()) / self.pictures
        return self.error / variance, self.cosine / self.pictures


def ways(teacher: Teacher, told: dict[str, object]) -> dict[str, tuple[Cache, str]]:
    """How features may be computed and stored, and pooled when they are cut out."""
    tokens = teacher.image_size // teacher.encoder.patch_size

    def cache(grid: int, dtype: str, precision: str = "fp32") -> Cache:
        return Cache(
            name=str(told["name"]),
            sha256=str(told["sha256"]),
            random=bool(told["random"]),
            layer=teacher.layer,
            image_size=teacher.image_size,
            patch_size=teacher.encoder.patch_size,
            channels=teacher.channels,
            grid=grid,
            dtype=dtype,
            precision=precision,
        )

    found = {
        f"{tokens} fp16": (cache(tokens, "fp16"), "area"),
        f"{tokens} fp16, bf16": (cache(tokens, "fp16", "bf16"), "area"),
        f"{tokens} int8": (cache(tokens, "int8"), "area"),
    }
    if tokens % 2 == 0:
        half = tokens // 2
        found |= {
            f"{half} fp16": (cache(half, "fp16"), "area"),
            f"{half} int8": (cache(half, "int8"), "area"),
            f"{half} int8, bilinear": (cache(half, "int8"), "bilinear"),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("shards", type=path_pattern, nargs="+")
    parser.add_argument("--teacher", choices=(*SAM_SHAPES, "custom"), default="sam_vit_h")
    parser.add_argument("--checkpoint", type=path_pattern, default="")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--layer", choices=("neck", "trunk"), default="neck")
    parser.add_argument("--grid", type=int, default=14, help="of the student")
    parser.add_argument("--pictures", type=int, default=64, help="the first so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help=f"{DEVICES}; default: auto")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    require(args.pictures > 1, f"--pictures {args.pictures} must be 2 or more")
    config = TeacherConfig(args.teacher, args.checkpoint, args.image_size, args.layer)
    config.check()
    teacher = load_teacher(config, "--checkpoint")
    stored = ways(teacher, describe_teacher(config, teacher))
    teacher = teacher.to(device)
    differences = {(view, way): Difference() for view in VIEWS for way in stored}
    samples, seen = samples_of(args), 0
    for sample in track(samples, "looking", total=args.pictures):
        try:
            data = sample.part(PICTURE)
            some = next(iter(stored.values()))[0]
            size, pixels = prepare(data, some)
        except BadSample as error:
            print(f"{sample.key}: {error}")
            continue
        whole = {"fp32": see_whole(teacher, [pixels])[0]}
        with torch.autocast(device.type, torch.bfloat16):
            whole["bf16"] = see_whole(teacher, [pixels])[0]
        packed = {
            way: pack(quantise(whole[cache.precision], cache, size))
            for way, (cache, _) in stored.items()
        }
        for number, (view, choose) in enumerate(VIEWS.items()):
            box, flip = choose(size, sample_rng(args.seed, number, sample.key))
            (region,) = cut(open_image(data), box, [args.image_size], flip)
            given = torch.from_numpy(region.transpose(2, 0, 1).copy())[None].to(device)
            features = teacher(given)
            for way, (cache, pool) in stored.items():
                rows, columns = region_weights(cache, size, box, flip, args.grid, pool)
                batch = FeatureBatch.of([(packed[way], rows, columns)], cache.grid)
                found = batch.tokens()
                differences[view, way].add(found, to_grid(features, args.grid, pool))
        seen += 1
    require(seen > 1, "fewer than two of the pictures could be used")
    show(differences, list(stored), f"{seen} pictures, student's grid {args.grid}")
    return 0


def samples_of(args: argparse.Namespace) -> Iterator[RawSample]:
    """The first samples of the shards."""
    with tempfile.TemporaryDirectory() as folder:
        (source,) = open_sources(expand(args.shards, "SHARDS"), Path(folder), print)
        count = min(args.pictures, source.count)
        yield from read_range(source.shards, range(count), (PICTURE,))


def show(differences: dict[tuple[str, str], Difference], stored: list[str], title: str) -> None:
    """Views downwards, ways across."""
    rows = []
    for view in VIEWS:
        told = [differences[view, way].measures() for way in stored]
        rows.append([view, *(f"{share:.4f} ({cosine:.4f})" for share, cosine in told)])
    title = f"squared difference as a share of the variance (cosine); {title}"
    show_table(title, ["view", *stored], rows)


if __name__ == "__main__":
    sys.exit(run_entry(main))
