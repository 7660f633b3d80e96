"""Masks, boxes and clicks lie on their object, however an image is stored and annotated."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from finetune.classification import AugmentConfig, LabelTransform
from finetune.classification import LabelDataConfig as ClassifyData
from finetune.coco import CocoSource, read_coco
from finetune.data import UNSURE
from finetune.evaluation import EvalDataset
from finetune.prompting import PromptSpec
from finetune.train import main as train
from sami.core.errors import BadSample
from sami.core.images import DRAWN, STD, drawn_on, open_image
from sami.core.reading import RawSample, read_range
from sami.core.scanning import IMAGE
from sami.data import CropTransform
from sami.extraction import prepare
from sami.masking import MaskConfig
from sami.probe import labelled_squares
from tests.runs import opened, run, summary
from tests.test_bad_data import write_tar
from tests.test_data_stage2 import maker
from tests.test_evaluation import SHAPE, Given
from tests.test_evaluation import paint as painted
from tests.test_features import CACHE
from tests.test_images import TURNED, encode
from tests.test_train import arguments

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
KINDS = {
    "JPEG": {"quality": 98, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
}
UNTURNED = TURNED | {6: TURNED[8], 8: TURNED[6]}
SIZES = {"wide": (48, 64), "square": (64, 64)}
EVERY = [
    pytest.param(orientation, drawn, kind, id=f"{kind}-{orientation}-{drawn}")
    for orientation in range(1, 9)
    for drawn in DRAWN
    for kind in KINDS
]


def scene(height, width):
    """A red block in a blue image, nowhere near its own mirror image; [H, W, 3]."""
    image = np.full((height, width, 3), (20, 40, 200), np.uint8)
    image[4:20, width - 24 : width - 4] = (220, 30, 10)
    return image


def turned_image(orientation, drawn, kind, shape="wide"):
    """Encoded, and the block's mask bool [h, w] on the upright or on the stored image."""
    upright = scene(*SIZES[shape])
    stored = UNTURNED[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(stored), kind, exif=exif, **KINDS[kind])
    return data, (upright if drawn == "upright" else stored)[..., 0] > 128


def coded(mask):
    told = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": told["size"], "counts": told["counts"].decode()}


def raw(data, mask, key="s/a", **image):
    told = {"image": {"height": mask.shape[0], "width": mask.shape[1]} | image}
    told["annotations"] = [{"segmentation": coded(mask)}]
    return RawSample(key, {IMAGE: data, "json": json.dumps(told).encode()})


def check_training(sample, **options):
    """Where the loss has the object there is red, and where clicks and boxes lie; what is noted."""
    for boxes in (0.0, 1.0):
        made = maker(boxes=boxes, **options).decode(sample, 0, False)
        _, image, inside, masks, points, labels, *_, unsure, left_out = made
        red = image[2::4, 2::4, 0] > 128  # the loss's pixels are 4 x 4 of the input's
        assert 10 < masks[0].sum() < 50
        assert (red == masks[0])[inside].mean() > 0.98
        for (x, y), label in zip(points[0], labels[0], strict=True):
            if label == 1:
                x, y = round(float(x)), round(float(y))  # the edge of a pixel of the object
                assert image[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, 0].max() > 128
        if boxes:
            ys, xs = np.nonzero(image[..., 0] > 128)
            (x0, y0), (x1, y1) = points[0][:2]
            assert np.abs(np.array([xs.min(), ys.min()]) - [x0, y0]).max() <= 3  # 10 % noise
            assert np.abs(np.array([xs.max(), ys.max()]) + 1 - [x1, y1]).max() <= 3
    assert not left_out
    return [what for what, _ in unsure]


def check_evaluation(source, drawn="upright"):
    """The same of what is evaluated on."""
    (judged,) = EvalDataset(source, SHAPE, PromptSpec.parse("3", 1), drawn=drawn)
    image, (height, width) = judged.image.permute(1, 2, 0).numpy(), judged.size
    mask = painted(judged.ends[0], height, width)
    rows, columns = (((np.arange(64) + 0.5) * side / 64).astype(int) for side in (height, width))
    red = image[..., 0] > 128
    assert (red == mask[np.ix_(rows, columns)]).mean() > 0.96
    for x, y in judged.clicks[0, 0].int().tolist():
        assert red[(2 * y + 1) * 64 // (2 * height), (2 * x + 1) * 64 // (2 * width)]
    return judged.notes


@pytest.mark.parametrize(("orientation", "drawn", "kind"), EVERY)
@pytest.mark.parametrize("shape", SIZES)
def test_training_and_evaluation(orientation, drawn, kind, shape):
    """Of shards. Where the size cannot tell, the default does; what the JSON says goes first."""
    data, mask = turned_image(orientation, drawn, kind, shape)
    unsure = orientation in (2, 3, 4) or (orientation > 4 and shape == "square")
    other = DRAWN[drawn == "upright"]
    for resize in ("square", "longest"):
        options = {"masks_drawn_on": drawn if unsure else other, "resize": resize}
        assert check_training(raw(data, mask), **options) == [UNSURE] * unsure
    default = drawn if unsure else other
    assert check_evaluation(Given([raw(data, mask)]), default) == [UNSURE] * unsure
    told = raw(data, mask, drawn_on=drawn)
    assert check_training(told, masks_drawn_on=other) == []
    assert check_evaluation(Given([told]), other) == []


@pytest.fixture(scope="module", params=DRAWN)
def coco(request, tmp_path_factory):
    """A folder with an image of each kind and orientation, their JSON, and how it is drawn."""
    folder = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    kinds = [kind for kind in KINDS if kind != "TIFF"]
    for number, (orientation, kind) in enumerate((o, k) for o in range(1, 9) for k in kinds):
        data, mask = turned_image(orientation, request.param, kind)
        name = f"{orientation}.{kind.lower()}"
        (folder / name).write_bytes(data)
        height, width = mask.shape
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        ys, xs = np.nonzero(mask)
        left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        polygon = [float(v) for v in (left, top, right, top, right, bottom, left, bottom)]
        annotations.append({"id": number, "image_id": number, "segmentation": [polygon]})
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder, file, request.param


def test_evaluation_of_coco(coco):
    folder, file, drawn = coco
    source, unsure = CocoSource.of(read_coco(file), folder), 0
    for sample in source.read(range(len(source))):
        unsure += check_evaluation(Given([sample]), drawn) == [UNSURE]
    assert len(source) == 24 and unsure == 9


def test_shards_made_of_coco(coco, tmp_path):
    """They tell on which image their masks lie, so that nobody has to decide again."""
    folder, file, drawn = coco
    words = ["tools/make_shards.py", folder, tmp_path / "out", "--coco", file, "--workers", "1"]
    done = run([sys.executable, *map(str, words), "--masks-drawn-on", drawn])
    assert done.returncode == 0, done.stderr
    assert "9 images are turned by EXIF and their masks fit both ways" in done.stdout
    assert f"on the {drawn} image (--masks-drawn-on)" in done.stdout
    (source,) = opened(f"{tmp_path}/out/*.tar", tmp_path)
    assert source.count == 24
    other = DRAWN[drawn == "upright"]
    for sample in read_range(source.shards, range(24), (IMAGE, "json")):
        told = json.loads(sample.parts["json"])["image"]
        upright = open_image(sample.parts[IMAGE]).orientation == 1
        assert told.get("drawn_on") == (None if upright else drawn)
        assert check_training(sample, masks_drawn_on=other) == []
        assert check_evaluation(Given([sample]), other) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_where_masks_lie(orientation):
    """The whole table: what fits, what tells, what the default decides, and what fits nothing."""
    turns = orientation > 4
    for stored in ((60, 40), (50, 50)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = open_image(encode(Image.new("RGB", stored), "PNG", exif=exif))
        sizes = {"stored": stored, "upright": stored[::-1] if turns else stored}
        for default in DRAWN:
            if sizes["stored"] != sizes["upright"]:
                for drawn, size in sizes.items():
                    assert drawn_on(image, *size, None, default) == (drawn, False)
                    assert drawn_on(image, *size, drawn, default) == (drawn, False)
                    with pytest.raises(BadSample, match="another image size"):
                        drawn_on(image, *size[::-1], drawn, default)
            elif orientation == 1:
                assert drawn_on(image, *stored, None, default)[1] is False
            else:
                assert drawn_on(image, *stored, None, default) == (default, True)
                for told in DRAWN:
                    assert drawn_on(image, *stored, told, default) == (told, False)
            with pytest.raises(BadSample, match="^annotation of another image size$"):
                drawn_on(image, stored[0] + 1, stored[1], None, default)


@pytest.mark.slow
def test_a_run_says_it_once_and_counts(tmp_path, in_process):
    """And the broken annotation of one of them, at each visit; stand-ins are not counted twice."""
    members = {}
    for number in range(12):
        data, mask = turned_image(3 if number < 4 else 1, "upright", "JPEG")
        sample = raw(data, mask)
        told = json.loads(sample.parts["json"])
        if number == 9:
            told["annotations"].append({"segmentation": coded(mask), "bbox": [1, 2]})
        members |= {f"{number}.jpg": data, f"{number}.json": json.dumps(told).encode()}
    members |= {"12.jpg": b"text", "12.json": b"{}"}
    path = write_tar(tmp_path / "s.tar", members)
    options = {"train.steps": 2, "train.batch_size": 13, "data.max_bad_fraction": 0.5}
    options |= {
        "data.allow_val_in_train": "true",
        "data.val_shards": path,
        "eval.samples": 13,
        "eval.every": 1,
        "data.workers": 0,
    }
    code, said = in_process(train, arguments(tmp_path / "run", path, **options))
    assert code == 0, said
    broken = "annotation is not SA-1B's"
    told, log = summary(tmp_path / "run"), (tmp_path / "run" / "log.txt").read_text()
    assert told["bad_samples"] == {"not an image": 2}
    assert told["objects_left_out"] == {broken: 2} and told["left_out_of"] == {broken: ["s/9"]}
    assert told["orientation_unsure"] == 8
    assert sorted(told["orientation_unsure_keys"]) == [f"s/{n}" for n in range(4)]
    assert log.count(f"{UNSURE} (the first is s/") == log.count(f"{UNSURE}: 8 times") == 1
    why = "{'not an image': 1}, the first is s/12"
    assert log.count(f"1 of 13 held-out images unusable: {why}") == 1
    assert log.count(f"noted of held-out images: {{'{UNSURE}': 4, ") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_without_masks_everything_is_upright(orientation, kind):
    """Stage 1, probe, classification and cache see what an image stored upright shows."""

    def seen(data):
        sample = RawSample("s/a", {IMAGE: data, "cls": b"0"})
        size, whole = prepare(data, CACHE)
        assert size == SIZES["wide"][::-1]
        yield from CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True).decode(
            sample, 0, False
        )[1:3]
        yield labelled_squares([], np.zeros(0, int), 32).decode(sample)[0]
        classify = LabelTransform(ClassifyData(image_size=32), AugmentConfig(auto=""), seed=0)
        for decode in (classify.decode_held_out, lambda s: classify.decode(s, 0, False)):
            yield decode(sample)[1].permute(1, 2, 0).numpy() * 255 * np.array(STD)
        yield whole

    data, _ = turned_image(orientation, "upright", kind)
    expected = encode(scene(*SIZES["wide"]), kind, **KINDS[kind])
    for one, other in zip(seen(data), seen(expected), strict=True):
        difference = np.abs(one.astype(float) - other.astype(float))
        assert difference.max() <= (8 if kind == "JPEG" else 0)
