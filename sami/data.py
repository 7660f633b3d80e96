"""Stage 1's samples: one region of an image at the student's and the teacher's size, and a mask.

Region, flip and mask are drawn from (seed, epoch, sample key) and from nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from sami.core.config import require
from sami.core.dataset import ShardsConfig, TensorBatch
from sami.core.images import Box, cut, open_image
from sami.core.order import sample_rng
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE, TEACHER
from sami.features import Cache, FeatureBatch, from_bytes, region_weights
from sami.grids import IMAGE_SIZE
from sami.masking import MaskConfig, draw_mask, keep_part


@dataclass
class DataConfig(ShardsConfig):
    """Images of stage 1.

    Attributes:
        image_size: side of the student's image in pixels.
        crop_scale: smallest and largest area of the random region, as a share of the image.
        hflip: mirror one image in two.
    """

    image_size: int = IMAGE_SIZE
    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: bool = True

    def check(self) -> None:
        super().check()
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"data.crop_scale {low}, {high} must rise within 0..1, such as [0.2, 1.0]",
        )
        require(
            self.image_size > 0, f"data.image_size {self.image_size} must be positive, such as 224"
        )


@dataclass(frozen=True)
class Draw:
    """What is random about one sample: the region in pixels, the flip, and the mask.

    ``visible`` [V] and ``masked`` [M] are ascending patch numbers in raster order; ``masked`` holds
    the part of the masked patches that is predicted.
    """

    box: Box
    flip: bool
    visible: np.ndarray
    masked: np.ndarray


@dataclass
class CropBatch(TensorBatch):
    """A micro-batch as it leaves the loader.

    ``student`` uint8 [B, 3, H, H]; ``teacher`` uint8 [B, 3, S, S], or None where the student's
    image serves (the same size) or there is no teacher; ``visible`` [B, V] and ``masked``
    [B, M] patch numbers; ``features`` cached ones, or None; ``keys`` of the samples, with the
    names of their shards.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    visible: torch.Tensor
    masked: torch.Tensor
    features: FeatureBatch | None = None
    keys: list[str] = field(default_factory=list)

    @property
    def teacher_view(self) -> torch.Tensor:
        """What the teacher sees."""
        return self.student if self.teacher is None else self.teacher


@dataclass(frozen=True)
class CropTransform:
    """How samples are made: everything of the configuration that a sample depends on.

    Attributes:
        student_size, teacher_size: side in pixels of each one's view; None for no teacher's.
        grid: the student's patches along a side.
        predict_fraction: share of the masked patches that is predicted.
        cache: of the features that are read with a sample, and how they are brought to the grid
            (``pool``).
    """

    seed: int
    student_size: int
    teacher_size: int | None
    grid: int
    mask: MaskConfig
    crop_scale: tuple[float, float]
    hflip: bool
    predict_fraction: float = 1.0
    cache: Cache | None = None
    pool: str = "area"

    @property
    def fields(self) -> tuple[str, ...]:
        """What is read of a sample."""
        return (IMAGE,) if self.cache is None else (IMAGE, TEACHER)

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> tuple:
        """What :meth:`collate` takes, of one training sample.

        Raises:
            BadSample: the image cannot be used.
        """
        key = f"{sample.key}/replacement" if replacement else sample.key
        return self._make(sample, lambda size: self.draw(epoch, key, size))

    def decode_held_out(self, sample: RawSample) -> tuple:
        """The same of a held-out sample."""
        return self._make(sample, lambda size: self.draw_held_out(sample.key, size))

    def draw(self, epoch: int, key: str, size: tuple[int, int]) -> Draw:
        """Region, flip and mask of one training sample.

        Args:
            key: with the name of the shard, so that it is unique in the data set.
            size: width and height of the upright image in pixels.
        """
        rng = sample_rng(self.seed, epoch, key)
        # First: the mask does not depend on the image's size.
        visible, masked = draw_mask(self.mask, self.grid, rng)
        flip = bool(rng.random() < 0.5) and self.hflip
        box = random_region(*size, self.crop_scale, rng)
        # Last: crop and flip are the same whatever part is predicted.
        return Draw(box, flip, visible, keep_part(masked, self.predict_fraction, rng))

    def draw_held_out(self, key: str, size: tuple[int, int]) -> Draw:
        """What evaluation sees of a sample: its central square and one fixed mask."""
        mask = draw_mask(self.mask, self.grid, sample_rng(self.seed, -1, key))
        return Draw(centre_square(*size), False, *mask)

    def collate(self, items: list[tuple]) -> CropBatch:
        """A batch of what :meth:`decode` made."""
        keys, student, teacher, drawn, cached = zip(*items, strict=True)
        return CropBatch(
            student=stack_views(student),
            teacher=None if teacher[0] is None else stack_views(teacher),
            visible=torch.from_numpy(np.stack([one.visible for one in drawn])),
            masked=torch.from_numpy(np.stack([one.masked for one in drawn])),
            features=None if self.cache is None else FeatureBatch.of(cached, self.cache.grid),
            keys=list(keys),
        )

    def _make(self, sample: RawSample, draw: Callable[[tuple[int, int]], Draw]) -> tuple:
        """Key, student's view uint8 [H, H, 3], teacher's view uint8 [S, S, 3] or None, the draw,
        and the cached features with the crop's weights, or None."""
        image = open_image(sample.part(IMAGE))
        size, cached = image.upright, None
        drawn = draw(size)
        if self.cache is not None:
            stored = from_bytes(sample.part(TEACHER), self.cache, size)
            where = (drawn.box, drawn.flip, self.grid, self.pool)
            cached = (stored, *region_weights(self.cache, size, *where))
        sizes = [self.student_size]
        if self.teacher_size not in (None, self.student_size):
            sizes.append(self.teacher_size)
        cuts = cut(image, drawn.box, sizes, drawn.flip)
        return sample.key, cuts[0], cuts[1] if len(cuts) > 1 else None, drawn, cached


def random_region(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A random-resized crop as torchvision draws it: area in ``scale``, aspect in 3/4..4/3.

    Ten tries, then the largest central region within those aspects.

    Returns:
        left, top, right, bottom in whole pixels.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return (left, top, left + w, top + h)
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h)


def centre_square(width: int, height: int) -> Box:
    """The largest central square."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return (left, top, left + side, top + side)


def stack_views(views: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [H, W, 3] each, to uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack([view.transpose(2, 0, 1) for view in views]))
