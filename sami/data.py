"""Stage 1's samples: one region of a picture at the student's and the teacher's size, and a mask.

Region, flip and mask are drawn from (seed, epoch, sample key) and from nothing else.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sami.core.config import require
from sami.core.errors import BadSample, UserError
from sami.core.images import Box, cut, open_image, to_tensor, upright_size
from sami.core.shards import (
    Layout,
    RawSample,
    Shard,
    fill_slots,
    read_epoch,
    read_range,
    sample_rng,
)


@dataclass
class DataConfig:
    """Pictures of stage 1.

    Attributes:
        shards: one pattern of tar shards or several; braces and globs.
        val_shards: the same for the held-out measure; empty for none.
        workers: processes per rank that decode; 0 decodes in the training process.
        epoch_samples: samples of one epoch if it shall be shorter than the shards; null for all.
        max_bad_fraction: stop once more than this share of the samples (of at least 1,000) was bad.
        shuffle_mb: bound of each reader's shuffle buffer of encoded pictures, in MB.
        image_size: side of the student's picture in pixels.
        crop_scale: smallest and largest area of the random region, as a share of the picture.
        hflip: mirror one picture in two.
    """

    shards: str | list[str] = ""
    val_shards: str | list[str] = ""
    workers: int = 8
    epoch_samples: int | None = None
    max_bad_fraction: float = 0.1
    shuffle_mb: int = 128
    image_size: int = 224
    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: bool = True

    def check(self) -> None:
        low, high = self.crop_scale
        require(
            0 < low <= high <= 1,
            f"data.crop_scale {low}, {high} must rise within 0..1, such as [0.2, 1.0]",
        )
        require(
            self.image_size > 0, f"data.image_size {self.image_size} must be positive, such as 224"
        )
        require(self.workers >= 0, f"data.workers {self.workers} must be 0 or more")
        require(
            self.shuffle_mb > 0, f"data.shuffle_mb {self.shuffle_mb} must be positive, such as 128"
        )
        require(
            self.epoch_samples is None or self.epoch_samples > 0,
            f"data.epoch_samples {self.epoch_samples} must be positive, or null for all",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction {self.max_bad_fraction} must be within 0..1, such as 0.1",
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

    ``visible`` [V] and ``masked`` [M] are ascending patch numbers in raster order.
    """

    box: Box
    flip: bool
    visible: np.ndarray
    masked: np.ndarray


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


@dataclass
class Batch:
    """A micro-batch as it leaves the loader.

    ``student`` uint8 [B, 3, H, H]; ``teacher`` uint8 [B, 3, S, S], or None where the student's
    picture serves (the same size) or there is no teacher; ``visible`` [B, V] and ``masked``
    [B, M] patch numbers; ``bad`` the (reason, key) of samples that had to be replaced.
    """

    student: torch.Tensor
    teacher: torch.Tensor | None
    visible: torch.Tensor
    masked: torch.Tensor
    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """The tensors on a device, without waiting for the copy."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        teacher = None if self.teacher is None else move(self.teacher)
        return replace(
            self,
            student=move(self.student),
            teacher=teacher,
            visible=move(self.visible),
            masked=move(self.masked),
        )

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader; page-locked memory lets the copy to the device overlap."""
        teacher = None if self.teacher is None else self.teacher.pin_memory()
        return replace(
            self,
            student=self.student.pin_memory(),
            teacher=teacher,
            visible=self.visible.pin_memory(),
            masked=self.masked.pin_memory(),
        )

    @property
    def teacher_view(self) -> torch.Tensor:
        """What the teacher sees."""
        return self.student if self.teacher is None else self.teacher


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
    visible, masked = _mask(views, rng)  # first: the mask does not depend on the picture's size
    flip = bool(rng.random() < 0.5) and views.hflip
    return Draw(random_region(*size, views.crop_scale, rng), flip, visible, masked)


def draw_held_out(views: Views, key: str, size: tuple[int, int]) -> Draw:
    """What evaluation sees of a sample: its central square and one fixed mask."""
    visible, masked = _mask(views, sample_rng(views.seed, -1, key))
    return Draw(centre_square(*size), False, visible, masked)


def make_sample(
    views: Views, sample: RawSample, choose: Callable[[tuple[int, int]], Draw]
) -> tuple[torch.Tensor, torch.Tensor | None, Draw]:
    """Student's view uint8 [3, H, H], teacher's view uint8 [3, S, S] or None, and the draw.

    Raises:
        BadSample: the picture cannot be used.
    """
    if sample.data is None:
        raise BadSample(sample.reason)
    image = open_image(sample.data)
    drawn = choose(upright_size(image))
    sizes = [views.student_size]
    if views.teacher_size not in (None, views.student_size):
        sizes.append(views.teacher_size)
    cuts = [to_tensor(view) for view in cut(image, drawn.box, sizes, drawn.flip)]
    return cuts[0], cuts[1] if len(cuts) > 1 else None, drawn


class TrainStream(IterableDataset):
    """Micro-batches from a given number on, without end; iterated by the DataLoader's workers.

    What a worker hands out is a function of (layout, seed, rank, worker, number) alone. An error
    that the user can mend comes as a value: a worker's exception would lose its sentence.
    """

    def __init__(
        self, shards: list[Shard], views: Views, layout: Layout, rank: int, first: int, buffer: int
    ) -> None:
        """``first``: the rank's number of the first micro-batch; ``buffer``: bytes."""
        self.shards, self.views, self.layout = shards, views, layout
        self.rank, self.first, self.buffer = rank, first, buffer

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = get_worker_info()
        worker = (self.first + (0 if info is None else info.id)) % self.layout.workers
        bad: list[tuple[str, str]] = []
        stream = fill_slots(self._samples(worker), self._decode, lambda *what: bad.append(what))
        try:
            while True:
                items = [next(stream) for _ in range(self.layout.micro_batch_size)]
                yield collate(items, bad)
                bad.clear()
        except UserError as error:
            yield error

    def _samples(self, worker: int) -> Iterator[RawSample]:
        epoch = self.first // self.layout.micro_batches_per_epoch
        done = sum(1 for number in self.layout.numbers(epoch, worker) if number < self.first)
        while True:
            yield from read_epoch(
                self.shards,
                self.layout,
                seed=self.views.seed,
                epoch=epoch,
                rank=self.rank,
                worker=worker,
                skip=done * self.layout.micro_batch_size,
                buffer_bytes=self.buffer,
            )
            epoch, done = epoch + 1, 0

    def _decode(self, sample: RawSample, stand_in: bool) -> tuple:
        key = f"{sample.key}/stand-in" if stand_in else sample.key
        return (
            sample.key,
            *make_sample(
                self.views, sample, lambda size: draw(self.views, sample.epoch, key, size)
            ),
        )


class HeldOut(IterableDataset):
    """The held-out samples of one rank in fixed order; bad ones are reported and left out."""

    def __init__(
        self, shards: list[Shard], views: Views, positions: range, batch_size: int
    ) -> None:
        self.shards, self.views, self.positions, self.batch_size = (
            shards,
            views,
            positions,
            batch_size,
        )

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        number, of = (0, 1) if info is None else (info.id, info.num_workers)
        items, bad = [], []
        for sample in read_range(self.shards, deal(self.positions, number, of)):
            try:
                items.append((sample.key, *make_sample(self.views, sample, self._choose(sample))))
            except BadSample as error:
                bad.append((str(error), sample.key))
            if len(items) == self.batch_size:
                yield collate(items, bad)
                items, bad = [], []
        if items:
            yield collate(items, bad)

    def _choose(self, sample: RawSample) -> Callable[[tuple[int, int]], Draw]:
        return lambda size: draw_held_out(self.views, sample.key, size)


def deal(positions: range, number: int, of: int) -> range:
    """The ``number``-th of ``of`` contiguous parts, equal up to one."""
    return positions[len(positions) * number // of : len(positions) * (number + 1) // of]


def collate(items: list[tuple], bad: list[tuple[str, str]]) -> Batch:
    """A batch of what :func:`make_sample` made, each preceded by its key."""
    keys, student, teacher, drawn = zip(*items, strict=True)
    return Batch(
        student=torch.stack(student),
        teacher=None if teacher[0] is None else torch.stack(teacher),
        visible=torch.from_numpy(np.stack([one.visible for one in drawn])),
        masked=torch.from_numpy(np.stack([one.masked for one in drawn])),
        keys=list(keys),
        bad=list(bad),
    )


def make_loader(dataset: IterableDataset, workers: int, device: torch.device) -> DataLoader:
    """A loader over ready micro-batches. Never prepare it: Accelerate would read all on rank 0."""
    options: dict[str, Any] = {
        "batch_size": None,
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
    }
    return DataLoader(dataset, **options)


def _mask(views: Views, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A uniformly random subset of the patches, and its complement."""
    tokens = views.grid**2
    order = rng.permutation(tokens)
    keep = visible_count(tokens, views.mask_ratio)
    return np.sort(order[:keep]), np.sort(order[keep:])
