"""Proposals: all masks of an image without a prompt, and how many objects they cover.

As Segment Anything measures them (section 7.3, appendix D.3), and FastSAM (its tables 3 to 5).
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from finetune.annotated_images import load_images
from finetune.average_precision import PROPOSALS, Kind, Recall, Truth
from finetune.coco import CocoSource, plain_name
from finetune.coco_masks import encode_masks
from finetune.everything import MaskGenerator
from finetune.fastsam import FastSam
from finetune.sam import Sam
from finetune.trivial import fill_boxes, grid_of_boxes
from sami.core.config import require
from sami.core.progress import track

GRID = "grid of boxes"  # proposals that need no model
KINDS: tuple[Kind, ...] = ("segm", "bbox")
# All masks of an image, uint8 [H, W, 3] in RGB: ``segmentation`` in COCO's run lengths, ``score``,
# and ``bbox`` (x, y, width, height in pixels) where it is not the mask's tight box.
Proposer = Callable[[np.ndarray], list[dict[str, Any]]]


def propose_by_clicks(model: Sam, points_per_side: int) -> Proposer:
    """The masks of a grid of clicks.

    As in appendix D.3 none is left out for its predicted IoU or stability, of two whose boxes' IoU
    is above .9 one stays, and the score is the mean of predicted IoU and stability.
    """
    generator = MaskGenerator(
        model,
        points_per_side,
        pred_iou_thresh=0,
        stability_score_thresh=0,
        box_nms_thresh=0.9,
        output_mode="coco_rle",
    )

    def propose(image: np.ndarray) -> list[dict[str, Any]]:
        found = generator.generate(image)
        scores = [(one["predicted_iou"] + one["stability_score"]) / 2 for one in found]
        masks = [one["segmentation"] for one in found]
        return [{"segmentation": m, "score": s} for m, s in zip(masks, scores, strict=True)]

    return propose


def propose_by_fastsam(model: FastSam) -> Proposer:
    """FastSAM's instances with its own boxes: the 1,000 of highest confidence above .001, as its
    validation has it (with at most 100)."""

    def propose(image: np.ndarray) -> list[dict[str, Any]]:
        with model.limits(conf=0.001, max_det=PROPOSALS[-1]):
            found = model.everything(image)
        masks = encode_masks(found.masks.transpose(1, 2).contiguous().cpu().numpy())
        corners = found.boxes.cpu().double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        return [
            {"segmentation": mask, "bbox": box, "score": score}
            for mask, box, score in zip(masks, boxes, found.scores.tolist(), strict=True)
        ]

    return propose


def measure_proposals(
    propose: Proposer, source: CocoSource, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """AR of an image's masks and boxes, beside as many of a fixed grid of boxes.

    Args:
        propose: gives the proposals of one image.
        source: of :meth:`finetune.coco.CocoSource.of`: its annotated images that are there.
        args: ``seed`` of the intervals; ``masks_drawn_on``, ``precision`` and ``workers`` as of
            tools/evaluate.py.

    Returns:
        ``images``, ``unusable`` by reason, ``annotations_left_out`` by reason, ``mean`` number of
        proposals for an image, and ``rows``, the model's and the grid's (``proposals``), each with
        ``segm`` and ``bbox``, see :meth:`finetune.average_precision.Recall.row`.

    Raises:
        UserError: no image can be used.
    """
    paths = {plain_name(entry.images[0]): source.folder / path for path, entry in source.entries}
    truth = Truth.of(source.coco, paths, by_category=False)
    paths = {name: path for name, path in paths.items() if truth.annotations.get(name)}
    why = dict(truth.left_out)
    some = any(truth.has_objects(name) for name in paths)
    require(some, f"--coco {source.coco.file}: no image has a usable annotation ({why}) but crowds")
    recalls = {name: [Recall(kind) for kind in KINDS] for name in ("model", GRID)}
    unusable, counts = Counter(), []
    images = load_images(paths, truth, None, args, device)
    for name, image, why in track(images, "proposals", total=len(paths)):
        if image is None:
            unusable[why] += 1
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            found = propose(image.numpy())
        ours = sorted(found, key=lambda one: one["score"], reverse=True)[: PROPOSALS[-1]]
        ours = [{"bbox": coco_mask.toBbox(one["segmentation"]).tolist()} | one for one in ours]
        for own, some in (("model", ours), (GRID, propose_grid(len(ours), *image.shape[:2]))):
            for recall in recalls[own]:
                recall.add(truth, name, some)
        counts.append(len(ours))
    require(bool(counts), f"none of the images could be used ({dict(unusable)})")
    rows = [
        {"proposals": name} | {recall.kind: recall.row(args.seed) for recall in own}
        for name, own in recalls.items()
    ]
    report = {"images": len(counts), "unusable": dict(unusable), "mean": float(np.mean(counts))}
    return report | {"annotations_left_out": dict(+truth.left_out), "rows": rows}


def propose_grid(count: int, height: int, width: int) -> list[dict[str, Any]]:
    """Boxes as proposals, those of :func:`finetune.trivial.grid_of_boxes`, filled as masks."""
    boxes = grid_of_boxes(count, height, width)
    masks = fill_boxes(boxes, height, width)
    return [
        {"segmentation": mask, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": -float(number)}
        for number, (mask, (x0, y0, x1, y1)) in enumerate(zip(masks, boxes.tolist(), strict=True))
    ]
