"""Instance segmentation from a detector's boxes, on COCO- or LVIS-format annotations.

Each box is a prompt; its mask keeps the detector's category and score (EfficientSAM, section 4.3;
Segment Anything, section 7.4). Of several masks EfficientSAM takes the one whose IoU with the box
is highest, EfficientViT-SAM the one whose predicted IoU is: ``choose``.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from finetune.annotated_images import load_images
from finetune.average_precision import Kind, Truth, average_precision
from finetune.coco import CocoSource, as_id, plain_name
from finetune.coco_masks import encode_masks
from finetune.detections import read_detections
from finetune.evaluation import (
    DECODED_AT_ONCE,
    PIXELS_AT_ONCE,
    EvalSample,
    at_full_size,
    decode,
    in_parts,
    take_masks,
)
from finetune.folders import find_files, listed
from finetune.prompting import PromptSpec
from finetune.sam import Sam
from finetune.trivial import fill_boxes
from sami.core.config import require
from sami.core.progress import track

Choose = Literal["predicted", "box"]
CHOOSE: tuple[Choose, ...] = get_args(Choose)
FILLED = "filled box"  # the mask that needs no model
KINDS: tuple[Kind, ...] = ("segm", "boundary")
BOX = PromptSpec("box")


@torch.no_grad()
def segment_boxes(
    model: Sam,
    image: torch.Tensor,
    size: tuple[int, int],
    boxes: np.ndarray,
    choose: Choose = "predicted",
) -> list[dict[str, Any]]:
    """A mask for each box, in COCO's run lengths; a box without a pixel gets an empty one.

    ``predicted``: the mask with the highest predicted IoU of those that a box asks for (see
    :meth:`finetune.sam.Sam.asked`). ``box``: of masks 1..3 the one whose IoU with the box, as a
    region, is highest.

    Args:
        image: uint8 [3, h, w] within the model's input, see :func:`finetune.evaluation.framed`.
        size: height and width of the image in pixels.
        boxes: [K, 4], x0, y0, x1, y1 in pixels of the image.
    """
    found = encode_masks(np.zeros((1, size[1], size[0]), bool)) * len(boxes)
    numbers = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    if len(numbers) == 0:
        return found
    given, nothing = torch.tensor(boxes[numbers], dtype=torch.float32), torch.zeros(0)
    sample = EvalSample("", image, size, [], given, nothing, nothing)
    embedding = model.get_image_embeddings(image.to(model.device)[None])
    step = max(1, PIXELS_AT_ONCE // (3 * size[0] * size[1]))
    masks = []
    for part in in_parts(len(numbers), DECODED_AT_ONCE):
        logits, best, *_ = decode(model, embedding, sample, BOX, part)
        logits = take_masks(logits, best) if choose == "predicted" else logits[:, 1:]
        for inner in in_parts(len(logits), step):
            some = at_full_size(model, logits[inner], size)
            if choose == "box":
                nearest = iou_with_box(some, given[part][inner].to(some.device)).argmax(1)
                some = some.take_along_dim(nearest[:, None, None, None], 1)
            masks += encode_masks(some[:, 0].transpose(1, 2).contiguous().cpu().numpy())
    for number, mask in zip(numbers, masks, strict=True):
        found[number] = mask
    return found


def iou_with_box(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """IoU [K, M] of masks, bool [K, M, H, W], with the pixels whose centres lie in a box [K, 4]."""
    height, width = masks.shape[2:]
    x, y = (torch.arange(side, device=masks.device) + 0.5 for side in (width, height))
    x0, y0, x1, y1 = boxes.T[..., None]
    columns, rows = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)  # [K, W], [K, H]
    inside = columns[:, None, None, :] & rows[:, None, :, None]
    return (masks & inside).sum((2, 3)) / (masks | inside).sum((2, 3)).clamp(min=1)


@dataclass(frozen=True)
class Instances:
    """What was measured: a ``report`` for JSON, and ``results`` in COCO's results format."""

    report: dict[str, Any]
    results: list[dict[str, Any]]


def measure_instances(
    model: Sam, source: CocoSource, args: argparse.Namespace, device: torch.device
) -> Instances:
    """AP of a model's masks for a detector's boxes, over all images of the annotations.

    Args:
        source: of :meth:`finetune.coco.CocoSource.of`.
        args: ``boxes``, a file for :func:`finetune.detections.read_detections`; ``choose``;
            ``samples``, for the source's images alone; ``masks_drawn_on``, ``precision`` and
            ``workers`` as of tools/evaluate.py.

    Returns:
        ``report``: counts; ``rows``, the model's and the filled box's (``mask``), each with
        ``segm`` and ``boundary``, see :func:`finetune.average_precision.average_precision`; and
        ``box``, AP of the boxes as boxes. ``results`` have no ``bbox``: pycocotools would take its
        area for the mask's.

    Raises:
        UserError: annotations and boxes that do not fit each other, or images that lack.
    """
    coco, names = source.coco, None
    if args.samples is not None:
        names = [plain_name(entry.images[0]) for _, entry in source.entries]
    truth = Truth.of(coco, names)
    require(bool(truth.categories), f"--coco {coco.file} has no categories, which AP is a mean of")
    all_ids = {as_id(image["id"]) for one in coco.entries.values() for image in one.images}
    given = read_detections(args.boxes, truth, all_ids)
    asked = [name for name, own in given.found.items() if own]
    require(
        bool(asked),
        f"--boxes {args.boxes}: no box is of the {len(truth.images)} images that --samples leaves; "
        "raise it",
    )
    results, filled, unusable = [], [], Counter()
    images = load_images(_paths(asked, source.folder), truth, model.shape, args, device)
    for name, image, why in track(images, "masks for boxes", total=len(asked)):
        if image is None:
            unusable[why] += 1
            truth.leave_out(name)
            continue
        size = truth.images[name]["height"], truth.images[name]["width"]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            masks = segment_boxes(model, image, size, given.boxes[name], args.choose)
        boxes = fill_boxes(given.boxes[name], *size)
        for one, mask, box in zip(given.found[name], masks, boxes, strict=True):
            kept = {key: one[key] for key in ("image_id", "category_id", "score")}
            results.append(kept | {"segmentation": mask})
            filled.append(kept | {"segmentation": box})
    require(bool(results), f"none of the images could be used ({dict(unusable)})")
    rows = [
        {"mask": name} | {kind: average_precision(truth, ours, kind) for kind in KINDS}
        for name, ours in ((args.choose, results), (FILLED, filled))
    ]
    found = [one for name in asked if name in truth.images for one in given.found[name]]
    report = {"rules": truth.rules, "images": len(truth.images), "unusable": dict(unusable)}
    report |= {"boxes": len(found), "clipped": given.clipped, "outside": given.outside}
    report |= {"annotations_left_out": dict(+truth.left_out), "rows": rows}
    return Instances(report | {"box": average_precision(truth, found, "bbox")}, results)


def _paths(names: list[str], folder: Path) -> dict[str, Path]:
    """
    Raises:
        UserError: an image is not there.
    """
    found = find_files(names, folder).files
    lacking = [name for name in names if name not in found]
    require(
        not lacking,
        f"{folder} lacks {len(lacking)} of the {len(names)} images that --boxes has boxes for: "
        f"{listed(lacking)}; name the folder that their file_name is relative to, or take the "
        "first images alone (--samples)",
    )
    return {name: folder / found[name] for name in names}
