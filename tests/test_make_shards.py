"""A folder of images becomes shards: every byte once, resumable, strict."""

import errno
import hashlib
import io
import json
import re
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from finetune.class_names import Classes, class_folders
from finetune.packing import SourceImage, listing
from sami.core.exits import run_entry
from sami.core.patterns import expand
from sami.core.reading import read_range
from sami.core.scanning import IMAGE
from tests.runs import ROOT, kill, opened, run, start, wait_for
from tools.make_shards import main


def make(source, out, *more):
    return [sys.executable, str(ROOT / "tools/make_shards.py"), str(source), str(out), *more]


def image(seed, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number in range(23):
        place = folder / ["zebra", "ant", "b.c"][number % 3]
        place.mkdir(parents=True, exist_ok=True)
        name = f"pic.ture {number}" + [".JPG", ".jpeg", ".png"][number // 3 % 3]
        (place / name).write_bytes(image(number, "PNG" if name.endswith("png") else "JPEG"))
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / "._hidden.jpg").write_bytes(b"x")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_every_image_once_with_its_label(source, tmp_path):
    done = run(make(source, tmp_path / "out", "--shard-size", "5", "--prefix", "mine"))
    assert done.returncode == 0, done.stderr
    pattern = done.stdout.strip().splitlines()[-1].split("'")[1]
    (source_of_shards,) = opened(pattern, tmp_path)
    index = source_of_shards.shards
    assert [shard.count for shard in index] == [5, 5, 5, 5, 3]
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == ["ant", "b.c", "zebra"]
    found = {}
    for shard in index:
        with tarfile.open(shard.url) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in members.items():
            if not name.endswith(".cls"):
                assert name.count(".") == 1 and name == name.lower()
                found[data] = classes[int(members[name.split(".")[0] + ".cls"])]
    expected = {
        path.read_bytes(): path.parent.name
        for path in source.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    }
    assert found == expected and len(found) == 23


def test_resumes_after_a_kill(source, tmp_path):
    words = ("--shard-size", "1", "--workers", "1")
    assert run(make(source, tmp_path / "whole", *words)).returncode == 0
    process = start(make(source, tmp_path / "cut", *words))
    wait_for(lambda: list((tmp_path / "cut").glob("*.tar")), process, pause=0.001)
    kill(process)
    (tmp_path / "cut" / ".pictures-000022.tar.writing").write_bytes(b"torn")
    there = contents(tmp_path / "cut")
    done = run(make(source, tmp_path / "cut", *words))
    assert done.returncode == 0, done.stderr
    assert len(there) == 23 or "are there already" in done.stdout
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_another_source_or_option_is_refused(source, tmp_path):
    out = tmp_path / "out"
    assert run(make(source, out, "--shard-size", "5")).returncode == 0
    before = contents(out)
    for more in (["--shard-size", "6"], ["--shard-size", "5", "--seed", "1"]):
        done = run(make(source, out, *more))
        assert done.returncode == 2 and "other options" in done.stderr
    (source / "ant" / "more.jpg").write_bytes(image(99))
    done = run(make(source, out, "--shard-size", "5"))
    assert done.returncode == 2 and "the images, their labels" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(out) == before


def test_unusable_images_are_left_out_and_named(source, tmp_path):
    (source / "ant" / "text.jpg").write_text("no image")
    (source / "ant" / "empty.png").touch()
    done = run(make(source, tmp_path / "out"))
    assert done.returncode == 0
    assert "left out: ant/text.jpg: not an image" in done.stdout
    assert "left out: ant/empty.png: empty file" in done.stdout
    assert "23 images, 3 classes, 1 shard(s)" in done.stdout
    assert expand(done.stdout.strip().splitlines()[-1].split("'")[1], "k")


def test_a_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(image(number))
    assert run(make(tmp_path / "flat", tmp_path / "out")).returncode == 0
    with tarfile.open(tmp_path / "out" / "pictures-000000.tar") as tar:
        assert tar.getnames() == ["00000000.jpg", "00000001.jpg", "00000002.jpg"]
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize(
    ("case", "says"),
    [("missing", "is not a folder"), ("empty", "holds no image"), ("mixed", "beside them")],
)
def test_bad_sources(case, says, source, tmp_path):
    (tmp_path / "empty").mkdir()
    (source / "loose.jpg").write_bytes(image(0))
    place = {"missing": tmp_path / "nowhere", "empty": tmp_path / "empty", "mixed": source}[case]
    done = run(make(place, tmp_path / "out"))
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_bad_options(source, tmp_path):
    (tmp_path / "file").touch()
    for words, says in (
        (make(source, tmp_path / "out", "--shard-size", "0"), "--shard-size 0"),
        (make(source, tmp_path / "out", "--prefix", "a/b"), "--prefix"),
        (make(source, tmp_path / "file"), "cannot be written"),
    ):
        done = run(words)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def called(capsys):
    """Run the tool in this process: exit code, what it printed, what it said of an error."""

    def call(*words):
        code = run_entry(lambda: main([*map(str, words), "--workers", "1"]))
        said = capsys.readouterr()
        assert (code == 0) == (said.err == "") and said.err.count("\n") == (code != 0)
        return code, said.out, said.err

    return call


def fill(folder, *names, kind="JPEG"):
    """An image of its own under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(zlib.crc32(f"{folder}{name}".encode()), kind))
    return folder


def labels(out):
    """The class number of each image in the shards of a folder, by its bytes."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in members.items():
            if not name.endswith(".cls"):
                found[data] = int(members.get(name.split(".")[0] + ".cls", b"-1"))
    return found


@pytest.fixture
def trained(tmp_path, called):
    """Training shards of three classes."""
    source = fill(tmp_path / "train", "ant/1.jpg", "bee/1.jpg", "Cat/1.jpg")
    code, said, _ = called(source, tmp_path / "shards", "--prefix", "train")
    assert code == 0 and "3 classes: Cat 1, ant 1, bee 1" in said
    return tmp_path / "shards"


@pytest.mark.parametrize("how", ["--like folder", "--like pattern", "--like shard", "--classes"])
def test_held_out_images_get_the_training_sets_numbers(trained, tmp_path, called, how):
    word = {
        "--like folder": trained,
        "--like pattern": f"{trained}/train-*.tar",
        "--like shard": trained / "train-000000.tar",
        "--classes": trained / "classes.json",
    }[how]
    val = fill(tmp_path / "val", "bee/1.jpg", "bee/2.jpg")
    code, said, _ = called(val, tmp_path / "out", how.split()[0], word)
    assert code == 0 and "3 classes: Cat 0, ant 0, bee 2; no image of 'Cat', 'ant'" in said
    assert set(labels(tmp_path / "out").values()) == {2}
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["Cat", "ant", "bee"]


def test_names_that_are_not_known_are_all_told(trained, tmp_path, called):
    val = fill(tmp_path / "val", "Ant/1.jpg", "bee/1.jpg", "beee/1.jpg", "wasp/1.jpg")
    code, _, error = called(val, tmp_path / "out", "--like", trained)
    assert code == 2 and "3 of 4 class names are not in" in error
    assert "'Ant' ('ant' there), 'beee' ('bee' there), 'wasp';" in error
    assert not (tmp_path / "out").exists()


def test_unicode_forms_of_a_name_are_one(tmp_path, called):
    train = fill(tmp_path / "train", "caf\u00e9/1.jpg", "a/1.jpg")  # composed
    assert called(train, tmp_path / "one")[0] == 0
    val = fill(tmp_path / "val", "cafe\u0301/1.jpg")  # as macOS writes it
    assert called(val, tmp_path / "two", "--like", tmp_path / "one")[0] == 0
    assert list(labels(tmp_path / "two").values()) == [1]


def test_a_second_prefix_keeps_the_list(trained, tmp_path, called):
    """Same classes are fine; a folder that lacks one is refused, and told what to do."""
    before = (trained / "classes.json").read_bytes()
    val = fill(tmp_path / "val", "ant/9.jpg", "bee/9.jpg")
    code, _, error = called(val, trained, "--prefix", "val")
    assert code == 2 and "1 are in it alone, such as 'Cat'" in error
    assert f"--classes {trained}/classes.json" in error
    assert (trained / "classes.json").read_bytes() == before and not list(trained.glob("val*"))
    words = (val, trained, "--prefix", "val", "--classes", trained / "classes.json")
    assert called(*words)[0] == 0
    assert (trained / "classes.json").read_bytes() == before
    assert sorted(labels(trained).values()) == [0, 1, 1, 2, 2]


def test_what_is_refused_leaves_no_list(tmp_path, called):
    """Shards of other images are there, and their classes.json is not."""
    one, other = fill(tmp_path / "1", "ant/1.jpg"), fill(tmp_path / "2", "bee/1.jpg", "cat/2.jpg")
    assert called(one, tmp_path / "out")[0] == 0
    (tmp_path / "out/classes.json").unlink()
    before = sorted((tmp_path / "out").iterdir())
    assert called(other, tmp_path / "out")[0] == 2
    assert sorted((tmp_path / "out").iterdir()) == before


def test_names_that_were_listed_as_ascii(tmp_path):
    """As LC_ALL=C without UTF-8 mode has them: escapes of their bytes."""
    listed = ["caf\udcc3\udca9/a.png", "\udce9/b.png", "ant/c.png"]
    classes = class_folders(listed, tmp_path)
    assert list(classes.values()) == ["caf\u00e9", "\udce9", "ant"]
    assert Classes(["caf\u00e9", "ant"]).numbers({classes[listed[0]], "ant"}) == {
        "ant": 1,
        "caf\u00e9": 0,
    }
    rows = [listing([SourceImage(name)]) for name in (listed[0], "caf\u00e9/a.png", listed[1])]
    assert rows[0] == rows[1] != rows[2]


HIDDEN = [
    ".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", ".thumbnails", "lost+found",
    "$RECYCLE.BIN", "System Volume Information",
]  # fmt: skip


def test_hidden_and_system_files_are_no_images_and_no_classes(tmp_path, called):
    names = [name for hidden in HIDDEN for name in (f"{hidden}/x.jpg", f"ant/{hidden}/x.jpg")]
    source = fill(tmp_path / "s", "ant/1.jpg", "bee/1.jpg", "ant/._1.jpg", "ant/.2.jpg", *names)
    (source / "ant/Thumbs.db").write_bytes(b"x")
    code, said, _ = called(source, tmp_path / "out")
    assert code == 0 and "2 classes: ant 1, bee 1" in said
    assert len(labels(tmp_path / "out")) == 2


def test_links_are_followed_and_loops_named(tmp_path, called):
    far = fill(tmp_path / "far", "ant/1.jpg", "ant/deep/2.jpg", "bee/1.jpg", "one.jpg")
    source = fill(tmp_path / "subset", "bee/7.jpg")
    (source / "ant").symlink_to(far / "ant")
    (source / "bee/linked.jpg").symlink_to(far / "one.jpg")
    (source / "bee/gone.jpg").symlink_to(far / "nothing.jpg")
    (source / "cat").symlink_to(tmp_path / "nowhere")
    (far / "ant/deep/again").symlink_to(far / "ant")
    code, said, _ = called(source, tmp_path / "out")
    assert code == 0 and "2 classes: ant 2, bee 2" in said
    assert "left out: ant/deep/again: a link to a folder that it lies in" in said
    assert "left out: bee/gone.jpg: a link that leads nowhere" in said
    assert "left out: cat: a link that leads nowhere" in said and "left out in all: 3 links" in said
    assert sorted(labels(tmp_path / "out").values()) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train/ant/1.jpg", "val/ant/1.jpg"], "'train', 'val' do not look so"),
        (["train/ant/1.jpg", "val/ant/1.jpg", "extra/1.jpg"], "'train', 'val' do not look so"),
        (["images/1.jpg"], "'images' do not look so"),
        (["train2017/1.jpg", "val2017/1.jpg"], "'train2017', 'val2017'"),
        (["mine/ant/1.jpg", "mine/bee/1.jpg"], "holds one folder of images, mine"),
        (["ant/1.jpg", "Ant/1.jpg"], "'Ant', 'ant' in"),
    ],
)
def test_a_wrong_folder_is_questioned(tmp_path, called, names, says):
    source = fill(tmp_path / "photos", *names)
    code, _, error = called(source, tmp_path / "out")
    assert code == 2 and says in error and "--these-are-classes" in error
    assert not (tmp_path / "out").exists()
    code, said, _ = called(source, tmp_path / "out", "--these-are-classes")
    assert code == 0 and f"{len({n.split('/')[0] for n in names})} classes: " in said


def test_one_odd_name_among_classes_is_not_questioned(tmp_path, called):
    code, said, _ = called(fill(tmp_path / "s", "train/1.jpg", "bus/1.jpg"), tmp_path / "out")
    assert code == 0 and "2 classes: bus 1, train 1" in said  # a vehicle


WNIDS = ["n03", "n01", "n02"]  # in ILSVRC's order, which is not theirs


def synsets(path):
    rows = np.zeros(4, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for number, wnid in enumerate([*WNIDS, "n99"]):
        rows[number] = (number + 1, wnid, "some words")
    savemat(path, {"synsets": rows.reshape(-1, 1)})
    return path


LABELS = {
    "name class": "val_3.JPEG n02\nval_1.JPEG n01\nval_2.JPEG n03\n",
    "without extensions": "val_3 n02\nval_1 n01\nval_2 n03\n",
    "tabs": "val_3.JPEG\tn02\nval_1.JPEG\tn01\nval_2.JPEG\tn03\n",
    "csv": "val_3.JPEG,n02\nval_1.JPEG,n01\nval_2.JPEG,n03\n",
    "kaggle": "ImageId,PredictionString\nval_3,n02 1 2 3 4 n02 5 6 7 8 \nval_1,n01 1 2 3 4\n"
    "val_2,n03 0 0 9 9 \n",
    "in order": "n01\nn03\nn02\n",
    "numbers": "2\n1\n3\n",  # n01, n03, n02
    "named numbers": "val_2.JPEG 2\nval_3.JPEG 1\nval_1.JPEG 0\n",  # places in classes.json
    "folders": "imagenet/val/val_3.JPEG n02\nimagenet/val/val_1.JPEG n01\nx/val_2.JPEG n03\n",
    "windows": "\ufeffval_3.JPEG n02\r\nval_1.JPEG n01\r\nval_2.JPEG n03\r\n",
}


@pytest.mark.parametrize("kind", LABELS)
def test_imagenets_val_as_it_is_distributed(tmp_path, called, kind):
    val = fill(tmp_path / "val", "val_1.JPEG", "val_2.JPEG", "val_3.JPEG")
    (tmp_path / "classes.json").write_text('["n01", "n02", "n03", "n04"]')
    (tmp_path / "labels").write_text(LABELS[kind], newline="")
    words = [val, tmp_path / "out", "--labels", tmp_path / "labels"]
    words += ["--classes", tmp_path / "classes.json"]
    if kind == "numbers":
        words += ["--synsets", synsets(tmp_path / "meta.mat")]
    code, said, error = called(*words)
    assert code == 0, error
    assert "4 classes: n01 1, n02 1, n03 1, n04 0; no image of 'n04'" in said
    found = labels(tmp_path / "out")
    told = [found[(val / f"val_{number}.JPEG").read_bytes()] for number in (1, 2, 3)]
    assert told == [0, 2, 1]


@pytest.mark.parametrize(
    ("text", "more", "says"),
    [
        ("2\n1\n3\n", [], "--synsets ILSVRC2012_devkit_t12/data/meta.mat"),
        ("2\n1\n", ["--synsets", "meta.mat"], "has 2 lines"),
        ("2\n1\n9\n", ["--synsets", "meta.mat"], "holds 9, which is no ILSVRC2012_ID"),
        ("n01\nn03\nn02\n", ["--synsets", "meta.mat"], "--synsets goes with numbers"),
        ("2\n1\n3\n", ["--synsets", "labels"], "is not the meta.mat"),
        ("val_1.JPEG n01\n", [], "tells nothing of 2 of the 3 images"),
        ("val_1.JPEG n01\nval_1.JPEG n02\n", [], "is of two classes, n01 and n02"),
        ("val_1.JPEG 1\nval_2.JPEG 2\nval_3.JPEG 3\n", [], "holds numbers from 1 on"),
        ("val_1.JPEG 1\nval_2.JPEG 2\nval_3.JPEG 3\n", ["--classes", "c"], "if it counts from 1"),
        ("val_1.JPEG n01\nval_2.JPEG\n", [], "neither a name with a class nor"),
        ("val_1 n01\nval_2 n05\nval_3 n02\n", ["--classes", "c"], "'n05'"),
        ("", [], "is empty"),
        ("\xff", [], "is not text in UTF-8"),
    ],
)
def test_labels_that_do_not_tell(tmp_path, called, text, more, says):
    val = fill(tmp_path / "val", "val_1.JPEG", "val_2.JPEG", "val_3.JPEG")
    (tmp_path / "labels").write_bytes(text.encode("latin-1"))
    (tmp_path / "c").write_text('["n01", "n02", "n03"]')
    synsets(tmp_path / "meta.mat")
    more = [word if word.startswith("-") else tmp_path / word for word in more]
    code, _, error = called(val, tmp_path / "out", "--labels", tmp_path / "labels", *more)
    assert code == 2 and says in error and not (tmp_path / "out").exists()


def test_without_a_list_numbers_stay_what_they_are(tmp_path, called):
    val = fill(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "labels").write_text("1.jpg 10\n2.jpg 0\n3.jpg 2\n")
    assert called(val, tmp_path / "out", "--labels", tmp_path / "labels")[0] == 0
    found = labels(tmp_path / "out")
    assert [found[(val / f"{n}.jpg").read_bytes()] for n in (1, 2, 3)] == [10, 0, 2]
    assert len(json.loads((tmp_path / "out/classes.json").read_text())) == 11


@pytest.mark.parametrize("names", [("001", "002", "010"), ("1", "10", "2"), ("2019", "2021")])
def test_folders_called_by_numbers_are_names_as_any(tmp_path, called, names):
    """ImageFolder's order, without classes that nobody has."""
    fill(tmp_path / "in", *(f"{name}/a.jpg" for name in names))
    code, out, err = called(tmp_path / "in", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(names)
    assert sorted(labels(tmp_path / "out").values()) == list(range(len(names)))


def stored(mode, kind, orientation=1):
    """An image in one of Pillow's modes and formats."""
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).convert("RGB")
    if mode.startswith("I;16"):
        image = Image.fromarray(rng.integers(0, 65536, (12, 16), dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(rng.random((12, 16), dtype=np.float32))
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"exif": exif} if kind in ("TIFF", "JPEG") else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "mode", "kind", "written"),
    [
        ("a.bmp", "RGB", "BMP", "png"),
        ("a.BMP", "L", "BMP", "png"),
        ("a.tif", "RGB", "TIFF", "png"),
        ("a.tiff", "I;16", "TIFF", "png"),
        ("a.tif", "1", "TIFF", "png"),
        ("a.tif", "RGBA", "TIFF", "png"),
        ("a.gif", "P", "GIF", "png"),
        ("a.jfif", "RGB", "JPEG", "jpg"),
        ("a", "RGB", "JPEG", "jpg"),
        ("a", "RGBA", "PNG", "png"),
        ("a", "RGB", "WEBP", "webp"),
        ("a", "RGB", "BMP", "png"),
        ("a.jpg", "RGB", "PNG", "jpg"),
        ("a.png", "RGB", "BMP", "png"),
        ("a.tif", "CMYK", "TIFF", None),
        ("a.tif", "F", "TIFF", None),
    ],
)
def test_what_is_written_can_be_read(tmp_path, called, name, mode, kind, written):
    """Every kind is copied, becomes the same values in PNG, or is left out by its reason."""
    source = fill(tmp_path / "s", "ant/1.jpg", "bee/1.jpg")
    data = stored(mode, kind)
    (source / "bee" / name).write_bytes(data)
    (source / "bee/README").write_text("no image")
    (source / "bee/notes.txt").write_text("no image")
    code, said, _ = called(source, tmp_path / "out")
    assert code == 0 and "not images: 1 without an extension, 1 .txt" in said or "1 .txt" in said
    (shard,) = opened(f"{tmp_path}/out/*.tar", tmp_path)[0].shards
    samples = list(read_range([shard], range(shard.count), (IMAGE, "cls")))
    assert len(samples) == (3 if written else 2)
    if written is None:
        assert f"left out: bee/{name}: {kind} in {mode}" in said and "without a loss" in said
        return
    with tarfile.open(shard.url) as tar:
        assert sum(member.name.endswith(f".{written}") for member in tar) >= 1
    jpegs = {(source / place / "1.jpg").read_bytes() for place in ("ant", "bee")}
    (found,) = (sample.parts[IMAGE] for sample in samples if sample.parts[IMAGE] not in jpegs)
    if kind in ("JPEG", "PNG", "WEBP") or name.endswith((".jpg", ".png")):
        assert found == data  # byte by byte
    else:
        before, after = (Image.open(io.BytesIO(one)) for one in (data, found))
        assert after.format == "PNG" and np.array_equal(np.asarray(before), np.asarray(after))


def test_nothing_usable_ends_with_the_reasons(tmp_path, called):
    source = tmp_path / "s"
    for number in range(4):
        (source / "ant").mkdir(parents=True, exist_ok=True)
        (source / f"ant/{number}.jpg").write_bytes(b"x" if number else b"")
    code, _, error = called(source, tmp_path / "out")
    assert code == 2 and "none of the 4 images" in error
    assert "3 not an image, 1 empty file" in error
    assert list((tmp_path / "out").iterdir()) == []
    fill(source, *(f"ant/{number}.jpg" for number in range(4)))
    assert called(source, tmp_path / "out")[0] == 0  # mended, the same command works


def test_a_list_that_was_there_stays(tmp_path, called):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    known = tmp_path / "out" / "classes.json"
    known.write_text('["ant", "cat"]')
    assert called(tmp_path / "in", tmp_path / "out", "--classes", known)[0] == 2
    assert list((tmp_path / "out").iterdir()) == [known]
    assert json.loads(known.read_text()) == ["ant", "cat"]


def test_a_mended_image_is_seen(tmp_path, called):
    source = fill(tmp_path / "s", *(f"ant/{number}.jpg" for number in range(6)))
    (source / "ant/3.jpg").write_bytes(b"broken")
    words = (source, tmp_path / "out", "--shard-size", "2")
    code, said, _ = called(*words)
    assert code == 0 and "left out: ant/3.jpg" in said
    assert called(*words)[0] == 0  # nothing changed
    whole = contents(tmp_path / "out")
    fill(source, "ant/3.jpg")
    code, _, error = called(*words)
    assert code == 2 and "1 of the finished shards" in error and contents(tmp_path / "out") == whole
    (name,) = re.findall(r"pictures-\d+\.tar", error)
    (tmp_path / "out" / name).unlink()
    code, said, _ = called(*words)
    assert code == 0 and "2 of 3 shards are there already" in said and "6 images" in said
    same = [shard for shard in whole if shard != name]
    assert all(contents(tmp_path / "out")[shard] == whole[shard] for shard in same)


def test_a_plan_of_before_is_taken_up(tmp_path, called):
    """Written without stamps, and by other code: the shards stay, and the next change is seen."""
    source = fill(tmp_path / "s", *(f"ant/{number}.jpg" for number in range(4)))
    words = (source, tmp_path / "out", "--shard-size", "2")
    assert called(*words)[0] == 0
    file = tmp_path / "out/pictures.plan.json"
    plan = json.loads(file.read_text())
    del plan["stamps"]
    told = [[f"ant/{number}.jpg", 0, None, []] for number in range(4)]
    plan["listing"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    file.write_text(json.dumps(plan))
    whole = contents(tmp_path / "out")
    assert called(*words)[0] == 0 and contents(tmp_path / "out") == whole
    assert "stamps" in json.loads(file.read_text())


def test_what_cannot_be_read_is_not_bad_data(tmp_path, called, monkeypatch):
    """A disk that fails is not a damaged image: the call ends, and goes on later."""
    source = fill(tmp_path / "s", "ant/1.jpg")
    real = type(source).read_bytes

    def fail(path):
        if path.name == "1.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(type(source), "read_bytes", fail)
    code, _, error = called(source, tmp_path / "out")
    assert code == 2 and "ant/1.jpg: Input/output error" in error
    monkeypatch.undo()
    assert called(source, tmp_path / "out")[0] == 0
