"""Patterns, the index, and reading samples however their members lie."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from sami.core import index as module
from sami.core import streams
from sami.core.errors import BadSample, UserError
from sami.core.index import fingerprint, index_beside, open_sources
from sami.core.patterns import expand
from sami.core.reading import read_range, read_samples
from sami.core.scanning import IMAGE, scan, split_name
from tests.runs import ROOT, opened, run, write_shards

ALL = (IMAGE, "json", "cls", "teacher.npz")


def write_tar(path, members, mode="w", **options):
    """A tar of (name, data) as they come."""
    with tarfile.open(path, mode, **options) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples_of(path, folder, fields=ALL, say=lambda text: None):
    (source,) = open_sources([([str(path)], None)], folder / "index", say)
    return list(read_range(source.shards, range(source.count), fields))


def test_patterns(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b.tar"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    first = [f"{folder}/a-000.tar", f"{folder}/a-001.tar"]
    for pattern in (f"{folder}/a-{{000..001}}.tar", f"{folder}/a-*.tar", f"file:{folder}/a-*.tar"):
        assert expand(pattern, "k") == [(first, None)]
    assert expand([f"{folder}/a-*.tar", f"{folder}/?.tar", f"{folder}/./a-000.tar"], "k") == [
        ([*first, f"{folder}/b.tar"], None)
    ]
    assert expand("pipe:cat x.tar", "k") == [(["pipe:cat x.tar"], None)]
    with pytest.raises(UserError, match=r"k: 'none-\*.tar' matches no file"):
        expand([f"{folder}/a-*.tar", "none-*.tar"], "k")
    with pytest.raises(UserError, match="2 of the 4 shards .* the first is .*a-002.tar"):
        expand(f"{folder}/a-{{000..003}}.tar", "k")
    with pytest.raises(UserError, match=r"is a folder; name the shards in it: .*/\*.tar"):
        expand(folder, "k")
    with pytest.raises(UserError, match="k is empty"):
        expand([], "k")


def test_patterns_with_weights(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "b.tar"):
        (tmp_path / name).touch()
    a, b = f"{tmp_path}/a-*.tar", f"{tmp_path}/b.tar"
    assert [(len(urls), share) for urls, share in expand({a: 3, b: 1}, "k")] == [
        (2, 0.75),
        (1, 0.25),
    ]
    with pytest.raises(UserError, match="belongs to .* and to"):
        expand({a: 3, f"{tmp_path}/*.tar": 1}, "k")
    with pytest.raises(UserError, match="weight 0 of .*b.tar' must be positive"):
        expand({a: 3, b: 0}, "k")


def test_names_of_members():
    assert split_name("a.jpg") == ("a", IMAGE)
    assert split_name("./x/b.v2.JPEG") == ("x/b.v2", IMAGE)
    assert split_name("b.v2.teacher.npz") == ("b.v2", "teacher.npz")
    assert split_name("sa_1.json") == ("sa_1", "json") and split_name("a.b.cls") == ("a.b", "cls")
    for name in ("jpg", ".jpg", "x/._a.jpg", "a.jpg.txt", "a.npz", "classes"):
        assert split_name(name) is None


def test_index_is_cached_and_renewed(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, (3, 2))
    (first,) = opened(pattern, tmp_path)
    assert [(shard.name, shard.count) for shard in first.shards] == [("s-000", 3), ("s-001", 2)]
    scanned = []
    monkeypatch.setattr(module, "scan", lambda url, cache: scanned.append(url) or scan(url, cache))
    assert fingerprint(opened(pattern, tmp_path)) == fingerprint([first])
    assert not scanned
    write_shards(tmp_path, (3, 4))
    (changed,) = opened(pattern, tmp_path)
    assert [shard.count for shard in changed.shards] == [3, 4] and len(scanned) == 2
    assert fingerprint([changed]) != fingerprint([first])
    whole = changed.shards[0].index.read_bytes()
    changed.shards[0].index.write_bytes(whole[:-50])  # a damaged one is made anew
    assert opened(pattern, tmp_path) == [changed] and len(scanned) == 3


def test_indexes_beside_the_shards(tmp_path, monkeypatch):
    """tools/index_shards.py makes them; a run then reads no header."""
    pattern = write_shards(tmp_path, (3, 2))
    words = [sys.executable, str(ROOT / "tools/index_shards.py"), pattern, "--workers", "1"]
    done = run(words)
    assert done.returncode == 0 and "5 samples in 2 shards" in done.stdout
    monkeypatch.setattr(module, "scan", None)
    (source,) = open_sources(expand(pattern, "k"), tmp_path / "elsewhere")
    assert [shard.index for shard in source.shards] == [index_beside(s.url) for s in source.shards]
    assert not list((tmp_path / "elsewhere").iterdir())
    monkeypatch.undo()
    write_shards(tmp_path, (4, 2))
    assert opened(pattern, tmp_path)[0].count == 6  # what is beside them is out of date
    assert run(words).stdout.endswith("6 samples in 2 shards\n")
    done = run([*words[:2], "pipe:cat x.tar"])
    assert done.returncode == 2 and "is no local file" in done.stderr


def test_shards_of_one_name_are_told_apart(tmp_path):
    patterns = [write_shards(tmp_path / name, (3, 2)) for name in "ab"]
    (source,) = opened(patterns, tmp_path)
    assert [shard.name for shard in source.shards] == ["a/s-000", "a/s-001", "b/s-000", "b/s-001"]
    keys = {sample.key for sample in read_range(source.shards, range(10), (IMAGE,))}
    assert len(keys) == 10 and "b/s-001/p0001" in keys


MEMBERS = [
    (f"p{n}.{kind}", f"{kind} {n}".encode() * 300) for n in range(4) for kind in ("jpg", "json")
]
ORDERS = {
    "beside": MEMBERS,
    "annotation first": [MEMBERS[i ^ 1] for i in range(8)],
    "images, then annotations": MEMBERS[::2] + MEMBERS[1::2],
    "annotations backwards": MEMBERS[1::2][::-1] + MEMBERS[::2],
    "leading ./": [(f"./{name}", data) for name, data in MEMBERS],
    "long names": [("n" * 120 + name, data) for name, data in MEMBERS],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["tar", "gz", "pipe", "pax", "old"])
def test_members_find_each_other(tmp_path, order, kind):
    formats = {"pax": tarfile.PAX_FORMAT, "old": tarfile.GNU_FORMAT}
    options = {"format": formats.get(kind, tarfile.DEFAULT_FORMAT)}
    mode = "w:gz" if kind == "gz" else "w"
    path = write_tar(tmp_path / "s.tar", ORDERS[order], mode, **options)
    samples = samples_of(f"pipe:cat {path}" if kind == "pipe" else path, tmp_path)
    assert len(samples) == 4
    for number, sample in enumerate(samples):
        assert sample.key.endswith(f"p{number}")
        assert sample.parts == {
            IMAGE: f"jpg {number}".encode() * 300,
            "json": f"json {number}".encode() * 300,
        }
    (source,) = open_sources([([path], None)], tmp_path / "index")
    two = list(read_samples(source.shards[0], np.array([1, 3]), (IMAGE,)))
    assert [sample.parts for sample in two] == [{IMAGE: samples[n].parts[IMAGE]} for n in (1, 3)]


def test_odd_members_are_named(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("a.jpg", b"2"),
        ("b.jpg", b"3"),
        ("b.png", b"4"),
        ("c.json", b"{}"),
        ("d.v1.jpg", b"5"),
        ("d.v1.cls", b"7"),
        ("README", b"x"),
        ("e.jpg", b""),
    ]
    told = []
    samples = samples_of(write_tar(tmp_path / "s.tar", members), tmp_path, say=told.append)
    assert {s.key: s.parts for s in samples} == {
        "s/a": {IMAGE: b"1"},
        "s/b": {IMAGE: b"3"},
        "s/d.v1": {IMAGE: b"5", "cls": b"7"},
        "s/e": {IMAGE: b""},
    }
    assert any("2 members have the key and kind of an earlier one" in text for text in told)
    assert any("1 samples have no image" in text and "c.json" in text for text in told)
    with pytest.raises(BadSample, match="no json member"):
        samples[0].part("json")


def test_what_is_no_shard(tmp_path):
    (tmp_path / "text.tar").write_text("hello")
    (tmp_path / "empty.tar").touch()
    write_tar(tmp_path / "none.tar", [("a.txt", b"x")])
    for name, words in (
        ("text", "is not a readable tar"),
        ("empty", "is not a readable tar"),
        ("none", "holds no image"),
    ):
        with pytest.raises(UserError, match=f"{name}.tar {words}"):
            samples_of(tmp_path / f"{name}.tar", tmp_path)
    with pytest.raises(UserError, match=r"pipe:false .*(empty file|ended with 1\))"):
        samples_of("pipe:false", tmp_path)


@pytest.mark.parametrize("kind", ["tar", "gz"])
def test_a_shard_that_is_cut_short_counts_as_far_as_it_goes(tmp_path, kind):
    members = [(f"p{n}.jpg", np.random.default_rng(n).bytes(30000)) for n in range(6)]
    path = write_tar(tmp_path / "s.tar", members, "w:gz" if kind == "gz" else "w")
    size = Path(path).stat().st_size if kind == "gz" else 6 * (512 + 30208)
    Path(path).write_bytes(Path(path).read_bytes()[: int(size * 0.6)])
    told = []
    samples = samples_of(path, tmp_path, say=told.append)
    assert "cut short" in told[0] and 3 <= len(samples) <= 4
    good = [sample for sample in samples if sample.parts]
    assert len(good) >= 2 + (kind == "tar")  # a decompressor reads in blocks
    assert [sample.part(IMAGE) for sample in good] == [data for _, data in members[: len(good)]]
    assert [sample.reason for sample in samples if not sample.parts] in (
        [],
        ["cut off in shard"],
        ["shard cannot be read"],
    )


def test_a_shard_that_changes_or_vanishes_after_it_was_indexed(tmp_path):
    path = Path(write_shards(tmp_path, (6,)).replace("{000..000}", "000"))
    (source,) = opened(str(path), tmp_path)

    def read():
        return list(read_samples(source.shards[0], np.arange(6), (IMAGE,)))

    whole, data = read(), path.read_bytes()
    assert all(sample.parts for sample in whole)
    path.write_bytes(data[:9000])
    cut = read()
    assert [s.key for s in cut] == [s.key for s in whole]
    assert {s.reason for s in cut[4:]} == {"cut off in shard"} and cut[0] == whole[0]
    path.write_bytes(data[1000:])
    assert {s.reason for s in read()} <= {"shard changed since it was indexed", "cut off in shard"}
    path.unlink()
    gone = read()
    assert [s.key for s in gone] == [s.key for s in whole]
    assert {s.reason for s in gone} == {"shard cannot be read"}


def test_reading_starts_in_the_middle_of_a_shard(tmp_path):
    (source,) = opened(write_shards(tmp_path, (5, 4)), tmp_path)
    samples = list(read_range(source.shards[:1], range(5), (IMAGE,)))
    assert [s.key for s in samples] == [f"s-000/p{n:04d}" for n in range(5)]
    assert list(read_samples(source.shards[0], np.arange(2, 4), (IMAGE,))) == samples[2:4]
    assert [s.key for s in read_range(source.shards, range(3, 7), (IMAGE,))] == [
        "s-000/p0003",
        "s-000/p0004",
        "s-001/p0000",
        "s-001/p0001",
    ]


def test_old_tars_without_a_magic(tmp_path):
    """Version 7 headers have no "ustar"; their checksum holds all the same."""
    path = Path(write_tar(tmp_path / "s.tar", MEMBERS, format=tarfile.USTAR_FORMAT))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for start in headers:
        data[start + 257 : start + 265] = bytes(8)
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    assert [sample.part("json") for sample in samples_of(path, tmp_path)] == [
        data for _, data in MEMBERS[1::2]
    ]


def test_sa1b_tars_as_they_are(tmp_path):
    real = Path(__file__).parents[2] / "shared/data/sa1b_layout/train/sa_000000.tar"
    if not real.exists():
        pytest.skip("the real tars (../shared/data/sa1b_layout) are not here")
    samples = samples_of(real, tmp_path)
    with tarfile.open(real) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")]
        for sample, name in zip(samples, names, strict=True):
            assert sample.key == f"sa_000000/{name.removesuffix('.jpg')}"
            assert sample.part(IMAGE) == tar.extractfile(name).read()
            assert sample.part("json") == tar.extractfile(name.replace(".jpg", ".json")).read()


def test_a_url_is_opened_by_webdataset(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    opened_urls = []
    real = wds.gopen

    def gopen(url):
        opened_urls.append(url)
        return real(path)

    monkeypatch.setattr(streams.wds, "gopen", gopen)
    samples = samples_of("s3x://bucket/s.tar?key=1", tmp_path)
    assert [sample.key for sample in samples] == [f"s/p{n}" for n in range(4)]
    assert opened_urls == ["s3x://bucket/s.tar?key=1"]  # once: then it lies in the cache
