"""What the student does not see: the strategies that draw a mask.

A strategy is a function (config, grid, rng) to the visible and the masked patch numbers, in raster
order of a square of ``grid`` patches a side. Every draw of one configuration has to give the same
number of each, so that a batch can be stacked. To add one, write it here and name it in STRATEGIES.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sami.core.config import require

Mask = tuple[np.ndarray, np.ndarray]  # visible [V] and masked [M], together each patch once


def random_mask(config: "MaskConfig", grid: int, rng: np.random.Generator) -> Mask:
    """A uniformly random subset stays visible: MAE's, 49 of 196 patches at 75 %."""
    order, keep = rng.permutation(grid * grid), visible_count(config, grid)
    return order[:keep], order[keep:]


def visible_count(config: "MaskConfig", grid: int) -> int:
    """How many patches ``mask.ratio`` leaves visible, rounded down (MAE's rule)."""
    return int(round(grid * grid * (1 - config.ratio), 6))  # 0.3 of 10 is 3, not 2.9999


STRATEGIES = {"random": random_mask}


@dataclass
class MaskConfig:
    """What the student does not see.

    Attributes:
        kind: how the mask is drawn, of STRATEGIES. random, each patch on its own.
        ratio: share of the patches that is masked; 0 is plain distillation, without a decoder.
    """

    kind: Literal[tuple(STRATEGIES)] = "random"
    ratio: float = 0.75

    def check(self) -> None:
        require(
            0 <= self.ratio < 1,
            f"mask.ratio {self.ratio} must be at least 0 and under 1, such as 0.75",
        )

    def check_grid(self, grid: int) -> None:
        """
        Raises:
            UserError: nothing would be visible, or nothing masked.
        """
        visible, masked = count_patches(self, grid)
        require(
            visible >= 1 and (self.ratio == 0 or masked >= 1),
            f"mask.ratio {self.ratio} leaves {visible} of {grid * grid} patches visible; at least "
            "one has to be visible and, unless the ratio is 0, one masked",
        )


def draw_mask(config: MaskConfig, grid: int, rng: np.random.Generator) -> Mask:
    """Ascending numbers of the visible patches and of the masked ones."""
    visible, masked = STRATEGIES[config.kind](config, grid, rng)
    return np.sort(visible), np.sort(masked)


def count_patches(config: MaskConfig, grid: int) -> tuple[int, int]:
    """How many patches every draw leaves visible, and how many it masks."""
    draws = [draw_mask(config, grid, np.random.default_rng(seed)) for seed in range(2)]
    sizes = {(len(visible), len(masked)) for visible, masked in draws}
    whole = all(sorted([*visible, *masked]) == list(range(grid**2)) for visible, masked in draws)
    assert whole and len(sizes) == 1, (
        f"mask.kind {config.kind} has to give each patch once, and as many visible in every draw"
    )
    return sizes.pop()


def keep_part(masked: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """The random share of the masked patches that is predicted, rounded; at least one of them."""
    if fraction == 1:
        return masked
    return np.sort(rng.choice(masked, max(1, round(len(masked) * fraction)), replace=False))
