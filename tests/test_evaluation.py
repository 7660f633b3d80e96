"""mIoU by box and clicks, against slow and obvious code."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from finetune.evaluation import (
    EvalConfig,
    Judged,
    Pictures,
    evaluate,
    masks_of,
    paint,
    prompts_of,
    score,
)
from finetune.losses import mask_iou
from finetune.model import EfficientSam, ModelShape
from finetune.pictures import draw_masks, overlay, shrink
from finetune.rle import decode_counts
from tests.runs import ROOT, opened
from tests.test_data_stage2 import HEIGHT, WIDTH, discs, raw
from tests.test_toy_shards import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
SHAPE = ModelShape(width=32, depth=1, heads=1, image_size=64)
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
        assert np.array_equal(paint(ends_of(mask), HEIGHT, WIDTH).numpy(), mask)


def test_prompts_of_an_object():
    rng = np.random.default_rng(0)
    for mask in discs(6):
        ys, xs = np.nonzero(mask)
        hits = np.zeros(mask.shape)
        for _ in range(50):
            points, labels = prompts_of(ends_of(mask), HEIGHT, rng)
            assert points[0, :2].tolist() == [
                [xs.min(), ys.min()],
                [xs.max() + 1, ys.max() + 1],
            ]
            assert labels.tolist() == [
                [2, 3, -1, -1, -1, -1],
                [1, -1, -1, -1, -1, -1],
                [1, 1, 1, -1, -1, -1],
            ]
            assert points[1, 0].tolist() == points[2, 0].tolist()
            for x, y in points[2, :3].astype(int):
                hits[y, x] += 1
        assert not hits[~mask].any() and (hits > 0).sum() > min(30, mask.sum() // 2)


class Oracle(EfficientSam):
    """Answers a prompt with what was put into ``answers``; mask 1 claims to be the best."""

    def predict_masks(self, embeddings, points, labels, multimask_output, *size):
        logits = self.answers[None, : points.shape[1]].float() * 8 - 4
        logits = torch.stack([-logits, logits, -logits], 2)
        iou = torch.tensor([0.1, 0.9, 0.5]).expand(1, points.shape[1], 3)
        return logits, iou


def judged_of(masks):
    ends = [ends_of(mask) for mask in masks]
    points, labels = (
        np.stack(column, 1)
        for column in zip(
            *[prompts_of(e, HEIGHT, np.random.default_rng(0)) for e in ends], strict=True
        )
    )
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    return Judged(
        "k", image, (HEIGHT, WIDTH), ends, torch.from_numpy(points), torch.from_numpy(labels)
    )


@torch.no_grad()
def test_the_mask_with_the_highest_predicted_iou_is_scored_at_the_pictures_size():
    masks = list(discs(20, seed=3))
    model = Oracle(SHAPE).eval()
    rows = (np.arange(16) * HEIGHT / 16 + HEIGHT / 32).astype(int)
    columns = (np.arange(16) * WIDTH / 16 + WIDTH / 32).astype(int)
    model.answers = torch.from_numpy(np.stack([m[np.ix_(rows, columns)] for m in masks[:16]]))
    judged = judged_of(masks[:16])
    found = score(model, judged, CPU)
    assert found.shape == (3, 16)
    for number in range(16):
        small = model.answers[number].float()[None, None] * 8 - 4
        full = torch.nn.functional.interpolate(small, (HEIGHT, WIDTH), mode="bicubic")[0, 0] > 0
        mask = masks[number]
        expected = (full.numpy() & mask).sum() / (full.numpy() | mask).sum()
        assert found[:, number].tolist() == pytest.approx([expected] * 3, abs=1e-6)
    assert found.mean() > 0.6


def test_pictures_in_fixed_order_without_bad_ones(tmp_path):
    done = draw(tmp_path, "--shards", "2")
    (source,) = opened(done.stdout.split(": ")[-1].strip(), tmp_path)
    model = EfficientSam(SHAPE)
    found = list(Pictures(source.shards, model, range(10), 3, 0))
    assert len({one.key for one in found}) == 10
    again = list(Pictures(source.shards, model, range(4, 6), 3, 0))
    for a, b in zip(found[4:6], again, strict=True):
        assert a.key == b.key and torch.equal(a.points, b.points)
        assert a.image.shape == (3, 64, 64) and 1 <= len(a.ends) <= 3
    other = list(Pictures(source.shards, model, range(10), 3, 1))
    assert any(not torch.equal(a.points, b.points) for a, b in zip(found, other, strict=True))


def test_overlays(tmp_path):
    torch.manual_seed(0)
    model, masks = EfficientSam(SHAPE).eval(), list(discs(3))
    judged = judged_of(masks)
    assert masks_of(model, judged, CPU, 0).shape == (3, HEIGHT, WIDTH)
    draw_masks(tmp_path / "a.png", model, [judged], CPU, "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    grey = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    shown = overlay(grey, np.stack(masks))
    changed = (shown != grey).any(-1)
    assert np.array_equal(changed, np.stack(masks).any(0))
    assert np.array_equal(shrink(torch.from_numpy(np.stack(masks)), (HEIGHT, WIDTH)), masks)


class Alone:
    """A run of one process, as far as the evaluation needs one."""

    rank, processes, device = 0, 1, CPU

    def __init__(self):
        from accelerate import Accelerator

        self.accelerator, self.said = Accelerator(cpu=True), []

    def say(self, text):
        self.said.append(text)


def test_means_are_over_objects(tmp_path):
    import tarfile
    from io import BytesIO

    samples = [raw(list(discs(2)), "a"), raw(list(discs(5, seed=1)), "b"), raw([], "c")]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for sample in samples:
            for kind, data in (("png", sample.parts["picture"]), ("json", sample.parts["json"])):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    (source,) = opened(str(tmp_path / "s.tar"), tmp_path)
    torch.manual_seed(0)
    model, run = EfficientSam(SHAPE), Alone()
    told = evaluate(run, model, source.shards, EvalConfig(), 0)
    assert told["pictures"] == 2 and told["objects"] == 7
    assert run.said == ["1 of 3 held-out pictures unusable"]
    model.eval()
    pictures = Pictures(source.shards, model, range(3), 64, 0)
    with torch.no_grad():
        each = torch.cat([score(model, one, CPU) for one in pictures], 1)
    assert told["miou_box"] == pytest.approx(each[0].mean().item())
    assert told["miou_3_clicks"] == pytest.approx(each[2].mean().item())


def test_real_annotations_are_readable(tmp_path):
    real = ROOT.parent / "shared/data/sa1b_layout/val/sa_000100.tar"
    if not real.exists():
        pytest.skip("the real tars (../shared/data/sa1b_layout) are not here")
    (source,) = opened(str(real), tmp_path)
    found = list(Pictures(source.shards, EfficientSam(SHAPE), range(source.count), 4, 0))
    assert len(found) == source.count
