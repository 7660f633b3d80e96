"""Samples of decoupled distillation: whole images without prompts or masks, and cached features."""

from dataclasses import dataclass, field

import numpy as np
import torch

from finetune.data import MaskDataConfig
from sami.core.dataset import TensorBatch
from sami.core.images import frame_of, open_image, resize_whole
from sami.core.order import sample_rng
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE, TEACHER
from sami.features import Cache, FeatureBatch, from_bytes


@dataclass
class ImageBatch(TensorBatch):
    """Images without prompts, as they leave the loader.

    ``images`` uint8 [B, 3, H, H], padded on the right and below; ``frames`` [B, 2], height and
    width of each within it; ``features`` cached ones of a teacher, or None. ``left_out`` and
    ``unsure`` are of objects: empty.
    """

    images: torch.Tensor
    frames: torch.Tensor
    features: FeatureBatch | None = None
    keys: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    unsure: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class ImageTransform:
    """How samples are made of images alone: no annotation is read.

    Attributes:
        cache: of the features that are read with a sample; it has the teacher's own grid.
    """

    data: MaskDataConfig
    seed: int
    cache: Cache | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """What is read of a sample."""
        return (IMAGE,) if self.cache is None else (IMAGE, TEACHER)

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> tuple:
        """What :meth:`collate` takes, of one training sample: key, image, frame, features.

        Raises:
            BadSample: the image, or its features, cannot be used.
        """
        key = f"{sample.key}/replacement" if replacement else sample.key
        flip = bool(sample_rng(self.seed, epoch, key).random() < 0.5) and self.data.hflip
        return self._make(sample, flip)

    def decode_held_out(self, sample: RawSample) -> tuple:
        """The same of a held-out sample, never mirrored."""
        return self._make(sample, False)

    def collate(self, items: list[tuple]) -> ImageBatch:
        """A batch of what :meth:`decode` made."""
        keys, images, frames, cached = zip(*items, strict=True)
        return ImageBatch(
            torch.from_numpy(np.stack([one.transpose(2, 0, 1) for one in images])),
            torch.tensor(frames),
            None if self.cache is None else FeatureBatch.of(cached, self.cache.grid),
            list(keys),
        )

    def _make(self, sample: RawSample, flip: bool) -> tuple:
        encoded, side = open_image(sample.part(IMAGE)), self.data.image_size
        width, height = encoded.upright
        frame, cached = frame_of(side, self.data.resize, height, width), None
        if self.cache is not None:
            stored = from_bytes(sample.part(TEACHER), self.cache, (width, height))
            as_stored = np.eye(self.cache.grid, dtype=np.float32)
            cached = (stored, as_stored, as_stored)
        image = np.zeros((side, side, 3), np.uint8)
        whole = resize_whole(encoded, *frame)
        image[: frame[0], : frame[1]] = whole[:, ::-1] if flip else whole
        return sample.key, image, frame, cached
