"""SAM's image encoder at any image size.

The modules, names and weights are segment-anything's; the forward pass here is the same function
(to 1e-4, tested), with ``scaled_dot_product_attention`` instead of an explicit softmax over all
pairs of tokens.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from einops import rearrange
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from sami.core.config import require
from sami.core.weights import Weights
from sami.encoders.files import read_shape
from sami.encoders.protocol import EncoderShape, FromShape, ImageEncoder, token_map
from sami.encoders.registry import ENCODERS, KINDS, TEACHERS, Architecture, TeacherSource, build
from sami.encoders.vit import count_blocks

# width, depth, heads
SAM_SHAPES = {
    "sam_vit_h": (1280, 32, 16),
    "sam_vit_l": (1024, 24, 16),
    "sam_vit_b": (768, 12, 12),
}
CUSTOM = (64, 4, 4)  # of teacher.name custom: small enough for a test on a CPU
NATIVE_SIZE = 1024  # pixels; SAM's own input, for which its absolute positions are stored
PATCH_SIZE, WINDOW = 16, 14
DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {  # SAM's files
    "sam_vit_h": "sam_vit_h_4b8939.pth",
    "sam_vit_l": "sam_vit_l_0b3195.pth",
    "sam_vit_b": "sam_vit_b_01ec64.pth",
}


class SamEncoder(FromShape, ImageEncoderViT):
    """segment-anything's image encoder as its own ``build_sam`` puts it together."""

    def __init__(self, shape: EncoderShape, global_blocks: tuple[int, ...] | None = None) -> None:
        """
        Args:
            global_blocks: those that see the whole image; the last of each quarter, as in SAM,
                if None.
        """
        depth = shape.depth
        if global_blocks is None:
            global_blocks = tuple((i + 1) * depth // 4 - 1 for i in range(4))
        super().__init__(
            img_size=shape.grid * shape.patch_size,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            depth=depth,
            num_heads=shape.heads,
            mlp_ratio=4,
            out_chans=shape.channels,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=global_blocks,
        )
        self.take_shape(shape)
        self.flex = False  # FlexAttention in the global blocks; on a GPU it is compiled
        self._tables: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._positions: dict[tuple, torch.Tensor] = {}

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised [B, 3, H, W], sides multiples of the patch size, to [B, C, h, w]."""
        return self.neck(token_map(self, images))

    def tokens(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The last block's output [B, N, D]; SAM sees whole images alone."""
        if visible is not None:
            raise ValueError("SAM's encoder has windows and does not take visible patches alone")
        x = self.patch_embed(images)  # [B, h, w, D]
        x = x + self._absolute_positions(x)
        for block, tables in zip(self.blocks, self._relative_positions(x), strict=True):
            if self.checkpointing and self.training:
                x = checkpoint(_block, block, x, tables, self.flex, use_reentrant=False)
            else:
                x = _block(block, x, tables, self.flex)
        return x.flatten(1, 2)

    @staticmethod
    def infer(tensors: dict[str, torch.Tensor], heads: int | None) -> EncoderShape | None:
        """The shape that these tensors have; None if they are not SAM's."""
        patches, positions = (tensors.get(n) for n in ("patch_embed.proj.weight", "pos_embed"))
        if patches is None or positions is None or positions.ndim != 4:
            return None
        width, _, patch, _ = patches.shape
        grid, channels = positions.shape[1], tensors["neck.0.weight"].shape[0]
        heads = width // tensors["blocks.0.attn.rel_pos_h"].shape[1]
        depth = count_blocks(tensors)
        return EncoderShape("sam", width, depth, heads, patch, grid * patch, grid, channels)

    def _absolute_positions(self, x: torch.Tensor) -> torch.Tensor:
        """The stored positions [1, H, W, D] resized (bicubic) to the grid of ``x`` [B, h, w, D]."""
        stored = self.pos_embed
        if torch.is_grad_enabled() and stored.requires_grad:
            return resize_positions(stored, *x.shape[1:3]).to(x.dtype)
        key = (*x.shape[1:3], x.device, x.dtype, stored.untyped_storage()._cdata, stored._version)
        if key not in self._positions:
            self._positions = {key: resize_positions(stored, *x.shape[1:3]).to(x.dtype)}
        return self._positions[key]

    def _relative_positions(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per block the tables [q, k, d] of rows and columns, interpolated by ``get_rel_pos``."""
        stored = [block.attn.rel_pos_h for block in self.blocks]
        if torch.is_grad_enabled() and any(table.requires_grad for table in stored):
            return [self._tables_of(block, x) for block in self.blocks]
        key = (
            *x.shape[1:3],
            x.device,
            tuple((t.untyped_storage()._cdata, t._version) for t in stored),
        )
        if key not in self._tables:
            self._tables = {key: [self._tables_of(block, x) for block in self.blocks]}
        return self._tables[key]

    @staticmethod
    def _tables_of(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = (block.window_size,) * 2 if block.window_size else x.shape[1:3]
        with torch.autocast(x.device.type, enabled=False):
            rows = get_rel_pos(height, height, block.attn.rel_pos_h)
            columns = get_rel_pos(width, width, block.attn.rel_pos_w)
        return rows, columns


def sam_shape(width: int, depth: int, heads: int, image_size: int = NATIVE_SIZE) -> EncoderShape:
    """SAM's at other sizes, with positions for its own input."""
    grid = image_size // PATCH_SIZE
    return EncoderShape("sam", width, depth, heads, PATCH_SIZE, image_size, grid)


def build_sam(config: Any, weights: Weights | None, what: str, remedy: str) -> ImageEncoder:
    """SAM's encoder at the configured sizes; or a model of ours, which brings its own.

    Raises:
        UserError: a model of another shape than the configuration names.
    """
    positions = weights and weights.tensors.get("image_encoder.pos_embed")
    released = positions is not None and positions.ndim == 3  # EfficientSAM's
    if weights is None or (weights.kind is None and not released):
        with torch.device("cpu" if weights is None else "meta"):
            return SamEncoder(sam_shape(*config.shape))
    shape = read_shape(weights, "model", what, remedy)
    own = (shape.width, shape.depth, shape.heads)
    for name, value in zip(("width", "depth", "heads"), own, strict=True):
        given = getattr(config, name)
        require(
            given in (None, value),
            f"teacher.{name} {given} differs from the {value} of {what}; leave it out",
        )
    require(
        config.name == "custom" or own == config.shape,
        f"{what} is no {config.name}; set --teacher.name custom for a model of your own",
    )
    with torch.device("meta"):
        return build(shape)


KINDS["sam"] = SamEncoder
ENCODERS |= {name: Architecture("sam", *sizes) for name, sizes in SAM_SHAPES.items()}
TEACHERS |= {
    name: TeacherSource(
        build_sam,
        PATCH_SIZE,
        sizes,
        f"SAM's .pth, here {DOWNLOADS}{OFFICIAL[name]} (put it at checkpoints/{OFFICIAL[name]} and "
        "name that path)",
    )
    for name, sizes in SAM_SHAPES.items()
} | {
    "custom": TeacherSource(
        build_sam,
        PATCH_SIZE,
        CUSTOM,
        "the .pth of a SAM of that shape, the folder of a run of stage 2 (python "
        "finetune/train.py ...), its model.safetensors or a released .pt",
        shape_in_file=True,
    )
}


def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Absolute positions [1, H, W, D] at another grid [1, height, width, D], bicubic."""
    if positions.shape[1:3] == (height, width):
        return positions
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def _block(
    block: Block, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], flex: bool
) -> torch.Tensor:
    """segment-anything's ``Block.forward`` on [B, h, w, D] with the attention below."""
    x = x + _attention(block.attn, block.norm1(x), tables, block.window_size, flex)
    return x + block.mlp(block.norm2(x))


def _attention(
    attn: Attention,
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    window: int,
    flex: bool,
) -> torch.Tensor:
    """segment-anything's ``Attention.forward`` on [B, h, w, D], in windows unless ``window`` is 0.

    The tokens that fill the last windows up are zeros before the projection, so their queries, keys
    and values are its bias: they are seen, as in segment-anything, and never computed.
    """
    height, width = x.shape[1:3]
    rows = columns = 1
    qkv = attn.qkv(x)  # [B, h, w, 3 n d]
    if window:
        rows, columns = -(-height // window), -(-width // window)
        if (rows * window, columns * window) != (height, width):
            bias = attn.qkv.bias.to(qkv.dtype)
            filled = bias.expand(len(x), rows * window, columns * window, -1).clone()
            filled[:, :height, :width] = qkv
            qkv = filled
    q, k, v = rearrange(
        qkv,
        "b (y h) (x w) (three n d) -> three (b y x) n h w d",
        three=3,
        n=attn.num_heads,
        y=rows,
        x=columns,
    )
    attend = _flex_attention if flex and not window else _masked_attention
    out = attend(q, k, v, *(table.to(q.dtype) for table in tables))
    out = rearrange(out, "(b y x) n h w d -> b (y h) (x w) (n d)", y=rows, x=columns)
    return attn.proj(out[:, :height, :width])


def _relative(
    q: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's decomposed relative positions of [B, n, h, w, d]: [B, n, h, w, kh], [B, n, h, w, kw].

    Args:
        rows: [h, h, d], columns: [w, w, d]: by query and key, what the query is multiplied with.
    """
    by_row = q @ rows.transpose(1, 2)
    return by_row, (q.transpose(2, 3) @ columns.transpose(1, 2)).transpose(2, 3)


def _masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Attention within [B, n, h, w, d], the relative positions of all pairs as its mask."""
    by_row, by_column = _relative(q, rows, columns)
    bias = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), attn_mask=bias
    )
    return out.unflatten(2, q.shape[2:4])


def _flex_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The same without that mask: each pair's position is looked up where its score is made."""
    by_row, by_column = (x.flatten(2, 3).contiguous() for x in _relative(q, rows, columns))
    width = q.shape[3]

    def add(
        score: torch.Tensor, b: torch.Tensor, n: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        return score + by_row[b, n, i, j // width] + by_column[b, n, i, j % width]

    attend = _compiled_flex() if q.device.type == "cuda" else flex_attention
    out = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), score_mod=add)
    return out.unflatten(2, q.shape[2:4])


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)
