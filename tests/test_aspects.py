"""Images of every aspect up to 65,535 : 1 go through every path, right or bad by reason."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.classification import AugmentConfig, LabelDataConfig, LabelTransform
from finetune.data import NO_PIXEL, loss_pixels
from finetune.evaluation import EvalDataset, EvalSample, score
from finetune.pictures import draw_masks
from finetune.prompting import PROMPTS, PromptSpec
from finetune.sam import ModelShape, Sam
from sami.core.errors import BadSample
from sami.core.images import MEAN, STD, frame_of, open_image
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE, TEACHER
from sami.data import CropTransform
from sami.encoders.protocol import EncoderShape
from sami.extraction import extract_whole, prepare
from sami.features import Cache, FeatureBatch, pack, quantise, to_bytes
from sami.masking import MaskConfig
from sami.probe import labelled_squares
from sami.teacher import TeacherConfig, load_teacher
from tests.test_data_stage2 import maker
from tests.test_evaluation import Given
from tests.test_images import encode
from tests.test_orientation import coded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
EXTREME = [(1, 1), (2, 1), (1, 3), (3000, 1), (1, 3000), (17, 1), (65535, 1), (1, 65535)]
EXTREME += [(65535, 7), (3, 40_000), (1500, 2), (9, 9)]
RED, BLUE = (220, 30, 10), (20, 40, 200)
CPU = torch.device("cpu")
SETTINGS = settings(deadline=None, derandomize=True, max_examples=25)


@st.composite
def sizes(draw):
    """Width and height; every aspect, not too many pixels."""
    short = draw(st.integers(1, 40))
    long = draw(st.integers(short, 65535) | st.integers(short, 4 * short))
    long = max(short, min(long, 600_000 // short))
    return (long, short) if draw(st.booleans()) else (short, long)


def halves(width, height, kind="PNG"):
    """Encoded: the first half of the long side red, the rest blue; and the red half's mask."""
    mask = np.zeros((height, width), bool)
    if width >= height:
        mask[:, : (width + 1) // 2] = True
    else:
        mask[: (height + 1) // 2] = True
    return encode(np.where(mask[..., None], RED, BLUE).astype(np.uint8), kind), mask


def sample_of(width, height, **parts):
    data, mask = halves(width, height)
    told = {"image": {"height": height, "width": width}}
    told["annotations"] = [{"segmentation": coded(mask)}]
    more = {"json": json.dumps(told).encode(), "cls": b"1"}
    return RawSample("s/a", {IMAGE: data, **more, **parts}), mask


def every_size(test):
    """With the extreme ones, and with any."""
    test = SETTINGS(given(size=sizes())(test))
    for size in EXTREME:
        test = example(size=size)(test)
    return test


def between(pixels):
    """Whether [H, W, 3] holds nothing but red, blue, and mixtures (a resize may overshoot)."""
    share = (pixels[..., 2].astype(float) - RED[2]) / (BLUE[2] - RED[2])
    expected = np.array(RED) + share[..., None] * (np.array(BLUE) - RED)
    return np.abs(pixels - expected).max() <= 25


@every_size
def test_stage_one(size):
    sample, _ = sample_of(*size)
    views = CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    for epoch in range(3):
        _, student, teacher, drawn, _ = views.decode(sample, epoch, False)
        left, top, right, bottom = drawn.box
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert between(student) and between(teacher)
    _, student, teacher, _, _ = views.decode_held_out(sample)
    assert student.shape == (32, 32, 3) and teacher.shape == (48, 48, 3) and between(student)


@pytest.fixture(scope="module")
def teacher():
    config = TeacherConfig(
        name="custom", width=32, depth=1, heads=2, checkpoint="random", image_size=64
    )
    return load_teacher(config)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [4, 2])
def test_cached_features(teacher, grid):
    cache = Cache("custom", "0" * 64, True, "neck", 64, 16, 256, grid, "fp16")
    rng = np.random.default_rng(0)
    more = [tuple(int(v) for v in np.exp(rng.uniform(0, 9, 2))) for _ in range(12)]
    for width, height in [*EXTREME, *more]:
        sample, _ = sample_of(width, height)
        size, pixels = prepare(sample.parts[IMAGE], cache)
        assert size == (width, height) and pixels.shape[:2] == cache.input_size(width, height)
        stored = pack(quantise(extract_whole(teacher, [pixels])[0], cache, size))
        sample.parts[TEACHER] = to_bytes(stored)
        for pool in ("area", "bilinear"):
            views = CropTransform(
                0, 32, None, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True, cache=cache, pool=pool
            )
            for decode in (views.decode_held_out, lambda s, v=views: v.decode(s, 0, False)):
                read, rows, columns = decode(sample)[-1]
                assert np.allclose(rows.sum(1), 1) and np.allclose(columns.sum(1), 1)
                tokens = FeatureBatch.of([(read, rows, columns)], cache.grid).tokens()
                low, high = stored.values.min((1, 2)), stored.values.max((1, 2))
                assert (tokens.numpy() >= low - 1e-2).all() and (
                    tokens.numpy() <= high + 1e-2
                ).all()


@every_size
def test_stage_two(size):
    sample, _ = sample_of(*size)
    width, height = size
    for resize in ("square", "longest"):
        frame = frame_of(64, resize, height, width)
        assert 1 <= min(frame) and max(frame) == 64
        seen = loss_pixels(64, 16, frame, (height, width))[2].any()
        for boxes in (0.0, 1.0):
            views = maker(resize=resize, boxes=boxes, hflip=True)
            if max(size) == 1:  # its only mask covers the whole image
                with pytest.raises(BadSample, match="^no usable mask$"):
                    views.decode(sample, 0, False)
                continue
            if not seen:
                with pytest.raises(BadSample, match=f"^{NO_PIXEL}$"):
                    views.decode(sample, 0, False)
                continue
            _, image, inside, masks, points, labels, *_ = views.decode(sample, 0, False)
            red = image[2::4, 2::4, 0] > 128
            assert (red == masks[0])[inside].mean() >= 0.9 and np.isfinite(points).all()
            assert masks[0].any() and (labels >= 0).any()
            assert points[labels >= 0].max() <= 64


@pytest.fixture(scope="module")
def models():
    shape = EncoderShape(width=32, depth=1, heads=1, image_size=64)
    return {kind: Sam(ModelShape(shape, resize=kind)).eval() for kind in ("square", "longest")}


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["square", "longest"])
def test_evaluation(models, resize, tmp_path):
    """Scores are IoUs, and the images of it are drawn."""
    promptings = (*PROMPTS, *PromptSpec.parse("centre-2", 1))
    rng = np.random.default_rng(1)
    more = [tuple(int(v) for v in np.exp(rng.uniform(0, 6, 2))) for _ in range(6)]
    shown, model = [], models[resize]
    for width, height in [*EXTREME, *more]:
        sample, mask = sample_of(width, height)
        (judged,) = EvalDataset(Given([sample]), model.shape, promptings)
        assert isinstance(judged, EvalSample) and judged.size == (height, width)
        frame = model.shape.frame(height, width)
        assert tuple(judged.image.shape[1:]) == frame and between(
            judged.image.permute(1, 2, 0).numpy()
        )
        iou = score(model, judged, CPU, promptings)
        assert ((iou >= 0) & (iou <= 1)).all()
        for x, y in judged.clicks[0, 0].int().tolist():
            assert mask[y, x]
        shown.append(judged)
    small = [judged for judged in shown if max(judged.size) < 5000]
    draw_masks(tmp_path / "a.png", model, small[:8], CPU, "aspects")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size[0] > 100


@every_size
def test_classification_and_probe(size):
    """timm alone would bring the short side to 256 px: 65,535 x 1 to 13 GB."""
    sample, _ = sample_of(*size)
    samples = LabelTransform(
        LabelDataConfig(image_size=32), AugmentConfig(auto="", erase=0.0), seed=0
    )
    for decode in (samples.decode_held_out, lambda s: samples.decode(s, 0, False)):
        _, image, label = decode(sample)
        assert image.shape == (3, 32, 32) and label == 1
        pixels = (image.permute(1, 2, 0).numpy() * STD + MEAN) * 255
        assert between(pixels)
    square = labelled_squares([], np.zeros(0, int), 32).decode(sample)[0]
    assert square.shape == (32, 32, 3) and between(square)


def test_classifications_central_part_is_the_same_in_long_images():
    """What is cut away before timm resizes lies outside of what it keeps."""
    samples = LabelTransform(LabelDataConfig(image_size=32), AugmentConfig(), seed=0)
    rng = np.random.default_rng(0)
    for width, height in ((1200, 100), (100, 1200), (801, 100)):
        coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        data = encode(Image.fromarray(coarse).resize((width, height)))
        sample = RawSample("a", {IMAGE: data, "cls": b"0"})
        found = samples.decode_held_out(sample)[1]
        whole = samples.plain(open_image(data).decode())
        assert (found - whole).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("size", [(65500, 1), (1, 65500), (3000, 1), (65500, 400)])
def test_long_jpegs(size):
    """They can be read at a reduced size, but not below one pixel."""
    data, _ = halves(*size, kind="JPEG")
    views = CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    sample = RawSample("a", {IMAGE: data})
    assert between(views.decode_held_out(sample)[1])
    views.decode(sample, 0, False)
