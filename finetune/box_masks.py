"""Masks for the boxes of an image, and which of several is taken."""

from typing import Any, Literal, get_args

import numpy as np
import torch

from finetune.coco_masks import encode_masks
from finetune.evaluation import (
    DECODED_AT_ONCE,
    PIXELS_AT_ONCE,
    EvalSample,
    at_full_size,
    decode,
    in_parts,
    take_masks,
)
from finetune.prompting import PromptSpec
from finetune.sam import Sam

Choose = Literal["predicted", "box"]
CHOOSE: tuple[Choose, ...] = get_args(Choose)
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
