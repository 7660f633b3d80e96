"""The plain ViT of both stages, with global attention in all blocks.

One class has both stages' forms. They share patch embedding, stored positions and blocks, so that
stage 2 starts from stage 1's tensors by name, and differ in what stands before and behind:

- stage 1 (``shape.channels`` None): timm's names, so that the exported weights load strictly into
  timm's ``vit_tiny_patch16_224`` (``num_classes=0``) and its relatives. A class token, MAE's fixed
  positions, for one input size, and a last norm; patches that are not visible are not computed;
- stage 2: the released EfficientSAM's names. A neck, positions that are trained and resized to the
  input's grid; neither class token nor last norm.
"""

from functools import partial

import torch
from einops import rearrange
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sami.core.images import patchify
from sami.encoders.protocol import EncoderShape, FromShape, token_map
from sami.encoders.registry import ENCODERS, KINDS, Architecture

HEAD_WIDTH = 64  # of an attention head in all ViTs of the papers
# Tensors of timm's and MAE's files that are no part of the encoder.
BEHIND = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "decoder_", "mask_token")
RELEASED_SIZE = 1024  # pixels; the input of the released models, which no tensor tells


class Vit(FromShape, nn.Module):
    """A ViT in the form of stage 1 or stage 2; see above."""

    pretrains = True

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.take_shape(shape)
        width, channels = shape.width, shape.channels
        how = {"embed_dim": width, "flatten": False, "strict_img_size": False}
        self.patch_embed = PatchEmbed(shape.image_size, shape.patch_size, **how)
        self.cls_token = self.norm = self.neck = None
        if channels is None:
            self.cls_token, self.class_tokens = nn.Parameter(torch.zeros(1, 1, width)), 1
        # The first position is the class token's. Stage 2's files keep its place without using it;
        # stage 1 does not train any (MAE, section 3).
        positions = torch.zeros(1, 1 + shape.grid**2, width)
        positions[:, 1:] = sincos_positions(shape.grid, width)
        self.pos_embed = nn.Parameter(positions, requires_grad=channels is not None)
        self.blocks = nn.Sequential(*[vit_block(width, shape.heads) for _ in range(shape.depth)])
        if channels is None:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.neck = nn.Sequential(
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
        self.apply(initialise)
        # As a linear layer, like MAE.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def tokens(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`sami.encoders.protocol.ImageEncoder`; in stage 1 behind the last norm."""
        if self.cls_token is not None:
            x = self._embed_visible(images, visible)
        elif visible is None:
            x = self._embed(images)
        else:
            raise ValueError("only stage 1's form of a ViT sees visible patches alone")
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.norm is None else self.norm(x)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] normalised to [B, C, h, w]."""
        maps = token_map(self, images)
        return maps if self.neck is None else self.neck(maps)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The stored positions at another grid, [1, D, h, w]."""
        stored = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=self.shape.grid)
        return F.interpolate(stored, (height, width), mode="bicubic", align_corners=False)

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """All patches at the positions of the images' own grid: [B, N, D]."""
        maps = self.patch_embed(images)
        return rearrange(maps + self.positions(*maps.shape[2:]), "b d h w -> b (h w) d")

    def _embed_visible(self, images: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """The class token and the visible patches: [B, 1 + V, D]."""
        size = self.shape.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(
                f"the encoder was built for {size}x{size} images and got {tuple(images.shape)}"
            )
        patches = patchify(images, self.shape.patch_size)
        positions = self.pos_embed[:, 1:].expand(len(images), -1, -1)
        if visible is not None:  # patches that are not seen are not even embedded
            patches, positions = (gather_tokens(x, visible) for x in (patches, positions))
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    @staticmethod
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """timm's or MAE's ViT with a class token, without what stands behind its last norm:
        classifier, MAE's decoder."""
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= tensors.keys():
            return None
        return {name: t for name, t in tensors.items() if not name.startswith(BEHIND)}

    @staticmethod
    def infer(tensors: dict[str, torch.Tensor], heads: int | None) -> EncoderShape | None:
        """The shape that these tensors have; None if they are no such ViT's.

        Args:
            heads: their number, which tensors do not tell; None for width / 64, as in all ViTs of
                the papers.
        """
        patches, positions = (tensors.get(n) for n in ("patch_embed.proj.weight", "pos_embed"))
        if patches is None or positions is None or positions.ndim != 3:
            return None
        width, _, patch, _ = patches.shape
        depth, heads = count_blocks(tensors), heads or width // HEAD_WIDTH
        grid = round((positions.shape[1] - 1) ** 0.5)
        if "neck.0.weight" not in tensors:
            return EncoderShape.stage_one(width, depth, heads, patch, grid * patch)
        channels = tensors["neck.0.weight"].shape[0]
        return EncoderShape("vit", width, depth, heads, patch, RELEASED_SIZE, grid, channels)


KINDS["vit"] = Vit
ENCODERS |= {  # EfficientSAM's released Ti and S, the paper's B
    "vit_ti": Architecture("vit", 192, 12, 3),
    "vit_s": Architecture("vit", 384, 12, 6),
    "vit_b": Architecture("vit", 768, 12, 12),
    "custom": Architecture("vit", 64, 2, 2),  # small enough for a test on a CPU
}


def gather_tokens(tokens: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, D] at the given numbers [B, K]: [B, K, D]."""
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def count_blocks(tensors: dict[str, torch.Tensor]) -> int:
    """How many blocks (``blocks.<n>.*``) these tensors are of."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


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
