"""All masks of an image: segment_anything's generator and ours, their time, memory and masks."""

import argparse
import multiprocessing
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import nn

from benches.timing import introduce, spread
from finetune.everything import MaskGenerator
from finetune.model import MaskDecoderConfig, build_model, load_model
from finetune.sam import Sam
from sami.core.images import open_image
from sami.core.memory import highest
from sami.encoder import EncoderConfig

CPU = torch.device("cpu")
GENERATORS = {"segment_anything": SamAutomaticMaskGenerator, "ours": MaskGenerator}


def open_both(args: argparse.Namespace) -> tuple[Sam, np.ndarray]:
    """The model and the image [H, W, 3].

    Random weights make noise: each sample of a mask has another sign than its neighbour. With a
    smooth image, and upscaling that makes four equal samples of one, masks have outlines.
    """
    if args.model:
        model = load_model(args.model, "--model")
    else:
        torch.manual_seed(0)
        resize = "square" if args.head == "efficientsam" else "longest"
        head = MaskDecoderConfig(args.head)
        model = build_model(EncoderConfig(args.encoder), head, args.image_size, resize, False)
        for layer in model.mask_decoder.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                mean = layer.weight.data.mean((2, 3), keepdim=True)
                layer.weight.data.copy_(mean.expand_as(layer.weight))
    if args.image:
        image = open_image(args.image.read_bytes()).decode()
    else:
        drawn = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
        image = Image.fromarray(drawn)
    resized = image.resize(tuple(args.pixels[::-1]), Image.Resampling.BICUBIC)
    return model.eval().to(args.device), np.asarray(resized)


def find_thresholds(model: Sam, image: np.ndarray) -> tuple[float, float, float]:
    """Of predicted IoU, stability and its offset, from the masks of 16 points.

    A third of the masks pass the first, and half of these the second: segment_anything's own
    thresholds leave nothing of random weights, nor of weights trained on little.
    """
    every = {"points_per_side": 4, "box_nms_thresh": 1.0, "output_mode": "coco_rle"}
    predictor = SamPredictor(model)
    predictor.set_image(image)
    middle = np.array([[image.shape[1] / 2, image.shape[0] / 2]])
    logits = predictor.predict(middle, np.ones(1))[2]  # of low resolution
    offset = min(1.0, 0.1 * float(logits.std()))
    every |= {"pred_iou_thresh": 0, "stability_score_thresh": 0, "stability_score_offset": offset}
    found = MaskGenerator(model, **every).generate(image)
    iou = max(1e-6, float(np.quantile([one["predicted_iou"] for one in found], 2 / 3)))
    stable = [one["stability_score"] for one in found if one["predicted_iou"] > iou]
    return iou, float(np.nanquantile(stable or [0.5], 0.5)), offset


def generate(
    name: str, args: argparse.Namespace, thresholds: tuple[float, float, float], threads: int
) -> tuple[float, float, float, float, list[dict[str, Any]]]:
    """Seconds, the CPU's seconds, GB of memory before and at most, and masks."""
    torch.set_num_threads(threads)
    model, image = open_both(args)
    iou, stability, offset = thresholds
    generator = GENERATORS[name](
        model,
        points_per_side=args.side,
        pred_iou_thresh=iou,
        stability_score_thresh=stability,
        stability_score_offset=offset,
        output_mode="coco_rle",
    )
    before, started, worked = highest(CPU), time.perf_counter(), time.process_time()
    masks = generator.generate(image)
    taken = time.perf_counter() - started
    return taken, time.process_time() - worked, before, highest(CPU), masks


def share_alike(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> float:
    """Of all masks of both, the part that the other has with an IoU of 0.99 or more."""
    if not theirs or not ours:
        return float(len(theirs) == len(ours))
    a, b = ([one["segmentation"] for one in masks] for masks in (theirs, ours))
    alike = np.array(coco_mask.iou(a, b, [0] * len(b))) >= 0.99
    return (alike.any(1).sum() + alike.any(0).sum()) / (len(a) + len(b))


def everything(args: argparse.Namespace) -> None:
    introduce(args, torch.device(args.device))
    thresholds = args.thresholds or find_thresholds(*open_both(args))
    height, width = args.pixels
    print(
        f"{args.side} x {args.side} points, image of {width} x {height} px; predicted IoU over "
        "{:.3f}, stability {:.3f} or more with an offset of {:.3f}".format(*thresholds)
    )
    seconds: dict[str, list[float]] = {name: [] for name in GENERATORS}
    work: dict[str, list[float]] = {name: [] for name in GENERATORS}
    highest_of = dict.fromkeys(GENERATORS, 0.0)
    masks = {}
    for _ in range(args.rounds):
        for name in GENERATORS:
            given = (name, args, thresholds, torch.get_num_threads())
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                taken, worked, before, most, masks[name] = pool.apply(generate, given)
            seconds[name].append(taken)
            work[name].append(worked)
            highest_of[name] = max(highest_of[name], most)
            print(
                f"{name:20} {taken:8.1f} s ({worked:.1f} of the CPU's), {len(masks[name])} masks, "
                f"peak memory {most:.2f} GB, {before:.2f} of them before"
            )
    ratios, works = (
        spread([a / b for a, b in zip(*times.values(), strict=True)], 2)
        for times in (seconds, work)
    )
    memory = highest_of["ours"] / highest_of["segment_anything"]
    print(
        f"ours is {ratios} times as fast ({works} by the CPU's time), with {memory:.0%} of the "
        "peak memory; alike (IoU of 0.99 or more) are "
        f"{share_alike(*masks.values()):.1%} of the masks"
    )
