"""Every kind of pixel comes out at its value, or has a reason; in classification too."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from finetune.classification import AugmentConfig, LabelDataConfig, LabelTransform
from sami.core.errors import BadSample
from sami.core.images import MEAN, STD, UNKNOWN_RANGE, cut, open_image, to_8_bits
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE
from tests.test_images import encode

HEIGHT, WIDTH = 48, 64
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
GREY8, RGB8 = (RAMP * 255).round().astype(np.uint8), (COLOURS * 255).round().astype(np.uint8)
COLOUR = Image.fromarray(RGB8)
BITS = (8, 10, 12, 14, 16)


def deep_png(values):
    """16 bits a sample, of [H, W, C]: grey, grey and alpha, RGB, RGBA; Pillow writes only grey."""
    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = b""
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff(values, kind="u2", *, order="<", photometric=2, planar=False, packed=False):
    """A TIFF of one strip, or one a plane, of [H, W, C]; ``kind`` as numpy has it."""
    height, width, channels = values.shape
    dtype = np.dtype(order + kind)
    parts = np.moveaxis(values, 2, 0) if planar else values[None]
    strips = [part.astype(dtype).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    tags = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [8 * dtype.itemsize] * channels),
        (259, "H", [8 if packed else 1]),
        (262, "H", [photometric]),
        (273, "I", [0] * len(strips)),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planar else 1]),
        (339, "H", [{"u": 1, "i": 2, "f": 3}[dtype.kind]] * channels),
    ]
    long = [len(v) * struct.calcsize(t) for _, t, v in tags if len(v) * struct.calcsize(t) > 4]
    behind = 8 + 2 + 12 * len(tags) + 4
    at = behind + sum(long)
    starts = [at + sum(map(len, strips[:number])) for number in range(len(strips))]
    entries, values_behind = b"", b""
    for tag, letter, numbers in tags:
        numbers = starts if tag == 273 else numbers
        data = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        head = struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[letter], len(numbers))
        if len(data) > 4:
            entries += head + struct.pack(f"{order}I", behind + len(values_behind))
            values_behind += data
        else:
            entries += head + data.ljust(4, b"\0")
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    count = struct.pack(f"{order}H", len(tags))
    return magic + count + entries + bytes(4) + values_behind + b"".join(strips)


def without_marker(data):
    """A JPEG without Adobe's marker."""
    at = data.index(b"Adobe") - 4
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]


def ycck(data):
    """A CMYK JPEG of Adobe's whose first three channels are said to be YCC."""
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(alpha)
    return image


def full(value, like=RAMP):
    return np.full((*like.shape[:2], 1), value, like.dtype)


FLOAT = np.float32
INK = Image.merge("CMYK", [*COLOUR.split(), Image.new("L", COLOUR.size, 40)])
INKED = (255.0 - RGB8) * (255 - 40) / 255
YCC = [*(ImageChops.invert(band) for band in COLOUR.convert("YCbCr").split()), INK.split()[3]]
PALETTE = COLOUR.quantize(64)
PAINTED = np.asarray(PALETTE.convert("RGB"))
ALPHA = Image.fromarray((np.indices((HEIGHT, WIDTH)).sum(0) * 2 % 256).astype(np.uint8))
LUMA = np.asarray(COLOUR.convert("L"))
BLACK_AND_WHITE = np.where(RAMP > 0.5, 255, 0)
LAB_OF_RED = (round(54.29 * 2.55), round(80.82) + 128, round(69.9) + 128)  # of sRGB, under D50

GOOD = {
    "grey.png": (encode(GREY8), GREY8),
    "one bit.png": (encode(Image.fromarray(RAMP > 0.5)), BLACK_AND_WHITE),
    "one bit.tiff": (
        encode(Image.fromarray(RAMP > 0.5), "TIFF", compression="group4"),
        BLACK_AND_WHITE,
    ),
    "palette.png": (encode(PALETTE), PAINTED),
    "palette, one colour transparent.png": (encode(PALETTE, transparency=3), PAINTED),
    "palette, alpha by colour.png": (encode(PALETTE, transparency=bytes(range(64))), PAINTED),
    "palette, alpha.tiff": (encode(with_alpha(PALETTE.convert("PA"), ALPHA), "TIFF"), PAINTED),
    "transparent.gif": (encode(PALETTE, "GIF", transparency=5), PAINTED),
    "two frames.gif": (
        encode(PALETTE, "GIF", save_all=True, append_images=[COLOUR.rotate(180).quantize(64)]),
        PAINTED,
    ),
    "two frames.png": (
        encode(COLOUR, save_all=True, append_images=[COLOUR.rotate(180)]),
        RGB8,
    ),
    "two pages.tiff": (
        encode(COLOUR, "TIFF", save_all=True, append_images=[COLOUR.rotate(180)]),
        RGB8,
    ),
    "grey, alpha.png": (encode(with_alpha(COLOUR.convert("L"), ALPHA)), LUMA),
    "grey, alpha.tiff": (encode(with_alpha(COLOUR.convert("L"), ALPHA), "TIFF"), LUMA),
    # As every loader of ImageNet and of SA-1B has it: no background, the colours that are stored.
    "alpha.png": (encode(with_alpha(COLOUR, ALPHA)), RGB8),
    "alpha.tiff": (encode(with_alpha(COLOUR, ALPHA), "TIFF"), RGB8),
    "alpha.webp": (encode(with_alpha(COLOUR, ALPHA), "WEBP", lossless=True, exact=True), RGB8),
    "invisible.png": (encode(with_alpha(COLOUR, 0)), RGB8),
    "ink.tiff": (encode(INK, "TIFF"), INKED),
    "ink, Adobe's.jpg": (encode(INK, "JPEG", quality=100), INKED),
    "ink, not Adobe's.jpg": (
        without_marker(encode(ImageChops.invert(INK), "JPEG", quality=100)),
        INKED,
    ),
    "ink as YCC, Adobe's.jpg": (
        ycck(encode(Image.merge("CMYK", YCC), "JPEG", quality=100)),
        INKED,
    ),
    "YCbCr.tiff": (encode(COLOUR, "TIFF", compression="jpeg", quality=98), RGB8),
    "Lab.tiff": (
        encode(Image.merge("LAB", [Image.new("L", COLOUR.size, v) for v in LAB_OF_RED]), "TIFF"),
        np.broadcast_to([255, 0, 0], RGB8.shape),
    ),
    "white is zero.tiff": (tiff(full(65535.0) - RAMP[..., None] * 65535, photometric=0), GREY8),
    "white is zero, float.tiff": (tiff(1 - RAMP[..., None], "f4", photometric=0), GREY8),
    "signed 16.tiff": (tiff(RAMP[..., None] * 32767, "i2", photometric=1), GREY8 / 2),
    "32 bits.tiff": (encode(Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"), GREY8),
    "black, 16 bits.png": (encode(Image.fromarray((RAMP * 0).astype(np.uint16))), GREY8 * 0),
    "black, float.tiff": (encode(Image.fromarray(RAMP.astype(FLOAT) * 0), "TIFF"), GREY8 * 0),
    "float, resampled.tiff": (
        encode(Image.fromarray((RAMP * 1.06 - 0.03).astype(FLOAT)), "TIFF"),
        (RAMP * 1.06 - 0.03).clip(0, 1) * 255,
    ),
}
for bits in BITS:
    top = 2**bits - 1
    grey, rgb = (RAMP * top).round(), (COLOURS * top).round()
    one, opaque = grey.astype(np.uint16), full(65535.0)
    GOOD |= {
        f"{bits} of 16 bits.png": (encode(Image.fromarray(one)), GREY8),
        f"{bits} of 16 bits.tiff": (encode(Image.fromarray(one), "TIFF"), GREY8),
        f"{bits} of 16 bits, LZW.tiff": (
            encode(Image.fromarray(one), "TIFF", compression="tiff_lzw"),
            GREY8,
        ),
        f"{bits} of 16 bits, big-endian.tiff": (
            encode(Image.fromarray(one.astype(">u2")), "TIFF"),
            GREY8,
        ),
        f"{bits} of 16 bits, RGB.png": (deep_png(rgb), RGB8),
        f"{bits} of 16 bits, RGBA.png": (deep_png(np.concatenate([rgb, opaque], -1)), RGB8),
        f"{bits} of 16 bits, RGB.tiff": (tiff(rgb), RGB8),
        f"{bits} of 16 bits, RGB, big-endian.tiff": (tiff(rgb, order=">"), RGB8),
        f"{bits} of 16 bits, RGB, packed.tiff": (tiff(rgb, packed=True), RGB8),
        f"{bits} bits in float.tiff": (encode(Image.fromarray(grey.astype(FLOAT)), "TIFF"), GREY8),
    }
GOOD["0 to 1 in float.tiff"] = (encode(Image.fromarray(RAMP.astype(FLOAT)), "TIFF"), GREY8)
GOOD["grey, alpha, 16 bits.png"] = (deep_png(np.stack([RAMP * 65535] * 2, -1)), GREY8)


def floats(values):
    return encode(Image.fromarray(np.asarray(values, FLOAT)), "TIFF")


BAD = {
    "not a number.tiff": (
        floats(np.where(RAMP > 0.5, np.nan, RAMP)),
        "pixel values are not finite",
    ),
    "infinite.tiff": (floats(np.where(RAMP > 0.9, np.inf, RAMP)), "pixel values are not finite"),
    "minus infinite.tiff": (
        floats(np.where(RAMP > 0.9, -np.inf, RAMP)),
        "pixel values are not finite",
    ),
    "negative.tiff": (floats(2 * RAMP - 1), UNKNOWN_RANGE),
    "neither 1 nor 255.tiff": (floats(RAMP * 5), UNKNOWN_RANGE),
    "beyond 16 bits.tiff": (floats(RAMP * 1e6), UNKNOWN_RANGE),
    "beyond 16 bits, whole.tiff": (
        encode(Image.fromarray((RAMP * 1e6).astype(np.int32)), "TIFF"),
        UNKNOWN_RANGE,
    ),
    "negative, whole.tiff": (tiff(RAMP[..., None] * 999 - 9, "i2", photometric=1), UNKNOWN_RANGE),
    "grey, alpha, 12 of 16 bits.png": (
        deep_png(np.stack([RAMP * 4095, RAMP * 65535], -1)),
        UNKNOWN_RANGE,
    ),
    "planes.tiff": (tiff(COLOURS * 65535, planar=True), "TIFF in planes of 16 bits"),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_has_its_colours(name):
    data, expected = GOOD[name]
    expected = np.asarray(expected, float)
    expected = expected if expected.ndim == 3 else expected[..., None]
    found = np.asarray(open_image(data).decode())
    assert found.shape == (HEIGHT, WIDTH, 3) and found.dtype == np.uint8
    limit = 6 if name == "Lab.tiff" else 4 if name.endswith(".jpg") or "YCbCr" in name else 1
    assert np.abs(found - expected).max() <= limit


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_told_has_its_reason(name):
    data, reason = BAD[name]
    for use in (lambda p: p.decode(), lambda p: cut(p, (0, 0, 48, 48), [16], False)):
        with pytest.raises(BadSample, match=f"^{reason}$"):
            use(open_image(data))


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_classification_sees_the_same(name):
    """One decoder: what it is given is what stage 1 would cut, before timm's own resizing."""
    samples = LabelTransform(LabelDataConfig(image_size=32), AugmentConfig(), seed=0)
    data, told = (GOOD | BAD)[name]
    sample = RawSample("s/a", {IMAGE: data, "cls": b"3"})
    if name in BAD:
        for decode in (samples.decode_held_out, lambda s: samples.decode(s, 0, False)):
            with pytest.raises(BadSample, match=f"^{told}$"):
                decode(sample)
        return
    _, image, label = samples.decode_held_out(sample)
    expected = samples.plain(open_image(data).decode())
    assert label == 3 and np.array_equal(image, expected)
    mean = (image.permute(1, 2, 0).numpy() * STD + MEAN).mean() * 255
    told = np.asarray(told, float)
    central = told[6:-6, 14:-14] if told.ndim == 3 else told[6:-6, 14:-14, None]
    assert abs(mean - central.mean()) < 8  # not black, not white


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("adobe", [True, False])
def test_ink_at_a_reduced_size(scale, adobe):
    """A JPEG of ink decoded at a fraction of its size keeps its colours."""
    large = INK.resize((WIDTH * scale, HEIGHT * scale), Image.Resampling.BICUBIC)
    data = encode(large, "JPEG", quality=98)
    if not adobe:
        data = without_marker(encode(ImageChops.invert(large), "JPEG", quality=98))
    pixels = open_image(data).decode("upright", (WIDTH, HEIGHT))
    assert pixels.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(pixels) - INKED)[2:-2, 2:-2].max() < 8


def test_the_range_is_the_first_that_holds_the_largest():
    for top, largest in ((255, 255), (1023, 256), (1023, 1023), (4095, 1024), (16383, 4096)):
        values = np.array([[0, largest]], np.uint16)
        assert to_8_bits(values).tolist() == [[0, round(255 * largest / top)]]
        assert to_8_bits(values, inverse=True).tolist() == [[255, 255 - round(255 * largest / top)]]
    assert to_8_bits(np.array([[0, 16384]], np.uint16)).tolist() == [[0, 64]]
    for largest, found in ((1.0, 255), (1.05, 255), (16.0, 16), (255.0, 255)):
        assert to_8_bits(np.array([[0, largest]])).tolist() == [[0, found]]
    for bad in (1.06, 15.9, 70_000.0, -0.06):
        with pytest.raises(BadSample, match=UNKNOWN_RANGE):
            to_8_bits(np.array([[bad, 0.0]]))
