"""COCO-format annotations into SA-1B's JSON.

COCO, LVIS and what labelling tools export: ``images`` with id, file_name, width, height, and
``annotations`` with image_id and a segmentation: polygons, or run lengths as a list or a string.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from finetune.rle import area, box, decode_counts
from sami.core.errors import BadSample, UserError, raise_if_machine
from sami.core.shards import PICTURE, RawSample


def read_coco(path: Path) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each picture's entry and annotations, by the name of its file.

    Raises:
        UserError: not such a file.
    """
    try:
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise_if_machine(error, path)
        raise UserError(
            f"--coco {path} cannot be read ({error.strerror}); name a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--coco {path} is not JSON ({error}); export it again") from error
    try:
        by_image = defaultdict(list)
        for annotation in told["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        for image in told["images"]:
            if not all(
                type(image[side]) is int and image[side] > 0 for side in ("height", "width")
            ):
                raise ValueError(f"image {image['id']} has no size")
        return {_file_of(image): (image, by_image[image["id"]]) for image in told["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--coco {path} is not in COCO's format ({type(error).__name__}: {error}); it needs "
            "images (id, file_name, width, height) and annotations (image_id, segmentation)"
        ) from error


def _file_of(image: dict[str, Any]) -> str:
    """The picture's path below its folder; LVIS tells it by the address alone."""
    if "file_name" not in image and "coco_url" in image:
        return "/".join(image["coco_url"].split("/")[-2:])  # such as val2017/000000000139.jpg
    return str(image["file_name"])


@dataclass(frozen=True)
class CocoSource:
    """Pictures in a folder with their annotations, as samples of SA-1B's layout."""

    folder: Path
    entries: list[tuple[str, dict[str, Any], list[dict[str, Any]]]]

    @staticmethod
    def of(
        told: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]],
        file: Path,
        folder: Path,
        most: int | None = None,
    ) -> "CocoSource":
        """Of what :func:`read_coco` found, the pictures with annotations that are there.

        Args:
            file: for the message.
            most: at most so many, in the order of their names.

        Raises:
            UserError: none of them is in the folder.
        """
        entries, missing = [], 0
        annotated = sorted(name for name, (_, annotations) in told.items() if annotations)
        for name in annotated:
            found = [n for n in (name, Path(name).name) if (folder / n).is_file()]
            missing += not found
            if found:
                entries.append((found[0], *told[name]))
        first = next(iter(annotated), "none")
        if not entries:
            raise UserError(
                f"{folder} holds none of the annotated pictures of {file} (the first is {first}); "
                "name the folder that their file_name is relative to"
            )
        if missing:
            print(f"{missing} of {len(annotated)} annotated pictures are not in {folder}")
        return CocoSource(folder, entries[:most])

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int, of: int) -> Iterator[RawSample]:
        """Every ``of``-th, from ``number`` on."""
        for name, image, annotations in self.entries[number::of]:
            told, _ = to_sa1b(image, annotations, name)
            try:
                picture = (self.folder / name).read_bytes()
            except OSError as error:
                raise_if_machine(error, self.folder / name)
                yield RawSample(name, reason=f"unreadable ({error.strerror})")
                continue
            yield RawSample(name, {PICTURE: picture, "json": json.dumps(told).encode()})


def to_sa1b(
    image: dict[str, Any], annotations: list[dict[str, Any]], name: str
) -> tuple[dict[str, Any], Counter[str]]:
    """One picture's annotations in SA-1B's layout, and how many were left out, by reason.

    Area, box and the point (in the middle of the longest run) are those of the mask itself;
    predicted_iou and stability_score are 1.0, for these masks are taken to be right.

    Args:
        image: COCO's entry of the picture.
        annotations: of this picture.
        name: of the picture in its shard.
    """
    height, width = image["height"], image["width"]
    kept, left_out = [], Counter()
    for number, annotation in enumerate(annotations):
        try:
            counts, ends = _run_lengths(annotation, height, width)
        except BadSample as error:
            left_out[str(error)] += 1
            continue
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
    return {"image": about, "annotations": kept}, left_out


def _run_lengths(annotation: dict[str, Any], height: int, width: int) -> tuple[str, np.ndarray]:
    """The mask as COCO's string, and where its runs end.

    Raises:
        BadSample: not usable, with the reason.
    """
    if annotation.get("iscrowd"):
        raise BadSample("crowd")
    told = annotation.get("segmentation")
    if isinstance(told, dict):
        if told.get("size") != [height, width]:
            raise BadSample("mask size differs from the picture's")
        counts = told.get("counts")
        if not isinstance(counts, (str, list)):
            raise BadSample("no segmentation")
        ends = decode_counts(counts, height, width)  # the library would trust it and may crash
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects(told, height, width)["counts"].decode()
    elif isinstance(told, list) and told:
        for polygon in told:
            _check_polygon(polygon, height, width)
        merged = coco_mask.merge(coco_mask.frPyObjects(told, height, width))
        counts = merged["counts"].decode()
        ends = decode_counts(counts, height, width)
    else:
        raise BadSample("no segmentation")
    if area(ends) == 0:
        raise BadSample("empty mask")
    return counts, ends


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """The library draws without asking: no odd lengths, nothing far outside of the picture."""
    whole = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    if not whole or not all(type(v) in (int, float) and math.isfinite(v) for v in polygon):
        raise BadSample("malformed polygon")
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    far = max(np.abs(x - width / 2).max() / width, np.abs(y - height / 2).max() / height)
    if far > 1.5:
        raise BadSample("polygon far outside of the picture")
