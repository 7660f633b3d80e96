"""Stage 2: SA-1B's bytes to a batch, losses and clicks, training steps, memory."""

import argparse
import io
import json
import multiprocessing

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from benches.timing import Step, count_flops, introduce, kinds_of, measure, report, spread, update
from finetune.data import MaskDataConfig, PromptBatch, PromptTransform, loss_pixels
from finetune.losses import MaskLossConfig, dice_loss, pixel_loss, stage2_losses
from finetune.model import MaskDecoderConfig as HeadConfig
from finetune.model import build_model
from finetune.objective import Objective
from finetune.prompting import PromptConfig, correction_clicks
from finetune.prompts import as_box
from finetune.rle import decode_counts, parse_annotations
from finetune.rle import sample as sample_runs
from sami.core.images import open_image
from sami.core.memory import highest
from sami.core.optim import OptimConfig, build_optimizer
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE
from sami.encoder import EncoderConfig


def draw_sample(rng: np.random.Generator, width: int = 2250, height: int = 1500) -> RawSample:
    """An image with 100 masks as SA-1B stores them: smooth outlines, some of them with holes."""
    grain = rng.normal(0, 8, (height, width, 1))
    coarse = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    photo = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    photo.save(buffer, "JPEG", quality=90)
    info = []
    for _ in range(100):
        side = int(np.exp(rng.uniform(np.log(30), np.log(900))))
        noise = Image.fromarray(rng.random((7, 7), np.float32))
        blob = noise.resize((side, side), Image.Resampling.BICUBIC)
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        mask = np.zeros((height, width), np.uint8, order="F")
        top, left = rng.integers(height - side), rng.integers(width - side)
        shape = (np.asarray(blob) > 0.3) & (x**2 + y**2 < 1)
        mask[top : top + side, left : left + side] = shape
        runs = coco_mask.encode(mask)
        segmentation = {"size": [height, width], "counts": runs["counts"].decode()}
        scores = {"predicted_iou": 0.95, "stability_score": 0.95}
        info.append({"segmentation": segmentation, "area": int(mask.sum()), **scores})
    image = {"width": width, "height": height, "file_name": "sa_0.jpg", "image_id": 0}
    document = json.dumps({"image": image, "annotations": info}).encode()
    return RawSample("drawn", {IMAGE: buffer.getvalue(), "json": document})


def sample_path(args: argparse.Namespace) -> None:
    """From SA-1B's bytes to what stage 2 trains on, against the plain way, on one core."""
    sample = draw_sample(np.random.default_rng(0))
    encoded, document = sample.part(IMAGE), sample.part("json")
    info = parse_annotations(document)
    size = (info.height, info.width)
    runs = [mask.counts for mask in info.masks[:64]]
    shapes = [{"size": list(size), "counts": counts.encode()} for counts in runs]
    ours = PromptTransform(MaskDataConfig(), PromptConfig(), 256, seed=0)

    def our_masks() -> None:
        at = loss_pixels(256, 256, (256, 256), size)[:2]
        np.stack([sample_runs(decode_counts(counts, *size), *size, *at) for counts in runs])

    def their_masks() -> list[np.ndarray]:
        masks = [Image.fromarray(coco_mask.decode(shape).T) for shape in shapes]  # T: no copy
        return [np.asarray(mask.resize((256, 256), Image.Resampling.NEAREST)) for mask in masks]

    def plain_image() -> torch.Tensor:
        pixels = np.array(open_image(encoded).decode())
        image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
        return F.interpolate(image, (1024, 1024), mode="bilinear", antialias=True)

    def plain() -> None:
        json.loads(document)
        plain_image()
        np.stack(their_masks())

    steps = {
        "64 masks: pycocotools, resize": their_masks,
        "64 masks: ours": our_masks,
        "sample: plain": plain,
        "sample: ours": lambda: ours.decode(sample, 0, False),
        "image: plain": plain_image,
    }
    seconds = measure(steps, args.rounds, torch.device("cpu"))
    print(
        f"\nSA-1B sample, one core: JPEG of 2250 x 1500 px ({len(encoded) / 1e6:.1f} MB), 100 "
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
    """Random images, objects that are rectangles, and a box for each."""
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
        update(optimizer, loss)

    return step


def peak_memory(
    encoder: str, masks: int, args: argparse.Namespace, bf16: bool, checkpointing: bool
) -> float:
    """GB that a step adds to what the process holds; measured in a process of its own (on a
    CPU: Linux alone tells)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (encoder, masks, args, bf16, checkpointing))


def _peak_memory(
    encoder: str, masks: int, args: argparse.Namespace, bf16: bool, checkpointing: bool
) -> float:
    device = torch.device(args.device)
    batch = draw_batch(args.batch, masks, args.image_size, device)
    before = 0.0 if device.type == "cuda" else highest(device)
    step = stage2_step(encoder, batch, bf16, False, checkpointing)
    for _ in range(2):
        step()
    return highest(device) - before


def stage2_losses_and_clicks(args: argparse.Namespace, device: torch.device) -> None:
    """The losses, against the obvious way, and the error clicks."""
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

    losses = {"focal and dice of all masks": every_mask, "ours, with IoU": ours}
    sampling = {"ours": clicks}
    for name, steps in {"losses, forward and backward": losses, "error clicks": sampling}.items():
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
        report(title + ", compiled" * compiled, seconds, args.batch, flops, peak)
        del steps
        if not compiled:
            for again in (False, True):
                print(f"peak memory, GB{', encoder recomputed in the backward' * again}")
                for name, masks in cases:
                    gigabytes = peak_memory(name, masks, args, bf16, again)
                    print(f"{name + f', {masks} masks':36} {gigabytes:9.2f}")
