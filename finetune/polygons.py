"""A mask as one polygon, holes and separate parts included.

Label files of YOLO have one ring of points for an object. Holes and further parts are joined to it
by bridges: the ring goes to their nearest point, around them and back the same way, so that what is
filled by the even-odd rule, as OpenCV and Pillow fill, is the mask again.
"""

from collections import Counter

import numpy as np
from contourpy import FillType, contour_generator

CUT_OUT, FILLED = "holes cut out", "small holes filled"
CORNERS = 0.5  # pixels that an outline is smaller by than its pixels: it cuts off their corners
JOINED, DROPPED = "further parts joined", "small parts left out"


def outline(
    mask: np.ndarray, tolerance: float, min_area: int = 0
) -> tuple[np.ndarray, Counter[str]]:
    """The ring of points around a mask.

    Args:
        mask: bool [H, W], with at least one pixel.
        tolerance: pixels that the outline may move by, for the sake of fewer points.
        min_area: holes and further parts of fewer pixels are filled or left out.

    Returns:
        Points fp64 [P, 2], x and y in pixels from the mask's corner, pixel 0 reaching from 0 to 1;
        and how many holes and parts there were, by what was done with them.
    """
    done: Counter[str] = Counter()
    padded = np.pad(mask, 1).astype(np.float64)  # a float32 would be copied
    generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    # Half-way between an inner and an outer pixel's centre is the edge of both.
    parts = [
        [points[start : end - 1] - 0.5 for start, end in zip(at[:-1], at[1:], strict=True)]
        for points, at in zip(*generator.filled(0.5, 2.0), strict=True)
    ]
    parts.sort(key=lambda rings: ring_area(rings[0]), reverse=True)
    ring: np.ndarray | None = None
    for outer, *holes in parts:
        if ring is not None and ring_area(outer) + CORNERS < min_area:
            done[DROPPED] += 1
            continue
        done[JOINED] += ring is not None
        part = simplify(outer, tolerance)
        for hole in holes:
            large = ring_area(hole) + CORNERS >= min_area
            done[CUT_OUT if large else FILLED] += 1
            part = bridge(part, simplify(hole, tolerance)) if large else part
        ring = part if ring is None else bridge(ring, part)
    return ring, +done


def bridge(ring: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One ring of two, joined there and back between their nearest points.

    Args:
        ring: [P, 2].
        other: [Q, 2].

    Returns:
        [P + Q + 2, 2].
    """
    distance = np.square(ring[:, None] - other[None]).sum(2)  # [P, Q]
    at, to = np.unravel_index(distance.argmin(), distance.shape)
    around = np.concatenate([other[to:], other[: to + 1]])
    return np.concatenate([ring[: at + 1], around, ring[at:]])


def simplify(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A ring without the points that the others tell within ``tolerance`` (Douglas and Peucker).

    Args:
        ring: [P, 2] with at least 3 points, the first not repeated at the end.

    Returns:
        [Q, 2] with at least 3 of these points, in their order.
    """
    count = len(ring)
    far = int(np.square(ring - ring[0]).sum(1).argmax())
    closed = np.concatenate([ring, ring[:1]])
    kept = np.zeros(count + 1, bool)
    kept[[0, far, count]] = True
    open_spans = [(0, far), (far, count)]
    while open_spans:
        first, last = open_spans.pop()
        if last - first < 2:
            continue
        inner, along = closed[first + 1 : last] - closed[first], closed[last] - closed[first]
        share = (inner @ along / max(along @ along, 1e-12)).clip(0, 1)  # to the segment's ends
        away = np.hypot(*(inner - share[:, None] * along).T)
        most = int(away.argmax())
        if away[most] > tolerance:
            middle = first + 1 + most
            kept[middle] = True
            open_spans += [(first, middle), (middle, last)]
    found = closed[:-1][kept[:-1]]
    return found if len(found) > 2 else ring


def ring_area(ring: np.ndarray) -> float:
    """The area within a ring [P, 2] that does not cross itself."""
    x, y = (ring - ring[0]).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
