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

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from einops import rearrange
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import PatchEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sami.core.errors import UserError
from sami.core.weights import Takes, Weights, find_weights, load_strictly, read_weights
from sami.encoder import HEAD_WIDTH, sincos_positions, vit_block
from sami.sam_encoder import NATIVE_SIZE, NECK_CHANNELS, SamEncoder

# Models that are known by their names alone: what these begin with, and what they are.
STRANGERS = (
    ("image_encoder.layers.", "MobileSAM"),
    (("image_encoder.trunk.", "sam_mask_decoder."), "SAM 2"),
)


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


def read_model(
    path: str | Path, takes: Takes, option: str = "", say: Callable[[str], None] = print
) -> tuple[Weights, Path]:
    """The tensors of whatever holds a model, and its file.

    Args:
        option: that the path was given by, for messages.
        say: told where the weights are not those of a run's end.

    Raises:
        UserError: there is none that can be read.
        OSError: the machine cannot read it.
    """
    found = find_weights(path, takes, option)
    if found.note:
        say(found.note)
    return read_weights(found.file, takes, option), found.file


def image_encoder_shape(weights: Weights, what: str, remedy: str) -> ImageEncoderShape:
    """The image encoder of a model: by its header, or by its tensors where others wrote it.

    Raises:
        UserError: it is none that is known here.
    """
    names, prefix = weights.tensors, "image_encoder."
    for marks, told in STRANGERS:
        if any(name.startswith(marks) for name in names):
            raise UserError(f"{what} is {told}, which is not opened here; {remedy}")
    try:
        header = weights.header("model")
        if header is not None:
            told = header["encoder"]
            shape = ImageEncoderShape(**{n.name: told[n.name] for n in fields(ImageEncoderShape)})
            if shape.kind not in ENCODERS:
                raise ValueError(
                    f"an image encoder '{shape.kind}', none of {', '.join(ENCODERS)}, written by "
                    "another version"
                )
            return shape
        width, _, patch, _ = names[f"{prefix}patch_embed.proj.weight"].shape
        positions = names[f"{prefix}pos_embed"]
        depth = len({name.split(".")[2] for name in names if name.startswith(f"{prefix}blocks.")})
        channels = names[f"{prefix}neck.0.weight"].shape[0]
        kind = "sam" if positions.ndim == 4 else "vit"
        grid, image_size, heads = grid_of(positions), NATIVE_SIZE, width // HEAD_WIDTH
        if kind == "sam":
            image_size = grid * patch
            heads = width // names[f"{prefix}blocks.0.attn.rel_pos_h"].shape[1]
        if not heads or width % heads:
            raise ValueError(f"a width of {width}")
        return ImageEncoderShape(kind, width, depth, heads, patch, image_size, grid, channels)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        why = f"no {error.args[0]}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{what} holds no model that is known here ({why}); {remedy}") from error


def grid_of(positions: torch.Tensor) -> int:
    """Side of the grid of stored positions: SAM's [1, h, w, D] or ours [1, 1 + h * w, D]."""
    return positions.shape[1] if positions.ndim == 4 else round((positions.shape[1] - 1) ** 0.5)


def load_image_encoder(weights: Weights, what: str, remedy: str) -> nn.Module:
    """The image encoder of a model.

    Raises:
        UserError: damaged, or none that is known here.
    """
    shape = image_encoder_shape(weights, what, remedy)
    with torch.device("meta"):
        encoder = build_image_encoder(shape)
    prefix, does_not = "image_encoder.", f"{what} does not fit itself"
    load_strictly(encoder, weights.below(prefix), does_not, remedy, prefix=prefix)
    return encoder
