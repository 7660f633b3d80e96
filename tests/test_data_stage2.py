"""Stage 2's samples against the plain route: full masks, painted and looked up."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from finetune.data import NO_PIXEL, MaskDataConfig, PromptTransform, loss_pixels
from finetune.prompting import PromptConfig
from finetune.prompts import mirror
from sami.core.dataset import Training
from sami.core.errors import BadSample
from sami.core.order import Order
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE
from tests.runs import ROOT, opened
from tests.test_toy_shards import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
HEIGHT, WIDTH = 70, 100


def discs(count=5, height=HEIGHT, width=WIDTH, seed=0):
    """Overlapping discs, one mask each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    for _ in range(count):
        centre, radius = rng.random(2) * [height, width], rng.uniform(4, 30)
        yield (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2


def raw(masks, key="a/b", size=(HEIGHT, WIDTH), **more):
    """An image whose red is x and whose green is y, and masks."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([x * 2, y * 3, 0 * x], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    entries = []
    for mask in masks:
        told = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        told = {"size": told["size"], "counts": told["counts"].decode()}
        entries.append({"segmentation": told, "area": int(mask.sum())} | more)
    told = {"image": {"height": size[0], "width": size[1]}, "annotations": entries}
    return RawSample(key, {IMAGE: buffer.getvalue(), "json": json.dumps(told).encode()})


def maker(**options):
    data = {"image_size": 64, "masks_per_image": 64} | options
    prompt = {k: data.pop(k) for k in ("boxes", "clicks") if k in data}
    seed = data.pop("seed", 0)
    return PromptTransform(
        MaskDataConfig(**data), PromptConfig(**prompt), data["image_size"] // 4, seed
    )


def test_loss_pixels_lie_under_their_centres():
    rows, columns, inside = loss_pixels(64, 16, (64, 64), (HEIGHT, WIDTH))
    assert rows.tolist() == [int((i + 0.5) * HEIGHT / 16) for i in range(16)]
    assert columns.tolist() == [int((i + 0.5) * WIDTH / 16) for i in range(16)]
    assert inside.all()
    rows, columns, inside = loss_pixels(64, 16, (45, 64), (HEIGHT, WIDTH))
    assert rows.tolist() == [int((i + 0.5) * 4 * HEIGHT / 45) for i in range(11)]
    assert inside[:11].all() and not inside[11:].any()


@pytest.mark.parametrize("resize", ["square", "longest"])
@pytest.mark.parametrize("hflip", [False, True])
def test_masks_and_prompts_belong_to_their_objects(resize, hflip):
    masks = list(discs())
    views, flips = maker(resize=resize, hflip=hflip, boxes=0.5), 0
    frame = (64, 64) if resize == "square" else (45, 64)
    rows, columns, _ = loss_pixels(64, 16, frame, (HEIGHT, WIDTH))
    expected = [mask[np.ix_(rows, columns)] for mask in masks]
    mirrored = [mask[:, ::-1][np.ix_(rows, columns)] for mask in masks]
    for epoch in range(40):
        _, image, inside, found, points, labels, *_ = views.decode(raw(masks), epoch, False)
        flipped = image[5, 60, 0] < image[5, 3, 0]  # red is x
        flips += flipped
        assert found.shape == (5, 16, 16) and not found[:, ~inside].any()
        for mask, where, label in zip(found, points, labels, strict=True):
            inner = mask[: len(rows)]
            lookup = mirrored if flipped else expected
            matching = [n for n, one in enumerate(lookup) if np.array_equal(one, inner)]
            assert matching
            ys, xs = np.nonzero(masks[matching[0]])
            scale = np.array([frame[1] / WIDTH, frame[0] / HEIGHT])
            used = where[label >= 0].astype(float)
            if (label == 2).any():
                box = np.array([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]]) * scale
                if flipped:
                    box[:, 0] = frame[1] - box[::-1, 0]
                assert label.tolist() == [2, 3, -1, -1, -1, -1]
                assert np.abs(used - box).max() <= max(0.4 * np.ptp(box, axis=0).max(), 1.3)
                assert (used[0] <= used[1]).all() and used.min() >= 0
            else:
                assert 1 <= len(used) <= 6 and set(label) <= {1, -1}
                pixels = np.round(used / scale).astype(int)
                assert np.abs(pixels * scale - used).max() < 1e-4
                if flipped:
                    pixels[:, 0] = WIDTH - 1 - pixels[:, 0]
                assert all(masks[matching[0]][y, x] for x, y in pixels)
            assert (where[label < 0] == -1).all()
    assert (0 < flips < 40) if hflip else flips == 0


def test_a_sample_follows_from_seed_epoch_and_key():
    masks = list(discs(9))

    def drawn(seed=0, epoch=0, key="a/b", replacement=False):
        made = maker(seed=seed, masks_per_image=4).decode(raw(masks, key), epoch, replacement)
        return made[3].tobytes() + made[4].tobytes()

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(epoch=1), drawn(key="b"), drawn(replacement=True)]
    assert len({drawn(), *others}) == 5


def test_which_masks_are_used():
    masks = [*discs(8)]
    whole = np.ones((HEIGHT, WIDTH), bool)
    views = maker(masks_per_image=3)
    counts = np.zeros(8)
    for epoch in range(200):
        found = views.decode(raw([*masks, whole]), epoch, False)[3]
        assert len(found) == 3 and not found.all((1, 2)).any()  # never what covers everything
        rows, columns, _ = loss_pixels(64, 16, (64, 64), (HEIGHT, WIDTH))
        small = [mask[np.ix_(rows, columns)] for mask in masks]
        for mask in found:
            counts[[np.array_equal(mask, one) for one in small].index(True)] += 1
    assert np.abs(counts - 75).max() < 5 * 75**0.5
    for more, options in (
        ({"predicted_iou": 0.5}, {"min_predicted_iou": 0.8}),
        ({"stability_score": 0.5}, {"min_stability": 0.8}),
        ({"area": 1}, {"max_area": 0.0001}),
    ):
        with pytest.raises(BadSample, match="no usable mask"):
            maker(**options).decode(raw(masks, **more), 0, False)
    with pytest.raises(BadSample, match="no usable mask"):
        maker().decode(raw([np.zeros((HEIGHT, WIDTH), bool), whole]), 0, False)


def test_what_is_bad():
    good = raw(list(discs()))
    told = json.loads(good.parts["json"])
    for entry in told["annotations"]:
        entry["segmentation"]["counts"] = "zz"
    cases = {
        "run lengths do not fit their size": good.parts | {"json": json.dumps(told).encode()},
        "annotation is not JSON": good.parts | {"json": b"{"},
        "no json member": {IMAGE: good.parts[IMAGE]},
        "not an image": good.parts | {IMAGE: b"x"},
        "annotation of another image size": good.parts
        | {"json": raw(list(discs(2, 50, 60)), size=(50, 60)).parts["json"]},
    }
    for reason, parts in cases.items():
        with pytest.raises(BadSample, match=f"^{reason}$"):
            maker().decode(RawSample("a", parts), 0, False)


def test_batches_are_padded_with_empty_slots():
    views = maker()
    items = [views.decode(raw(list(discs(n)), key=str(n)), 0, False) for n in (2, 5, 1)]
    batch = views.collate(items)
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.masks.shape == (3, 5, 16, 16) and batch.points.shape == (3, 5, 6, 2)
    assert batch.there.sum(1).tolist() == [2, 5, 1]
    assert not batch.masks[~batch.there].any() and (batch.labels[~batch.there] == -1).all()
    assert torch.equal(batch.images[1], torch.from_numpy(items[1][1]).permute(2, 0, 1))
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.targets.masks, batch.masks) and moved.keys == ["2", "5", "1"]


def specks(height=HEIGHT, width=WIDTH):
    """Single pixels: one that a loss of 16 x 16 looks at, and three that it does not."""
    rows, columns, _ = loss_pixels(64, 16, (64, 64), (height, width))
    for y, x in ((rows[3], columns[5]), (rows[3] + 1, columns[5]), (0, 0), (height - 1, width - 1)):
        mask = np.zeros((height, width), bool)
        mask[y, x] = True
        yield mask


def test_objects_without_a_pixel_of_loss_are_left_out_and_counted():
    """Their truth would be an empty mask, which nothing in the image tells apart."""
    seen, *unseen = specks()
    whole = list(discs(3))
    views = maker()
    batch = views.collate(
        [
            views.decode(raw([*unseen[:2], seen, *whole], "a"), 0, False),
            views.decode(raw([unseen[2], whole[0]], "b"), 0, False),
            views.decode(raw(whole, "c"), 0, False),
        ]
    )
    assert batch.there.sum(1).tolist() == [4, 1, 3]
    assert torch.equal(batch.masks.flatten(2).any(2), batch.there)
    assert batch.left_out == [(NO_PIXEL, "a")] * 2 + [(NO_PIXEL, "b")]
    assert batch.to(torch.device("cpu")).left_out == batch.left_out
    for epoch in range(20):  # others are chosen in their place
        few = maker(masks_per_image=2).decode(raw([*unseen, *whole]), epoch, False)
        assert len(few[3]) == 2 and few[3].any((1, 2)).all()
    with pytest.raises(BadSample, match=f"^{NO_PIXEL}$"):
        views.decode(raw(unseen), 0, False)
    # thin bars at one size of the loss, not at a larger one
    bars = [np.zeros((HEIGHT, WIDTH), bool) for _ in range(30)]
    for number, bar in enumerate(bars):
        bar[10:60, 3 * number] = True
    coarse = maker().decode(raw(bars), 0, False)
    fine = PromptTransform(MaskDataConfig(image_size=64), PromptConfig(), 128, 0).decode(
        raw(bars), 0, False
    )
    assert len(coarse[3]) + len(coarse[-1]) == 30 and len(coarse[-1]) > 15
    assert len(fine[3]) == 30 and not fine[-1]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 900)])
@pytest.mark.parametrize("resize", ["square", "longest"])
def test_a_image_may_be_a_line(size, resize):
    views = maker(resize=resize)
    sample = raw([(np.arange(size[0] * size[1]) < 1500).reshape(size)], size=size)
    try:
        made = views.decode(sample, 0, False)
    except BadSample as error:
        assert str(error) in (NO_PIXEL, "no usable mask")
    else:
        assert made[3].any() and np.isfinite(made[4]).all()


def test_mirrored_prompts():
    points = np.array([[[2, 5], [8, 9], [-1, -1]], [[4, 7], [-1, -1], [-1, -1]]], np.float32)
    labels = np.array([[2, 3, -1], [1, -1, -1]])
    once = mirror(points, labels, 10, 1)
    assert once.tolist() == [[[2, 5], [8, 9], [-1, -1]], [[5, 7], [-1, -1], [-1, -1]]]
    assert np.array_equal(mirror(once, labels, 10, 1), points)
    # the same for an image of 20 pixels in these 10: index 8 becomes 11
    assert mirror(points.astype(int), labels, 10, 0.5)[1, 0].tolist() == [5.5, 7]


def test_the_stream_of_both_stages(tmp_path):
    """The toy shards through the same readers as stage 1."""
    done = draw(tmp_path, "--shards", "3")
    sources = opened(done.stdout.split(": ")[-1].strip(), tmp_path)
    views = maker(masks_per_image=3)
    training = Training(Order(sources, batch_size=5, seed=0, window=2), views)
    keys = []
    for step in range(2):
        batch, bad = training.__getitems__(range(5 * step, 5 * step + 5))
        assert not bad and batch.images.shape == (5, 3, 64, 64)
        keys += batch.keys
    assert len(set(keys)) == 10


def test_real_images(tmp_path):
    real = ROOT.parent / "shared/data/sa1b_layout/train/sa_000000.tar"
    if not real.exists():
        pytest.skip("the real tars (../shared/data/sa1b_layout) are not here")
    from sami.core.reading import read_range

    (source,) = opened(str(real), tmp_path)
    views = maker(image_size=256)
    for sample in read_range(source.shards, range(8), PromptTransform.fields):
        _, image, _, masks, *_ = views.decode(sample, 0, False)
        told = json.loads(sample.parts["json"])
        size = told["image"]["height"], told["image"]["width"]
        rows, columns, _ = loss_pixels(256, 64, (256, 256), size)
        painted = [
            coco_mask.decode(entry["segmentation"])[np.ix_(rows, columns)].astype(bool).tobytes()
            for entry in told["annotations"]
        ]
        assert image.std() > 5 and all(mask.tobytes() in painted for mask in masks)
        assert len(masks) <= len(painted)
