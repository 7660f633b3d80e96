"""Shards in SA-1B's layout become polygons that fill to the masks; resumable, strict."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import webdataset as wds
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from finetune.fastsam import FastSam
from finetune.polygons import CUT_OUT, DROPPED, FILLED, JOINED, outline, ring_area, simplify
from tests.runs import ROOT, kill, run, start, wait_for
from tools.sa1b_to_yolo import file_name, main

CONFIG = ROOT / "configs/fastsam/yolov8x_seg.yaml"


# ---- Polygons


def filled(ring, height, width):
    """The pixels whose centres a ring holds by the even-odd rule, edge by edge."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = (a, b) if (a[1], a[0]) < (b[1], b[0]) else (b, a)
        if y0 != y1:
            left = columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0)
            inside ^= (y0 <= rows) & (rows < y1) & left
    return inside


def blobs(seed, height=40, width=60):
    noise = np.random.default_rng(seed).normal(size=(height, width))
    return ndimage.gaussian_filter(noise, 1 + seed % 3) > 0.05


def holes(mask):
    """Pieces of the background that touch the border nowhere, also not by a corner."""
    pieces = ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))[1]
    return pieces - 1


@pytest.mark.parametrize("seed", range(12))
def test_a_polygon_fills_to_its_mask(seed):
    """Holes in parts, parts in holes, pixels that touch at a corner; nothing is lost."""
    mask = blobs(seed)
    ring, done = outline(mask, 0.0)
    assert (filled(ring, *mask.shape) == mask).all()
    assert done[JOINED] + 1 == ndimage.label(mask)[1]
    assert done[CUT_OUT] == holes(mask)
    assert ring.min() >= 0 and (ring <= [60, 40]).all()


@pytest.mark.slow
def test_fewer_points_stay_close():
    for seed in range(12):
        mask = blobs(seed, 80, 120)
        exact, _ = outline(mask, 0.0)
        ring, _ = outline(mask, 1.0)
        assert len(ring) < 0.7 * len(exact)
        wrong = filled(ring, 80, 120) != mask
        # Only near the outline: within the tolerance and half of a pixel's diagonal.
        mask, wrong = np.pad(mask, 1), np.pad(wrong, 1)  # what is beyond the border is outside
        inner = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
        assert inner[wrong].max(initial=0) <= 1.0 + 1.5


def test_simplify_drops_only_what_is_within_the_tolerance():
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = 50 * np.stack([np.cos(angle), np.sin(angle)], 1)
    few = simplify(circle, 1.0)
    assert 8 < len(few) < 30 and ring_area(few) == pytest.approx(np.pi * 2500, rel=0.05)
    chord = np.hypot(*(few - np.roll(few, 1, 0)).T)
    assert (50 - np.sqrt(2500 - chord**2 / 4) <= 1.0 + 1e-9).all()
    spur = np.array([[0, 0], [4, 0.1], [10, 0], [10, 5], [14, 0.1], [10, -5], [0, -5.0]])
    assert [14, 0.1] in simplify(spur, 1.0).tolist()
    back = np.array([[0, 0], [-3, 0.1], [5, 0], [10, 0], [10, 9.0]])  # beyond its segment's end
    assert [-3, 0.1] in simplify(back, 1.0).tolist()
    assert len(simplify(circle[:3], 1e9)) == 3  # never less than a triangle
    square = np.array([[0, 0], [5, 0], [10, 0], [10, 10], [0, 10], [0, 4]])
    assert simplify(square, 0.0).tolist() == [[0, 0], [10, 0], [10, 10], [0, 10]]


def test_small_holes_and_parts_are_counted():
    mask = np.zeros((60, 80), bool)
    mask[5:35, 5:35] = True
    mask[10:20, 10:20] = False  # a hole of 100
    mask[25:28, 25:28] = False  # of 9
    mask[40:55, 40:70] = True  # a part
    mask[50:52, 5:8] = True  # of 6
    mask[2:4, 60:79] = True  # of 38
    ring, done = outline(mask, 0.0, 38)
    assert done == {CUT_OUT: 1, FILLED: 1, JOINED: 2, DROPPED: 1}
    ring, done = outline(mask, 0.0, 100)
    assert done == {CUT_OUT: 1, FILLED: 1, JOINED: 1, DROPPED: 2}
    ring, done = outline(mask, 0.0, 101)
    assert done == {FILLED: 2, JOINED: 1, DROPPED: 2}
    ring, done = outline(mask, 0.0, 50)
    assert done == {CUT_OUT: 1, FILLED: 1, JOINED: 1, DROPPED: 2}
    expected = mask.copy()
    expected[25:28, 25:28], expected[50:52, 5:8], expected[2:4] = True, False, False
    assert (filled(ring, 60, 80) == expected).all()
    only = mask[48:54, 2:10]
    ring, done = outline(only, 0.5, 50)  # the largest part stays, however small
    assert (filled(ring, *only.shape) == only).all() and not done


# ---- The tool


def annotation(mask, **more):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"segmentation": rle | {"counts": rle["counts"].decode()}} | more


def write_shard(path, samples):
    """A tar of (key, image, masks or JSON); masks [N, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for key, image, masks in samples:
            sample = {"__key__": key, "jpg": image}
            if isinstance(masks, bytes):
                sample["json"] = masks
            elif masks is not None:
                info = {"height": masks.shape[1], "width": masks.shape[2]}
                content = {"image": info, "annotations": [annotation(mask) for mask in masks]}
                sample["json"] = json.dumps(content).encode()
            writer.write(sample)
    return path


def jpeg(seed, height=40, width=60, **more):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **more)
    return buffer.getvalue()


def samples(first, count):
    return [
        (f"sa_{n}", jpeg(n), np.stack([blobs(2 * n), blobs(2 * n + 1)]))
        for n in range(first, first + count)
    ]


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "in/sa_000.tar", samples(0, 40))
    write_shard(tmp_path / "in/sa_001.tar", samples(40, 3))
    write_shard(tmp_path / "in/sa_999.tar", samples(99, 2))
    return tmp_path / "in"


def words(shards, out, *more):
    train, val = str(shards / "sa_00*.tar"), str(shards / "sa_999.tar")
    return [train, "--val", val, "--out", str(out), "--workers", "1", *more]


def contents(folder):
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "index" not in str(name)}


def rings(file, height, width):
    lines = [line.split() for line in file.read_text().splitlines()]
    assert all(line[0] == "0" for line in lines)
    return [np.array(line[1:], float).reshape(-1, 2) * [width, height] for line in lines]


def test_images_and_labels(shards, tmp_path, in_process, capsys):
    out = tmp_path / "out"
    assert in_process(main, words(shards, out, "--min-area", "0"))[0] == 0
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "train": "train",
        "val": "val",
        "names": {0: "object"},
    }
    images = sorted((out / "train").rglob("*.jpg"))
    assert len(images) == 43 and len(list((out / "val").rglob("*.jpg"))) == 2
    with tarfile.open(shards / "sa_000.tar") as tar:
        assert (out / "train/sa_000/images/sa_7.jpg").read_bytes() == (
            tar.extractfile("sa_7.jpg").read()
        )
    for number in (0, 7, 39):
        found = rings(out / f"train/sa_000/labels/sa_{number}.txt", 40, 60)
        for ring, mask in zip(found, (blobs(2 * number), blobs(2 * number + 1)), strict=True):
            drawn = filled(ring, 40, 60)
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
    assert not list(out.rglob("*.writing")) and not list(out.rglob("piece-*"))


def test_what_it_says(shards, tmp_path):
    done = run(
        [sys.executable, str(ROOT / "tools/sa1b_to_yolo.py"), *words(shards, tmp_path / "o")]
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"train: 43 images, 86 objects; .*\d+ holes cut out", done.stdout)
    assert re.search(r"val: 2 images, 4 objects", done.stdout)
    last = done.stdout.splitlines()[-1]
    assert last == f"yolo train cfg=configs/fastsam/yolov8x_seg.yaml data={tmp_path}/o/data.yaml"
    assert "converting 32 images at a time 4/4" in done.stdout


def test_resumes_after_a_kill(shards, tmp_path):
    tool = [sys.executable, str(ROOT / "tools/sa1b_to_yolo.py")]
    assert run([*tool, *words(shards, tmp_path / "whole")]).returncode == 0
    process = start([*tool, *words(shards, tmp_path / "cut")])
    wait_for(lambda: list((tmp_path / "cut").rglob("piece-*.json")), process, pause=0.001)
    kill(process)
    for torn in (tmp_path / "cut/train").glob(".sa_000-*.writing"):
        (torn / "labels/sa_39.txt").write_text("0 0.")
    done = run([*tool, *words(shards, tmp_path / "cut")])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_finished_shards_stay_and_others_may_follow(shards, tmp_path, in_process, capsys):
    out = tmp_path / "out"
    first, val = str(shards / "sa_000.tar"), str(shards / "sa_999.tar")
    assert in_process(main, [first, "--val", val, "--out", str(out)])[0] == 0
    before = {name: data for name, data in contents(out).items() if "sa_000" in str(name)}
    times = {path: path.stat().st_mtime_ns for path in (out / "train").rglob("*.jpg")}
    assert in_process(main, words(shards, out))[0] == 0
    after = contents(out)
    assert before.items() <= after.items() and len(after) > len(before)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    capsys.readouterr()
    run_again = [first, "--val", val, "--out", str(out)]
    assert main(run_again) == 0
    told = capsys.readouterr().out
    assert "2 of 2 shards are there already" in told
    assert f"train: 1 other shards in {out / 'train'} belong to it too" in told


def test_work_of_other_options_is_refused_or_replaced(shards, tmp_path, in_process):
    out = tmp_path / "out"
    (out / "train/.sa_000-0123456789abcdef.writing").mkdir(parents=True)  # was never finished
    assert in_process(main, words(shards, out))[0] == 0
    assert not list((out / "train").glob(".*"))
    before = contents(out)
    code, error = in_process(main, words(shards, out, "--min-area", "7"))
    assert code == 2 and "made of another shard or with another --min-area" in error
    write_shard(shards / "sa_001.tar", samples(60, 3))
    code, error = in_process(main, words(shards, out))
    assert code == 2 and "train/sa_001 was made of another shard" in error
    assert contents(out) == before
    (out / "train/sa_001/done.json").unlink()
    code, error = in_process(main, words(shards, out))
    assert code == 2 and "train/sa_001 is damaged or of another program" in error
    shutil.rmtree(out / "train/sa_001")
    assert in_process(main, words(shards, out))[0] == 0


def test_what_cannot_be_used_is_counted(shards, tmp_path, in_process, capsys):
    mask = blobs(0)
    good = {"image": {"height": 40, "width": 60}, "annotations": [annotation(mask)]}
    empty = {"image": {"height": 40, "width": 60}, "annotations": []}
    bad = annotation(mask)
    bad["segmentation"] = {"size": [40, 60], "counts": [5]}
    some = good | {"annotations": [annotation(mask), bad, annotation(mask & False)]}
    encode = {name: json.dumps(one).encode() for name, one in
              {"good": good, "empty": empty, "some": some}.items()}  # fmt: skip
    write_shard(
        shards / "sa_001.tar",
        [
            ("a", jpeg(0), encode["some"]),
            ("b", jpeg(0), None),
            ("c", jpeg(0), encode["empty"]),
            ("d", jpeg(0), b"no JSON"),
            ("e", jpeg(0)[:1500], encode["good"]),
            ("f", jpeg(0, 41), encode["good"]),
            ("folder/g.h", jpeg(0), encode["good"]),
        ],
    )
    assert main(words(shards, tmp_path / "out")) == 0
    told = capsys.readouterr().out
    assert "train: 42 images, 82 objects" in told
    for reason in ("no json member", "no usable mask", "annotation is not JSON", "damaged image"):
        assert f"1 {reason}" in told
    assert "1 annotation of another image size" in told
    assert "1 run lengths do not fit their size" in told and "1 mask is empty" in told
    made = {path.name for path in (tmp_path / "out/train/sa_001").rglob("*.*")}
    assert made == {"a.jpg", "a.txt", "folder%2Fg.h.jpg", "folder%2Fg.h.txt", "done.json"}


def test_names_stay_different_and_seen():
    names = ["a/b", "a%2Fb", "a_b", ".a", "..", "%2E.", "a.b.c"]
    assert len({file_name(name) for name in names}) == len(names)
    assert not any("/" in file_name(n) or file_name(n).startswith(".") for n in names)


def test_turned_images_lie_as_their_masks_do(shards, tmp_path, in_process):
    """Programs differ in whether they turn an image by EXIF: it is written so that none can."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(3, exif=exif)
    write_shard(
        shards / "sa_001.tar", [("stored", data, blobs(0)[None]), ("up", data, blobs(0).T[None])]
    )
    assert in_process(main, words(shards, tmp_path / "out"))[0] == 0
    stored = Image.open(tmp_path / "out/train/sa_001/images/stored.png")
    upright = Image.open(tmp_path / "out/train/sa_001/images/up.png")
    assert stored.size == (60, 40) and upright.size == (40, 60)
    assert not stored.getexif() and not upright.getexif()
    plain = np.asarray(Image.open(io.BytesIO(data)))
    assert (np.asarray(stored) == plain).all()
    assert (np.asarray(upright) == np.rot90(plain, -1)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, o: [str(s), "--val", str(s / "sa_999.tar"), "--out", o], "is a folder; name"),
        (lambda s, o: [str(s / "x.tar"), "--val", str(s / "sa_999.tar"), "--out", o], "no file"),
        (lambda s, o: [str(s / "sa_0*.tar"), "--val", str(s / "sa_001.tar"), "--out", o],
         "1 of the 1 shards of --val are shards of PATTERN too"),
        (lambda s, o: [str(s / "sa_0*.tar"), "--out", o], "--val is missing"),
        (lambda s, o: words(s, o, "--min-area", "-1"), "--min-area -1 must be 0 or more"),
        (lambda s, o: words(s, o, "--workers", "0"), "--workers 0 must be positive"),
        (lambda s, o: words(s, s / "sa_000.tar"), "cannot be written"),
        (lambda s, o: [str(s / "text.tar"), "--val", str(s / "sa_999.tar"), "--out", o],
         "text.tar is not a readable tar"),
        (lambda s, o: [str(s / "plain.tar"), "--val", str(s / "sa_999.tar"), "--out", o],
         "none of the images of train could be used (2 no json member)"),
    ],
)  # fmt: skip
def test_bad_input(shards, tmp_path, in_process, change, says):
    (shards / "text.tar").write_text("no tar")
    write_shard(shards / "plain.tar", [("a", jpeg(0), None), ("b", jpeg(1), None)])
    code, error = in_process(main, change(shards, str(tmp_path / "out")))
    assert code == 2 and says in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out/train/plain").exists()


def test_a_shard_is_held_out_or_trained_on(shards, tmp_path, in_process):
    out = tmp_path / "out"
    assert in_process(main, words(shards, out))[0] == 0
    swapped = [str(shards / "sa_999.tar"), "--val", str(shards / "sa_001.tar"), "--out", str(out)]
    code, error = in_process(main, swapped)
    assert code == 2 and f"sa_999 is in {out / 'val'} already" in error


# ---- With ultralytics


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    """The package, with its settings out of the way; skips where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("YOLO_OFFLINE", "true")
        yield pytest.importorskip(
            "ultralytics", reason="ultralytics is not installed (pip install -e '.[fastsam]')"
        )


def test_ultralytics_fills_the_masks(ultralytics, tmp_path, in_process):
    """With its own code for training, at its mask resolution, holes included."""
    from ultralytics.data.utils import polygons2masks, verify_image_label

    wheel = np.zeros((512, 512), bool)
    rows, columns = np.mgrid[:512, :512]
    distance = np.hypot(rows - 256, columns - 256)
    wheel[(distance < 240) & (distance > 120)] = True
    wheel[distance < 40] = True
    for name in ("sa_000", "sa_999"):
        seed = int(name[-3:])
        write_shard(tmp_path / f"in/{name}.tar", [("a", jpeg(seed, 512, 512), wheel[None])])
    out = tmp_path / "out"
    code, error = in_process(main, words(tmp_path / "in", out))
    assert code == 0, error
    image = out / "train/sa_000/images/a.jpg"
    label = out / "train/sa_000/labels/a.txt"
    found = verify_image_label((str(image), str(label), "", False, 1, 0, 0, False))
    assert found[5:9] == (0, 1, 0, 0)  # not missing, found, not empty, not corrupt
    (mask,) = polygons2masks((512, 512), [found[3][0] * 512], 1, downsample_ratio=4)
    truth = wheel.reshape(128, 4, 128, 4).mean((1, 3)) > 0.5
    assert (mask.astype(bool) & truth).sum() / (mask.astype(bool) | truth).sum() > 0.95


def test_the_config_is_what_ultralytics_reads(ultralytics, tmp_path):
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import yaml_model_load

    told = yaml.safe_load(CONFIG.read_text())
    read = get_cfg(overrides=told)  # refuses unknown keys
    assert (read.imgsz, read.batch, read.epochs, read.overlap_mask) == (1024, 32, 100, False)
    command = re.search(r"#   (package=.*?fastsam_x.yaml)", CONFIG.read_text(), re.S)[1]
    command = command.replace("\n# ", "\n").replace("(pip", f"({sys.executable} -m pip")
    made = subprocess.run(["bash", "-c", command], cwd=tmp_path)
    assert made.returncode == 0
    definition = yaml_model_load(str(tmp_path / "fastsam_x.yaml"))
    assert definition["reg_max"] == 26 and list(definition["scales"]) == ["x"]


@pytest.mark.slow
def test_ultralytics_trains_on_it(ultralytics, tmp_path):
    """A few steps with the shipped config, smaller; and FastSam opens what it saves."""
    write_shard(tmp_path / "in/sa_000.tar", samples(0, 8))
    write_shard(tmp_path / "in/sa_999.tar", samples(99, 2))
    tool = [sys.executable, str(ROOT / "tools/sa1b_to_yolo.py")]
    assert run([*tool, *words(tmp_path / "in", tmp_path / "out")]).returncode == 0
    small = ["model=yolov8n-seg.yaml", "epochs=1", "batch=4", "imgsz=64", "device=cpu", "workers=0"]
    small += ["plots=False", f"project={tmp_path / 'runs'}", "name=a"]
    code = "import sys; from ultralytics.cfg import entrypoint; sys.exit(entrypoint())"
    train = ["train", f"cfg={CONFIG}", f"data={tmp_path / 'out/data.yaml'}", *small]
    done = run([sys.executable, "-c", code, *train])
    assert done.returncode == 0, done.stderr[-2000:]
    model = FastSam.load(tmp_path / "runs/a/weights/last.pt", image_size=64, conf=0.0)
    found = model.everything(np.zeros((40, 60, 3), np.uint8))
    assert found.masks.shape[1:] == (40, 60) and len(found.masks) == len(found.scores) > 0
