"""Stage 1's samples: one region of a picture at the student's and the teacher's size, and a mask.

Region, flip and mask are drawn from (seed, epoch, sample key) and from nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sami.core.config import require
from sami.core.dataset import ShardsConfig
from sami.core.images import Box, cut, open_image
from sami.core.order import sample_rng
from sami.core.reading import RawSample
from sami.core.scanning import PICTURE, TEACHER
from sami.features import Cache, FeatureBatch, from_bytes, region_weights
from sami.grids import IMAGE_SIZE


@dataclass
class DataConfig(ShardsConfig):
    """Pictures of stage 1.

    Attributes:
        image_size: side of the student's picture in pixels.
        crop_scale: smallest and largest area of the random region, as a share of the picture.
        hflip: mirror one picture in two.
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


@dataclass
class MaskConfig:
    """What the student does not see.

    Attributes:
        ratio: share of the patches that is masked; 0 is plain distillation, without a decoder.
    """

    ratio: float = 0.75

    def check(self) -> None:
        require(
            0 <= self.ratio < 1,
            f"mask.ratio {self.ratio} must be at least 0 and under 1, such as 0.75",
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
class Batch:
    """A micro-batch as it leaves the loader.

    ``student`` uint8 [B, 3, H, H]; ``teacher`` uint8 [B, 3, S, S], or None where the student's
    picture serves (the same size) or there is no teacher; ``visible`` [B, V] and ``masked``
    [B, M] patch numbers; ``features`` cached ones, or None; ``keys`` of the samples, with the
    names of their shards.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    visible: torch.Tensor
    masked: torch.Tensor
    features: FeatureBatch | None = None
    keys: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """The tensors on a device, without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In page-locked memory, which lets the copy to the device overlap."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            student=change(self.student),
            teacher=None if self.teacher is None else change(self.teacher),
            visible=change(self.visible),
            masked=change(self.masked),
            features=None if self.features is None else self.features.map(change),
        )

    @property
    def teacher_view(self) -> torch.Tensor:
        """What the teacher sees."""
        return self.student if self.teacher is None else self.teacher


@dataclass(frozen=True)
class Views:
    """How samples are made: everything of the configuration that a sample depends on."""

    seed: int
    student_size: int
    teacher_size: int | None
    grid: int
    mask_ratio: float
    crop_scale: tuple[float, float]
    hflip: bool
    predict_fraction: float = 1.0
    cache: Cache | None = None
    pool: str = "area"  # of cached features

    @property
    def fields(self) -> tuple[str, ...]:
        """What is read of a sample."""
        return (PICTURE,) if self.cache is None else (PICTURE, TEACHER)

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> tuple:
        """What :func:`collate` takes, of one training sample."""
        key = f"{sample.key}/replacement" if replacement else sample.key
        return make_sample(self, sample, lambda size: draw(self, epoch, key, size))

    def decode_held_out(self, sample: RawSample) -> tuple:
        """The same of a held-out sample."""
        return make_sample(self, sample, lambda size: draw_held_out(self, sample.key, size))

    def collate(self, items: list[tuple]) -> Batch:
        return collate(items, self)


def visible_count(tokens: int, ratio: float) -> int:
    """Patches that stay visible: MAE's rule, rounded down (49 of 196 at 75 %)."""
    return int(round(tokens * (1 - ratio), 6))


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


def draw(views: Views, epoch: int, key: str, size: tuple[int, int]) -> Draw:
    """Region, flip and mask of one training sample.

    Args:
        key: with the name of the shard, so that it is unique in the data set.
        size: width and height of the upright picture in pixels.
    """
    rng = sample_rng(views.seed, epoch, key)
    # First: the mask does not depend on the picture's size.
    visible, masked = _mask(views, rng, views.predict_fraction)
    flip = bool(rng.random() < 0.5) and views.hflip
    return Draw(random_region(*size, views.crop_scale, rng), flip, visible, masked)


def draw_held_out(views: Views, key: str, size: tuple[int, int]) -> Draw:
    """What evaluation sees of a sample: its central square and one fixed mask."""
    visible, masked = _mask(views, sample_rng(views.seed, -1, key))
    return Draw(centre_square(*size), False, visible, masked)


def make_sample(
    views: Views, sample: RawSample, choose: Callable[[tuple[int, int]], Draw]
) -> tuple:
    """Key, student's view uint8 [H, H, 3], teacher's view uint8 [S, S, 3] or None, the draw, and
    the cached features with the crop's weights, or None.

    Raises:
        BadSample: the picture cannot be used.
    """
    picture = open_image(sample.part(PICTURE))
    size, cached = picture.upright, None
    drawn = choose(size)
    if views.cache is not None:
        stored = from_bytes(sample.part(TEACHER), views.cache, size)
        where = (drawn.box, drawn.flip, views.grid, views.pool)
        cached = (stored, *region_weights(views.cache, size, *where))
    sizes = [views.student_size]
    if views.teacher_size not in (None, views.student_size):
        sizes.append(views.teacher_size)
    cuts = cut(picture, drawn.box, sizes, drawn.flip)
    return sample.key, cuts[0], cuts[1] if len(cuts) > 1 else None, drawn, cached


def collate(items: list[tuple], views: Views) -> Batch:
    """A batch of what :func:`make_sample` made."""
    keys, student, teacher, drawn, cached = zip(*items, strict=True)
    return Batch(
        student=_stack(student),
        teacher=None if teacher[0] is None else _stack(teacher),
        visible=torch.from_numpy(np.stack([one.visible for one in drawn])),
        masked=torch.from_numpy(np.stack([one.masked for one in drawn])),
        features=None if views.cache is None else FeatureBatch.of(cached, views.cache.grid),
        keys=list(keys),
    )


def _stack(views: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [H, W, 3] each, to uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack([view.transpose(2, 0, 1) for view in views]))


def _mask(
    views: Views, rng: np.random.Generator, fraction: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A uniformly random subset of the patches, and a share of the others, rounded."""
    tokens = views.grid**2
    order = rng.permutation(tokens)
    keep = visible_count(tokens, views.mask_ratio)
    predicted = max(1, round((tokens - keep) * fraction))
    return np.sort(order[:keep]), np.sort(order[keep : keep + predicted])
