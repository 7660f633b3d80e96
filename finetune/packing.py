"""Images into shards: what tools/make_shards.py writes, one tar after the other.

What is written can be read: an image's bytes are copied where shards take its kind, other kinds
become PNG without a loss, and what cannot is left out by its reason.
"""

import contextlib
import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from PIL import Image

from finetune.coco import Entry
from finetune.coco_masks import why_none
from finetune.folders import as_text, extension_of, read_image
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import BadSample, UserError, not_written
from sami.core.images import (
    BACK,
    FORMATS,
    IMAGE_EXTENSIONS,
    TURNS,
    Drawn,
    EncodedImage,
    decoding,
    drawn_on,
    open_image,
)
from sami.core.labels import CLASSES

COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # and their extensions
GUESSED = "are turned by EXIF and their masks fit both ways: taken as drawn on the"
LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")  # Pillow's modes that PNG holds


class SourceImage(NamedTuple):
    """An image to be written: its path below the source and what comes with it."""

    path: str
    label: int = -1  # none
    entry: Entry | None = None  # of COCO


@dataclass(frozen=True)
class How:
    """What the images of a call have in common.

    Attributes:
        source: the folder that their paths are relative to.
        masks_drawn_on: where masks lie if nothing else tells; see :func:`drawn_on`.
        keep_crowd: keep COCO's crowds.
    """

    source: Path
    masks_drawn_on: Drawn = "upright"
    keep_crowd: bool = False


@dataclass
class Written:
    """What became of some images.

    ``bad`` (path, reason) of those left out; ``masks`` left out of the others, by reason; ``noted``
    what was done to some, by what it was.
    """

    images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    masks: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Written") -> None:
        self.images += other.images
        self.bad += other.bad
        self.masks += other.masks
        self.noted += other.noted


def pack_shard(how: How, path: Path, first: int, images: list[SourceImage]) -> Written:
    """One tar, under another name until it is whole and on the disk.

    Args:
        first: the number that the first image is called by.

    Raises:
        UserError: a file cannot be read or written, for a reason that is not in its data.
    """
    temporary, written = path.with_name(f".{path.name}.writing"), Written()
    try:
        with temporary.open("wb") as file:
            with wds.TarWriter(file, mtime=0) as writer:
                for number, image in enumerate(images, first):
                    try:
                        writer.write(pack_sample(how, image, f"{number:08d}", written))
                        written.images += 1
                    except BadSample as error:
                        written.bad.append((image.path, str(error)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise not_written(error, str(path), "mend that, and the same command goes on") from error
    return written


def pack_sample(how: How, image: SourceImage, key: str, written: Written) -> dict[str, Any]:
    """An image's members; what was left out of it, or done to it, is added to ``written``.

    Raises:
        BadSample: it cannot be used.
        UserError: it cannot be read, for a reason that is not in its data.
    """
    data, entry = read_image(how.source / image.path), image.entry
    encoded, drawn, unsure = open_image(data), "upright", False
    orientation = encoded.orientation  # Pillow forgets a TIFF's once it is loaded
    with decoding("damaged image"):
        Image.open(io.BytesIO(data), formats=FORMATS).verify()
    if entry is not None:
        size = entry.image["width"], entry.image["height"]
        drawn, unsure = drawn_on(encoded, *size, None, how.masks_drawn_on)
        content, left_out = entry.to_sa1b(key, how.keep_crowd)
        written.masks += left_out
        if not content["annotations"]:
            raise BadSample(why_none(left_out))
    extension, note = extension_of(image.path), ""
    if extension not in IMAGE_EXTENSIONS:
        named = f"as .{extension}" if extension else "without an extension"
        extension = COPIED.get(encoded.format, "png")
        note = f"{named}, in {encoded.format}, are copied as .{extension}"
        if encoded.format not in COPIED:
            data, orientation = as_png(encoded, drawn), 1
            note = f"{named}, in {encoded.format}, became PNG without a loss"
    sample = {"__key__": key, extension: data}
    if entry is not None:
        content["image"]["file_name"] = f"{key}.{extension}"
        if orientation != 1:
            content["image"]["drawn_on"] = drawn  # decided here, once
        sample["json"] = json.dumps(content).encode()
    elif image.label >= 0:
        sample["cls"] = image.label
    guess = f"{GUESSED} {drawn} image (--masks-drawn-on)"
    written.noted.update([note] * bool(note) + [guess] * unsure)
    return sample


def as_png(encoded: EncodedImage, drawn: Drawn) -> bytes:
    """An image as PNG, every value as it was, turned as asked; of several frames the first.

    Raises:
        BadSample: PNG does not hold such values, or the image is damaged.
    """
    image, orientation, tiff = encoded.image, encoded.orientation, encoded.format == "TIFF"
    bits = np.max(image.tag_v2.get(258, 1)) if tiff else 8
    inverse = tiff and image.tag_v2.get(262) == 0
    with decoding("damaged image"):
        image.load()
        if image.mode == "I" and 0 <= image.getextrema()[0] <= image.getextrema()[1] < 65536:
            image = image.convert("I;16")
        deep = image.mode.startswith("I")
        if image.mode not in LOSSLESS or bits > 8 and not deep or deep and inverse:
            raise BadSample(
                f"{encoded.format} in {image.mode}, {bits} bits: cannot be written as PNG without "
                "a loss"
            )
        if (drawn == "upright") != tiff and orientation in TURNS:  # Pillow turns a TIFF itself
            image = image.transpose((TURNS if drawn == "upright" else BACK)[orientation])
        stream = io.BytesIO()
        image.save(stream, "PNG", exif=b"")
        return stream.getvalue()


# ---- The plan of a folder


def stamp(source: Path, images: list[SourceImage]) -> str:
    """Changes when one of the files does: by their sizes and times, not their content."""
    digest = hashlib.sha256()
    for image in images:
        try:
            status = os.stat(source / image.path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except FileNotFoundError:
            digest.update(b"gone\n")
    return digest.hexdigest()[:16]


def claim(
    out: Path, prefix: str, plan: dict[str, object], shards: dict[str, str], classes: list[str]
) -> None:
    """Make OUT this plan's folder, with its classes.json, or find that it is.

    Args:
        plan: what the shards are made of, in short, and how.
        shards: of each one's file name the :func:`stamp` of its images.
        classes: the classes' names; empty for none.

    Raises:
        UserError: it holds shards of another plan, or of other classes (of another --prefix), or
            images changed since they were written into it, or it cannot be written. Nothing is
            written then.
    """
    file = out / f"{prefix}.plan.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_bytes()) if file.exists() else plan
    except OSError as error:
        raise not_written(error, str(out), "name another folder") from error
    except ValueError as error:
        raise UserError(
            f"{file} is damaged; delete it and the shards of --prefix {prefix}"
        ) from error
    meaning = {"listing": "the images, their labels or annotations", "pictures": "their number"}
    changed = [meaning.get(n, n) for n in plan if plan[n] != found.get(n, plan[n])]
    require(
        not changed or not any(out.glob(f"{prefix}-*.tar")),
        f"{out} holds shards made of other images or with other options ({', '.join(changed)} "
        f"differ); use another OUT or --prefix, or delete {prefix}-*.tar there to make them anew",
    )
    before = found.get("stamps", {})
    stale = [n for n, now in shards.items() if before.get(n, now) != now and (out / n).exists()]
    require(
        not stale,
        f"images in {len(stale)} of the finished shards in {out} changed since they were "
        f"written (other sizes or times): delete {', '.join(stale[:5])}"
        f"{' ...' if len(stale) > 5 else ''}, and the same command writes them anew; or use "
        "another OUT",
    )
    if classes:
        _refuse_other_classes(out, classes)
    try:
        _write_json(file, plan | {"stamps": shards})
        if classes:
            _write_json(out / CLASSES, classes)
    except OSError as error:
        raise not_written(error, str(out), "name another folder") from error


def _write_json(path: Path, content: object) -> None:
    """Write a file, unless it holds just that: it may lie where nothing can be written."""
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)


def _refuse_other_classes(out: Path, classes: list[str]) -> None:
    """
    Raises:
        UserError: OUT/classes.json numbers others, and shards beside it are read by it.
    """
    file, found = out / CLASSES, []
    if not file.exists() or not any(out.glob("*.tar")):
        return
    with contextlib.suppress(ValueError, TypeError):
        found = list(json.loads(file.read_bytes()))
    ours = [name for name in classes if name not in found]
    theirs = [name for name in found if name not in classes]
    what = [f"{len(ours)} are not in it, such as '{ours[0]}'"] if ours else []
    what += [f"{len(theirs)} are in it alone, such as '{theirs[0]}'"] if theirs else []
    require(
        found == classes,
        f"{file} numbers other classes than these ({'; '.join(what) or 'in another order'}), and "
        f"shards beside it are read by it; number these as there, --classes {file}, or use another "
        "OUT",
    )


def unclaim(out: Path, prefix: str, shards: list[Path], own_classes: bool) -> None:
    """Take away what was written for nothing: empty shards, their plan, and, if they are of this
    call, their classes."""
    for path in (*shards, out / f"{prefix}.plan.json"):
        path.unlink(missing_ok=True)
    if own_classes and not any(out.glob("*.tar")):
        (out / CLASSES).unlink(missing_ok=True)


def listing(images: list[SourceImage]) -> str:
    """Changes with the images' paths, labels or annotations."""
    rows = []
    for path, label, entry in images:
        # One image entry stands alone, as in the plans of before entries could be several.
        found = entry and (entry.images if len(entry.images) > 1 else entry.images[0])
        rows.append((as_text(path), label, found, entry.annotations if entry else []))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
