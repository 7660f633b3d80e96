"""What scores without a model: a box as its own mask, and a disc of constant size at the clicks.

A score says something by how far it is above these. In the image's own pixels, from run lengths.
"""

import numpy as np

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
