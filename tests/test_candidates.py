"""What a comparison asks of FastSAM, of SAM's kin, and of the machine's memory."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import finetune.speed as speed
from finetune.candidates import FastSamCandidate, open_candidate, require_package
from finetune.evaluation import EvalSample, paint
from finetune.fastsam import FastSam
from finetune.losses import mask_iou
from finetune.prompting import PromptSpec, centre_of, correction_clicks
from finetune.rle import box
from finetune.selection import select_by_box, select_by_points
from finetune.yolo_weights import is_yolo
from sami.core.errors import UserError
from sami.core.memory import forget_highest, held, highest, is_counted

CPU = torch.device("cpu")
HEIGHT, WIDTH = 24, 36
IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


class Bands:
    """In place of ultralytics' predictor: masks that follow from the image's colours."""

    device, model = CPU, nn.Conv2d(3, 4, 8, stride=8)

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        assert not torch.is_autocast_enabled("cpu")  # boxes would be rounded
        self.batches.append(len(images))
        found = []
        for image in images:
            blue = torch.from_numpy(image[..., 0].copy())
            masks = torch.stack([blue > 60, blue < 120, blue > 200, blue < 30])
            scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
            boxes = types.SimpleNamespace(xyxy=torch.zeros(4, 4), conf=scores)
            data = types.SimpleNamespace(data=masks.to(torch.uint8))
            found.append(types.SimpleNamespace(boxes=boxes, masks=data))
        return found


def sample_of(masks):
    """An image with these objects, bool [K, H, W]: clicks on their first pixels."""
    ends, clicks = [], []
    for mask in masks:
        line = mask.T.ravel()
        ends.append(np.append(np.flatnonzero(np.diff(line, prepend=False)), len(line)))
        assert (paint(ends[-1], HEIGHT, WIDTH) == mask).all()
        rows, columns = mask.nonzero()
        clicks.append([(columns[0], rows[0]), (columns[-1], rows[-1]), (columns[5], rows[5])])
    return EvalSample(
        "image",
        torch.from_numpy(IMAGE.transpose(2, 0, 1).copy()),
        (HEIGHT, WIDTH),
        ends,
        torch.tensor([box(one, HEIGHT) for one in ends], dtype=torch.float32),
        torch.tensor(np.array(clicks, np.float32))[None],
        torch.tensor([centre_of(mask) for mask in masks], dtype=torch.float32),
    )


SPECS = tuple(
    spec for word in ("box", "1", "3", "centre-1", "centre-4") for spec in PromptSpec.parse(word, 1)
)


def objects():
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    masks[0, 2:10, 3:20], masks[1, 12:20, 15:30], masks[2, 5:23, 1:9] = True, True, True
    return masks


def expected(instances, mask, clicks, centre, spec):
    """FastSAM's answer, step by step."""
    truth = torch.from_numpy(mask)
    if spec.kind == "box":
        rows, columns = mask.nonzero()
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        number = select_by_box(instances, corners)
        return torch.zeros_like(truth) if number is None else instances[number]
    if spec.kind == "random":
        return select_by_points(instances, clicks[: spec.clicks], [1] * spec.clicks)[0]
    points, labels = [centre], [1]
    places = torch.arange(float(WIDTH)).expand(1, 2, -1)
    while True:
        found = select_by_points(instances, points, labels)[0]
        if len(points) == spec.clicks:
            return found
        wrong = correction_clicks(found[None, None], truth[None, None], places, True)
        points.append(tuple(wrong[0].flatten().tolist()))
        labels.append(int(wrong[1]))


def test_fastsam_is_scored_by_its_own_rules():
    masks = objects()
    sample, model = sample_of(masks), FastSamCandidate(FastSam(Bands(), image_size=32))
    assert model.shape.frame(HEIGHT, WIDTH) == (HEIGHT, WIDTH)  # it resizes by itself
    (known,) = FastSam(Bands()).find([IMAGE])
    iou, found = model.score(sample, SPECS), list(model.masks(sample, SPECS))
    assert iou.shape == (len(SPECS), 1, 3) and iou.dtype == torch.float64
    corrected = 0
    for number, spec in enumerate(SPECS):
        assert found[number].shape == (3, HEIGHT, WIDTH) and found[number].dtype == torch.bool
        for place, mask in enumerate(masks):
            clicks = sample.clicks[0, place].tolist()
            right = expected(known.masks, mask, clicks, centre_of(mask), spec)
            assert torch.equal(found[number][place], right)
            own = mask_iou(right, torch.from_numpy(mask))
            assert iou[number, 0, place] == own
            corrected += spec.clicks == 4 and not torch.equal(right, found[number - 1][place])
    assert corrected > 0


def test_fastsam_does_the_first_step_once_for_an_image():
    segmenter = Bands()
    model = FastSamCandidate(FastSam(segmenter, image_size=64))
    model.score(sample_of(objects()), SPECS)
    assert segmenter.batches == [1]
    list(model.masks(sample_of(objects()), SPECS))
    assert segmenter.batches == [1, 1]
    (image, other) = model.inputs(IMAGE, 2)  # as large as the network takes it
    assert image.shape == (43, 64, 3) and (other == image).all()
    found = model.first_step([image, other])
    with torch.autocast("cpu", torch.bfloat16):
        model.first_step([image])
    assert segmenter.batches == [1, 1, 2, 1] and found.masks.shape == (4, 43, 64)
    mask, _ = model.click(found)
    assert torch.equal(mask, select_by_points(found.masks, [[32, 21.5]], [1])[0])


def test_fastsams_costs():
    """Its stand-in is a convolution of 8 x 8 from 3 to 4 channels."""
    costs = FastSamCandidate(FastSam(Bands(), image_size=64, parameters=772)).count()
    assert costs == {
        "parameters": 772,
        "encoder_parameters": 772,
        "encoder_macs": 8 * 8 * 4 * 3 * 64,
        "decoder_macs": 0,
    }


def test_everything_without_a_grid_is_timed_once():
    segmenter = Bands()
    model = FastSamCandidate(FastSam(segmenter))
    found = speed.time_everything(model, IMAGE, [4, 8, 16])
    assert len(segmenter.batches) == 2  # one did not count
    assert found.keys() == {"4", "8", "16"} and found["4"] == found["16"]
    assert found["4"]["masks"] == 4 and found["4"]["ms"] > 0
    sides = []
    grid = types.SimpleNamespace(
        uses_grid=True, everything=lambda _, side: sides.append(side) or side
    )
    found = speed.time_everything(grid, IMAGE, [4, 8])
    assert sides == [1, 4, 8] and [one["masks"] for one in found.values()] == [4, 8]


def test_the_best_batch(monkeypatch):
    """Doubled as long as it brings 5 %: 1, 1.9, 3.6 and then 3.7 images in the time of one."""
    seconds = {1: 1.0, 2: 2 / 1.9, 4: 4 / 3.6, 8: 8 / 3.7}
    model = types.SimpleNamespace(
        inputs=lambda image, count: count, first_step=lambda count: count, click=lambda found: 0
    )

    def took(call, rounds, device):
        return seconds.get(call(), 0.5)

    monkeypatch.setattr(speed, "_seconds", took)
    found = speed.time_steps(model, IMAGE, CPU, False, 3)
    assert found["batch"] == 4 and found["images_per_second"] == pytest.approx(3.6)
    assert found["encoder_ms"] == 1000 and found["decoder_ms"] == 500


# ---- Files of ultralytics


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A file that names ultralytics' class, which is not installed."""
    module = types.ModuleType("ultralytics.nn.tasks")
    module.SegmentationModel = type(
        "SegmentationModel", (nn.Linear,), {"__module__": module.__name__}
    )
    with monkeypatch.context() as patch:
        for name in ("ultralytics", "ultralytics.nn", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"model": module.SegmentationModel(2, 2)}, tmp_path / "FastSAM.pt")
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    return tmp_path / "FastSAM.pt"


def test_a_file_of_ultralytics_is_recognised(pickled, tmp_path):
    assert is_yolo(pickled)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "other.pt")
    torch.save(
        nn.Linear(2, 2).state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    (tmp_path / "text.pt").write_text("ultralytics.nn.tasks")
    for name in ("plain.pt", "other.pt", "old.pt", "text.pt"):
        assert not is_yolo(tmp_path / name)
        require_package(tmp_path / name, "row 'a':")


def test_without_its_package_the_row_is_named(pickled):
    for call in (
        lambda: require_package(pickled, "row 'FastSAM':"),
        lambda: open_candidate(pickled, "row 'FastSAM':", CPU),
    ):
        with pytest.raises(UserError, match=r"row 'FastSAM': .*pip install -e '.\[fastsam\]'"):
            call()


# ---- Memory

counted = pytest.mark.skipif(not is_counted(CPU), reason="only Linux counts a process's memory")


@counted
def test_the_highest_is_what_was_held_at_once():
    before = held(CPU)
    forget_highest(CPU)
    torch.ones(50_000_000)  # 0.2 GB, which are given back at once
    assert 0.19 < highest(CPU) - before < 0.3
    forget_highest(CPU)
    assert highest(CPU) - before < 0.1


@pytest.mark.slow
@counted
def test_what_reading_takes_in_passing_does_not_count(monkeypatch):
    """Kept are 0.1 GB, the first step takes 0.2 more, and reading took 0.6 for a moment."""

    def opened(path, option, device):
        torch.ones(150_000_000)
        kept = torch.ones(25_000_000)
        return types.SimpleNamespace(
            inputs=lambda image, count: kept,
            first_step=lambda kept: torch.ones(50_000_000).sum(),
            click=lambda found: found,
        )

    monkeypatch.setattr(speed, "open_candidate", opened)
    threads = torch.get_num_threads()
    found = speed._peak_memory("a.pt", "", IMAGE, CPU, False, threads)
    assert 0.29 < found < 0.4
    monkeypatch.setattr(speed, "is_counted", lambda device: False)
    assert speed.peak_memory("a.pt", "", IMAGE, CPU, False) is None
