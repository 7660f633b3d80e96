"""Speed of the parts of a stage, interleaved in one run so that their ratios can be trusted.

python tools/bench.py stage1 [--batch 16] [--rounds 11] [--device cpu] [--teacher sam_vit_b] ...
python tools/bench.py stream [--shards PATTERN] [--rounds 11] [--batch 16]
python tools/bench.py cache [--batch 16] [--workers 2] [--grid 32] [--rounds 11] [--device cpu] ...
python tools/bench.py stage2 [--batch 1] [--masks 8 32 64] [--rounds 11] [--device cpu] ...
"""

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything.modeling import ImageEncoderViT
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from finetune.data import MaskDataConfig, PromptBatch, PromptTransform
from finetune.losses import MaskLossConfig, dice_loss, pixel_loss, stage2_losses
from finetune.model import MaskDecoderConfig as HeadConfig
from finetune.model import build_model
from finetune.objective import Objective
from finetune.prompts import PromptConfig, as_box, correction_clicks
from finetune.rle import decode_counts, parse_annotations, sample_grid
from sami.core.config import require
from sami.core.dataset import MicroBatches, ShardsConfig, Training, Transform, load
from sami.core.exits import run_entry
from sami.core.images import Normalise, open_image
from sami.core.index import Source, open_sources
from sami.core.optim import OptimConfig, build_optimizer, guarded_step, poison
from sami.core.options import Options
from sami.core.order import Order
from sami.core.paths import path_pattern
from sami.core.patterns import expand
from sami.core.processes import DEVICES, choose_device
from sami.core.reading import RawSample, read_samples
from sami.core.scanning import PICTURE, TEACHER
from sami.core.tables import show_table
from sami.data import CropTransform
from sami.encoder import EncoderConfig, build_encoder
from sami.encoders.sam import SAM_SHAPES
from sami.features import Cache, QuantizedFeatures, to_bytes
from sami.masking import MaskConfig
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import pixel_target
from sami.teacher import TeacherConfig, load_teacher

Step = Callable[[], None]


def stage1_steps(
    args: argparse.Namespace, device: torch.device, bf16: bool, compiled: bool
) -> dict[str, Step]:
    """Whole training steps (forward, backward, update) with given targets, by name."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, generator=generator
    )
    order = torch.rand(args.batch, 196, generator=generator).argsort(1)
    visible, masked = order[:, :49].sort(1).values, order[:, 49:].sort(1).values
    target = torch.randn(args.batch, 196, 256, generator=generator)
    images, visible, masked, target = (x.to(device) for x in (images, visible, masked, target))

    def make(decoder: CrossDecoderConfig, loss: TokenLossConfig, channels: int) -> Step:
        train = trainer(args.encoder, decoder, loss, channels, device, bf16, compiled)
        predicted = masked[:, : round(147 * decoder.predict_fraction)].contiguous()

        def step() -> None:
            wanted = target if channels == 256 else pixel_target(normalise(images), 16)
            train(images, visible, predicted, wanted)

        return step

    normalise = Normalise().to(device)
    return {
        "mae": make(CrossDecoderConfig(kind="self"), TokenLossConfig(tokens="masked"), 768),
        "sami": make(CrossDecoderConfig(), TokenLossConfig(), 256),
        "sami, memory visible": make(CrossDecoderConfig(memory="visible"), TokenLossConfig(), 256),
        **{
            f"sami, predict_fraction {share}": make(
                CrossDecoderConfig(predict_fraction=share), TokenLossConfig(), 256
            )
            for share in (0.5, 0.25)
        },
    }


def trainer(
    encoder: str,
    decoder: CrossDecoderConfig,
    loss: TokenLossConfig,
    channels: int,
    device: torch.device,
    bf16: bool,
    compiled: bool,
) -> Callable[..., None]:
    """A new model of stage 1, and one optimizer step of it on what its forward takes."""
    model = MaskedReconstruction(
        build_encoder(EncoderConfig(encoder), 224), decoder, loss, channels, 0.75
    ).to(device)
    optimizer = build_optimizer(model, OptimConfig())
    if compiled:
        model.predict = torch.compile(model.predict)

    def train(*batch: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found = model(*batch)["loss"]
        poison(found).backward()
        guarded_step(optimizer, 0.0)
        optimizer.zero_grad(set_to_none=True)

    return train


def teacher_passes(
    args: argparse.Namespace, device: torch.device, size: int, bf16: bool
) -> dict[str, Step]:
    """The on-the-fly teacher and segment-anything's own forward pass over the same weights."""
    teacher = load_teacher(TeacherConfig(args.teacher, "random", size)).to(device)
    images = torch.randint(
        0, 256, (args.teacher_batch, 3, size, size), dtype=torch.uint8, device=device
    )
    normalised = teacher.normalise(images)

    def see(features: Callable[[torch.Tensor], torch.Tensor], flex: bool = False) -> Step:
        @torch.no_grad()
        def step() -> None:
            teacher.encoder.flex = flex
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features(normalised)

        return step

    name = f"{args.teacher} {size} px"
    passes: dict[str, Step] = {f"{name}, ours": see(teacher.features)}
    if size == 1024:  # segment-anything takes no other size
        theirs = see(lambda images: ImageEncoderViT.forward(teacher.encoder, images))
        passes = {f"{name}, segment-anything": theirs, **passes}
    if device.type == "cuda":
        compiled = [torch.compile(teacher.features, dynamic=False) for _ in range(2)]
        passes |= {
            f"{name}, ours, flex": see(teacher.features, True),
            f"{name}, ours, compiled": see(compiled[0]),
            f"{name}, ours, flex, compiled": see(compiled[1], True),
        }
    return passes


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, ``rounds`` times in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(
    title: str, seconds: dict[str, list[float]], pictures: int, flops: dict[str, float], peak: float
) -> None:
    """A table: median, pictures a second, and the ratio to the first row, paired by round."""
    first = next(iter(seconds))
    head = ["", "median s", "images/s", "ratio to the first (range)", *["share"] * bool(peak)]
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[first], strict=True)]
        median = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        share = [f"{flops[name] / median / peak:.1%}"] if peak else []
        rows.append([name, f"{median:.3f}", f"{pictures / median:.1f}", spread, *share])
    show_table(title, head, rows)


def count_flops(steps: dict[str, Step]) -> dict[str, float]:
    """Floating-point operations of one call of each (two per multiply-add)."""
    counts = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[name] = float(counter.get_total_flops())
    return counts


def matrix_rate(device: torch.device) -> float:
    """What the card reaches on a large bf16 matrix product, in FLOP/s."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"product": lambda: torch.mm(a, b)}, 20, device)["product"]
    return 2 * 8192**3 / statistics.median(seconds)


class Raw:
    """Samples left as they stand in their shards."""

    fields = (PICTURE,)

    def decode(self, sample, epoch, replacement):
        return sample.part(PICTURE)

    def collate(self, items):
        return items


def open_or_draw(args: argparse.Namespace, folder: str, shards: int, pictures: int) -> Source:
    """The shards that were asked for, or drawn ones of 500 x 375 px."""
    pattern = args.shards
    if not pattern:
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(64):
            coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=90)
            drawn.append(buffer.getvalue())
        for shard in range(shards):
            with wds.TarWriter(f"{folder}/drawn-{shard:06d}.tar") as writer:
                for number in range(pictures):
                    writer.write({"__key__": f"{number:06d}", "jpg": drawn[number % 64]})
        pattern = f"{folder}/drawn-*.tar"
    (source,) = open_sources(expand(pattern, "--shards"), Path(folder) / "index")
    print(f"\n{source.count} pictures in {len(source.shards)} shards, {args.shards or 'drawn'}")
    return source


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


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{} ({}..{})".format(*(f"{number:.{digits}f}" for number in numbers))


def data_rates(args: argparse.Namespace) -> None:
    """Pictures a second that one core reads, decodes, crops and masks."""
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


def introduce(args: argparse.Namespace, device: torch.device) -> float:
    """Say what it runs on; the card's matrix rate in FLOP/s, 0 for a CPU."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}{threads}, torch {torch.__version__}, {args.rounds} interleaved rounds")
    peak = matrix_rate(device) if device.type == "cuda" else 0.0
    if peak:
        print(f"matrix rate: {peak / 1e12:.0f} TFLOP/s (bf16, 8192 x 8192 x 8192)")
    return peak


def kinds_of(device: torch.device) -> list[tuple[bool, bool]]:
    """Whether in bf16, and whether compiled: what is measured on a device."""
    on_cpu = [(False, False)]
    return on_cpu if device.type == "cpu" else [(False, False), (True, False), (True, True)]


def stage1(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    args.batch = args.batch or 16
    peak = introduce(args, device)
    for bf16, compiled in kinds_of(device):
        title = f"training step, {args.encoder}, batch {args.batch}, {'bf16' if bf16 else 'fp32'}"
        steps = stage1_steps(args, device, bf16, compiled)
        flops = count_flops(stage1_steps(args, device, bf16, False)) if peak else {}
        report(
            title + (", compiled" if compiled else ""),
            measure(steps, args.rounds, device),
            args.batch,
            flops,
            peak,
        )
        del steps
    for size in args.teacher_sizes:
        for bf16 in (False,) if device.type == "cpu" else (False, True):
            passes = teacher_passes(args, device, size, bf16)
            title = f"teacher, batch {args.teacher_batch}, {'bf16' if bf16 else 'fp32'}"
            flops: dict[str, float] = {}
            if peak:  # as multiplications go, all do the same
                ours = next(step for name, step in passes.items() if "ours" in name)
                flops = dict.fromkeys(passes, count_flops({"": ours})[""])
            report(
                title, measure(passes, min(args.rounds, 3), device), args.teacher_batch, flops, peak
            )
    data_rates(args)


def write_features(source: Source, folder: Path, cache: Cache) -> Source:
    """The same samples with features that are noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in source.shards:
        with wds.TarWriter(str(folder / f"{shard.name}.tar")) as writer:
            for sample in read_samples(shard, np.arange(shard.count), (PICTURE,)):
                data = sample.part(PICTURE)
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
    """Training steps that read cached features, against the same pictures with ready targets."""
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
            model = (
                args.encoder,
                CrossDecoderConfig(),
                TokenLossConfig(),
                256,
                device,
                bf16,
                compiled,
            )
            steps = {
                what: reading(start_on(source, one), trainer(*model), device)
                for what, one in views.items()
            }
            title = f"training step, {args.encoder}, batch {batch}, {'bf16' if bf16 else 'fp32'}"
            title += f"{', compiled' * compiled}, {args.grid} x {args.grid} int8"
            title += f", {args.workers} workers each"
            report(title, measure(steps, args.rounds, device), batch, {}, 0.0)
            del steps


def draw_sample(rng: np.random.Generator, width: int = 2250, height: int = 1500) -> RawSample:
    """A picture with 100 masks as SA-1B stores them: smooth outlines, some of them with holes."""
    grain = rng.normal(0, 8, (height, width, 1))
    coarse = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=90)
    told = []
    for _ in range(100):
        side = int(np.exp(rng.uniform(np.log(30), np.log(900))))
        blob = Image.fromarray(rng.random((7, 7), np.float32)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        mask = np.zeros((height, width), np.uint8, order="F")
        top, left = rng.integers(height - side), rng.integers(width - side)
        shape = (np.asarray(blob) > 0.3) & (x**2 + y**2 < 1)
        mask[top : top + side, left : left + side] = shape
        runs = coco_mask.encode(mask)
        told.append(
            {
                "segmentation": {"size": [height, width], "counts": runs["counts"].decode()},
                "area": int(mask.sum()),
                "predicted_iou": 0.95,
                "stability_score": 0.95,
            }
        )
    image = {"width": width, "height": height, "file_name": "sa_0.jpg", "image_id": 0}
    document = json.dumps({"image": image, "annotations": told}).encode()
    return RawSample("drawn", {PICTURE: buffer.getvalue(), "json": document})


def sample_path(args: argparse.Namespace) -> None:
    """From SA-1B's bytes to what stage 2 trains on, against the plain way, on one core."""
    sample = draw_sample(np.random.default_rng(0))
    picture, document = sample.part(PICTURE), sample.part("json")
    told = parse_annotations(document)
    size = (told.height, told.width)
    runs = [mask.counts for mask in told.masks[:64]]
    shapes = [{"size": list(size), "counts": counts.encode()} for counts in runs]
    ours = PromptTransform.of(MaskDataConfig(), PromptConfig(), 256, seed=0)

    def our_masks() -> None:
        np.stack([sample_grid(decode_counts(counts, *size), *size, 256) for counts in runs])

    def their_masks() -> list[np.ndarray]:
        masks = [Image.fromarray(coco_mask.decode(shape).T) for shape in shapes]  # T: no copy
        return [np.asarray(mask.resize((256, 256), Image.Resampling.NEAREST)) for mask in masks]

    def plain_picture() -> torch.Tensor:
        pixels = np.array(open_image(picture).decode())
        image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
        return F.interpolate(image, (1024, 1024), mode="bilinear", antialias=True)

    def plain() -> None:
        json.loads(document)
        plain_picture()
        np.stack(their_masks())

    seconds = measure(
        {
            "64 masks: pycocotools, resize": their_masks,
            "64 masks: ours": our_masks,
            "sample: plain": plain,
            "sample: ours": lambda: ours.decode(sample, 0, False),
            "picture: plain": plain_picture,
        },
        args.rounds,
        torch.device("cpu"),
    )
    print(
        f"\nSA-1B sample, one core: JPEG of 2250 x 1500 px ({len(picture) / 1e6:.1f} MB), 100 "
        f"masks ({sum(map(len, runs)) / 64000:.1f} kB each)\n"
        "to 1024 x 1024 px and 64 masks of 256 x 256; the plain sample has no prompts yet"
    )
    for name, values in seconds.items():
        print(f"{name:36} {spread([1000 * value for value in values], 1)} ms")
    for what, slow, fast in (
        ("masks", "64 masks: pycocotools, resize", "64 masks: ours"),
        ("sample", "sample: plain", "sample: ours"),
    ):
        ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
        print(f"{what}: ours is {spread(ratios, 1)} times as fast")


def draw_batch(batch: int, masks: int, size: int, device: torch.device) -> PromptBatch:
    """Random pictures, objects that are rectangles, and a box for each."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((batch, masks, 2, 2)) * size, axis=2)
    line = (np.arange(size // 4) + 0.5) * 4
    x = (line > corners[..., 0, :1]) & (line < corners[..., 1, :1])  # [B, K, w]
    y = (line > corners[..., 0, 1:]) & (line < corners[..., 1, 1:])
    prompts = [[as_box(corner) for corner in row] for row in corners]
    return PromptBatch(
        images=torch.from_numpy(rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)),
        masks=torch.from_numpy(y[..., :, None] & x[..., None, :]),
        there=torch.ones(batch, masks, dtype=torch.bool),
        inside=torch.ones(batch, size // 4, size // 4, dtype=torch.bool),
        points=torch.from_numpy(np.stack([[p for p, _ in row] for row in prompts])),
        labels=torch.from_numpy(np.stack([[label for _, label in row] for row in prompts])),
        places=torch.arange(0, size, 4.0).repeat(batch, 2, 1),
    ).to(device)


def stage2_step(
    encoder: str, batch: PromptBatch, bf16: bool, compiled: bool, checkpointing: bool
) -> Step:
    """A whole training step."""
    device, size = batch.images.device, batch.images.shape[-1]
    model = build_model(EncoderConfig(encoder), HeadConfig(), size, "square", checkpointing)
    objective = Objective(model, MaskLossConfig(), PromptConfig()).to(device)
    optimizer = build_optimizer(objective, OptimConfig())
    if compiled:
        model.image_encoder = torch.compile(model.image_encoder)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = objective(batch)["loss"]
        poison(loss).backward()
        guarded_step(optimizer, 0.0)
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory(
    encoder: str, masks: int, args: argparse.Namespace, bf16: bool, checkpointing: bool
) -> float:
    """GB that a step adds to what the process holds; measured in a process of its own (on a
    CPU: Linux alone tells)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        device = (args.device, args.batch, args.image_size)
        return pool.apply(_peak_memory, (encoder, masks, *device, bf16, checkpointing))


def _peak_memory(
    encoder: str,
    masks: int,
    device: str,
    batch: int,
    size: int,
    bf16: bool,
    checkpointing: bool,
) -> float:
    drawn = draw_batch(batch, masks, size, torch.device(device))
    before = _highest()
    step = stage2_step(encoder, drawn, bf16, False, checkpointing)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else _highest() - before


def _highest() -> float:
    """GB of main memory that this process had at most; Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def stage2_losses_and_clicks(args: argparse.Namespace, device: torch.device) -> None:
    """The losses and the error-click sampler, each against the obvious way."""
    masks = max(args.masks)
    truth = draw_batch(args.batch, masks, args.image_size, device)
    side = truth.masks.shape[-1]
    logits = torch.randn(args.batch, masks, 3, side, side, device=device, requires_grad=True)
    iou = torch.rand(args.batch, masks, 3, device=device, requires_grad=True)
    config = MaskLossConfig()

    def ours() -> None:
        stage2_losses(logits, iou, truth.targets, config)["loss"].backward()

    def every_mask() -> None:
        wanted = truth.masks.unsqueeze(2).expand_as(logits)
        focal = pixel_loss(logits, wanted, "focal").mean((-2, -1))
        (20 * focal + dice_loss(logits, wanted)).min(2).values.mean().backward()

    def clicks() -> None:
        correction_clicks(logits[:, :, 0].detach() > 0, truth.masks, truth.places, True)

    def looped() -> None:
        rng = np.random.default_rng(0)
        for mask, wanted in zip(
            logits[:, :, 0].detach().flatten(0, 1), truth.masks.flatten(0, 1), strict=True
        ):
            y, x = np.nonzero(((mask > 0) != wanted).cpu().numpy())
            at = rng.integers(len(y))
            _ = (x[at], y[at])

    for name, steps in (
        (
            "losses, forward and backward",
            {"focal and dice of all masks": every_mask, "ours, with IoU": ours},
        ),
        ("error clicks", {"loop over masks": looped, "ours": clicks}),
    ):
        title = f"{name}, {args.batch} x {masks} objects at {side} x {side}"
        report(title, measure(steps, args.rounds, device), args.batch, {}, 0.0)


def stage2(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    args.batch = args.batch or (8 if device.type == "cuda" else 1)
    threads = torch.get_num_threads()
    peak = introduce(args, device)
    torch.set_num_threads(1)
    sample_path(args)
    torch.set_num_threads(threads)
    stage2_losses_and_clicks(args, device)
    names = [args.encoder] if args.encoder else ["vit_ti", "vit_s"]
    cases = [(name, masks) for name in names for masks in args.masks]
    flops: dict[str, float] = {}
    for bf16, compiled in kinds_of(device):
        dtype = "bf16" if bf16 else "fp32"
        steps = {
            f"{name}, {masks} masks": stage2_step(
                name, draw_batch(args.batch, masks, args.image_size, device), bf16, compiled, False
            )
            for name, masks in cases
        }
        title = f"training step, {args.image_size} px, batch {args.batch}, {dtype}"
        if peak and not compiled:  # the counter does not see into compiled code
            flops = count_flops(steps)
        seconds = measure(steps, args.step_rounds, device)
        report(title + (", compiled" if compiled else ""), seconds, args.batch, flops, peak)
        del steps
        if not compiled:
            for again in (False, True):
                print(f"peak memory, GB{', encoder recomputed in the backward' * again}")
                for name, masks in cases:
                    gigabytes = peak_memory(name, masks, args, bf16, again)
                    print(f"{name + f', {masks} masks':36} {gigabytes:9.2f}")


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("stage", choices=["stage1", "stream", "cache", "stage2"])
    parser.add_argument("--device", default="auto", help=f"{DEVICES}; default: auto")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, help="pictures of a training step")
    parser.add_argument("--masks", type=int, nargs="+", default=[8, 32, 64], help="of stage2")
    parser.add_argument("--image-size", type=int, default=1024, help="of stage2")
    parser.add_argument("--step-rounds", type=int, default=5, help="of stage2's training steps")
    parser.add_argument("--encoder", help="default: vit_ti, of stage2 also vit_s")
    parser.add_argument("--teacher", default="sam_vit_b", choices=list(SAM_SHAPES))
    parser.add_argument("--teacher-batch", type=int, default=1)
    parser.add_argument("--teacher-sizes", type=int, nargs="+", default=[1024, 224])
    parser.add_argument(
        "--shards",
        type=path_pattern,
        nargs="+",
        default=[],
        help="pattern for the data path; drawn pictures if none",
    )
    parser.add_argument("--workers", type=int, default=2, help="of cache, for each stream")
    parser.add_argument("--grid", type=int, default=32, help="of cache's features")
    args = parser.parse_args()
    if args.stage != "stage2":
        args.encoder = args.encoder or "vit_ti"
    args.device = str(choose_device(args.device))
    for name in ("rounds", "step_rounds"):
        value = getattr(args, name)
        require(value > 0, f"--{name.replace('_', '-')} {value} must be positive")
    torch.manual_seed(0)
    {"stage1": stage1, "stream": stream, "cache": cache, "stage2": stage2}[args.stage](args)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
