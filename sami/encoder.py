"""The student: a plain ViT of which only the visible tokens go through the blocks.

Built from timm's parts under timm's parameter names, so that the exported weights load strictly
into timm's ``vit_tiny_patch16_224`` (``num_classes=0``) and its relatives.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from sami.core.config import PATH, require
from sami.core.errors import UserError
from sami.core.images import patchify
from sami.core.weights import Takes, Weights, find_weights, load_strictly, read_weights
from sami.grids import PATCH_SIZE
from sami.sam_encoder import SAM_SHAPES

# width, depth, heads: EfficientSAM's released Ti and S, the paper's B, and SAM's own
SHAPES = {
    "vit_ti": (192, 12, 3),
    "vit_s": (384, 12, 6),
    "vit_b": (768, 12, 12),
    "custom": (64, 2, 2),
    **SAM_SHAPES,
}
HEAD_WIDTH = 64  # of an attention head in all ViTs of the papers
TAKES = Takes(
    ("encoder",),
    "the folder of a run of stage 1 (python sami/pretrain.py ...) or its encoder.safetensors",
)


@dataclass
class EncoderConfig:
    """The student.

    Attributes:
        name: vit_ti, vit_s, vit_b, or custom, whose defaults suit a test on a CPU; in stage 2
            also SAM's own sam_vit_b, sam_vit_l and sam_vit_h.
        width: of the tokens; null for the name's own (likewise depth and heads).
        depth: number of blocks.
        heads: attention heads per block.
        patch_size: side of a patch in pixels.
        checkpoint: encoder.safetensors, or the folder of a run of stage 1, to start from; in
            stage 2 also a model (model.safetensors or its run folder, released .pt, SAM's .pth);
            null or empty for none.
        grid: side of the grid that positions are stored for; null for the checkpoint's own, and
            without one for the pictures' in stage 1 and the released model's 14 in stage 2.
    """

    name: str = "vit_ti"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int = PATCH_SIZE
    checkpoint: str | None = field(default=None, metadata=PATH)
    grid: int | None = None

    def check(self) -> None:
        self.checkpoint = self.checkpoint or None
        require(
            self.name in SHAPES,
            f"encoder.name '{self.name}' is not one of {', '.join(SHAPES)}; choose one of them",
        )
        width, depth, heads = self.shape
        require(
            min(width, depth, heads, self.patch_size) > 0,
            "encoder.width, depth, heads and patch_size must be positive",
        )
        require(
            self.grid is None or self.grid > 0,
            f"encoder.grid {self.grid} must be positive, such as 14, or null",
        )
        require(
            width % heads == 0, f"encoder.width {width} is not divisible by encoder.heads {heads}"
        )
        require(
            width % 4 == 0,
            f"encoder.width {width} must be divisible by 4 for its sine-cosine positions",
        )

    def check_grid(self, grid: int, whose: str) -> None:
        """
        Raises:
            UserError: ``grid`` asks for another one than there is.
        """
        require(
            self.grid in (None, grid),
            f"encoder.grid {self.grid} is not the {grid} {whose}; set null",
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads, the name's own where nothing else is given."""
        return tuple(
            own if given is None else given
            for own, given in zip(
                SHAPES[self.name], (self.width, self.depth, self.heads), strict=True
            )
        )


@dataclass(frozen=True)
class EncoderShape:
    """All that rebuilds an encoder; the JSON header of ``encoder.safetensors``."""

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int

    def words(self) -> str:
        """For a sentence."""
        return (
            f"width {self.width}, depth {self.depth}, {self.heads} heads and patches of "
            f"{self.patch_size} pixels for pictures of {self.image_size}"
        )


class Encoder(nn.Module):
    """ViT with class token, absolute positions and a final LayerNorm.

    Positions are MAE's fixed sines and cosines in stage 1 (MAE, section 3); stage 2 trains them.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        width, grid = shape.width, shape.image_size // shape.patch_size
        self.patch_embed = PatchEmbed(shape.image_size, shape.patch_size, embed_dim=width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width), requires_grad=False)
        self.blocks = nn.Sequential(*[vit_block(width, shape.heads) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(initialise)
        nn.init.xavier_uniform_(
            self.patch_embed.proj.weight.view(width, -1)
        )  # as a linear layer, like MAE
        nn.init.normal_(self.cls_token, std=0.02)
        self.pos_embed.data[:, 1:] = sincos_positions(grid, width)

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.shape.image_size // self.shape.patch_size

    def forward(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Features after the final norm.

        Args:
            images: normalised [B, 3, H, H].
            visible: patch numbers [B, V]; None for all, in raster order.

        Returns:
            [B, 1 + V, D], the class token first.
        """
        size = self.shape.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"the encoder was built for {size}x{size} pictures and got {tuple(images.shape)}"
            )
        patches = patchify(images, self.shape.patch_size)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)
        if visible is not None:  # patches that are not seen are not even embedded
            patches, positions = take(patches, visible), take(positions, visible)
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return self.norm(self.blocks(torch.cat([first.to(tokens.dtype), tokens], dim=1)))

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, H] normalised to the patch tokens as a map [B, D, h, w]."""
        return rearrange(self(images)[:, 1:], "b (h w) d -> b d h w", h=self.grid)


def take(tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, D] at the given numbers [B, K]: [B, K, D]."""
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """MAE's fixed 2-D positions [1, grid * grid, width]: half the channels for x, half for y."""
    table = build_sincos2d_pos_embed([grid, grid], width)
    # timm lays the channels out as (sine or cosine, y or x, frequency), MAE as (x or y, ...)
    table = rearrange(table, "n (s c f) -> 1 n c s f", s=2, c=2)
    return table.flip(2).flatten(2)


def vit_block(width: int, heads: int) -> Block:
    """timm's pre-norm transformer block as ViT and MAE have it: biases, MLP x 4, eps 1e-6."""
    return Block(width, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform linear layers, zero biases, identity norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_encoder(config: EncoderConfig, image_size: int) -> Encoder:
    """The student of a configuration, with the weights of ``encoder.checkpoint`` if it names some.

    Raises:
        UserError: sizes that do not fit each other or the checkpoint.
    """
    require(
        image_size % config.patch_size == 0,
        f"data.image_size {image_size} is not divisible by encoder.patch_size {config.patch_size}",
    )
    shape = EncoderShape(*config.shape, config.patch_size, image_size)
    config.check_grid(image_size // config.patch_size, "of data.image_size and encoder.patch_size")
    if config.checkpoint:
        return load_encoder(config.checkpoint, "encoder.checkpoint", shape)
    return Encoder(shape)


def export_header(encoder: Encoder, **more: object) -> dict[str, str]:
    """Metadata of ``encoder.safetensors``: JSON with the shape and what else there is to know."""
    return {"encoder": json.dumps({**asdict(encoder.shape), **more})}


def load_encoder(
    path: str | Path,
    option: str = "",
    shape: EncoderShape | None = None,
    say: Callable[[str], None] = print,
) -> Encoder:
    """Rebuild a stage-1 encoder from its file, or from the run folder that holds it.

    Args:
        path: ``encoder.safetensors``, the folder of a run of stage 1 (its newest checkpoint, as
            long as it has not ended), or a state dict of such a ViT, MAE's for example.
        option: that the path was given by, for messages.
        shape: what it has to be; None for whatever it is.
        say: told where the weights are not those of the run's end.

    Raises:
        UserError: missing, damaged, no encoder, or one of another shape.
        OSError: the machine cannot read it.
    """
    found = find_weights(path, TAKES, option)
    if found.note:
        say(found.note)
    weights = read_weights(found.file, TAKES, option)
    what = f"{option} {found.file}".strip()
    own = encoder_shape(weights, what, TAKES.remedy(option), shape and shape.heads)
    require(
        shape is None or own == shape,
        f"{what} is an encoder with {own.words()}, and the configuration asks for "
        f"{shape and shape.words()}; set encoder.name (or width, depth and heads), "
        "encoder.patch_size and data.image_size to its own",
    )
    with torch.device("meta"):
        encoder = Encoder(own)
    does_not = f"{what} does not fit an encoder with {own.words()}"
    load_strictly(encoder, weights.tensors, does_not, TAKES.remedy(option))
    return encoder


def encoder_shape(
    weights: Weights, what: str, remedy: str, heads: int | None = None
) -> EncoderShape:
    """What an encoder is: by its header, or by its tensors where others wrote it.

    Args:
        heads: their number, which tensors do not tell; None for width / 64, as in all ViTs of the
            papers.

    Raises:
        UserError: it is no such ViT.
    """
    try:
        header = weights.header("encoder")
        if header is not None:
            shape = EncoderShape(**{one.name: header[one.name] for one in fields(EncoderShape)})
        else:
            width, _, patch, _ = weights.tensors["patch_embed.proj.weight"].shape
            grid = round((weights.tensors["pos_embed"].shape[1] - 1) ** 0.5)
            names = {n.split(".")[1] for n in weights.tensors if n.startswith("blocks.")}
            heads = heads or width // HEAD_WIDTH
            shape = EncoderShape(width, len(names), heads, patch, grid * patch)
        if min(vars(shape).values()) <= 0 or shape.width % shape.heads:
            raise ValueError(shape.words())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        told = f"no {error.args[0]}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{what} is not an encoder of stage 1 ({told}); {remedy}") from error
    return shape
