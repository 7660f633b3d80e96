"""The student: a plain ViT of which only the visible tokens go through the blocks.

Built from timm's parts under timm's parameter names, so that the exported weights load strictly
into timm's ``vit_tiny_patch16_224`` (``num_classes=0``) and its relatives.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from sami.core.config import PATH, require
from sami.core.errors import UserError
from sami.core.images import patchify
from sami.sam_encoder import SAM_SHAPES

# width, depth, heads: EfficientSAM's released Ti and S, the paper's B, and SAM's own
SHAPES = {
    "vit_ti": (192, 12, 3),
    "vit_s": (384, 12, 6),
    "vit_b": (768, 12, 12),
    "custom": (64, 2, 2),
    **SAM_SHAPES,
}


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
        checkpoint: encoder.safetensors, or a run folder with one, to start from; in stage 2 also
            a model (model.safetensors, released .pt, SAM's .pth); null for none.
    """

    name: str = "vit_ti"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int = 16
    checkpoint: str | None = field(default=None, metadata=PATH)

    def check(self) -> None:
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
            width % heads == 0, f"encoder.width {width} is not divisible by encoder.heads {heads}"
        )
        require(
            width % 4 == 0,
            f"encoder.width {width} must be divisible by 4 for its sine-cosine positions",
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
    encoder = Encoder(EncoderShape(*config.shape, config.patch_size, image_size))
    if config.checkpoint is not None:
        start = load_encoder(config.checkpoint)
        require(
            start.shape == encoder.shape,
            f"encoder.checkpoint {config.checkpoint} holds {start.shape}, the configuration asks "
            f"for {encoder.shape}",
        )
        encoder.load_state_dict(start.state_dict())
    return encoder


def export_header(encoder: Encoder, **more: object) -> dict[str, str]:
    """Metadata of ``encoder.safetensors``: JSON with the shape and what else there is to know."""
    return {"encoder": json.dumps({**asdict(encoder.shape), **more})}


def load_encoder(path: str | Path) -> Encoder:
    """Rebuild a stage-1 encoder from ``encoder.safetensors`` or the run folder that holds it.

    Raises:
        UserError: missing, damaged, or not an encoder of ours.
    """
    path = Path(path)
    file = path / "encoder.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UserError(
            f"{file} does not exist; a stage 1 run writes it when it finishes (python "
            "sami/pretrain.py)"
        )
    try:
        with safe_open(file, framework="pt") as stored:
            header = (stored.metadata() or {}).get("encoder")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        header = json.loads(header or "null")
        encoder = Encoder(
            EncoderShape(**{item.name: header[item.name] for item in fields(EncoderShape)})
        )
        encoder.load_state_dict(tensors)
    except (SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} is not an encoder of stage 1 ({what}); give the encoder.safetensors of a run"
        ) from error
    return encoder
