"""FastSAM: choosing among masks against slow references, the predictor, and reading its weights."""

import inspect
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import nn

from finetune.candidates import FastSamCandidate, open_candidate
from finetune.fastsam import FastSam, Instances, low_resolution
from finetune.selection import (
    select_by_box,
    select_by_points,
    select_by_text_scores,
    text_crops,
)
from finetune.yolo_weights import read_yolo
from sami.core.errors import UserError

HEIGHT, WIDTH = 12, 16


def rectangles(*corners):
    """Masks [N, 12, 16] of filled rectangles x0, y0, x1, y1."""
    masks = torch.zeros(len(corners), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def random_masks(rng, count):
    return torch.from_numpy(rng.random((count, HEIGHT, WIDTH)) < rng.uniform(0.1, 0.7))


# ---- The rules, pixel by pixel


def slow_points(masks, points, labels):
    areas = [sum(bool(v) for v in mask.flatten()) for mask in masks]
    result = [[False] * WIDTH for _ in range(HEIGHT)]
    for number in sorted(range(len(masks)), key=lambda n: -areas[n]):
        for (x, y), label in zip(points, labels, strict=True):
            if label in (0, 1) and 0 <= x < WIDTH and 0 <= y < HEIGHT:
                if masks[number][int(y)][int(x)]:
                    for row in range(HEIGHT):
                        for column in range(WIDTH):
                            if masks[number][row][column]:
                                result[row][column] = label == 1
    return torch.tensor(result)


def slow_box(masks, box):
    x0, y0, x1, y1 = (round(value) for value in box)
    best, chosen = 0.0, None
    for number, mask in enumerate(masks):
        common = union = 0
        for row in range(HEIGHT):
            for column in range(WIDTH):
                inside = x0 <= column < x1 and y0 <= row < y1
                common += inside and bool(mask[row][column])
                union += inside or bool(mask[row][column])
        if common / union > best:
            best, chosen = common / union, number
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_points_are_what_the_slow_rule_gives(seed):
    rng = np.random.default_rng(seed)
    masks, count = random_masks(rng, seed % 7), seed % 5
    points = rng.uniform(-2, 18, (count, 2))
    labels = rng.integers(-1, 2, count)
    mask, painted = select_by_points(masks, points, labels)
    assert torch.equal(mask, slow_points(masks, points.astype(np.float32), labels))
    assert not (mask & ~masks[painted].any(0)).any()
    assert torch.equal(select_by_points(masks.numpy(), points, labels)[0], mask)


@pytest.mark.parametrize("seed", range(20))
def test_a_box_chooses_what_the_slow_rule_does(seed):
    rng = np.random.default_rng(seed)
    low, high = rng.uniform(-3, 8, 2), rng.uniform(9, 20, 2)
    masks, box = random_masks(rng, seed % 6), [*low, *high]
    assert select_by_box(masks, box) == slow_box(masks, box)


NESTED = rectangles((0, 0, 16, 12), (2, 2, 12, 10), (4, 4, 8, 8))  # each in the one before


@pytest.mark.parametrize(
    ("points", "labels", "expected", "painted"),
    [
        ([(5, 5)], [1], NESTED[0], [0, 1, 2]),  # all that hold it, merged
        ([(3, 3)], [1], NESTED[0], [0, 1]),
        ([(5, 5), (15, 0)], [1, 0], NESTED[1], [1, 2]),  # the picture holds the background click
        ([(15, 0), (5, 5)], [0, 1], NESTED[0], [0, 1, 2]),  # the last click in a mask counts
        ([(5, 5), (3, 3)], [1, 0], NESTED[2], [2]),  # a smaller one paints again
        ([(0, 0), (5, 5)], [1, 0], torch.zeros_like(NESTED[0]), []),
        ([(15, 0), (5, 5)], [1, 0], torch.zeros_like(NESTED[0]), []),
        ([(5.9, 5.9)], [-1], torch.zeros_like(NESTED[0]), []),  # padding
        ([(16, 5)], [1], torch.zeros_like(NESTED[0]), []),  # outside
        (np.zeros((0, 2)), [], torch.zeros_like(NESTED[0]), []),
    ],
)
def test_points_by_hand(points, labels, expected, painted):
    mask, found = select_by_points(NESTED, points, labels)
    assert torch.equal(mask, expected) and found == painted


def test_a_background_click_leaves_a_hole():
    masks = rectangles((0, 0, 10, 10), (2, 2, 5, 5))
    mask, painted = select_by_points(masks, [(3, 3), (8, 8)], [0, 1])
    assert painted == [0] and torch.equal(mask, masks[0] & ~masks[1])


def test_a_box_by_hand():
    masks = rectangles((0, 0, 16, 12), (2, 2, 8, 8), (2, 2, 9, 8))
    assert select_by_box(masks, [2, 2, 8, 8]) == 1
    assert select_by_box(masks, [2.4, 1.6, 8.6, 8.4]) == 2  # rounded
    assert select_by_box(masks, [-5, -5, 99, 99]) == 0  # cut to the image
    assert select_by_box(rectangles((0, 0, 2, 2), (9, 0, 16, 9), (3, 3, 9, 9)), [3, 3, 9, 9]) == 2
    assert select_by_box(masks[1:], [12, 10, 16, 12]) is None
    assert select_by_box(masks[:0], [2, 2, 8, 8]) is None


def test_text_scores_choose_among_large_masks():
    masks = rectangles((0, 0, 10, 10), (0, 0, 11, 10), (0, 0, 16, 12))  # 100, 110 and 192 pixels
    assert select_by_text_scores(masks, [9.0, -3.0, -4.0]) == 1
    assert select_by_text_scores(masks, torch.tensor([9.0, 1.0, 2.0])) == 2
    assert select_by_text_scores(masks[:1], [9.0]) is None


def test_crops_are_white_outside_of_the_box():
    image = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    masks = rectangles((2, 3, 5, 9), (0, 0, 0, 0))
    masks[0, 4, 3] = False  # within the box the image is as it is
    first, second = text_crops(image, masks)
    assert (first[3:9, 2:5] == image[3:9, 2:5]).all() and (second == 255).all()
    first[3:9, 2:5] = 255
    assert (first == 255).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: select_by_points(NESTED, [(1, 1)], [1, 0]), "1 points came with 2 labels"),
        (lambda: select_by_points(NESTED, [(np.nan, 1)], [1]), "not all finite"),
        (lambda: select_by_points(NESTED[0], [(1, 1)], [1]), r"masks are \[N, H, W\], got \[12"),
        (lambda: select_by_box(NESTED, [8, 8, 2, 2]), "covers no pixel of an image of 16 x 12"),
        (lambda: select_by_box(NESTED, [20, 0, 30, 9]), "covers no pixel"),
        (lambda: select_by_box(NESTED, [1, 2, 3]), "a box is x0, y0, x1, y1"),
        (lambda: select_by_text_scores(NESTED, [1.0, 2.0]), "2 text scores came for 3 masks"),
        (lambda: select_by_text_scores(NESTED, [1, 2, np.inf]), "not all finite"),
    ],
)
def test_bad_prompts_are_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()


# ---- The predictor, with instances that are known


class Known:
    """In place of ultralytics' predictor: NESTED, with confidences; remembers what it was given."""

    device, model = torch.device("cpu"), nn.Conv2d(3, 4, 8, stride=8)

    def __init__(self, masks=NESTED):
        self.masks, self.given = masks, None

    def __call__(self, images):
        (self.given,), count = images, len(self.masks)
        data = self.masks.to(torch.uint8)
        scores = torch.tensor([0.9, 0.5, 0.7])[:count]
        boxes = types.SimpleNamespace(xyxy=torch.zeros(count, 4), conf=scores)
        masks = types.SimpleNamespace(data=data) if count else None
        return [types.SimpleNamespace(boxes=boxes, masks=masks)]


IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def predictor():
    model = FastSam(Known())
    model.set_image(IMAGE)
    return model


def test_it_is_called_as_sams_predictor_is():
    for name in ("predict", "predict_torch", "set_image"):
        own = inspect.signature(getattr(FastSam, name)).parameters
        theirs = inspect.signature(getattr(SamPredictor, name)).parameters
        assert list(own) == list(theirs)
        assert [one.default for one in own.values()] == [one.default for one in theirs.values()]


def test_what_predict_returns(predictor):
    masks, scores, low = predictor.predict(np.array([[5, 5], [15, 0]]), np.array([1, 0]))
    assert masks.dtype == bool and masks.shape == (1, HEIGHT, WIDTH)
    assert (masks[0] == NESTED[1].numpy()).all()
    assert scores.tolist() == pytest.approx([0.5])  # the lowest of the two that are in it
    assert low.shape == (1, 256, 256) and low.dtype == np.float32
    logits = predictor.predict(box=np.array([4, 4, 8, 8]), return_logits=True)[0]
    assert ((logits[0] > 0) == NESTED[2].numpy()).all()
    nothing, score, low = predictor.predict(np.array([[0, 0]]), np.array([0]))
    assert not nothing.any() and score == 0 and (low < 0).all()
    mask, score = predictor.predict_text([0, 5, 9])
    assert mask.all() and score == pytest.approx(0.9)  # the others have too few pixels


def test_many_prompts_at_once_are_the_same_one_by_one(predictor):
    """As code for SamPredictor does it, through ``transform``."""
    rng = np.random.default_rng(1)
    points, labels = rng.integers(0, 12, (40, 3, 2)), rng.integers(0, 2, (40, 3))
    frame = predictor.transform.apply_coords_torch(torch.from_numpy(points), IMAGE.shape[:2])
    found = predictor.predict_torch(frame, torch.from_numpy(labels))
    for number in range(40):
        one = predictor.predict(points[number], labels[number])
        for many, single in zip(found, one, strict=True):
            assert (many[number].numpy() == single).all()
    stripes = torch.arange(WIDTH) == torch.arange(WIDTH)[:, None]  # column n alone in mask n
    for side in (100, 500, 999, 1024):
        model = FastSam(Known(), image_size=side)
        model.set_image(IMAGE)
        model.instances = Instances(
            stripes[:, None].expand(-1, HEIGHT, -1), torch.zeros(WIDTH, 4), torch.ones(WIDTH)
        )
        clicks = torch.stack([torch.arange(WIDTH), torch.full((WIDTH,), 5)], 1)[:, None]
        frame = model.transform.apply_coords_torch(clicks, IMAGE.shape[:2])
        masks, _, _ = model.predict_torch(frame, torch.ones(WIDTH, 1))
        assert torch.equal(masks[:, 0], model.instances.masks)
    boxes = np.array([[2, 2, 12, 10], [4, 4, 8, 8]])
    frame = predictor.transform.apply_boxes_torch(torch.from_numpy(boxes), IMAGE.shape[:2])
    masks, scores, low = predictor.predict_torch(None, None, frame)
    assert torch.equal(masks[:, 0], NESTED[1:]) and low.shape == (2, 1, 256, 256)
    assert scores.flatten().tolist() == pytest.approx([0.5, 0.7])


def test_a_click_stays_on_its_pixel():
    """There and back through SAM's frame in fp32, where the two scales are no exact numbers."""
    height, width = 3, 214  # without rounding 82 clicks of 214 go astray
    columns = torch.eye(width, dtype=torch.bool)[:, None].expand(-1, height, -1)  # one each
    model = FastSam(Known(columns[:3]))
    model.set_image(np.zeros((height, width, 3), np.uint8))
    model.instances = Instances(columns, torch.zeros(width, 4), torch.ones(width))
    clicks = torch.stack([torch.arange(width), torch.ones(width).long()], 1)[:, None]
    frame = model.transform.apply_coords_torch(clicks, (height, width))
    masks, _, _ = model.predict_torch(frame, torch.ones(width, 1))
    assert torch.equal(masks[:, 0], columns)


def test_channels_reach_the_library_as_bgr():
    model = FastSam(Known())
    model.set_image(IMAGE)
    assert (model._segmenter.given == IMAGE[..., ::-1]).all()
    model.set_image(IMAGE, "BGR")
    assert (model._segmenter.given == IMAGE).all()
    assert model.is_image_set and model.original_size == (HEIGHT, WIDTH)
    model.reset_image()
    assert not model.is_image_set


def test_an_image_without_instances():
    model = FastSam(Known(NESTED[:0]))
    model.set_image(IMAGE)
    assert model.instances.masks.shape == (0, HEIGHT, WIDTH)
    for prompt in ({"box": [1, 1, 5, 5]}, {"point_coords": [[1, 1]], "point_labels": [1]}):
        masks, scores, _ = model.predict(**prompt)
        assert masks.shape == (1, HEIGHT, WIDTH) and not masks.any() and scores == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.predict(), "points or a box"),
        (lambda model: model.predict([[1, 1]], [1], [0, 0, 2, 2]), "no rule for both"),
        (lambda model: model.predict([[1, 1]]), "point_coords need point_labels"),
        (lambda model: model.predict(box=[0, 0, 2, 2], mask_input=1), "no earlier masks"),
        (lambda model: model.predict_torch(None, None), "give points or boxes"),
        (lambda model: model.predict_text([1.0]), "1 text scores came for 3 masks"),
        (lambda model: model.set_image(IMAGE / 255), r"uint8 \[height, width, 3\], got float64"),
        (lambda model: model.set_image(IMAGE[..., 0]), r"got uint8 \[12, 16\]"),
        (lambda model: model.set_image(IMAGE, "HSV"), "RGB or BGR"),
        (lambda model: FastSam(Known()).predict(box=[0, 0, 2, 2]), "call set_image"),
        (lambda model: FastSam.load("x.pt", conf=2), "conf 2 must be within 0..1"),
        (lambda model: FastSam.load("x.pt", max_det=0), "max_det 0 must be positive"),
    ],
)
def test_what_the_predictor_refuses(predictor, call, says):
    with pytest.raises(UserError, match=says):
        call(predictor)


def test_low_resolution_logits_lie_in_sams_frame():
    mask = torch.zeros(600, 300, dtype=torch.bool)
    mask[300:, :150] = True
    low = low_resolution(mask)
    assert low.shape == (256, 256) and (low[128:, :64] > 0).all()
    assert (low[:128] < 0).all() and (low[:, 64:] < 0).all()


# ---- The weights


class Hostile:
    """Unpickled, it would call what it is given."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("side", ["model", "ema"])
def test_tensors_are_read_without_the_classes(tmp_path, side):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4))).half()
    torch.save({"epoch": 3, "ema": None, "model": None} | {side: module}, tmp_path / "a.pt")
    found = read_yolo(tmp_path / "a.pt")
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.float().state_dict().items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_nothing_in_a_file_is_executed(tmp_path):
    target = tmp_path / "made"
    model = nn.Linear(2, 2)
    model.extra = Hostile(eval, f"open({str(target)!r}, 'w')")
    model.more = Hostile(subprocess.call, ["touch", str(target)])
    torch.save({"model": model}, tmp_path / "a.pt")
    assert torch.equal(read_yolo(tmp_path / "a.pt")["weight"], model.weight)
    assert not target.exists()
    for name, call in (
        ("b.pt", Hostile(os.system, f"touch {target}")),
        ("c.pt", Hostile(target.mkdir)),
    ):
        model.more = call
        torch.save({"model": model}, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} asks to run code that no model needs"):
            read_yolo(tmp_path / name)
        assert not target.exists()


def test_a_hole_in_a_file_is_noticed(tmp_path):
    """torch would read zeros."""
    model = nn.Linear(64, 64)
    torch.save({"model": model}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    part = model.weight.detach().numpy().tobytes()[:4096]
    assert data.count(part) == 1
    (tmp_path / "a.pt").write_bytes(data.replace(part, bytes(4096)))
    with pytest.raises(UserError, match="a checksum is wrong"):
        read_yolo(tmp_path / "a.pt")


def test_files_that_are_no_such_weights(tmp_path):
    (tmp_path / "page.pt").write_text("<!doctype html>")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"model": Hostile(dict, [("a", 1)]), "args": slice(3)}, tmp_path / "none.pt")
    for name, says in (
        ("page.pt", "is a web page"),
        ("cut.pt", "cut short"),
        ("none.pt", "holds no model of ultralytics"),
        ("gone.pt", "does not exist"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            FastSam.load(tmp_path / name)
        assert "FastSAM-x.pt" in str(caught.value)


def test_without_the_package_its_licence_is_named(tmp_path, monkeypatch):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(UserError, match=r"AGPL-3.0.*pip install -e '.\[fastsam\]'"):
        FastSam.load(tmp_path / "a.pt")


# ---- With ultralytics


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    """The package, with its settings out of the way; skips where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("YOLO_OFFLINE", "true")
        yield pytest.importorskip(
            "ultralytics", reason="ultralytics is not installed (pip install -e '.[fastsam]')"
        )


def make_yolo(kind="SegmentationModel", name="yolov8n-seg.yaml", **changes):
    """A random YOLOv8 that is sure of many things."""
    from ultralytics.nn import tasks

    torch.manual_seed(0)
    definition = tasks.yaml_model_load(name) | {"nc": 1} | changes
    module = getattr(tasks, kind)(definition, verbose=False)
    for norm in (one for one in module.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.momentum = 1.0
    module(torch.rand(2, 3, 96, 96))  # without the statistics of data all activations vanish
    for branch in module.model[-1].cv3:
        nn.init.normal_(branch[-1].weight, std=0.5)
        nn.init.zeros_(branch[-1].bias)
    return module.eval()


@pytest.mark.parametrize("bins", [16, 26])
def test_everything_is_what_the_library_finds(ultralytics, tmp_path, bins):
    """Its own predictor, with the module itself, against ours from the file."""
    from ultralytics.models.yolo.segment import SegmentationPredictor

    module = make_yolo(reg_max=bins)
    torch.save({"model": module}, tmp_path / "yolo.pt")
    image = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    model = FastSam.load(tmp_path / "yolo.pt", image_size=128)
    found = model.everything(image)
    settings = {"conf": 0.4, "iou": 0.9, "imgsz": 128, "max_det": 100, "retina_masks": True}
    theirs = SegmentationPredictor(overrides=settings | {"save": False, "verbose": False})
    (expected,) = theirs(np.ascontiguousarray(image[..., ::-1]), model=module)
    assert len(expected) > 5 and found.masks.shape == (len(expected), 96, 150)
    assert torch.equal(found.masks, expected.masks.data.bool())
    assert torch.equal(found.boxes, expected.boxes.xyxy)
    assert torch.equal(found.scores, expected.boxes.conf)
    with model.limits(conf=0.001, max_det=7):
        assert len(model.everything(image).scores) == 7
    assert torch.equal(model.everything(image).scores, found.scores)
    model.set_image(image)
    y, x = found.masks[0].nonzero()[0].tolist()
    masks, scores, _ = model.predict(np.array([[x, y]]), np.array([1]))
    assert masks[0][found.masks[0].numpy()].all() and 0.4 < scores[0] <= found.scores[0]


def test_it_stands_in_a_comparison(ultralytics, tmp_path):
    """What tools/compare.py asks, of the package itself."""
    torch.save({"model": make_yolo()}, tmp_path / "yolo.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + threads)  # ultralytics would set its own
    try:
        model = open_candidate(tmp_path / "yolo.pt", "", torch.device("cpu"))
        assert torch.get_num_threads() == 1 + threads
    finally:
        torch.set_num_threads(threads)
    assert isinstance(model, FastSamCandidate) and model.model.transform.target_length == 1024
    costs = model.count()  # YOLOv8n-seg of one class has 3.26 M
    assert costs["parameters"] == sum(p.numel() for p in make_yolo().parameters())
    small = FastSamCandidate(FastSam.load(tmp_path / "yolo.pt", image_size=128))
    assert costs["encoder_macs"] == 64 * small.count()["encoder_macs"] > 1e10
    image = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    one, several = (small.first_step(small.inputs(image, count)) for count in (1, 3))
    assert len(one.masks) > 5 and one.masks.shape[1:] == (82, 128)
    assert torch.equal(one.masks, several.masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small.first_step(small.inputs(image, 1)).boxes, one.boxes)
    found = small.everything(image, 4)
    small.model.set_image(image)
    assert found == len(small.model.instances.masks) > 5
    mask, _ = small.click(one)
    assert mask.shape == (82, 128) and mask.any()


def test_weights_of_another_model(ultralytics, tmp_path):
    torch.save({"model": make_yolo("DetectionModel", "yolov8n.yaml")}, tmp_path / "boxes.pt")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "other.pt")
    module = make_yolo()
    module.model[4] = nn.Identity()
    torch.save({"model": module}, tmp_path / "part.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    for name, says in (
        ("boxes.pt", "is a YOLOv8 without masks"),
        ("other.pt", "holds another model than YOLOv8"),
        ("plain.pt", "holds another model than YOLOv8"),
        ("part.pt", "does not fit YOLOv8n-seg: 4.cv1.conv.weight is missing"),
    ):
        with pytest.raises(UserError, match=says):
            FastSam.load(tmp_path / name)
