"""AP of instances and AR of proposals, as COCO and LVIS compute them; faster-coco-eval does.

AP (cocodataset.org/#detection-eval): the area under the curve of precision over recall, mean over
the IoU thresholds .5, .55 ... .95 and the categories; of an image the 100 highest scores of each
category count. LVIS (arXiv 1908.03195, appendix) annotates a part of its categories in an image:
detections of other categories are dropped, unmatched ones where a category was not annotated
exhaustively are ignored, and the 300 highest scores of an image count. Boundary AP has the lower
of the masks' IoU and that of their outlines (:mod:`finetune.boundary`).

AR asks for no category: the share of objects that one of the 10, 100 or 1,000 highest scores of
their image covers, mean over the same thresholds.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from finetune.boundary import BoundaryEvaluation
from finetune.coco import OTHER_SIZES, Coco, as_id
from finetune.coco_masks import DEGENERATE, is_crowd, run_lengths
from finetune.measures import mean, resample
from finetune.rle import area, box
from sami.core.config import require
from sami.core.errors import BadSample

Kind = Literal["segm", "boundary", "bbox"]  # masks, their outlines too, or boxes
MOST = {"COCO": 100, "LVIS": 300}  # detections that count: of a category and image, or of an image
PROPOSALS = (10, 100, 1000)
SIZES = "sml"  # small, medium, large: below 32 x 32 and 96 x 96 pixels
FREQUENCIES = "rcf"  # LVIS: of a category that is rare, common, frequent
PAIRS_AT_ONCE = 2_000_000  # of images and categories; each costs the library some 200 bytes


@dataclass
class Truth:
    """The annotated objects of some images.

    Attributes:
        images: by name (see :func:`finetune.coco.plain_name`), with ``id``, ``height``, ``width``
            and what LVIS adds; in the order of their ids.
        names: of the images, by id; entries of one file have several.
        categories: by id.
        annotations: by the image's name, as COCO has them; ``segmentation`` as run lengths.
        rules: those that AP is computed by.
        left_out: annotations that cannot be used, by reason.

    Ids are those of the file as text: 12, 12.0 and "12" are one.
    """

    images: dict[str, dict[str, Any]]
    names: dict[str, str]
    categories: dict[str, dict[str, Any]]
    annotations: dict[str, list[dict[str, Any]]]
    rules: Literal["COCO", "LVIS"] = "COCO"
    left_out: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def of(coco: Coco, names: Iterable[str] | None = None, by_category: bool = True) -> "Truth":
        """What a file has of some of its images, or of all.

        LVIS's are told by the categories' ``frequency`` or the images' own fields.

        Args:
            by_category: annotations of unknown categories are left out, and the rules are the
                file's; else categories are not looked at, as AR has it.

        Raises:
            UserError: an LVIS file without what its rules need; two categories of one id.
        """
        categories = _by_id(coco) if by_category else {}
        truth = Truth({}, {}, categories, {})
        entries = [(name, coco.entries[name]) for name in coco.entries if names is None]
        entries += [(name, coco.entries[name]) for name in names or ()]
        for name, entry in sorted(entries, key=lambda pair: _order(pair[1].images[0]["id"])):
            try:
                truth.images[name] = entry.image
            except BadSample:
                truth.left_out[f"image: {OTHER_SIZES}"] += 1
                continue
            truth.names |= {as_id(image["id"]): name for image in entry.images}
            found = (truth._usable(one, name) for one in entry.annotations)
            truth.annotations[name] = [one for one in found if one is not None]
        if not by_category:
            return truth
        lvis = any("frequency" in one for one in categories.values())
        if lvis or any(set(LVIS_FIELDS) & image.keys() for image in truth.images.values()):
            truth.rules = "LVIS"
            _check_lvis(coco, truth)
        return truth

    def has_objects(self, name: str) -> bool:
        """Whether an image has an object that can be found: no crowd."""
        return any(not one["iscrowd"] for one in self.annotations.get(name, ()))

    def without(self, names: set[str]) -> "Truth":
        """The same without some images."""
        images = {name: image for name, image in self.images.items() if name not in names}
        ids = {key: name for key, name in self.names.items() if name not in names}
        return replace(self, images=images, names=ids)

    def _usable(self, annotation: dict[str, Any], name: str) -> dict[str, Any] | None:
        """An annotation with its mask as run lengths; None if it has none, which is counted.

        ``area`` is the file's, as COCO has it; without one, the mask's. ``ignore`` of a file is
        not looked at, as in pycocotools.
        """
        category = as_id(annotation.get("category_id"))
        if self.categories and category not in self.categories:
            self.left_out["unknown category_id"] += 1
            return None
        image = self.images[name]
        size = [image["height"], image["width"]]
        try:
            counts, ends, degenerate = run_lengths(annotation, *size, keep_crowd=True)
        except BadSample as error:
            self.left_out[str(error)] += 1
            return None
        self.left_out[DEGENERATE] += degenerate
        x0, y0, x1, y1 = box(ends, size[0])
        told, given = annotation.get("area"), annotation.get("bbox")
        whole = isinstance(given, list) and len(given) == 4 and all(map(_is_number, given))
        return {
            "category": category,
            "iscrowd": int(is_crowd(annotation)),
            "area": told if _is_number(told) and told > 0 else area(ends),
            "bbox": given if whole else [x0, y0, x1 - x0, y1 - y0],
            "segmentation": {"size": size, "counts": counts},
        }


def _by_id(coco: Coco) -> dict[str, dict[str, Any]]:
    """
    Raises:
        UserError: two categories of one id.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in coco.categories:
        key = as_id(one.get("id"))
        other = found.setdefault(key, one)
        require(
            other.get("name") == one.get("name") or key is None,
            f"--coco {coco.file}: category id {key} is that of two categories, "
            f"{other.get('name')} and {one.get('name')}; give each its own id",
        )
    found.pop(None, None)
    return found


LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")


def _check_lvis(coco: Coco, truth: Truth) -> None:
    """
    Raises:
        UserError: a field is missing without which LVIS's rules cannot be followed.
    """
    for name, image in truth.images.items():
        for key in LVIS_FIELDS:
            require(
                isinstance(image.get(key), list),
                f"--coco {coco.file} is LVIS's, whose AP needs {key} (a list) of every image, and "
                f"{name} has none; take the file as LVIS gives it out",
            )
    for one in truth.categories.values():
        require(
            one.get("frequency") in tuple(FREQUENCIES),
            f"--coco {coco.file} is LVIS's, whose AP needs frequency (r, c or f) of every "
            f"category, and {one.get('name', one.get('id'))} has none; take the file as LVIS gives "
            "it out",
        )


def _order(value: Any) -> tuple[int, str]:
    """Ids that are numbers by their size, as pycocotools goes through images."""
    text = as_id(value)
    return (int(text), "") if text.lstrip("-").isdecimal() else (0, text)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < np.inf


# -- AP -----------------------------------------------------------------------------------------


def average_precision(
    truth: Truth, results: list[dict[str, Any]], kind: Kind = "segm"
) -> dict[str, float | None]:
    """AP of detections over all of the truth's images.

    An image without detections counts, with its objects missed. There is no interval: AP is no
    mean over images, and 1,000 bootstrap samples would each need all curves anew.

    Args:
        results: in COCO's results format: ``image_id``, ``category_id``, ``score``, and
            ``segmentation`` as run lengths, or for ``bbox`` x, y, width and height in pixels.
            Small, medium and large are told by the mask's own area.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` in 0..1, and LVIS's ``APr``, ``APc``,
        ``APf``; None where no object has the size or frequency.

    Raises:
        UserError: results of images or categories that are not in the truth.
    """
    lvis = truth.rules == "LVIS"
    numbers = {key: number for number, key in enumerate(truth.categories, 1)}
    images = {name: number for number, name in enumerate(truth.images, 1)}
    ours = []
    for one in results:
        image, category = as_id(one["image_id"]), as_id(one["category_id"])
        for key, value, known in (
            ("image_id", image, truth.names),
            ("category_id", category, numbers),
        ):
            require(
                value in known,
                f"results have {key} {value}, which the annotations lack; name the annotations "
                "that they belong to",
            )
        found = {"image_id": images[truth.names[image]], "category_id": numbers[category]}
        ours.append(found | {"score": one["score"]} | _region(one, kind))
    objects, pictures = [], []
    for number, (name, image) in enumerate(truth.images.items(), 1):
        pictures.append({"id": number, "height": image["height"], "width": image["width"]})
        for key in LVIS_FIELDS if lvis else ():
            known = (numbers.get(as_id(one)) for one in image[key])
            pictures[-1][key] = [one for one in known if one is not None]
        for one in truth.annotations[name]:
            place = {"image_id": number, "category_id": numbers[one["category"]]}
            objects.append(one | place | {"id": len(objects) + 1})
    if lvis:
        ours = _annotated(_highest(ours, MOST["LVIS"]), objects, pictures)
    kinds = [
        {"id": number, "name": key} | {k: c[k] for k in ("frequency",) if k in c}
        for number, (key, c) in enumerate(truth.categories.items(), 1)
    ]
    evaluator = _Evaluator(pictures, kinds, objects, ours, kind, [MOST[truth.rules]], lvis)
    step = max(1, PAIRS_AT_ONCE // max(1, len(pictures)))
    parts = [
        evaluator.run([c["id"] for c in kinds[start : start + step]])["precision"]
        for start in range(0, len(kinds), step)
    ]
    curves = np.concatenate(parts, 2)[..., 0]  # [thresholds, recalls, categories, sizes]
    table = {"AP": curves[..., 0], "AP50": curves[0, ..., 0], "AP75": curves[5, ..., 0]}
    table |= {f"AP{size}": curves[..., n] for n, size in enumerate(SIZES, 1)}
    for frequency in FREQUENCIES if lvis else ():
        those = [c["frequency"] == frequency for c in kinds]
        table[f"AP{frequency}"] = curves[:, :, those, 0]
    known = {name: values[values > -1] for name, values in table.items()}  # -1: no such object
    return {name: float(v.mean()) if v.size else None for name, v in known.items()}


def _region(one: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The part of a result that is compared. The library would take the area of the box for the
    mask's, if it had both."""
    key = "bbox" if kind == "bbox" else "segmentation"
    return {key: one[key]}


def _highest(results: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Of each image the results of the highest scores; of equal ones the first."""
    by_image = defaultdict(list)
    for one in results:
        by_image[one["image_id"]].append(one)
    return [
        one for own in by_image.values() for one in heapq.nlargest(most, own, lambda r: r["score"])
    ]


def _annotated(
    results: list[dict[str, Any]], objects: list[dict[str, Any]], images: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Results of categories that were looked for in their image: some are there, or known not to
    be. The library (1.8) drops the others too, and fails where an image has nothing else."""
    known = {(one["image_id"], one["category_id"]) for one in objects}
    known |= {(image["id"], category) for image in images for category in image[LVIS_FIELDS[0]]}
    return [one for one in results if (one["image_id"], one["category_id"]) in known]


class _Evaluator:
    """The library's evaluation of one set of detections."""

    def __init__(
        self,
        images: list[dict[str, Any]],
        categories: list[dict[str, Any]],
        objects: list[dict[str, Any]],
        results: list[dict[str, Any]],
        kind: Kind,
        most: Sequence[int],
        lvis: bool = False,
    ) -> None:
        truth = {"images": images, "categories": categories, "annotations": objects}
        self.truth = COCO(truth, print_function=_silent)
        self.found = self.truth.loadRes(results)
        self.kind, self.most, self.lvis = kind, list(most), lvis

    def run(self, categories: list[int]) -> dict[str, np.ndarray]:
        """``precision`` [T, R, K, A, M] and ``recall`` [T, K, A, M] by IoU threshold, recall,
        category, size (all, small, medium, large) and number of detections."""
        outlines = self.kind == "boundary"
        evaluator = (BoundaryEvaluation if outlines else COCOeval_faster)(
            self.truth,
            self.found,
            "segm" if outlines else self.kind,
            print_function=_silent,
            lvis_style=self.lvis,
        )
        evaluator.params.maxDets, evaluator.params.catIds = self.most, categories
        evaluator.evaluate()
        evaluator.accumulate()
        return evaluator.eval


def _silent(*words: object) -> None:
    """In place of print."""


# -- AR -----------------------------------------------------------------------------------------


@dataclass
class Recall:
    """AR over images that are added one by one, so that no proposals are kept.

    Attributes:
        counts: of each image, its objects by size, [A]: all, small, medium, large.
        shares: of each, how much of them the first proposals cover, [A, M], 0..1.
    """

    kind: Kind = "segm"
    counts: list[np.ndarray] = field(default_factory=list)
    shares: list[np.ndarray] = field(default_factory=list)

    def add(self, truth: Truth, name: str, proposals: list[dict[str, Any]]) -> None:
        """One image.

        Args:
            proposals: ``score``, and ``segmentation`` as run lengths or ``bbox`` x, y, width,
                height in pixels, as :attr:`kind` needs.
        """
        given = {"image_id": 1, "category_id": 1}
        image = {key: truth.images[name][key] for key in ("height", "width")} | {"id": 1}
        objects = [one | given | {"id": n} for n, one in enumerate(truth.annotations[name], 1)]
        ours = [given | {"score": one["score"]} | _region(one, self.kind) for one in proposals]
        evaluator = _Evaluator([image], [{"id": 1}], objects, ours, self.kind, PROPOSALS)
        recall = evaluator.run([1])["recall"][:, 0]  # [thresholds, sizes, proposals]
        areas = np.array([one["area"] for one in objects if not one["iscrowd"]])
        ranges = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]  # both ends included
        self.counts.append(np.array([((areas >= a) & (areas <= b)).sum() for a, b in ranges]))
        self.shares.append(np.maximum(recall, 0).mean(0))  # -1: no such object

    def row(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """``AR@10``, ``AR@100``, ``AR@1000``, and ``ARs``, ``ARm``, ``ARl`` of 1,000 proposals.

        Each has ``mean``, ``low``, ``high`` (see :func:`finetune.measures.mean`) and ``objects``.
        """
        weights, found = resample(len(self.counts), seed), {}
        counts, shares = np.array(self.counts), np.array(self.shares)
        columns = [(f"AR@{most}", 0, place) for place, most in enumerate(PROPOSALS)]
        columns += [(f"AR{size}", n, len(PROPOSALS) - 1) for n, size in enumerate(SIZES, 1)]
        for name, size, place in columns:
            images = np.repeat(np.arange(len(counts)), counts[:, size])
            found[name] = mean(shares[images, size, place], images, weights)
        return found
