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
from sami.core.errors import BadSample, UserError
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE

LEFT_OUT = "left out"  # a part of a sample: how many annotations were, by reason, as JSON
OTHER_SIZES = "image entries of one file differ in size"


@dataclass(frozen=True)
class Entry:
    """An image: COCO's image entries of its file (several where a tool writes one an object)."""

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
    counts image entries and annotations that belong to nothing, by reason.
    """

    file: Path
    entries: dict[str, Entry]
    left_out: Counter[str] = field(default_factory=Counter)

    def annotated(self) -> dict[str, Entry]:
        """The images with annotations, in the order of their names."""
        return {name: one for name, one in sorted(self.entries.items()) if one.annotations}


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
        by_image = _annotations_by_image(annotations, by_id, left_out)
    except UserError:  # is a ValueError, and has its own words
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--coco {path} is not in COCO's format ({type(error).__name__}: {error}); it needs "
            "images (id, file_name, width, height) and annotations (image_id, segmentation)"
        ) from error
    _count_unknown_categories(content.get("categories"), annotations, left_out)
    _refuse_normalised(path, annotations)
    entries: dict[str, Entry] = {}
    for identity, found in by_id.items():
        entry = entries.setdefault(plain_name(found[0]), Entry([], []))
        entry.images.extend(found)
        entry.annotations.extend(by_image[identity])
    return Coco(path, entries, left_out)


def _images_by_id(
    path: Path, images: list[Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """The image entries by id, their sides whole numbers; of equal ones one.

    Raises:
        UserError: one id for two images.
        ValueError: none of them is usable; the first's reason.
    """
    by_id: dict[str, list[dict[str, Any]]] = {}
    reasons: Counter[str] = Counter()
    for image in images:
        sides = {s: _whole(image.get(s)) for s in ("height", "width")} if _is_object(image) else {}
        lacking = (
            ("not an object", not sides),
            ("no size", not all(sides.values())),
            ("no file_name", sides and not plain_name(image)),
            ("no id", sides and _identity(image.get("id")) is None),
        )
        reason = next((reason for reason, lacks in lacking if lacks), None)
        if reason is not None:
            reasons[f"image entry: {reason}"] += 1
            continue
        image, identity = image | sides, _identity(image["id"])
        known = by_id.setdefault(identity, [])
        if known and plain_name(known[0]) != plain_name(image):
            raise UserError(
                f"--coco {path}: image id {identity} is that of two images, "
                f"{plain_name(known[0])} and {plain_name(image)}; give each its own id (files that "
                "were joined often number their images from 0 on each)"
            )
        if image not in known:
            known.append(image)
    if reasons and not by_id:
        raise ValueError(next(iter(reasons)))
    left_out.update(reasons)
    return by_id


def _annotations_by_image(
    annotations: list[Any], by_id: dict[str, Any], left_out: Counter[str]
) -> dict[str, list[dict[str, Any]]]:
    """Annotations by the id of their image; those of unknown ones are counted.

    Raises:
        KeyError: none has an image_id.
    """
    by_image, without = defaultdict(list), 0
    for annotation in annotations:
        identity = _identity(annotation.get("image_id")) if _is_object(annotation) else None
        if identity in by_id:
            by_image[identity].append(annotation)
        elif identity is None:
            without += 1
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
    known = {_text(one.get("id")) for one in categories if _is_object(one)}
    used = [one.get("category_id") for one in annotations if _is_object(one)]
    unknown = sum(one is not None and _text(one) not in known for one in used)
    reason = "annotation of an unknown category_id (its mask is used)"
    left_out.update({reason: unknown} if unknown else {})


def _refuse_normalised(path: Path, annotations: list[Any]) -> None:
    """
    Raises:
        UserError: most polygons are in 0..1.
    """
    parts = [one.get("segmentation") for one in annotations if _is_object(one)]
    objects = [with_area(one) for one in parts if isinstance(one, list) and one]
    normalised = sum(map(is_normalised, objects))
    if 2 * normalised > len(objects):
        raise UserError(
            f"--coco {path}: {normalised} of {len(objects)} polygons are in 0..1, as YOLO's labels "
            "and FiftyOne's polylines are, and COCO's are in pixels; multiply x by the image's "
            "width and y by its height, or export in COCO's format"
        )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _identity(value: Any) -> str | None:
    """An id as text: 12, 12.0 and "12" are the same; None if it is neither a number nor text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def _text(value: Any) -> str:
    """An id as text, whatever it is."""
    identity = _identity(value)
    return repr(value) if identity is None else identity


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

    ``entries`` are (path below the folder, entry); ``counts`` tell of all images of the file.
    """

    folder: Path
    entries: list[tuple[str, Entry]]
    keep_crowd: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

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
        annotated = coco.annotated()
        if not annotated:
            reasons = f" ({count_words(coco.left_out)})" if coco.left_out else ""
            raise UserError(
                f"--coco {coco.file}: none of its {len(coco.entries)} images has an annotation"
                f"{reasons}; name a file whose annotations have the image_id of its images"
            )
        bare = [name for name in coco.entries if name not in annotated]
        found = find_files(list(annotated), folder, bare)
        entries = [
            (found.files[name], one) for name, one in annotated.items() if name in found.files
        ]
        if not entries:
            raise UserError(
                f"{folder} holds none of the annotated images of {coco.file} (the first is "
                f"{next(iter(annotated))}); name the folder that their file_name is relative to"
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
        return CocoSource(folder, entries[:most], keep_crowd, counts, remarks)

    def summary(self, used: int, left_out: Counter[str], others: str) -> list[str]:
        """What became of the file's images, as lines to be printed.

        Args:
            used: with masks.
            left_out: of those that were found, by reason.
            others: what is to be said of what is left.
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
