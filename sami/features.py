"""A teacher's features of whole pictures, stored in the shards: the format, and both its ends.

``tools/cache_teacher.py`` writes ``<key>.teacher.npz`` beside each picture: what the teacher makes
of the whole upright picture, without the padding, as int8 with a scale per channel or as fp16.
Training reads it, and cuts each crop's target out of it (:func:`axis_weights`), on the device.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from sami.core.config import require
from sami.core.errors import BadSample, UserError
from sami.core.images import Box

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = {"int8": np.int8, "fp16": np.float16}
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Cache:
    """How features were made and are stored: the part of the manifest that a run depends on.

    Attributes:
        teacher: its configured name; sha256 of its weights; layer; image_size, the longest side
            in pixels of the picture that it saw; patch_size in pixels; channels.
        grid: cells of the stored map on the picture's longest side.
        dtype: int8, with a scale per channel and picture, or fp16.
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

    @property
    def pool(self) -> int:
        """How many of the teacher's tokens, along a side, a cell is the mean of."""
        return self.image_size // self.patch_size // self.grid

    def frame(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in pixels that the teacher sees a picture at, as SAM resizes."""
        scale = self.image_size / max(width, height)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def extent(self, width: int, height: int) -> tuple[float, float]:
        """Rows and columns of cells that a picture covers; the last ones perhaps in part."""
        rows, columns = self.frame(width, height)
        cell = self.patch_size * self.pool
        return rows / cell, columns / cell

    def cells(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns that are stored of a picture: those that it covers."""
        rows, columns = self.extent(width, height)
        return int(np.ceil(rows)), int(np.ceil(columns))


@dataclass(frozen=True)
class Stored:
    """A picture's features: ``values`` [C, h, w] int8 or fp16, and ``scale`` fp32 [C]."""

    values: np.ndarray
    scale: np.ndarray


def pack(features: torch.Tensor, cache: Cache, size: tuple[int, int]) -> Stored:
    """What is stored of a teacher's output.

    Args:
        features: fp32 [C, s, s], of the picture padded to a square.
        size: width and height of the picture itself in pixels.

    Raises:
        BadSample: the features are not finite, or too large for fp16.
    """
    width, height = size
    token_rows, token_columns = (
        -(-side // cache.patch_size) for side in cache.frame(width, height)
    )
    features = features[:, :token_rows, :token_columns].float()
    if cache.pool > 1:
        # A cell at the edge is the mean of the tokens that it has, without the padding's.
        features = F.avg_pool2d(features[None], cache.pool, ceil_mode=True)[0]
    if not torch.isfinite(features).all():
        raise BadSample("features are not finite")
    channels = len(features)
    if cache.dtype == "fp16":
        if features.abs().max() > torch.finfo(torch.float16).max:
            raise BadSample("features are too large for fp16")
        return Stored(features.half().cpu().numpy(), np.ones(channels, np.float32))
    scale = features.abs().amax((1, 2)).clamp(min=1e-12) / 127
    values = (features / scale[:, None, None]).round().to(torch.int8)
    return Stored(values.cpu().numpy(), scale.cpu().numpy())


def to_bytes(stored: Stored) -> bytes:
    """As .npz, uncompressed: features do not shrink, and are read in every epoch."""
    buffer = io.BytesIO()
    np.savez(buffer, values=stored.values, scale=stored.scale)
    return buffer.getvalue()


def from_bytes(data: bytes, cache: Cache, size: tuple[int, int]) -> Stored:
    """The inverse of :func:`to_bytes`.

    Args:
        size: width and height of the upright picture.

    Raises:
        BadSample: cut short, damaged, not finite, or of another shape than ``cache`` tells.
    """
    try:
        with np.load(io.BytesIO(data)) as file:  # pickles are refused
            stored = Stored(file["values"], file["scale"])
    except UNREADABLE as error:
        raise BadSample("damaged features") from error
    shape = (cache.channels, *cache.cells(*size))
    if (stored.values.dtype, stored.values.shape) != (DTYPES[cache.dtype], shape):
        raise BadSample("features of another shape")
    if stored.scale.shape != shape[:1] or stored.scale.dtype != np.float32:
        raise BadSample("features of another shape")
    whole = cache.dtype == "int8" or np.isfinite(stored.values).all()
    if not (whole and np.isfinite(stored.scale).all()):
        raise BadSample("features are not finite")
    return stored


def axis_weights(start: float, end: float, cells: int, out: int, pool: str) -> np.ndarray:
    """How much each cell of a line counts for each output cell of a region of it.

    Args:
        start, end: of the region, in cells; may lie between them.
        cells: how many there are.
        out: how many the region is brought to.
        pool: area, the mean over all cells that are touched (adaptive average pooling, where the
            region is the whole line); bilinear, antialiased, as torch resizes: a triangle two
            output cells wide, and linear interpolation where there are fewer cells than ``out``.

    Returns:
        fp32 [out, cells]; each row sums to 1.
    """
    step = (end - start) / out
    if pool == "area":
        edges = start + step * np.arange(out + 1)
        first = np.clip(np.floor(edges[:-1] + 1e-6), 0, cells - 1)[:, None]
        last = np.clip(np.ceil(edges[1:] - 1e-6), first[:, 0] + 1, cells)[:, None]
        number = np.arange(cells)
        weights = ((number >= first) & (number < last)).astype(np.float64)
    else:
        width = max(step, 1.0)
        centres = (start + step * (np.arange(out) + 0.5))[:, None]
        distance = np.abs(np.arange(cells) + 0.5 - np.clip(centres, 0.5, cells - 0.5)) / width
        if step > 1:  # where the line ends the triangle is cut off, as torch does
            distance = np.abs(np.arange(cells) + 0.5 - centres) / width
        weights = np.clip(1 - distance, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def region_weights(
    cache: Cache, size: tuple[int, int], box: Box, flip: bool, out: int, pool: str
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the stored rows and columns for a crop, each fp32 [out, grid], 0 where none is.

    Args:
        size: width and height of the upright picture in pixels.
        box: the crop in its pixels: left, top, right, bottom.
        flip: mirror left and right.
    """
    result = []
    for low, high, side, extent, cells in zip(
        (box[1], box[0]),
        (box[3], box[2]),
        (size[1], size[0]),
        cache.extent(*size),
        cache.cells(*size),
        strict=True,
    ):
        unit = extent / side
        weights = np.zeros((out, cache.grid), np.float32)
        weights[:, :cells] = axis_weights(low * unit, high * unit, cells, out, pool)
        result.append(weights)
    rows, columns = result
    return rows, columns[::-1].copy() if flip else columns


@dataclass
class FeatureBatch:
    """Stored features of a batch and the crops that are wanted of them.

    ``values`` int8 or fp16 [B, C, s, s]; ``scale`` fp32 [B, C]; ``rows`` and ``columns`` fp32
    [B, g, s].
    """

    values: torch.Tensor
    scale: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @staticmethod
    def of(items: Sequence[tuple[Stored, np.ndarray, np.ndarray]], grid: int) -> "FeatureBatch":
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

    def map(self, change: Any) -> "FeatureBatch":
        """The same with ``change`` done to each tensor."""
        return FeatureBatch(*map(change, vars(self).values()))

    def tokens(self) -> torch.Tensor:
        """The crops' features, fp32 [B, g * g, C], in image order."""
        with torch.autocast(self.values.device.type, enabled=False):
            values = self.values.float()
            narrow = values @ self.columns.mT[:, None]  # [B, C, s, g]
            grid = self.rows[:, None] @ narrow  # [B, C, g, g]
            # After the sampling, which is linear: far fewer numbers are scaled.
            return (grid * self.scale[:, :, None, None]).flatten(2).mT


def read_manifest(folder: Path, what: str) -> dict[str, Any]:
    """The manifest beside cached shards.

    Args:
        what: the field that names them, for messages.

    Raises:
        UserError: none, unreadable, or the cache is still being written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        cache, shards = manifest["cache"], manifest["shards"]
        Cache(**cache)
        pending = [name for name, told in shards.items() if told is None]
        number = manifest["format"]
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: {what} holds no cached features; make them with "
            "tools/cache_teacher.py, or set teacher.cached false"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run tools/cache_teacher.py "
            "again, which keeps finished shards"
        ) from error
    require(number == FORMAT, f"{path} has format {number}, this code reads {FORMAT}")
    require(
        not pending,
        f"{folder} is still being written: {len(pending)} of {len(shards)} shards are missing, "
        f"such as {pending[0] if pending else ''}; let tools/cache_teacher.py end",
    )
    return manifest


def as_json(cache: Cache) -> dict[str, Any]:
    """For the manifest."""
    return asdict(cache)
