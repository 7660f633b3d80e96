"""The data path: raw samples, decoding, the time to a first batch."""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from benches.timing import spread
from sami.core.dataset import MicroBatches, ShardsConfig, Training, Transform, load
from sami.core.index import Source, open_sources
from sami.core.labels import classes_in_a_batch
from sami.core.order import Order
from sami.core.patterns import expand
from sami.core.scanning import IMAGE
from sami.data import CropTransform
from sami.masking import MaskConfig


class Raw:
    """Samples left as they stand in their shards."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields or (IMAGE,)

    def decode(self, sample, epoch, replacement):
        return [sample.part(name) for name in self.fields]

    def collate(self, items):
        return items


def open_or_draw(args: argparse.Namespace, folder: str, shards: int, images: int) -> Source:
    """The shards that were asked for, or drawn ones of 500 x 375 px."""
    pattern = args.shards
    if not pattern:
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(64):
            coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            drawn.append(buffer.getvalue())
        for shard in range(shards):
            with wds.TarWriter(f"{folder}/drawn-{shard:06d}.tar") as writer:
                for number in range(images):
                    writer.write({"__key__": f"{number:06d}", "jpg": drawn[number % 64]})
        pattern = f"{folder}/drawn-*.tar"
    (source,) = open_sources(expand(pattern, "--shards"), Path(folder) / "index")
    print(f"\n{source.count} images in {len(source.shards)} shards, {args.shards or 'drawn'}")
    return source


def write_large(folder: Path) -> Source:
    """Members of SA-1B's sizes: a megabyte of image, 60 kB of JSON."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(8):
        with wds.TarWriter(f"{folder}/large-{shard:06d}.tar") as writer:
            for number in range(150):
                members = {"jpg": rng.bytes(1_000_000), "json": rng.bytes(60_000)}
                writer.write({"__key__": f"{number:06d}", **members})
    (source,) = open_sources(expand(f"{folder}/*.tar", "large"), folder / "index")
    return source


def raw_rates(source: Source, raw: Raw, count: int, rounds: int) -> dict[str, list[float]]:
    """Samples a second in batches of 16, from the page cache and from the disk."""
    rates: dict[str, list[float]] = {"in the page cache": [], "cold": []}
    for _ in range(rounds):
        for name, found in rates.items():
            if name == "cold":
                drop_from_cache(source)
            batches, started = start_stream(source, raw, 16), time.perf_counter()
            for _ in range(count // 16):
                next(batches)
            found.append(count / (time.perf_counter() - started))
    return rates


def drop_from_cache(source: Source) -> None:
    """Let the system forget what it holds of the shards in memory."""
    for shard in source.shards:
        with open(shard.url, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def neighbours(folder: Path) -> None:
    """Classes in a batch of 256 from 100 shards that are sorted by class, by the window."""
    folder.mkdir()
    for shard in range(100):
        with wds.TarWriter(f"{folder}/sorted-{shard:06d}.tar") as writer:
            for number in range(100):
                writer.write({"__key__": f"{number:06d}", "jpg": b"none", "cls": shard})
    sources = open_sources(expand(f"{folder}/*.tar", "sorted"), folder / "index")
    print("\nclasses in a batch of 256 from 100 shards of one class each")
    for window in (1, 16, 32, 64, 100):
        order = Order(sources, batch_size=256, seed=0, window=window)
        found, mixed, _ = classes_in_a_batch(order)
        print(f"window {window:4} {found:4}, and {mixed:.0f} if they were mixed")


def start_stream(
    source: Source,
    transform: Transform,
    batch: int,
    step: int = 0,
    workers: int = 0,
    device: str = "cpu",
) -> Iterator:
    """One rank's micro-batches from a step on."""
    order = Order([source], batch_size=batch, seed=0, window=ShardsConfig.window)
    parts = MicroBatches(batch, batch, 0, 1, step)
    return load(Training(order, transform), parts, workers, torch.device(device))


def rate(batches: Iterator, batch: int, rounds: int) -> list[float]:
    """Samples a second over each of some batches, after a first one."""
    rates = []
    for turn in range(rounds + 1):
        started = time.perf_counter()
        next(batches)
        if turn:
            rates.append(batch / (time.perf_counter() - started))
    return rates


def data_rates(args: argparse.Namespace) -> None:
    """Images a second that one core reads, decodes, crops and masks."""
    with tempfile.TemporaryDirectory() as folder:
        source = open_or_draw(args, folder, 1, 64)
        batch = min(32, source.count)
        print("data path, one core")
        for size in (None, 224, 448, 1024):
            views = CropTransform(0, 224, size, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
            rates = rate(start_stream(source, views, batch), batch, args.rounds)
            name = "student alone" if size is None else f"student and teacher at {size} px"
            print(f"{name:36} {spread(rates)} images/s")


def stream(args: argparse.Namespace) -> None:
    """The raw stream against webdataset's own, with decoding, and the time to a first batch."""
    views, batch = (
        CropTransform(0, 224, 224, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True),
        args.batch or 16,
    )
    with tempfile.TemporaryDirectory() as folder:
        source = open_or_draw(args, folder, 40, 500)
        urls = [shard.url for shard in source.shards]
        count = min(source.count // batch // 2, max(1, 2000 // batch)) * batch
        rates: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            ours = start_stream(source, Raw(), count)
            theirs = wds.WebDataset(urls, shardshuffle=False).shuffle(1000, initial=1000)
            theirs = theirs.batched(count, collation_fn=None)
            for name, batches in (("raw, shuffled: ours", ours), ("webdataset", iter(theirs))):
                rates.setdefault(name, []).extend(rate(batches, count, 1))
        for workers in (0, 1, 2):
            name = f"decoded for student and teacher, {workers} worker(s)"
            batches = start_stream(source, views, batch, workers=workers)
            rates[name] = rate(batches, batch, 10 * args.rounds)
        print()
        for name, values in rates.items():
            print(f"{name:48} {spread(values)} samples/s")
        ratios = [a / b for a, b in zip(*list(rates.values())[:2], strict=True)]
        print(f"raw, ours : webdataset {spread(ratios, 2)}")
        large, both = write_large(Path(folder) / "large"), Raw(IMAGE, "json")
        for words, (what, raw) in {"small": (source, Raw()), "large": (large, both)}.items():
            count = min(what.count // 2, 4000)
            for name, values in raw_rates(what, raw, count, args.rounds).items():
                print(f"raw, {words} members, {name:32} {spread(values)} samples/s")
        neighbours(Path(folder) / "sorted")
        steps = source.count // batch
        print(f"\ntime to the first raw batch of {batch}, from a step of {steps} on")
        seconds: dict[int, list[float]] = {}
        for _ in range(args.rounds):
            for step in (0, steps // 4, steps // 2, 3 * steps // 4, steps - 1):
                started = time.perf_counter()
                next(start_stream(source, Raw(), batch, step))
                seconds.setdefault(step, []).append(1000 * (time.perf_counter() - started))
        for step, values in seconds.items():
            print(f"step {step:8} {spread(values, 1)} ms")
