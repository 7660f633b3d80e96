"""Masks for a detector's boxes, and proposals: what a model is asked and writes; bad input."""

import argparse
import contextlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import finetune.box_masks as box_masks
import tools.evaluate
from finetune.average_precision import PROPOSALS, Truth
from finetune.box_masks import iou_with_box, segment_boxes
from finetune.coco import CocoSource, read_coco
from finetune.coco_masks import encode_masks
from finetune.evaluation import framed
from finetune.everything import MaskGenerator
from finetune.fastsam import Instances
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from finetune.proposals import (
    measure_proposals,
    propose_by_clicks,
    propose_by_fastsam,
    propose_grid,
)
from finetune.sam import Sam
from sami.core.checkpoint import write_weights
from sami.core.images import open_image
from sami.encoder import EncoderConfig
from tests.runs import ROOT, run
from tests.test_average_precision import draw_scene, ellipse, pycoco, runs
from tests.test_evaluation import SHAPE
from tests.test_lvis import as_lvis

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def write_model(path, seed=0):
    torch.manual_seed(seed)
    encoder = EncoderConfig("custom", width=32, patch_size=8)
    model = build_model(encoder, MaskDecoderConfig(width=32), 64, "longest", False)
    write_weights(path, model.state_dict(), model_header(model))
    return path


def write_scene(folder):
    """A folder with images, annotations.json, lvis.json and boxes.json."""
    told, found = draw_scene(4, images=5)
    rng = np.random.default_rng(0)
    for place in ("", "train2017/"):
        (folder / place).mkdir(exist_ok=True)
        for image in told["images"]:
            pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / image["file_name"])
    (folder / "annotations.json").write_text(json.dumps(told))
    (folder / "lvis.json").write_text(json.dumps(as_lvis(told)))
    boxes = [{k: v for k, v in one.items() if k != "segmentation"} for one in found]
    image = told["images"][0]
    boxes[0]["bbox"] = [image["width"] - 9.5, -3, 40, 20]  # half outside
    boxes.append(boxes[1] | {"bbox": [image["width"] + 4.0, 3, 9, 9]})  # outside
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


# -- one image ------------------------------------------------------------------------------------


class Known(Sam):
    """Answers each box with the box itself as mask 0, which a box does not ask for, and as masks
    1..3 a part of it, another place, nearly the box; and says that the second is the best."""

    def predict_low_resolution(self, embeddings, points, labels, masks=None):
        self.asked_for.append((points[0].tolist(), labels[0].tolist()))
        side = 4 * self.shape.grid
        scale = side / self.shape.image_size
        logits = torch.full((1, points.shape[1], 4, side, side), -4.0)
        for number, (x0, y0, x1, y1) in enumerate((points[0].flatten(1) * scale).round().int()):
            logits[0, number, 0, y0:y1, x0:x1] = 4
            logits[0, number, 1, y0:y1, x0 : (x0 + x1) // 2] = 4
            logits[0, number, 2, :2, :2] = 4
            logits[0, number, 3, y0 : y1 - 1, x0:x1] = 4
        iou = torch.tensor([2.0, 0.5, 0.9, 0.1]).expand(1, points.shape[1], 4)
        self.given.append(logits[0])
        return logits, iou


@pytest.mark.parametrize("choose", ["predicted", "box"])
def test_each_box_gets_its_mask(choose, monkeypatch):
    height, width = 40, 60
    torch.manual_seed(0)
    model = Known(SHAPE).eval()
    model.asked_for, model.given = [], []
    image = torch.zeros(3, *SHAPE.frame(height, width), dtype=torch.uint8)
    boxes = np.array(
        [[10, 5, 50, 30], [7, 7, 7, 9], [0, 0, 30, 40], [20.5, 10, 44, 35], [9, 0, 3, 9]]
    )
    found = segment_boxes(model, image, (height, width), boxes, choose)
    masks = [coco_mask.decode(one).astype(bool) for one in found]
    assert not masks[1].any() and not masks[4].any()
    side, numbers = SHAPE.image_size, (0, 2, 3)
    scale = np.tile([side / width, side / height], 2)
    ((points, labels),) = model.asked_for
    assert np.allclose(np.array(points).reshape(3, 4), boxes[list(numbers)] * scale, atol=1e-4)
    assert labels == [[2, 3]] * 3
    for number, logits in zip(numbers, model.given[0], strict=True):
        one = logits[2 if choose == "predicted" else 3]
        expected = model.resize_logits(one[None, None, None], (height, width), (height, width))
        assert (masks[number] == (expected[0, 0, 0] > 0).numpy()).all()
        x0, y0, x1, y1 = boxes[number].astype(int)
        inside = masks[number][y0:y1, x0:x1].mean()
        assert inside < 0.2 if choose == "predicted" else inside > 0.8
    # Few at a time give the same.
    monkeypatch.setattr(box_masks, "DECODED_AT_ONCE", 2)
    monkeypatch.setattr(box_masks, "PIXELS_AT_ONCE", 1)
    assert segment_boxes(model, image, (height, width), boxes, choose) == found
    assert [len(points) for points, _ in model.asked_for] == [3, 2, 1]
    assert segment_boxes(model, image, (height, width), boxes[:0], choose) == []
    assert segment_boxes(model, image, (height, width), boxes[1:2], choose) == [found[1]]


def test_iou_with_a_box_is_that_of_regions():
    rng = np.random.default_rng(0)
    masks, boxes = rng.random((4, 3, 20, 30)) < 0.6, rng.uniform(-3, 25, (4, 4))
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(0, 12, (4, 2))
    found = iou_with_box(torch.from_numpy(masks), torch.from_numpy(boxes))
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        region = np.zeros((20, 30), bool)
        for row in range(20):
            for column in range(30):
                region[row, column] = x0 <= column + 0.5 < x1 and y0 <= row + 0.5 < y1
        for m in range(3):
            both, either = (masks[k, m] & region).sum(), (masks[k, m] | region).sum()
            assert found[k, m].item() == pytest.approx(both / either)


def test_masks_are_encoded_column_by_column():
    masks = np.random.default_rng(0).random((3, 20, 31)) < 0.4
    for mask, one in zip(masks, encode_masks(masks.transpose(0, 2, 1)), strict=True):
        assert (coco_mask.decode(one) == mask).all() and json.dumps(one)
    assert encode_masks(masks[:0]) == []


# -- a whole file ----------------------------------------------------------------------------------


def evaluate(monkeypatch, *words):
    argv = ["tools/evaluate.py", *map(str, words), "--workers=0", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    assert tools.evaluate.main() == 0


@pytest.mark.parametrize("choose", ["predicted", "box"])
def test_ap_of_a_model_is_pycocotools(choose, model, scene, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("--coco", scene / "annotations.json", "--images", scene)
    words += ("--boxes", scene / "boxes.json", "--choose", choose, "--out", out)
    evaluate(monkeypatch, model, *words)
    said = capsys.readouterr().out
    told = json.loads((scene / "annotations.json").read_text())
    boxes = json.loads((scene / "boxes.json").read_text())
    result = json.loads((out / "evaluation.json").read_text())
    report, found = result["instances"], json.loads((out / "instances.json").read_text())
    ours, filled = report["rows"]
    assert (ours["mask"], filled["mask"]) == (choose, "filled box") and result["results"] == []
    # The detector's categories and scores, in some order, and masks whose AP is theirs.
    keys = ("image_id", "category_id", "score")
    assert sorted([one[key] for key in keys] for one in found) == sorted(
        [one[key] for key in keys] for one in boxes
    )
    theirs = pycoco(told, found, "segm").stats[:6]
    assert list(ours["segm"].values()) == pytest.approx(theirs.tolist(), abs=1e-12)
    assert ours["boundary"]["AP"] <= ours["segm"]["AP"] < filled["segm"]["AP"]
    sizes = {image["id"]: (image["height"], image["width"]) for image in told["images"]}
    rectangles, model = [], load_model(model)
    for one in boxes:
        height, width = sizes[one["image_id"]]
        x, y, w, h = one["bbox"]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        sides = np.array([[x0, y0, max(x1 - x0, 0), y1 - y0]])
        runs_of = coco_mask.frPyObjects(sides, height, width)[0]
        rectangles.append(one | {"segmentation": runs_of})
    theirs = pycoco(told, rectangles, "segm").stats[:6]
    assert list(filled["segm"].values()) == pytest.approx(theirs.tolist(), abs=1e-12)
    assert list(report["box"].values()) == pytest.approx(pycoco(told, boxes, "bbox").stats[:6])
    outside = sum(not coco_mask.area(one["segmentation"]) for one in rectangles)
    assert report["outside"] == outside >= 1 and report["clipped"] >= 1
    assert report["boxes"] == len(boxes) and report["rules"] == "COCO" and report["images"] == 5
    # One box of each image by hand.
    for image in told["images"]:
        name, size = image["file_name"], sizes[image["id"]]
        own = [one for one in boxes if one["image_id"] == image["id"]]
        encoded = open_image((scene / name).read_bytes())
        pixels = framed(encoded, model.shape, size, "upright")
        x, y, w, h = own[-2]["bbox"]
        corners = np.array([[x, y, x + w, y + h]]).clip(0, [*size[::-1]] * 2)
        (mask,) = segment_boxes(model, pixels, size, corners, choose)
        masks = [one["segmentation"] for one in found if one["image_id"] == image["id"]]
        assert masks[-2] == mask
    for text in ("AP in %", "filled box", "the box, as box", "COCO's rules", "instances.json"):
        assert text in said
    assert "mIoU" not in said
    table = said.split("AP in %")[1].split("COCO's rules")[0]
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_lvis_and_samples_and_an_image_that_is_damaged(model, scene, tmp_path, monkeypatch, capsys):
    """LVIS's images lie in COCO's folders; with --samples those of the first images alone count."""
    words = ("--coco", scene / "lvis.json", "--images", scene, "--boxes", scene / "boxes.json")
    evaluate(monkeypatch, model, *words, "--out", tmp_path / "all", "--prompts", "box")
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "all" / "evaluation.json").read_text())
    report = result["instances"]
    assert report["rules"] == "LVIS" and {"APr", "APc", "APf"} <= report["rows"][0]["segm"].keys()
    assert "mIoU in %" in said and len(result["results"]) == 3
    evaluate(monkeypatch, model, *words, "--out", tmp_path / "two", "--samples=2")
    report = json.loads((tmp_path / "two" / "evaluation.json").read_text())["instances"]
    boxes = json.loads((scene / "boxes.json").read_text())
    told = json.loads((scene / "annotations.json").read_text())
    annotated = {one["image_id"] for one in told["annotations"]}
    first = sorted(told["images"], key=lambda image: image["file_name"])
    first = [image["id"] for image in first if image["id"] in annotated][:2]
    assert report["images"] == 2
    assert report["boxes"] == sum(one["image_id"] in first for one in boxes)

    other = tmp_path / "images"
    other.mkdir()
    for path in scene.glob("*.png"):
        (other / path.name).write_bytes(path.read_bytes())
    damaged = next(image for image in told["images"] if image["id"] == first[0])
    (other / damaged["file_name"]).write_bytes(b"x")
    words = ("--coco", scene / "annotations.json", "--images", other, "--boxes")
    words += (scene / "boxes.json", "--out", tmp_path / "out")
    evaluate(monkeypatch, model, *words)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())["instances"]
    assert report["unusable"] == {"not an image": 1} and report["images"] == 4
    told["images"].remove(damaged)
    told["annotations"] = [a for a in told["annotations"] if a["image_id"] != damaged["id"]]
    found = json.loads((tmp_path / "out" / "instances.json").read_text())
    theirs = pycoco(told, found, "segm").stats[:6].tolist()
    assert list(report["rows"][0]["segm"].values()) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.slow
def test_proposals_are_pycocotools(model, scene, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ("--coco", scene / "annotations.json", "--images", scene, "--proposals=4")
    evaluate(monkeypatch, model, *words, "--out", out)
    said = capsys.readouterr().out
    report = json.loads((out / "evaluation.json").read_text())["proposals"]
    told = json.loads((scene / "annotations.json").read_text())
    propose, ours, grid, counts = propose_by_clicks(load_model(model), 4), [], [], []
    for image in told["images"]:
        pixels = np.asarray(open_image((scene / image["file_name"]).read_bytes()).decode())
        found = propose(pixels)
        counts.append(len(found))
        given = {"image_id": image["id"], "category_id": 3}
        ours += [
            given | one | {"bbox": coco_mask.toBbox(one["segmentation"]).tolist()} for one in found
        ]
        grid += [given | one for one in propose_grid(len(found), *pixels.shape[:2])]
    annotated = {one["image_id"] for one in told["annotations"]}
    counts = [n for n, i in zip(counts, told["images"], strict=True) if i["id"] in annotated]
    assert report["mean"] == np.mean(counts) > 1 and report["images"] == len(counts)
    for row, found in zip(report["rows"], (ours, grid), strict=True):
        for kind in ("segm", "bbox"):
            theirs = pycoco(told, found, kind, useCats=0, maxDets=list(PROPOSALS)).eval["recall"]
            theirs = theirs[:, 0].mean(0)
            means = [info["mean"] for info in row[kind].values()]
            assert means == pytest.approx([*theirs[0], *theirs[1:, 2]], abs=1e-12)
    assert report["rows"][1]["bbox"]["AR@100"]["mean"] > 0
    for text in ("AR in %", "grid of boxes", "All masks of 4 x 4 clicks"):
        assert text in said


def test_proposals_of_clicks_are_not_filtered(model):
    """Appendix D.3: all masks but near duplicates, by the mean of predicted IoU and stability."""
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = propose_by_clicks(load_model(model), 3)(image)
    assert 3 < len(found) <= 27
    words = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 0.9}
    expected = MaskGenerator(load_model(model), 3, output_mode="coco_rle", **words).generate(image)
    assert [one["segmentation"] for one in found] == [one["segmentation"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == (other["predicted_iou"] + other["stability_score"]) / 2


class Yolo:
    """In FastSAM's place: three ellipses, with boxes that are not quite theirs."""

    @contextlib.contextmanager
    def limits(self, conf, max_det):
        self.limited = conf, max_det
        yield
        del self.limited

    def everything(self, image):
        assert self.limited == (0.001, 1000)
        size = image.shape[:2]
        masks = np.stack([ellipse(size, 60 + 30 * n, 50, 20, 12) for n in range(3)])
        boxes = torch.tensor([[40.0 + 30 * n, 38, 81 + 30 * n, 63] for n in range(3)])
        return Instances(torch.from_numpy(masks), boxes, torch.tensor([0.9, 0.5, 0.25]))


def test_fastsam_and_any_function_propose(scene, tmp_path):
    found = propose_by_fastsam(Yolo())(np.zeros((100, 200, 3), np.uint8))
    assert [one["score"] for one in found] == [pytest.approx(0.9), 0.5, 0.25]
    assert found[1]["bbox"] == [70, 38, 41, 25]
    assert found[1]["segmentation"] == runs(ellipse((100, 200), 90, 50, 20, 12))
    # The truth itself covers everything, and the grid does not.
    coco = read_coco(scene / "annotations.json")
    source, truth = CocoSource.of(coco, scene), Truth.of(coco)
    entries = iter(truth.annotations[path] for path, _ in source.entries)

    def propose(image):
        return [
            {"segmentation": one["segmentation"], "bbox": one["bbox"], "score": 1.0}
            for one in next(entries)
        ]

    words = {"seed": 0, "masks_drawn_on": "upright", "precision": "fp32", "workers": 0}
    asked = argparse.Namespace(**words)
    report = measure_proposals(propose, source, asked, torch.device("cpu"))
    ours, grid = report["rows"]
    for kind in ("segm", "bbox"):
        assert ours[kind]["AR@100"]["mean"] == 1 > grid[kind]["AR@100"]["mean"]


def test_of_many_proposals_the_best_stay(scene, monkeypatch):
    monkeypatch.setattr("finetune.proposals.PROPOSALS", (1,))
    source = CocoSource.of(read_coco(scene / "annotations.json"), scene)
    truth = Truth.of(source.coco)
    first = iter([truth.annotations[path][0] for path, _ in source.entries])

    def propose(image):
        nothing = {"segmentation": runs(np.zeros(image.shape[:2], bool)), "score": 0.1}
        return [nothing, {"segmentation": next(first)["segmentation"], "score": 0.9}]

    words = {"seed": 0, "masks_drawn_on": "upright", "precision": "fp32", "workers": 0}
    asked = argparse.Namespace(**words)
    report = measure_proposals(propose, source, asked, torch.device("cpu"))
    assert report["mean"] == 1 and report["rows"][0]["segm"]["AR@10"]["mean"] > 0


def test_the_grid_comes_in_its_order():
    found = propose_grid(30, 60, 80)
    scores = [one["score"] for one in found]
    assert len(found) == 30 and scores == sorted(set(scores), reverse=True)
    assert found[0]["bbox"] == [0, 0, 80, 60] and coco_mask.decode(found[0]["segmentation"]).all()
    for one in found:
        assert coco_mask.toBbox(one["segmentation"]).tolist() == pytest.approx(one["bbox"], abs=1)


def test_bad_input_is_one_sentence(model, scene, tmp_path):
    """By the program itself: images that are not there, and what goes with what."""
    few = tmp_path / "images"
    few.mkdir()
    for path in sorted(scene.glob("*.png"))[1:]:
        (few / path.name).write_bytes(path.read_bytes())
    coco, boxes = ("--coco", scene / "annotations.json"), ("--boxes", scene / "boxes.json")
    told = json.loads((scene / "annotations.json").read_text())
    told.pop("categories")
    (tmp_path / "bare.json").write_text(json.dumps(told))
    told = json.loads((scene / "annotations.json").read_text())
    for one in told["annotations"]:
        one["iscrowd"] = 1
    (tmp_path / "crowds.json").write_text(json.dumps(told))
    crowds = ("--coco", tmp_path / "crowds.json", "--images", scene)
    for words, says in (
        ((*coco, "--images", few, *boxes), "lacks 1 of the 5 images that --boxes has boxes for"),
        ((*coco, "--images", scene, "--boxes", tmp_path / "no.json"), "no.json cannot be read"),
        ((*coco, "--images", scene, "--proposals=0"), "--proposals 0 must be positive"),
        ((*crowds, *boxes), "no annotation of its 5 images is an object"),
        ((*crowds, "--proposals=2"), "no image has a usable annotation"),
        ((*coco, "--images", scene, *boxes, "--out", model), "is a file; name a folder"),
        (("--shards", "a.tar", *boxes), "--boxes and --proposals go with --coco"),
        (("--coco", tmp_path / "bare.json", "--images", scene, *boxes), "has no categories"),
    ):
        words = [str(ROOT / "tools/evaluate.py"), str(model), *map(str, words), "--workers=0"]
        done = run([sys.executable, *words])
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
