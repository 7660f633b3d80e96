"""Which sample comes when: patterns, index, dealing out, shuffling, reading."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from sami.core import shards as module
from sami.core.errors import UserError
from sami.core.shards import (
    Layout,
    expand,
    fingerprint,
    index_shards,
    is_picture,
    read_epoch,
    read_range,
    read_shard,
    sample_rng,
    shuffled,
)
from tests import reference
from tests.runs import write_shards


def test_patterns(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b.tar"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    first = [f"{folder}/a-000.tar", f"{folder}/a-001.tar"]
    assert expand(f"{folder}/a-{{000..001}}.tar", "k") == first
    assert expand(f"{folder}/a-*.tar", "k") == first
    assert expand([f"{folder}/a-*.tar", f"{folder}/?.tar", f"{folder}/a-000.tar"], "k") == [
        *first,
        f"{folder}/b.tar",
    ]
    assert expand("pipe:cat x.tar", "k") == ["pipe:cat x.tar"]
    with pytest.raises(UserError, match=r"k: 'none-\*.tar' matches no file"):
        expand([f"{folder}/a-*.tar", "none-*.tar"], "k")
    with pytest.raises(UserError, match="2 of the 4 shards .* the first is .*a-002.tar"):
        expand(f"{folder}/a-{{000..003}}.tar", "k")
    with pytest.raises(UserError, match=r"is a folder; name the shards in it: .*/\*.tar"):
        expand(folder, "k")
    with pytest.raises(UserError, match="k is empty"):
        expand([], "k")


def test_what_is_a_picture():
    assert all(map(is_picture, ["a.jpg", "x/b.JPEG", "./c.png", "dots.in.name.webp"]))
    assert not any(map(is_picture, ["a.json", "a.cls", "jpg", ".jpg", "x/._a.jpg", "a.jpg.txt"]))


def test_index_is_cached_and_renewed(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, (3, 2))
    cache = tmp_path / "index.json"
    index = index_shards(expand(pattern, "k"), cache)
    assert [(shard.name, shard.count) for shard in index] == [("s-000", 3), ("s-001", 2)]
    opened = []
    real = wds.gopen
    monkeypatch.setattr(module.wds, "gopen", lambda url: opened.append(url) or real(url))
    again = index_shards(expand(pattern, "k"), cache)
    assert not opened and fingerprint(again) == fingerprint(index)
    write_shards(tmp_path, (3, 4))
    assert [s.count for s in index_shards(expand(pattern, "k"), cache)] == [3, 4]
    assert opened
    cache.write_text("{")
    assert [s.count for s in index_shards(expand(pattern, "k"), cache)] == [3, 4]
    assert set(json.loads(cache.read_text())) == set(expand(pattern, "k"))


def test_a_shard_that_streams(tmp_path):
    """Any URL that webdataset opens: here the output of a command."""
    (path,) = expand(write_shards(tmp_path, (4,)), "k")
    (local,) = index_shards([path])
    (piped,) = index_shards([f"pipe:cat {path}"])
    assert piped.sizes.tolist() == local.sizes.tolist()
    assert [s.data for s in read_shard(piped, 1, 3)] == [s.data for s in read_shard(local, 1, 3)]


def layouts():
    rng = np.random.default_rng(0)
    for _ in range(60):
        processes, workers, micro = (int(rng.integers(1, high)) for high in (4, 5, 4))
        batch = processes * micro * int(rng.integers(1, 4))
        yield Layout(int(rng.integers(batch, 6 * batch)), batch, micro, processes, workers)


def test_an_epoch_is_dealt_out_without_gap_or_overlap():
    for layout in layouts():
        for epoch in (0, 1, 5):
            shares = [
                layout.share(epoch, rank, worker)
                for rank in range(layout.processes)
                for worker in range(layout.workers)
            ]
            positions = [position for share in shares for position in share]
            assert positions == list(range(layout.steps_per_epoch * layout.batch_size))
            assert layout.samples - len(positions) < layout.batch_size


def test_micro_batches_go_round_the_workers_across_epochs():
    for layout in layouts():
        owner = {}
        for epoch in range(3):
            for worker in range(layout.workers):
                for number in layout.numbers(epoch, worker):
                    assert number not in owner
                    owner[number] = worker
        assert owner == {n: n % layout.workers for n in range(3 * layout.micro_batches_per_epoch)}


def test_shuffle_buffer_against_a_plain_list():
    sizes = np.random.default_rng(1).integers(1, 100, 300)
    for limit in (1, 150, 1000, 10**6):
        order = shuffled(sizes, limit, np.random.default_rng(2))
        draws = np.random.default_rng(2).random(len(sizes))
        assert order.tolist() == reference.shuffle_buffer(sizes.tolist(), limit, draws)
        assert sorted(order) == list(range(300))
        held, entered = 0, -1
        for item in order:  # what was read and not yet handed out stays within the bound
            if item > entered:
                held += sizes[entered + 1 : item + 1].sum()
                entered = item
            assert held <= max(limit, sizes.max())
            held -= sizes[item]
    assert shuffled(sizes, 1, np.random.default_rng(2)).tolist() == list(range(300))


def keys_of_epoch(index, layout, epoch, **more):
    keys = []
    for rank in range(layout.processes):
        for worker in range(layout.workers):
            options = {"seed": 0, "skip": 0, "buffer_bytes": 5000} | more
            read = read_epoch(index, layout, epoch=epoch, rank=rank, worker=worker, **options)
            keys += [sample.key for sample in read]
    return keys


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_exactly_once_in_an_epoch(tmp_path, processes, workers):
    index = index_shards(expand(write_shards(tmp_path, (7, 1, 12, 5)), "k"))
    layout = Layout(25, 4, 4 // processes // 2, processes, workers)
    left_out = set()
    orders = []
    for epoch in range(4):
        keys = keys_of_epoch(index, layout, epoch)
        assert len(keys) == 24 and len(set(keys)) == 24
        left_out |= {f"{s.name}/p{n:04d}" for s in index for n in range(s.count)} - set(keys)
        orders.append(keys)
    assert len(left_out) > 1  # another one each epoch
    assert orders[0] != orders[1] and orders[0] == keys_of_epoch(index, layout, 0)
    assert orders[0] != keys_of_epoch(index, layout, 0, seed=1)


def test_resuming_opens_only_what_is_needed(tmp_path, monkeypatch):
    index = index_shards(expand(write_shards(tmp_path, (6, 6, 6, 6, 6)), "k"))
    layout = Layout(30, 2, 2, 1, 1)
    options = {"seed": 0, "epoch": 0, "rank": 0, "worker": 0, "buffer_bytes": 4000}
    opened = []
    real = wds.gopen
    monkeypatch.setattr(module.wds, "gopen", lambda url: opened.append(url) or real(url))
    whole = list(read_epoch(index, layout, skip=0, **options))
    everything = len(opened)
    assert everything in (5, 6)  # one shard may be cut by the rotation
    for skip in range(0, 30, 3):
        opened.clear()
        rest = list(read_epoch(index, layout, skip=skip, **options))
        assert rest == whole[skip:]
        assert len(opened) <= everything - skip // 6 + 1
    opened.clear()
    next(read_epoch(index, layout, skip=27, **options))
    assert len(opened) <= 2


def test_reading_starts_in_the_middle_of_a_shard(tmp_path):
    index = index_shards(expand(write_shards(tmp_path, (5, 4)), "k"))
    samples = list(read_shard(index[0], 0, 5))
    assert [s.key for s in samples] == [f"s-000/p{n:04d}" for n in range(5)]
    assert list(read_shard(index[0], 2, 4)) == samples[2:4]
    assert [s.key for s in read_range(index, range(3, 7))] == [
        "s-000/p0003",
        "s-000/p0004",
        "s-001/p0000",
        "s-001/p0001",
    ]


def test_a_shard_cut_after_it_was_indexed(tmp_path):
    (path,) = expand(write_shards(tmp_path, (6,)), "k")
    (shard,) = index_shards([path])
    whole = list(read_shard(shard, 0, 6))
    with tarfile.open(path) as tar:
        stands = sum(member.offset_data + member.size <= 9000 for member in tar)
    assert 0 < stands < 5
    Path(path).write_bytes(Path(path).read_bytes()[:9000])
    samples = list(read_shard(shard, 0, 6))
    assert len(samples) == 6
    good = [sample for sample in samples if sample.data is not None]
    assert good == whole[:stands]
    assert all(sample.reason for sample in samples[len(good) :])
    told = []
    (short,) = index_shards([path], say=told.append)
    assert short.count in (stands, stands + 1) and "is cut short" in told[0]


def test_sa1b_tars_as_they_are(tmp_path):
    """Annotations between the pictures, compressed or not, leading ./ or not."""
    write_shards(tmp_path, (3,))
    with tarfile.open(tmp_path / "s-000.tar") as source:
        pictures = [source.extractfile(name).read() for name in source.getnames()]
    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with wds.TarWriter(str(tmp_path / name), compress=mode == "w:gz") as writer:
            for number, data in enumerate(pictures):
                writer.write({"__key__": f"./sa_{number}", "jpg": data, "json": b"{}"})
        (shard,) = index_shards([str(tmp_path / name)])
        assert [sample.data for sample in read_shard(shard, 0, 3)] == pictures


def test_streams_of_random_numbers_differ():
    draws = {
        tuple(sample_rng(*what).integers(0, 2**32, 4))
        for what in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    assert len(draws) == 4
    assert sample_rng(0, 0, "a").random() == sample_rng(0, 0, "a").random()
