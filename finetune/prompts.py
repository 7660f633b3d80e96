"""Prompts as arrays: boxes and clicks in their slots, mirrored, one more; depths of regions."""

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from finetune.prompt_encoder import BOTTOM_RIGHT, FOREGROUND, MAX_POINTS, PADDING, TOP_LEFT


def as_box(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners [2, 2] as a prompt: points [6, 2] and labels [6]."""
    return _filled(corners, [TOP_LEFT, BOTTOM_RIGHT])


def as_clicks(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clicks [P, 2] on the object as a prompt: points [6, 2] and labels [6]."""
    return _filled(points, [FOREGROUND] * len(points))


def _filled(points: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's points [6, 2] and labels [6], the last slots not used."""
    free = MAX_POINTS - len(labels)
    points = np.pad(points.astype(np.float32), ((0, free), (0, 0)), constant_values=-1)
    return points, np.pad(np.array(labels, np.int64), (0, free), constant_values=PADDING)


def mirror(points: np.ndarray, labels: np.ndarray, width: float, pixel: float) -> np.ndarray:
    """Points [K, 6, 2] of prompts in the mirrored image; a box's corners change sides.

    Clicks are at the left edge of a pixel of the image, box corners are edges.

    Args:
        width: of the image, as the points count.
        pixel: likewise of one of its pixels.
    """
    result = points.astype(np.float32)
    click, first, second = (labels == kind for kind in (FOREGROUND, TOP_LEFT, BOTTOM_RIGHT))
    result[click, 0] = width - pixel - points[click, 0]
    result[first, 0], result[second, 0] = width - points[second, 0], width - points[first, 0]
    return result


def append_clicks(
    points: torch.Tensor, labels: torch.Tensor, more: torch.Tensor, more_labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put one more click into the first free slot of each prompt; full prompts stay as they are.

    Args:
        points: [B, K, P, 2]; labels [B, K, P]; more [B, K, 1, 2]; more_labels [B, K, 1].
    """
    slot = (labels >= 0).sum(2, keepdim=True)
    place = torch.arange(labels.shape[2], device=labels.device) == slot
    return torch.where(place.unsqueeze(-1), more, points), torch.where(place, more_labels, labels)


def depths(regions: torch.Tensor) -> torch.Tensor:
    """How far each pixel of regions, bool [..., h, w], is from the nearest that is not of them.

    What lies outside of the image is of no region (Segment Anything, appendix D.1).

    Returns:
        fp32 [..., h, w] in pixels, 0 outside of the region.
    """
    flat = regions.flatten(0, -3)
    # SciPy is faster where a region is deep, but the device would have to wait for it.
    measured = _depths_by_scipy(flat) if flat.device.type == "cpu" else _depths_on_device(flat)
    return measured.view(regions.shape)


def _depths_by_scipy(regions: torch.Tensor) -> torch.Tensor:
    found = np.zeros(regions.shape, np.float32)
    for depth, region in zip(found, regions.numpy(), strict=True):
        rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
        if len(rows):
            part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            depth[part] = distance_transform_edt(np.pad(region[part], 1))[1:-1, 1:-1]
    return torch.from_numpy(found)


def _depths_on_device(regions: torch.Tensor) -> torch.Tensor:
    """[N, h, w]: along the rows, then over all rows in reach, each a step of the whole image."""
    height, width = regions.shape[1:]
    x = torch.arange(width, device=regions.device)
    before = torch.where(regions, -1, x).cummax(2).values
    behind = torch.where(regions, width, x).flip(2).cummin(2).values.flip(2)
    near = torch.minimum(x - before, behind - x).float() ** 2
    y = torch.arange(height, device=regions.device)
    border = torch.minimum(y + 1, height - y).float() ** 2
    best = torch.minimum(near, border[:, None])
    for step in range(1, (height + 1) // 2):  # what is farther away, the border is nearer than
        above, below = best[:, step:], best[:, :-step]
        torch.minimum(above, near[:, :-step] + step**2, out=above)
        torch.minimum(below, near[:, step:] + step**2, out=below)
    return best.sqrt()
