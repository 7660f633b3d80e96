"""Speed of the parts of a stage, interleaved in one run so that their ratios can be trusted.

python tools/bench.py stage1 [--batch 16] [--rounds 11] [--device cpu] [--teacher sam_vit_b] ...
python tools/bench.py stream [--shards PATTERN] [--rounds 11] [--batch 16]
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from segment_anything.modeling import ImageEncoderViT
from torch.utils.flop_counter import FlopCounterMode

from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.optim import OptimConfig, build_optimizer, guarded_step, poison
from sami.core.order import Layout, Order
from sami.core.shards import PICTURE, Source, expand, open_sources
from sami.core.stream import Batches, Samples
from sami.data import Views
from sami.encoder import EncoderConfig, build_encoder
from sami.model import DecoderConfig, LossConfig, MaskedReconstruction, pixel_target
from sami.sam_encoder import SAM_SHAPES
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

    def make(decoder: DecoderConfig, loss: LossConfig, channels: int) -> Step:
        encoder = build_encoder(EncoderConfig(args.encoder), 224)
        model = MaskedReconstruction(encoder, decoder, loss, channels, 0.75).to(device)
        optimizer = build_optimizer(model, OptimConfig())
        if compiled:
            model.predict = torch.compile(model.predict)

        def step() -> None:
            wanted = target if channels == 256 else pixel_target(model.normalise(images), 16)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(images, visible, masked, wanted)["loss"]
            poison(loss).backward()
            guarded_step(optimizer, 0.0)
            optimizer.zero_grad(set_to_none=True)

        return step

    return {
        "mae": make(DecoderConfig(kind="self"), LossConfig(tokens="masked"), 768),
        "sami": make(DecoderConfig(), LossConfig(), 256),
        "sami, memory visible": make(DecoderConfig(memory="visible"), LossConfig(), 256),
    }


def teacher_passes(
    args: argparse.Namespace, device: torch.device, size: int, bf16: bool
) -> dict[str, Step]:
    """The on-the-fly teacher and segment-anything's own forward pass over the same weights."""
    teacher = load_teacher(TeacherConfig(args.teacher, "random", size)).to(device)
    images = torch.randint(
        0, 256, (args.teacher_batch, 3, size, size), dtype=torch.uint8, device=device
    )
    normalised = teacher.normalise(images)

    @torch.no_grad()
    def ours() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            teacher.features(normalised)

    @torch.no_grad()
    def theirs() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            ImageEncoderViT.forward(teacher.encoder, normalised)

    passes: dict[str, Step] = {f"{args.teacher} {size} px, ours": ours}
    if size == 1024:  # segment-anything takes no other size
        passes = {f"{args.teacher} {size} px, segment-anything": theirs, **passes}
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
    print(f"\n{title}")
    print(
        f"{'':36} {'median s':>9} {'images/s':>9} {'ratio to the first (range)':>28}"
        + (f" {'share':>6}" if peak else "")
    )
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[first], strict=True)]
        median = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        share = f" {flops[name] / median / peak:6.1%}" if peak else ""
        print(f"{name:36} {median:9.3f} {pictures / median:9.1f} {spread:>28}{share}")


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

    def decode(self, sample, epoch, stand_in):
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
    source: Source, samples: Samples, batch: int, step: int = 0, workers: int = 0, megabytes=100
) -> Batches:
    """One rank's micro-batches from a step on."""
    order = Order(
        [source],
        fields=(PICTURE,),
        batch_size=batch,
        seed=0,
        buffer_bytes=megabytes * 1_000_000,
    )
    legs = order.legs(step, [], Layout(batch, batch, 1, max(1, workers)))
    device = torch.device("cpu")
    return Batches(order, samples, legs, rank=0, step=step, workers=workers, device=device)


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
            views = Views(0, 224, size, 14, 0.75, (0.2, 1.0), True)
            rates = rate(start_stream(source, views, batch), batch, args.rounds)
            name = "student alone" if size is None else f"student and teacher at {size} px"
            print(f"{name:36} {spread(rates)} images/s")


def stream(args: argparse.Namespace) -> None:
    """The raw stream against webdataset's own, with decoding, and the time to a first batch."""
    views, batch = Views(0, 224, 224, 14, 0.75, (0.2, 1.0), True), args.batch
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
                next(start_stream(source, Raw(), batch, step, megabytes=args.buffer_mb))
                seconds.setdefault(step, []).append(1000 * (time.perf_counter() - started))
        for step, values in seconds.items():
            print(f"step {step:8} {spread(values, 1)} ms")


def stage1(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}{threads}, torch {torch.__version__}, {args.rounds} interleaved rounds")
    peak = matrix_rate(device) if device.type == "cuda" else 0.0
    if peak:
        print(f"matrix rate: {peak / 1e12:.0f} TFLOP/s (bf16, 8192 x 8192 x 8192)")
    kinds = (
        [(False, False)] if device.type == "cpu" else [(False, False), (True, False), (True, True)]
    )
    for bf16, compiled in kinds:
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
            flops = count_flops(passes) if peak else {}
            report(
                title, measure(passes, min(args.rounds, 3), device), args.teacher_batch, flops, peak
            )
    data_rates(args)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["stage1", "stream"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=16, help="pictures of a training step")
    parser.add_argument("--encoder", default="vit_ti", help="vit_ti, vit_s or vit_b")
    parser.add_argument("--teacher", default="sam_vit_b", choices=list(SAM_SHAPES))
    parser.add_argument("--teacher-batch", type=int, default=1)
    parser.add_argument("--teacher-sizes", type=int, nargs="+", default=[1024, 224])
    parser.add_argument(
        "--shards", default="", help="pattern for the data path; drawn pictures if none"
    )
    parser.add_argument("--buffer-mb", type=int, default=100, help="shuffle buffer of stream")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be positive")
    torch.manual_seed(0)
    {"stage1": stage1, "stream": stream}[args.stage](args)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
