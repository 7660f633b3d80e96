"""Prompts for training: a box or clicks, as SAM draws them (appendix A), and correction clicks.

First prompts are drawn with the sample, from its run lengths at full resolution, and so follow from
(seed, epoch, key). Correction clicks depend on what was predicted, and are drawn on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch

from finetune.prompt_encoder import BOTTOM_RIGHT, FOREGROUND, MAX_POINTS, PADDING, TOP_LEFT
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
    logits: torch.Tensor,
    truth: torch.Tensor,
    image_size: int,
    background: bool,
    inside: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One click for each object, uniform over the pixels that were predicted wrongly.

    Args:
        logits: of one mask per object, [B, K, h, w].
        truth: bool [B, K, h, w].
        image_size: side in pixels of the model's input, in which clicks count.
        background: whether pixels wrongly taken for the object may be clicked (label 0); without,
            only missed ones are.
        inside: bool [B, h, w], what is picture; None for all.

    Returns:
        Points [B, K, 1, 2] and labels [B, K, 1], -1 and -1 where nothing is wrong.
    """
    wrong = (logits > 0) != truth if background else truth & (logits <= 0)
    if inside is not None:
        wrong = wrong & inside.unsqueeze(1)
    chance = torch.rand(wrong.shape, device=wrong.device, generator=generator)
    best, place = torch.where(wrong, chance, -1.0).flatten(2).max(2)
    height, width = truth.shape[2:]
    y, x = place // width, place % width
    # pixel centres to indices; plain numbers, because a tensor of them would wait for the device
    x, y = (x + 0.5) * (image_size / width) - 0.5, (y + 0.5) * (image_size / height) - 0.5
    points = torch.stack([x, y], -1)
    label = truth.flatten(2).gather(2, place.unsqueeze(2)).squeeze(2).long()
    found = best >= 0
    points = torch.where(found.unsqueeze(-1), points, -1.0)
    return points.unsqueeze(2), torch.where(found, label, PADDING).unsqueeze(2)


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
