"""COCO-format annotations into SA-1B's layout: every mask is the one that was drawn."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from finetune.coco import CocoSource, Entry, read_coco
from finetune.coco_masks import DEGENERATE, NORMALISED
from finetune.evaluation import EvalDataset
from finetune.folders import find_files, plain_path
from finetune.rle import decode_counts, parse_annotations, sample
from sami.core.errors import BadSample, UserError
from sami.core.exits import run_entry
from sami.core.reading import read_range
from sami.core.scanning import IMAGE
from tests.runs import opened
from tests.test_evaluation import SHAPE
from tools.make_shards import main

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
    told, left_out = Entry([image()], annotations).to_sa1b("00000003.jpg")
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
        ({"bbox": [1, 2, 3, 4]}, "no segmentation, a box only"),
        ({"bbox": [1, 2, 3, 4], "segmentation": []}, "no segmentation, a box only"),
        (None, "not an annotation"),
        ([], "not an annotation"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": {"size": [HEIGHT, WIDTH]}}, "no segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4]]}, "malformed polygon"),
        ({"segmentation": [[], [1, 2]]}, "malformed polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "malformed polygon"),
        ({"segmentation": [SQUARE, "x"]}, "malformed polygon"),
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "polygon far outside of the image"),
        ({"segmentation": [[0, 0, 10**400, 0, 5, 5]]}, "malformed polygon"),
        ({"segmentation": [[3, 3, 3, 3, 3, 3]]}, "flat polygon, without a pixel"),
        ({"segmentation": [[3, 3, 9, 3, 20, 3]]}, "flat polygon, without a pixel"),
        ({"segmentation": [[-9, 3, -3, 3, -5, 20]]}, "polygon outside of the image"),
        ({"segmentation": [[61, 3, 70, 3, 66, 20]]}, "polygon outside of the image"),
        ({"segmentation": [[5, 41, 9, 41, 9, 50]]}, "polygon outside of the image"),
        ({"segmentation": [[0.1, 0.2, 0.9, 0.2, 0.5, 0.8]]}, "polygon in 0..1, not in pixels"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}, "polygon in 0..1, not in pixels"),
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
            "mask size differs from the image's",
        ),
    ],
)
def test_what_is_left_out(annotation, reason):
    good = {"segmentation": [SQUARE]}
    told, left_out = Entry([image()], [annotation, good]).to_sa1b("a.jpg")
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
    """Nine images in a folder, eight of them annotated, three with something wrong."""
    folder = tmp_path / "images" / "below"
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
    (folder / "4.jpg").write_bytes(b"no image")
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return tmp_path / "images", path


@pytest.fixture
def make(capsys):
    """Run the tool in this process; exit code, and what it printed as stdout and stderr."""

    def made(source, out, annotations, *more):
        words = [source, out, "--coco", annotations, "--workers", "1", *more]
        code = run_entry(lambda: main(list(map(str, words))))
        said = capsys.readouterr()
        assert said.err.count("\n") == (code != 0)
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return made


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_shards_of_annotated_images(coco, make, tmp_path):
    source, path = coco
    done = make(source, tmp_path / "out", path, "--shard-size", "3")
    assert done.returncode == 0, done.stderr
    for words in (
        "10 images in the JSON: 9 found in ",
        ", 6 used with their masks, 1 without annotations, 2 left out {",
        "; 1 of those with annotations are not there",
        "left out: below/3.jpg: annotation of another image size",
        "left out: below/4.jpg: not an image",
        "masks left out in all: {'crowd': 1}",
        "6 images, with masks, 3 shard(s)",
    ):
        assert words in done.stdout, done.stdout
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


def test_goes_on_after_a_kill_and_refuses_other_annotations(coco, make, tmp_path):
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
    assert done.returncode == 2 and "made of other images" in done.stderr
    (tmp_path / "empty").mkdir()
    done = make(tmp_path / "empty", tmp_path / "other", path)
    assert done.returncode == 2 and "holds none of the annotated images" in done.stderr


def write(tmp_path, images, annotations, **more):
    """A file of annotations; each image with one of its own masks unless these are given."""
    if annotations is None:
        annotations = [
            {"id": n, "image_id": one["id"], "segmentation": compressed(blob(n))}
            for n, one in enumerate(images)
        ]
    path = tmp_path / "told.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations} | more))
    return path


def drawn(folder, *names):
    """Images of the annotations' size, each of its own colour."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (10 * number, 90, 200 - 10 * number)
        Image.new("RGB", (WIDTH, HEIGHT), colour).save(folder / name, "PNG")
    return folder


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("a.png", "a.png"),
        ("./a.png", "a.png"),
        ("sub/../a.png", "a.png"),
        ("sub\\a.png", "sub/a.png"),
        ("C:\\data\\sub\\a.png", "sub/a.png"),
        ("val2017/a.png", "a.png"),
        ("/home/somebody/images/sub/a.png", "sub/a.png"),
        ("a.png", "sub/deep/a.png"),
        ("images/a.png", "other/a.png"),
        (f"{NFC}/a.png", f"{NFD}/a.png"),
        (f"{NFD}.png", f"{NFC}.png"),
        ("my%20own%20a.png", "my own a.png"),
        ("/data/upload/1/a%23b.png", "upload/1/a#b.png"),
        ("https://host.org/bucket/sub/a.png?token=x/y", "sub/a.png"),
        ("a.PNG", "a.png"),
        ("A.png", "a.png"),
        ("IMAGES/A.PNG", "images/a.png"),
        ("a", "a.png"),
        ("000012", "sub/000012.png"),
    ],
)
def test_a_name_finds_its_file(tmp_path, make, name, file):
    folder = drawn(tmp_path / "images", file, "far/away/z.png", ".hidden/a.png")
    path = write(tmp_path, [image(1, name)], None)
    (found,) = CocoSource.of(read_coco(path), folder).read([0])
    assert found.parts[IMAGE] == (folder / file).read_bytes()
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 0 and "1 images, with masks" in done.stdout


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        (["a.png"], ["x/a.png", "y/a.png"], "'a.png' could be x/a.png or y/a.png"),
        (["z/a.png"], ["x/a.png", "y/a.png"], "'z/a.png' could be x/a.png or y/a.png"),
        (["A.PNG"], ["a.png", "a.Png"], "could be a.Png or a.png"),
        (["x/a.png", "y/a.png"], ["a.png"], "'x/a.png' and 'y/a.png' could both be a.png"),
        (["a", "a.PNG"], ["a.png"], "'a' and 'a.PNG' could both be a.png"),
        (["v/x/a.png"], ["1/x/a.png", "2/x/a.png"], "could be 1/x/a.png or 2/x/a.png"),
    ],
)
def test_what_could_be_two_is_refused(tmp_path, make, names, files, says):
    folder = drawn(tmp_path / "images", *files)
    path = write(tmp_path, [image(n, name) for n, name in enumerate(names)], None)
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 2 and says in done.stderr
    with pytest.raises(UserError, match="could"):
        CocoSource.of(read_coco(path), folder)


def test_the_longest_common_end_decides(tmp_path):
    folder = drawn(tmp_path, "x/a.png", "y/a.png", "y/b.png")
    found = find_files(["v/x/a.png", "v/y/a.png"], folder)
    assert found.files == {"v/x/a.png": "x/a.png", "v/y/a.png": "y/a.png"}
    # where folders are as they are told, what is missing is missing
    assert find_files(["x/a.png", "x/b.png"], folder).files == {"x/a.png": "x/a.png"}
    assert find_files(["x/a.png", "b.png"], folder).files["b.png"] == "y/b.png"
    assert plain_path("a\\b/./c.png") == "a/b/c.png"


def test_a_file_named_twice_has_all_its_masks(tmp_path, make):
    """One entry an object, as some tools write it; and other ways to write the same name."""
    folder = drawn(tmp_path / "images", "sub/a.png", f"sub/{NFC}.png")
    images = [image(1, "sub/a.png"), image(2, "sub\\a.png"), image("3", "./sub/a.png")]
    images += [image(4, f"sub/{NFC}.png"), image(5, f"sub/{NFD}.png")]
    path = write(tmp_path, images, None)
    told = read_coco(path)
    assert len(told.entries) == 2 and not told.left_out
    samples = CocoSource.of(told, folder).read(range(2))
    samples = {sample.key: json.loads(sample.parts["json"]) for sample in samples}
    for name, numbers in (("sub/a.png", [0, 1, 2]), (f"sub/{NFC}.png", [3, 4])):
        entries = samples[name]["annotations"]
        assert [entry["id"] for entry in entries] == numbers
        for entry in entries:
            assert np.array_equal(full(entry), blob(entry["id"]))
    done = make(folder, tmp_path / "out", path)
    assert "2 images in the JSON: 2 found in" in done.stdout


def test_entries_of_one_file_that_differ_in_size(tmp_path, make):
    folder = drawn(tmp_path / "images", "a.png", "b.png")
    images = [image(1, "a.png"), image(2, "a.png") | {"width": 61}, image(3, "b.png")]
    done = make(folder, tmp_path / "out", write(tmp_path, images, None))
    reason = "image entries of one file differ in size"
    assert done.returncode == 0 and f"left out: a.png: {reason}" in done.stdout
    assert f"1 used with their masks, 0 without annotations, 1 left out {{'{reason}': 1}}" in (
        done.stdout
    )
    with pytest.raises(BadSample, match=reason):
        Entry(images[:2], []).to_sa1b("a.png")


@pytest.mark.parametrize("second", [1, "1", 1.0, " 1"])
def test_one_id_for_two_images_is_refused(tmp_path, second):
    images = [image(1, "a.png"), image(7, "c.png"), image(second, "b.png")]
    says = r"^--coco \S+: image id 1 is that of two images, a.png and b.png; give each"
    with pytest.raises(UserError, match=says):
        read_coco(write(tmp_path, images, []))


def test_the_same_entry_twice_counts_once(tmp_path):
    images = [image(1, "a.png"), image("1", "a.png"), image(1, "./a.png"), image(1, "a.png")]
    annotations = [{"id": 1, "image_id": 1, "segmentation": compressed(blob(1))}]
    (entry,) = read_coco(write(tmp_path, images, annotations)).entries.values()
    assert len(entry.annotations) == 1


@pytest.mark.parametrize(
    ("of_image", "of_annotation"),
    [(12, "12"), ("12", 12), (12.0, "12"), ("ab", "ab"), ("0012", "0012"), (10**20, str(10**20))],
)
def test_ids_as_text_and_as_numbers(tmp_path, of_image, of_annotation):
    annotations = [{"image_id": of_annotation, "segmentation": [SQUARE]}]
    told = read_coco(write(tmp_path, [image(of_image, "a.png")], annotations))
    assert [len(entry.annotations) for entry in told.entries.values()] == [1]


def test_what_belongs_to_nothing_is_counted(tmp_path, make):
    folder = drawn(tmp_path / "images", "a.png")
    mask = {"segmentation": compressed(blob(1))}
    images = [
        image(1, "a.png"),
        image(2, ""),
        image(3, None),
        {"id": 4, "file_name": "d.png"},
        image(5, "e.png") | {"width": None},
        {"file_name": "f.png", "width": 3, "height": 4},
        None,
    ]
    annotations = [
        {"image_id": 1, "category_id": 1, **mask},
        {"image_id": 1, "category_id": "1", **mask},
        {"image_id": 1, "category_id": 9, **mask},
        {"image_id": 99, **mask},
        {"image_id": None, **mask},
        {**mask},
        7,
    ]
    path = write(tmp_path, images, annotations, categories=[{"id": 1, "name": "cat"}])
    told = read_coco(path)
    assert told.left_out == {
        "image entry: no file_name": 2,
        "image entry: no size": 2,
        "image entry: no id": 1,
        "image entry: not an object": 1,
        "annotation of an unknown image_id": 1,
        "annotation without an image_id": 3,
        "annotation of an unknown category_id (its mask is used)": 1,
    }
    assert len(told.entries["a.png"].annotations) == 3
    done = make(folder, tmp_path / "out", path)
    assert "1 images in the JSON: 1 found in" in done.stdout
    for reason, count in told.left_out.items():
        assert f"in the JSON: {count} x {reason}" in done.stdout


def test_images_without_annotations_are_found_like_the_others(tmp_path, make):
    folder = drawn(tmp_path / "images", "x/a.png", "x/b.png", f"{NFD}.png", "C.png", "z.png")
    names = ["q/x/a.png", "q/x/b.png", f"{NFC}.png", "c.png", "r/x/a.png", "not there.png"]
    images = [image(number, name) for number, name in enumerate(names)]
    path = write(tmp_path, images, [{"image_id": 0, "segmentation": [SQUARE]}])
    done = make(folder, tmp_path / "out", path)
    words = "6 images in the JSON: 4 found in "  # r/x/a.png would be another's file
    assert words in done.stdout and "1 used with their masks, 5 without annotations" in done.stdout


def test_a_file_without_a_image_that_is_annotated(tmp_path, make):
    folder = drawn(tmp_path / "images", "a.png")
    annotations = [{"image_id": 7, "segmentation": [SQUARE]}] * 2
    for given, says in (
        (annotations, "has an annotation (2 annotation of an unknown image_id); name a file"),
        ([], "has an annotation; name a file"),
    ):
        done = make(folder, tmp_path / "out", write(tmp_path, [image(1, "a.png")], given))
        assert done.returncode == 2 and f"none of its 1 images {says}" in done.stderr


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("part", [[], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]])
def test_a_polygon_of_fewer_than_3_points_leaves_the_others(tmp_path, part, place):
    """Wherever it stands; the mask is that of the others alone, as pycocotools draws them."""
    others = [SQUARE, [40, 5, 50, 5, 45, 20]]
    parts = [*others[:place], part, *others[place:]]
    entry = Entry([image(1, "a.png")], [{"segmentation": parts}, {"segmentation": others}])
    told, left_out = entry.to_sa1b("a.png")
    first, second = (one["segmentation"]["counts"] for one in told["annotations"])
    whole = coco_mask.merge(coco_mask.frPyObjects(others, HEIGHT, WIDTH))
    assert first == second == whole["counts"].decode()
    assert left_out == {DEGENERATE: 1}
    small = [[x / WIDTH if n % 2 == 0 else x / HEIGHT for n, x in enumerate(SQUARE)], part]
    _, left_out = Entry(entry.images, [{"segmentation": small}]).to_sa1b("a.png")
    assert left_out == {NORMALISED: 1}
    folder = drawn(tmp_path / "images", "a.png")
    path = write(tmp_path, entry.images, [{"image_id": 1, "segmentation": parts}])
    (judged,) = EvalDataset(CocoSource.of(read_coco(path), folder), SHAPE)
    assert len(judged.ends) == 1 and judged.notes == [f"left out: {DEGENERATE}"]


def test_evaluation_tells_which_masks_were_left_out(tmp_path):
    folder = drawn(tmp_path / "images", "a.png", "b.png")
    annotations = [
        {"image_id": number, "segmentation": told, "iscrowd": crowd}
        for number in (1, 2)
        for told, crowd in (([SQUARE], 0), (compressed(blob(1)), 1), ([[1, 2, 3]], 0))
    ]
    path = write(tmp_path, [image(1, "a.png"), image(2, "b.png")], annotations)
    for keep, others in ((False, ["object left out: crowd"]), (True, [])):
        source = CocoSource.of(read_coco(path), folder, keep_crowd=keep)
        for judged in EvalDataset(source, SHAPE):
            assert len(judged.ends) == 1 + keep
            assert sorted(judged.notes) == [*others, "object left out: malformed polygon"]


@pytest.mark.parametrize("share", [1.0, 0.75, 0.25])
def test_polygons_in_0_to_1(tmp_path, make, share):
    folder = drawn(tmp_path / "images", "a.png")
    small = [[x / WIDTH if n % 2 == 0 else x / HEIGHT for n, x in enumerate(SQUARE)]]
    annotations = [
        {"image_id": 1, "segmentation": small if n < 8 * share else [SQUARE]} for n in range(8)
    ]
    done = make(folder, tmp_path / "out", write(tmp_path, [image(1, "a.png")], annotations))
    if share > 0.5:
        assert done.returncode == 2 and "multiply x by the image's width" in done.stderr
        assert f"{int(8 * share)} of 8 polygons are in 0..1" in done.stderr
    else:
        assert done.returncode == 0 and "{'polygon in 0..1, not in pixels': 2}" in done.stdout


@pytest.mark.parametrize("told", [0, 0.0, "0", False, None, ""])
def test_what_is_no_crowd(told):
    entry = Entry([image()], [{"segmentation": [SQUARE], "iscrowd": told}])
    assert len(entry.to_sa1b("a.jpg")[0]["annotations"]) == 1


def test_crowds_can_be_kept(tmp_path, make):
    folder = drawn(tmp_path / "images", "a.png")
    annotations = [
        {"image_id": 1, "iscrowd": 1, "segmentation": runs_of(blob(5))},
        {"image_id": 1, "iscrowd": 1, "segmentation": compressed(blob(6))},
    ]
    path = write(tmp_path, [image(1, "a.png")], annotations)
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 2
    assert "1 no usable mask (crowd); masks: 2 crowd" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    done = make(folder, tmp_path / "out", path, "--keep-crowd")
    assert done.returncode == 0, done.stderr
    (source,) = opened(f"{tmp_path}/out/*.tar", tmp_path)
    (sample,) = read_range(source.shards, range(1), (IMAGE, "json"))
    entries = json.loads(sample.parts["json"])["annotations"]
    assert [np.array_equal(full(e), blob(n)) for e, n in zip(entries, (5, 6), strict=True)]
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 2 and "keep_crowd" in done.stderr


def test_nothing_with_masks_ends_with_the_reasons(tmp_path, make):
    folder = drawn(tmp_path / "images", *(f"{n}.png" for n in range(5)))
    bad = [
        {"segmentation": runs_of(blob(0)), "iscrowd": 1},
        {"segmentation": [[3, 3, 9, 3, 20, 3]]},
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": [[-9, 3, -3, 3, -5, 20]]},
        {"segmentation": [[1, 2]]},
    ]
    annotations = [{"image_id": n} | one for n, one in enumerate(bad)]
    path = write(tmp_path, [image(n, f"{n}.png") for n in range(5)], annotations)
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 2 and "none of the 5 images" in done.stderr
    for reason in (
        "1 crowd",
        "1 flat polygon, without a pixel",
        "1 no segmentation, a box only",
        "1 polygon outside of the image",
        "1 malformed polygon",
    ):
        assert reason in done.stderr.split("; masks: ")[1]


@pytest.mark.parametrize("name", ["a.bmp", "a.tif", "a.gif", "a"])
def test_images_of_other_kinds_keep_their_masks(tmp_path, make, name):
    folder = tmp_path / "images"
    folder.mkdir()
    kind = {"a.bmp": "BMP", "a.tif": "TIFF", "a.gif": "GIF", "a": "JPEG"}[name]
    Image.linear_gradient("L").resize((WIDTH, HEIGHT)).save(folder / name, kind)
    done = make(folder, tmp_path / "out", write(tmp_path, [image(1, name)], None))
    assert done.returncode == 0, done.stderr
    (source,) = opened(f"{tmp_path}/out/*.tar", tmp_path)
    (sample,) = read_range(source.shards, range(1), (IMAGE, "json"))
    pixels = [
        np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        for data in (sample.parts[IMAGE], (folder / name).read_bytes())
    ]
    assert np.array_equal(*pixels)
    told = json.loads(sample.parts["json"])
    assert told["image"]["file_name"] == f"00000000.{'jpg' if name == 'a' else 'png'}"
    assert np.array_equal(full(told["annotations"][0]), blob(0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("on", ["upright", "stored"])
def test_a_turned_tiff_becomes_the_image_that_its_masks_lie_on(tmp_path, make, orientation, on):
    """PNG has no orientation: the pixels are written the way round that the annotation has them."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "a.tif", exif=exif)
    turns = orientation > 4 and on == "upright"
    size = (HEIGHT, WIDTH) if turns else (WIDTH, HEIGHT)
    told = image(1, "a.tif") | {"width": size[0], "height": size[1]}
    mask = np.zeros(size[::-1], np.uint8)
    mask[3:9, 5:20] = 1
    path = write(tmp_path, [told], [{"image_id": 1, "segmentation": compressed(mask)}])
    done = make(folder, tmp_path / "out", path, "--masks-drawn-on", on)
    assert done.returncode == 0, done.stderr
    (source,) = opened(f"{tmp_path}/out/*.tar", tmp_path)
    (sample,) = read_range(source.shards, range(1), (IMAGE, "json"))
    found = np.asarray(Image.open(io.BytesIO(sample.parts[IMAGE])))
    with Image.open(folder / "a.tif") as stored:
        upright = np.asarray(stored)
    assert np.array_equal(found, upright if on == "upright" else pixels)
    assert "drawn_on" not in json.loads(sample.parts["json"])["image"]


def test_a_number_that_python_does_not_read_costs_its_annotation(tmp_path, make):
    folder = drawn(tmp_path / "images", "a.png")
    path = write(
        tmp_path,
        [image(1, "a.png")],
        [{"image_id": 1, "segmentation": [SQUARE]}, {"image_id": 1, "segmentation": [[777] * 6]}],
    )
    path.write_text(path.read_text().replace("777", "7" * 5000, 1))
    done = make(folder, tmp_path / "out", path)
    assert done.returncode == 0 and "{'malformed polygon': 1}" in done.stdout
