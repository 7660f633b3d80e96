"""AP and AR against pycocotools, boundary IoU against slow loops."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from finetune.average_precision import PROPOSALS, Recall, Truth, average_precision
from finetune.coco import read_coco
from sami.core.errors import UserError

# pycocotools under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def ellipse(size, x, y, rx, ry):
    """A mask of an ellipse that lies as it comes, bool [H, W]."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((columns - x) / rx) ** 2 + ((rows - y) / ry) ** 2 <= 1


def runs(mask):
    found = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def draw_scene(seed=0, images=9):
    """COCO's annotations of ellipses of all sizes, with crowds and polygons, and masks that a
    segmenter could have found for them: shifted, twice, of another category, and of nothing."""
    rng = np.random.default_rng(seed)
    told = {"images": [], "annotations": [], "categories": [{"id": i} for i in (3, 7, 12, 90)]}
    results = []
    for number in range(images):
        size = (160 + 10 * (number % 3), 240)
        # Neither ids nor names are in the file's order.
        image = 100 - 7 * number
        name = f"{(number * 5) % 11:02}.png"
        told["images"].append({"id": image, "height": size[0], "width": size[1], "file_name": name})
        for _ in range(0 if number == 3 else int(rng.integers(3, 9))):
            radius = rng.choice([8, 22, 58]) * rng.uniform(0.8, 1.2, 2)
            centre = rng.uniform(0.2, 0.8, 2) * size[::-1]
            mask = ellipse(size, *centre, *radius)
            one = {"id": len(told["annotations"]) + 5, "image_id": image, "iscrowd": 0}
            one |= {"category_id": int(rng.choice([3, 7, 12])), "segmentation": runs(mask)}
            ys, xs = mask.nonzero()
            sides = np.array([xs.max() - xs.min(), ys.max() - ys.min()]) + 0.7  # as of a polygon
            one["bbox"] = [float(xs.min()), float(ys.min()), *sides.tolist()]
            one["area"] = float(mask.sum() * rng.uniform(0.85, 1.1))
            kind = rng.integers(8)
            if kind == 0:
                one["iscrowd"] = 1
            elif kind == 1:
                one["ignore"] = 1  # pycocotools looks at crowds alone
            elif kind == 2:
                angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
                polygon = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
                one["segmentation"] = [polygon.clip(0, size[::-1]).ravel().tolist()]
            told["annotations"].append(one)
            for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
                moved = ellipse(size, *(centre + rng.normal(0, 0.12, 2) * radius), *radius)
                category = one["category_id"] if rng.random() < 0.9 else 7
                results.append([image, category, moved])
        for _ in range(3):
            some = ellipse(size, *(rng.uniform(0, 1, 2) * size[::-1]), 12, 20)
            results.append([image, int(rng.choice([3, 7, 90])), some])
    keys = ("image_id", "category_id", "segmentation", "score", "bbox")
    found = []
    for image, category, mask in results:
        x0, y0, w, h = coco_mask.toBbox(runs(mask)).tolist()
        # Few scores, so that many are equal.
        score = float(rng.integers(1, 30) / 30)
        values = (image, category, runs(mask), score, [x0 + 0.4, y0, w, h + 0.3])
        found.append(dict(zip(keys, values, strict=True)))
    return told, found


def truth_of(told, folder, names=None):
    path = folder / "annotations.json"
    path.write_text(json.dumps(told))
    return Truth.of(read_coco(path), names)


def pycoco(told, found, kind, evaluator=COCOeval, **params):
    """pycocotools' own evaluation; of masks without their boxes, whose area it would take."""
    left = "segmentation" if kind == "bbox" else "bbox"
    found = [{k: v for k, v in one.items() if k != left} for one in copy.deepcopy(found)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(told) | {"info": {}}
        truth.createIndex()
        evaluated = evaluator(truth, truth.loadRes(found), kind)
        for name, value in params.items():
            setattr(evaluated.params, name, value)
        evaluated.evaluate()
        evaluated.accumulate()
        if not params:
            evaluated.summarize()
    return evaluated


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(3))
def test_ap_is_pycocotools(kind, seed, tmp_path):
    told, found = draw_scene(seed)
    ours = average_precision(truth_of(told, tmp_path), found, kind)
    theirs = pycoco(told, found, kind).stats[:6]
    assert list(ours) == list(NAMES)
    assert list(ours.values()) == pytest.approx(theirs.tolist(), abs=1e-12)
    assert 0.1 < ours["AP"] < ours["AP50"] < 0.95 and ours["APs"] != ours["APl"]
    other = average_precision(truth_of(told, tmp_path), found, "bbox" if kind == "segm" else "segm")
    assert other["AP"] != ours["AP"]


def test_of_a_category_a_hundred_count(tmp_path):
    """The first 100 scores of an image and category; the right ones come last."""
    told, found = draw_scene()
    wrong = runs(ellipse((160, 240), 3, 3, 3, 3))
    wrong = found[0] | {"segmentation": wrong, "score": 2}
    known = []
    for count in (90, 100):
        many = found + [wrong] * count
        known.append(average_precision(truth_of(told, tmp_path), many, "segm"))
        theirs = pycoco(told, many, "segm").stats[:6].tolist()
        assert list(known[-1].values()) == pytest.approx(theirs, abs=1e-12)
    assert known[0]["AP"] > known[1]["AP"]


def test_what_nothing_is_known_of(tmp_path):
    """No detections: 0. No large objects, and a category without any: not a number."""
    told, found = draw_scene()
    told["annotations"] = [one for one in told["annotations"] if one["area"] < 96**2]
    truth = truth_of(told, tmp_path)
    assert average_precision(truth, [])["AP"] == 0
    assert average_precision(truth, found)["APl"] is None
    told["annotations"] = [one for one in told["annotations"] if one["iscrowd"]]
    assert average_precision(truth_of(told, tmp_path), found)["AP"] is None


class SlowBoundary(COCOeval):
    """Boundary IoU as its paper has it: the lower of the masks' and of what is left of the masks
    within 2 % of the diagonal from their outlines."""

    def computeIoU(self, image, category):
        def outlines(kind, api):
            found = []
            for one in kind[image, category]:
                mask = api.annToMask(one).astype(bool)
                width = max(1, round(0.02 * np.hypot(*mask.shape)))
                inner = ndimage.binary_erosion(mask, np.ones((3, 3)), width)
                found.append(mask & ~inner)
            return found

        whole = super().computeIoU(image, category)
        if len(whole) == 0:
            return whole
        theirs = outlines(self._gts, self.cocoGt)
        order = np.argsort([-one["score"] for one in self._dts[image, category]], kind="mergesort")
        ours = outlines(self._dts, self.cocoDt)
        for row, number in enumerate(order[: len(whole)]):
            for column, one in enumerate(theirs):
                if not self._gts[image, category][column]["iscrowd"]:
                    both, either = (ours[number] & one).sum(), (ours[number] | one).sum()
                    whole[row, column] = min(whole[row, column], both / either)
        return whole


@pytest.mark.parametrize("seed", range(3))
def test_boundary_ap_is_the_slow_one(seed, tmp_path):
    told, found = draw_scene(seed)
    ours = average_precision(truth_of(told, tmp_path), found, "boundary")
    theirs = pycoco(told, found, "segm", SlowBoundary).stats[:6]
    assert list(ours.values()) == pytest.approx(theirs.tolist(), abs=1e-12)
    assert 0 < ours["AP"] < average_precision(truth_of(told, tmp_path), found, "segm")["AP"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_id": 5}, "have image_id 5, which"),
        ({"category_id": 4}, "have category_id 4, which"),
    ],
)
def test_results_of_what_is_not_known(change, says, tmp_path):
    told, found = draw_scene()
    with pytest.raises(UserError, match=says):
        average_precision(truth_of(told, tmp_path), [*found, found[0] | change])


def test_annotations_that_cannot_be_used_are_counted(tmp_path):
    told, found = draw_scene()
    whole = average_precision(truth_of(told, tmp_path), found)
    told["annotations"] += [
        {"id": 1000, "image_id": 100, "category_id": 3, "bbox": [1, 2, 3, 4]},
        {"id": 1001, "image_id": 100, "category_id": 5, "segmentation": [[9, 9, 20, 9, 20, 20]]},
    ]
    truth = truth_of(told, tmp_path)
    assert truth.left_out["no segmentation, a box only"] == 1
    assert truth.left_out["unknown category_id"] == 1
    assert average_precision(truth, found) == whole  # an unknown category is none
    # Ids as text are the same, and areas and boxes that the file lacks are the mask's.
    for one in told["annotations"]:
        one["category_id"] = str(one["category_id"])
        one["image_id"] = float(one["image_id"])
    assert average_precision(truth_of(told, tmp_path), found) == whole
    for one in told["annotations"]:
        one.pop("area", None), one.pop("bbox", None)
    truth = truth_of(told, tmp_path)
    for name, own in truth.annotations.items():
        for one in own:
            assert one["area"] == coco_mask.area(one["segmentation"]), name
            assert one["bbox"] == coco_mask.toBbox(one["segmentation"]).tolist()


def test_categories_that_cannot_be_used(tmp_path):
    """Of one id only the same category; what is no list is none; AR asks for no LVIS fields."""
    told, found = draw_scene()
    whole = average_precision(truth_of(told, tmp_path), found)
    told["categories"].append(dict(told["categories"][1]))
    assert average_precision(truth_of(told, tmp_path), found) == whole
    told["categories"][-1]["name"] = "other"
    with pytest.raises(UserError, match="category id 7 is that of two categories"):
        truth_of(told, tmp_path)
    told["categories"] = {"7": "cat"}
    assert truth_of(told, tmp_path).categories == {}
    told = draw_scene()[0] | {"categories": [{"id": 3, "frequency": "r"}]}  # LVIS's, with a lack
    told["annotations"][0]["category_id"] = 5
    (tmp_path / "lvis.json").write_text(json.dumps(told))
    truth = Truth.of(read_coco(tmp_path / "lvis.json"), by_category=False)
    assert sum(map(len, truth.annotations.values())) == len(told["annotations"])


# -- AR -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_ar_is_pycocotools(kind, tmp_path):
    told, found = draw_scene(2)
    rng = np.random.default_rng(0)
    for image in told["images"]:  # so that the first 10 and 100 are not all
        for one in [one for one in found if one["image_id"] == image["id"]]:
            one["score"] = float(rng.random())
        for _ in range(150 if image["id"] == 100 else 15):
            size = image["height"], image["width"]
            mask = runs(ellipse(size, *(rng.uniform(0, 1, 2) * size[::-1]), 12, 20))
            box = coco_mask.toBbox(mask).tolist()
            found.append({"image_id": image["id"], "category_id": 3, "segmentation": mask})
            found[-1] |= {"bbox": box, "score": float(rng.random())}
    truth = truth_of(told, tmp_path)
    recall = Recall(kind)
    for name, image in truth.images.items():
        recall.add(truth, name, [one for one in found if one["image_id"] == image["id"]])
    ours = recall.row()
    theirs = pycoco(told, found, kind, useCats=0, maxDets=list(PROPOSALS)).eval["recall"]
    theirs = theirs[:, 0].mean(0)  # [sizes, proposals]
    expected = [*theirs[0], *theirs[1:, 2]]
    assert list(ours) == ["AR@10", "AR@100", "AR@1000", "ARs", "ARm", "ARl"]
    assert [info["mean"] for info in ours.values()] == pytest.approx(expected, abs=1e-12)
    assert 0 < ours["AR@10"]["mean"] < ours["AR@100"]["mean"] < ours["AR@1000"]["mean"] < 1
    objects = [one for one in told["annotations"] if not one["iscrowd"]]
    assert ours["AR@10"]["objects"] == len(objects)
    assert ours["ARs"]["objects"] == sum(one["area"] <= 32**2 for one in objects)
    for info in ours.values():
        assert info["low"] < info["mean"] < info["high"]
