"""Stage 1 on cached features, against the same images with ready targets."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset as wds

from benches.stage1 import trainer
from benches.stream import open_or_draw, rate, start_stream
from benches.timing import Step, introduce, kinds_of, measure, report, spread
from sami.core.images import open_image
from sami.core.index import Source, open_sources
from sami.core.patterns import expand
from sami.core.reading import read_samples
from sami.core.scanning import IMAGE, TEACHER
from sami.data import CropTransform
from sami.features import Cache, QuantizedFeatures, to_bytes
from sami.masking import MaskConfig
from sami.model import CrossDecoderConfig, TokenLossConfig


def write_features(source: Source, folder: Path, cache: Cache) -> Source:
    """The same samples with features that are noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in source.shards:
        with wds.TarWriter(str(folder / f"{shard.name}.tar")) as writer:
            for sample in read_samples(shard, np.arange(shard.count), (IMAGE,)):
                data = sample.part(IMAGE)
                cells = cache.cells(*open_image(data).upright)
                values = rng.integers(-127, 128, (cache.channels, *cells), dtype=np.int8)
                stored = QuantizedFeatures(values, np.full(cache.channels, 0.01, np.float32))
                key = sample.key.removeprefix(f"{shard.name}/")
                writer.write({"__key__": key, "jpg": data, TEACHER: to_bytes(stored)})
    (made,) = open_sources(expand(f"{folder}/*.tar", "made"), folder / "index")
    return made


def reading(batches: Iterator, train: Callable[..., None], device: torch.device) -> Step:
    """A step with its data; where no features are read, the targets are ready."""
    given: list[torch.Tensor] = []

    def step() -> None:
        batch = next(batches)[0].to(device)
        if batch.features is None and not given:
            given.append(torch.randn(len(batch.student), 196, 256, device=device))
        wanted = given[0] if batch.features is None else batch.features.tokens()
        train(batch.student, batch.visible, batch.masked, wanted)

    return step


def cache(args: argparse.Namespace) -> None:
    """Training steps that read cached features, against the same images with ready targets."""
    device, batch = torch.device(args.device), args.batch or 16
    introduce(args, device)
    kind = Cache("sam_vit_h", "", True, "neck", 1024, 16, 256, args.grid, "int8")

    def start_on(source: Source, views: CropTransform) -> Iterator:
        return start_stream(source, views, batch, workers=args.workers, device=args.device)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_features(open_or_draw(args, name, 2, 256), folder / "made", kind)
        ready = CropTransform(0, 224, None, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
        views = {"ready targets": ready, "cached features": replace(ready, cache=kind)}
        print("data path, one core")
        for what, one in views.items():
            rates = rate(start_stream(source, one, batch), batch, 10 * args.rounds)
            print(f"{what:36} {spread(rates)} images/s")
        for bf16, compiled in kinds_of(device):
            loss = (CrossDecoderConfig(), TokenLossConfig())
            steps = {}
            for what, one in views.items():
                train = trainer(args.encoder, *loss, 256, device, bf16, compiled)
                steps[what] = reading(start_on(source, one), train, device)
            title = f"training step, {args.encoder}, batch {batch}, {'bf16' if bf16 else 'fp32'}"
            title += f"{', compiled' * compiled}, {args.grid} x {args.grid} int8"
            title += f", {args.workers} workers each"
            report(title, measure(steps, args.rounds, device), batch, {}, 0.0)
            del steps
