"""From bytes to views: the same region at every size, and every kind of image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from segment_anything import sam_model_registry

from sami.core.errors import BadSample
from sami.core.images import (
    Normalise,
    cut,
    open_image,
    patchify,
    resize_array,
    resize_whole,
    unpatchify,
)
from sami.core.order import sample_rng
from sami.data import random_region


def encode(pixels, kind="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def coordinates(width, height):
    """An image whose red is x and whose green is y."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    return np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1500, 2250), (640, 480), (300, 301)])
@pytest.mark.parametrize("flip", [False, True])
def test_student_and_teacher_see_the_same_region(kind, size, flip):
    width, height = size
    data = encode(coordinates(*size), kind, **({"quality": 98} if kind == "JPEG" else {}))
    for trial in range(3):
        box = random_region(*size, (0.2, 1.0), sample_rng(0, trial, "key"))
        left, top, right, bottom = box
        for view, side in zip(
            cut(open_image(data), box, [224, 448, 1024], flip), (224, 448, 1024), strict=True
        ):
            centres = (np.arange(side) + 0.5) / side
            x = (left + centres * (right - left)) / width * 255
            y = (top + centres * (bottom - top)) / height * 255
            inner = slice(side // 50, -side // 50)  # the filter's reach at the border
            found = view[..., 0].mean(0).astype(float)
            assert np.abs(found - (x[::-1] if flip else x))[inner].max() < 1.5
            assert np.abs(view[..., 1].mean(1) - y)[inner].max() < 1.5


def test_the_teachers_view_is_cut_from_the_original_pixels():
    """Detail that a 224 px crop cannot hold is there at 448 px."""
    stripes = (np.arange(896) // 2 % 2 * 255).astype(np.uint8)  # period 4 px: 2 px at 448
    image = np.broadcast_to(stripes[None, :, None], (896, 896, 3))
    student, teacher = cut(open_image(encode(image)), (0, 0, 896, 896), [224, 448], False)
    assert student[..., 0].std() < 5
    assert teacher[..., 0].std() > 80


def test_a_jpeg_is_decoded_no_smaller_than_needed():
    image = open_image(encode(coordinates(1600, 1200), "JPEG"))
    cut(image, (0, 0, 1600, 1200), [224], False)
    assert image.image.size == (400, 300)  # an eighth would be 200 x 150, below 224
    image = open_image(encode(coordinates(1600, 1200), "JPEG"))
    cut(image, (0, 0, 400, 400), [224], False)
    assert image.image.size == (1600, 1200)
    image = open_image(encode(coordinates(1600, 1200), "JPEG"))
    cut(image, (0, 0, 1600, 1200), [224, 1024], False)
    assert image.image.size == (1600, 1200)


TURNED = {  # by EXIF 2.3: which side of the scene the stored rows and columns begin at
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p[::-1].transpose(1, 0, 2),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p[:, ::-1].transpose(1, 0, 2),
}
GREY = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(GREY)), GREY),
        (encode(Image.fromarray(GREY).convert("LA")), GREY),
        (encode(Image.fromarray(GREY).convert("RGBA")), GREY),
        (encode(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),
        (encode(Image.fromarray(GREY).convert("P"), transparency=0), GREY),
        (encode(Image.fromarray(GREY).convert("CMYK"), "JPEG", quality=100), GREY),
        (encode(Image.fromarray(GREY).convert("RGB"), "WEBP", lossless=True), GREY),
    ],
    ids=["grey", "grey and alpha", "RGBA", "16 bit", "palette", "CMYK", "webp"],
)
def test_every_kind_of_image(data, expected):
    (view,) = cut(open_image(data), (0, 0, 32, 32), [32], False)
    assert np.abs(view.astype(int) - expected[:, :32, None]).max() <= 3


def test_exif_orientation():
    pixels = coordinates(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = open_image(encode(pixels, "JPEG", quality=98, exif=exif))
    assert image.upright == (40, 60)
    (view,) = cut(image, (0, 0, 40, 60), [60], False)
    turned = np.asarray(Image.fromarray(np.rot90(pixels, -1)).resize((60, 60), Image.BICUBIC))
    assert np.abs(view.astype(int) - turned).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, packed", "TIFF, LZW"])
def test_upright_and_as_stored(kind, orientation):
    """Pillow turns a TIFF itself, and tells its upright size; the others it gives as stored."""
    options = {
        "TIFF, packed": {"compression": "packbits"},
        "TIFF, LZW": {"compression": "tiff_lzw"},
    }
    options |= {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = coordinates(64, 40)
    upright = TURNED[orientation](stored)
    data = encode(stored, kind.partition(",")[0], exif=exif, **options.get(kind, {}))
    for drawn, expected in (("upright", upright), ("stored", stored)):
        image = open_image(data)
        assert image.size(drawn) == expected.shape[1::-1]
        assert image.orientation == orientation
        found = resize_whole(image, *expected.shape[:2], drawn).astype(int)
        assert np.abs(found - expected).max() <= (6 if kind == "JPEG" else 0)
        assert image.size(drawn) == expected.shape[1::-1]  # still
    (view,) = cut(open_image(data), (0, 0, 40, 40), [40], False)
    assert np.abs(view.astype(int) - upright[:40, :40]).max() <= (6 if kind == "JPEG" else 0)


def test_one_pixel():
    (view,) = cut(open_image(encode(np.full((1, 1, 3), 7, np.uint8))), (0, 0, 1, 1), [16], False)
    assert (view == 7).all()


def test_bad_images_are_told_apart(monkeypatch):
    whole = encode(coordinates(200, 200), "JPEG")
    with pytest.raises(BadSample, match="not an image"):
        open_image(b"a text file")
    with pytest.raises(BadSample, match="empty file"):
        open_image(b"")
    with pytest.raises(BadSample, match="damaged image"):
        cut(open_image(whole[: len(whole) // 2]), (0, 0, 200, 200), [32], False)
    monkeypatch.setattr("sami.core.images.MAX_PIXELS", 39_999)
    with pytest.raises(BadSample, match="too many pixels"):
        open_image(whole)


def test_patches_in_raster_order():
    images = torch.randn(2, 3, 32, 48)
    patches = patchify(images, 16)
    for place in range(6):
        y, x = divmod(place, 3)
        expected = images[:, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten(1)
        assert torch.equal(patches[:, place], expected)
    square = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(square, 8), 8), square)


def test_normalisation_is_sams_own():
    """One normalised tensor serves student and teacher: the constants are the same."""
    sam = sam_model_registry["vit_b"]()
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    expected = (images.float() - sam.pixel_mean) / sam.pixel_std
    torch.testing.assert_close(Normalise()(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Normalise()(images / 255), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_whole_upright_image(orientation):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    drawn = coarse.resize((140, 100), Image.Resampling.BICUBIC)
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    drawn.save(stream, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue())))
    expected = resize_array(np.asarray(upright), upright.height // 2, upright.width // 2)
    image = open_image(stream.getvalue())
    assert image.upright == upright.size
    found = resize_whole(image, upright.height // 2, upright.width // 2)
    assert np.array_equal(found, expected)  # libjpeg's own reduction would differ by up to 12
