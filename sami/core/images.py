"""Bytes to pixels: decode, cut a region at a size, normalise on the device."""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F

from sami.core.errors import BadSample, raise_if_machine

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# What a member may really be, whatever its extension says; not EPS, which starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# The picture above which a sample counts as bad: 100 million pixels decode to 300 MB.
MAX_PIXELS = 100_000_000
MEAN = (0.485, 0.456, 0.406)  # ImageNet's; times 255 these are SAM's own pixel_mean and pixel_std
STD = (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]


def open_image(data: bytes) -> Image.Image:
    """A picture with its header read and its pixels not yet decoded.

    Raises:
        BadSample: not a picture, or larger than MAX_PIXELS.
    """
    with _decoding("not a picture" if data else "empty file"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("too many pixels")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels after the EXIF orientation is applied.

    Raises:
        BadSample: the EXIF data is damaged.
    """
    turned = _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else (image.width, image.height)


def cut(image: Image.Image, box: Box, sizes: list[int], flip: bool) -> list[np.ndarray]:
    """The same region of a picture at several sizes, each resized from the original pixels.

    A JPEG is decoded at the largest power-of-two reduction at which the region still has at
    least the largest asked size on both sides, so that nothing is scaled up on account of it.

    Args:
        image: from :func:`open_image`; it is decoded here, once.
        box: left, top, right, bottom in pixels of the upright picture.
        sizes: sides of the square outputs, in pixels.
        flip: mirror left and right.

    Returns:
        One uint8 array [size, size, 3] per size.

    Raises:
        BadSample: the picture is damaged.
    """
    left, top, right, bottom = box
    width, height = upright_size(image)
    upright, need = _orientation(image) == 1, max(sizes)
    with _decoding("damaged picture"):
        if upright:
            _draft(
                image, _at_least(width, need, right - left), _at_least(height, need, bottom - top)
            )
        pixels = _to_rgb(ImageOps.exif_transpose(image))
        x, y = pixels.width / width, pixels.height / height
        region = (left * x, top * y, right * x, bottom * y)
        views = {
            size: np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC, box=region))
            for size in set(sizes)
        }
    return [views[size][:, ::-1] if flip else views[size] for size in sizes]


def resize_stored(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A whole picture as it is stored, without its EXIF orientation, at another size.

    A JPEG is decoded at the largest power-of-two reduction that is no smaller than that on either
    side.

    Args:
        image: from :func:`open_image`; it is decoded here.
        height, width: in pixels.

    Returns:
        uint8 [height, width, 3]; antialiased bilinear.

    Raises:
        BadSample: the picture is damaged, or a TIFF with an orientation.
    """
    if image.format == "TIFF" and _exif_orientation(image) != 1:
        raise BadSample("turned TIFF")  # Pillow never gives it as it is stored
    with _decoding("damaged picture"):
        _draft(image, width, height)
        pixels = np.asarray(_to_rgb(image))
    return resize_array(pixels, height, width)


def resize_upright(image: Image.Image, height: int, width: int) -> np.ndarray:
    """A whole picture, turned by its EXIF orientation, at another size.

    Args:
        image: from :func:`open_image`; it is decoded here.
        height, width: of the upright result in pixels.

    Returns:
        uint8 [height, width, 3]; antialiased bilinear.

    Raises:
        BadSample: the picture is damaged.
    """
    turned = _orientation(image) in (5, 6, 7, 8)
    with _decoding("damaged picture"):
        _draft(image, *((height, width) if turned else (width, height)))
        pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    return resize_array(pixels, height, width)


def resize_array(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [height, width, 3], antialiased bilinear.

    Torch's result is Pillow's up to 1 of 255, in a third of the time at 1500 x 2250 to 1024 x 1024.
    """
    own = np.array(pixels, order="C")  # torch warns of memory that it may not write to
    picture = torch.from_numpy(own).permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W]
    picture = F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
    return picture.squeeze(0).permute(1, 2, 0).numpy()


class Normalise(nn.Module):
    """Pictures to zero mean and unit variance by ImageNet's (and SAM's) statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

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
def _decoding(reason: str) -> Iterator[None]:
    """Pillow's warnings kept quiet, and whatever it raises turned into BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # its readers raise whatever their parsing runs into
        raise_if_machine(error)  # such as too many open files to import one of them
        raise BadSample(reason) from error


def _orientation(image: Image.Image) -> int:
    """How the decoded picture is still to be turned: Pillow turns a TIFF itself, and its size."""
    return 1 if image.format == "TIFF" else _exif_orientation(image)


def _exif_orientation(image: Image.Image) -> int:
    with _decoding("damaged picture"):
        return image.getexif().get(0x0112, 1)


def _draft(image: Image.Image, width: int, height: int) -> None:
    """Decode a JPEG at the largest power-of-two reduction of at least this size."""
    if image.format == "JPEG":
        image.draft(None, (width, height))


def _at_least(full: int, need: int, part: float) -> int:
    """The side of the whole picture at which ``part`` of it still measures ``need`` pixels."""
    return max(1, int(np.ceil(full * need / part)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow would clip, not scale
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns on the direct way
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
