"""How an object is prompted: while training, in the evaluation, and where a mask was wrong.

For training a box or clicks, as SAM draws them (appendix A), from the run lengths at full
resolution, so that a first prompt follows from (seed, epoch, key). Correction clicks depend on what
was predicted alone; training and evaluation share them.

A click is the index of a pixel of the image times the scale to the model's input, as in released
code; a box counts in edges of pixels times the same scale.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from finetune.prompt_encoder import BACKGROUND, FOREGROUND, MAX_POINTS, PADDING
from finetune.prompts import as_box, as_clicks, depths
from finetune.rle import box, random_points
from sami.core.config import require

BOX_NOISE, BOX_NOISE_LIMIT = 0.1, 20.0  # of the box's side; pixels of a 1024-px input


@dataclass
class PromptConfig:
    """What an object is prompted with while training.

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


def draw_prompt(
    ends: np.ndarray,
    size: tuple[int, int],
    frame: tuple[int, int],
    image_size: int,
    config: PromptConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """An object's first prompt: points [6, 2] in pixels of the input, and labels [6].

    Args:
        ends: the mask's run ends.
        size: height and width of the image.
        frame: height and width that it has within the input.
        image_size: side of the input.
    """
    scale = np.array([frame[1] / size[1], frame[0] / size[0]])
    if rng.random() < config.boxes:
        corners = np.array(box(ends, size[0]), float).reshape(2, 2) * scale
        limit = BOX_NOISE_LIMIT * image_size / 1024
        return as_box(noisy_box(corners, frame, limit, rng))
    count = int(rng.integers(1, config.clicks + 1))
    return as_clicks(random_points(ends, size[0], count, rng) * scale)


def noisy_box(
    corners: np.ndarray, size: tuple[int, int], limit: float, rng: np.random.Generator
) -> np.ndarray:
    """The corners [2, 2], x and y, of a box, the upper left first, with noise on each coordinate.

    Its std is 10 % of that side, at most ``limit`` pixels; corners stay within ``size``, height and
    width of the image in pixels.
    """
    noise = rng.normal(size=(2, 2)) * BOX_NOISE * (corners[1] - corners[0])
    moved = corners + noise.clip(-limit, limit)
    return np.sort(moved.clip(0, [size[1], size[0]]), axis=0)


@dataclass(frozen=True)
class PromptSpec:
    """How each object is prompted.

    Attributes:
        kind: box; random, clicks drawn uniformly in the mask; centre, a click farthest from the
            mask's boundary, and each later one likewise in what is still wrong.
        clicks: how many.
        draw: which of an image's random draws. Fewer clicks are the first of more.
    """

    kind: Literal["box", "random", "centre"]
    clicks: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        """As tables say it."""
        if self.kind == "box":
            return "box"
        clicks = f"{self.clicks} click" + "s" * (self.clicks > 1)
        return clicks if self.kind == "random" else f"{clicks}, centre first"

    @staticmethod
    def parse(word: str, seeds: int) -> list["PromptSpec"]:
        """``box``, ``3`` (random clicks, in ``seeds`` draws) or ``centre-3``.

        Raises:
            ValueError: none of them.
        """
        if word == "box":
            return [PromptSpec("box")]
        kind, number = ("centre", word[7:]) if word.startswith("centre-") else ("random", word)
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(word)
        draws = seeds if kind == "random" else 1
        return [PromptSpec(kind, int(number), draw) for draw in range(draws)]


PROMPTS = (PromptSpec("box"), PromptSpec("random", 1), PromptSpec("random", 3))  # while training


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
        inside: bool [B, h, w], what is image; None for all.

    Returns:
        Points [B, K, 1, 2] as ``places`` has them, and labels [B, K, 1]; -1 and -1 where nothing is
        wrong.
    """
    missed, surplus = truth & ~mask, mask & ~truth
    kinds = {BACKGROUND: surplus, FOREGROUND: missed} if background else {FOREGROUND: missed}
    wrong = torch.stack(list(kinds.values()), 2)  # [B, K, 1 or 2, h, w]
    if inside is not None:
        wrong = wrong & inside[:, None, None]
    # The first of equals: the order of the kinds, then that of the pixels.
    depth, place = depths(wrong).flatten(2).max(2)  # [B, K]
    height, width = truth.shape[2:]
    kind, pixel = place // (height * width), place % (height * width)
    label = kind if background else torch.full_like(kind, FOREGROUND)  # BACKGROUND is 0
    x, y = places[:, 0].gather(1, pixel % width), places[:, 1].gather(1, pixel // width)
    points = torch.where((depth > 0).unsqueeze(-1), torch.stack([x, y], -1), -1.0)
    return points.unsqueeze(2), torch.where(depth > 0, label, PADDING).unsqueeze(2)


def centre_of(region: np.ndarray) -> tuple[int, int] | None:
    """The pixel x, y of a region, bool [H, W], that lies deepest in it; None if it is empty."""
    truth, sides = torch.from_numpy(region)[None, None], region.shape[::-1]
    places = torch.arange(float(max(sides))).expand(1, 2, -1)
    points, labels = correction_clicks(torch.zeros_like(truth), truth, places, background=False)
    x, y = points.flatten().int().tolist()
    return (x, y) if labels.item() == FOREGROUND else None
