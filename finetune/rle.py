"""SA-1B's JSON, and everything asked of its COCO run lengths without painting a mask.

A mask is ``ends``: int64 [R], where its R alternating runs end, background first, in pixels
counted down the columns (COCO's order), so that the last one is height * width. A run may be
empty. The pixel ``column * height + row`` belongs to the object if the number of ends at or
below it is odd. ``height`` and ``width`` are those of the mask, in pixels.

There is no mirrored mask: ask :func:`sample` for ``width - 1 - columns`` and turn a point's ``x``
into ``width - 1 - x``; a box becomes ``(width - x1, y0, width - x0, y1)``.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sami.core.errors import BadSample
from sami.core.images import DRAWN, MAX_PIXELS, Drawn

FOREIGN = "annotation is not SA-1B's"
MISFIT = "run lengths do not fit their size"
# Digits of 5 bits in one number of the compressed string: 6 hold any run of MAX_PIXELS, and 12
# (leading zeros are legal) still fit into an int64.
MAX_DIGITS = 12


@dataclass
class EncodedMask:
    counts: str | list[Any]  # as in the file; for decode_counts
    area: float | None  # pixels, as the file says it; COCO's polygons have fractions
    bbox: list[float] | None  # x, y, width, height in pixels, as the file says it
    predicted_iou: float
    stability_score: float


@dataclass
class Annotations:
    height: int  # of the image, in pixels; every mask has the same
    width: int
    masks: list[EncodedMask]
    left_out: Counter[str] = field(default_factory=Counter)  # annotations that are no such mask
    drawn_on: Drawn | None = None  # the image that the masks lie on, if the file says it

    def decoded(
        self, masks: list[EncodedMask], rng: np.random.Generator, left_out: Counter[str]
    ) -> Iterator[np.ndarray]:
        """The run ends of some of its masks in random order; of broken ones the reason is counted.

        Args:
            left_out: is added to.
        """
        for number in rng.permutation(len(masks)):
            try:
                yield decode_counts(masks[number].counts, self.height, self.width)
            except BadSample as error:
                left_out[str(error)] += 1


def parse_annotations(data: bytes) -> Annotations:
    """The JSON of one SA-1B image, its types and sizes checked, its masks not decoded.

    ``area`` and ``bbox`` may be missing or null, as from COCO exports (None); ``predicted_iou`` and
    ``stability_score`` may be missing (1.0), and null is no score. ``image`` may have ``drawn_on``,
    upright or stored, see :func:`sami.core.images.drawn_on`. Other keys are ignored. One annotation
    that cannot be used is left out and counted.

    Raises:
        BadSample: not JSON, not of this form, or none of its annotations is.
    """
    try:
        content = read_json(data)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError
        raise BadSample("annotation is not JSON") from error
    image = _get(content, "image", dict)
    height, width = _get(image, "height", int), _get(image, "width", int)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise BadSample(FOREIGN)
    found = Annotations(height, width, [], drawn_on=image.get("drawn_on"))
    if found.drawn_on not in (*DRAWN, None):
        raise BadSample(FOREIGN)
    for entry in _get(content, "annotations", list):
        try:
            found.masks.append(_mask(entry, height, width))
        except BadSample as error:
            found.left_out[str(error)] += 1
    if found.left_out and not found.masks:
        raise BadSample(most_frequent(found.left_out))
    return found


def most_frequent(left_out: Counter[str]) -> str:
    """The reason of an image without a usable mask: the one that most of its objects have."""
    return left_out.most_common(1)[0][0] if left_out else "no usable mask"


def decode_counts(counts: str | bytes | list[Any], height: int, width: int) -> np.ndarray:
    """Where the runs of a mask end: int64 [R] in pixels, the last is height * width.

    Args:
        counts: COCO's compressed string, or the list of run lengths; at most MAX_PIXELS in all.

    Raises:
        BadSample: no run lengths, or not those of height * width pixels.
    """
    total = height * width
    if isinstance(counts, list):
        if not all(type(run) is int and 0 <= run <= total for run in counts):
            raise BadSample(MISFIT)
        runs = np.array(counts, dtype=np.int64)
    else:
        runs = _numbers(counts)
        # maskApi.c, rleFrString: from the fourth on, the difference to the run two before.
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        # No number comes near 2^63, so the first bad run is seen here before any sum wraps around.
        if runs.min() < 0 or runs.max() > total:
            raise BadSample(MISFIT)
    ends = np.cumsum(runs)
    if len(ends) == 0 or ends[-1] != total:
        raise BadSample(MISFIT)
    return ends


def sample(
    ends: np.ndarray, height: int, width: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """The mask at the crossings of pixel rows and columns.

    Args:
        rows: integers [h'] in 0..height-1, in any order.
        columns: integers [w'] in 0..width-1, in any order.

    Returns:
        bool [h', w'], in memory column by column.

    Raises:
        IndexError: a row or column outside of the mask.
    """
    if len(rows) == 0 or len(columns) == 0:
        return np.zeros((len(rows), len(columns)), bool)
    if (rows[1:] <= rows[:-1]).any() or (columns[1:] <= columns[:-1]).any():
        # Only here: sorting is half of the time where there is nothing to sort.
        rows, row_places = np.unique(rows, return_inverse=True)
        columns, column_places = np.unique(columns, return_inverse=True)
        grid = sample(ends, height, width, rows, columns)
        return grid.T[column_places][:, row_places].T
    if rows[0] < 0 or columns[0] < 0 or rows[-1] >= height or columns[-1] >= width:
        raise IndexError(f"rows or columns outside of a mask of {height} x {width} pixels")
    # The runs are looked up in the grid, not the grid in the runs: there are far fewer of them.
    pixels = (columns[:, None] * height + rows).ravel()
    lengths = np.diff(np.searchsorted(pixels, ends), prepend=0)
    inside = np.repeat(np.arange(len(ends)) % 2 == 1, lengths)
    return inside.reshape(len(columns), len(rows)).T


def area(ends: np.ndarray) -> int:
    """The number of pixels of the object."""
    starts, stops = _objects(ends)
    return int((stops - starts).sum())


def box(ends: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """The tight box in pixels: x0, y0, x1, y1, the last two exclusive. All 0 for an empty mask."""
    starts, stops = _objects(ends)
    if len(starts) == 0:
        return (0, 0, 0, 0)
    left, top = np.divmod(starts, height)
    right, bottom = np.divmod(stops - 1, height)
    if (left != right).any():  # a run over the foot of a column goes on at the head of the next
        top, bottom = np.array([0]), np.array([height - 1])
    return (int(left[0]), int(top.min()), int(right[-1]) + 1, int(bottom.max()) + 1)


def random_points(
    ends: np.ndarray, height: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Pixels of the object, each equally likely, drawn with replacement.

    Args:
        rng: advanced by one draw of ``count`` integers.

    Returns:
        int64 [count, 2]: x, y, the indices of the pixels (their centres are half a pixel on).

    Raises:
        BadSample: the mask is empty.
    """
    starts, stops = _objects(ends)
    if len(starts) == 0:
        raise BadSample("mask is empty")
    upto = np.cumsum(stops - starts)
    drawn = rng.integers(upto[-1], size=count)
    run = np.searchsorted(upto, drawn, side="right")
    x, y = np.divmod(stops[run] - (upto[run] - drawn), height)
    return np.stack([x, y], axis=1)


def read_json(data: bytes) -> Any:
    """What JSON's bytes tell; an integer with more digits than Python reads becomes infinity."""
    try:
        return json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except ValueError:  # the second reading calls back for every integer
        return json.loads(data, parse_int=lambda text: int(text) if len(text) < 400 else math.inf)


def _mask(entry: Any, height: int, width: int) -> EncodedMask:
    segmentation = _get(entry, "segmentation", dict)
    size = _get(segmentation, "size", list)
    if len(size) != 2 or not all(type(side) is int for side in size):
        raise BadSample(FOREIGN)
    if size != [height, width]:
        raise BadSample("mask size differs from the image's")
    counts = _get(segmentation, "counts", str | list)
    area, bbox = entry.get("area"), entry.get("bbox")
    if bbox is not None and len(_get(entry, "bbox", list)) != 4:
        raise BadSample(FOREIGN)
    return EncodedMask(
        counts=counts,
        area=None if area is None else _number(area),
        bbox=None if bbox is None else [_number(value) for value in bbox],
        predicted_iou=_number(entry.get("predicted_iou", 1.0)),
        stability_score=_number(entry.get("stability_score", 1.0)),
    )


def _get(entry: Any, key: str, kind: Any) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadSample(FOREIGN)
    return value


def _number(value: Any) -> float:
    """Refuses NaN, infinity and integers that no float holds along with what is not a number."""
    if type(value) not in (int, float) or not abs(value) < 1e18:
        raise BadSample(FOREIGN)
    return float(value)


def _numbers(text: str | bytes) -> np.ndarray:
    """The signed numbers of COCO's string (maskApi.c, rleToString), int64 below 2^60, at least one.

    A character is 48 plus six bits: five of the number, the lowest first, and 32 for "goes on".
    The last one's bit 16 is the sign.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise BadSample(MISFIT) from error
    digits = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if len(digits) == 0 or digits.min() < 0 or digits.max() > 63 or digits[-1] >= 32:
        raise BadSample(MISFIT)
    last = np.flatnonzero(digits < 32)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MAX_DIGITS:
        raise BadSample(MISFIT)
    shifts = 5 * (np.arange(len(digits)) - np.repeat(first, lengths))
    numbers = np.add.reduceat((digits & 31) << shifts, first)
    return numbers - ((digits[last] >> 4) << (5 * lengths))


def _objects(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last pixel of each run of the object that is not empty."""
    stops = ends[1::2]
    starts = ends[0::2][: len(stops)]
    some = stops > starts
    return starts[some], stops[some]
