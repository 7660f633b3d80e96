"""What an image encoder is to everything that trains one, starts from one or learns from one."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import nn

from sami.core.images import Normalise

MODEL_PREFIX = "image_encoder."  # of an encoder's tensors in the file of a model
NECK_CHANNELS = 256  # of the embedding in all published models


@dataclass(frozen=True)
class EncoderShape:
    """All that rebuilds an encoder; it stands in the JSON header of the files.

    Attributes:
        kind: its class, by :data:`sami.encoders.registry.KINDS`.
        image_size: side in pixels of the square input.
        grid: side of the grid that positions are stored for, whatever the input's; 14 for an
            encoder that was pretrained at 224 px, 64 for SAM's.
        channels: of the embedding behind the neck; None in stage 1, which has no neck.
    """

    kind: str = "vit"
    width: int = 192
    depth: int = 12
    heads: int = 3
    patch_size: int = 16
    image_size: int = 1024
    grid: int = 14
    channels: int | None = NECK_CHANNELS

    @staticmethod
    def stage_one(
        width: int, depth: int, heads: int, patch_size: int, image_size: int, kind: str = "vit"
    ) -> "EncoderShape":
        """That of a student: positions for its own input, and no neck."""
        grid = image_size // patch_size
        return EncoderShape(kind, width, depth, heads, patch_size, image_size, grid, None)

    def header(self) -> dict[str, Any]:
        """As JSON has it; of a student without what follows from the rest."""
        shape = asdict(self)
        if self.channels is None:
            del shape["grid"], shape["channels"]
            if self.kind == "vit":
                del shape["kind"]
        return shape

    def describe(self) -> str:
        """For a sentence."""
        return (
            f"width {self.width}, depth {self.depth}, {self.heads} heads and patches of "
            f"{self.patch_size} pixels for images of {self.image_size}"
        )


class ImageEncoder(Protocol):
    """A module from images to tokens and to a map.

    It has these attributes (:class:`FromShape` sets most of them), two methods that compute and
    ``forward``, which calls the one that its stage learns from, and ``layer_id``. The constructor
    of a class of KINDS takes the shape alone, and leaves the weights as a start from scratch wants
    them. One class serves both stages: ``shape.channels`` is None in stage 1, and in stage 2 that
    of the neck, with positions for any grid. A teacher needs neither ``layer_id`` nor ``forward``.

    Attributes:
        shape: rebuilds it.
        width: D of the tokens, ``channels``: C of the map, ``stride``: pixels between two cells of
            the map, ``image_size``: side in pixels of the input that it is made for.
        class_tokens: how many tokens stand before those of the patches.
        normalise: module, with buffers ``mean`` and ``std``, from images [B, 3, H, W], integers in
            0..255 or floating point in 0..1, to what ``tokens`` and ``maps`` take.
        resize: how a whole image is brought into a square input. longest: its longest side to the
            square's, the rest is padding; square: both sides, whatever the aspect.
        prefix: of its tensors' names in the files that it is loaded from.
        pretrains: whether stage 1 can train it, which takes ``visible``.
        checkpointing: recompute the blocks in the backward pass instead of storing them.
        frozen_statistics: whether batch normalisation, where there is any, keeps its statistics.
    """

    shape: EncoderShape
    width: int
    channels: int
    stride: int
    image_size: int
    class_tokens: int
    normalise: nn.Module
    resize: Literal["longest", "square"]
    prefix: str
    pretrains: bool
    checkpointing: bool
    frozen_statistics: bool

    def tokens(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The last block's output.

        Args:
            images: normalised [B, 3, H, W].
            visible: numbers of the patches that are seen, [B, V]; None for all, in raster order.

        Returns:
            [B, class_tokens + N, D], or V in place of N.
        """

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The patches' tokens as a map, through the neck if there is one: [B, C, h, w]."""

    def layer_id(self, name: str) -> int:
        """Of a parameter, also of a whole model's: 0 for what makes the tokens, then the blocks
        from 1 on, and one more for all that lies behind them (layer decay)."""


class FromShape:
    """What follows from a plain ViT's shape and its parameters' names."""

    class_tokens = 0
    resize: Literal["longest", "square"] = "longest"
    pretrains = False
    frozen_statistics = False

    def take_shape(self, shape: EncoderShape) -> None:
        """Set the protocol's attributes; ``img_size`` is what SamPredictor asks for."""
        self.shape, self.checkpointing, self.normalise = shape, False, Normalise()
        self.width, self.channels = shape.width, shape.channels or shape.width
        self.stride, self.image_size = shape.patch_size, shape.image_size
        self.img_size = shape.image_size
        self.prefix = "" if shape.channels is None else MODEL_PREFIX

    def forward(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """What its stage learns from: the tokens in stage 1, the neck's map in stage 2."""
        return self.tokens(images, visible) if self.shape.channels is None else self.maps(images)

    @staticmethod
    def infer(tensors: dict[str, torch.Tensor], heads: int | None) -> EncoderShape | None:
        """The shape that the tensors of a file without a header have; None if they are another's.

        Args:
            heads: their number, if it is known: tensors do not tell it.
        """

    @staticmethod
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Tensors that others wrote under other names, by their names here; None for no others."""

    def layer_id(self, name: str) -> int:
        first, _, rest = name.split(MODEL_PREFIX)[-1].partition(".")
        if first in ("pos_embed", "patch_embed", "cls_token"):
            return 0
        return 1 + int(rest.split(".")[0]) if first == "blocks" else 1 + self.shape.depth


def token_map(encoder: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
    """What enters the neck: the patches' tokens of images [B, 3, H, W] as a map [B, D, h, w]."""
    tokens = encoder.tokens(images)[:, encoder.class_tokens :]
    return rearrange(tokens, "b (h w) d -> b d h w", h=images.shape[2] // encoder.stride)
