"""Whatever stands in a shard loads right or counts as bad, by its reason, and nothing shifts."""

import io
import json
import re
import resource
import shutil
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.rle import decode_counts, parse_annotations
from sami.core.dataset import Training
from sami.core.errors import BadSample, UserError
from sami.core.index import index_beside, open_sources
from sami.core.order import Order
from sami.core.reading import RawSample, read_range
from sami.core.scanning import IMAGE
from sami.data import CropTransform, centre_square
from sami.masking import MaskConfig
from tests.runs import LIMIT, arguments, command, kill, run, start, summary, wait_for, write_shards

VIEWS = CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
RNG = np.random.default_rng(0)
COLOUR = Image.fromarray(RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((90, 75))
GREY16 = Image.fromarray(RNG.integers(0, 65536, (75, 90), dtype=np.uint16))
EIGHT_BIT = Image.fromarray((np.asarray(GREY16) / 257).round().astype(np.uint8))
# First row, first column, and the distances to the next ones, of the passes of a PNG.
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
ADAM7 += [(1, 0, 2, 1)]


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(width, height, rows=b"", interlaced=False):
    """A PNG of that size, of whatever rows, each behind its filter's byte."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    chunks = b""
    for kind, data in ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def interlaced_png(image):
    """What Pillow reads and cannot write; of [H, W, 3]."""
    rows = [row for y, x, down, across in ADAM7 for row in image[y::down, x::across]]
    height, width, _ = image.shape
    return png(width, height, b"".join(b"\0" + row.tobytes() for row in rows), True)


def huge_jpeg(side):
    """A JPEG that says it is larger than it is."""
    at = JPEG.index(b"\xff\xc0") + 5  # height and width in the start of frame
    return JPEG[:at] + struct.pack(">HH", side, side) + JPEG[at + 4 :]


JPEG = encode(COLOUR, "JPEG")
TURNED = encode(COLOUR, "JPEG", exif=turned(6))
UPRIGHT = COLOUR.transpose(Image.Transpose.ROTATE_270)
PALETTE = COLOUR.convert("P")
# Encoded, and the image that it is.
GOOD = {
    "baseline.jpg": (JPEG, COLOUR),
    "progressive.jpg": (encode(COLOUR, "JPEG", progressive=True), COLOUR),
    "cmyk.jpg": (encode(COLOUR.convert("CMYK"), "JPEG"), COLOUR),
    "grey.jpg": (encode(COLOUR.convert("L"), "JPEG"), COLOUR.convert("L")),
    "turned.jpg": (TURNED, UPRIGHT),
    "broken_exif.jpg": (TURNED.replace(b"Exif\0\0MM", b"Exif\0\0XX"), COLOUR),
    "turned_png.png": (encode(COLOUR, "PNG", exif=turned(6)), UPRIGHT),
    "sixteen_bit.png": (encode(GREY16, "PNG"), EIGHT_BIT),
    "palette.png": (encode(PALETTE, "PNG"), PALETTE),
    "palette_alpha.png": (encode(PALETTE, "PNG", transparency=0), PALETTE),
    "alpha.png": (encode(COLOUR.convert("RGBA"), "PNG"), COLOUR),
    "grey_alpha.png": (encode(COLOUR.convert("LA"), "PNG"), COLOUR.convert("L")),
    "one_bit.png": (encode(COLOUR.convert("1"), "PNG"), COLOUR.convert("1")),
    "interlaced.png": (interlaced_png(np.asarray(COLOUR)), COLOUR),
    "web.webp": (encode(COLOUR, "WEBP"), COLOUR),
    "really_a_png.jpg": (encode(COLOUR, "PNG"), COLOUR),
    "really_a_gif.jpg": (encode(COLOUR, "GIF"), COLOUR),
    "really_a_bmp.jpg": (encode(COLOUR, "BMP"), COLOUR),
    "really_a_tiff.jpg": (encode(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR),
    "turned_tiff.jpg": (encode(COLOUR, "TIFF", exif=turned(6)), UPRIGHT),
    "several_images.jpg": (encode(COLOUR, "MPO", save_all=True, append_images=[COLOUR]), COLOUR),
    "one_pixel.png": (encode(COLOUR.resize((1, 1)), "PNG"), COLOUR.resize((1, 1))),
}
BAD = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "damaged image"),
    "text.jpg": (b"this is no image", "not an image"),
    "text_again.png": (b"this is no image", "not an image"),
    "empty.jpg": (b"", "empty file"),
    "huge.png": (png(20_000, 20_000), "too many pixels"),
    "large.jpg": (huge_jpeg(10_001), "too many pixels"),
    "no_pixels.png": (png(50, 50), "damaged image"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}
REASONS = Counter(reason for _, reason in BAD.values())


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def samples_of(path, folder, say=lambda text: None):
    """All samples of a shard, indexed anew."""
    shutil.rmtree(folder, ignore_errors=True)
    (source,) = open_sources([([str(path)], None)], folder, say)
    return list(read_range(source.shards, range(source.count), (IMAGE, "json")))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A shard with one image of each kind, 30 in all."""
    members = {name: data for name, (data, _) in (GOOD | BAD).items()}
    return write_tar(tmp_path_factory.mktemp("zoo") / "zoo.tar", members)


def test_each_kind_loads_right_or_has_its_reason():
    """What is good shows the central square of the image it was made of."""
    for name, (data, image) in GOOD.items():
        key, *views, _, _ = VIEWS.decode_held_out(RawSample(name, {IMAGE: data}))
        assert key == name
        square = image.convert("RGB").crop(centre_square(*image.size))
        for view, side in zip(views, (32, 48), strict=True):
            assert view.shape == (side, side, 3) and view.dtype == np.uint8
            expected = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
            assert np.abs(view.astype(int) - expected).mean() < 6, name  # a GIF's palette costs 4
    for name, (data, reason) in BAD.items():
        with pytest.raises(BadSample, match=f"^{reason}$"):
            VIEWS.decode(RawSample(name, {IMAGE: data}), 0, False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counts_and_names_each_bad_sample(zoo, tmp_path, workers):
    options = {"train.batch_size": 15, "train.steps": 4, "data.workers": workers}
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
    options = {"train.batch_size": 15, "train.steps": 100, "run.save_every": 1, "run.keep": 9}
    done = run(command(arguments(tmp_path, zoo, **options)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert re.search(r"\d of (15|30) samples were bad", done.stderr)
    for words in ("'not an image': ", "data.max_bad_fraction 0.1", "step-"):
        assert words in done.stderr
    told = summary(tmp_path)
    assert told["status"] == "failed" and told["exit_code"] == 2
    assert told["bad_samples"].keys() == REASONS.keys()
    assert (tmp_path / "checkpoints" / "step-1").exists()
    assert run(command(arguments(tmp_path, zoo, **options))).returncode == 2  # again


def test_a_tar_that_is_cut_in_the_middle(tmp_path):
    members = {f"p{n:02d}.jpg": JPEG for n in range(20)}
    path = Path(write_tar(tmp_path / "s.tar", members))
    with tarfile.open(path) as tar:
        half = tar.getmember("p12.jpg").offset_data + len(JPEG) // 2
    path.write_bytes(path.read_bytes()[:half])
    options = {"train.steps": 2, "train.batch_size": 13, "data.max_bad_fraction": 1}
    done = run(command(arguments(tmp_path / "run", path, **options)))
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{path}: cut short (unexpected end of data), 13 samples stand in it" in log
    assert "bad sample s/p12: cut off in shard" in log
    assert summary(tmp_path / "run")["bad_samples"] == {"cut off in shard": 2}


def tar_header(block, **fields):
    """A header with other fields, and with a checksum that fits."""
    header = bytearray(block)
    for name, value in fields.items():
        start = {"size": 124, "type": 156}[name]
        header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


FOUR = {f"p{n}.{kind}": bytes([n + 65]) * 700 for n in range(4) for kind in ("jpg", "json")}
MEMBER = 512 + 1024  # bytes of each of these in a tar


@pytest.fixture
def four(tmp_path):
    """A shard of four samples, two members each."""
    return Path(write_tar(tmp_path / "a.tar", FOUR))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tar, at: tar[:at], r"cut short \(no end mark\), 2 samples"),
        (lambda tar, at: tar[: at + 100], r"cut short \(truncated header\), 2 samples"),
        (lambda tar, at: tar[:at] + b"x" + tar[at + 1 :], r"cut short \(bad checksum\), 2 samples"),
        (lambda tar, at: tar[:at] + bytes(512) + tar[at + 512 :], "goes on after the mark that"),
    ],
    ids=["cut between members", "cut in a header", "damaged header", "hole"],
)
def test_a_damaged_header_is_not_taken_for_the_end(four, tmp_path, spoil, words):
    """tarfile would stop there without a word, and half the shard would be missing silently."""
    four.write_bytes(spoil(four.read_bytes(), 4 * MEMBER))
    told = []
    assert [s.key for s in samples_of(four, tmp_path / "index", told.append)] == ["a/p0", "a/p1"]
    assert len(told) == 1 and re.search(words, told[0])


@pytest.mark.timeout(method="thread")  # its scan would be in a thread
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
@pytest.mark.parametrize("size", [-512, -4096, 1 << 62, 1 << 63, 1 << 80])
def test_sizes_that_no_member_can_have(four, tmp_path, kind, size):
    """tarfile would go round in circles for ever, or overflow."""
    told, tar = [], four.read_bytes()
    header = tar_header(tar[4 * MEMBER :][:512], size=size.to_bytes(12, "big", signed=True))
    if size > 0:
        header = tar_header(header, size=b"\x80" + size.to_bytes(11, "big"))
    header = tar_header(header, type=kind)
    four.write_bytes(tar[: 4 * MEMBER] + header + tar[4 * MEMBER + 512 :])
    assert [s.key for s in samples_of(four, tmp_path / "index", told.append)] == ["a/p0", "a/p1"]
    assert f"cut short (a size of {size} bytes), 2 samples" in told[0]


def test_a_half_member_is_bad_before_room_is_made_for_it(four, tmp_path):
    """Its header may promise 8 GB."""
    tar = four.read_bytes()
    header = tar_header(tar[4 * MEMBER :][:512], size=b"77777777777\0")
    four.write_bytes(tar[: 4 * MEMBER] + header + tar[4 * MEMBER + 512 :])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, limits[1]))
    try:
        samples = samples_of(four, tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert [sample.reason for sample in samples] == ["", "", "cut off in shard"]


def start_and_wait_for(words, file):
    """A run in its own process group, once it has written a file."""
    process = start(words)
    assert wait_for(file.exists, process, pause=0.001)
    return process


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes(tmp_path, workers):
    """During the run its samples count as bad; between kill and resume it is missed."""
    pattern = write_shards(tmp_path / "shards", (13, 9, 17))
    options = {"data.max_bad_fraction": 1, "train.steps": 50, "data.workers": workers}
    words = command(arguments(tmp_path / "run", pattern, **options))
    process = start_and_wait_for(words, tmp_path / "run" / "metrics.jsonl")
    try:
        (tmp_path / "shards" / "s-001.tar").unlink()
        assert process.wait(LIMIT) == 0
    finally:
        kill(process)
    told = summary(tmp_path / "run")
    assert told["bad_samples"]["shard cannot be read"] > 9
    assert any(k.startswith("s-001/p") for k in told["bad_sample_keys"]["shard cannot be read"])


def test_a_shard_that_vanishes_and_was_too_large_a_part(tmp_path):
    """17 of 39 samples are more than a tenth."""
    pattern = write_shards(tmp_path / "shards", (13, 9, 17))
    words = command(arguments(tmp_path / "run", pattern, **{"train.steps": 100_000}))
    process = start_and_wait_for(words, tmp_path / "run" / "checkpoints" / "step-4")
    try:
        (tmp_path / "shards" / "s-002.tar").unlink()
        assert process.wait(LIMIT) == 2
    finally:
        kill(process)
    told = summary(tmp_path / "run")
    assert told["status"] == "failed" and told["bad_samples"].keys() == {"shard cannot be read"}
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_shard_that_vanishes_between_kill_and_resume(tmp_path):
    pattern = write_shards(tmp_path / "shards", (13, 9, 17))
    words = command(arguments(tmp_path / "run", pattern, **{"train.steps": 100_000}))
    kill(start_and_wait_for(words, tmp_path / "run" / "checkpoints" / "step-4"))
    (tmp_path / "shards" / "s-001.tar").unlink()
    done = run(words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"the first is {tmp_path}/shards/s-001.tar" in done.stderr and "missing" in done.stderr


def test_a_shard_that_vanishes_with_its_index(four, tmp_path):
    """Without it the order of the samples is not known: a sentence, not a traceback."""
    (source,) = open_sources([([str(four)], None)], tmp_path / "index")
    beside = index_beside(str(four))
    source.shards[0].index.rename(beside)
    (source,) = open_sources([([str(four)], None)], tmp_path / "index")
    assert source.shards[0].index == beside
    beside.unlink()
    order = Order([source], batch_size=2, seed=0, window=1)
    for use in (
        lambda: Training(
            order, CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
        ).__getitems__(range(2)),
        lambda: list(read_range(source.shards, range(4), (IMAGE,))),
    ):
        with pytest.raises(UserError, match="a.tar.index.npz, the index of .*a.tar, is gone"):
            use()


def test_annotations_of_a_shard(tmp_path):
    """What stage 2 will ask of the samples: a reason for each, nothing but BadSample."""

    def told(size, counts):
        entry = {"segmentation": {"size": size, "counts": counts}}
        return json.dumps({"image": {"height": 3, "width": 2}, "annotations": [entry]}).encode()

    cases = {
        "good": (told([3, 2], [1, 5]), None),
        "misfit": (told([3, 2], [1, 4]), "run lengths do not fit their size"),
        "size": (told([2, 3], [1, 5]), "mask size differs from the image's"),
        "text": (b"{", "annotation is not JSON"),
        "missing": (None, "no json member"),
    }
    members = {f"{name}.jpg": JPEG for name in cases}
    members |= {f"{name}.json": data for name, (data, _) in cases.items() if data}
    path = write_tar(tmp_path / "a.tar", members)
    for sample in samples_of(path, tmp_path / "index"):
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


SEEDS = [data for data, _ in (GOOD | BAD).values() if data]


@st.composite
def mutated(draw, originals=tuple(SEEDS)):
    """An encoding with some of its bytes changed, cut, doubled or exchanged for another's."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        place = draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([40, 400, 10**6])))))
        kind = draw(st.sampled_from(["byte", "cut", "double", "splice", "noise", "drop", "tail"]))
        length = draw(st.integers(1, 64) | st.just(600))
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
            data[place : place + length] = draw(st.randoms()).randbytes(length)
        elif kind == "drop":
            del data[place : place + length]
        else:
            data += draw(st.randoms()).randbytes(length)
    return bytes(data)


FUZZ = settings(
    derandomize=True,
    max_examples=500,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def use(sample):
    """Both views of a sample, or the reason why it is bad."""
    try:
        key, student, teacher, *_ = VIEWS.decode(sample, 0, False)
    except BadSample as error:
        return str(error)
    assert student.shape == (32, 32, 3) and teacher.shape == (48, 48, 3) and key == sample.key
    assert student.dtype == teacher.dtype == np.uint8
    return student.tobytes(), teacher.tobytes()


@pytest.mark.slow
@FUZZ
@given(data=mutated(), neighbour=st.sampled_from(list(GOOD)))
def test_mutated_images(data, neighbour, tmp_path_factory):
    """No error but BadSample, no warning, no hang; the good one that follows it is the same."""
    folder, good = tmp_path_factory.getbasetemp() / "images", GOOD[neighbour][0]
    path = write_tar(folder / "a.tar", {"p0.jpg": data, "p1.jpg": good})
    expected = use(RawSample("a/p1", {IMAGE: good}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = samples_of(path, folder / "index")
        found = use(first)
        assert use(second) == expected
    assert isinstance(found, tuple) or found in REASONS


def samples_or_refusal(path):
    """By key what can be read of a tar; None if it is refused."""
    try:
        samples = samples_of(path, path.parent / "index")
    except UserError as error:
        assert str(path) in str(error)
        return None
    found = {sample.key: sample.parts for sample in samples}
    assert len(found) == len(samples)
    return found


def whole_samples(numbers):
    """What some of the four samples are when they are whole."""
    return {f"a/p{n}": {IMAGE: FOUR[f"p{n}.jpg"], "json": FOUR[f"p{n}.json"]} for n in numbers}


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_mutated_shards(data, tmp_path_factory):
    """A damaged tar is refused, or gives samples; those before the damage are as they were."""
    path = Path(write_tar(tmp_path_factory.getbasetemp() / "shards" / "a.tar", FOUR))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:place] + data.draw(mutated((whole[place:],))))
    found = samples_or_refusal(path)
    before = [n for n in range(4) if (2 * n + 2) * MEMBER + 512 <= place]  # the next header too
    assert found is not None or not before
    assert whole_samples(before).items() <= (found or {}).items()


@pytest.mark.slow
@FUZZ
@given(
    number=st.integers(0, 7),
    size=st.binary(min_size=12, max_size=12)
    | st.integers(-(8**8), 8**12).map(lambda n: n.to_bytes(12, "big", signed=True))
    | st.integers(0, 8**11 - 1).map(lambda n: b"%011o\0" % n),
    kind=st.sampled_from([bytes([n]) for n in b"\x000123456789ADKLMNSVXgx"]),
)
def test_mutated_headers(number, size, kind, tmp_path_factory):
    """Sizes and types that are wrong behind a checksum that is right."""
    path = Path(write_tar(tmp_path_factory.getbasetemp() / "headers" / "a.tar", FOUR))
    whole, start = path.read_bytes(), number * MEMBER
    header = tar_header(whole[start : start + 512], size=size, type=kind)
    path.write_bytes(whole[:start] + header + whole[start + 512 :])
    found = samples_or_refusal(path)
    before = range(number // 2)
    assert found is not None or not before
    assert whole_samples(before).items() <= (found or {}).items()


@pytest.mark.slow
@FUZZ
@given(number=st.integers(0, 7), place=st.integers(0, 699), noise=st.binary(min_size=1))
def test_damage_within_a_member_stays_there(number, place, noise, tmp_path_factory):
    path = Path(write_tar(tmp_path_factory.getbasetemp() / "members" / "a.tar", FOUR))
    whole, start = path.read_bytes(), number * MEMBER + 512 + place
    noise = noise[: 700 - place]
    path.write_bytes(whole[:start] + noise + whole[start + len(noise) :])
    found = samples_or_refusal(path)
    others = [n for n in range(4) if n != number // 2]
    assert len(found) == 4 and whole_samples(others).items() <= found.items()
