"""One image's COCO annotations into SA-1B's JSON: polygons, or run lengths as a list or a string.

pycocotools draws the polygons. It trusts what it is given, and may crash: so each is looked at
before.
"""

from collections import Counter
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from finetune.rle import area, box, decode_counts
from sami.core.errors import BadSample

NORMALISED = "polygon in 0..1, not in pixels"
DEGENERATE = "part of an object, a polygon of fewer than 3 points"  # the object itself is kept
MAX_COORDINATE = 1e12  # pixels; JSON's numbers may have any number of digits


def to_sa1b(
    image: dict[str, Any], annotations: list[Any], name: str, keep_crowd: bool = False
) -> tuple[dict[str, Any], Counter[str]]:
    """One image's annotations in SA-1B's layout, and how many were left out, by reason.

    Area, box and the point (in the middle of the longest run) are those of the mask itself;
    predicted_iou and stability_score are 1.0, for these masks are taken to be right.

    Args:
        image: its image entry.
        name: of the image in its shard.
        keep_crowd: keep groups of objects that were marked as one (iscrowd).
    """
    height, width = image["height"], image["width"]
    kept, left_out = [], Counter()
    for number, annotation in enumerate(annotations):
        try:
            counts, ends, degenerate = run_lengths(annotation, height, width, keep_crowd)
        except BadSample as error:
            left_out[str(error)] += 1
            continue
        left_out[DEGENERATE] += degenerate
        left, top, right, bottom = box(ends, height)
        starts, stops = ends[0:-1:2], ends[1::2]
        longest = int(np.argmax(stops - starts[: len(stops)]))
        x, y = divmod(int(starts[longest] + stops[longest] - 1) // 2, height)
        kept.append(
            {
                "id": annotation.get("id", number),
                "segmentation": {"size": [height, width], "counts": counts},
                "bbox": [left, top, right - left, bottom - top],
                "area": area(ends),
                "predicted_iou": 1.0,
                "stability_score": 1.0,
                "point_coords": [[x, y]],
                "crop_box": [0, 0, width, height],
            }
        )
    about = {"image_id": image["id"], "width": width, "height": height, "file_name": name}
    return {"image": about, "annotations": kept}, +left_out  # without zeros


def why_none(left_out: Counter[str]) -> str:
    """The reason of an image without a usable mask: the one most of its objects have."""
    return f"no usable mask ({max(left_out, key=left_out.get, default='no annotation')})"


def run_lengths(
    annotation: Any, height: int, width: int, keep_crowd: bool
) -> tuple[str, np.ndarray, int]:
    """The mask as COCO's string, where its runs end, and how many of its polygons are none.

    Raises:
        BadSample: not usable, with the reason.
    """
    if not isinstance(annotation, dict):
        raise BadSample("not an annotation")
    if is_crowd(annotation) and not keep_crowd:
        raise BadSample("crowd")
    segmentation, degenerate = annotation.get("segmentation"), 0
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise BadSample("mask size differs from the image's")
        counts = segmentation.get("counts")
        if not isinstance(counts, (str, list)):
            raise BadSample("no segmentation")
        ends = decode_counts(counts, height, width)  # the library would trust it and may crash
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects(segmentation, height, width)["counts"].decode()
        if area(ends) == 0:
            raise BadSample("empty mask")
    elif isinstance(segmentation, list) and segmentation:
        drawn = with_area(segmentation)
        degenerate = len(segmentation) - len(drawn)
        for polygon in drawn or segmentation:
            _check_polygon(polygon, height, width)
        if max(height, width) > 2 and is_normalised(drawn):
            raise BadSample(NORMALISED)
        merged = coco_mask.merge(coco_mask.frPyObjects(drawn, height, width))
        counts = merged["counts"].decode()
        ends = decode_counts(counts, height, width)
        if area(ends) == 0:
            raise BadSample(_why_empty(drawn, height, width))
    else:
        raise BadSample("no segmentation" + ", a box only" * bool(annotation.get("bbox")))
    return counts, ends, degenerate


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is a group of objects that were marked as one."""
    return annotation.get("iscrowd") not in (None, 0, "", "0")


def with_area(polygons: list[Any]) -> list[Any]:
    """The polygons of an object without those of fewer than 3 points.

    pycocotools takes such a one for a box if it comes first, and draws nothing of it elsewhere.
    """
    return [one for one in polygons if not (isinstance(one, list) and len(one) < 6)]


def _why_empty(polygons: list[list[float]], height: int, width: int) -> str:
    """Why polygons that were drawn cover no pixel."""
    outside = all(
        min(p[0::2]) >= width or max(p[0::2]) <= 0 or min(p[1::2]) >= height or max(p[1::2]) <= 0
        for p in polygons
    )
    return "polygon outside of the image" if outside else "flat polygon, without a pixel"


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """The library draws without asking: no odd lengths, nothing far outside of the image."""
    whole = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    if not whole or not all(type(v) in (int, float) and abs(v) < MAX_COORDINATE for v in polygon):
        raise BadSample("malformed polygon")
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    far = max(np.abs(x - width / 2).max() / width, np.abs(y - height / 2).max() / height)
    if far > 1.5:
        raise BadSample("polygon far outside of the image")


def is_normalised(polygons: list[Any]) -> bool:
    """Whether all coordinates lie in 0..1, up to a little."""
    return bool(polygons) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and all(type(value) in (int, float) and -0.1 <= value <= 1.1 for value in polygon)
        for polygon in polygons
    )


def encode_masks(columns: np.ndarray) -> list[dict[str, Any]]:
    """Masks in COCO's run lengths (``size``, ``counts``), from bool [K, W, H]: column by column."""
    if len(columns) == 0:
        return []
    return as_text(coco_mask.encode(np.ascontiguousarray(columns, np.uint8).T))


def as_text(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What pycocotools encodes, as JSON has it."""
    return [{"size": list(one["size"]), "counts": one["counts"].decode()} for one in runs]
