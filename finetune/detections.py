"""A detector's boxes, in COCO's results format: read, checked, and cut to their images.

A list of ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``, as
detectors write them (EfficientViT-SAM gives out ViTDet's of COCO and LVIS as
source_json_file/*.json).
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.average_precision import Truth
from finetune.coco import as_id
from finetune.folders import read_file
from finetune.rle import read_json
from sami.core.config import require
from sami.core.errors import UserError

KEYS = ("image_id", "category_id", "bbox", "score")
FORMAT = f"COCO's results are a list of objects with {', '.join(KEYS)}"


@dataclass
class Detections:
    """Boxes by the name of their image.

    Attributes:
        found: as they stand in the file, without other keys.
        boxes: where they lie in their image, fp64 [K, 4], x0, y0, x1, y1 in pixels, cut off at its
            border.
        clipped: how many reach over the border.
        outside: how many have no pixel in their image; their mask is empty, and they count against
            AP like any other that finds nothing.
    """

    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    boxes: dict[str, np.ndarray] = field(default_factory=dict)
    clipped: int = 0
    outside: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))


def read_detections(path: Path, truth: Truth, others: set[str] = frozenset()) -> Detections:
    """Read a file of boxes.

    Args:
        others: ids of images that the annotations have and that are not used.

    Raises:
        UserError: not such a file, no boxes, or boxes of unknown images or categories.
    """
    data = read_file(path, "--boxes", "name a JSON file")
    try:
        content = read_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--boxes {path} is not JSON ({error}); export it again") from error
    require(isinstance(content, list), f"--boxes {path} is no list; {FORMAT}")
    require(bool(content), f"--boxes {path} is empty: no box, no mask; run the detector again")
    for number, one in enumerate(content, 1):
        wrong = _wrong(one)
        require(wrong is None, f"--boxes {path}: box {number} {wrong}; {FORMAT}")
    for key, known in (
        ("image_id", truth.names.keys() | others),
        ("category_id", truth.categories.keys()),
    ):
        unknown = [one[key] for one in content if as_id(one[key]) not in known]
        require(
            not unknown,
            f"--boxes {path}: {len(unknown)} of {len(content)} boxes have an unknown {key}, "
            f"such as {(unknown or [None])[0]!r}; name the annotations that they belong "
            "to",
        )
    corners = np.array([one["bbox"] for one in content], float)
    corners[:, 2:] += corners[:, :2]
    largest = max(max(image["height"], image["width"]) for image in truth.images.values())
    require(
        largest <= 2 or corners.max() > 1.1,
        f"--boxes {path}: all boxes lie in 0..1, and COCO's are in pixels; multiply x by the "
        "image's width and y by its height",
    )
    return _by_image(content, corners, truth)


def _by_image(content: list[dict[str, Any]], corners: np.ndarray, truth: Truth) -> Detections:
    """Boxes of the truth's images, cut off at their borders."""
    numbers, detections = defaultdict(list), Detections()
    for number, one in enumerate(content):
        numbers[truth.names.get(as_id(one["image_id"]))].append(number)
    for name, image in truth.images.items():
        own = corners[numbers[name]].reshape(-1, 4)
        cut = own.clip(0, np.tile([image["width"], image["height"]], 2))
        empty = (cut[:, 2:] <= cut[:, :2]).any(1)
        detections.outside += int(empty.sum())
        detections.clipped += int(((cut != own).any(1) & ~empty).sum())
        detections.boxes[name] = cut
        detections.found[name] = [{key: content[n][key] for key in KEYS} for n in numbers[name]]
    return detections


def _wrong(one: Any) -> str | None:
    """What is wrong with a box, in words; None if nothing is."""
    if not isinstance(one, dict):
        return "is no object"
    lacking = next((key for key in KEYS if key not in one), None)
    if lacking is not None:
        return f"has no {lacking}"
    bbox = one["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        return "has a bbox that is not x, y, width, height"
    for key, value in [("score", one["score"]), *(("bbox", value) for value in bbox)]:
        if type(value) not in (int, float) or not abs(value) < 1e18:
            return f"has the {key} {value!r}, which is no finite number"
    if bbox[2] < 0 or bbox[3] < 0:
        return f"has a negative width or height, {bbox}"
    return None
