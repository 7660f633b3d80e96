"""Errors of the machine: their own sentence and remedy, never taken for damage of the data."""

import builtins
import contextlib
import errno
import io
import json
import os
import pathlib
import signal
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune.coco import read_coco
from finetune.runfolder import RunFolder
from sami.caching import MANIFEST, read_manifest
from sami.core import reading
from sami.core.checkpoint import list_checkpoints, read_meta, read_state, save_checkpoint
from sami.core.config import load_config
from sami.core.dataset import load
from sami.core.errors import (
    HANDING_OVER,
    REMEDIES,
    MachineError,
    UserError,
    machine_error,
    raise_if_machine,
)
from sami.core.exits import USER_ERROR, run_entry, user_error
from sami.core.images import open_image
from sami.core.index import open_sources, stored_index
from sami.core.metrics import MetricsFile
from sami.core.patterns import expand
from sami.core.reading import read_samples, read_whole
from sami.core.scanning import scan
from sami.core.weights import Takes, find_weights, read_summary, read_weights
from sami.pretrain import PretrainConfig, main
from sami.sweeps import Sweep
from tests.runs import ROOT, arguments, opened, summary, wait_for, write_shards
from tools.cost import resolve
from tools.make_shards import main as make_shards

NUMBERS = [
    *(errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC),
    *(errno.EDQUOT, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.EROFS),
]
FEW = [errno.EMFILE, errno.EACCES, errno.EIO, errno.ESTALE]


class Broken(io.RawIOBase):
    """A file that opens and cannot be read from."""

    def __init__(self, number: int) -> None:
        self.number = number

    def readable(self) -> bool:
        return True

    seekable = readable

    def refuse(self, *_) -> int:
        raise OSError(self.number, os.strerror(self.number))

    readinto = read = seek = fileno = refuse


@contextlib.contextmanager
def failing(monkeypatch, number: int, hit: Callable[[str], bool], when: str = "open"):
    """Opening (or, with ``when`` read, reading) a path that ``hit`` chooses ends with an error."""
    real = {"open": builtins.open, "io": io.open}

    def spoilt(open_):
        def opened(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and hit(os.fspath(path)):
                if when == "read":
                    return io.BufferedReader(Broken(number))
                raise OSError(number, os.strerror(number), os.fspath(path))
            return open_(path, *arguments, **options)

        return opened

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", spoilt(real["open"]))
        patch.setattr(io, "open", spoilt(real["io"]))
        yield


def told(number: int) -> str:
    """What the sentence has to hold."""
    return REMEDIES[number]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("when", ["open", "read"])
def test_shards_and_indexes(monkeypatch, tmp_path, number, when):
    """Of an unreadable shard or index nothing is damaged, missing, bad or cut short."""
    pattern = write_shards(tmp_path / "data", (3, 2))
    (source,) = opened(pattern, tmp_path)
    shard = source.shards[1]
    places = {
        "scan": (lambda: scan(shard.url), lambda p: p.endswith("s-001.tar")),
        "samples": (
            lambda: list(read_samples(shard, np.arange(2), ("image",))),
            lambda p: p.endswith("s-001.tar"),
        ),
        "whole": (lambda: list(read_whole(shard.url)), lambda p: p.endswith("s-001.tar")),
        "members": (shard.members, lambda p: p.endswith(".npz")),
        "stored": (lambda: stored_index(shard.index, "?"), lambda p: p.endswith(".npz")),
        "again": (
            lambda: open_sources(expand(pattern, "k"), tmp_path / "index"),
            lambda p: p.endswith(".npz"),
        ),
    }
    for name, (call, hit) in places.items():
        with failing(monkeypatch, number, hit, when), pytest.raises((UserError, OSError)) as caught:
            call()
        sentence = user_error(caught.value)
        assert isinstance(sentence, MachineError), name
        assert told(number) in str(sentence), name
        assert "s-001.tar" in str(sentence) or ".npz" in str(sentence), name
        assert "damaged" not in str(sentence) and "cut short" not in str(sentence)


def test_what_does_not_parse_is_still_damage(tmp_path):
    pattern = write_shards(tmp_path / "data", (3, 2))
    (source,) = opened(pattern, tmp_path)
    source.shards[0].index.write_bytes(b"PK\3\4 nothing")
    with pytest.raises(UserError, match="is damaged; delete it"):
        source.shards[0].members()
    assert stored_index(source.shards[0].index, "?") is None
    assert machine_error(OSError("no number")) is None
    for number in (errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ENOTDIR):
        assert machine_error(OSError(number, os.strerror(number))) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_checkpoints_are_not_called_damaged(monkeypatch, tmp_path, number):
    saved = save_checkpoint(tmp_path, 3, {"a": torch.ones(4)}, {}, keep=2)
    for end, call in (
        ("meta.json", lambda: read_meta(saved)),
        ("state.pt", lambda: read_state(saved, torch.device("cpu"))),
    ):
        for when in ("open", "read"):
            with (
                failing(monkeypatch, number, lambda p, end=end: p.endswith(end), when),
                pytest.raises(MachineError) as caught,
            ):
                call()
            assert told(number) in str(caught.value) and end in str(caught.value)

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OSError):  # and not none, as if nothing had been trained yet
        list_checkpoints(tmp_path)


@pytest.mark.parametrize("number", FEW[:2])
@pytest.mark.parametrize(
    "hit",
    ["metrics.jsonl", ".summary.json.writing", "config.yaml.writing", "lock", "log.txt"],
)
def test_a_run_that_may_not_write(monkeypatch, tmp_path, in_process, number, hit):
    shards = write_shards(tmp_path / "data", (9,))
    with failing(monkeypatch, number, lambda path: path.endswith(hit)):
        code, said = in_process(main, arguments(tmp_path / "run", shards, **{"train.steps": 1}))
    assert code == USER_ERROR and len(said.strip().splitlines()) == 1, said
    assert os.strerror(number) in said
    assert "--run.dir" in said or told(number) in said


@pytest.mark.parametrize("number", FEW[1:3])
def test_in_the_middle_of_training(monkeypatch, tmp_path, in_process, number):
    """No sample is counted bad, no checkpoint is lost; afterwards the run goes on."""
    shards = write_shards(tmp_path / "data", (13, 9))
    words = arguments(tmp_path / "run", shards, **{"train.steps": 6, "run.save_every": 2})
    monkeypatch.setattr(reading, "OPEN", 1)  # or each is opened but once
    reads = []

    def late(path: str) -> bool:
        reads.append(path.endswith("s-001.tar"))
        return reads[-1] and sum(reads) > 3

    with failing(monkeypatch, number, late):
        code, said = in_process(main, words)
    assert code == USER_ERROR and told(number) in said and "s-001.tar" in said
    found = summary(tmp_path / "run")
    assert found["status"] == "failed" and found["exit_code"] == USER_ERROR
    assert not found.get("bad_samples")
    code, said = in_process(main, words)
    assert (code, said) == (0, "")
    assert summary(tmp_path / "run")["bad_samples"] == {}


@pytest.mark.parametrize("number", FEW)
def test_files_of_the_tools(monkeypatch, tmp_path, number):
    """None is called damaged, of another kind, or not there."""
    image = tmp_path / "a.jpg"
    Image.new("RGB", (64, 48)).save(image)
    coco = tmp_path / "coco.json"
    mask = {"image_id": 1, "segmentation": [[4, 4, 40, 4, 40, 40]], "category_id": 1, "id": 1}
    images = [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}]
    coco.write_text(
        json.dumps(
            {"images": images, "annotations": [mask], "categories": [{"id": 1, "name": "a"}]}
        )
    )
    for name in (MANIFEST, "summary.json", "config.yaml"):
        (tmp_path / name).write_text("{}")
    sweep = ROOT / "configs" / "sweeps" / "mask_ratio.yaml"
    config = ROOT / "configs" / "pretrain" / "sami_ti.yaml"

    def pack(*more: str) -> None:
        words = ["make_shards", str(tmp_path), str(tmp_path / f"out-{number}"), "--workers", "1"]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*words, *more])
            make_shards()

    for name, path, call in (
        ("coco", coco, lambda: read_coco(coco)),
        ("its images", image, lambda: pack("--coco", str(coco), "--prefix", "coco")),
        ("folders", image, lambda: pack()),
        ("cache", tmp_path / MANIFEST, lambda: read_manifest(tmp_path)),
        ("report", tmp_path / "summary.json", lambda: RunFolder(tmp_path)),
        ("sweep", sweep, lambda: Sweep(sweep, tmp_path / "out", [])),
        ("cost", config, lambda: resolve(config, [])),
        ("config", config, lambda: load_config(PretrainConfig, ["--config", str(config)])),
    ):
        for when in ("open", "read"):
            with (
                failing(monkeypatch, number, lambda p, path=path: p == str(path), when),
                pytest.raises((UserError, OSError)) as caught,
            ):
                call()
            sentence = user_error(caught.value)
            assert isinstance(sentence, MachineError), (name, when, caught.value)
            assert told(number) in str(sentence) and str(path.parent) in str(sentence), (name, when)


@pytest.mark.parametrize("number", FEW)
@pytest.mark.parametrize("when", ["open", "read"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "zip", "old"])
def test_weights(monkeypatch, tmp_path, number, when, kind):
    """None is cut short, not there or of another kind."""
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file({"a": torch.ones(3)}, file)
    else:
        torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=kind != "old")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
            archive.write(file, "w.pt")
        file = tmp_path / "w.zip"
    takes = Takes(("encoder",), "x")
    assert read_weights(file, takes).tensors["a"].tolist() == [1, 1, 1]
    with (
        failing(monkeypatch, number, lambda path: path == str(file), when),
        pytest.raises((UserError, OSError)) as caught,
    ):
        read_weights(file, takes)
    sentence = user_error(caught.value)
    assert isinstance(sentence, MachineError), caught.value
    assert told(number) in str(sentence) and str(file) in str(sentence)


@pytest.mark.parametrize("number", FEW)
@pytest.mark.parametrize("name", ["meta.json", "summary.json"])
def test_weights_of_a_run_that_cannot_be_read(monkeypatch, tmp_path, number, name):
    """No earlier checkpoint's weights are taken, and it is not called a run without any."""
    for step in (1, 2):
        save_checkpoint(
            tmp_path / "checkpoints",
            step,
            {"a": torch.ones(1)},
            {},
            keep=2,
            leave=_leave,
        )
    takes = Takes(("encoder",), "x")
    assert find_weights(tmp_path, takes).step == 2
    (tmp_path / "checkpoints" / "step-2" / "encoder.safetensors").write_bytes(b"damage")
    assert find_weights(tmp_path, takes).step == 1
    with failing(monkeypatch, number, lambda path: path.endswith(name)):
        if name == "meta.json":
            with pytest.raises(MachineError, match=os.strerror(number)):
                find_weights(tmp_path, takes)
        elif name == "summary.json":
            with pytest.raises(MachineError, match=os.strerror(number)):
                read_summary(tmp_path)


def _leave(folder: pathlib.Path) -> str:
    save_file({"a": torch.ones(1)}, folder / "encoder.safetensors")
    return "encoder.safetensors"


def test_a_finished_run_that_cannot_be_looked_at_is_not_begun_anew(
    monkeypatch, tmp_path, in_process
):
    shards = write_shards(tmp_path / "data", (9,))
    words = arguments(tmp_path / "run", shards, **{"train.steps": 1})
    assert in_process(main, words)[0] == 0
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with failing(monkeypatch, errno.ESTALE, lambda path: path.endswith("summary.json")):
        code, said = in_process(main, words)
    assert code == USER_ERROR and "Stale file handle" in said and "mount" in said
    assert (tmp_path / "run" / "summary.json").read_bytes() == before


def test_metrics_are_not_cut_to_nothing(monkeypatch, tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})

    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    for call in (file.read, lambda: file.cut_back(1)):
        with pytest.raises(PermissionError):
            call()


def test_folders_that_may_not_be_listed(monkeypatch, tmp_path):
    """A glob takes them for empty ones."""
    for name in "ab":
        write_shards(tmp_path / name, (2,))
    real = os.scandir

    def scandir(path="."):
        if os.fspath(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert expand(f"{tmp_path}/a/*.tar", "k")[0][0] == [f"{tmp_path}/a/s-000.tar"]
    for pattern in (f"{tmp_path}/b/*.tar", f"{tmp_path}/*/s-*.tar", f"{tmp_path}/[ab]/s-000.ta?"):
        with pytest.raises(PermissionError) as caught:
            expand(pattern, "k")
        assert f"{tmp_path}/b: Permission denied" in str(user_error(caught.value))


def test_a_dangling_link_is_named(tmp_path):
    write_shards(tmp_path / "d", (2, 2))
    (tmp_path / "d" / "s-002.tar").symlink_to(tmp_path / "gone.tar")
    for pattern in ("s-*.tar", "s-002.tar", "s-{000..002}.tar", "*"):
        with pytest.raises(UserError, match=r"k: .*s-002.tar is a symbolic link to .*gone.tar"):
            expand(f"{tmp_path}/d/{pattern}", "k")


ODD = ["a:b", "a [1]", "a{1,2}", "a*", "wh?t", "s3:x", "pipe:cat", " a ", "tab\t", "é", "$X", "~a"]


@pytest.mark.parametrize("name", [*ODD, os.fsdecode(b"caf\xe9")])
def test_a_path_that_exists_is_taken_as_it_is(tmp_path, monkeypatch, name):
    """Whatever its characters mean elsewhere; absolute and relative, as a file and in a folder."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "d", (2,))
    pathlib.Path(name).mkdir()
    (tmp_path / "d" / "s-000.tar").rename(f"{name}/{name}.tar")
    for path in (f"{name}/{name}.tar", f"{tmp_path}/{name}/{name}.tar"):
        (source,) = opened(path, tmp_path)
        (shard,) = source.shards
        assert shard.name == name
        samples = list(read_samples(shard, np.arange(2), ("image",)))
        assert [open_image(sample.part("image")).stored for sample in samples] == [(90, 75)] * 2
        assert samples[0].key == f"{name}/p0000"


def test_words_of_torch_and_of_the_memory():
    open_files = RuntimeError("unable to open file </a.pt> in read-only mode: Too many open files")
    assert "ulimit -n" in str(user_error(open_files))
    shared = RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device"
    )
    assert "/dev/shm (" in str(user_error(shared)) and "--shm-size" in str(user_error(shared))
    assert "memory ran out" in str(user_error(MemoryError()))
    assert user_error(RuntimeError("a bug")) is None
    cause = ValueError("what a library makes of it")
    cause.__cause__ = OSError(errno.EIO, "Input/output error", "/x")
    assert str(user_error(cause)).startswith("/x: Input/output error; its disk fails")
    with pytest.raises(MachineError, match="/y: Stale file handle"):
        raise_if_machine(OSError(errno.ESTALE, "Stale file handle"), "/y")
    raise_if_machine(ValueError("damage"))


class Refusing(torch.utils.data.Dataset):
    """Something that a worker cannot hand over."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitems__(self, numbers):
        return Unpicklable(self.error)


class Unpicklable:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: Success"),
            "/dev/shm (",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    ],
)
def test_a_reader_that_cannot_hand_over(error, words):
    """Torch drops such a batch with a traceback, and the training process waits for it for ever."""
    with pytest.raises(MachineError) as caught:
        next(load(Refusing(error), [[0]], 1, torch.device("cpu")))
    assert words in str(caught.value)
    assert max(REMEDIES) + HANDING_OVER < 256


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os._exit(HANDING_OVER + errno.EMFILE), "ulimit -n"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "/dev/shm ("),
    ],
)
def test_a_reader_that_ends_in_the_middle_of_a_step(capsys, end, words):
    """Torch raises in its signal handler, so anywhere: in training, held out, in a tool."""

    class Ending(torch.utils.data.Dataset):
        def __getitems__(self, numbers):
            if numbers[0]:
                end()
            return 0

    def step() -> int:
        batches = load(Ending(), [[0], [1]], 1, torch.device("cpu"))
        next(batches)
        wait_for(lambda: False)
        return 0

    assert run_entry(step) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("error: a process that reads data") and words in said


def test_the_process_leaves_with_2(capsys):
    def fail() -> int:
        raise OSError(errno.EMFILE, "Too many open files", "a.tar")

    assert run_entry(fail) == USER_ERROR
    assert capsys.readouterr().err.startswith("error: a.tar: Too many open files; raise the limit")
