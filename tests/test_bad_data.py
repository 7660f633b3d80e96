"""Whatever stands in a shard loads right or counts as bad, by its reason, and nothing shifts."""

import io
import json
import struct
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.rle import decode_counts, parse_annotations
from sami.core.errors import BadSample, UserError
from sami.core.shards import PICTURE, RawSample, open_sources, read_range, scan
from sami.data import Views
from tests.runs import arguments, command, kill, run, start, summary, write_shards

VIEWS = Views(0, 32, 48, 4, 0.75, (0.2, 1.0), True)
RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((90, 75))
GREY16 = Image.fromarray(RNG.integers(0, 65536, (75, 90), dtype=np.uint16))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def empty_png(width, height):
    """A PNG of that size which holds no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


JPEG = encode(COLOUR, "JPEG")
GOOD = {
    "baseline.jpg": JPEG,
    "progressive.jpg": encode(COLOUR, "JPEG", progressive=True),
    "cmyk.jpg": encode(COLOUR.convert("CMYK"), "JPEG"),
    "grey.jpg": encode(COLOUR.convert("L"), "JPEG"),
    "turned.jpg": encode(COLOUR, "JPEG", exif=turned(6)),
    "sixteen_bit.png": encode(GREY16, "PNG"),
    "palette.png": encode(COLOUR.convert("P"), "PNG", transparency=0),
    "alpha.png": encode(COLOUR.convert("RGBA"), "PNG"),
    "one_bit.png": encode(COLOUR.convert("1"), "PNG"),
    "web.webp": encode(COLOUR, "WEBP"),
    "really_a_png.jpg": encode(COLOUR, "PNG"),
    "really_a_gif.jpg": encode(COLOUR, "GIF"),
    "really_a_tiff.jpg": encode(COLOUR, "TIFF"),
    "several_pictures.jpg": encode(COLOUR, "MPO", save_all=True, append_images=[COLOUR]),
    "one_pixel.png": encode(COLOUR.resize((1, 1)), "PNG"),
}
BAD = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "damaged picture"),
    "text.jpg": (b"this is no picture", "not a picture"),
    "text_again.png": (b"this is no picture", "not a picture"),
    "empty.jpg": (b"", "empty file"),
    "huge.png": (empty_png(20_000, 20_000), "too many pixels"),
    "no_pixels.png": (empty_png(50, 50), "damaged picture"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}
REASONS = {"damaged picture": 2, "not a picture": 3, "empty file": 1, "too many pixels": 1}


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A shard with one picture of each kind, 22 in all."""
    bad = {name: data for name, (data, _) in BAD.items()}
    return write_tar(tmp_path_factory.mktemp("zoo") / "zoo.tar", GOOD | bad)


def test_each_kind_loads_right_or_has_its_reason():
    for name, data in GOOD.items():
        key, student, teacher, _ = VIEWS.decode(RawSample(name, {PICTURE: data}), 0, False)
        assert key == name and student.shape == (32, 32, 3) and teacher.shape == (48, 48, 3)
    for name, (data, reason) in BAD.items():
        with pytest.raises(BadSample, match=f"^{reason}$"):
            VIEWS.decode(RawSample(name, {PICTURE: data}), 0, False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counts_and_names_each_bad_sample(zoo, tmp_path, workers):
    options = {"train.batch_size": 11, "train.steps": 4, "data.workers": workers}
    words = arguments(tmp_path, zoo, **options, **{"data.max_bad_fraction": 1})
    done = run(command(words))
    assert done.returncode == 0, done.stderr
    told, log = summary(tmp_path), (tmp_path / "log.txt").read_text()
    assert told["bad_samples"] == {reason: 2 * count for reason, count in REASONS.items()}
    for name, (_, reason) in BAD.items():
        key = f"zoo/{name.rpartition('.')[0]}"
        assert key in told["bad_sample_keys"][reason]
        assert f"bad sample {key}: {reason}" in log
    assert not any(f"zoo/{name.rpartition('.')[0]}:" in log for name in GOOD)


def test_too_many_bad_samples_end_the_run(zoo, tmp_path):
    options = {"train.batch_size": 11, "train.steps": 100, "run.save_every": 1, "run.keep": 9}
    done = run(command(arguments(tmp_path, zoo, **options)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    for words in ("samples were bad", "'not a picture': ", "data.max_bad_fraction 0.1", "step-"):
        assert words in done.stderr
    told = summary(tmp_path)
    assert told["status"] == "failed" and told["exit_code"] == 2
    assert told["bad_samples"].keys() == REASONS.keys()
    assert (tmp_path / "checkpoints" / "step-1").exists()
    assert run(command(arguments(tmp_path, zoo, **options))).returncode == 2  # again


def test_a_tar_that_is_cut_in_the_middle(tmp_path):
    pattern = write_shards(tmp_path / "shards", (20,))
    path = Path(pattern.replace("{000..000}", "000"))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    options = {"train.steps": 4, "train.batch_size": 4, "data.max_bad_fraction": 1}
    done = run(command(arguments(tmp_path / "run", pattern, **options)))
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{path}: cut short (unexpected end of data)" in log
    assert set(summary(tmp_path / "run")["bad_samples"]) <= {"cut off in shard"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes(tmp_path, workers):
    """During the run its samples count as bad; between two starts it is missed."""
    pattern = write_shards(tmp_path / "shards", (13, 9, 17))
    options = {"data.max_bad_fraction": 1, "train.steps": 80, "data.workers": workers}
    words = command(arguments(tmp_path / "run", pattern, **options, **{"run.save_every": 1000}))
    process = start(words)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
        (tmp_path / "shards" / "s-001.tar").unlink()
        assert process.wait(120) == 0
    finally:
        kill(process)
    told = summary(tmp_path / "run")
    assert told["bad_samples"]["shard cannot be read"] > 9
    assert any(k.startswith("s-001/p") for k in told["bad_sample_keys"]["shard cannot be read"])
    done = run(words)
    assert done.returncode == 2 and "s-001.tar" in done.stderr and "missing" in done.stderr


def test_annotations_of_a_shard(tmp_path):
    """What stage 2 will ask of the samples: a reason for each, nothing but BadSample."""

    def told(size, counts):
        entry = {"segmentation": {"size": size, "counts": counts}}
        return json.dumps({"image": {"height": 3, "width": 2}, "annotations": [entry]}).encode()

    cases = {
        "good": (told([3, 2], [1, 5]), None),
        "misfit": (told([3, 2], [1, 4]), "run lengths do not fit their size"),
        "size": (told([2, 3], [1, 5]), "mask size differs from the picture's"),
        "text": (b"{", "annotation is not JSON"),
        "missing": (None, "no json member"),
    }
    members = {f"{name}.jpg": JPEG for name in cases}
    members |= {f"{name}.json": data for name, (data, _) in cases.items() if data}
    path = write_tar(tmp_path / "a.tar", members)
    (source,) = open_sources([([path], None)], tmp_path / "index")
    for sample in read_range(source.shards, range(source.count), (PICTURE, "json")):
        reason = cases[sample.key.removeprefix("a/")][1]

        def use(sample=sample):
            annotations = parse_annotations(sample.part("json"))
            mask = annotations.masks[0]
            return decode_counts(mask.counts, annotations.height, annotations.width)

        if reason is None:
            assert use().tolist() == [1, 6]
        else:
            with pytest.raises(BadSample, match=f"^{reason}$"):
                use()


SEEDS = [*GOOD.values(), *(data for data, _ in BAD.values() if data)]


@st.composite
def mutated(draw, originals=tuple(SEEDS)):
    """An encoding with some of its bytes changed, cut, doubled or exchanged for another's."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        place = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([40, 400, 10**6])))))
        kind = draw(st.sampled_from(["byte", "cut", "double", "splice", "noise", "drop"]))
        length = draw(st.integers(1, 64))
        if kind == "byte":
            data[place] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])) ^ draw(st.integers(0, 3))
        elif kind == "cut":
            del data[place:]
        elif kind == "double":
            data[place:place] = data[place : place + length]
        elif kind == "splice":
            other = draw(st.sampled_from(originals))
            data[place:] = other[min(place, len(other)) :]
        elif kind == "noise":
            data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
        else:
            del data[place : place + length]
    return bytes(data)


FUZZ = settings(
    deadline=None,
    derandomize=True,
    max_examples=1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=mutated())
def test_mutated_pictures(data):
    """No error but BadSample, no warning, no hang; a good one decoded between them is the same."""
    good = RawSample("good", {PICTURE: JPEG})
    before = VIEWS.decode(good, 0, False)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            _, student, teacher, _ = VIEWS.decode(RawSample("key", {PICTURE: data}), 0, False)
        except BadSample as error:
            assert str(error) in REASONS
        else:
            assert student.shape == (32, 32, 3) and student.dtype == np.uint8
            assert teacher.shape == (48, 48, 3)
    assert time.monotonic() - started < 20
    after = VIEWS.decode(good, 0, False)
    assert all(np.array_equal(a, b) for a, b in zip(before[1:3], after[1:3], strict=True))


@FUZZ
@given(data=st.data())
def test_mutated_shards(data, tmp_path_factory):
    """A damaged tar is refused, or gives samples; those before the damage are as they were."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    members = {f"p{n}.{kind}": bytes([n]) * 700 for n in range(4) for kind in ("jpg", "json")}
    path = Path(write_tar(folder / "a.tar", members))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(mutated((whole[place:],)))
    path.write_bytes(whole[:place] + changed)
    try:
        found = scan(str(path))
        found.save(folder / "a.npz")
        (source,) = open_sources([([str(path)], None)], folder / "index")
        samples = list(read_range(source.shards, range(source.count), (PICTURE, "json")))
    except UserError as error:
        assert str(path) in str(error)
        return
    by_key = {sample.key: sample for sample in samples}
    assert len(by_key) == len(samples)
    for number in range(4):
        end = (number * 2 + 2) * (512 + 1024)
        if end + 512 <= place:  # the next member's header is whole too
            assert by_key[f"a/p{number}"].parts == {
                PICTURE: members[f"p{number}.jpg"],
                "json": members[f"p{number}.json"],
            }
