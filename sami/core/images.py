"""Bytes to pixels: decode, turn upright, cut a region at a size, normalise on the device.

Every image of every program is opened and decoded here, and :func:`drawn_on` alone decides which
way round an annotation has it.
"""

import contextlib
import functools
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageChops, ImageCms
from torch import nn
from torch.nn import functional as F

from sami.core.errors import BadSample, raise_if_machine

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# What a member may really be, whatever its extension says; not EPS, which starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# The image above which a sample counts as bad: 100 million pixels decode to 300 MB.
MAX_PIXELS = 100_000_000
MEAN = (0.485, 0.456, 0.406)  # ImageNet's; times 255 these are SAM's own pixel_mean and pixel_std
STD = (0.229, 0.224, 0.225)
# What brings a stored image upright, by its EXIF orientation (EXIF 2.3, tag 274).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACK = TURNS | {6: TURNS[8], 8: TURNS[6]}  # and what undoes it: the others are their own inverse
RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # what deep samples may run up to
OVERSHOOT = 0.05  # of the range of a float image: what resampling leaves beyond it
UNKNOWN_RANGE = "pixel values of no known range"

Box = tuple[float, float, float, float]
Colour = tuple[float, float, float]  # red, green, blue
Drawn = Literal["upright", "stored"]  # on which image, the displayed or the stored one
DRAWN: tuple[Drawn, ...] = get_args(Drawn)


class EncodedImage:
    """An encoded image whose header was read; its pixels are decoded when they are asked for.

    Attributes:
        image: Pillow's.
        format: of the bytes, such as JPEG.
    """

    def __init__(self, data: bytes, image: Image.Image) -> None:
        self.image, self.format, self._data = image, image.format, data
        # Of deep colour Pillow gives the upper bytes alone, and once it has read forgets so.
        self._deep = any(";16" in _raw(tile) for tile in image.tile)
        # It takes each plane of 16 bits for one of 8.
        self._planes = self.format == "TIFF" and image.tag_v2.get(284) == 2 and _bits(image) > 8

    @functools.cached_property
    def orientation(self) -> int:
        """By EXIF, or XMP where there is none: 1..8; 1 also for what is not one of them.

        Raises:
            BadSample: the EXIF data is damaged.
        """
        with decoding("damaged image"):
            found = self.image.getexif().get(0x0112, 1)
            return int(found) if found in TURNS else 1

    @functools.cached_property
    def stored(self) -> tuple[int, int]:
        """Width and height in pixels as they are stored."""
        if self.format == "TIFF":  # Pillow turns a TIFF itself, and tells its upright size
            return self.image.tag_v2[256], self.image.tag_v2[257]
        return self.image.size

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height in pixels after the orientation is applied."""
        return self.stored[::-1] if self.orientation in (5, 6, 7, 8) else self.stored

    def size(self, drawn: Drawn) -> tuple[int, int]:
        """Width and height in pixels, either way."""
        return self.upright if drawn == "upright" else self.stored

    def decode(
        self, drawn: Drawn = "upright", at_least: tuple[int, int] | None = None
    ) -> Image.Image:
        """The pixels in RGB, 8 bits; of several frames the first. Once only.

        Args:
            drawn: turned by its orientation, or as it is stored.
            at_least: width and height that are wanted of the whole image: a JPEG is decoded at
                the largest power-of-two reduction that is no smaller on either side.

        Raises:
            BadSample: the image is damaged, or its values cannot be told.
        """
        orientation = self.orientation  # Pillow forgets a TIFF's with the turning
        self.stored  # noqa: B018 - likewise
        with decoding("damaged image"):
            if at_least is not None and self.format == "JPEG":
                swap = drawn == "upright" and orientation in (5, 6, 7, 8)
                self.image.draft(None, at_least[::-1] if swap else at_least)
            if self._planes:
                raise BadSample("TIFF in planes of 16 bits")
            self.image.load()
            pixels = self._rgb()
            if (drawn == "upright") != (self.format == "TIFF") and orientation in TURNS:
                pixels = pixels.transpose((TURNS if drawn == "upright" else BACK)[orientation])
        return pixels

    def _rgb(self) -> Image.Image:
        image = self.image
        if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip, not scale
            inverse = self.format == "TIFF" and image.tag_v2.get(262) == 0  # white is zero
            return Image.fromarray(to_8_bits(np.asarray(image), inverse)).convert("RGB")
        if self._deep:
            upper = np.asarray(image)[..., : 4 if image.mode == "CMYK" else 3]
            if upper.max(initial=0) < 64:  # under 15 bits: what is to be seen is below them
                values = upper.astype(np.uint16) << 8 | self._lower()
                return Image.fromarray(to_8_bits(values, False))
        if image.mode == "CMYK" and self.format in ("JPEG", "MPO") and "adobe" not in image.info:
            # Adobe's are stored inverted, and Pillow takes every one for Adobe's.
            image = ImageChops.invert(image)
        if image.mode == "LAB":
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(
                image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB"
            )
        if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
            image = image.convert(image.mode.upper())
        if image.mode == "P" and "transparency" in image.info:  # Pillow warns on the direct way
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")

    def _lower(self) -> np.ndarray:
        """The lower bytes of 16-bit colour: what Pillow takes for the upper ones of the other
        byte order."""
        again = Image.open(io.BytesIO(self._data), formats=FORMATS)
        swaps = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
        tiles = []
        for tile in again.tile:
            mode, _, depth = _raw(tile).partition(";")
            if mode not in ("RGB", "RGBA", "RGBX"):
                raise BadSample(UNKNOWN_RANGE)
            raw = f"{mode};{swaps[depth]}"
            tiles.append(
                tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
            )
        again.tile = tiles
        return np.asarray(again)[..., :3]


def _raw(tile: Any) -> str:
    """Pillow's name for how a tile's samples are stored."""
    return str(tile.args if isinstance(tile.args, str) else (tile.args or [""])[0])


def _bits(image: Image.Image) -> int:
    """Of a TIFF's samples."""
    found = image.tag_v2.get(258, 1)
    return max(found) if isinstance(found, tuple) else int(found)


def open_image(data: bytes) -> EncodedImage:
    """An image with its header read and its pixels not yet decoded.

    Raises:
        BadSample: not an image, or larger than MAX_PIXELS.
    """
    with decoding("not an image" if data else "empty file"):
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        image = EncodedImage(data, opened)
        width, height = image.stored
    if width * height > MAX_PIXELS:
        raise BadSample("too many pixels")
    return image


def drawn_on(
    image: EncodedImage, width: int, height: int, stated: Drawn | None, default: Drawn
) -> tuple[Drawn, bool]:
    """Which way round an annotation has its image: the one place that decides.

    By the size where only one fits. Where both do (the orientation mirrors, turns by 180 degrees,
    or the image is square) by what the annotation tells, or else by ``default``.

    Args:
        width, height: of the image, as the annotation has them.
        stated: in the annotation itself, if it says.
        default: if nothing else decides.

    Returns:
        Which, and whether only ``default`` decided.

    Raises:
        BadSample: the annotation fits neither, or its EXIF data is damaged.
    """
    fitting: list[Drawn] = [d for d in DRAWN if image.size(d) == (width, height)]
    if not fitting or stated is not None and stated not in fitting:
        raise BadSample("annotation of another image size")
    if len(fitting) == 1 or image.orientation == 1:
        return fitting[0], False
    return stated or default, stated is None


def cut(image: EncodedImage, box: Box, sizes: list[int], flip: bool) -> list[np.ndarray]:
    """The same region of an image at several sizes, each resized from the original pixels.

    A JPEG is decoded at the largest power-of-two reduction at which the region still has at
    least the largest asked size on both sides, so that nothing is scaled up on account of it.

    Args:
        image: from :func:`open_image`; it is decoded here, once.
        box: left, top, right, bottom in pixels of the upright image.
        sizes: sides of the square outputs, in pixels.
        flip: mirror left and right.

    Returns:
        One uint8 array [size, size, 3] per size.

    Raises:
        BadSample: the image is damaged.
    """
    left, top, right, bottom = box
    (width, height), need = image.upright, max(sizes)
    whole = _at_least(width, need, right - left), _at_least(height, need, bottom - top)
    pixels = image.decode("upright", whole)
    with decoding("damaged image"):
        x, y = pixels.width / width, pixels.height / height
        region = (left * x, top * y, right * x, bottom * y)
        views = {
            size: np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC, box=region))
            for size in set(sizes)
        }
    return [views[size][:, ::-1] if flip else views[size] for size in sizes]


def resize_whole(
    image: EncodedImage, height: int, width: int, drawn: Drawn = "upright"
) -> np.ndarray:
    """A whole image at another size.

    From all of its pixels: what a user hands over as an array gives the same. (A JPEG that libjpeg
    reduces first, to twice the size, would differ by up to a fifth in the embedding.)

    Args:
        image: from :func:`open_image`; it is decoded here.
        height, width: of the result in pixels.
        drawn: upright, or as it is stored; see :func:`drawn_on`.

    Returns:
        uint8 [height, width, 3]; antialiased bilinear.

    Raises:
        BadSample: the image is damaged.
    """
    return resize_array(np.asarray(image.decode(drawn)), height, width)


def longest_frame(image_size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels at which the longest side is ``image_size``, as SAM resizes.

    At least one pixel, which SAM's own rounding is not for an image of 3000 x 1.
    """
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def frame_of(image_size: int, resize: str, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels that an image has within a square input.

    ``square``: all of it, whatever the image's aspect, as the released EfficientSAM has it.
    ``longest``: as SAM resizes, the rest is padding on the right and below.
    """
    if resize == "square":
        return image_size, image_size
    return longest_frame(image_size, height, width)


def to_8_bits(values: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Samples of more than 8 bits, [H, W] or [H, W, 3], to uint8.

    Files do not tell what their samples run up to (12 bits lie in 16 as often as not, and TIFF's
    MaxSampleValue is the image's own maximum), so that the image does: integers, and float
    images above 255, are taken to fill the first of 8, 10, 12, 14 and 16 bits that holds their
    largest; float images up to 1 fill 0..1, others 0..255.

    Args:
        inverse: 0 is white.

    Raises:
        BadSample: not finite, below 0, above 16 bits, or so that one range would show them black
            and the other white.
    """
    if not np.isfinite(values).all():
        raise BadSample("pixel values are not finite")
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    real = values.dtype.kind == "f"
    slack = OVERSHOOT if real else 0.0
    ranges = (1, *RANGES) if real else RANGES
    top = next((top for top in ranges if high <= top * (1 + slack)), None)
    # A float image of 0..255 that has nothing over 16 may as well be one of 0..1, too bright.
    if top is None or low < -slack * top or (real and top == 255 and high < 16):
        raise BadSample(UNKNOWN_RANGE)
    scaled = values.astype(np.float64 if real else np.float32).clip(0, top) * (255.0 / top)
    return (255 - scaled if inverse else scaled).round().astype(np.uint8)


def resize_array(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [height, width, 3], antialiased bilinear.

    Torch's result is Pillow's up to 1 of 255, in a third of the time at 1500 x 2250 to 1024 x 1024.
    """
    own = np.array(pixels, order="C")  # torch warns of memory that it may not write to
    image = torch.from_numpy(own).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image.squeeze(0).permute(1, 2, 0).numpy()


class Normalise(nn.Module):
    """Images to zero mean and unit variance, by ImageNet's (and SAM's) statistics if none are
    given."""

    def __init__(self, mean: Colour = MEAN, std: Colour = STD) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            # On the CPU even where a module is built on the meta device: no file holds them.
            tensor = torch.tensor(values, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W], integers in 0..255 or floating point in 0..1, to float32 [B, 3, H, W]."""
        scale = 1.0 if images.dtype.is_floating_point else 255.0
        return (images.float() - self.mean * scale) / (self.std * scale)


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, 3, h*p, w*p] to patches in raster order [B, h*w, 3*p*p], channels first in each."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The inverse of :func:`patchify` for a square grid."""
    side = round(patches.shape[1] ** 0.5)
    return rearrange(
        patches, "b (h w) (c p q) -> b c (h p) (w q)", h=side, c=3, p=patch_size, q=patch_size
    )


@contextlib.contextmanager
def decoding(reason: str) -> Iterator[None]:
    """Pillow's warnings kept quiet, and whatever it raises turned into BadSample.

    Raises:
        BadSample: ``reason``, or too many pixels.
        MachineError: the machine refused; nothing is known to be wrong with the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels") from error
    except (MemoryError, BadSample):
        raise
    except Exception as error:  # its readers raise whatever their parsing runs into
        raise_if_machine(error)  # such as too many open files to import one of them
        raise BadSample(reason) from error


def _at_least(full: int, need: int, part: float) -> int:
    """The side of the whole image at which ``part`` of it still measures ``need`` pixels."""
    return max(1, int(np.ceil(full * need / part)))
