"""SAM's image encoder at any picture size.

The modules, names and weights are segment-anything's; the forward pass here is the same function
(to 1e-4, tested), with ``scaled_dot_product_attention`` instead of an explicit softmax over all
pairs of tokens.
"""

from functools import partial

import torch
from einops import rearrange
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# width, depth, heads
SAM_SHAPES = {
    "sam_vit_h": (1280, 32, 16),
    "sam_vit_l": (1024, 24, 16),
    "sam_vit_b": (768, 12, 12),
}
NATIVE_SIZE = 1024  # pixels; SAM's own input, for which its absolute positions are stored
PATCH_SIZE, NECK_CHANNELS, WINDOW = 16, 256, 14


class SamEncoder(ImageEncoderViT):
    """segment-anything's image encoder as its own ``build_sam`` puts it together."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        img_size: int = NATIVE_SIZE,
        patch_size: int = PATCH_SIZE,
        channels: int = NECK_CHANNELS,
        global_blocks: tuple[int, ...] | None = None,
    ) -> None:
        """
        Args:
            img_size: side in pixels of the picture that the stored positions are for.
            channels: of the neck.
            global_blocks: those that see the whole picture; the last of each quarter, as in SAM,
                if None.
        """
        if global_blocks is None:
            global_blocks = tuple((i + 1) * depth // 4 - 1 for i in range(4))
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=4,
            out_chans=channels,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=WINDOW,
            global_attn_indexes=global_blocks,
        )
        self.width, self.depth, self.patch_size, self.channels = width, depth, patch_size, channels
        self.checkpointing = False  # recompute the blocks in the backward pass
        self._tables: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._positions: dict[tuple, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised [B, 3, H, W], sides multiples of the patch size, to [B, C, h, w]."""
        return self.neck(self.trunk(images))

    def trunk(self, images: torch.Tensor) -> torch.Tensor:
        """What the neck gets, the last block's output [B, D, h, w]."""
        x = self.patch_embed(images)  # [B, h, w, D]
        x = x + self._absolute_positions(x)
        for block, tables in zip(self.blocks, self._relative_positions(x), strict=True):
            if self.checkpointing and self.training:
                x = checkpoint(_block, block, x, tables, use_reentrant=False)
            else:
                x = _block(block, x, tables)
        return x.permute(0, 3, 1, 2)

    def _absolute_positions(self, x: torch.Tensor) -> torch.Tensor:
        """The stored positions [1, H, W, D] resized (bicubic) to the grid of ``x`` [B, h, w, D]."""
        stored = self.pos_embed
        if torch.is_grad_enabled() and stored.requires_grad:
            return resize_positions(stored, *x.shape[1:3]).to(x.dtype)
        key = (*x.shape[1:3], x.device, x.dtype, stored.data_ptr(), stored._version)
        if key not in self._positions:
            self._positions = {key: resize_positions(stored, *x.shape[1:3]).to(x.dtype)}
        return self._positions[key]

    def _relative_positions(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per block the tables [q, k, d] of rows and columns, interpolated by ``get_rel_pos``."""
        stored = [block.attn.rel_pos_h for block in self.blocks]
        if torch.is_grad_enabled() and any(table.requires_grad for table in stored):
            return [self._tables_of(block, x) for block in self.blocks]
        key = (*x.shape[1:3], x.device, tuple((t.data_ptr(), t._version) for t in stored))
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


def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Absolute positions [1, H, W, D] at another grid [1, height, width, D], bicubic."""
    if positions.shape[1:3] == (height, width):
        return positions
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def _block(
    block: Block, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """segment-anything's ``Block.forward`` on [B, h, w, D] with the attention below."""
    normed = block.norm1(x)
    if block.window_size > 0:
        windows, padded = window_partition(normed, block.window_size)
        attended = window_unpartition(
            _attention(block.attn, windows, tables), block.window_size, padded, x.shape[1:3]
        )
    else:
        attended = _attention(block.attn, normed, tables)
    x = x + attended
    return x + block.mlp(block.norm2(x))


def _attention(
    attn: Attention, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """segment-anything's ``Attention.forward`` on [B, h, w, D], its decomposed bias as a mask."""
    batch, height, width, _ = x.shape
    qkv = rearrange(
        attn.qkv(x), "b h w (three n d) -> three b n (h w) d", three=3, n=attn.num_heads
    )
    q, k, v = qkv.unbind(0)
    rows, columns = (table.to(q.dtype) for table in tables)
    grid = q.unflatten(2, (height, width))  # [B, n, h, w, d]
    by_row = grid @ rows.transpose(1, 2)  # [B, n, h, w, kh]
    by_column = (
        (grid.transpose(2, 3) @ columns.transpose(1, 2)).transpose(2, 3).contiguous()
    )  # [B, n, h, w, kw]
    bias = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).reshape(
        batch, attn.num_heads, height * width, -1
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attn.proj(rearrange(out, "b n (h w) d -> b h w (n d)", h=height))
