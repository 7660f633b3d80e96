"""A folder of pictures becomes shards: every byte once, resumable, strict."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from sami.core.shards import expand
from tests.runs import ROOT, kill, opened, run, start, wait_for


def make(source, out, *more):
    return [sys.executable, str(ROOT / "tools/make_shards.py"), str(source), str(out), *more]


def picture(seed, kind="JPEG"):
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
        (place / name).write_bytes(picture(number, "PNG" if name.endswith("png") else "JPEG"))
    (folder / "ant" / "notes.txt").write_text("no picture")
    (folder / "ant" / "._hidden.jpg").write_bytes(b"x")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_every_picture_once_with_its_label(source, tmp_path):
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
    (source / "ant" / "more.jpg").write_bytes(picture(99))
    done = run(make(source, out, "--shard-size", "5"))
    assert done.returncode == 2 and "listing" in done.stderr and "Traceback" not in done.stderr
    assert contents(out) == before


def test_unusable_pictures_are_left_out_and_named(source, tmp_path):
    (source / "ant" / "text.jpg").write_text("no picture")
    (source / "ant" / "empty.png").touch()
    done = run(make(source, tmp_path / "out"))
    assert done.returncode == 0
    assert "left out: ant/text.jpg: not a picture" in done.stdout
    assert "left out: ant/empty.png: empty file" in done.stdout
    assert "23 pictures, 3 classes, 1 shard(s)" in done.stdout
    assert expand(done.stdout.strip().splitlines()[-1].split("'")[1], "k")


def test_a_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(picture(number))
    assert run(make(tmp_path / "flat", tmp_path / "out")).returncode == 0
    with tarfile.open(tmp_path / "out" / "pictures-000000.tar") as tar:
        assert tar.getnames() == ["00000000.jpg", "00000001.jpg", "00000002.jpg"]
    assert not (tmp_path / "out" / "classes.json").exists()


@pytest.mark.parametrize(
    ("case", "says"),
    [("missing", "is not a folder"), ("empty", "holds no picture"), ("mixed", "beside them")],
)
def test_bad_sources(case, says, source, tmp_path):
    (tmp_path / "empty").mkdir()
    (source / "loose.jpg").write_bytes(picture(0))
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
