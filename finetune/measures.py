"""From IoU of single objects to the figures of a table: means, sizes, intervals."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.evaluation import CHOICES, Prompting

SIZES = {"all": (0, np.inf), "S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, np.inf)}  # COCO's
RESAMPLED = 1000
SOURCE = "EfficientSAM, table 4, on COCO / LVIS"
PAPER = {
    "EfficientSAM-Ti": {"box": (75.7, 74.3), "1 click": (45.5, 52.7), "3 clicks": (67.2, 66.8)},
    "EfficientSAM-S": {"box": (76.9, 75.4), "1 click": (50.0, 56.2), "3 clicks": (69.8, 68.7)},
    "SAM": {"box": (78.4, 78.9), "1 click": (55.6, 59.8), "3 clicks": (74.1, 75.2)},
}


@dataclass
class Measured:
    """What was found on a set of pictures.

    ``iou``: of each picture fp64 [promptings, choices, K]; ``areas``: of each picture [K], in
    pixels.
    """

    promptings: tuple[Prompting, ...]
    iou: list[np.ndarray] = field(default_factory=list)
    areas: list[np.ndarray] = field(default_factory=list)

    def add(self, iou: np.ndarray, areas: np.ndarray) -> None:
        """One picture."""
        self.iou.append(iou)
        self.areas.append(areas)

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """One for each kind of prompt and each choice: mIoU by size of the object.

        The mean is over objects. Random draws of one prompt are averaged for each object first;
        ``draws`` has the mean of each. The interval is that of 95 % of 1,000 bootstrap samples of
        pictures: objects of one picture are not independent.
        """
        groups: dict[str, list[int]] = {}
        for number, prompting in enumerate(self.promptings):
            groups.setdefault(prompting.name, []).append(number)
        pictures = np.repeat(np.arange(len(self.areas)), [len(areas) for areas in self.areas])
        areas = np.concatenate(self.areas)
        iou = np.concatenate(self.iou, 2)
        weights = resample(len(self.areas), seed)
        rows = []
        for name, numbers in groups.items():
            for choice, told in zip(CHOICES, iou[numbers].mean(0), strict=True):
                by_size = {}
                for size, (least, most) in SIZES.items():
                    within = (areas >= least) & (areas < most)
                    by_size[size] = mean(told[within], pictures[within], weights)
                draws = iou[numbers, CHOICES.index(choice)].mean(1).tolist()
                rows.append({"prompt": name, "choice": choice, "miou": by_size, "draws": draws})
        return rows


def resample(pictures: int, seed: int) -> np.ndarray:
    """How often each picture is in each bootstrap sample, int [RESAMPLED, pictures]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLED)


def mean(values: np.ndarray, pictures: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The mean of objects with its interval; ``mean``, ``low`` and ``high`` are None without any.

    Args:
        values: [K].
        pictures: of which picture each is, [K].
        weights: of :func:`resample`.
    """
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None, "objects": 0}
    count = weights.shape[1]
    sums, sizes = (np.bincount(pictures, w, minlength=count) for w in (values, None))
    drawn = weights @ sizes
    means = (weights @ sums)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "mean": float(values.mean()),
        "low": float(low),
        "high": float(high),
        "objects": len(values),
    }
