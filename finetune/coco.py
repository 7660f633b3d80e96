"""COCO-format annotations into SA-1B's JSON.

COCO, LVIS and what labelling tools export: ``images`` with id, file_name, width, height, and
``annotations`` with image_id and a segmentation: polygons, or run lengths as a list or a string.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from finetune.folders import count_words, find_files, plain_path
from finetune.rle import area, box, decode_counts, read_json
from sami.core.errors import BadSample, UserError, raise_if_machine
from sami.core.shards import PICTURE, RawSample

NORMALISED = "polygon in 0..1, not in pixels"
MAX_COORDINATE = 1e12  # pixels; JSON's numbers may have any number of digits
DEGENERATE = "part of an object, a polygon of fewer than 3 points"  # the object itself is kept
LEFT_OUT = "left out"  # a part of a sample: how many annotations were, by reason, as JSON
OTHER_SIZES = "image entries of one file differ in size"


@dataclass(frozen=True)
class Entry:
    """A picture: COCO's image entries of its file (several where a tool writes one an object)."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]

    @property
    def image(self) -> dict[str, Any]:
        """The first image entry.

        Raises:
            BadSample: they do not agree on the picture's size.
        """
        if len({(image["width"], image["height"]) for image in self.images}) > 1:
            raise BadSample(OTHER_SIZES)
        return self.images[0]


@dataclass
class Coco:
    """What a file of annotations tells.

    ``entries`` by the name of the picture's file, as :func:`plain_name` writes it; ``left_out``
    counts image entries and annotations that belong to nothing, by reason.
    """

    file: Path
    entries: dict[str, Entry]
    left_out: Counter[str] = field(default_factory=Counter)

    def annotated(self) -> dict[str, Entry]:
        """The pictures with annotations, in the order of their names."""
        return {name: one for name, one in sorted(self.entries.items()) if one.annotations}


def read_coco(path: Path) -> Coco:
    """Read a file of annotations.

    Raises:
        UserError: not such a file; one image id for two pictures; polygons that are not in pixels.
    """
    try:
        told = read_json(path.read_bytes())
    except OSError as error:
        raise_if_machine(error, path)
        raise UserError(
            f"--coco {path} cannot be read ({error.strerror}); name a JSON file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--coco {path} is not JSON ({error}); export it again") from error
    try:
        images, annotations = told["images"], told["annotations"]
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise TypeError("images and annotations have to be lists")
        left_out: Counter[str] = Counter()
        by_id = _images_of(path, images, left_out)
        by_image = _by_image(annotations, by_id, left_out)
        _count_unknown_categories(told.get("categories"), annotations, left_out)
    except UserError:  # is a ValueError, and has its own words
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--coco {path} is not in COCO's format ({type(error).__name__}: {error}); it needs "
            "images (id, file_name, width, height) and annotations (image_id, segmentation)"
        ) from error
    _refuse_normalised(path, annotations)
    entries: dict[str, Entry] = {}
    for identity, found in by_id.items():
        entry = entries.setdefault(plain_name(found[0]), Entry([], []))
        entry.images.extend(found)
        entry.annotations.extend(by_image.get(identity, []))
    return Coco(path, entries, left_out)


def _images_of(
    path: Path, images: list[Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """The image entries by id; of equal ones one.

    Raises:
        UserError: one id for two pictures.
        ValueError: none of them is usable; the first's reason.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    reasons: Counter[str] = Counter()
    for image in images:
        try:
            image, identity = _checked_image(image), _identity(image["id"])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            reasons[f"image entry: {reason}".replace("'", "")] += 1
            continue
        known = by_id.setdefault(identity, [])
        if known and plain_name(known[0]) != plain_name(image):
            raise UserError(
                f"--coco {path}: image id {identity} is that of two pictures, "
                f"{plain_name(known[0])} and {plain_name(image)}; give each its own id (files that "
                "were joined often number their images from 0 on each)"
            )
        if image not in known:
            known.append(image)
    if reasons and not by_id:
        raise ValueError(next(iter(reasons)))
    left_out.update(reasons)
    return by_id


def _checked_image(image: Any) -> dict[str, Any]:
    """An image entry, its sides whole numbers.

    Raises:
        KeyError, TypeError, ValueError: it is not usable.
    """
    if not isinstance(image, dict):
        raise TypeError("not an object")
    sides = {side: _whole(image.get(side)) for side in ("height", "width")}
    if not all(sides.values()):
        raise ValueError("no size")
    if not plain_name(image):
        raise ValueError("no file_name")
    return image | sides


def _by_image(
    annotations: list[Any], by_id: dict[str, Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """Annotations by the id of their image; those of unknown ones are counted.

    Raises:
        KeyError: none has an image_id.
    """
    by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    without = 0
    for annotation in annotations:
        try:
            identity = _identity(annotation["image_id"])
        except (KeyError, TypeError):
            without += 1
            continue
        if identity in by_id:
            by_image[identity].append(annotation)
        else:
            left_out["annotation of an unknown image_id"] += 1
    if without and without == len(annotations):
        raise KeyError("image_id")
    left_out.update({"annotation without an image_id": without} if without else {})
    return by_image


def _count_unknown_categories(categories: Any, annotations: list, left_out: Counter[str]) -> None:
    """Their masks are used all the same: nothing here depends on the category."""
    if not isinstance(categories, list) or not categories:
        return
    known = {_text(one.get("id")) for one in categories if isinstance(one, dict)}
    for annotation in annotations:
        told = annotation.get("category_id") if isinstance(annotation, dict) else None
        if told is not None and _text(told) not in known:
            left_out["annotation of an unknown category_id (its mask is used)"] += 1


def _refuse_normalised(path: Path, annotations: list[Any]) -> None:
    """
    Raises:
        UserError: most polygons are in 0..1.
    """
    polygons = normalised = 0
    for annotation in annotations:
        told = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if isinstance(told, list) and told:
            polygons += 1
            normalised += _is_normalised(_with_area(told))
    if 2 * normalised > polygons:
        raise UserError(
            f"--coco {path}: {normalised} of {polygons} polygons are in 0..1, as YOLO's labels and "
            "FiftyOne's polylines are, and COCO's are in pixels; multiply x by the picture's width "
            "and y by its height, or export in COCO's format"
        )


def _is_normalised(polygons: list[Any]) -> bool:
    """Whether all coordinates lie in 0..1, up to a little."""
    return bool(polygons) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and all(type(value) in (int, float) and -0.1 <= value <= 1.1 for value in polygon)
        for polygon in polygons
    )


def _identity(told: Any) -> str:
    """An id as text: 12, 12.0 and "12" are the same.

    Raises:
        TypeError: neither a number nor text.
    """
    if isinstance(told, str):
        return told.strip()
    if isinstance(told, bool) or not isinstance(told, (int, float)):
        raise TypeError(f"the id {told!r} is neither a number nor text")
    return str(int(told)) if isinstance(told, int) or told.is_integer() else repr(told)


def _text(told: Any) -> str:
    """An id as text, whatever it is."""
    try:
        return _identity(told)
    except TypeError:
        return repr(told)


def _whole(told: Any) -> int | None:
    """A positive whole number; None if it is none."""
    if isinstance(told, str) and re.fullmatch(r"\d{1,9}", told.strip()):
        told = int(told)
    if isinstance(told, float) and told.is_integer():
        told = int(told)
    return told if type(told) is int and told > 0 else None


def plain_name(image: dict[str, Any]) -> str:
    """The picture's path with forward slashes, in Unicode's composed form; "" if it has none.

    LVIS tells it by the address alone: the last two parts of ``coco_url``.
    """
    told = image.get("file_name")
    if told is None and isinstance(image.get("coco_url"), str):
        told = "/".join(image["coco_url"].split("/")[-2:])  # such as val2017/000000000139.jpg
    if not isinstance(told, (str, int)) or not str(told).strip():
        return ""
    return plain_path(str(told))


@dataclass(frozen=True)
class CocoSource:
    """Pictures in a folder with their annotations, as samples of SA-1B's layout.

    ``entries`` are (path below the folder, entry); ``counts`` tell of all pictures of the file.
    """

    folder: Path
    entries: list[tuple[str, Entry]]
    keep_crowd: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        told: Coco, folder: Path, most: int | None = None, keep_crowd: bool = False
    ) -> "CocoSource":
        """Of what :func:`read_coco` found, the pictures with annotations that are there.

        Args:
            most: at most so many, in the order of their names.

        Raises:
            UserError: there are none, or none is in the folder; or see :func:`find_files`.
        """
        annotated = told.annotated()
        if not annotated:
            reasons = f" ({count_words(told.left_out)})" if told.left_out else ""
            raise UserError(
                f"--coco {told.file}: none of its {len(told.entries)} pictures has an annotation"
                f"{reasons}; name a file whose annotations have the image_id of its images"
            )
        bare = [name for name in told.entries if name not in annotated]
        found = find_files(list(annotated), folder, bare)
        entries = [
            (found.files[name], one) for name, one in annotated.items() if name in found.files
        ]
        if not entries:
            raise UserError(
                f"{folder} holds none of the annotated pictures of {told.file} (the first is "
                f"{next(iter(annotated))}); name the folder that their file_name is relative to"
            )
        counts = {
            "pictures": len(told.entries),
            "found": len(entries) + found.counted,
            "annotated": len(annotated),
            "annotated_and_found": len(entries),
        }
        remarks = [f"{count} x {reason}" for reason, count in told.left_out.items()]
        if found.moved:
            remarks.append(
                f"{len(found.moved)} pictures were found in another folder than their file_name "
                f"says, such as {found.moved[0]}"
            )
        return CocoSource(folder, entries[:most], keep_crowd, counts, remarks)

    def summary(self, used: int, left_out: Counter[str], others: str) -> list[str]:
        """What became of the file's pictures, as lines to be printed.

        Args:
            used: with masks.
            left_out: of those that were found, by reason.
            others: what is to be said of what is left.
        """
        counts = self.counts
        rest = counts["annotated_and_found"] - used - left_out.total()
        line = (
            f"{counts['pictures']} pictures in the JSON: {counts['found']} found in {self.folder}, "
            f"{used} used with their masks, {counts['pictures'] - counts['annotated']} without "
            f"annotations, {left_out.total()} left out"
        )
        line += f" {dict(left_out)}" if left_out else ""
        line += f", {rest} {others}" if rest else ""
        lacking = counts["annotated"] - counts["annotated_and_found"]
        line += f"; {lacking} of those with annotations are not there" if lacking else ""
        return [line, *(f"in the JSON: {remark}" for remark in self.remarks)]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, numbers: Sequence[int]) -> Iterator[RawSample]:
        """Some of them by number."""
        for name, entry in (self.entries[number] for number in numbers):
            try:
                told, left_out = to_sa1b(entry, name, self.keep_crowd)
                if not told["annotations"]:
                    raise BadSample(why_none(left_out))
                picture = (self.folder / name).read_bytes()
            except BadSample as error:
                yield RawSample(name, reason=str(error))
            except OSError as error:
                raise_if_machine(error, self.folder / name)
                yield RawSample(name, reason=f"unreadable ({error.strerror})")
            else:
                parts = {PICTURE: picture, "json": json.dumps(told).encode()}
                if left_out:
                    parts[LEFT_OUT] = json.dumps(left_out).encode()
                yield RawSample(name, parts)


def to_sa1b(
    entry: Entry, name: str, keep_crowd: bool = False
) -> tuple[dict[str, Any], Counter[str]]:
    """One picture's annotations in SA-1B's layout, and how many were left out, by reason.

    Area, box and the point (in the middle of the longest run) are those of the mask itself;
    predicted_iou and stability_score are 1.0, for these masks are taken to be right.

    Args:
        name: of the picture in its shard.
        keep_crowd: keep groups of objects that were marked as one (iscrowd).

    Raises:
        BadSample: the picture's size is not known.
    """
    image = entry.image
    height, width = image["height"], image["width"]
    kept, left_out = [], Counter()
    for number, annotation in enumerate(entry.annotations):
        try:
            counts, ends, degenerate = _run_lengths(annotation, height, width, keep_crowd)
        except BadSample as error:
            left_out[str(error)] += 1
            continue
        left_out.update({DEGENERATE: degenerate} if degenerate else {})
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


def why_none(left_out: Counter[str]) -> str:
    """The reason of a picture without a usable mask: its most frequent one."""
    (first, _), *_ = left_out.most_common(1) or [("no annotation", 0)]
    return f"no usable mask ({first})"


def _run_lengths(
    annotation: Any, height: int, width: int, keep_crowd: bool
) -> tuple[str, np.ndarray, int]:
    """The mask as COCO's string, where its runs end, and how many of its polygons are none.

    Raises:
        BadSample: not usable, with the reason.
    """
    if not isinstance(annotation, dict):
        raise BadSample("not an annotation")
    if annotation.get("iscrowd") not in (None, 0, "", "0") and not keep_crowd:
        raise BadSample("crowd")
    told, degenerate = annotation.get("segmentation"), 0
    if isinstance(told, dict):
        if told.get("size") != [height, width]:
            raise BadSample("mask size differs from the picture's")
        counts = told.get("counts")
        if not isinstance(counts, (str, list)):
            raise BadSample("no segmentation")
        ends = decode_counts(counts, height, width)  # the library would trust it and may crash
        if isinstance(counts, list):
            counts = coco_mask.frPyObjects(told, height, width)["counts"].decode()
        if area(ends) == 0:
            raise BadSample("empty mask")
    elif isinstance(told, list) and told:
        drawn = _with_area(told)
        degenerate = len(told) - len(drawn)
        for polygon in drawn or told:
            _check_polygon(polygon, height, width)
        if max(height, width) > 2 and _is_normalised(drawn):
            raise BadSample(NORMALISED)
        merged = coco_mask.merge(coco_mask.frPyObjects(drawn, height, width))
        counts = merged["counts"].decode()
        ends = decode_counts(counts, height, width)
        if area(ends) == 0:
            raise BadSample(_why_empty(drawn, height, width))
    else:
        raise BadSample("no segmentation" + ", a box only" * bool(annotation.get("bbox")))
    return counts, ends, degenerate


def _with_area(polygons: list[Any]) -> list[Any]:
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
    return "polygon outside of the picture" if outside else "flat polygon, without a pixel"


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """The library draws without asking: no odd lengths, nothing far outside of the picture."""
    whole = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
    if not whole or not all(type(v) in (int, float) and abs(v) < MAX_COORDINATE for v in polygon):
        raise BadSample("malformed polygon")
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    far = max(np.abs(x - width / 2).max() / width, np.abs(y - height / 2).max() / height)
    if far > 1.5:
        raise BadSample("polygon far outside of the picture")
