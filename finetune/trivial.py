"""What scores without a model: a box as its own mask, a disc of constant size at the clicks, and a
grid of boxes as proposals.

A score says something by how far it is above these. In the image's own pixels, from run lengths.
"""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from finetune.coco_masks import as_text
from finetune.rle import area, box

# Of the disc, as shares of the side of a square with the image's area; the best one is taken.
RADII = 0.01 * 2 ** (np.arange(11) / 2)


def filled_box(ends: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """IoU of each mask with its own tight box, fp64 [1, K]."""
    found = []
    for one in ends:
        x0, y0, x1, y1 = box(one, height)
        columns = np.arange(x0, x1)
        top, bottom, which = (np.full(len(columns), n) for n in (y0, y1, 0))
        found.append(_iou(one, height, columns, top, bottom, which, 1))
    return np.stack(found, 1)


def fill_boxes(boxes: np.ndarray, height: int, width: int) -> list[dict[str, Any]]:
    """Boxes [K, 4], x0, y0, x1, y1 in pixels of the image, as masks in COCO's run lengths."""
    if len(boxes) == 0:
        return []
    sides = np.concatenate([boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clip(0)], 1)
    return as_text(coco_mask.frPyObjects(sides.astype(np.float64), height, width))


def grid_of_boxes(count: int, height: int, width: int) -> np.ndarray:
    """The first boxes of a fixed order, [count, 4], x0, y0, x1, y1 in pixels of the image.

    The whole image, then 3 x 3 boxes of half its sides, 7 x 7 of a quarter, and so on, each half a
    box from the next. Within a level their order is drawn once for all, so that no corner is
    favoured.
    """
    levels: list[np.ndarray] = []
    while sum(map(len, levels)) < count:
        side = 0.5 ** len(levels)
        x, y = np.meshgrid(*[np.arange(0, 1 - side + 1e-9, side / 2)] * 2)
        corners = np.stack([x.ravel(), y.ravel()], 1)
        corners = np.random.default_rng(len(levels)).permutation(corners)
        levels.append(np.concatenate([corners, corners + side], 1))
    boxes = np.concatenate([*levels, np.zeros((0, 4))])[:count]
    return boxes * np.array([width, height, width, height])


def discs(ends: list[np.ndarray], height: int, width: int, clicks: np.ndarray) -> np.ndarray:
    """IoU of each mask with the discs of all RADII about the mean of its clicks, fp64 [R, K].

    Args:
        clicks: [K, P, 2], pixels x, y.
    """
    radii = RADII * (height * width) ** 0.5
    found = []
    for one, (x, y) in zip(ends, clicks.mean(1), strict=True):
        first = np.clip(np.ceil(x - radii), 0, width).astype(int)
        last = np.clip(np.floor(x + radii) + 1, 0, width).astype(int)
        which = np.repeat(np.arange(len(radii)), last - first)
        columns = np.arange(len(which)) - np.repeat(np.cumsum(last - first) - last, last - first)
        half = np.sqrt(np.maximum(radii[which] ** 2 - (columns - x) ** 2, 0))
        top = np.clip(np.ceil(y - half), 0, height).astype(int)
        bottom = np.clip(np.floor(y + half) + 1, 0, height).astype(int)
        found.append(_iou(one, height, columns, top, bottom, which, len(radii)))
    return np.stack(found, 1)


def _iou(
    ends: np.ndarray,
    height: int,
    columns: np.ndarray,
    top: np.ndarray,
    bottom: np.ndarray,
    which: np.ndarray,
    regions: int,
) -> np.ndarray:
    """IoU of a mask with regions given by the rows that they cover in each column, fp64 [regions].

    Args:
        which: the region of each entry of ``columns``.
    """
    starts = np.concatenate([[0], ends])
    inside = np.diff(starts) * (np.arange(len(ends)) % 2)
    upto = np.concatenate([[0], np.cumsum(inside)])

    def before(place: np.ndarray) -> np.ndarray:
        """The object's pixels before a place in the columns laid end to end."""
        run = np.searchsorted(ends, place, side="right")
        return upto[run] + run % 2 * (place - starts[run])

    both = before(columns * height + bottom) - before(columns * height + top)
    both = np.bincount(which, both, regions)
    either = np.bincount(which, bottom - top, regions) + area(ends) - both
    return both / either
