"""All masks of an image, against segment_anything's own generator and its resizing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator as Theirs
from segment_anything.utils.amg import (
    batched_mask_to_box,
    calculate_stability_score,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import everything, full_size
from finetune.everything import MaskGenerator
from finetune.full_size import Enlarger, run_ends
from finetune.rle import decode_counts
from finetune.sam import ModelShape, Sam
from sami.core.errors import UserError
from sami.encoders.protocol import EncoderShape
from tests.runs import ROOT, command, run

NARROW = EncoderShape(width=32, depth=1, heads=2, image_size=128, channels=64)
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
HEADS = pytest.mark.parametrize("kind", ["efficientsam", "sam"])
RESIZES = pytest.mark.parametrize("resize", ["square", "longest"])
SIZES = [(300, 450), (451, 200), (60, 90), (20, 33), (1, 70), (128, 128), (96, 97)]
ALL = {"points_per_side": 4, "pred_iou_thresh": 0, "stability_score_thresh": 0}


def lively(kind="efficientsam", resize="square"):
    """A model whose prompts matter; logits of some -5 to 5, predicted IoU about 1."""
    torch.manual_seed(0)
    model = Sam(ModelShape(NARROW, kind, resize)).eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    for network in model.mask_decoder.output_hypernetworks_mlps:
        for parameter in list(network.parameters())[-2:]:
            parameter.data.mul_(10)
    list(model.mask_decoder.iou_prediction_head.parameters())[-1].data.add_(1)
    return model


def drawn_logits(kind, samples=32):
    """Logits [samples, samples] of a kind of mask."""
    torch.manual_seed(1)
    y, x = torch.meshgrid(torch.arange(samples), torch.arange(samples), indexing="ij")
    disc = 9.3 - torch.hypot(x - 12.4, y - 17.7)
    return {
        "disc": disc,
        "ring": 3 - (disc - 4).abs(),
        "corner": 6.2 - x - 0.5 * y,
        "steep": torch.where(disc > 0, 40.0, -1.5),  # bicubic overshoots beside an edge
        "speck": torch.where((x == 20) & (y == 5), 2.0, -3.0),
        "smooth": 4 * F.interpolate(torch.randn(1, 1, 5, 5), (samples,) * 2, mode="bicubic")[0, 0],
        "noise": torch.randn(samples, samples),
        "none": torch.full((samples, samples), -7.0),
        "all": torch.full((samples, samples), 7.0),
        "even": torch.full((samples, samples), 0.5),
    }[kind]


@pytest.mark.parametrize("size", SIZES)
@RESIZES
@pytest.mark.parametrize(
    "kind",
    ["disc", "ring", "corner", "steep", "speck", "smooth", "noise", "none", "all", "even"],
)
def test_the_outline_alone_gives_the_mask_of_all_pixels(kind, resize, size, monkeypatch):
    monkeypatch.setattr(full_size, "CELLS", 100)  # more than one piece
    model = lively(resize=resize)
    logits = drawn_logits(kind)
    whole = model.postprocess_masks(logits[None, None], model.shape.frame(*size), size)[0]
    frame = None if resize == "square" else model.shape.frame(*size)
    enlarger = Enlarger(32, size, frame, 128)
    wanted = (whole > 0.25)[0]
    stability = float(calculate_stability_score(whole, 0.25, 0.9))
    for noisy in (0.25, 2.0, -1.0):  # as it comes, the outline alone, all pixels
        monkeypatch.setattr(full_size, "NOISY", noisy)
        found = enlarger.paint(logits, 0.25, 0.9, 0)
        ends = found.packed().ends(0, 0, *size)
        counts = np.diff(ends, prepend=0).tolist()
        mask = rle_to_mask({"size": size, "counts": counts})
        near = (whole[0] - 0.25).abs() < 1e-4  # may round to either side
        assert ((mask == wanted.numpy()) | near.numpy()).all()
        assert found.stability == pytest.approx(stability, abs=2 / max(1, mask.sum()), nan_ok=True)
        if not near.any():
            assert counts == mask_to_rle_pytorch(wanted[None])[0]["counts"]
            assert list(found.box()) == batched_mask_to_box(wanted[None])[0].tolist()
        assert enlarger.paint(logits, 0.25, 0.9, 1.01) is None


def test_outlines_alone_are_computed(monkeypatch):
    """Of a disc over a tenth of the image, few cells are open."""
    enlarger = Enlarger(256, (600, 900), None, 1024)
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    seen = []
    bmm = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append(a.shape) or bmm(a, b))
    enlarger.paint(45 - torch.hypot(x - 100.0, y - 90.0), 0, 1, 0.5)
    assert 0 < sum(shape[0] for shape in seen) / 2 < 0.06 * 256**2


@pytest.mark.parametrize("turn", range(20))
def test_run_ends_are_the_packages(turn):
    rng = np.random.default_rng(turn)
    height, width = rng.integers(1, 9, 2).tolist()
    top, left = int(rng.integers(height)), int(rng.integers(width))
    part = rng.random((width - left, height - top)) < [0.5, 0.9, 0.1, 1.1][turn % 4]
    whole = np.zeros((height, width), bool)
    whole[top:, left:] = part.T
    wanted = mask_to_rle_pytorch(torch.from_numpy(whole)[None])[0]["counts"]
    assert np.diff(run_ends(part, left, top, height, width), prepend=0).tolist() == wanted


def compare(model, image=IMAGE, **words):
    """Both generators' results, which must be the same; ours."""
    theirs = Theirs(model, **words).generate(image)
    ours = MaskGenerator(model, **words).generate(image)
    assert len(theirs) == len(ours) > 0
    for wanted, found in zip(theirs, ours, strict=True):
        assert wanted.keys() == found.keys()
        a, b = (painted(one["segmentation"]) for one in (wanted, found))
        assert a.shape == b.shape == image.shape[:2] and a.dtype == b.dtype
        assert (a & b).sum() >= 0.999 * (a | b).sum()
        assert found["area"] == b.sum() == pytest.approx(wanted["area"], abs=2)
        assert found["bbox"] == pytest.approx(wanted["bbox"], abs=1)
        for name, most in (("predicted_iou", 1e-5), ("stability_score", 2e-3)):
            assert found[name] == pytest.approx(wanted[name], abs=most, nan_ok=True)
        assert found["crop_box"] == wanted["crop_box"]
        assert found["point_coords"] == wanted["point_coords"]
        for name, value in wanted.items():
            assert type(found[name]) is type(value), name
    return ours


def painted(segmentation):
    if isinstance(segmentation, np.ndarray):
        return segmentation
    assert set(segmentation) == {"size", "counts"}
    if isinstance(segmentation["counts"], list):
        return rle_to_mask(segmentation)
    ends = decode_counts(segmentation["counts"], *segmentation["size"])
    return rle_to_mask(segmentation | {"counts": np.diff(ends, prepend=0)})


@HEADS
@RESIZES
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"output_mode": "uncompressed_rle", "points_per_batch": 3},
        {"output_mode": "coco_rle", "box_nms_thresh": 0.3},
        {"crop_n_layers": 1, "crop_nms_thresh": 0.5, "crop_overlap_ratio": 0.2},
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2},
        {"points_per_side": None, "point_grids": [np.array([[0.2, 0.3], [0.9, 0.5]])]},
        {"stability_score_thresh": 0.6, "stability_score_offset": 0.3},
    ],
    ids=lambda words: "-".join(words) or "plain",
)
def test_the_same_as_segment_anythings(kind, resize, words):
    model = lively(kind, resize)
    compare(model, **ALL | words)


@pytest.mark.slow
def test_thresholds_leave_the_same(monkeypatch):
    """Some masks stay and some go, whatever their size at low resolution."""
    monkeypatch.setattr(everything, "SMALL", 0)
    monkeypatch.setattr(everything, "ON_CPU", 3)
    for kind in ("efficientsam", "sam"):
        model = lively(kind)
        words = ALL | {"box_nms_thresh": 1.0, "stability_score_offset": 0.3}
        found = MaskGenerator(model, **words).generate(IMAGE)
        for share in (0.3, 0.7):
            iou, stable = (
                float(np.quantile([one[name] for one in found], share))
                for name in ("predicted_iou", "stability_score")
            )
            assert len(compare(model, **words | {"pred_iou_thresh": iou})) < len(found)
            few = compare(model, **words | {"stability_score_thresh": stable})
            assert len(few) < len(found)


def test_masks_that_nobody_wants_are_not_drawn(monkeypatch):
    model = lively()
    drawn = []
    draw = model.mask_decoder.draw
    monkeypatch.setattr(
        model.mask_decoder, "draw", lambda *given: drawn.append(len(given[0])) or draw(*given)
    )
    assert MaskGenerator(model, 4, pred_iou_thresh=100).generate(IMAGE) == []
    assert drawn == []
    MaskGenerator(model, **ALL).generate(IMAGE)
    assert sum(drawn) == 16 and max(drawn) <= everything.ON_CPU


class Sizes(TorchDispatchMode):
    """Keeps the size of the largest array of floats that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                self.largest = max(self.largest, one.numel())
        return made


@pytest.mark.slow
@RESIZES
def test_no_floats_have_the_size_of_the_image(resize):
    image = np.tile(IMAGE, (15, 15, 1))
    pixels = image.shape[0] * image.shape[1]
    generators = [kind(lively(resize=resize), **ALL) for kind in (MaskGenerator, Theirs)]
    largest = []
    for generator in generators:
        with Sizes() as sizes:
            assert generator.generate(image)
        largest.append(sizes.largest)
    assert largest[0] < pixels / 2 and largest[1] >= pixels


def components(mask, connectivity):
    """OpenCV's ``connectedComponentsWithStats``, of which the package reads labels and areas."""
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    stats = np.bincount(regions.ravel(), minlength=count + 1)[:, None]
    return count + 1, regions, stats, None


def test_small_regions(monkeypatch):
    opencv = SimpleNamespace(connectedComponentsWithStats=components)
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    rng = np.random.default_rng(0)
    for least in (1, 3, 9, 5000):
        for _ in range(5):
            mask = ndimage.zoom(rng.random((12, 17)), 3, order=1) > 0.5
            for mode, ours in (("holes", everything._fill), ("islands", everything._drop_islands)):
                wanted, changed = remove_small_regions(mask, least, mode)
                found = mask.copy()
                assert ours(found, least) == changed and np.array_equal(found, wanted)
    for kind in ("efficientsam", "sam"):
        plain = MaskGenerator(lively(kind), **ALL).generate(IMAGE)
        found = compare(lively(kind), **ALL, min_mask_region_area=40)
        assert [one["area"] for one in plain] != [one["area"] for one in found]


def test_what_cannot_be_is_said():
    model = lively()
    for words, said in (
        ({"points_per_side": None}, "one of the two"),
        ({"point_grids": [np.zeros((1, 2))]}, "one of the two"),
        ({"points_per_side": 0}, "points_per_side 0 must be 1 or more"),
        ({"points_per_side": 2.5}, "must be a whole number"),
        ({"points_per_batch": 0}, "points_per_batch 0"),
        ({"crop_n_layers": -1}, "crop_n_layers -1"),
        ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio 1.5"),
        ({"output_mode": "png"}, "binary_mask, uncompressed_rle, coco_rle"),
        ({"points_per_side": 2, "crop_n_layers": 2, "crop_n_points_downscale_factor": 2}, "lower"),
        ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "needs"),
        ({"points_per_side": None, "point_grids": [np.array([[3, 4]])]}, "divide pixels by"),
    ):
        with pytest.raises(UserError, match=said):
            MaskGenerator(model, **words)
    with pytest.raises(UserError, match="Linear is no model of ours; give what .*load_model"):
        MaskGenerator(torch.nn.Linear(1, 1))
    generator = MaskGenerator(model, 2)
    for image in (IMAGE / 255, IMAGE[:, :, 0], IMAGE[:0], np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(UserError, match="give uint8"):
            generator.generate(image)
    with pytest.raises(UserError, match="crops without a pixel"):
        MaskGenerator(model, 16, crop_n_layers=3).generate(IMAGE[:3, :3])


def test_the_benchmark_runs():
    words = ["everything", "--device", "cpu", "--rounds", "1", "--image-size", "64"]
    words += ["--side", "2", "--pixels", "60", "90"]
    done = run([*command([])[:1], str(ROOT / "tools/bench.py"), *words])
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout and "peak memory" in done.stdout
