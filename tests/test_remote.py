"""Shards on the network and those that can only be streamed."""

import contextlib
import errno
import gzip
import io
import itertools
import multiprocessing
import os
import shutil
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sami.core import network, remote
from sami.core.dataset import MicroBatches, Training, fetching_ahead, load
from sami.core.errors import MachineError, UserError
from sami.core.index import fingerprint, open_sources
from sami.core.network import Patience, RangeFile, describe
from sami.core.order import Order
from sami.core.remote import ShardCache, open_shard
from sami.core.scanning import IMAGE, scan
from sami.pretrain import main as pretrain
from tests.runs import arguments, numbers, summary, write_shards
from tests.server import serving

CPU = torch.device("cpu")
QUICK = Patience(stall=20, pauses=(0.01, 0.02))  # 20 s: a machine may be busy
IMPATIENT = Patience(stall=0.6, pauses=(0.01,))  # where the stall is what is waited for


def tar_of(count: int, size: int = 20_000, seed: int = 0) -> bytes:
    """A tar of images that no compression makes smaller."""
    file, rng = io.BytesIO(), np.random.default_rng(seed)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"p{number}.jpg")
            info.size = size
            tar.addfile(info, io.BytesIO(rng.bytes(size)))
    return file.getvalue()


@pytest.fixture
def server():
    network._DESCRIBED.clear()
    with serving() as state:
        yield state


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 1, QUICK)


def test_ranges_alone_cross_the_network(server, cache):
    data = tar_of(10)
    url = server.url("a.tar", data)
    with open_shard(url, cache) as file:
        assert isinstance(file, RangeFile) and file.seekable() and file.seek(0, 2) == len(data)
        server.forget()
        for start, size in ((512, 20_000), (len(data) - 5, 50), (0, 0), (len(data) + 3, 7)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]
        assert file.seek(-10, 2) == file.tell() == len(data) - 10 and file.read() == data[-10:]
        assert server.requests == {"GET": 3}  # none for what is empty
        assert server.served["/a.tar"].sum() == 20_000 + 5 + 10
    assert not cache.folder.exists()


def test_headers_are_hopped_over(server, cache):
    data = tar_of(20, size=100_000)
    with open_shard(server.url("a.tar", data), cache) as file:
        with tarfile.open(fileobj=io.BufferedReader(file, 4096)) as tar:
            assert [m.offset_data for m in tar] == [512 + n * 100_864 for n in range(20)]
    assert server.served["/a.tar"].sum() < 0.06 * len(data)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "429", "reset", "truncate", "stall"])
def test_a_network_that_fails_for_a_while(server, cache, fault):
    cache.patience = IMPATIENT if fault == "stall" else QUICK
    faults = [fault] * len(cache.patience.pauses)
    data = tar_of(3)
    url = server.url("a.tar", data)
    with open_shard(url, cache) as file:
        server.faults.extend(faults)
        assert file.read(30_000) == data[:30_000]
        assert not server.faults
        server.always = fault
        words = {"503": "answers 503", "429": "answers 429", "stall": "no byte came for 0.6 s"}
        with pytest.raises(
            MachineError,
            match=f"{url} cannot be read .*{words.get(fault, '')}.*{len(faults) + 1} times",
        ):
            file.read(100)
    server.always, server.ranges = "", False
    url = server.url("b.tar", data)
    describe(url, QUICK)
    server.faults.extend(faults)
    with open_shard(url, cache) as file:
        assert file.read() == data and not server.faults


def test_what_waiting_does_not_mend(server, cache):
    url = server.url("a.tar", tar_of(1))
    with pytest.raises(UserError, match="nowhere.tar is not there .*404") as caught:
        open_shard(url.replace("a.tar", "nowhere.tar"), cache)
    assert not isinstance(caught.value, MachineError)
    with open_shard(url, cache) as file:
        server.always = "403"
        with pytest.raises(UserError, match="a.tar may not be read .*403.*signed") as caught:
            file.read(10)
    assert server.requests["GET"] <= 4 and not isinstance(caught.value, MachineError)
    with pytest.raises(UserError, match="no.such.host"):
        open_shard("http://no.such.host.invalid/a.tar", cache)
    with pytest.raises(MachineError, match="127.0.0.1:9/a.tar cannot be read"):
        open_shard("http://127.0.0.1:9/a.tar", cache)
    with pytest.raises(UserError, match="neither fsspec nor webdataset"):
        open_shard("s3x://bucket/a.tar", cache)


def test_a_package_that_is_missing_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match="pip install s3fs"):
        open_shard("s3://bucket/a.tar", cache)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match="pip install aiohttp"):
        open_shard("https://127.0.0.1:9/a.tar", cache)


def test_any_file_system_of_fsspec(cache):
    data = tar_of(3)
    fsspec.filesystem("memory").pipe("/shards/a.tar", data)
    fsspec.filesystem("memory").pipe("/shards/a.tgz", gzip.compress(data))
    with open_shard("memory://shards/a.tar", cache) as file:
        assert isinstance(file, RangeFile)
        file.seek(700)
        assert file.read(900) == data[700:1600]
    with open_shard("memory://shards/a.tgz", cache) as file:
        assert file.read() == data
    for name in ("a.tar", "a.tgz"):  # less comes than was said
        url = f"memory://shards/{name}"
        true = describe(url, QUICK)
        network._DESCRIBED[url] = replace(true, size=true.size + 9, version="another")
        with pytest.raises(MachineError, match=f"{name} cannot be read .* bytes came.*3 times"):
            open_shard(url, cache).read()
        del network._DESCRIBED[url]


class Ranges(Dataset):
    """Reads samples of shards in a worker."""

    def __init__(self, urls: list[str], cache: ShardCache) -> None:
        self.urls, self.cache, self.files = urls, cache, {}

    def __len__(self) -> int:
        return 20 * len(self.urls)

    def __getitem__(self, index: int) -> bytes:
        url = self.urls[index // 20]
        file = self.files.get((os.getpid(), url))  # open files share their place after a fork
        if file is None:
            file = self.files[os.getpid(), url] = open_shard(url, self.cache)
        file.seek(20_992 * (index % 20))
        return file.read(512 + 20_000)


@pytest.mark.parametrize("ranges", [True, False])
def test_two_forked_readers_fetch_each_byte_once(server, cache, ranges):
    """And the parent, which was connected before them, reads on."""
    server.ranges = ranges
    shards = [tar_of(20, seed=seed) for seed in range(3)]
    urls = [server.url(f"{n}.tar", data) for n, data in enumerate(shards)]
    dataset = Ranges(urls, cache)
    assert dataset[0] == shards[0][:20_512]  # the parent is connected
    for url in urls:  # as the parent does when it looks for their indexes
        describe(url, QUICK)
    server.forget()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=torch.randperm(60).tolist(),
        num_workers=2,
        multiprocessing_context="fork",
    )
    read = dict(zip(loader.sampler, loader, strict=True))
    for index, data in read.items():
        start = 20_992 * (index % 20)
        assert data == shards[index // 20][start : start + 20_512]
    counts = np.concatenate(list(server.served.values()))
    if ranges:
        assert counts.max() == 1 and counts.sum() == 60 * 20_512
    else:
        assert [n.max() for n in server.served.values()] == [0, 1, 1]
    server.forget()
    began = server.requests["GET"]
    assert dataset[1] == shards[0][20_992 : 20_992 + 20_512]
    assert server.requests["GET"] == began + ranges
    dataset.files[os.getpid(), urls[0]].close()


@pytest.mark.parametrize("kind", ["pipe", "tgz", "bz2", "xz", "http", "http tgz", "unknown length"])
def test_what_cannot_seek_is_cached(request, tmp_path, cache, kind, monkeypatch):
    data = tar_of(5)
    path = tmp_path / "s.tar"
    for mode in ("gz", "bz2", "xz"):
        if kind.endswith(mode) or kind.endswith("tgz"):
            mode = "gz" if kind.endswith("tgz") else mode
            opener = {"gz": "gzip", "bz2": "bz2", "xz": "lzma"}[mode]
            with __import__(opener).open(path, "wb") as file:
                file.write(data)
            break
    else:
        path.write_bytes(data)
    url = str(path)
    if kind == "pipe":
        url = f"pipe:cat {path} | cat"
    if kind.startswith(("http", "unknown")):
        server = request.getfixturevalue("server")
        url = server.url("s.tar?token=%2F", path.read_bytes())
        server.files["/s.tar"] = server.files.pop("/s.tar?token=%2F")
        server.served["/s.tar"] = server.served.pop("/s.tar?token=%2F")
        server.ranges, server.length = "tgz" in kind, kind != "unknown length"
    for _ in range(2):
        with open_shard(url, cache) as file:
            assert file.read() == data and file.seekable()
    (kept,) = cache.folder.glob("*.tar")
    assert kept.read_bytes() == data and not list(cache.folder.glob("*.part"))
    if kind.startswith(("http", "unknown")):
        # Asked for a range, or how long it is, this server sends the whole of a small file.
        assert server.served["/s.tar"].min() <= 2 and server.requests["GET"] <= 2
    if path.exists() and kind in ("tgz", "bz2", "xz"):
        path.write_bytes(gzip.compress(tar_of(2)))
        with open_shard(url, cache) as file:
            assert file.read() == tar_of(2)  # it changed


@pytest.mark.slow
def test_programs_that_fail(tmp_path, cache):
    data = tar_of(3)
    path, count = tmp_path / "s.tar", tmp_path / "count"
    path.write_bytes(data)
    begin = f"pipe:echo >> {count}; "
    for program, patience, words in (
        ("exit 3", QUICK, "ended with 3"),
        (f"head -c 30000 {path}; exit 4", QUICK, "ended with 4"),
        (f"cat {path}; sleep 100", IMPATIENT, "no byte came for 0.6 s"),
        (f"(cat {path}; sleep 100) | cat", IMPATIENT, "no byte came"),
    ):
        cache.patience = patience
        with pytest.raises(MachineError, match=words):
            open_shard(begin + program, cache)
        assert len(count.read_text()) == len(patience.pauses) + 1
        assert not list(cache.folder.glob("*.[tp]ar*"))
        count.unlink()
    cache.patience = QUICK
    flaky = f"{begin}[ $(wc -l < {count}) -lt 2 ] && head -c 9999 {path} || cat {path}"
    with open_shard(flaky, cache) as file:
        assert file.read() == data
    count.unlink()
    with open_shard(f"{begin}head -c 9999 {path}", cache) as file:  # it is cut, however often
        assert file.read() == data[:9999] and len(count.read_text()) == 2


def test_the_folder_is_bounded_and_the_longest_unused_go(tmp_path):
    data = tar_of(4, size=100_000)  # 0.4 MB
    cache = ShardCache(tmp_path / "cache", 1e-3, QUICK)
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.tgz")
        paths[-1].write_bytes(gzip.compress(data + bytes(1024 * number)))
    held = cache.open(str(paths[0]))
    cache.open(str(paths[1])).close()
    time.sleep(0.01)
    cache.open(str(paths[0])).close()  # used again
    cache.open(str(paths[2])).close()
    assert not list(cache.folder.glob("*.part"))
    names = {cache._name(str(path)) for path in (paths[0], paths[2])}
    assert {path.stem for path in cache.folder.glob("*.tar")} == names
    cache.open(str(paths[3])).close()
    cache.open(str(paths[1])).close()
    assert held.read() == data  # it has gone, and stays readable to who has it
    held.close()
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 1e6
    with pytest.raises(
        UserError, match=r"data.cache_gb 0.0001 cannot hold .*0.tgz.*--data.cache_gb"
    ):
        ShardCache(tmp_path / "small", 1e-4, QUICK).open(str(paths[0]))
    cache.require([400_000, 300_000, 100], 1)
    with pytest.raises(UserError, match=r"two windows of 2 shards.*--data.cache_gb 0.1 would do"):
        cache.require([400_000, 300_000, 100, 300_000, 7], 2)


def fetch_in_process(cache: ShardCache, url: str) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=cache.open, args=(url,))
    process.start()
    return process


def test_processes_fetch_a_shard_once_and_a_killed_one_leaves_nothing(tmp_path, cache):
    count, path = tmp_path / "count", tmp_path / "s.tar"
    path.write_bytes(tar_of(3))
    url = f"pipe:echo >> {count}; head -c 9999 {path}; sleep 0.5; tail -c +10000 {path}"
    killed = fetch_in_process(cache, url)
    while (
        not list(cache.folder.glob("*.part"))
        or not next(cache.folder.glob("*.part")).stat().st_size
    ):
        time.sleep(0.01)
    killed.kill()
    killed.join()
    other = cache.open(f"pipe:cat {path}")  # cleans up
    assert list(cache.folder.glob("*.part")) == []
    count.unlink()
    processes = [fetch_in_process(cache, url) for _ in range(2)]
    with cache.open(url) as file:
        assert file.read() == path.read_bytes()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(count.read_text()) == 1
    assert len(list(cache.folder.glob("*.tar"))) == 2
    other.close()


def test_many_at_once_in_little_room(tmp_path):
    """Of parts that wait for each other's room one goes on."""
    cache = ShardCache(tmp_path / "cache", 1e-3, QUICK)
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(6, size=100_000))
    urls = [f"pipe:cat {path}; : {number}" for number in range(4)]
    found: list[bytes] = []

    def read(url: str) -> None:
        with cache.open(url) as file:
            found.append(file.read())

    threads = [threading.Thread(target=read, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [path.read_bytes()] * 4
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 1e6


def test_fetching_ahead(tmp_path, cache):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(2))
    urls = [f"pipe:cat {path}; : {number}" for number in range(3)]
    cache.prefetch(["pipe:exit 1", *urls])
    cache._thread.join()
    assert len(list(cache.folder.glob("*.tar"))) == 3
    cache.prefetch([f"{urls[0]} 7"])
    cache._thread.join()
    assert len(list(cache.folder.glob("*.tar"))) == 4


def test_a_disk_that_is_full_and_a_folder_that_cannot_be(tmp_path, monkeypatch):
    path = tmp_path / "s.tgz"
    path.write_bytes(gzip.compress(tar_of(2)))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ShardCache(tmp_path / "cache", 1, QUICK)
    monkeypatch.setattr(remote.ShardCache, "_reserve", full)
    with pytest.raises(MachineError, match="cache, where .*No space left.*--data.cache_dir"):
        cache.open(str(path))
    assert not list(cache.folder.glob("*.part"))
    with pytest.raises(UserError, match="name another --data.cache_dir"):
        ShardCache(path / "below", 1, QUICK).open(str(path))


def test_local_tars_are_files(tmp_path, cache):
    path = tmp_path / "a:b [1].tar"
    path.write_bytes(tar_of(1))
    with open_shard(str(path), cache) as file:
        assert file.fileno() and file.read() == tar_of(1)
    with pytest.raises(FileNotFoundError):
        open_shard(str(tmp_path / "none.tar"), cache)
    assert not cache.folder.exists() and Path(ShardCache().folder).is_absolute()
    assert os.fspath(ShardCache("x").folder) == "x"


def samples_of(order: Order, rank: int, processes: int, workers: int, steps: int) -> list:
    """What one rank's readers read in some steps, and nothing beyond them."""
    parts = MicroBatches(order.batch_size, order.batch_size // processes, rank, processes, 0)
    parts = itertools.islice(fetching_ahead(order, parts), steps)
    batches = load(Training(order, Raw()), parts, workers, CPU)
    return [item for items, _ in batches for item in items]


class Raw:
    fields = (IMAGE, "json")

    def decode(self, sample, epoch, replacement):
        assert not replacement
        return sample.key, sample.part(IMAGE), sample.part("json")

    def collate(self, items):
        return items


def shards_of(count: int) -> list[bytes]:
    """Each of 12 images of 30 kB with annotations, and what no training reads."""
    made = []
    for number in range(count):
        file, rng = io.BytesIO(), np.random.default_rng(number)
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in (f"p{n}.{kind}" for n in range(12) for kind in ("jpg", "json", "txt")):
                info = tarfile.TarInfo(name)
                info.size = 30_000 if name.endswith(("jpg", "txt")) else 1000
                tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
        made.append(file.getvalue())
    return made


def test_a_job_fetches_each_byte_once(server, tmp_path, cache):
    """Two ranks with two readers each, over an epoch; and what nobody reads is not fetched."""
    made = shards_of(4)
    for number, data in enumerate(made):
        (tmp_path / f"s{number}.tar").write_bytes(data)
    urls = [server.url(f"s{number}.tar", data) for number, data in enumerate(made)]
    (source,) = open_sources([(urls, None)], tmp_path / "index", cache=cache)
    assert all(counts.sum() < 0.2 * len(counts) for counts in server.served.values())
    server.forget()
    order = Order([source], batch_size=8, seed=0, window=2)
    read = [samples_of(order, rank, 2, 2, 6) for rank in range(2)]
    counts = np.concatenate(list(server.served.values()))
    assert counts.max() == 1 and 48 * 31_000 < counts.sum() < 48 * 33_500
    assert server.requests["GET"] == 48 and not cache.folder.exists()
    local = [(sorted(str(path) for path in tmp_path.glob("s?.tar")), None)]
    (same,) = open_sources(local, tmp_path / "local")
    expected = samples_of(Order([same], batch_size=8, seed=0, window=2), 0, 1, 0, 6)
    assert sorted(read[0] + read[1]) == sorted(expected)
    # A second start asks again how long they are, and reads no header.
    server.forget()
    network._DESCRIBED.clear()
    assert fingerprint(
        open_sources([(urls, None)], tmp_path / "index", cache=cache)
    ) == fingerprint([same])
    assert server.requests == {"HEAD": 4, "GET": 4}
    del server.files["/s2.tar"]
    network._DESCRIBED.clear()
    with pytest.raises(UserError, match="s2.tar is not there"):
        open_sources([(urls, None)], tmp_path / "index", cache=cache)


def test_an_index_beside_a_remote_shard_is_used(server, tmp_path, cache):
    (data,) = shards_of(1)
    (tmp_path / "s.tar").write_bytes(data)
    scan(str(tmp_path / "s.tar")).save(tmp_path / "s.tar.index.npz")
    url = server.url("s.tar", data)
    server.url("s.tar.index.npz", (tmp_path / "s.tar.index.npz").read_bytes())
    (source,) = open_sources([([url + "?key=1"], None)], tmp_path / "index", cache=cache)
    assert source.count == 12 and server.served["/s.tar"].sum() < 100
    server.url("s.tar", data + bytes(512))  # of another length: no longer its index
    network._DESCRIBED.clear()
    open_sources([([url + "?key=1"], None)], tmp_path / "again", cache=cache)
    assert server.served["/s.tar"].sum() > 12 * 512


@pytest.mark.parametrize("workers", [0, 2])
def test_programs_are_run_once_for_each_window(tmp_path, workers):
    """The next window is fetched ahead; a folder that holds all is filled once."""
    made, urls = shards_of(6), []
    for number, data in enumerate(made):
        (tmp_path / f"s{number}.tar").write_bytes(data)
        urls.append(f"pipe:echo {number} >> {tmp_path}/count; cat {tmp_path}/s{number}.tar")
    size = len(made[0])
    local = [([str(tmp_path / f"s{n}.tar") for n in range(6)], None)]
    plain = Order(open_sources(local, tmp_path / "local"), batch_size=6, seed=0, window=2)
    expected = [item[1:] for item in samples_of(plain, 0, 1, 0, 36)]
    # In the smaller one, once for the index and for each epoch; and a little more where readers
    # that lag behind find their window gone, but not for each of 36 samples.
    for shards, most in ((6.2, 1), (4.2, 2 * (1 + 3))):
        cache = ShardCache(tmp_path / f"cache{shards}", shards * size / 1e9, QUICK)
        (tmp_path / "count").unlink(missing_ok=True)
        sources = open_sources([(urls, None)], tmp_path / f"index{shards}", cache=cache)
        cache.require([shard.size for shard in sources[0].shards], 2)
        order = Order(sources, batch_size=6, seed=0, window=2)
        found = samples_of(order, 0, 1, workers, 36)  # three epochs
        assert [item[1:] for item in found] == expected
        runs = Counter((tmp_path / "count").read_text().split())
        assert max(runs.values()) <= most, runs
        sizes = []
        for path in cache.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # let go of meanwhile, for the next window
                sizes.append(path.stat().st_size)
        assert sum(sizes) <= shards * size


@pytest.mark.slow
def test_a_cache_that_is_too_small_is_told_before_all_is_fetched(tmp_path):
    """Not after hours; and what was found out until then is kept."""
    (data,) = shards_of(1)
    (tmp_path / "s.tar").write_bytes(data)
    urls = [f"pipe:echo {number} >> {tmp_path}/count; cat {tmp_path}/s.tar" for number in range(60)]
    cache = ShardCache(tmp_path / "cache", 2.5 * len(data) / 1e9, QUICK)
    with pytest.raises(UserError, match="two windows of 3 shards"):
        open_sources([(urls, None)], tmp_path / "index", cache=cache, window=3)
    assert 3 <= len((tmp_path / "count").read_text().split()) < 60
    known = urls[: len(list((tmp_path / "index").iterdir()))]
    assert known
    cache = ShardCache(tmp_path / "cache", 2.5 * len(data) / 1e9, QUICK)
    open_sources([(known[:2], None)], tmp_path / "index", cache=cache, window=3)  # all of them fit
    # Eight at once in room for two, which are let go of before long: not over and over.
    (tmp_path / "count").unlink()
    open_sources([(urls[:30], None)], tmp_path / "again", cache=cache)
    runs = Counter((tmp_path / "count").read_text().split())
    assert 20 < runs.total() < 120, runs  # some are kept from before


@pytest.mark.slow
def test_a_run_on_remote_shards_is_the_run_on_local_ones(server, tmp_path, in_process):
    pattern = write_shards(tmp_path / "data", (9, 7, 8))
    for path in (tmp_path / "data").glob("*.tar"):
        url = server.url(path.name, path.read_bytes())
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    remote_pattern = f"{url.rpartition('/')[0]}/{Path(pattern).name}"
    compressed = pattern.replace(".tar", ".tar.gz")
    cached = {"data.cache_dir": tmp_path / "cache", "data.cache_gb": 0.01}
    more = {"train.steps": 8, "data.window": 2}
    for name, shards, options in (
        ("local", pattern, {}),
        ("remote", remote_pattern, {"data.workers": 2}),
        ("compressed", compressed, {"data.workers": 1} | cached),
    ):
        code, said = in_process(
            pretrain, arguments(tmp_path / name, shards, **more, **{"data.workers": 0} | options)
        )
        assert code == 0, said
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    losses = {
        name: [line["loss"] for line in numbers(tmp_path / name)]
        for name in ("local", "remote", "compressed")
    }
    assert losses["local"] == losses["remote"] == losses["compressed"]
    cached["data.cache_gb"] = 2e-5
    code, said = in_process(pretrain, arguments(tmp_path / "small", compressed, **more, **cached))
    assert code == 2 and "data.cache_gb 2e-05 cannot hold" in said
    sizes = [path.stat().st_size for path in (tmp_path / "data").glob("*.tar")]
    cached["data.cache_gb"] = (sum(sizes) + max(sizes)) / 2e9
    code, said = in_process(pretrain, arguments(tmp_path / "few", compressed, **more, **cached))
    assert code == 2 and "two windows of 2 shards" in said and "--data.cache_gb 0.1 would" in said
    server.always = "503"
    code, said = in_process(pretrain, arguments(tmp_path / "down", remote_pattern, **more))
    assert code == 2 and "s-000.tar cannot be read (the server answers 503)" in said
    # In the middle of training too, where a worker meets it.
    shutil.copytree(tmp_path / "remote" / "index", tmp_path / "later" / "index")
    words = arguments(tmp_path / "later", remote_pattern, **more | {"data.workers": 2})
    code, said = in_process(pretrain, words)
    assert code == 2 and said.count("cannot be read (the server answers 503), tried 3 times") == 1
    assert summary(tmp_path / "later")["status"] == "failed" and "index.npz" not in said


def test_long_pauses_are_told(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(network.time, "sleep", slept.append)

    def attempt():
        raise ConnectionResetError("gone")

    with pytest.raises(MachineError, match="tried 4 times"):
        network.persist("http://host/a.tar", attempt, network.Patience(pauses=(1, 9, 27)))
    told = capsys.readouterr().err.splitlines()
    assert len(slept) == 3
    assert [line.rpartition("in ")[2] for line in told] == ["9 s", "27 s"]
    assert all(line.startswith("http://host/a.tar: ") for line in told)
