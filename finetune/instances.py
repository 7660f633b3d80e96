"""Instance segmentation from a detector's boxes, on COCO- or LVIS-format annotations.

Each box is a prompt; its mask keeps the detector's category and score (EfficientSAM, section 4.3;
Segment Anything, section 7.4). Of several masks EfficientSAM takes the one whose IoU with the box
is highest, EfficientViT-SAM the one whose predicted IoU is: ``choose``.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from finetune.annotated_images import load_images
from finetune.average_precision import Kind, Truth, average_precision
from finetune.box_masks import Choose
from finetune.coco import CocoSource, as_id, plain_name
from finetune.detections import Detections, read_detections
from finetune.evaluation import Frames
from finetune.folders import count_words, find_files, listed
from finetune.trivial import fill_boxes
from sami.core.config import require
from sami.core.progress import track

FILLED = "filled box"  # the mask that needs no model
KINDS: tuple[Kind, ...] = ("segm", "boundary")


class BoxSegmenter(Protocol):
    """What segments by boxes; of :class:`finetune.candidates.Candidate`, what is needed here."""

    shape: Frames

    def segment_boxes(
        self, image: torch.Tensor, size: tuple[int, int], boxes: np.ndarray, choose: Choose
    ) -> list[dict[str, Any]]:
        """As :func:`finetune.box_masks.segment_boxes`."""
        ...


@dataclass(frozen=True)
class BoxedImages:
    """A detector's boxes with the annotations, and the files of the images that have boxes."""

    truth: Truth
    detections: Detections
    paths: dict[str, Path]

    @staticmethod
    def of(source: CocoSource, args: argparse.Namespace) -> "BoxedImages":
        """
        Args:
            source: of :meth:`finetune.coco.CocoSource.of`.
            args: ``boxes``, a file for :func:`finetune.detections.read_detections`; ``samples``:
                if given, only the source's own images count, and not all of its file.

        Raises:
            UserError: annotations and boxes that do not fit each other, or images that lack.
        """
        coco, names = source.coco, None
        if args.samples is not None:
            names = [plain_name(entry.images[0]) for _, entry in source.entries]
        truth = Truth.of(coco, names)
        some = bool(truth.categories)
        require(some, f"--coco {coco.file} has no categories, which AP is a mean of")
        reasons = f" ({count_words(+truth.left_out)})" if +truth.left_out else ""
        require(
            any(map(truth.has_objects, truth.images)),
            f"--coco {coco.file}: no annotation of its {len(truth.images)} images is an object "
            f"that could be found{reasons}, crowds aside; name a file with masks and category_id",
        )
        all_ids = {as_id(image["id"]) for one in coco.entries.values() for image in one.images}
        given = read_detections(args.boxes, truth, all_ids)
        asked = [name for name, own in given.found.items() if own]
        require(
            bool(asked),
            f"--boxes {args.boxes}: no box is of the {len(truth.images)} images that --samples "
            "leaves; raise it",
        )
        return BoxedImages(truth, given, _paths(asked, source.folder))


@dataclass(frozen=True)
class Instances:
    """What was measured: a ``report`` for JSON, and ``results`` in COCO's results format."""

    report: dict[str, Any]
    results: list[dict[str, Any]]


def measure_instances(
    model: BoxSegmenter, boxed: BoxedImages, args: argparse.Namespace, device: torch.device
) -> Instances:
    """AP of a model's masks for a detector's boxes.

    Args:
        args: ``choose``; ``masks_drawn_on``, ``precision`` and ``workers`` as of tools/evaluate.py.

    Returns:
        ``report``: counts; ``rows``, the model's and the filled box's (``mask``), each with
        ``segm`` and ``boundary``, see :func:`finetune.average_precision.average_precision`; and
        ``box``, AP of the boxes as boxes. ``results`` have no ``bbox``: pycocotools would take its
        area for the mask's.

    Raises:
        UserError: no image can be used.
    """
    truth, given = boxed.truth, boxed.detections
    results, filled, damaged, unusable = [], [], set(), Counter()
    images = load_images(boxed.paths, truth, model.shape, args, device)
    for name, image, why in track(images, "masks for boxes", total=len(boxed.paths)):
        if image is None:
            unusable[why] += 1
            damaged.add(name)
            continue
        size = truth.images[name]["height"], truth.images[name]["width"]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            masks = model.segment_boxes(image, size, given.boxes[name], args.choose)
        boxes = fill_boxes(given.boxes[name], *size)
        for one, mask, box in zip(given.found[name], masks, boxes, strict=True):
            kept = {key: one[key] for key in ("image_id", "category_id", "score")}
            results.append(kept | {"segmentation": mask})
            filled.append(kept | {"segmentation": box})
    require(bool(results), f"none of the images could be used ({dict(unusable)})")
    truth = truth.without(damaged)
    rows = [
        {"mask": name} | {kind: average_precision(truth, ours, kind) for kind in KINDS}
        for name, ours in ((args.choose, results), (FILLED, filled))
    ]
    found = [one for name in truth.images for one in given.found[name]]
    report = {"rules": truth.rules, "images": len(truth.images), "unusable": dict(unusable)}
    report |= {"boxes": len(found), "clipped": given.clipped, "outside": given.outside}
    report |= {"annotations_left_out": dict(+truth.left_out), "rows": rows}
    return Instances(report | {"box": average_precision(truth, found, "bbox")}, results)


def _paths(names: list[str], folder: Path) -> dict[str, Path]:
    """
    Raises:
        UserError: an image is not there.
    """
    found = find_files(names, folder).files
    lacking = [name for name in names if name not in found]
    require(
        not lacking,
        f"{folder} lacks {len(lacking)} of the {len(names)} images that --boxes has boxes for: "
        f"{listed(lacking)}; name the folder that their file_name is relative to, or take the "
        "first images alone (--samples)",
    )
    return {name: folder / found[name] for name in names}
