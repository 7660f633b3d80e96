"""From IoU of single objects to the figures of a table: means, sizes, intervals."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.evaluation import CHOICES
from finetune.prompting import PromptSpec
from finetune.trivial import RADII

SIZES = {"all": (0, np.inf), "S": (0, 32**2), "M": (32**2, 96**2), "L": (96**2, np.inf)}  # COCO's
RESAMPLED = 1000
TRIVIAL = ("filled box", "constant disc")  # what needs no model, as tables call it
SOURCE = "EfficientSAM, table 4"
PAPER = {  # by data set
    "COCO val2017": {
        "EfficientSAM-Ti": {"box": 75.7, "1 click": 45.5, "3 clicks": 67.2},
        "EfficientSAM-S": {"box": 76.9, "1 click": 50.0, "3 clicks": 69.8},
        "SAM": {"box": 78.4, "1 click": 55.6, "3 clicks": 74.1},
    },
    "LVIS v1 val": {
        "EfficientSAM-Ti": {"box": 74.3, "1 click": 52.7, "3 clicks": 66.8},
        "EfficientSAM-S": {"box": 75.4, "1 click": 56.2, "3 clicks": 68.7},
        "SAM": {"box": 78.9, "1 click": 59.8, "3 clicks": 75.2},
    },
}
# Images and annotations, crowds among them, by which a file of annotations is recognised.
DATA_SETS = {"COCO val2017": (5_000, 36_781), "LVIS v1 val": (19_809, 244_707)}


@dataclass
class Measured:
    """What was found on a set of images.

    ``iou``: of each image fp64 [specs, choices, K]; ``areas``: of each image [K], in
    pixels; ``trivial``: of each image, for each spec, fp64 [answers, K]; ``choices``: the names of
    the masks that were scored.
    """

    specs: tuple[PromptSpec, ...]
    iou: list[np.ndarray] = field(default_factory=list)
    areas: list[np.ndarray] = field(default_factory=list)
    trivial: list[list[np.ndarray]] = field(default_factory=list)
    choices: tuple[str, ...] = CHOICES

    def add(self, iou: np.ndarray, areas: np.ndarray, trivial: list[np.ndarray]) -> None:
        """One image."""
        self.iou.append(iou)
        self.areas.append(areas)
        self.trivial.append(trivial)

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        """One for each kind of prompt and each choice: mIoU by size of the object.

        The mean is over objects. Random draws of one prompt are averaged for each object first;
        ``draws`` has the mean of each. The interval is that of 95 % of 1,000 bootstrap samples of
        images: objects of one image are not independent. A prompt's last row, its choice one of
        TRIVIAL, needs no model; of the discs it has the radius that is best for these objects,
        ``radius``, as a share of the side of a square with the image's area.
        """
        groups: dict[str, list[int]] = {}
        for number, spec in enumerate(self.specs):
            groups.setdefault(spec.name, []).append(number)
        images = np.repeat(np.arange(len(self.areas)), [len(areas) for areas in self.areas])
        areas = np.concatenate(self.areas)
        iou = np.concatenate(self.iou, 2)
        weights = resample(len(self.areas), seed)

        def row(name: str, choice: str, iou: np.ndarray) -> dict[str, Any]:
            by_size = {}
            for size, (least, most) in SIZES.items():
                within = (areas >= least) & (areas < most)
                by_size[size] = mean(iou.mean(0)[within], images[within], weights)
            draws = iou.mean(1).tolist()
            return {"prompt": name, "choice": choice, "miou": by_size, "draws": draws}

        rows = []
        for name, numbers in groups.items():
            rows += [row(name, c, iou[numbers, place]) for place, c in enumerate(self.choices)]
            draws = [np.concatenate([one[n] for one in self.trivial], 1) for n in numbers]
            best = int(np.mean(draws, 0).mean(1).argmax())  # of [draws, answers, K]
            choice = TRIVIAL[self.specs[numbers[0]].kind != "box"]
            rows.append(row(name, choice, np.stack([one[best] for one in draws])))
            if choice == TRIVIAL[1]:
                rows[-1]["radius"] = float(RADII[best])
        return rows


def resample(images: int, seed: int) -> np.ndarray:
    """How often each image is in each bootstrap sample, int [RESAMPLED, images]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLED)


def mean(values: np.ndarray, images: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """The mean of objects with its interval; ``mean``, ``low`` and ``high`` are None without any.

    Args:
        values: [K].
        images: of which image each is, [K].
        weights: of :func:`resample`.
    """
    if len(values) == 0:
        return {"mean": None, "low": None, "high": None, "objects": 0}
    count = weights.shape[1]
    sums, sizes = (np.bincount(images, w, minlength=count) for w in (values, None))
    drawn = weights @ sizes
    means = (weights @ sums)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    bounds = {"low": float(low), "high": float(high)}
    return {"mean": float(values.mean()), **bounds, "objects": len(values)}


def data_set(images: int, annotations: int) -> str | None:
    """The data set of the paper's with so many images and annotations; None if it is none."""
    found = (name for name, sizes in DATA_SETS.items() if sizes == (images, annotations))
    return next(found, None)
