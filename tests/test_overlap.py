"""Held-out shards that are trained on too: found whatever they are called, and only then."""

import os
import shutil
import tarfile

import numpy as np
import pytest

from finetune.classify import main as classify
from finetune.distill import main as distill
from finetune.train import main as finetune
from sami.core.overlap import find_overlap
from sami.pretrain import main as pretrain
from tests.runs import arguments, opened, write_shards
from tests.test_shards import write_tar


@pytest.fixture
def train(tmp_path):
    """Two shards of six images each."""
    write_shards(tmp_path / "train", (6, 6))
    return tmp_path / "train"


def shards(pattern, folder):
    return [shard for source in opened(str(pattern), folder) for shard in source.shards]


def rewritten(source, path, change=lambda name: name, more=(), mode="w"):
    """A copy of a shard under changed names, None leaves out; with more members."""
    with tarfile.open(source) as tar:
        members = [(change(m.name), tar.extractfile(m).read()) for m in tar]
    return write_tar(path, [m for m in (*members, *more) if m[0]], mode)


COPIES = {
    "itself": lambda train, path: train,
    "another spelling": lambda train, path: train.parent / ".." / "train" / train.name,
    "symlink": lambda train, path: path.symlink_to(train),
    "hard link": lambda train, path: os.link(train, path),
    "copy": lambda train, path: shutil.copy(train, path),
    "half of it": lambda train, path: rewritten(
        train, path, lambda name: name if name < "p0003" else None
    ),
    "with more members": lambda train, path: rewritten(
        train, path, more=[(f"p{n:04d}.cls", b"1") for n in range(6)]
    ),
    "other keys": lambda train, path: rewritten(
        train, path, lambda name: f"new/{9 - int(name[1:5])}.jpg"
    ),
    "compressed": lambda train, path: rewritten(train, path, mode="w:gz"),
}


@pytest.mark.parametrize("kind", COPIES)
def test_the_same_images_are_found(train, tmp_path, kind):
    (tmp_path / "val").mkdir()
    path = tmp_path / "val" / "v.tar"
    made = COPIES[kind](train / "s-001.tar", path)
    held_out = shards(path if path.exists() else made, tmp_path)
    found = find_overlap(
        shards(train / "*.tar", tmp_path), held_out, "data.shards", "data.val_shards"
    )
    assert found is not None and "s-001" in found and "data.val_shards" in found


def test_one_of_several_is_enough(train, tmp_path):
    write_shards(tmp_path / "val", (5, 5), seed=1)
    shutil.copy(train / "s-000.tar", tmp_path / "val" / "s-002.tar")
    found = find_overlap(
        shards(train / "*.tar", tmp_path), shards(tmp_path / "val/*.tar", tmp_path), "a", "b"
    )
    assert found is not None and "6 of 16 have" in found


def test_a_single_held_out_image_is_found_under_another_name(train, tmp_path):
    """Its own is not, nor one of several, which a set may well hold twice."""
    only = lambda name: "new/x.jpg" if name == "p0002.jpg" else None  # noqa: E731
    for name, more, found in (
        ("same", (), True),
        ("several", [(f"y{n}.jpg", b"other" * n) for n in range(1, 8)], False),
    ):
        path = rewritten(train / "s-000.tar", tmp_path / f"{name}.tar", only, more)
        held_out = shards(path, tmp_path)
        told = find_overlap(shards(train / "*.tar", tmp_path), held_out, "a", "b")
        assert (told is not None) == found
        assert not found or "s-000/p0002 in" in told and "(1 of 1 that were compared)" in told
    write_shards(tmp_path / "other", (1,), seed=1)
    own = shards(tmp_path / "other/*.tar", tmp_path)
    assert find_overlap(shards(train / "*.tar", tmp_path), own, "a", "b") is None


def test_alike_is_not_the_same(train, tmp_path):
    """One key and size with other content; single images that both hold by chance."""
    write_shards(tmp_path / "other", (6,), seed=1)
    ours, theirs = shards(train / "*.tar", tmp_path), shards(tmp_path / "other/*.tar", tmp_path)
    assert find_overlap(ours, theirs, "a", "b") is None
    rng = np.random.default_rng(0)
    tars = [
        write_tar(tmp_path / f"{n}.tar", [(f"{i}.jpg", rng.bytes(500)) for i in range(20)])
        for n in range(2)
    ]
    first, second = (shards(tar, tmp_path) for tar in tars)
    assert find_overlap(first, second, "a", "b") is None
    with tarfile.open(tars[0]) as tar:
        one = tar.extractfile("3.jpg").read()
    both = [("3.jpg", one), *((f"{i + 30}.jpg", rng.bytes(50)) for i in range(20))]
    both = shards(write_tar(tmp_path / "2.tar", both), tmp_path)
    assert find_overlap(first, both, "a", "b") is None
    third = [(f"{i + 50}.jpg", one if i == 0 else rng.bytes(500)) for i in range(20)]
    assert (
        find_overlap(first, shards(write_tar(tmp_path / "3.tar", third), tmp_path), "a", "b")
        is None
    )


@pytest.mark.parametrize("entry", ["pretrain", "finetune", "distill", "classify"])
def test_every_entry_refuses_unless_asked(train, tmp_path, in_process, entry):
    mains = {"pretrain": pretrain, "finetune": finetune, "distill": distill}
    main = (mains | {"classify": classify})[entry]
    shutil.copytree(train, tmp_path / "val")
    words = [
        f"--run.dir={tmp_path / 'run'}",
        f"--data.shards={train}/*.tar",
        f"--data.val_shards={tmp_path}/val/*.tar",
        "--train.batch_size=100",
        "--train.epochs=1",
    ]
    words += ["--teacher.name=none", "--target.kind=pixels"] if entry == "pretrain" else []
    words += ["--teacher.checkpoint=random"] if entry == "distill" else []
    code, said = in_process(main, words)
    assert code == 2 and said.count("\n") == 1
    assert "data.val_shards hold images of data.shards" in said
    assert "--data.allow_val_in_train true" in said
    code, said = in_process(main, [*words, "--data.allow_val_in_train", "true"])
    assert code == 2 and "less than one train.batch_size" in said  # so far it went


def test_a_run_that_is_allowed_to(train, tmp_path, in_process):
    more = {"data.val_shards": f"{train}/s-000.tar", "train.steps": 1, "data.image_size": 32}
    words = arguments(tmp_path / "run", f"{train}/*.tar", **more)
    code, said = in_process(pretrain, words)
    assert (
        code == 2 and "1 of the 1 shards of data.val_shards are shards of data.shards too" in said
    )
    assert in_process(pretrain, [*words, "--data.allow_val_in_train=true"])[0] == 0
