"""Run lengths against pycocotools, and the strict reading of SA-1B's JSON against anything."""

import json
import tarfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from finetune.data import loss_pixels
from finetune.rle import (
    FOREIGN,
    MISFIT,
    Annotations,
    area,
    box,
    decode_counts,
    parse_annotations,
    random_points,
    sample,
)
from sami.core.errors import BadSample
from tests.runs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
moderate = settings(max_examples=150, derandomize=True)
NOT_JSON = "annotation is not JSON"
OTHER_SIZE = "mask size differs from the image's"


def encode(mask):
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def whole(ends, height, width):
    return sample(ends, height, width, np.arange(height), np.arange(width))


@st.composite
def masks(draw):
    """bool [H, W] of every kind of outline, also one pixel high or wide."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rows, columns = np.mgrid[:height, :width]
    kind = draw(st.sampled_from(["noise", "blobs", "checks", "pixel", "full", "empty", "any"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "noise":
        return rng.random((height, width)) < rng.random()
    if kind == "blobs":
        centres = rng.uniform(0, (height, width), (3, 2))
        radii = rng.uniform(1, 15, 3)
        return np.any(
            [np.hypot(rows - y, columns - x) < r for (y, x), r in zip(centres, radii, strict=True)],
            axis=0,
        )
    if kind == "checks":
        side = draw(st.integers(1, 4))
        return (rows // side + columns // side) % 2 == draw(st.integers(0, 1))
    if kind == "pixel":
        return (rows == rng.integers(height)) & (columns == rng.integers(width))
    if kind == "any":
        return draw(arrays.arrays(bool, (min(height, 6), min(width, 6))))
    return np.full((height, width), kind == "full")


def slow_runs(text):
    """COCO's string, number by number, in Python's unbounded integers; None if it is not one."""
    runs, value, place = [], 0, 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit <= 63 or place == 12:
            return None
        value += (digit & 31) << (5 * place)
        place += 1
        if not digit & 32:
            if digit & 16:
                value -= 1 << (5 * place)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, place = 0, 0
    return None if place else runs


def digits(number):
    """COCO's string of a number that is not negative."""
    codes = []
    while number > 15:
        number, low = divmod(number, 32)
        codes.append(low | 32)
    return "".join(chr(code + 48) for code in (*codes, number))


def slow_mask(runs, height, width):
    """bool [H, W], or None where the runs do not fit."""
    if not runs or min(runs) < 0 or sum(runs) != height * width:
        return None
    pixels = [run % 2 == 1 for run, length in enumerate(runs) for _ in range(length)]
    return np.array(pixels).reshape(width, height).T


def check(counts, runs, height, width):
    """decode_counts accepts what the slow decoder accepts, with the same pixels."""
    expected = None if runs is None else slow_mask(runs, height, width)
    if expected is None:
        with pytest.raises(BadSample, match=MISFIT):
            decode_counts(counts, height, width)
        return
    ends = decode_counts(counts, height, width)
    assert ends.dtype == np.int64 and np.array_equal(ends, np.cumsum(runs))
    assert np.array_equal(whole(ends, height, width), expected)
    assert area(ends) == expected.sum()
    assert box(ends, height) == slow_box(expected)


def slow_box(mask):
    if not mask.any():
        return (0, 0, 0, 0)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


# Run lengths


@moderate
@given(masks(), st.data())
def test_as_pycocotools(mask, data):
    height, width = mask.shape
    coded = encode(mask)
    text = coded["counts"].decode()
    ends = decode_counts(text, height, width)
    assert ends[-1] == height * width
    assert np.array_equal(decode_counts(coded["counts"], height, width), ends)
    assert np.array_equal(decode_counts(np.diff(ends, prepend=0).tolist(), height, width), ends)

    decoded = coco_mask.decode(coded).astype(bool)
    assert np.array_equal(decoded, mask)
    seen = whole(ends, height, width)
    assert seen.dtype == bool and np.array_equal(seen, decoded)
    rows = np.array(data.draw(st.lists(st.integers(0, height - 1), min_size=1, max_size=20)))
    columns = np.array(data.draw(st.lists(st.integers(0, width - 1), min_size=1, max_size=20)))
    picked = decoded[np.ix_(rows, columns)]
    assert np.array_equal(sample(ends, height, width, rows, columns), picked)

    assert area(ends) == coco_mask.area(coded)
    x, y, w, h = coco_mask.toBbox(coded)
    assert box(ends, height) == (x, y, x + w, y + h)


@moderate
@given(masks(), st.integers(1, 50))
def test_the_loss_looks_at_the_pixel_under_each_centre(mask, side):
    height, width = mask.shape
    ends = decode_counts(encode(mask)["counts"], height, width)
    rows = [(2 * i + 1) * height // (2 * side) for i in range(side)]
    columns = [(2 * j + 1) * width // (2 * side) for j in range(side)]
    lines = loss_pixels(side, side, (side, side), mask.shape)[:2]
    assert [line.tolist() for line in lines] == [rows, columns]
    assert np.array_equal(sample(ends, height, width, *lines), mask[np.ix_(rows, columns)])


@moderate
@given(masks())
def test_mirrored_columns_points_and_boxes_are_those_of_the_mirrored_mask(mask):
    height, width = mask.shape
    ends = decode_counts(encode(mask)["counts"], height, width)
    turned = decode_counts(encode(mask[:, ::-1])["counts"], height, width)
    columns = width - 1 - np.arange(width)
    assert np.array_equal(sample(ends, height, width, np.arange(height), columns), mask[:, ::-1])
    if mask.any():
        x0, y0, x1, y1 = box(ends, height)
        assert box(turned, height) == (width - x1, y0, width - x0, y1)
        x, y = random_points(ends, height, 20, np.random.default_rng(0)).T
        assert whole(turned, height, width)[y, width - 1 - x].all()


def test_large_mask_has_numbers_of_many_digits():
    mask = np.zeros((1500, 2250), dtype=bool)
    mask[700, 1100] = mask[3:9, 2100:] = True
    ends = decode_counts(encode(mask)["counts"].decode(), 1500, 2250)
    assert np.array_equal(whole(ends, 1500, 2250), mask)


@pytest.mark.parametrize("rows, columns", [([-1], [0]), ([0], [-1]), ([3], [0]), ([0], [4])])
def test_pixels_outside_are_refused(rows, columns):
    with pytest.raises(IndexError, match="outside of a mask of 3 x 4"):
        sample(np.array([12]), 3, 4, np.array(rows), np.array(columns))


ALPHABET = [chr(code) for code in range(48, 112)]


@settings(moderate, max_examples=400)
@given(
    st.one_of(
        st.text(st.sampled_from(ALPHABET), max_size=30),
        st.text(st.sampled_from("0123PQo`_O"), max_size=14),
        st.text(max_size=10),
    ),
    st.integers(1, 6),
    st.integers(1, 6),
)
@example("", 1, 1)
@example("1", 1, 1)
@example("01", 1, 1)
@example("0011", 1, 2)  # an empty run of the object
@example("QP0", 1, 1)  # leading zeros
@example("Q" + "P" * 10 + "0", 1, 1)  # twelve digits
@example("Q" + "P" * 11 + "0", 1, 1)  # thirteen
@example("o" * 11 + "?", 1, 1)  # the largest number
@example("P" * 11 + "@", 1, 1)  # the smallest number
@example("1Q", 1, 1)  # cut in a number
@example("2O", 1, 1)  # 2 - 1
@example("2O1", 1, 2)  # 2 - 1 + 1
@example("p1", 4, 8)  # 32, if 112 were a digit
@example("\ud800", 1, 1)
@example("1\0", 1, 1)
@example("١", 1, 1)
def test_any_string_is_decoded_or_refused(text, height, width):
    check(text, slow_runs(text), height, width)
    if text.isascii():
        check(text.encode(), slow_runs(text), height, width)


@moderate
@given(masks(), st.data())
def test_changed_strings_are_decoded_or_refused(mask, data):
    text = list(encode(mask)["counts"].decode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 2))
        text[start:stop] = data.draw(st.lists(st.sampled_from(ALPHABET), max_size=2))
    text = "".join(text)
    check(text, slow_runs(text), *mask.shape)


@pytest.mark.parametrize("digit", ["1", "O", "?", "@", "oooooo?", "ooooooooooo?", "PPPPPPPPPPP@"])
def test_sums_do_not_wrap_around(digit):
    """Differences of one sign pile up to far more than an int64 if nothing bounds them."""
    for count in (3, 64, 100_000):
        with pytest.raises(BadSample, match=MISFIT):
            decode_counts(digit * count, 10, 7)


def test_totals_do_not_wrap_around():
    """Growing runs, each far below 2^63, whose last end is 2^64 + total."""
    total, goal = 10**8, 2**64 + 10**8
    count = int((2 * goal / total) ** 0.5) - 2
    while total * (count + 1) * (count + 2) // 2 <= goal:
        count += 1
    rest = goal - total * count * (count + 1) // 2
    first, last = divmod(rest, count)
    middle = (digits(0) + digits(total)) * (count - 2)
    text = digits(0) + digits(total) + digits(first) + digits(total) + middle + digits(last)
    assert sum(slow_runs(text)) == goal
    with pytest.raises(BadSample, match=MISFIT):
        decode_counts(text, 10_000, 10_000)
    most = 2**63 - 1
    with pytest.raises(BadSample, match=MISFIT):
        decode_counts([most, most, 2 + 70], 10, 7)  # 70 modulo 2^64


@pytest.mark.parametrize(
    "counts",
    [
        [],
        [12.0],
        [True] * 12,
        ["12"],
        [[12]],
        [None, 12],
        [13, -1],
        [10**400],
        [float("nan")],
        [11],
    ],
)
def test_lists_that_are_no_run_lengths(counts):
    with pytest.raises(BadSample, match=MISFIT):
        decode_counts(counts, 3, 4)


# Points


@moderate
@given(masks(), st.integers(0, 2**32 - 1))
def test_points_are_inside(mask, seed):
    height, width = mask.shape
    ends = decode_counts(encode(mask)["counts"], height, width)
    if not mask.any():
        with pytest.raises(BadSample, match="mask is empty"):
            random_points(ends, height, 1, np.random.default_rng(seed))
        return
    points = random_points(ends, height, 30, np.random.default_rng(seed))
    assert points.shape == (30, 2) and points.dtype == np.int64
    assert mask[points[:, 1], points[:, 0]].all()
    assert np.array_equal(points, random_points(ends, height, 30, np.random.default_rng(seed)))
    assert random_points(ends, height, 0, np.random.default_rng(seed)).shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_points_are_uniform(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((13, 17)) < 0.6
    mask[:, 4:6] = True  # a run over several columns
    ends = decode_counts(encode(mask)["counts"], 13, 17)
    points = random_points(ends, 13, 200_000, rng)
    hits = np.zeros(mask.shape)
    np.add.at(hits, (points[:, 1], points[:, 0]), 1)
    expected = 200_000 / mask.sum()
    chi_square = ((hits[mask] - expected) ** 2 / expected).sum()
    freedom = mask.sum() - 1  # chi-square has this mean and twice this variance
    assert hits[mask].min() > 0
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


# SA-1B's JSON


def image(**changes):
    annotation = {
        "segmentation": {"size": [3, 4], "counts": "<"},
        "bbox": [0, 0, 0, 0],
        "area": 0,
        "predicted_iou": 0.9,
        "stability_score": 0.95,
    } | changes
    return {"image": {"height": 3, "width": 4}, "annotations": [annotation]}


def test_what_is_read():
    told = parse_annotations(json.dumps(image(area=1.5, id=7)).encode())
    assert (told.height, told.width) == (3, 4)
    (mask,) = told.masks
    assert (mask.counts, mask.area, mask.bbox) == ("<", 1.5, [0, 0, 0, 0])
    assert (mask.predicted_iou, mask.stability_score) == (0.9, 0.95)


def test_what_may_be_missing():
    bare = {"segmentation": {"size": [3, 4], "counts": [12]}}
    told = parse_annotations(
        json.dumps({"image": {"height": 3, "width": 4}, "annotations": [bare]}).encode()
    )
    (mask,) = told.masks
    assert (mask.counts, mask.area, mask.bbox) == ([12], None, None)
    assert (mask.predicted_iou, mask.stability_score) == (1.0, 1.0)
    none = {"image": {"height": 3, "width": 4}, "annotations": []}
    assert parse_annotations(json.dumps(none).encode()).masks == []


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", NOT_JSON),
        (b"{", NOT_JSON),
        (b"\xff\xfe\xfa", NOT_JSON),
        (b'{"image": "\xff"}', NOT_JSON),
        (b"[" * 1_000_000, NOT_JSON),
        (b'{"a":' * 1_000_000, NOT_JSON),
        (b"9" * 5000, FOREIGN),
        (b"NaN", FOREIGN),
        (b"[]", FOREIGN),
        (b"null", FOREIGN),
        (b"{}", FOREIGN),
        ({"image": []}, FOREIGN),
        ({"image": {"height": 3, "width": 4}}, FOREIGN),
        ({"image": {"height": 3, "width": 4}, "annotations": {}}, FOREIGN),
        ({"image": {"height": 3, "width": 4}, "annotations": [[]]}, FOREIGN),
        ({"image": {"height": 3.0, "width": 4}, "annotations": []}, FOREIGN),
        ({"image": {"height": True, "width": 4}, "annotations": []}, FOREIGN),
        ({"image": {"height": 0, "width": 4}, "annotations": []}, FOREIGN),
        ({"image": {"height": -3, "width": -4}, "annotations": []}, FOREIGN),
        ({"image": {"height": 10**40, "width": 4}, "annotations": []}, FOREIGN),
        ({"image": {"height": 10_001, "width": 10_000}, "annotations": []}, FOREIGN),
        (image(segmentation=[[0, 0, 1, 1]]), FOREIGN),  # COCO's polygons
        (image(segmentation={"size": [3, 4]}), FOREIGN),
        (image(segmentation={"size": [3, 4], "counts": 12}), FOREIGN),
        (image(segmentation={"size": [3.0, 4], "counts": ""}), FOREIGN),
        (image(segmentation={"size": [3, 4, 1], "counts": ""}), FOREIGN),
        (image(segmentation={"size": [4, 3], "counts": "<"}), OTHER_SIZE),
        (image(segmentation={"size": [-3, 10**40], "counts": "<"}), OTHER_SIZE),
        (image(area="5"), FOREIGN),
        (image(area=True), FOREIGN),
        (image(area=10**400), FOREIGN),
        (image(area=float("nan")), FOREIGN),
        (image(bbox=[0, 0, 1]), FOREIGN),
        (image(bbox=[0, 0, 1, None]), FOREIGN),
        (image(bbox=[-(10**400), 0, 1, 1]), FOREIGN),
        (image(bbox={}), FOREIGN),
        (image(predicted_iou=float("inf")), FOREIGN),
        (image(stability_score=[1]), FOREIGN),
    ],
)
def test_what_is_refused(data, reason):
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    with pytest.raises(BadSample) as caught:
        parse_annotations(data)
    assert str(caught.value) == reason


def accept_or_refuse(data):
    """Everything but BadSample fails the test."""
    try:
        told = parse_annotations(data)
    except BadSample as error:
        assert str(error) in (NOT_JSON, FOREIGN, OTHER_SIZE)
        return
    assert isinstance(told, Annotations)
    for mask in told.masks:
        if isinstance(mask.counts, str) and told.height * told.width < 2000:
            check(mask.counts, slow_runs(mask.counts), told.height, told.width)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, 1, 3, 4, 12, -1, 10**30, 10**400, 1e308, 0.5]),
        st.floats(),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["size", "counts", "height", "width"]), inner, max_size=4),
    ),
    max_leaves=6,
)


@settings(moderate, max_examples=300)
@given(st.data())
def test_any_value_anywhere(data):
    told = image()
    at, path = told, []
    while isinstance(at, dict | list) and len(at) and (not path or data.draw(st.booleans())):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        path.append((at, data.draw(st.sampled_from(keys))))
        at = path[-1][0][path[-1][1]]
    holder, key = path[-1]
    if data.draw(st.booleans()):
        holder[key] = data.draw(JSON)
    else:
        del holder[key]
    accept_or_refuse(json.dumps(told).encode())


@settings(moderate, max_examples=300)
@given(st.data())
def test_any_bytes(data):
    content = bytearray(json.dumps(image()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = start + data.draw(st.integers(0, 4))
        content[start:stop] = data.draw(st.binary(max_size=3))
    accept_or_refuse(bytes(content))
    accept_or_refuse(data.draw(st.binary(max_size=50)))


def test_real_annotations():
    path = ROOT.parent / "shared" / "data" / "sa1b_layout" / "train" / "sa_000000.tar"
    if not path.exists():
        pytest.skip("the images in SA-1B's layout (../shared/data/sa1b_layout) are not here")
    seen = 0
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                continue
            told = parse_annotations(tar.extractfile(member).read())
            height, width = told.height, told.width
            rows, columns = np.arange(0, height, 7), np.arange(0, width, 5)[::-1]
            for mask in told.masks:
                ends = decode_counts(mask.counts, height, width)
                decoded = coco_mask.decode({"size": [height, width], "counts": mask.counts})
                assert area(ends) == mask.area == decoded.sum()
                x, y, w, h = mask.bbox
                assert box(ends, height) == (x, y, x + w, y + h)
                picked = decoded[np.ix_(rows, columns)]
                assert np.array_equal(sample(ends, height, width, rows, columns), picked)
                seen += 1
    assert seen > 500
