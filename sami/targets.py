"""What the student reconstructs: a teacher's features, computed or cached, or pixels.

A target is called with a batch on the device and gives what its tokens are to become. To add one,
write a :class:`Target`, and name what makes it from the student in TARGETS: then ``--target.kind
NAME`` trains on it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from sami.caching import open_cache
from sami.core.images import patchify
from sami.core.index import Shard
from sami.core.run import Run
from sami.core.starts import RANDOM
from sami.data import CropBatch
from sami.encoders.protocol import ImageEncoder
from sami.features import Cache
from sami.teacher import Teacher, TeacherConfig, checkpoint_sha256, describe_teacher, load_teacher


class Target:
    """What a run asks of its target.

    Attributes:
        channels: C of the targets.
        teacher_size: side in pixels of the view that has to be cut for a teacher; None for none.
        cache: of the features that have to be read with a sample; None for none.
        info: what the run's summary tells of the teacher; None without one.
    """

    channels: int
    teacher_size: int | None = None
    cache: Cache | None = None
    info: dict[str, Any] | None = None

    def __call__(self, batch: CropBatch) -> torch.Tensor:
        """A batch on the device to [B, N, C], in image order."""
        raise NotImplementedError


class LiveTeacher(Target):
    """The teacher computes the features of every view."""

    def __init__(
        self,
        teacher: Teacher,
        grid: int,
        pool: str,
        autocast: Callable[[], AbstractContextManager],
        info: dict[str, Any] | None = None,
    ) -> None:
        """``grid``: the student's; ``pool``: see :func:`to_grid`."""
        self.teacher, self.grid, self.pool, self.autocast = teacher, grid, pool, autocast
        self.channels, self.teacher_size, self.info = teacher.channels, teacher.image_size, info

    def __call__(self, batch: CropBatch) -> torch.Tensor:
        with self.autocast():
            maps = self.teacher(batch.teacher_view)
        return to_grid(maps, self.grid, self.pool)


class CachedTeacher(Target):
    """The features of whole images stand in the shards, and are cut out for each crop."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.channels = cache, cache.channels
        self.info = {**cache.header(), "cached": True}

    def __call__(self, batch: CropBatch) -> torch.Tensor:
        return batch.features.tokens()


class Pixels(Target):
    """MAE's target: each patch's own pixels."""

    def __init__(self, normalise: nn.Module, patch_size: int) -> None:
        self.normalise, self.patch_size = normalise, patch_size
        self.channels = 3 * patch_size**2

    def __call__(self, batch: CropBatch) -> torch.Tensor:
        return pixel_target(self.normalise(batch.student), self.patch_size)


# Targets that follow from the student and the image alone.
TARGETS: dict[str, Callable[[ImageEncoder], Target]] = {
    "pixels": lambda student: Pixels(student.normalise, student.stride),
}


@dataclass
class TargetConfig:
    """What is reconstructed.

    Attributes:
        kind: teacher, the features of ``teacher``; or one of TARGETS: pixels, MAE's per-patch
            normalised pixels.
    """

    kind: Literal[("teacher", *TARGETS)] = "teacher"


def open_targets(
    config: TargetConfig,
    teacher: TeacherConfig,
    student: ImageEncoder,
    run: Run,
    shards: list[Shard],
    file: str | None,
    sha256: str | None,
    checksums: bool,
) -> Target:
    """The target of a configuration. Collective.

    Args:
        shards: all that are read, those that are held out too.
        file: of the teacher's weights, and ``sha256``, as far as they are here.
        checksums: read the shards of a cache for them, if that has not been done.

    Raises:
        UserError: the teacher or the cache cannot be used.
    """
    if config.kind in TARGETS:
        return TARGETS[config.kind](student)
    if teacher.cached:
        if run.is_main and teacher.checkpoint == RANDOM:
            sha256 = checkpoint_sha256(teacher)
        part = (run.rank, run.processes) if checksums else None
        cache = open_cache(shards, teacher, sha256, run.dir / "index", run.say, part)
        run.gather(None)  # all have looked at their part
        return CachedTeacher(cache)
    loaded = load_teacher(replace(teacher, checkpoint=file or ""))
    info = describe_teacher(teacher, loaded, sha256) if run.is_main else None
    grid = student.image_size // student.stride
    return LiveTeacher(loaded.to(run.device), grid, teacher.pool, run.accelerator.autocast, info)


def to_grid(features: torch.Tensor, grid: int, pool: str) -> torch.Tensor:
    """Features [B, C, h, w] brought to the student's grid, as tokens [B, grid * grid, C].

    Args:
        pool: area, adaptive average pooling; bilinear, antialiased.
    """
    if features.shape[2:] != (grid, grid):
        options = {"mode": "area"} if pool == "area" else {"mode": "bilinear", "antialias": True}
        features = F.interpolate(features.float(), (grid, grid), **options)
    return rearrange(features, "b c h w -> b (h w) c")


def pixel_target(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """MAE's target: each patch's pixels at zero mean and unit variance.

    Args:
        images: normalised [B, 3, H, H].

    Returns:
        [B, N, 3 * p * p].
    """
    patches = patchify(images, patch_size)
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
