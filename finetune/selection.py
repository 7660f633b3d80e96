"""Choose among an image's masks by points, a box or text: FastSAM's second step.

It learns nothing and needs no package. The rules are those of the paper's section 3.3 and of the
authors' code (CASIA-IVA-Lab/FastSAM, fastsam/prompt.py); docs/fastsam.md tells where the package
ultralytics differs. Points are x, y and boxes x0, y0, x1, y1, in pixels of the masks.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from finetune.prompt_encoder import BACKGROUND, FOREGROUND
from sami.core.config import require

SMALLEST = 100  # pixels: masks up to here are not compared with a text
Masks = torch.Tensor | np.ndarray


def select_by_points(
    masks: Masks, points: Sequence | np.ndarray, labels: Sequence | np.ndarray
) -> tuple[torch.Tensor, list[int]]:
    """The masks under foreground clicks, merged, less those under background clicks.

    Masks are taken by descending area. One that holds a foreground click is painted, one that holds
    a background click is cleared; of several clicks in a mask the last one counts. So a small mask
    paints again what a large one around it has cleared (FastSAM's ``point_prompt``).

    Args:
        masks: bool [N, H, W].
        points: [P, 2], x and y in pixels; one outside of the image is in no mask.
        labels: [P], 1 for foreground and 0 for background; others (SAM's padding) are ignored.

    Returns:
        The mask, bool [H, W], and which of the N were painted, in that order.

    Raises:
        UserError: shapes that do not fit.
    """
    masks = _as_masks(masks)
    points = torch.as_tensor(np.asarray(points, np.float32), device=masks.device).reshape(-1, 2)
    labels = torch.as_tensor(np.asarray(labels), device=masks.device).flatten()
    require(
        len(points) == len(labels),
        f"{len(points)} points came with {len(labels)} labels; give one label for each point",
    )
    require(bool(points.isfinite().all()), "the points are not all finite; give x and y in pixels")
    height, width = masks.shape[1:]
    x, y = points.floor().long().unbind(1)
    kept = (labels == FOREGROUND) | (labels == BACKGROUND)
    kept &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y, labels = x[kept], y[kept], labels[kept]
    result, painted = masks.new_zeros((height, width)), []
    if len(masks) and len(labels):
        inside = masks[:, y, x]  # [N, P]
        last = len(labels) - 1 - inside.flip(1).int().argmax(1)
        paints = (labels == FOREGROUND)[last].tolist()
        hit = inside.any(1).nonzero()[:, 0]  # areas of the others would take most of the time
        order = masks[hit].sum((1, 2)).argsort(descending=True, stable=True)
        for number in hit[order].tolist():
            result[masks[number]] = paints[number]
            painted += [number] * paints[number]
    return result, painted


def select_by_box(masks: Masks, box: Sequence | np.ndarray) -> int | None:
    """The mask with the largest IoU with a box, taken as a filled rectangle.

    The box is rounded to pixels and cut to the image (FastSAM's ``box_prompt``).

    Args:
        masks: bool [N, H, W].
        box: x0, y0, x1, y1 in pixels.

    Returns:
        Which of the N, the first of equals; None if no mask has a pixel in the box.

    Raises:
        UserError: no box, or none that covers a pixel of the image.
    """
    masks = _as_masks(masks)
    corners = np.asarray(box, np.float64).flatten()
    require(
        len(corners) == 4 and bool(np.isfinite(corners).all()),
        f"a box is x0, y0, x1, y1 in pixels, got {corners.tolist()}",
    )
    height, width = masks.shape[1:]
    x0, y0 = (max(round(float(value)), 0) for value in corners[:2])
    x1, y1 = (
        min(round(float(v)), most) for v, most in zip(corners[2:], (width, height), strict=True)
    )
    require(
        x0 < x1 and y0 < y1,
        f"the box {corners.tolist()} covers no pixel of an image of {width} x {height}; give x0, "
        "y0, x1, y1 in pixels",
    )
    common = masks[:, y0:y1, x0:x1].sum((1, 2))
    touching = common.nonzero()[:, 0]
    if not len(touching):
        return None
    common = common[touching]
    iou = common / ((y1 - y0) * (x1 - x0) + masks[touching].sum((1, 2)) - common)
    return int(touching[iou.argmax()])


def select_by_text_scores(masks: Masks, scores: Sequence | np.ndarray | torch.Tensor) -> int | None:
    """The mask whose score for a text is highest, among those of more than 100 pixels.

    Args:
        masks: bool [N, H, W].
        scores: [N], for each mask how well a text describes it: such as CLIP's similarity of the
            text and :func:`text_crops`. FastSAM's softmax over them does not change which is best.

    Returns:
        Which of the N, the first of equals; None if none is large enough.

    Raises:
        UserError: not one finite score for each mask.
    """
    masks = _as_masks(masks)
    values = torch.as_tensor(np.asarray(scores, np.float32), device=masks.device).flatten()
    require(
        len(values) == len(masks),
        f"{len(values)} text scores came for {len(masks)} masks; give one for each mask, also for "
        "those of few pixels",
    )
    require(bool(values.isfinite().all()), "the text scores are not all finite")
    large = masks.sum((1, 2)) > SMALLEST
    if not large.any():
        return None
    return int(values.masked_fill(~large, -torch.inf).argmax())


def text_crops(image: np.ndarray, masks: Masks) -> Iterator[np.ndarray]:
    """What a text is compared with: for each mask the image, white outside of the mask's tight box.

    Args:
        image: uint8 [H, W, 3].
        masks: bool [N, H, W].

    Yields:
        uint8 [H, W, 3]; all white for an empty mask.
    """
    for mask in _as_masks(masks).cpu().numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        crop = np.full_like(image, 255)
        if len(rows):
            part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            crop[part] = image[part]
        yield crop


def _as_masks(masks: Masks) -> torch.Tensor:
    """
    Raises:
        UserError: not [N, H, W].
    """
    masks = torch.as_tensor(masks)
    require(masks.ndim == 3, f"masks are [N, H, W], got {list(masks.shape)}")
    return masks.bool()
