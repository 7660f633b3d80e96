"""Image encoders of promptable models: pictures to an embedding, under a neck.

An encoder is a module with

- ``forward(images)``: normalised [B, 3, H, W] to the embedding [B, C, h, w], which is
  ``neck(trunk(images))``;
- ``trunk(images)``: what enters the neck, [B, D, h, w];
- ``shape``, an :class:`ImageEncoderShape` (``img_size``, ``width``, ``depth``, ``patch_size`` and
  ``channels`` say the same), which rebuilds it;
- ``checkpointing``: recompute the blocks in the backward pass instead of storing them.

To plug in another, write that class and give it a name in ENCODERS. Layer decay counts blocks by
parameter names: ``patch_embed.*`` and ``pos_embed`` at the bottom, then ``blocks.<n>.*``.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import PatchEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sami.core.errors import UserError
from sami.encoder import sincos_positions, vit_block
from sami.sam_encoder import NECK_CHANNELS, SamEncoder

MODEL_FILE = "model.safetensors"  # of a run of stage 2


@dataclass(frozen=True)
class ImageEncoderShape:
    """All that rebuilds an image encoder; part of the JSON header of ``model.safetensors``.

    Attributes:
        kind: a name of ENCODERS.
        image_size: side in pixels of the model's square input.
        grid: side of the grid that positions are stored for, whatever the input's; 14 for an
            encoder that was pretrained at 224 px, 64 for SAM's.
        channels: of the embedding.
    """

    kind: str = "vit"
    width: int = 192
    depth: int = 12
    heads: int = 3
    patch_size: int = 16
    image_size: int = 1024
    grid: int = 14
    channels: int = NECK_CHANNELS


class VitEncoder(nn.Module):
    """EfficientSAM's: a plain ViT with global attention in all blocks, under released names."""

    def __init__(self, shape: ImageEncoderShape) -> None:
        super().__init__()
        self.shape, self.checkpointing = shape, False
        width, channels = shape.width, shape.channels
        # The first place belongs to the class token, which is not used here.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, width))
        self.pos_embed.data[:, 1:] = sincos_positions(shape.grid, width)
        self.patch_embed = PatchEmbed(
            shape.image_size,
            shape.patch_size,
            embed_dim=width,
            flatten=False,
            strict_img_size=False,
        )
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
        self.blocks = nn.ModuleList(vit_block(width, shape.heads) for _ in range(shape.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )
        self.img_size, self.width, self.depth = shape.image_size, width, shape.depth
        self.patch_size, self.channels = shape.patch_size, channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] normalised to [B, 256, h, w]."""
        return self.neck(self.trunk(images))

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """The last block's output, [B, D, h, w]."""
        maps = self.patch_embed(images)
        height, width = maps.shape[2:]
        x = rearrange(maps + self.positions(height, width), "b d h w -> b (h w) d")
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return rearrange(x, "b (h w) d -> b d h w", h=height)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The stored positions at another grid, [1, D, h, w]."""
        stored = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=self.shape.grid)
        return F.interpolate(stored, (height, width), mode="bicubic", align_corners=False)


class SamVitEncoder(SamEncoder):
    """SAM's, under its own names; any size."""

    def __init__(self, shape: ImageEncoderShape) -> None:
        stored = shape.grid * shape.patch_size
        super().__init__(
            shape.width, shape.depth, shape.heads, stored, shape.patch_size, shape.channels
        )
        self.shape = shape
        self.img_size = shape.image_size  # what SamPredictor resizes to


ENCODERS = {"vit": VitEncoder, "sam": SamVitEncoder}


def build_image_encoder(shape: ImageEncoderShape) -> nn.Module:
    """An image encoder with random weights."""
    return ENCODERS[shape.kind](shape)


def find_model(path: str | Path) -> Path | None:
    """The ``model.safetensors`` that a run folder holds, or that is named itself; or None."""
    path = Path(path)
    file = path / MODEL_FILE
    return file if file.is_file() else path if path.suffix == ".safetensors" else None


def read_header(file: Path) -> dict:
    """What the header of a ``model.safetensors`` says of the model.

    Raises:
        UserError: damaged, or no model of ours.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return json.loads((stored.metadata() or {})["model"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} is not a model of stage 2 ({what}); give the {MODEL_FILE} of a run"
        ) from error


def encoder_of_header(header: dict, file: Path) -> ImageEncoderShape:
    """The image encoder that a header describes.

    Raises:
        UserError: it describes none that is known here.
    """
    try:
        shape = ImageEncoderShape(
            **{item.name: header["encoder"][item.name] for item in fields(ImageEncoderShape)}
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not a model of stage 2 ({type(error).__name__}: {error}); give the "
            f"{MODEL_FILE} of a run"
        ) from error
    if shape.kind not in ENCODERS:
        raise UserError(
            f"{file} has an image encoder '{shape.kind}', which is none of "
            f"{', '.join(ENCODERS)}; it was written by another version"
        )
    return shape


def load_image_encoder(file: Path) -> nn.Module:
    """The image encoder of a ``model.safetensors``.

    Raises:
        UserError: damaged, or no model of ours.
    """
    encoder = build_image_encoder(encoder_of_header(read_header(file), file))
    prefix = "image_encoder."
    with safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): stored.get_tensor(name) for name in names}
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit its own header: {what}") from error
    return encoder
