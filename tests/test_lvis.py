"""AP by LVIS's rules against slow loops, and files of LVIS's that lack something."""

import copy
import functools
from collections import defaultdict

import numpy as np
import pytest
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as coco_mask

from finetune.average_precision import average_precision
from sami.core.errors import UserError
from tests.test_average_precision import NAMES, draw_scene, truth_of

# pycocotools under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def as_lvis(told, seed=0):
    """The scene with LVIS's fields: of each image some categories are known not to be there, and
    one was not annotated exhaustively."""
    rng, told = np.random.default_rng(seed), copy.deepcopy(told)
    told["annotations"] = [one for one in told["annotations"] if not one.pop("iscrowd")]
    for one in told["annotations"]:
        one.pop("ignore", None)
    for one, frequency in zip(told["categories"], "rcff", strict=True):
        one["frequency"] = frequency
    for image in told["images"]:
        own = {a["category_id"] for a in told["annotations"] if a["image_id"] == image["id"]}
        others = sorted({3, 7, 12, 90} - own)
        image["neg_category_ids"] = others[: int(rng.integers(0, 3))]
        some = sorted(own)
        image["not_exhaustive_category_ids"] = some[:1] if rng.random() < 0.5 else []
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    return told


def slow_lvis(told, found, most=300):
    """LVIS's AP by loops over single detections (lvis-api, lvis/eval.py and results.py)."""
    thresholds, recalls = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    by_image = defaultdict(list)
    for one in found:
        by_image[one["image_id"]].append(one)
    kept = [
        one
        for own in by_image.values()
        for one in sorted(own, key=lambda r: r["score"], reverse=True)[:most]
    ]
    ranges = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    curves = {}
    for category in told["categories"]:
        for size, (least, largest) in ranges.items():
            scored, objects = [], 0
            for image in sorted(told["images"], key=lambda i: i["id"]):
                gts = [
                    a
                    for a in told["annotations"]
                    if a["image_id"] == image["id"] and a["category_id"] == category["id"]
                ]
                if not gts and category["id"] not in image["neg_category_ids"]:
                    continue  # nobody looked for it there
                gts = sorted(gts, key=lambda a: not least <= a["area"] <= largest)
                unwanted = [not least <= a["area"] <= largest for a in gts]
                objects += unwanted.count(False)
                own = [
                    r
                    for r in kept
                    if r["image_id"] == image["id"] and r["category_id"] == category["id"]
                ]
                own = sorted(own, key=lambda r: r["score"], reverse=True)
                height, width = image["height"], image["width"]
                painted = [painted_mask(a["segmentation"], height, width) for a in gts]
                taken = np.zeros((10, len(gts)), bool)
                for one in own:
                    mask = painted_mask(one["segmentation"], height, width)
                    ious = [(mask & gt).sum() / (mask | gt).sum() for gt in painted]
                    right, ignored = np.zeros(10, bool), np.zeros(10, bool)
                    for t, threshold in enumerate(thresholds):
                        best, match = min(threshold, 1 - 1e-10), None
                        for g, iou in enumerate(ious):
                            if taken[t, g]:
                                continue
                            if match is not None and not unwanted[match] and unwanted[g]:
                                break
                            if iou >= best:
                                best, match = iou, g
                        if match is not None:
                            taken[t, match] = True
                            right[t], ignored[t] = True, unwanted[match]
                        else:
                            open_ended = category["id"] in image["not_exhaustive_category_ids"]
                            ignored[t] = open_ended or not least <= mask.sum() <= largest
                    scored.append((one["score"], right, ignored))
            if objects == 0:
                continue
            scored.sort(key=lambda s: -s[0])
            curve = np.zeros((10, 101))
            for t in range(10):
                hits = [right[t] for _, right, ignored in scored if not ignored[t]]
                true = np.cumsum(hits)
                precision = true / (np.arange(len(hits)) + 1)
                for r, recall in enumerate(recalls):
                    reached = [
                        p for p, n in zip(precision, true, strict=True) if n / objects >= recall
                    ]
                    curve[t, r] = max(reached, default=0)
            curves[size, category["id"]] = curve, category["frequency"]
    table = {"AP": [c for (s, _), (c, _) in curves.items() if s == ""]}
    table["AP50"], table["AP75"] = [c[0] for c in table["AP"]], [c[5] for c in table["AP"]]
    for size in "sml":
        table[f"AP{size}"] = [c for (s, _), (c, _) in curves.items() if s == size]
    for frequency in "rcf":
        table[f"AP{frequency}"] = [
            c for (s, _), (c, f) in curves.items() if s == "" and f == frequency
        ]
    return {name: float(np.mean(v)) if v else None for name, v in table.items()}


def painted_mask(segmentation, height, width):
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return coco_mask.decode(segmentation).astype(bool)


@pytest.mark.parametrize("seed", range(3))
def test_lvis_ap_is_the_slow_one(seed, tmp_path, monkeypatch):
    told, found = draw_scene(seed)
    told = as_lvis(told, seed)
    truth = truth_of(told, tmp_path)
    assert truth.rules == "LVIS"
    ours = average_precision(truth, found)
    theirs = slow_lvis(told, found)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert list(ours) == [*NAMES, "APr", "APc", "APf"]
    # Each rule matters here.
    for change in ("neg_category_ids", "not_exhaustive_category_ids"):
        other = copy.deepcopy(told)
        for image in other["images"]:
            image[change] = []
        assert average_precision(truth_of(other, tmp_path), found)["AP"] != ours["AP"]
    # Categories in several parts, and the best few of an image in place of 300.
    monkeypatch.setattr("finetune.average_precision.PAIRS_AT_ONCE", 10)
    assert average_precision(truth, found) == pytest.approx(theirs, abs=1e-12)
    monkeypatch.setitem(average_precision.__globals__["MOST"], "LVIS", 4)
    few = average_precision(truth, found)
    assert few == pytest.approx(slow_lvis(told, found, 4), abs=1e-12) and few["AP"] != ours["AP"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda told: told["images"][1].pop("neg_category_ids"), "needs neg_category_ids"),
        (lambda told: told["images"][1].update(neg_category_ids=3), "needs neg_category_ids"),
        (
            lambda told: [image.pop("not_exhaustive_category_ids") for image in told["images"]],
            "needs not_exhaustive_category_ids",
        ),
        (lambda told: told["categories"][2].pop("frequency"), "needs frequency"),
        (lambda told: told["categories"][2].update(frequency="often"), "needs frequency"),
    ],
)
def test_an_lvis_file_that_lacks_something(change, says, tmp_path):
    told = as_lvis(draw_scene()[0])
    change(told)
    with pytest.raises(UserError, match=says):
        truth_of(told, tmp_path)


def test_boundary_ap_is_faster_coco_evals(tmp_path):
    """Its own draws every outline; by LVIS's rules here."""
    told, found = draw_scene(1)
    truth = truth_of(as_lvis(told, 1), tmp_path)
    ours = average_precision(truth, found, "boundary")
    with pytest.MonkeyPatch.context() as patch:
        theirs = functools.partial(_library, COCOeval_faster)
        patch.setattr("finetune.average_precision.BoundaryEvaluation", theirs)
        assert average_precision(truth, found, "boundary") == pytest.approx(ours, abs=1e-12)
    assert 0 < ours["AP"] < average_precision(truth, found, "segm")["AP"]


def _library(kind, truth, found, _, **words):
    return kind(truth, found, "boundary", **words)
