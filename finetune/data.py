"""Stage 2's samples: an image of SA-1B's layout, some of its masks, and a prompt for each.

Masks are chosen before anything is decoded, and never painted at full size. What is random follows
from (seed, epoch, sample key).
"""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from finetune.losses import MaskTargets
from finetune.prompting import PromptConfig, draw_prompt
from finetune.prompts import mirror
from finetune.rle import Annotations, area, most_frequent, parse_annotations
from finetune.rle import sample as sample_runs
from sami.core.config import require
from sami.core.dataset import ShardsConfig, TensorBatch
from sami.core.errors import BadSample
from sami.core.images import Drawn, drawn_on, frame_of, open_image, resize_whole
from sami.core.order import sample_rng
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE

NO_PIXEL = "no pixel at the loss's resolution"  # of an object
UNSURE = "turned by EXIF, and its masks fit both ways: masks_drawn_on decided"  # of an image


@dataclass
class MaskDataConfig(ShardsConfig):
    """Images and masks of stage 2: shards of SA-1B's layout.

    Attributes:
        image_size: side of the model's input in pixels.
        resize: square, whatever the image's aspect, as the released model; or longest, as SAM,
            with padding that is left out of the loss.
        masks_drawn_on: the upright image or the stored one, where neither size nor annotation
            tells on which of them masks were drawn (docs/data.md).
        masks_per_image: at most so many objects of an image; the knob of the GPU's memory.
        hflip: mirror one image in two.
        max_area: objects that cover more than this share of the image are left out.
        min_predicted_iou: objects that SA-1B's own prediction puts below are left out.
        min_stability: likewise for its stability score.
    """

    image_size: int = 1024
    resize: Literal["square", "longest"] = "square"
    masks_drawn_on: Drawn = "upright"
    masks_per_image: int = 64
    hflip: bool = False
    max_area: float = 0.9
    min_predicted_iou: float = 0.0
    min_stability: float = 0.0

    def check(self) -> None:
        super().check()
        require(self.image_size > 0, f"data.image_size {self.image_size} must be positive")
        require(
            self.masks_per_image > 0,
            f"data.masks_per_image {self.masks_per_image} must be positive, such as 64",
        )
        for name in ("max_area", "min_predicted_iou", "min_stability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} {value} must be within 0..1")


@dataclass
class PromptBatch(TensorBatch):
    """A micro-batch as it leaves the loader; K is the most objects that any image has.

    ``images`` uint8 [B, 3, H, H]; ``masks`` bool [B, K, h, h]; ``there`` bool [B, K];
    ``inside`` bool [B, h, h], what is image; ``points`` [B, K, 6, 2] in pixels of the input, and
    ``labels`` [B, K, 6]; ``places`` [B, 2, h], x of a click on each column and y of one on each row
    of ``masks``; ``frames`` [B, 2], height and width of each image within the input. ``left_out``:
    reason and key of each object that could not be trained on; ``unsure``: likewise of each image
    of which data.masks_drawn_on told how its masks lie.
    """

    images: torch.Tensor
    masks: torch.Tensor
    there: torch.Tensor
    inside: torch.Tensor
    points: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    frames: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unsure: list[tuple[str, str]] = field(default_factory=list)

    @property
    def targets(self) -> MaskTargets:
        """What the loss compares with."""
        return MaskTargets(self.masks, self.there, self.inside)


@dataclass(frozen=True)
class PromptTransform:
    """How samples are made.

    Attributes:
        loss_size: side of the mask decoder's output.
    """

    data: MaskDataConfig
    prompt: PromptConfig
    loss_size: int
    seed: int

    fields: ClassVar[tuple[str, ...]] = (IMAGE, "json")

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> tuple:
        """What :meth:`collate` takes, of one sample: key, image, inside, its objects, and what is
        to be counted of it.

        Raises:
            BadSample: image or annotation cannot be used, or no mask is left.
        """
        data, key = self.data, f"{sample.key}/replacement" if replacement else sample.key
        rng = sample_rng(self.seed, epoch, key)
        flip = bool(rng.random() < 0.5) and data.hflip
        encoded, info = open_image(sample.part(IMAGE)), parse_annotations(sample.part("json"))
        asked = (info.width, info.height, info.drawn_on, data.masks_drawn_on)
        drawn, unsure = drawn_on(encoded, *asked)
        size = (info.height, info.width)
        frame = frame_of(data.image_size, data.resize, *size)
        rows, columns, inside = loss_pixels(data.image_size, self.loss_size, frame, size)
        # Full size is only ever looked at where the loss has a pixel, or a click falls.
        seen = (size[1] - 1 - columns)[::-1] if flip else columns
        chosen, reasons = self._choose(info, rows, seen, rng)
        image = np.zeros((data.image_size, data.image_size, 3), np.uint8)
        image[: frame[0], : frame[1]] = resize_whole(encoded, *frame, drawn)
        masks = np.zeros((len(chosen), *inside.shape), bool)
        masks[:, : len(rows), : len(columns)] = np.stack([mask for _, mask in chosen])
        asked = (size, frame, data.image_size, self.prompt, rng)
        prompts = [draw_prompt(ends, *asked) for ends, _ in chosen]
        points, labels = map(np.stack, zip(*prompts, strict=True))
        scale = np.array([frame[1] / size[1], frame[0] / size[0]])
        if flip:
            image[:, : frame[1]] = image[:, : frame[1]][:, ::-1]
            masks[:, :, : len(columns)] = masks[:, :, : len(columns)][:, :, ::-1]
            points = mirror(points, labels, frame[1], scale[0])
        places = np.zeros((2, self.loss_size), np.float32)
        places[0, : len(columns)], places[1, : len(rows)] = columns * scale[0], rows * scale[1]
        left_out = [(reason, sample.key) for reason in reasons.elements()]
        counted = ([(UNSURE, sample.key)] * unsure, left_out)
        if replacement:  # or it would be counted again in its own slot
            counted = ([], [])
        return sample.key, image, inside, masks, points, labels, places, frame, *counted

    def collate(self, items: list[tuple]) -> PromptBatch:
        """A batch of what :meth:`decode` made; missing objects are empty slots."""
        keys, images, inside, masks, points, labels, places, frames, unsure, left_out = zip(
            *items, strict=True
        )
        most = max(map(len, masks))

        def filled(arrays: tuple[np.ndarray, ...], empty: float) -> torch.Tensor:
            shape = (len(arrays), most, *arrays[0].shape[1:])
            table = np.full(shape, empty, arrays[0].dtype)
            for row, array in zip(table, arrays, strict=True):
                row[: len(array)] = array
            return torch.from_numpy(table)

        there = np.arange(most) < np.array([len(array) for array in masks])[:, None]
        return PromptBatch(
            images=torch.from_numpy(np.stack([p.transpose(2, 0, 1) for p in images])),
            masks=filled(masks, False),
            there=torch.from_numpy(there),
            inside=torch.from_numpy(np.stack(inside)),
            points=filled(points, -1),
            labels=filled(labels, -1),
            places=torch.from_numpy(np.stack(places)),
            frames=torch.tensor(frames),
            keys=list(keys),
            left_out=list(itertools.chain(*left_out)),
            unsure=list(itertools.chain(*unsure)),
        )

    def _choose(
        self, info: Annotations, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[tuple[np.ndarray, np.ndarray]], Counter[str]]:
        """Up to ``masks_per_image`` usable masks in random order, and why others were passed over.

        Args:
            rows, columns: the image's, that the loss looks at.

        Returns:
            Run ends of each, and the mask where the loss looks at it, bool [h', w']. Passed over
            are broken ones, and those that have no pixel there: their loss would ask for an empty
            mask.
        """
        data, limit = self.data, self.data.max_area * info.height * info.width
        fitting = [
            mask
            for mask in info.masks
            if mask.predicted_iou >= data.min_predicted_iou
            and mask.stability_score >= data.min_stability
            and (mask.area is None or mask.area <= limit)
        ]
        chosen, left_out = [], info.left_out.copy()
        for ends in info.decoded(fitting, rng, left_out):
            if 0 < area(ends) <= limit:  # what the file says of the area may be wrong
                mask = sample_runs(ends, info.height, info.width, rows, columns)
                if mask.any():
                    chosen.append((ends, mask))
                else:
                    left_out[NO_PIXEL] += 1
            if len(chosen) == data.masks_per_image:
                break
        if not chosen:
            raise BadSample(most_frequent(left_out))
        return chosen, left_out


def loss_pixels(
    image_size: int, loss_size: int, frame: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the loss looks at an image.

    Args:
        image_size: side of the model's input.
        loss_size: side of the mask decoder's output.
        frame: height and width that the image has in it.
        size: height and width of the image itself.

    Returns:
        The image's rows [h'] and columns [w'] under the centres of the loss's pixels, and
        ``inside`` bool [h, h]: which pixels of the loss have one.
    """
    centres = (np.arange(loss_size) + 0.5) * image_size / loss_size
    lines = []
    for span, full in zip(frame, size, strict=True):
        within = centres[centres < span]
        lines.append(np.minimum((within * full / span).astype(np.int64), full - 1))
    inside = np.zeros((loss_size, loss_size), bool)
    inside[: len(lines[0]), : len(lines[1])] = True
    return lines[0], lines[1], inside


def prepare(normalise: nn.Module, batch: Any) -> torch.Tensor:
    """Images as SAM's encoder takes them: normalised, and then 0 on the right and below.

    Args:
        batch: with ``images`` [B, 3, H, H] and ``frames`` [B, 2].
    """
    size = batch.images.shape[-1]
    seen = cells_inside(batch.frames, size, size, whole=True).unsqueeze(1)
    return torch.where(seen, normalise(batch.images), 0.0)


def cells_inside(frames: torch.Tensor, side: int, image_size: int, whole: bool) -> torch.Tensor:
    """Which cells of the input, divided into ``side`` x ``side``, are image and not padding.

    Args:
        frames: [B, 2], height and width in pixels that the images have within the input.
        whole: those whose middle is image; else all that hold any of it.

    Returns:
        bool [B, side, side].
    """
    places = torch.arange(side, device=frames.device) + 0.5 * whole
    rows, columns = (places * (image_size / side) < frames[:, axis, None] for axis in (0, 1))
    return rows.unsqueeze(2) & columns.unsqueeze(1)
