"""COCO-format annotations into SA-1B's layout: every mask is the one that was drawn."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from finetune.coco import read_coco, to_sa1b
from finetune.rle import decode_counts, parse_annotations, sample
from sami.core.errors import UserError
from tests.runs import run

# pycocotools under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
HEIGHT, WIDTH = 40, 60
SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]


def runs_of(mask):
    """Uncompressed run lengths, one pixel after the other."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def blob(seed):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    rng = np.random.default_rng(seed)
    mask[rng.integers(5, 15) : 30, 8 : rng.integers(20, 50)] = 1
    mask[20, 20] = 0
    return mask


def compressed(mask):
    told = coco_mask.encode(np.asfortranarray(mask))
    return {"size": told["size"], "counts": told["counts"].decode()}


def image(number=1, name="a.jpg"):
    return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}


def full(entry):
    height, width = entry["segmentation"]["size"]
    ends = decode_counts(entry["segmentation"]["counts"], height, width)
    return sample(ends, height, width, np.arange(height), np.arange(width))


def test_each_kind_of_segmentation():
    masks = [blob(0), blob(1)]
    annotations = [
        {"id": 7, "segmentation": runs_of(masks[0])},
        {"id": 8, "segmentation": compressed(masks[1])},
        {"id": 9, "segmentation": [SQUARE, [40.0, 30.0, 50.0, 30.0, 45.0, 38.0]]},
    ]
    told, left_out = to_sa1b(image(), annotations, "00000003.jpg")
    assert not left_out
    assert told["image"] == {
        "image_id": 1,
        "width": WIDTH,
        "height": HEIGHT,
        "file_name": "00000003.jpg",
    }
    entries = told["annotations"]
    assert [entry["id"] for entry in entries] == [7, 8, 9]
    for entry, mask in zip(entries, masks, strict=False):
        assert np.array_equal(full(entry), mask)
    drawn = Image.new("1", (WIDTH, HEIGHT))
    for polygon in annotations[2]["segmentation"]:
        ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    assert (full(entries[2]) != np.asarray(drawn)).sum() <= 60  # two rules for the border pixels
    for entry in entries:
        mask = full(entry)
        ys, xs = np.nonzero(mask)
        assert entry["area"] == mask.sum()
        assert entry["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        ((x, y),) = entry["point_coords"]
        assert mask[y, x]
    parsed = parse_annotations(json.dumps(told).encode())
    assert len(parsed.masks) == 3 and parsed.masks[0].area == masks[0].sum()


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"segmentation": runs_of(blob(0)), "iscrowd": 1}, "crowd"),
        ({}, "no segmentation"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "no segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "malformed polygon"),
        ({"segmentation": [SQUARE, "x"]}, "malformed polygon"),
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "polygon far outside of the picture"),
        ({"segmentation": [[3, 3, 3, 3, 3, 3]]}, "empty mask"),
        ({"segmentation": compressed(np.zeros((HEIGHT, WIDTH), np.uint8))}, "empty mask"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}},
            "run lengths do not fit their size",
        ),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "zzzz\x00"}},
            "run lengths do not fit their size",
        ),
        (
            {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}},
            "mask size differs from the picture's",
        ),
    ],
)
def test_what_is_left_out(annotation, reason):
    good = {"segmentation": [SQUARE]}
    told, left_out = to_sa1b(image(), [annotation, good], "a.jpg")
    assert left_out == {reason: 1} and len(told["annotations"]) == 1


def test_what_is_no_coco_file(tmp_path):
    path = tmp_path / "a.json"
    for text, says in (
        ("{", "is not JSON"),
        ("[]", "is not in COCO's format"),
        ('{"images": []}', "KeyError: 'annotations'"),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 0, "height": 3}], "annotations": []}',
            "no size",
        ),
        ('{"images": [], "annotations": [{}]}', "image_id"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_coco(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_coco(tmp_path / "nowhere.json")


@pytest.fixture
def coco(tmp_path):
    """Nine pictures in a folder, eight of them annotated, three with something wrong."""
    folder = tmp_path / "pictures" / "below"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(10):
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        size = (WIDTH + (number == 3), HEIGHT)
        if number != 9:
            colour = Image.new("RGB", size, (number * 20, 50, 90))
            colour.save(folder / f"{number}.jpg", exif=exif)
        images.append(image(100 + number, f"below/{number}.jpg"))
        if number != 5:
            for part in range(2):
                entry = {"id": 10 * number + part, "image_id": 100 + number}
                annotations.append(entry | {"segmentation": compressed(blob(10 * number + part))})
    annotations += [{"image_id": 100, "segmentation": [SQUARE], "iscrowd": 1}]
    (folder / "4.jpg").write_bytes(b"no picture")
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path / "pictures", path


def make(source, out, annotations, *more):
    words = ["tools/make_shards.py", source, out, "--coco", annotations, "--workers", "1", *more]
    return run([sys.executable, *map(str, words)])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_of_annotated_pictures(coco, tmp_path):
    source, path = coco
    done = make(source, tmp_path / "out", path, "--shard-size", "3")
    assert done.returncode == 0, done.stderr
    for words in (
        "10 pictures in",
        "1 without annotations, 1 not in",
        "left out: below/3.jpg: annotation of another picture size",
        "left out: below/4.jpg: not a picture",
        "masks left out in all: {'crowd': 1}",
        "6 pictures, with masks, 3 shard(s)",
    ):
        assert words in done.stdout
    found = {}
    for name in contents(tmp_path / "out"):
        with tarfile.open(tmp_path / "out" / name) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        assert [n.split(".")[1] for n in members] == ["jpg", "json"] * (len(members) // 2)
        for key in {n.split(".")[0] for n in members}:
            told = json.loads(members[f"{key}.json"])
            assert told["image"]["file_name"] == f"{key}.jpg"
            found[told["image"]["image_id"] - 100] = (members[f"{key}.jpg"], told)
    assert sorted(found) == [0, 1, 2, 6, 7, 8]
    assert [n for n, (_, told) in found.items() if "drawn_on" in told["image"]] == [2]
    assert found[2][1]["image"]["drawn_on"] == "stored"
    for number, (data, told) in found.items():
        assert data == (source / "below" / f"{number}.jpg").read_bytes()
        assert Image.open(io.BytesIO(data)).size == (WIDTH, HEIGHT)
        for part, entry in enumerate(told["annotations"]):
            assert np.array_equal(full(entry), blob(10 * number + part))


def test_goes_on_after_a_kill_and_refuses_other_annotations(coco, tmp_path):
    source, path = coco
    words = ("--shard-size", "3")
    assert make(source, tmp_path / "out", path, *words).returncode == 0
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "pictures-000001.tar").unlink()
    (tmp_path / "out" / ".pictures-000001.tar.writing").write_bytes(b"torn")
    done = make(source, tmp_path / "out", path, *words)
    assert done.returncode == 0 and "2 of 3 shards are there already" in done.stdout
    assert contents(tmp_path / "out") == whole
    told = json.loads(path.read_text())
    told["annotations"].pop()
    path.write_text(json.dumps(told))
    done = make(source, tmp_path / "out", path, *words)
    assert done.returncode == 2 and "made of other pictures" in done.stderr
    done = make(tmp_path, tmp_path / "other", path)
    assert done.returncode == 2 and "holds none of the annotated pictures" in done.stderr
