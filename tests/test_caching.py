"""The feature cache: made by a tool that survives, refused where it does not fit, and read."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from sami import caching, extraction
from sami.caching import read_manifest, sha256_of
from sami.core.errors import UserError
from sami.core.reading import read_range
from sami.core.scanning import IMAGE, TEACHER
from sami.data import CropTransform
from sami.encoder import build_encoder
from sami.extraction import extract_whole
from sami.features import Cache, from_bytes
from sami.masking import MaskConfig
from sami.pretrain import PretrainConfig, main
from sami.targets import open_targets, pixel_target, to_grid
from sami.teacher import Teacher, TeacherConfig, load_teacher
from tests.runs import (
    LIMIT,
    ROOT,
    arguments,
    kill,
    numbers,
    opened,
    start,
    summary,
    wait_for,
    write_shards,
)
from tools.cache_teacher import main as cache_teacher

SHAPE = ("--teacher", "custom", "--width", "32", "--depth", "1", "--checkpoint", "random")
SIZE = 128


def words(shards, out, *more):
    shape = (*SHAPE, "--image-size", str(SIZE), "--workers", "2", "--batch", "4")
    return [*map(str, shards), "--out", str(out), *shape, *more]


def files(pattern):
    return sorted(Path(pattern).parent.glob("*.tar"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of 13 (2 damaged), 9 and 17 images, and the cache of them."""
    folder = tmp_path_factory.mktemp("cache")
    shards = files(write_shards(folder / "shards", corrupt=2))
    assert cache_teacher(words(shards, folder / "out")) == 0
    return shards, folder / "out"


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "cached")


def train(folder, shards, **more):
    options = {
        "teacher.cached": "true",
        "teacher.image_size": SIZE,
        "train.steps": 3,
        "run.save_every": 3,
        **more,
    }
    return arguments(folder, f"{shards}/*.tar", **options)


def manifest(folder, **changes):
    """Change what stands under ``cache``."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["cache"].update(changes)
    path.write_text(json.dumps(content))


# -- making -----------------------------------------------------------------------------------


def test_members_stay_and_features_are_the_teachers(tmp_path):
    source = tmp_path / "a.b.tar"
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(source)) as writer:
        for number, (width, height) in enumerate([(128, 128), (128, 90), (64, 128)]):
            stream = io.BytesIO()
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            writer.write({"__key__": f"x/k.{number}", "png": stream.getvalue(), "cls": number})
    out = tmp_path / "out"
    assert cache_teacher(words([source], out, "--dtype", "fp16", "--grid", "8")) == 0
    with tarfile.open(source) as old, tarfile.open(out / "a.b.tar") as new:
        before = {m.name: old.extractfile(m).read() for m in old}
        after = {m.name: new.extractfile(m).read() for m in new}
    assert [name for name in after if name.endswith(".npz")] == [
        f"x/k.{number}.{TEACHER}" for number in range(3)
    ]
    assert {k: v for k, v in after.items() if not k.endswith(".npz")} == before

    cache = Cache(**read_manifest(out)["cache"])
    assert (cache.grid, cache.pool, cache.channels, cache.dtype) == (8, 1, 256, "fp16")
    teacher = load_teacher(TeacherConfig("custom", "random", SIZE, width=32, depth=1))
    (shards,) = opened(str(out / "*.tar"), tmp_path)
    for sample in read_range(shards.shards, range(3), (IMAGE, TEACHER)):
        image = Image.open(io.BytesIO(sample.part(IMAGE)))
        expected = teacher(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0]
        stored = from_bytes(sample.part(TEACHER), cache, image.size)
        rows, columns = (-(-side // 16) for side in (image.height, image.width))
        assert stored.values.shape == (256, rows, columns)
        found = torch.from_numpy(stored.values.astype(np.float32))
        torch.testing.assert_close(found, expected[:, :rows, :columns], atol=2e-3, rtol=1e-3)


def test_the_manifest(made):
    shards, out = made
    told = json.loads((out / "manifest.json").read_text())
    teacher = TeacherConfig("custom", "random", SIZE, width=32, depth=1)
    assert told["cache"] == {
        "name": "custom",
        "sha256": told["made"]["teacher"]["sha256"],
        "random": True,
        "layer": "neck",
        "image_size": SIZE,
        "patch_size": 16,
        "channels": 256,
        "grid": 8,
        "dtype": "int8",
        "precision": "fp32",
    }
    assert len(told["cache"]["sha256"]) == 64 and load_teacher(teacher).channels == 256
    assert {name: told["shards"][name]["samples"] for name in told["shards"]} == {
        "s-000.tar": 11,
        "s-001.tar": 9,
        "s-002.tar": 17,
    }
    assert told["shards"]["s-000.tar"]["left_out"] == {"damaged image": 2}
    for name, shard in told["shards"].items():
        assert shard["sha256"] == sha256_of(out / name)
    assert told["preprocessing"]["mean"] == [123.675, 116.28, 103.53]


def test_killed_and_two_at_once(made, tmp_path):
    """The same bytes as in one go; what was finished when it was killed is not made again."""
    shards, out = made
    slow = files(write_shards(tmp_path / "slow", counts=(6, 200), detail=40))
    target = tmp_path / "killed"
    tool = [sys.executable, str(ROOT / "tools/cache_teacher.py")]
    process = start([*tool, *words(slow, target, "--batch", "1")])
    wait_for((target / "s-000.tar").exists, process)
    time.sleep(0.1)
    kill(process)
    assert not (target / "s-001.tar").exists()
    before = (target / "s-000.tar").stat()
    assert cache_teacher(words(slow, target, "--batch", "1")) == 0
    after = (target / "s-000.tar").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert read_manifest(target)["shards"]["s-001.tar"]["samples"] == 200
    assert not list(target.glob(".*writing"))
    assert cache_teacher(words(slow, tmp_path / "whole", "--batch", "1")) == 0
    assert read_manifest(target)["shards"] == read_manifest(tmp_path / "whole")["shards"]

    both = [
        start([*tool, *words(shards, tmp_path / "both", "--slice", f"{part}/2")])
        for part in range(2)
    ]
    assert [process.wait(LIMIT) for process in both] == [0, 0]
    for name, told in read_manifest(tmp_path / "both")["shards"].items():
        assert told["sha256"] == read_manifest(out)["shards"][name]["sha256"]


def test_a_slice_that_is_not_there_yet(made, tmp_path, in_process, capsys):
    shards, _ = made
    assert cache_teacher(words(shards, tmp_path / "out", "--slice", "1/2")) == 0
    assert "2 are left to other slices, such as s-000.tar" in capsys.readouterr().out
    code, said = in_process(main, train(tmp_path / "run", tmp_path / "out"))
    assert code == 2 and "is still being written: 2 of 3 shards are missing" in said


def test_dry_run_writes_nothing(made, tmp_path, capsys):
    shards, out = made
    assert cache_teacher(words(shards, tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "39 images in 3 shards: about" in said and not (tmp_path / "out").exists()
    estimate = float(said.split("about ")[1].split(" GB")[0]) * 1e9
    real = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert abs(estimate / real - 1) < 0.2


def test_verify(made, copied, in_process, capsys):
    shards, _ = made
    assert cache_teacher(words(shards, copied, "--verify")) == 0
    assert "3 shards have their checksums; 8 of 37 images computed" in capsys.readouterr().out
    # Two images' features exchanged, with a checksum that fits: it takes a teacher to see that.
    path = copied / "s-001.tar"
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    first, second = (f"p{number:04d}.{TEACHER}" for number in (0, 1))
    members[first], members[second] = members[second], members[first]
    with tarfile.open(path, "w") as tar:
        extraction._write(tar, members)
    everything = ("--verify", "--verify-fraction", "1")
    code, said = in_process(cache_teacher, words(shards, copied, *everything))
    assert code == 2 and "s-001.tar is not the file that" in said
    content = json.loads((copied / "manifest.json").read_text())
    content["shards"][path.name]["sha256"] = sha256_of(path)
    (copied / "manifest.json").write_text(json.dumps(content))
    code, said = in_process(cache_teacher, words(shards, copied, *everything))
    assert code == 2 and "s-001/p0000 in" in said and "differs from what the teacher gives" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--slice", "2/2"], "--slice 2/2 must be I/N with I from 0 to N - 1"),
        (["--grid", "5"], "--grid 5 must divide the teacher's 8 tokens at --image-size 128"),
        (["--checkpoint", ""], "--checkpoint is empty"),
        (["--checkpoint", "nowhere.pth"], "--checkpoint nowhere.pth does not exist"),
        (["--depth", "2"], "holds features with sha256"),
        (["--dtype", "fp16"], "holds features with dtype int8, and fp16 is asked for"),
        (["--batch", "0"], "--batch 0 must be positive"),
    ],
)
def test_bad_words(made, in_process, change, says):
    shards, out = made
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    code, said = in_process(cache_teacher, words(shards, out, *change))
    assert code == 2 and says in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before


@pytest.mark.parametrize("checkpoint", ["", "nowhere.pth"])
def test_a_dry_run_needs_no_weights(made, tmp_path, capsys, checkpoint):
    shards, _ = made
    dry = words(shards, tmp_path / "out", "--checkpoint", checkpoint, "--dry-run")
    assert cache_teacher(dry) == 0
    said = capsys.readouterr().out
    assert "--checkpoint is not there yet: counted and timed with random weights" in said
    assert "39 images in 3 shards: about" in said and "RANDOM" not in said
    assert not (tmp_path / "out").exists()


def test_bad_shards(made, tmp_path, in_process):
    shards, out = made
    code, said = in_process(cache_teacher, words(shards, shards[0].parent))
    assert code == 2 and "nothing is overwritten" in said
    twin = tmp_path / "twin" / shards[0].name
    twin.parent.mkdir()
    shutil.copy(shards[0], twin)
    code, said = in_process(cache_teacher, words([*shards, twin], tmp_path / "out"))
    assert code == 2 and "have the same name" in said
    # Another shard under the name of one that is cached already.
    shutil.copy(shards[1], twin)
    code, said = in_process(cache_teacher, words([twin], out))
    assert code == 2 and "was made of another" in said


def test_a_shard_that_is_cut_short_counts_as_far_as_it_goes(made, tmp_path, capsys):
    shards, _ = made
    short = tmp_path / "short.tar"
    short.write_bytes(shards[2].read_bytes()[:15000])
    assert cache_teacher(words([short], tmp_path / "out")) == 0
    told = read_manifest(tmp_path / "out")["shards"]["short.tar"]
    assert 0 < told["samples"] < 9
    assert "cut short" in capsys.readouterr().out


def test_a_full_disk(made, tmp_path, in_process, monkeypatch):
    """Before it starts, and in the middle: what is finished stays, what is half goes."""
    shards, _ = made
    with monkeypatch.context() as patch:
        patch.setattr(caching.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        code, said = in_process(cache_teacher, words(shards, tmp_path / "out"))
    assert code == 2 and "are to be written and" in said and "has 0.0 GB free" in said

    written = 0
    real = extraction._write

    def write(tar, members):
        nonlocal written
        written += 1
        if written > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tar, members)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_write", write)
        code, said = in_process(cache_teacher, words(shards, tmp_path / "out"))
    assert code == 2 and "the disk is full" in said
    assert [path.name for path in (tmp_path / "out").glob("*.tar*")] == ["s-000.tar"]
    assert cache_teacher(words(shards, tmp_path / "out")) == 0
    assert read_manifest(tmp_path / "out")["shards"]["s-002.tar"]["samples"] == 17


def test_a_teacher_that_gives_nan(made, tmp_path, in_process, monkeypatch):
    shards, _ = made
    monkeypatch.setattr(
        Teacher, "features", lambda self, x: torch.full((len(x), 256, 8, 8), torch.nan)
    )
    code, said = in_process(cache_teacher, words(shards, tmp_path / "out"))
    assert code == 2 and "features are not finite for p0002" in said
    assert not list((tmp_path / "out").glob("*.tar"))


def test_whole_images_see_no_padding():
    """Batched with others of other shapes, an image gets what it gets alone."""
    teacher = load_teacher(TeacherConfig("custom", "random", SIZE, width=32, depth=1))
    rng = np.random.default_rng(0)
    shapes = [(128, 60), (77, 128), (128, 128)]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    together = extract_whole(teacher, images)
    for image, one in zip(images, together, strict=True):
        alone = teacher(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-4)


# -- reading ----------------------------------------------------------------------------------


def test_the_target_of_a_whole_image_is_what_the_teacher_gives(tmp_path):
    """Square images at the teacher's own size: no resizing on either way, so one target."""
    rng = np.random.default_rng(0)
    (tmp_path / "s").mkdir()
    with wds.TarWriter(str(tmp_path / "s" / "a.tar")) as writer:
        for number in range(3):
            stream = io.BytesIO()
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            writer.write({"__key__": str(number), "png": stream.getvalue()})
    extra = ("--dtype", "fp16", "--grid", "8")
    assert cache_teacher(words([tmp_path / "s" / "a.tar"], tmp_path / "out", *extra)) == 0
    (cached,) = opened(f"{tmp_path}/out/*.tar", tmp_path)
    config = PretrainConfig()
    config.data.image_size = 64
    config.teacher = TeacherConfig("custom", "random", SIZE, width=32, depth=1)
    teacher = load_teacher(config.teacher)
    run = SimpleNamespace(device=torch.device("cpu"), is_main=True, rank=0, processes=1)
    run.dir, run.say, run.gather = tmp_path, print, lambda value: [value]
    run.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    student = build_encoder(config.encoder, 64)

    def targets_and_batch():
        shards = (cached.shards, "random", None, True)
        targets = open_targets(config.target, config.teacher, student, run, *shards)
        teacher = {"teacher_size": targets.teacher_size, "cache": targets.cache}
        transform = CropTransform(
            0, 64, grid=4, mask=MaskConfig(), crop_scale=(0.2, 1), hflip=True, **teacher
        )
        samples = read_range(cached.shards, range(3), transform.fields)
        batch = transform.collate([transform.decode_held_out(sample) for sample in samples])
        return targets, transform, batch

    live, fresh, batch = targets_and_batch()
    assert fresh.fields == (IMAGE,) and fresh.teacher_size == SIZE and not live.info.get("cached")
    expected = live(batch)
    torch.testing.assert_close(expected, to_grid(teacher(batch.teacher_view), 4, "area"))
    config.teacher.cached = True
    targets, stored, batch = targets_and_batch()
    assert stored.fields == (IMAGE, TEACHER) and stored.teacher_size is None
    assert targets.channels == live.channels == 256 and targets.info["cached"]
    torch.testing.assert_close(targets(batch), expected, atol=1e-3, rtol=1e-3)
    config.target.kind, config.teacher.cached = "pixels", False
    targets, pixels, batch = targets_and_batch()
    assert (pixels.fields, pixels.teacher_size, targets.info) == ((IMAGE,), None, None)
    assert targets.channels == 768
    assert torch.equal(targets(batch), pixel_target(student.normalise(batch.student), 16))


ONCE = "cached shards for their checksums, once"


@pytest.mark.slow
def test_a_run_on_cached_features(copied, tmp_path, in_process):
    """Its summary tells of the cache; its checksums are not read again by another run."""
    plain, again = tmp_path / "plain", tmp_path / "again"
    options = {"data.val_shards": str(copied / "s-001.tar"), "train.steps": 5}
    options |= {"run.picture_every": 5}
    options |= {"decoder.predict_fraction": 0.5, "data.allow_val_in_train": "true"}
    assert in_process(main, train(plain, copied, **options))[0] == 0
    assert f"reading 3 {ONCE}" in (plain / "log.txt").read_text()
    told = summary(plain)
    assert told["teacher"]["cached"] and told["teacher"]["grid"] == 8
    assert told["evaluation"]["pictures"] == 9 and list((plain / "pictures").glob("*.png"))
    assert told["bad_samples"] == {}
    assert in_process(main, train(again, copied, **options, **{"run.save_every": 2}))[0] == 0
    shutil.rmtree(again / "checkpoints" / "step-5")
    (again / "summary.json").unlink()
    assert in_process(main, train(again, copied, **options))[0] == 0
    assert ONCE not in (again / "log.txt").read_text()
    assert numbers(plain) == numbers(again)


@pytest.fixture
def checked(copied, tmp_path, monkeypatch):
    """A cache, and a function that looks at its checksums: what it said, and what was read."""
    shards, read = opened(f"{copied}/*.tar", tmp_path)[0].shards, []
    real = caching.sha256_of
    monkeypatch.setattr(caching, "sha256_of", lambda path: read.append(path.name) or real(path))

    def check(part=(0, 1), run="run"):
        said = []
        read.clear()
        manifests = {copied: read_manifest(copied)}
        caching.check_sums(shards, manifests, tmp_path / run / "index", said.append, part)
        return said, sorted(read)

    return copied, check


NAMES = ["s-000.tar", "s-001.tar", "s-002.tar"]


def test_checksums_are_read_once_per_cache(checked):
    folder, check = checked
    assert check() == ([f"reading 3 {ONCE}"], NAMES)
    assert check(run="another") == ([], [])
    os.utime(folder / "s-001.tar")  # written again, or restored
    assert check() == ([f"reading 1 {ONCE}"], ["s-001.tar"])
    shutil.copy2(folder / "s-002.tar", folder / "copy")  # the same time and size, another file
    (folder / "copy").replace(folder / "s-002.tar")
    assert check() == ([f"reading 1 {ONCE}"], ["s-002.tar"])
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"]["s-000.tar"]["sha256"] = "0" * 64  # the same file, another manifest
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="s-000.tar has the sha256 .* and .* says 0000"):
        check()
    (folder / "verified.json").write_text("{")  # a memory that is damaged is none
    with pytest.raises(UserError, match="s-000.tar has the sha256"):
        check()


def test_ranks_share_the_checksums_and_what_others_read_meanwhile_is_left(checked):
    folder, check = checked
    assert check((0, 2))[1] == ["s-000.tar", "s-002.tar"]
    assert check((1, 2)) == ([f"reading 1 {ONCE}"], ["s-001.tar"])
    assert check((0, 2)) == ([], []) == check((1, 2))


def test_a_cache_that_cannot_be_written_is_remembered_in_the_run(checked, monkeypatch):
    folder, check = checked
    real = caching.changed

    def changed(path, remedy=None):
        if path.parent == folder:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, remedy)

    monkeypatch.setattr(caching, "changed", changed)
    said, read = check()
    assert read == NAMES and len(said) == 2
    assert "verified.json cannot be written (Read-only file system)" in said[1]
    assert "run/index, for this run alone" in said[1]
    assert check() == ([], []) and check(run="another")[1] == NAMES
    assert not list(folder.glob("*verified*"))


def spoil(folder, name, change):
    """Change a shard's features and its checksum in the manifest."""
    path = folder / name
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}
    changed = {k: change(v) if k.endswith(TEACHER) else v for k, v in members.items()}
    with tarfile.open(path, "w") as tar:
        extraction._write(tar, changed)
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][name]["sha256"] = sha256_of(path)
    (folder / "manifest.json").write_text(json.dumps(content))


def with_nan(data):
    with np.load(io.BytesIO(data)) as file:
        values, scale = file["values"], file["scale"]
    stream = io.BytesIO()
    np.savez(stream, values=values, scale=scale * np.nan)
    return stream.getvalue()


def another_zip(data):
    """A zip of a version that is still to come, for which zipfile has an error of its own."""
    start = data.index(b"PK\x01\x02") + 6
    return data[:start] + b"\xff" + data[start + 1 :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_nan, "features are not finite"),
        (lambda data: data[:999], "damaged features"),
        (another_zip, "damaged features"),
    ],
)
def test_bad_features_are_counted_and_too_many_end_the_run(
    copied, tmp_path, in_process, change, says
):
    spoil(copied, "s-001.tar", change)
    words = train(tmp_path / "run", copied, **{"train.steps": 9})
    code, said = in_process(main, words)
    assert code == 2 and says in said
    code, _ = in_process(main, [*words, "--data.max_bad_fraction=0.9"])
    assert code == 0 and summary(tmp_path / "run")["bad_samples"][says] > 0


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (lambda f: (f / "manifest.json").unlink(), {}, "make them with tools/cache_teacher.py"),
        (lambda f: (f / "manifest.json").write_text("{"), {}, "manifest.json cannot be read"),
        (lambda f: (f / "s-001.tar").unlink(), {}, "names 3 shards and 1 of them are not there"),
        (lambda f: shutil.copy(f / "s-001.tar", f / "s-009.tar"), {}, "s-009.tar is not in"),
        (
            lambda f: (f / "s-001.tar").write_bytes((f / "s-002.tar").read_bytes()),
            {},
            "s-001.tar has the sha256",
        ),
        (lambda f: manifest(f, name="sam_vit_h"), {}, "teacher.name sam_vit_h, and the config"),
        (lambda f: manifest(f, layer="trunk"), {}, "teacher.layer trunk, and the configuration"),
        (lambda f: None, {"teacher.image_size": 64}, "teacher.image_size 128, and the config"),
        (lambda f: None, {"teacher.depth": 2}, "teacher.sha256"),
        (lambda f: None, {"target.kind": "pixels"}, "teacher.cached true goes with target.kind"),
    ],
)
def test_a_cache_that_does_not_fit(copied, tmp_path, in_process, spoil, options, says):
    spoil(copied)
    code, said = in_process(main, train(tmp_path / "run", copied, **options))
    assert code == 2 and says in said and said.count("\n") == 1


def test_without_a_checkpoint_nothing_is_compared_but_what_the_config_says(
    made, tmp_path, in_process
):
    for number, checkpoint in enumerate(("", "no.pth")):
        options = {"teacher.checkpoint": checkpoint, "teacher.depth": 2}
        assert in_process(main, train(tmp_path / f"run-{number}", made[1], **options))[0] == 0
