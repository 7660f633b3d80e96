"""Drawn scenes: exact masks, SA-1B's layout, the same bytes every time."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sami.core.index import open_sources
from sami.core.patterns import expand
from tests.runs import ROOT, run
from tools.make_toy_shards import MIN_AREA, annotate, draw_scene


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under NumPy 2
@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_masks_are_exact_disjoint_and_survive_the_run_lengths(size):
    height, width = size
    for number in range(6):
        image, masks = draw_scene(3, number, height, width)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        assert np.sum(masks, axis=0).max() <= 1
        told = annotate(number, masks, height, width, 3)
        assert told["image"] == {
            "image_id": number,
            "width": width,
            "height": height,
            "file_name": f"sa_{number}.jpg",
        }
        assert len(told["annotations"]) == len(masks) > 0
        for annotation, mask in zip(told["annotations"], masks, strict=True):
            assert np.array_equal(coco_mask.decode(annotation["segmentation"]), mask)
            assert annotation["area"] == mask.sum() >= MIN_AREA
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = columns[0], rows[0]
            assert annotation["bbox"] == [x, y, columns[-1] - x + 1, rows[-1] - y + 1]
            ((px, py),) = annotation["point_coords"]
            assert mask[int(py), int(px)]


def test_objects_differ_from_their_ground():
    """A mask is where the image changes: across its border colours differ more than inside."""
    across, inside = [], []
    for number in range(20):
        image, masks = draw_scene(0, number, 128, 128)
        steps = np.abs(np.diff(image.astype(int), axis=1)).sum(-1)
        for mask in masks:
            border = mask[:, 1:] != mask[:, :-1]
            across.append(steps[border].mean())
            inside.append(steps[mask[:, 1:] & mask[:, :-1]].mean())
    assert np.mean(np.array(across) > np.array(inside)) > 0.9


def draw(folder, *more):
    words = [
        sys.executable,
        str(ROOT / "tools/make_toy_shards.py"),
        str(folder),
        "--images",
        "10",
    ]
    return run([*words, "--size", "64x80", *more])


def test_shards(tmp_path):
    done = draw(tmp_path / "a", "--shards", "3", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert draw(tmp_path / "b", "--shards", "3", "--workers", "2").returncode == 0
    assert draw(tmp_path / "c", "--shards", "3", "--seed", "1").returncode == 0
    pattern = done.stdout.split(": ")[-1].strip()
    (source,) = open_sources(expand(pattern, "k"), tmp_path / "index")
    assert [shard.count for shard in source.shards] == [3, 3, 4]
    for shard in source.shards:
        name = f"{shard.name}.tar"
        same, other = (tmp_path / folder / name for folder in "bc")
        data = (tmp_path / "a" / name).read_bytes()
        assert data == same.read_bytes() != other.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            names = tar.getnames()
            for jpg, text in zip(names[::2], names[1::2], strict=True):
                assert jpg.removesuffix(".jpg") == text.removesuffix(".json")
                told = json.loads(tar.extractfile(text).read())
                image = Image.open(tar.extractfile(jpg))
                assert image.size == (80, 64) == (told["image"]["width"], told["image"]["height"])


def test_bad_options(tmp_path):
    for words in (["--shards", "11"], ["--size", "3"], ["--workers", "0"]):
        done = draw(tmp_path, *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
    (tmp_path / "file").touch()
    done = draw(tmp_path / "file")
    assert done.returncode == 2 and "is a file" in done.stderr


def test_layout_is_that_of_the_real_thing():
    real = ROOT.parent / "shared/data/sa1b_layout/train/sa_000000.tar"
    if not real.exists():
        pytest.skip("the real tars (../shared/data/sa1b_layout) are not here")
    with tarfile.open(real) as tar:
        theirs = json.loads(tar.extractfile(tar.getnames()[1]).read())
    _, masks = draw_scene(0, 0, 96, 96)
    ours = annotate(0, masks, 96, 96, 0)
    assert ours.keys() == theirs.keys() and ours["image"].keys() == theirs["image"].keys()
    for key, value in theirs["annotations"][0].items():
        assert type(ours["annotations"][0][key]) is type(value), key
