"""A teacher's features of whole images, stored in the shards: the format, written and read.

``tools/cache_teacher.py`` writes ``<key>.teacher.npz`` beside each image: what the teacher makes
of the whole upright image, without the padding, as int8 with a scale per channel or as fp16.
Training reads it, and cuts each crop's target out of it (:func:`axis_weights`), on the device.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch.nn import functional as F

from sami.core.dataset import TensorBatch
from sami.core.errors import BadSample
from sami.core.images import Box, frame_of
from sami.teacher import Teacher

DTYPES = {"int8": np.int8, "fp16": np.float16}
UNREADABLE = (  # what zipfile and numpy raise on damaged bytes
    *(OSError, ValueError, KeyError, EOFError, TypeError, IndexError, AttributeError),
    *(RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Cache:
    """How features were made and are stored: the part of the manifest that a run depends on.

    Attributes:
        name, sha256, random, layer: the teacher's, as :func:`sami.teacher.describe_teacher` has
            them.
        image_size: the longest side in pixels of the image that it saw.
        patch_size: the teacher's, in pixels.
        channels: of the features.
        grid: cells of the stored map on the image's longest side.
        dtype: int8, with a scale per channel and image, or fp16.
        precision: that the teacher computed in, fp32 or bf16.
        resize: how the teacher wants a whole image, see :mod:`sami.encoders.protocol`.
    """

    name: str
    sha256: str
    random: bool
    layer: Literal["neck", "trunk"]
    image_size: int
    patch_size: int
    channels: int
    grid: int
    dtype: Literal["int8", "fp16"]
    precision: Literal["fp32", "bf16"] = "fp32"
    resize: Literal["longest", "square"] = "longest"

    @staticmethod
    def of(
        teacher: Teacher, info: Mapping[str, Any], grid: int, dtype: str, precision: str = "fp32"
    ) -> "Cache":
        """A teacher's; ``info``: what :func:`sami.teacher.describe_teacher` says of it."""
        own = {name: info[name] for name in ("name", "sha256", "random")}
        for name in ("layer", "image_size", "channels", "resize"):
            own[name] = getattr(teacher, name)
        stored = {"grid": grid, "dtype": dtype, "precision": precision}
        return Cache(**own, **stored, patch_size=teacher.stride)

    def header(self) -> dict[str, Any]:
        """As JSON has it; without ``resize`` where it is SAM's, as it always was."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("resize", "longest")}

    @property
    def pool(self) -> int:
        """How many of the teacher's tokens, along a side, a cell is the mean of."""
        return self.image_size // self.patch_size // self.grid

    def input_size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels that the teacher sees an image at."""
        return frame_of(self.image_size, self.resize, height, width)

    def extent(self, width: int, height: int) -> tuple[float, float]:
        """Rows and columns of cells that an image covers; the last ones perhaps in part."""
        rows, columns = self.input_size(width, height)
        cell = self.patch_size * self.pool
        return rows / cell, columns / cell

    def cells(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns that are stored of an image: those that it covers."""
        rows, columns = self.extent(width, height)
        return int(np.ceil(rows)), int(np.ceil(columns))

    def bytes_of(self, width: int, height: int) -> int:
        """What an image's values and scale take."""
        rows, columns = self.cells(width, height)
        return self.channels * (rows * columns * np.dtype(DTYPES[self.dtype]).itemsize + 4)


@dataclass(frozen=True)
class QuantizedFeatures:
    """An image's features: ``values`` [C, h, w] int8 or fp16, and ``scale`` fp32 [C]."""

    values: np.ndarray
    scale: np.ndarray

    def restored(self) -> np.ndarray:
        """fp32 [C, h, w]."""
        return self.values.astype(np.float32) * self.scale[:, None, None]


def quantise(features: torch.Tensor, cache: Cache, size: tuple[int, int]) -> list[torch.Tensor]:
    """What is stored of a teacher's output, on its device, without waiting for it.

    Args:
        features: [C, s, s], of the image padded to a square.
        size: width and height of the image itself in pixels.

    Returns:
        values [C, h, w], scale fp32 [C], and whether all is finite, and small enough for fp16.
    """
    rows, columns = (-(-side // cache.patch_size) for side in cache.input_size(*size))
    features = features[:, :rows, :columns].float()
    if cache.pool > 1:
        # A cell at the edge is the mean of the tokens that it has, without the padding's.
        features = F.avg_pool2d(features[None], cache.pool, ceil_mode=True)[0]
    if cache.dtype == "fp16":
        values = features.half()
        return [values, torch.ones_like(features[:, 0, 0]), values.isfinite().all()]
    scale = features.abs().amax((1, 2)).clamp(min=1e-12) / 127
    values = (features / scale[:, None, None]).round().to(torch.int8)
    return [values, scale, features.isfinite().all()]


def pack(quantised: Sequence[torch.Tensor]) -> QuantizedFeatures:
    """What :func:`quantise` gave, as it is stored.

    Raises:
        BadSample: the features are not finite, or too large for fp16.
    """
    values, scale, finite = (tensor.cpu() for tensor in quantised)
    if not finite:
        raise BadSample("features are not finite" + " in fp16" * (values.dtype == torch.float16))
    return QuantizedFeatures(values.numpy(), scale.numpy())


def to_bytes(stored: QuantizedFeatures) -> bytes:
    """As .npz, uncompressed: features do not shrink, and are read in every epoch."""
    buffer = io.BytesIO()
    np.savez(buffer, values=stored.values, scale=stored.scale)
    return buffer.getvalue()


def from_bytes(data: bytes, cache: Cache, size: tuple[int, int]) -> QuantizedFeatures:
    """The inverse of :func:`to_bytes`.

    Args:
        size: width and height of the upright image.

    Raises:
        BadSample: cut short, damaged, not finite, or of another shape than ``cache`` tells.
    """
    try:
        with np.load(io.BytesIO(data)) as file:  # pickles are refused
            stored = QuantizedFeatures(file["values"], file["scale"])
    except UNREADABLE as error:
        raise BadSample("damaged features") from error
    shape = (cache.channels, *cache.cells(*size))
    if (stored.values.dtype, stored.values.shape) != (DTYPES[cache.dtype], shape) or (
        (stored.scale.dtype, stored.scale.shape) != (np.float32, shape[:1])
    ):
        raise BadSample("features of another shape")
    finite = cache.dtype == "int8" or np.isfinite(stored.values).all()
    if not (finite and np.isfinite(stored.scale).all()):
        raise BadSample("features are not finite")
    return stored


def axis_weights(start: float, end: float, cells: int, out: int, pool: str) -> np.ndarray:
    """How much each cell of a line counts for each output cell of a region of it.

    Args:
        start, end: of the region, in cells; may lie between them.
        cells: how many there are.
        out: how many the region is brought to.
        pool: area, each cell by how much of it lies in the output cell; of the whole line, the mean
            of all cells that are touched, which is torch's adaptive average pooling. bilinear,
            antialiased, as torch resizes: a triangle two output cells wide, and linear
            interpolation where there are fewer cells than ``out``.

    Returns:
        fp32 [out, cells]; each row sums to 1.
    """
    step = (end - start) / out
    number = np.arange(cells)
    if pool == "area":
        edges = (start + step * np.arange(out + 1))[:, None]
        low, high = edges[:-1], edges[1:]
        if abs(start) < 1e-6 and abs(end - cells) < 1e-6:
            low, high = np.floor(low + 1e-6), np.ceil(high - 1e-6)
        weights = np.clip(np.minimum(high, number + 1) - np.maximum(low, number), 0, None)
    else:
        width = max(step, 1.0)
        centres = (start + step * (np.arange(out) + 0.5))[:, None]
        distance = np.abs(number + 0.5 - np.clip(centres, 0.5, cells - 0.5)) / width
        if step > 1:  # where the line ends the triangle is cut off, as torch does
            distance = np.abs(number + 0.5 - centres) / width
        weights = np.clip(1 - distance, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def region_weights(
    cache: Cache, size: tuple[int, int], box: Box, flip: bool, out: int, pool: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the stored rows and columns for a crop, each fp32 [out, grid], 0 where none is.

    Args:
        size: width and height of the upright image in pixels.
        box: the crop in its pixels: left, top, right, bottom.
        flip: mirror left and right.
    """
    left, top, right, bottom = box
    rows, columns = np.zeros((2, out, cache.grid), np.float32)
    extents, cells = cache.extent(*size), cache.cells(*size)
    for axis, weights, low, high in ((0, rows, top, bottom), (1, columns, left, right)):
        unit = extents[axis] / size[1 - axis]  # cells per pixel; size is width and height
        weights[:, : cells[axis]] = axis_weights(low * unit, high * unit, cells[axis], out, pool)
    return rows, columns[::-1].copy() if flip else columns


@dataclass
class FeatureBatch(TensorBatch):
    """Stored features of a batch and the crops that are wanted of them.

    ``values`` int8 or fp16 [B, C, s, s]; ``scale`` fp32 [B, C]; ``rows`` and ``columns`` fp32
    [B, g, s].
    """

    values: torch.Tensor
    scale: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @staticmethod
    def of(
        items: Sequence[tuple[QuantizedFeatures, np.ndarray, np.ndarray]], grid: int
    ) -> "FeatureBatch":
        """A batch of a stored map each, and of what :func:`region_weights` says."""
        stored, rows, columns = zip(*items, strict=True)
        first = stored[0].values
        values = np.zeros((len(stored), len(first), grid, grid), first.dtype)
        for place, one in zip(values, stored, strict=True):
            _, height, width = one.values.shape
            place[:, :height, :width] = one.values
        return FeatureBatch(
            torch.from_numpy(values),
            torch.from_numpy(np.stack([one.scale for one in stored])),
            torch.from_numpy(np.stack(rows)),
            torch.from_numpy(np.stack(columns)),
        )

    def tokens(self) -> torch.Tensor:
        """The crops' features, fp32 [B, g * g, C], in image order."""
        with torch.autocast(self.values.device.type, enabled=False):
            channels, side = self.values.shape[1:3]
            values = rearrange(self.values.float(), "b c y x -> b (c y) x") @ self.columns.mT
            narrow = rearrange(values, "b (c y) q -> b y (q c)", y=side)
            grid = rearrange(self.rows @ narrow, "b p (q c) -> b (p q) c", c=channels)
            # After the sampling, which is linear: far fewer numbers are scaled.
            return grid * self.scale[:, None]
