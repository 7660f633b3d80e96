"""Prompts for training: a box or clicks, as SAM draws them (appendix A), and correction clicks.

First prompts are drawn with the sample, from its run lengths at full resolution, and so follow from
(seed, epoch, key). Correction clicks depend on what was predicted alone; training and evaluation
share them.

A click is the index of a pixel of the picture times the scale to the model's input, as in released
code; a box counts in edges of pixels times the same scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from finetune.prompt_encoder import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    MAX_POINTS,
    PADDING,
    TOP_LEFT,
)
from sami.core.config import require

BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20.0  # of the box's side; pixels of a 1024-px input


@dataclass
class PromptConfig:
    """What an object is prompted with.

    Attributes:
        boxes: share of the objects that are prompted by a box; the rest by clicks.
        clicks: at most so many clicks; 1 to this many are drawn, each number equally often.
        corrections: rounds with one more click in the region that was predicted wrongly; 8 in SAM.
    """

    boxes: float = 0.5
    clicks: int = MAX_POINTS
    corrections: int = 0

    def check(self) -> None:
        require(0 <= self.boxes <= 1, f"prompt.boxes {self.boxes} must be within 0..1")
        require(
            1 <= self.clicks <= MAX_POINTS,
            f"prompt.clicks {self.clicks} must be within 1..{MAX_POINTS}",
        )
        require(self.corrections >= 0, f"prompt.corrections {self.corrections} must be 0 or more")


def noisy_box(
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    limit: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """A box with noise on each coordinate: std 10 % of that side, at most ``limit`` pixels.

    Args:
        box: x0, y0, x1, y1 in pixels.
        size: height and width of the picture in pixels; corners stay within.

    Returns:
        [2, 2]: the corners' x and y, the upper left first.
    """
    x0, y0, x1, y1 = box
    sides = np.array([x1 - x0, y1 - y0], float)
    noise = rng.normal(size=(2, 2)) * BOX_NOISE * sides
    corners = np.array([[x0, y0], [x1, y1]], float) + noise.clip(-limit, limit)
    corners = corners.clip(0, [size[1], size[0]])
    return np.sort(corners, axis=0)


def as_box(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners [2, 2] as a prompt: points [6, 2] and labels [6]."""
    return _filled(corners, [TOP_LEFT, BOTTOM_RIGHT])


def as_clicks(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clicks [P, 2] on the object as a prompt: points [6, 2] and labels [6]."""
    return _filled(points, [FOREGROUND] * len(points))


def correction_clicks(
    mask: torch.Tensor,
    truth: torch.Tensor,
    places: torch.Tensor,
    background: bool,
    inside: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One click for each object, in the middle of what is wrong; nothing waits for the device.

    What was missed and what was wrongly taken are looked at apart, and the pixel that lies deepest
    in either is clicked, as in SAM 2 and RITM (their union would have its middle on the border
    between the two). Of pixels equally deep it is one wrongly taken, as theirs, and among these the
    uppermost, then the leftmost.

    Args:
        mask: bool [B, K, h, w], what was predicted.
        truth: bool [B, K, h, w].
        places: [B, 2, n], x of a click on each column and y of one on each row.
        background: whether pixels wrongly taken for the object may be clicked (label 0); without,
            only missed ones are.
        inside: bool [B, h, w], what is picture; None for all.

    Returns:
        Points [B, K, 1, 2] as ``places`` has them, and labels [B, K, 1]; -1 and -1 where nothing is
        wrong.
    """
    missed, taken = truth & ~mask, mask & ~truth
    kinds = [missed, taken] if background else [missed]
    wrong = torch.stack(kinds, 2)  # [B, K, 1 or 2, h, w]
    if inside is not None:
        wrong = wrong & inside[:, None, None]
    depth, place = depths(wrong).flatten(3).max(3)  # [B, K, 1 or 2]
    label = torch.full_like(place[..., 0], FOREGROUND)
    if background:
        label = torch.where(depth[..., 0] > depth[..., 1], FOREGROUND, BACKGROUND)
    which = (label == BACKGROUND).long().unsqueeze(2)
    found = depth.gather(2, which).squeeze(2) > 0
    place, width = place.gather(2, which).squeeze(2), truth.shape[3]
    x, y = places[:, 0].gather(1, place % width), places[:, 1].gather(1, place // width)
    points = torch.where(found.unsqueeze(-1), torch.stack([x, y], -1), -1.0)
    return points.unsqueeze(2), torch.where(found, label, PADDING).unsqueeze(2)


def centre_of(region: np.ndarray) -> tuple[int, int] | None:
    """The pixel x, y of a region, bool [H, W], that lies deepest in it; None if it is empty."""
    truth, sides = torch.from_numpy(region)[None, None], region.shape[::-1]
    places = torch.arange(float(max(sides))).expand(1, 2, -1)
    points, labels = correction_clicks(torch.zeros_like(truth), truth, places, background=False)
    x, y = points.flatten().int().tolist()
    return (x, y) if labels.item() == FOREGROUND else None


def depths(regions: torch.Tensor) -> torch.Tensor:
    """How far each pixel of regions, bool [..., h, w], is from the nearest that is not of them.

    What lies outside of the picture is of no region (Segment Anything, appendix D.1).

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
    """[N, h, w]: along the rows, then over all rows in reach, each a step of the whole picture."""
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


def _filled(points: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    all_points = np.full((MAX_POINTS, 2), -1.0, np.float32)
    all_labels = np.full(MAX_POINTS, PADDING, np.int64)
    all_points[: len(points)], all_labels[: len(labels)] = points, labels
    return all_points, all_labels
