"""mIoU by box and clicks, against slow and obvious code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything import SamPredictor

from finetune.data import MaskDataConfig, PromptTransform, loss_pixels
from finetune.evaluation import (
    EvalDataset,
    EvalSample,
    MaskEvalConfig,
    evaluate,
    masks_of,
    paint,
    score,
)
from finetune.losses import mask_iou
from finetune.pictures import KEY, MOST, SIDE, draw_masks, figure_of, overlay, shrink
from finetune.prompt_encoder import BACKGROUND, FOREGROUND, PADDING
from finetune.prompting import PROMPTS, PromptConfig, PromptSpec, centre_of, correction_clicks
from finetune.rle import decode_counts
from finetune.sam import ModelShape, Sam
from sami.core.dataset import ShardSource
from sami.core.errors import BadSample
from sami.core.images import resize_array
from sami.core.plots import OBJECTS
from sami.encoders.protocol import EncoderShape
from tests.reference import next_click
from tests.runs import ROOT, opened
from tests.test_data_stage2 import HEIGHT, WIDTH, discs, raw
from tests.test_toy_shards import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
SHAPE = ModelShape(EncoderShape(width=32, depth=1, heads=1, image_size=64))
CPU = torch.device("cpu")


def ends_of(mask):
    told = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return decode_counts(told["counts"], *mask.shape)


def test_iou_is_pycocotools():
    masks = list(discs(6))
    for a in masks:
        for b in masks:
            told = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in (a, b)]
            expected = coco_mask.iou(told[:1], told[1:], [0])[0, 0]
            found = mask_iou(torch.from_numpy(a), torch.from_numpy(b))
            assert found.item() == pytest.approx(expected, abs=1e-7)


def test_masks_are_painted_whole():
    for mask in discs(6):
        assert np.array_equal(paint(ends_of(mask), HEIGHT, WIDTH), mask)


def test_prompts_of_an_object():
    hits = [np.zeros((HEIGHT, WIDTH)) for _ in range(6)]
    masks = list(discs(6))
    for seed in range(50):
        promptings = (*PromptSpec.parse("box", 1), *PromptSpec.parse("3", 2))
        (judged,) = EvalDataset(Given([raw(masks)]), SHAPE, promptings, seed=seed)
        order = [[np.array_equal(paint(e, HEIGHT, WIDTH), m) for m in masks] for e in judged.ends]
        assert np.array(order).sum() == 6
        boxes, labels = judged.prompts(PromptSpec("box"))
        assert labels.tolist() == [[2, 3]] * 6
        one, _ = judged.prompts(PromptSpec("random", 1))
        three, labels = judged.prompts(PromptSpec("random", 3))
        other, _ = judged.prompts(PromptSpec("random", 3, draw=1))
        assert labels.tolist() == [[1, 1, 1]] * 6 and not torch.equal(three, other)
        assert torch.equal(one[:, 0], three[:, 0])
        for row, which in enumerate(np.argmax(order, 1)):
            ys, xs = np.nonzero(masks[which])
            assert boxes[row].flatten().tolist() == [
                xs.min(),
                ys.min(),
                xs.max() + 1,
                ys.max() + 1,
            ]
            for x, y in torch.cat([three[row], other[row]]).int().tolist():
                hits[which][y, x] += 1
    for mask, found in zip(masks, hits, strict=True):
        assert not found[~mask].any() and (found > 0).sum() > min(30, mask.sum() // 2)


def test_the_centre_is_farthest_from_the_boundary():
    rng = np.random.default_rng(0)
    assert centre_of(np.zeros((4, 5), bool)) is None
    for _ in range(30):
        region = rng.random((rng.integers(1, 12), rng.integers(1, 12))) < rng.uniform(0.5, 1)
        assert centre_of(region) == next_click(region, region & False)[:2]
    whole = np.ones((9, 5), bool)  # the image's border is a boundary
    assert centre_of(whole)[0] == 2 and centre_of(whole)[1] in range(2, 7)


def test_words_for_promptings():
    assert PromptSpec.parse("box", 3) == [PromptSpec("box")]
    assert [p.draw for p in PromptSpec.parse("3", 3)] == [0, 1, 2]
    assert PromptSpec.parse("centre-2", 3) == [PromptSpec("centre", 2)]
    assert PromptSpec("centre", 2).name == "2 clicks, centre first"
    for word in ("", "0", "centre", "centre-", "centre-0", "x", "-1", "1.5"):
        with pytest.raises(ValueError):
            PromptSpec.parse(word, 1)


class Given:
    """A source of samples in memory."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def read(self, numbers):
        yield from (self.samples[number] for number in numbers)


class Oracle(Sam):
    """Answers each prompt with what was put into ``answers``; mask 1 claims to be the best."""

    def predict_low_resolution(self, embeddings, points, labels, masks=None):
        self.seen.append((points, labels))
        logits = self.answers[None, : points.shape[1]].float() * 8 - 4
        logits = torch.stack([logits.roll(1, 2), -logits, logits, logits.roll(3, 3)], 2)
        iou = torch.tensor([1.5, 0.1, 0.9, 0.5]).expand(1, points.shape[1], 4)
        return logits, iou


def small(mask):
    """A mask at the nearest pixels of a grid of 16."""
    rows = (np.arange(16) * HEIGHT / 16 + HEIGHT / 32).astype(int)
    columns = (np.arange(16) * WIDTH / 16 + WIDTH / 32).astype(int)
    return mask[np.ix_(rows, columns)]


def oracle_of(shape, judged):
    model = Oracle(shape).eval()
    painted = [small(paint(ends, HEIGHT, WIDTH)) for ends in judged.ends]
    model.answers, model.seen = torch.from_numpy(np.stack(painted)), []
    return model


def whole(logits):
    full = torch.nn.functional.interpolate(logits[None, None], (HEIGHT, WIDTH), mode="bicubic")
    return full[0, 0].numpy() > 0


@torch.no_grad()
def test_what_is_scored_and_at_which_size():
    """Every size, prompting and choice against loops over single masks."""
    promptings = (PromptSpec("box"), PromptSpec("random", 2, 1), PromptSpec("centre", 1))
    (judged,) = EvalDataset(Given([raw(list(discs(20, seed=3)))]), SHAPE, promptings)
    model = oracle_of(SHAPE, judged)
    found = score(model, judged, CPU, promptings)
    assert found.shape == (3, 2, 20)
    for number, ends in enumerate(judged.ends):
        mask = paint(ends, HEIGHT, WIDTH)
        logits = model.predict_low_resolution(None, torch.zeros(1, 20, 1, 2), None)[0][0, number]
        iou = [(whole(z) & mask).sum() / (whole(z) | mask).sum() for z in logits]
        assert found[:, 0, number].tolist() == pytest.approx([iou[2]] * 3, abs=1e-6)
        assert found[:, 1, number].tolist() == pytest.approx([max(iou[1:])] * 3, abs=1e-6)
    assert found[:, 0].mean() > 0.6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["efficientsam", "sam"])
def test_later_clicks_go_to_the_middle_of_what_is_wrong(kind):
    shape = ModelShape(SHAPE.encoder, kind)
    promptings = (PromptSpec("centre", 3),)
    (judged,) = EvalDataset(Given([raw(list(discs(5)))]), shape, promptings)
    model = oracle_of(shape, judged)
    score(model, judged, CPU, promptings)
    points, labels = model.seen[-1]
    assert points.shape == (1, 5, 3, 2) and len(model.seen) == 3
    scale = torch.tensor([WIDTH / 64, HEIGHT / 64])
    for number, ends in enumerate(judged.ends):
        mask = paint(ends, HEIGHT, WIDTH)
        answer = whole(model.answers[number].float() * 8 - 4)
        taken = answer & ~mask if kind == "sam" else mask & False
        x, y, label = next_click(mask & ~answer, taken)
        clicks = (points[0, number] * scale).round().int().tolist()
        assert tuple(clicks[0]) == next_click(mask, mask & False)[:2]
        assert clicks[1] == clicks[2] == [x, y]
        assert labels[0, number].tolist()[1:] == [label] * 2


@torch.no_grad()
@pytest.mark.parametrize("size", [(70, 100), (150, 61)])  # smaller and larger than the input
@pytest.mark.parametrize("resize", ["square", "longest"])
@pytest.mark.parametrize("kind", ["efficientsam", "sam"])
def test_a_pixel_is_at_one_coordinate_everywhere(kind, resize, size, monkeypatch):
    """Training, its mirror and its corrections, evaluation, SamPredictor, the released interface.

    The released code's: a pixel's index times the scale, plus half a pixel in the prompt encoder.
    """
    monkeypatch.setattr("finetune.prompting.BOX_NOISE", 0.0)
    torch.manual_seed(0)
    shape = ModelShape(replace(SHAPE.encoder, channels=32), kind, resize)
    model, seen = Sam(shape).eval(), []
    layer = model.prompt_encoder.pe_layer
    plain = layer.forward_with_coords

    def watched(coordinates, input_size):
        seen.append(coordinates.reshape(-1, 2).tolist())
        return plain(coordinates, input_size)

    layer.forward_with_coords = watched

    def asked():
        """The corners or the click of the last prompt, without what fills it up."""
        told = [point for point in seen[-1] if point not in ([-0.5, -0.5], [0, 0])]
        seen.clear()
        return np.array(told)

    height, width = frame = shape.frame(*size)
    scale = np.array([width / size[1], height / size[0]])
    rows, columns, _ = loss_pixels(64, 16, frame, size)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    embeddings = model.get_image_embeddings(torch.from_numpy(image).permute(2, 0, 1)[None])
    predictor = SamPredictor(model)
    predictor.set_image(image)
    for row, column in ((1, 2), (7, 5)):
        x, y = int(columns[column]), int(rows[row])
        mask = np.zeros(size, bool)
        mask[y, x] = True
        corners = np.array([[x, y], [x + 1, y + 1]])
        for clicked in (True, False):
            index = np.array([[x, y]]) if clicked else corners
            label = np.array([1] if clicked else [2, 3])
            expected = index * scale + 0.5
            told = [torch.from_numpy(one)[None, None] for one in (index, label)]
            model.predict_masks(embeddings, *told, True, *size)
            np.testing.assert_allclose(asked(), expected, atol=1e-4)
            if clicked:
                predictor.predict(index, label)
            else:
                predictor.predict(box=corners.ravel())
            np.testing.assert_allclose(asked(), expected, atol=1e-4)
            for prompting in (
                (PromptSpec("random", 1), PromptSpec("centre", 1))
                if clicked
                else (PromptSpec("box"),)
            ):
                (judged,) = EvalDataset(Given([raw([mask], size=size)]), shape, (prompting,))
                score(model, judged, CPU, (prompting,))
                np.testing.assert_allclose(asked(), expected, atol=1e-4)
            views = PromptTransform(
                MaskDataConfig(image_size=64, resize=resize, hflip=True),
                PromptConfig(boxes=0.0 if clicked else 1.0, clicks=1),
                16,
                0,
            )
            # what is drawn in the mirrored image is where the mirrored pixel is
            other = mask[:, ::-1][np.ix_(rows, columns)].any()
            flips = {False} | ({True} if other else set())
            for epoch in range(40):
                try:
                    batch = views.collate([views.decode(raw([mask], size=size), epoch, False)])
                except BadSample:
                    assert not other  # the mirrored pixel is between those of the loss
                    continue
                model.predict_low_resolution(embeddings, batch.points, batch.labels)
                found = asked()
                flipped = not np.allclose(found, expected, atol=1e-4)
                mirrored = size[1] - (1 if clicked else 0) - index[::-1, 0]
                there = np.stack([mirrored, index[:, 1]], 1) * scale + 0.5
                np.testing.assert_allclose(found, there if flipped else expected, atol=1e-4)
                flips.discard(flipped)
                if not flipped:
                    nothing = torch.zeros_like(batch.masks)
                    more, _ = correction_clicks(nothing, batch.masks, batch.places, False)
                    np.testing.assert_allclose(more[0, 0], index[:1] * scale, atol=1e-4)
                if not flips:
                    break
            assert not flips


def test_images_in_fixed_order_without_bad_ones(tmp_path):
    done = draw(tmp_path, "--shards", "2")
    (source,) = opened(done.stdout.split(": ")[-1].strip(), tmp_path)
    found = list(
        EvalDataset(ShardSource(source.shards, EvalDataset.fields, range(10)), SHAPE, masks=3)
    )
    assert len({one.key for one in found}) == 10
    again = list(
        EvalDataset(ShardSource(source.shards, EvalDataset.fields, range(4, 6)), SHAPE, masks=3)
    )
    for a, b in zip(found[4:6], again, strict=True):
        assert a.key == b.key and torch.equal(a.clicks, b.clicks)
        assert a.image.shape == (3, 64, 64) and 1 <= len(a.ends) <= 3
    other = list(
        EvalDataset(
            ShardSource(source.shards, EvalDataset.fields, range(10)), SHAPE, masks=3, seed=1
        )
    )
    assert any(not torch.equal(a.clicks, b.clicks) for a, b in zip(found, other, strict=True))


def lab(colour):
    """CIE L*a*b* of an sRGB colour, in which distances are about as large as they look."""
    rgb = np.array(to_rgb(colour))
    rgb = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ rgb / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_of_objects_are_saturated_and_distinct():
    assert len(set(OBJECTS)) == MOST == 12
    for number, colour in enumerate(OBJECTS):
        red, green, blue = to_rgb(colour)
        assert 1 - min(red, green, blue) / max(red, green, blue) > 0.75
        for other in OBJECTS[:number]:  # 2.3 is just noticeable
            assert np.linalg.norm(lab(colour) - lab(other)) > 30


def test_masks_are_tinted_and_outlined():
    """Small ones on large ones, each outline whole, in its colour, on a ground of that colour."""
    masks = np.zeros((3, 60, 80), bool)
    masks[1, 5:55, 5:75], masks[0, 20:30, 20:30], masks[2, 59, 79] = True, True, True
    colours = [np.round(np.multiply(to_rgb(OBJECTS[n]), 255)) for n in range(3)]
    grey = np.full((60, 80, 3), 100, np.uint8)
    shown = overlay(grey, masks)
    assert (shown[masks[2]] == colours[2]).all()  # one pixel is seen
    for number, (top, left, bottom, right) in enumerate([(20, 20, 30, 30), (5, 5, 55, 75)]):
        for row, column in ((top, left), (bottom - 1, right - 1), (top + 1, left + 5)):
            assert np.array_equal(shown[row, column], colours[number])
        assert (shown[top - 1, left + 2] == 0).all()  # a black line around it
    assert np.array_equal(shown[25, 25], np.round(0.6 * shown[15, 15] + 0.4 * colours[0]))
    assert np.array_equal(shown[15, 15], np.round(60 + 0.4 * colours[1]))
    assert (shown[0, 0] == 100).all()
    same = overlay(np.tile(colours[0].astype(np.uint8), (60, 80, 1)), masks[:1])
    assert (same[19, 20:30] == 0).all()


@pytest.mark.slow
def test_images_of_masks(tmp_path, monkeypatch):
    """Titles, IoU beside each prompt, empty masks, colours and places."""
    masks = list(discs(14, seed=1))
    promptings = (PromptSpec("box"), PromptSpec("random", 2), PromptSpec("centre", 3))
    (judged,) = EvalDataset(Given([raw(masks)]), SHAPE, promptings)
    truth = torch.from_numpy(np.stack([paint(e, HEIGHT, WIDTH) for e in judged.ends[:MOST]]))
    found = truth.roll(3, 2)
    found[0] = False

    def answer(model, of, device, prompting):
        points, labels = of.prompts(prompting)
        if prompting.kind == "centre":  # a click beside the object, and one that was not needed
            points = torch.cat([points, points * 0, points * 0], 1)
            labels = torch.tensor([[FOREGROUND, BACKGROUND, PADDING]]).expand(len(points), -1)
        return found, points, labels

    monkeypatch.setattr("finetune.pictures.masks_of", answer)
    figure = figure_of(Sam(SHAPE), [judged], CPU, "title", promptings)
    whole, box, two, centre = figure.axes
    assert whole.get_title("left") == f"{judged.key}: 12 of 14 masks, as annotated"
    iou = [(f & t).sum() / (f | t).sum() for f, t in zip(found.numpy(), truth.numpy(), strict=True)]
    filled = 100 * judged.trivial[0][0, :MOST].mean()
    expected = f"by box: mean IoU {100 * np.mean(iou):.1f} % (without a model {filled:.1f} %)"
    assert box.get_title("left") == expected
    best = 100 * judged.trivial[1][:, :MOST].mean(1).max()  # of the discs
    title = two.get_title("left")
    assert title.startswith("by 2 clicks: ") and title.endswith(f"(without a model {best:.1f} %)")
    assert KEY in [text.get_text() for text in figure.texts]
    expected = ["1: empty"] + [f"{n + 2}: {100 * one:.0f} %" for n, one in enumerate(iou[1:])]
    scale = box.get_images()[0].get_array().shape[0] / HEIGHT
    assert max(box.get_images()[0].get_array().shape[:2]) == SIDE >= 480
    for axis in (box, two, centre):
        assert [text.get_text() for text in axis.texts] == expected
        for number, text in enumerate(axis.texts):
            assert text.get_bbox_patch().get_facecolor()[:3] == to_rgb(OBJECTS[number])
    assert [text.get_text() for text in whole.texts] == [str(n + 1) for n in range(12)]
    for axis in figure.axes:
        assert [axis.texts[n].get_color() for n in (2, 6)] == ["black", "white"]  # yellow, blue
    for number in range(12):
        rectangle = box.lines[2 * number + 1]  # on a white one
        assert to_rgb(rectangle.get_color()) == to_rgb(OBJECTS[number])
        corners = judged.boxes[number].view(2, 2).numpy() * scale - 0.5
        assert np.allclose(rectangle.get_xydata()[[0, 2]], corners, atol=1e-3)
        stars, crosses = two.lines[2 * number : 2 * number + 2]
        clicks = (judged.clicks[0, number, :2].numpy() + 0.5) * scale - 0.5
        assert np.allclose(stars.get_xydata(), clicks) and not len(crosses.get_xydata())
        stars, crosses = centre.lines[2 * number : 2 * number + 2]
        assert len(stars.get_xydata()) == len(crosses.get_xydata()) == 1
        assert stars.get_marker() != crosses.get_marker()
        assert to_rgb(stars.get_color()) == to_rgb(crosses.get_color()) == to_rgb(OBJECTS[number])
    draw_masks(tmp_path / "a.png", Sam(SHAPE), [judged] * 2, CPU, "title", promptings)
    with Image.open(tmp_path / "a.png") as drawn:
        told, pixels = overlay(*_shown(judged, truth)), np.asarray(drawn.convert("RGB"))
    # A panel's pixels are the file's; four panels of an image stand in two rows.
    left, height = 12, told.shape[0]
    for top in (64 + 26, 64 + 2 * (height + 26 + 12) + 26):
        panel = pixels[top : top + height, left : left + told.shape[1]]
        assert (panel == told).all(-1).mean() > 0.8  # but for the labels


def test_labels_of_images_stand_beside_each_other_and_within():
    """Of small objects at a border, too; and a name is no formula."""
    masks = np.zeros((9, HEIGHT, WIDTH), bool)
    for number, mask in enumerate(masks):
        row, column = divmod(number, 3)
        mask[4 * row : 4 * row + 3, WIDTH - 4 * column - 3 : WIDTH - 4 * column] = True
    (judged,) = EvalDataset(Given([raw(list(masks), "a$b$")]), SHAPE, (PromptSpec("box"),))
    torch.manual_seed(0)
    figure = figure_of(Sam(SHAPE).eval(), [judged], CPU, "c$d$", (PromptSpec("box"),))
    assert figure.texts[0].get_text() == r"c\$d\$"
    assert figure.axes[0].get_title("left").startswith(r"a\$b\$: 9 masks")
    for axis in figure.axes:
        boxes = []
        for text in axis.texts:
            x, y = text.get_position()
            wide, high = 8 + 6.5 * len(text.get_text()), 17
            boxes.append((x - wide / 2, y - high / 2, x + wide / 2, y + high / 2))
        assert len(boxes) == 9
        right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
        for number, (left, top, *end) in enumerate(boxes):
            assert left >= 0 and top >= 0 and end[0] <= right and end[1] <= bottom
            for other in boxes[:number]:
                apart = left >= other[2] or end[0] <= other[0]
                assert apart or top >= other[3] or end[1] <= other[1]


def test_masks_are_shrunk_to_their_nearest_pixels():
    masks = torch.rand(2, 4, 6) > 0.5
    assert np.array_equal(shrink(masks, (2, 2)), masks[:, 1::2, 1::3])  # the middles' pixels
    assert np.array_equal(shrink(masks, (8, 6))[:, ::2], masks)


def _shown(judged, truth):
    size = round(HEIGHT * SIDE / WIDTH), SIDE
    frame = SHAPE.frame(HEIGHT, WIDTH)
    image = judged.image[:, : frame[0], : frame[1]].permute(1, 2, 0).numpy()
    return resize_array(image, *size), shrink(truth, size)


def test_masks_of_a_model_and_what_it_was_asked():
    torch.manual_seed(0)
    model, masks = Sam(SHAPE).eval(), list(discs(3))
    (judged,) = EvalDataset(Given([raw(masks)]), SHAPE, (PromptSpec("centre", 2),))
    found, points, labels = masks_of(model, judged, CPU, PromptSpec("centre", 2))
    assert found.shape == (3, HEIGHT, WIDTH) and points.shape == (3, 2, 2)
    assert torch.equal(points[:, 0], judged.centres) and (labels[:, 0] == FOREGROUND).all()
    assert np.array_equal(shrink(torch.from_numpy(np.stack(masks)), (HEIGHT, WIDTH)), masks)


class Alone:
    """A run of one process, as far as the evaluation needs one."""

    rank, processes, device = 0, 1, CPU

    def __init__(self):
        from accelerate import Accelerator

        self.accelerator, self.said = Accelerator(cpu=True), []

    def say(self, text):
        self.said.append(text)

    say_once = say

    def gather(self, value):
        return [value]


def test_means_are_over_objects(tmp_path):
    import tarfile
    from io import BytesIO

    samples = [raw(list(discs(2)), "a"), raw(list(discs(5, seed=1)), "b"), raw([], "c")]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for sample in samples:
            for kind, data in (("png", sample.parts["image"]), ("json", sample.parts["json"])):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    (source,) = opened(str(tmp_path / "s.tar"), tmp_path)
    torch.manual_seed(0)
    model, run = Sam(SHAPE), Alone()
    told = evaluate(run, model, source.shards, MaskEvalConfig(), 0)
    assert told["pictures"] == 2 and told["objects"] == 7
    why = "{'no usable mask': 1}, the first is s/c"
    assert run.said == [f"1 of 3 held-out images unusable: {why}"]
    model.eval()
    images = EvalDataset(
        ShardSource(source.shards, EvalDataset.fields, range(3)), SHAPE, PROMPTS, 64
    )
    usable = [one for one in images if isinstance(one, EvalSample)]
    each = torch.cat([score(model, one, CPU, PROMPTS)[:, 0] for one in usable], 1)
    assert told["miou_box"] == pytest.approx(each[0].mean().item())
    assert told["miou_3_clicks"] == pytest.approx(each[2].mean().item())
    boxes, one, three = zip(*(judged.trivial for judged in usable), strict=True)
    assert told["trivial_box"] == pytest.approx(np.concatenate(boxes, 1).mean())
    assert told["trivial_1_click"] == pytest.approx(np.concatenate(one, 1).mean(1).max())
    assert told["trivial_3_clicks"] == pytest.approx(np.concatenate(three, 1).mean(1).max())


def test_real_annotations_are_readable(tmp_path):
    real = ROOT.parent / "shared/data/sa1b_layout/val/sa_000100.tar"
    if not real.exists():
        pytest.skip("the real tars (../shared/data/sa1b_layout) are not here")
    (source,) = opened(str(real), tmp_path)
    found = list(
        EvalDataset(
            ShardSource(source.shards, EvalDataset.fields, range(source.count)), SHAPE, masks=4
        )
    )
    assert len(found) == source.count
    assert all(isinstance(one, EvalSample) for one in found)
