"""Run a teacher over shards once, and store its features of every image beside it.

python tools/cache_teacher.py SHARDS [SHARDS ...] --out DIR --checkpoint FILE
    [--teacher sam_vit_h] [--image-size 1024] [--layer neck] [--grid 32] [--dtype int8]
    [--batch 8] [--workers N] [--slice I/N] [--dry-run] [--verify] ...

SHARDS are copied to DIR under their names, with <key>.teacher.npz in each sample: the features of
the whole image, without the padding. sami/pretrain.py reads them with --teacher.cached true and
cuts each crop's target out of them (docs/teacher_cache.md). DIR/manifest.json tells how they were
made, and each shard's samples and checksum.

Several processes share the work: with accelerate launch, or each with its --slice (0/8, 1/8, ... in
a SLURM array). Killed, the same command goes on: finished shards stay.

--dry-run  says how many images, bytes and hours it would be, from one batch, and writes nothing;
           the weights need not be there yet.
--verify   looks at the checksums of the finished shards, and computes 1 % of the images again.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sami.caching import Manifest, estimate_bytes, require_room
from sami.core.config import require
from sami.core.errors import BadSample
from sami.core.exits import run_entry
from sami.core.index import Shard, open_sources
from sami.core.network import is_url
from sami.core.options import Options, require_least
from sami.core.paths import exists, local_path, path_pattern
from sami.core.patterns import expand
from sami.core.processes import DEVICES, check_launch, choose_device
from sami.core.progress import Progress as Lines
from sami.core.reading import read_samples
from sami.core.reporting import TimeLeft, environment
from sami.core.scanning import IMAGE
from sami.encoders.registry import TEACHERS
from sami.extraction import (
    FeatureExtractor,
    cache_shard,
    describe_preprocessing,
    prepare,
    verify,
)
from sami.features import DTYPES, Cache
from sami.teacher import TeacherConfig, describe_teacher, load_teacher


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Options(description=__doc__)
    parser.add_argument(
        "shards", type=path_pattern, nargs="+", help="such as 'data/imagenet/train-*.tar'"
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder for the new shards")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", choices=tuple(TEACHERS), default="sam_vit_h")
    teacher.add_argument(
        "--checkpoint", type=path_pattern, default="", help="its .pth, or a run folder of stage 2"
    )
    teacher.add_argument("--image-size", type=int, default=1024, help="longest side in pixels")
    teacher.add_argument("--layer", choices=("neck", "trunk"), default="neck")
    for name in ("width", "depth", "heads"):
        teacher.add_argument(f"--{name}", type=int, help="of --teacher custom")
    stored = parser.add_argument_group("what is stored")
    stored.add_argument(
        "--grid", type=int, help="cells on the longest side; default: 32, or the teacher's own"
    )
    stored.add_argument("--dtype", choices=tuple(DTYPES), default="int8")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--batch", type=int, default=8, help="images per forward")
    how.add_argument("--workers", type=int, default=os.cpu_count(), help="threads that decode")
    how.add_argument("--slice", default="0/1", help="I/N: the I-th of N parts of the shards")
    how.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    how.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa")
    how.add_argument("--compile", action="store_true", help="torch.compile the teacher")
    how.add_argument("--device", default="auto", help=f"{DEVICES}; default: auto")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true")
    mode.add_argument("--verify", action="store_true")
    parser.add_argument("--verify-fraction", type=float, default=0.01, help="default: 0.01")
    args = parser.parse_args(argv)
    choose_device(args.device)
    require_least(1, args, "batch", "workers")
    require(
        0 < args.verify_fraction <= 1,
        f"--verify-fraction {args.verify_fraction} must be over 0 and at most 1",
    )
    return args


def own_slice(words: str, urls: list[str]) -> list[str]:
    """The shards of ``--slice``, and of this process among those of accelerate."""
    found = re.fullmatch(r"(\d+)/(\d+)", words)
    part, parts = map(int, found.groups()) if found else (0, 0)
    require(part < parts, f"--slice {words} must be I/N with I from 0 to N - 1, such as 0/8")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return urls[part * ranks + int(os.environ.get("RANK", 0)) :: parts * ranks]


def name_shards(patterns: list[str], out: Path) -> dict[str, str]:
    """From each source's path to the name of the shard that is made of it."""
    names: dict[str, str] = {}
    for group, _ in expand(patterns, "SHARDS"):
        for url in group:
            require(not is_url(url), f"{url}: fetch it first; shards are read from disk here")
            require(
                Path(url).resolve().parent != out.resolve(),
                f"{url} lies in --out {out}; name another folder, nothing is overwritten",
            )
            names[url] = re.sub(r"\.(tar|tgz)(\.\w+)?$", "", Path(url).name) + ".tar"
    first: dict[str, str] = {}
    for url, name in names.items():
        require(
            first.setdefault(name, url) == url,
            f"{first[name]} and {url} have the same name; cache them into two folders",
        )
    return names


def make_extractor(args: argparse.Namespace) -> tuple[FeatureExtractor, dict[str, object]]:
    """The teacher on its device, and what the manifest tells of it."""
    names = ("checkpoint", "image_size", "layer", "attention", "width", "depth", "heads")
    config = TeacherConfig(args.teacher, **{name: getattr(args, name) for name in names})
    config.check()
    if args.dry_run and args.checkpoint != "random" and not exists(args.checkpoint or ""):
        print("--checkpoint is not there yet: counted and timed with random weights instead")
        config = dataclasses.replace(config, checkpoint="random")
    teacher = load_teacher(config, "--checkpoint")
    info = describe_teacher(config, teacher)
    tokens = args.image_size // teacher.stride
    grid = args.grid or (32 if tokens % 32 == 0 else tokens)
    require(
        0 < grid <= tokens and tokens % grid == 0,
        f"--grid {grid} must divide the teacher's {tokens} tokens at --image-size "
        f"{args.image_size}, such as {tokens} or {tokens // 2}",
    )
    device = choose_device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
    precision = args.precision
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "fp32"
    cache = Cache.of(teacher, info, grid, args.dtype, precision)
    if args.compile:
        teacher.features = torch.compile(teacher.features, dynamic=False)
    extractor = FeatureExtractor(
        teacher.to(device), cache, device, args.batch, args.workers, fixed=args.compile
    )
    return extractor, info


def plan(
    args: argparse.Namespace, extractor: FeatureExtractor, shards: list[Shard], others: float
) -> int:
    """``--dry-run``: bytes, and hours by the second of two equal batches.

    Args:
        others: how many times as many shards all slices have together.
    """
    images = []
    for shard in shards:
        for sample in read_samples(shard, np.arange(min(shard.count, extractor.batch)), (IMAGE,)):
            with contextlib.suppress(BadSample):
                images.append(prepare(sample.part(IMAGE), extractor.cache)[1])
        if len(images) >= extractor.batch:
            break
    require(bool(images), f"{shards[0].url}: none of the first images can be used")
    images = images[: extractor.batch]
    for _ in range(2):
        began = time.perf_counter()
        extractor.extract(images).float().sum().item()
        rate = len(images) / (time.perf_counter() - began)
    count, needed = sum(shard.count for shard in shards), estimate_bytes(shards, extractor.cache)
    print(
        f"{count} images in {len(shards)} shards: about {needed / 1e9:.3g} GB and "
        f"{count / rate / 3600:.3g} h at {rate:.3g} images/s in one process like this"
    )
    require_room(args.out, round(needed * others))
    return 0


def write_all(
    extractor: FeatureExtractor, shards: dict[str, Shard], manifest: Manifest, missing: list[str]
) -> None:
    """Cache what is missing, with a bar in a terminal and a line per shard."""
    total = sum(shards[name].count for name in missing)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} images/s, {task.fields[written]:.2f} GB,"),
        TimeLeft(),
        TextColumn("left"),
    )
    lines = None if sys.stdout.isatty() else Lines("image", total)
    if lines:
        lines.tell(0)
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total, rate=0.0, written=0.0)
        began, done, written = time.perf_counter(), 0, 0

        def advance(images: int, size: int) -> None:
            nonlocal done, written
            done, written = done + images, written + size
            rate = done / (time.perf_counter() - began)
            progress.update(task, advance=images, rate=rate, written=written / 1e9)
            if lines:
                lines.at(done)

        for number, name in enumerate(missing, 1):
            if manifest.finished()[name] is not None:  # by another process, since
                progress.update(task, advance=shards[name].count)
                continue
            record = cache_shard(extractor, shards[name], manifest.folder / name, advance)
            manifest.put(name, record)
            progress.update(task, advance=shards[name].count - record["samples"])
            left_out = f", left out: {record['left_out']}" if record["left_out"] else ""
            progress.console.print(
                f"{name}: {record['samples']} images{left_out}; {number} of {len(missing)}, "
                f"{done / (time.perf_counter() - began):.2f} images/s",
                soft_wrap=True,
                highlight=False,
            )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check_launch()
    names = name_shards(args.shards, args.out)
    mine = own_slice(args.slice, list(names))
    if not mine:
        print(f"no shard is left for slice {args.slice} of {len(names)} shards")
        return 0
    extractor, info = make_extractor(args)
    cache = extractor.cache
    print(
        f"teacher {cache.name} at {cache.image_size} px, {cache.layer}, sha256 "
        f"{cache.sha256[:12]}, {cache.precision} on {extractor.device}; {cache.grid} x "
        f"{cache.grid} {cache.dtype}"
    )
    if cache.random and not args.dry_run:
        print("*** THE TEACHER IS RANDOM (--checkpoint random): these are not SAM's features ***")
    manifest = Manifest(args.out, cache, describe_preprocessing(extractor.teacher))
    if args.verify:
        return verify_finished(args, extractor, manifest, [names[url] for url in mine])
    if not args.dry_run:
        manifest.claim(
            list(names.values()),
            {**environment(extractor.device, cache.precision == "bf16"), "teacher": info},
        )
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) if args.dry_run else args.out / "index"
        (source,) = open_sources([(mine, None)], index, print)
        if args.dry_run:
            return plan(args, extractor, source.shards, len(names) / len(mine))
    shards = {names[shard.url]: shard for shard in source.shards}
    finished = manifest.finished()
    for name, shard in shards.items():
        require(
            finished[name] is None or finished[name]["source"] == shard.digest,
            f"{args.out / name} was made of another {shard.url}; delete it to make it anew",
        )
    missing = [name for name in shards if finished[name] is None]
    if missing:  # the other slices fill the same disk
        share = sum(record is None for record in finished.values()) / len(missing)
        needed = estimate_bytes([shards[name] for name in missing], cache)
        require_room(args.out, round(needed * share))
    if len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
    write_all(extractor, shards, manifest, missing)
    others = [name for name, record in manifest.finished().items() if record is None]
    print(
        f"{len(names) - len(others)} of {len(names)} shards are cached"
        + (f"; {len(others)} are left to other slices, such as {others[0]}" if others else "")
    )
    if not others:
        print(f"--teacher.cached true --data.shards '{args.out}/*.tar'")
    return 0


def verify_finished(
    args: argparse.Namespace, extractor: FeatureExtractor, manifest: Manifest, names: list[str]
) -> int:
    """``--verify``: checksums of what is finished of these shards, if it is this teacher's, and
    ``--verify-fraction`` of the images, drawn anew each time."""
    manifest.check()
    finished = manifest.finished()
    names = [name for name in names if finished.get(name) is not None]
    require(bool(names), f"{args.out} holds no finished shard of these")
    urls = [str(args.out / name) for name in names]
    with tempfile.TemporaryDirectory() as index:  # a cache may be read-only
        (source,) = open_sources([(urls, None)], Path(index), print)
        ends = np.cumsum([shard.count for shard in source.shards])
        number = max(min(int(ends[-1]), 8), round(ends[-1] * args.verify_fraction))
        picked = np.sort(np.random.default_rng().choice(ends[-1], number, replace=False))
        parts = np.split(picked, np.searchsorted(picked, ends[:-1]))
        starts = [0, *ends[:-1]]
        rows = [part - start for part, start in zip(parts, starts, strict=True)]
        compared, worst = verify(extractor, source.shards, rows, manifest)
    print(
        f"{len(urls)} shards have their checksums; {compared} of {ends[-1]} images computed again, "
        f"the largest relative difference is {worst:.2%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
