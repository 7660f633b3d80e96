"""COCO-format annotations: the file, and the images that it names, as samples of SA-1B's layout.

COCO, LVIS and what labelling tools export: ``images`` with id, file_name, width, height, and
``annotations`` with image_id and a segmentation (finetune/coco_masks.py).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.coco_masks import is_normalised, to_sa1b, why_none, with_area
from finetune.folders import count_words, find_files, plain_path, read_file, read_image
from finetune.rle import read_json
from sami.core.config import require
from sami.core.errors import BadSample, UserError
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE

LEFT_OUT = "left out"  # a part of a sample: how many annotations were, by reason, as JSON
OTHER_SIZES = "image entries of one file differ in size"


@dataclass(frozen=True)
class Entry:
    """An image: its image entries (some tools write one for each object) and annotations."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]

    @property
    def image(self) -> dict[str, Any]:
        """The first image entry.

        Raises:
            BadSample: they do not agree on the image's size.
        """
        if len({(image["width"], image["height"]) for image in self.images}) > 1:
            raise BadSample(OTHER_SIZES)
        return self.images[0]

    def to_sa1b(self, name: str, keep_crowd: bool = False) -> tuple[dict[str, Any], Counter[str]]:
        """See :func:`finetune.coco_masks.to_sa1b`, and :attr:`image` for what is raised."""
        return to_sa1b(self.image, self.annotations, name, keep_crowd)


@dataclass
class Coco:
    """What a file of annotations holds.

    ``entries`` by the name of the image's file, as :func:`plain_name` writes it; ``left_out``
    counts image entries and annotations that belong to nothing, by reason; ``categories`` as they
    stand in the file.
    """

    file: Path
    entries: dict[str, Entry]
    left_out: Counter[str]
    categories: list[dict[str, Any]] = field(default_factory=list)


def read_coco(path: Path) -> Coco:
    """Read a file of annotations.

    Raises:
        UserError: not such a file; one image id for two images; polygons that are not in pixels.
    """
    data, left_out = read_file(path, "--coco", "name a JSON file"), Counter()
    try:
        content = read_json(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--coco {path} is not JSON ({error}); export it again") from error
    try:
        images, annotations = content["images"], content["annotations"]
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise TypeError("images and annotations have to be lists")
        by_id = _images_by_id(path, images, left_out)
        objects = [one for one in annotations if isinstance(one, dict)]
        left_out["annotation without an image_id"] += len(annotations) - len(objects)
        by_image = _annotations_by_image(objects, by_id, left_out)
        if annotations and left_out["annotation without an image_id"] == len(annotations):
            raise KeyError("image_id")
    except UserError:  # is a ValueError, and has its own words
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--coco {path} is not in COCO's format ({type(error).__name__}: {error}); it needs "
            "images (id, file_name, width, height) and annotations (image_id, segmentation)"
        ) from error
    categories = content.get("categories")
    categories = categories if isinstance(categories, list) else []
    if categories:
        categories = [one for one in categories if isinstance(one, dict)]
        known = {as_id(one.get("id")) for one in categories}
        used = [one["category_id"] for one in objects if one.get("category_id") is not None]
        unknown = sum(as_id(one) not in known for one in used)
        left_out["annotation of an unknown category_id (its mask is used)"] += unknown
    _refuse_normalised(path, objects)
    entries: dict[str, Entry] = {}
    for identity, found in by_id.items():
        entry = entries.setdefault(plain_name(found[0]), Entry([], []))
        entry.images.extend(found)
        entry.annotations.extend(by_image[identity])
    return Coco(path, entries, +left_out, categories)  # without the zeros


def _images_by_id(
    path: Path, images: list[Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """The image entries by id, their sides whole numbers; of equal ones one.

    Raises:
        UserError: one id for two images.
        ValueError: none of them is usable; the first's reason.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        reason = _unusable(image)
        if reason is not None:
            left_out[f"image entry: {reason}"] += 1
            continue
        image = image | {side: _whole(image[side]) for side in ("height", "width")}
        identity, name = as_id(image["id"]), plain_name(image)
        known = by_id.setdefault(identity, [])
        if known and plain_name(known[0]) != name:
            raise UserError(
                f"--coco {path}: image id {identity} is that of two images, "
                f"{plain_name(known[0])} and {name}; give each its own id (files that were joined "
                "often number their images from 0 on each)"
            )
        if image not in known:
            known.append(image)
    if left_out and not by_id:
        raise ValueError(next(iter(left_out)))
    return by_id


def _unusable(image: Any) -> str | None:
    """Why an image entry cannot be used; None if it can."""
    if not isinstance(image, dict):
        return "not an object"
    lacking = {
        "no size": None in (_whole(image.get("height")), _whole(image.get("width"))),
        "no file_name": not plain_name(image),
        "no id": as_id(image.get("id")) is None,
    }
    return next((reason for reason, lacks in lacking.items() if lacks), None)


def _annotations_by_image(
    annotations: list[dict[str, Any]], by_id: dict[str, Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """Annotations by the id of their image; those of unknown ones are counted."""
    by_image = defaultdict(list)
    for annotation in annotations:
        identity = as_id(annotation.get("image_id"))
        if identity in by_id:
            by_image[identity].append(annotation)
        elif identity is None:
            left_out["annotation without an image_id"] += 1
        else:
            left_out["annotation of an unknown image_id"] += 1
    return by_image


def _refuse_normalised(path: Path, annotations: list[dict[str, Any]]) -> None:
    """
    Raises:
        UserError: most polygons are in 0..1.
    """
    parts = [one.get("segmentation") for one in annotations]
    objects = [with_area(one) for one in parts if isinstance(one, list) and one]
    normalised = sum(map(is_normalised, objects))
    if 2 * normalised > len(objects):
        raise UserError(
            f"--coco {path}: {normalised} of {len(objects)} polygons are in 0..1, as YOLO's labels "
            "and FiftyOne's polylines are, and COCO's are in pixels; multiply x by the image's "
            "width and y by its height, or export in COCO's format"
        )


def as_id(value: Any) -> str | None:
    """An id as text: 12, 12.0 and "12" are the same; None if it is neither a number nor text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def _whole(value: Any) -> int | None:
    """A positive whole number; None if it is none."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value > 0 else None


def plain_name(image: dict[str, Any]) -> str:
    """The image's path with forward slashes, in Unicode's composed form; "" if it has none.

    LVIS tells it by the address alone: the last two parts of ``coco_url``.
    """
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])  # such as val2017/000000000139.jpg
    if not isinstance(name, (str, int)) or not str(name).strip():
        return ""
    return plain_path(str(name))


@dataclass(frozen=True)
class CocoSource:
    """Images in a folder with their annotations, as samples of SA-1B's layout.

    ``entries`` are (path below the folder, entry); ``counts`` are of all images of the file,
    ``coco``.
    """

    folder: Path
    entries: list[tuple[str, Entry]]
    keep_crowd: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    coco: Coco | None = None

    @staticmethod
    def of(
        coco: Coco, folder: Path, most: int | None = None, keep_crowd: bool = False
    ) -> "CocoSource":
        """Of what :func:`read_coco` found, the images with annotations that are there.

        Args:
            most: at most so many, in the order of their names.

        Raises:
            UserError: there are none, or none is in the folder; or see :func:`find_files`.
        """
        annotated = {name: one for name, one in sorted(coco.entries.items()) if one.annotations}
        reasons = f" ({count_words(coco.left_out)})" if coco.left_out else ""
        require(
            bool(annotated),
            f"--coco {coco.file}: none of its {len(coco.entries)} images has an annotation"
            f"{reasons}; name a file whose annotations have the image_id of its images",
        )
        bare = [name for name in coco.entries if name not in annotated]
        found = find_files(list(annotated), folder, bare)
        entries = [(found.files[n], one) for n, one in annotated.items() if n in found.files]
        require(
            bool(entries),
            f"{folder} holds none of the annotated images of {coco.file} (the first is "
            f"{next(iter(annotated))}); name the folder that their file_name is relative to",
        )
        counts = {
            "pictures": len(coco.entries),
            "found": len(entries) + found.counted,
            "annotated": len(annotated),
            "annotated_and_found": len(entries),
        }
        remarks = [f"{count} x {reason}" for reason, count in coco.left_out.items()]
        if found.moved:
            remarks.append(
                f"{len(found.moved)} images were found in another folder than their file_name "
                f"says, such as {found.moved[0]}"
            )
        return CocoSource(folder, entries[:most], keep_crowd, counts, remarks, coco)

    def summary(self, used: int, left_out: Counter[str], others: str) -> list[str]:
        """Lines to print: how many of the file's images were used, and why the others were not.

        Args:
            used: images used with masks.
            left_out: images found and left out, by reason.
            others: words for the rest.
        """
        counts = self.counts
        rest = counts["annotated_and_found"] - used - left_out.total()
        line = (
            f"{counts['pictures']} images in the JSON: {counts['found']} found in {self.folder}, "
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
                content, left_out = entry.to_sa1b(name, self.keep_crowd)
                if not content["annotations"]:
                    raise BadSample(why_none(left_out))
                image = read_image(self.folder / name)
            except BadSample as error:
                yield RawSample(name, reason=str(error))
            else:
                parts = {IMAGE: image, "json": json.dumps(content).encode()}
                if left_out:
                    parts[LEFT_OUT] = json.dumps(left_out).encode()
                yield RawSample(name, parts)
