"""Masks at the size of an image, from the mask decoder's logits, without an array of that size.

Resizing mixes each pixel of at most 4 x 4 samples of the mask decoder's output. A block of pixels
with the same samples is a *cell*. Of most cells their samples allow no pixel but inside, or none
but outside; only where the logits may cross a threshold, along the outline, are pixels computed.
So the result is that of resizing everything, but for rounding.
"""

import zlib
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch.nn import functional as F

CELLS = 8192  # computed at once, of some 50 pixels each
NOISY = 0.25  # of the cells are open: from here on computing all pixels takes less time
ROWS = 64  # computed at once then
SLACK = 1e-5  # of the range of a cell's samples, for rounding


@dataclass
class FullMask:
    """A mask that covers a part of an image.

    Attributes:
        inside: bool [w', h'], column by column, of the rectangle that may hold the object.
        left, top: where that lies, in pixels.
        stability: IoU of the masks at the thresholds above and below; NaN if both are empty.
    """

    inside: np.ndarray
    left: int
    top: int
    stability: float

    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 in pixels, the last two inclusive; all 0 for an empty mask."""
        columns, rows = (np.flatnonzero(self.inside.any(axis)) for axis in (1, 0))
        if len(columns) == 0:
            return (0, 0, 0, 0)
        left, right, top, bottom = (int(line[end]) for line in (columns, rows) for end in (0, -1))
        return (self.left + left, self.top + top, self.left + right, self.top + bottom)

    def packed(self) -> "PackedMask":
        """The same in some kB; a noisy mask, whose run lengths would be larger than itself, too."""
        bits = zlib.compress(np.packbits(self.inside), 1)
        return PackedMask(bits, self.inside.shape, self.left, self.top)


@dataclass
class PackedMask:
    """A :class:`FullMask` that waits.

    Attributes:
        bits: of its rectangle, compressed.
        shape: width and height of that.
        left, top: where it lies, in pixels.
    """

    bits: bytes
    shape: tuple[int, int]
    left: int
    top: int

    def ends(self, x: int, y: int, height: int, width: int) -> np.ndarray:
        """Where its runs end, as :mod:`finetune.rle` has it, in an image of height x width pixels.

        Args:
            x, y: where the crop that it is a mask of lies in the image, in pixels.
        """
        bits = np.frombuffer(zlib.decompress(self.bits), np.uint8)
        count = self.shape[0] * self.shape[1]
        inside = np.unpackbits(bits, count=count).view(bool).reshape(self.shape)
        return run_ends(inside, self.left + x, self.top + y, height, width)


def run_ends(inside: np.ndarray, left: int, top: int, height: int, width: int) -> np.ndarray:
    """Run ends, int64 [R], of a mask that is empty but for a rectangle.

    Args:
        inside: bool [w', h'] of the rectangle, column by column.
        left, top: where it lies in the mask of height x width pixels.
    """
    total = height * width
    edges = np.empty((inside.shape[0], inside.shape[1] + 1), bool)
    edges[:, [0, -1]] = inside[:, [0, -1]]
    np.not_equal(inside[:, 1:], inside[:, :-1], out=edges[:, 1:-1])
    columns, rows = edges.nonzero()
    ends = (columns + left) * height + rows + top
    if len(ends) > 2:  # a run over the foot of a column goes on at the head of the next
        apart = ends[1:-1:2] != ends[2::2]
        ends = ends[np.concatenate([[True], np.repeat(apart, 2), [True]])]
    return ends if len(ends) and ends[-1] == total else np.append(ends, total)


class Axis:
    """One side of an image: groups of neighbouring pixels that are mixed of the same samples.

    Attributes:
        matrix: weights of all samples in each pixel, [S, n].
        taps: samples in a window.
        starts: first sample of each group's window, [G].
        first: first pixel of each group, and one past the last one, [G + 1].
        pixels: of each group, [G, R]; a short group repeats its last one.
        there: which of them are no repetition, [G, R].
        weights: of the window's samples in each pixel, [G, R, taps].
        above, below: largest sum of a pixel's positive, and of its negative, weights.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        size, samples = matrix.shape
        used = matrix != 0
        begin = used.float().argmax(1)  # the first of equal ones
        end = samples - used.flip(1).float().argmax(1)
        self.taps = int((end - begin).max())
        most = -(-size // samples)
        first, start = [], samples
        for pixel, (low, high) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
            # A border's window is that of more pixels; such a group would pad all others.
            if low < start or high > start + self.taps or pixel - first[-1] == most:
                first.append(pixel)
                start = low
        self.first = torch.tensor([*first, size])
        sizes = self.first.diff()
        self.starts = begin[self.first[:-1]].clamp(max=samples - self.taps)
        place = torch.arange(int(sizes.max()))
        self.pixels = self.first[:-1, None] + place.minimum(sizes[:, None] - 1)
        self.there = place < sizes[:, None]
        window = (self.starts[:, None] + torch.arange(self.taps))[:, None]  # [G, 1, taps]
        self.weights = matrix[self.pixels].gather(2, window.expand(*self.pixels.shape, -1))
        self.above = float(matrix.clamp(min=0).sum(1).max())
        self.below = float(-matrix.clamp(max=0).sum(1).min())


class Enlarger:
    """Resizes logits as a model's ``postprocess_masks`` does, for one size of image."""

    def __init__(
        self, samples: int, size: tuple[int, int], frame: tuple[int, int] | None, full: int
    ) -> None:
        """
        Args:
            samples: side of the mask decoder's output.
            size: height and width of the image in pixels.
            frame: that of the image within the model's input, the rest of which is padding; None
                where images fill the input whatever their aspect.
            full: side of the model's input in pixels.
        """
        self.rows, self.columns = (
            Axis(_matrix(samples, side, None if frame is None else frame[axis], full))
            for axis, side in enumerate(size)
        )
        # Samples that reach into the image.
        self.there = [samples if frame is None else -(-frame[a] * samples // full) for a in (0, 1)]
        rows, columns = self.rows, self.columns
        self.overshoot = rows.above * columns.below + rows.below * columns.above + SLACK

    def without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [..., n, n] those of the image."""
        height, width = self.there
        return logits[..., :height, :width]

    def paint(
        self, logits: torch.Tensor, threshold: float, offset: float, least: float
    ) -> FullMask | None:
        """The mask of logits [n, n] above a threshold; None if it is less stable than ``least``.

        Args:
            offset: of the two thresholds that stability compares.
            least: stability that is asked for; 0 or less takes any.
        """
        rows, columns = self.rows, self.columns
        low, high = threshold - offset, threshold + offset
        below, above = min(low, high), max(low, high)
        minimum, maximum = self._bounds(logits)
        sure = minimum > above
        open_cells = (maximum > below) & ~sure
        r, c = open_cells.nonzero(as_tuple=True)
        if open_cells.float().mean() > NOISY:
            counts, inside = self._all_pixels(logits, threshold, low, high)
            stability = float((counts[0] / counts[1]).float())
            stays = least <= 0 or stability >= least
            return FullMask(inside, 0, 0, stability) if stays else None
        r, c = open_cells.nonzero(as_tuple=True)
        counts = torch.outer(rows.first.diff(), columns.first.diff())[sure].sum().repeat(2)
        windows = logits.unfold(0, rows.taps, 1).unfold(1, columns.taps, 1)
        inside = []
        for a, b in zip(r.split(CELLS), c.split(CELLS), strict=True):
            found = windows[rows.starts[a], columns.starts[b]]
            found = rows.weights[a] @ found @ columns.weights[b].mT  # [N, R, C]
            there = rows.there[a][:, :, None] & columns.there[b][:, None]
            counts += torch.stack([((found > at) & there).sum() for at in (high, low)])
            inside.append((found > threshold).mT)
        stability = float((counts[0] / counts[1]).float())
        if least > 0 and not stability >= least:
            return None
        some = sure | open_cells
        if not some.any():
            return FullMask(np.zeros((1, 1), bool), 0, 0, stability)
        (top, bottom), (left, right) = (
            (int(line[0]), int(line[-1]) + 1)
            for line in (some.any(axis).nonzero().squeeze(1) for axis in (1, 0))
        )
        painted = sure[top:bottom, left:right].T.numpy()
        painted = painted.repeat(rows.first.diff()[top:bottom].numpy(), 1)
        painted = painted.repeat(columns.first.diff()[left:right].numpy(), 0)
        left, top = int(columns.first[left]), int(rows.first[top])
        at = (columns.pixels[c] - left)[:, :, None], (rows.pixels[r] - top)[:, None]
        torch.from_numpy(painted)[at] = torch.cat(inside)
        return FullMask(painted, left, top, stability)

    def _all_pixels(
        self, logits: torch.Tensor, threshold: float, low: float, high: float
    ) -> tuple[torch.Tensor, np.ndarray]:
        """How many pixels are above the high and the low threshold; and the mask, [W, H]."""
        rows, columns = self.rows.matrix, self.columns.matrix
        counts = torch.zeros(2, dtype=torch.long)
        inside = np.empty((len(columns), len(rows)), bool)
        for start in range(0, len(rows), ROWS):
            found = rows[start : start + ROWS] @ logits @ columns.T
            counts += torch.stack([(found > at).sum() for at in (high, low)])
            inside[:, start : start + ROWS] = (found > threshold).T.numpy()
        return counts, inside

    def _bounds(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Between what each cell's pixels must lie: two [Gr, Gc]."""
        ends = []
        for pick in (torch.minimum, torch.maximum):
            found = logits
            for axis, line in enumerate((self.rows, self.columns)):
                length = logits.shape[axis] - line.taps + 1
                shifted = [found.narrow(axis, shift, length) for shift in range(line.taps)]
                found = reduce(pick, shifted).index_select(axis, line.starts)
            ends.append(found)
        least, most = ends
        over = self.overshoot * (most - least)
        return least - over, most + over


def _matrix(samples: int, size: int, frame: int | None, full: int) -> torch.Tensor:
    """Weights of samples in pixels of one side, [size, samples]: the resizing itself, of ones."""

    def resized(matrix: torch.Tensor, to: int, mode: str) -> torch.Tensor:
        found = F.interpolate(matrix[None, None], (to, samples), mode=mode, align_corners=False)
        return found[0, 0]

    one = torch.eye(samples)
    if frame is None:
        return resized(one, size, "bicubic")
    return resized(resized(one, full, "bilinear")[:frame], size, "bilinear")
