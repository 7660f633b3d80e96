"""SAM's image encoder as a frozen teacher.

The modules and weights are segment-anything's; the forward pass here is the same function (to
1e-4, tested) at any picture size, with ``scaled_dot_product_attention`` instead of an explicit
softmax over all pairs of tokens.
"""

import hashlib
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

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

from sami.core.config import require
from sami.core.errors import UserError
from sami.core.images import Normalise

# width, depth, heads, blocks with global attention, official file
SIZES = {
    "sam_vit_h": (1280, 32, 16, (7, 15, 23, 31), "sam_vit_h_4b8939.pth"),
    "sam_vit_l": (1024, 24, 16, (5, 11, 17, 23), "sam_vit_l_0b3195.pth"),
    "sam_vit_b": (768, 12, 12, (2, 5, 8, 11), "sam_vit_b_01ec64.pth"),
}
DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything/"
CUSTOM = (64, 4, 4)  # width, depth, heads of "custom"
NATIVE_SIZE = 1024  # pixels; SAM's own input, for which its absolute positions are stored
PATCH_SIZE, NECK_CHANNELS, WINDOW = 16, 256, 14


@dataclass
class TeacherConfig:
    """SAM's image encoder, frozen.

    Attributes:
        name: sam_vit_h, sam_vit_l, sam_vit_b; custom, the same architecture at width, depth and
            heads (small by default); none, where the target is pixels.
        checkpoint: the official .pth; or random, which a run reports loudly.
        image_size: side in pixels of the picture that the teacher sees.
        layer: neck, 256 channels; trunk, the last block's output at the encoder's width.
        pool: how its grid is brought to the student's. area averages (torch's adaptive average
            pooling); bilinear is antialiased.
        width: of custom.
        depth: of custom.
        heads: of custom.
    """

    name: Literal["sam_vit_h", "sam_vit_l", "sam_vit_b", "custom", "none"] = "sam_vit_h"
    checkpoint: str = ""
    image_size: int = 224
    layer: Literal["neck", "trunk"] = "neck"
    pool: Literal["area", "bilinear"] = "area"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None

    def check(self) -> None:
        if self.name == "none":
            return
        require(
            self.image_size > 0 and self.image_size % PATCH_SIZE == 0,
            f"teacher.image_size {self.image_size} must be a positive multiple of {PATCH_SIZE}, "
            "such as 224 or 1024",
        )
        given = [name for name in ("width", "depth", "heads") if getattr(self, name) is not None]
        require(
            self.name == "custom" or not given,
            f"teacher.{given[0] if given else ''} goes with teacher.name custom; leave it out "
            f"for {self.name}",
        )
        width, depth, heads = self.shape
        require(min(width, depth, heads) > 0, "teacher.width, depth and heads must be positive")
        require(
            width % heads == 0, f"teacher.width {width} is not divisible by teacher.heads {heads}"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        if self.name != "custom":
            return SIZES[self.name][:3]
        return tuple(
            own if given is None else given
            for own, given in zip(CUSTOM, (self.width, self.depth, self.heads), strict=True)
        )

    @property
    def channels(self) -> int:
        """Of the features: 256 after the neck, the width of the trunk before it."""
        return NECK_CHANNELS if self.layer == "neck" else self.shape[0]


class Teacher(nn.Module):
    """From pictures to features: frozen, without gradients, in eval mode whatever happens."""

    def __init__(
        self, encoder: ImageEncoderViT, layer: str = "neck", image_size: int = NATIVE_SIZE
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.layer, self.image_size = layer, image_size
        self.normalise = Normalise()
        self._tables: dict[tuple, list[tuple[torch.Tensor, torch.Tensor] | None]] = {}
        self._positions: dict[tuple, torch.Tensor] = {}
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures of any shape up to ``image_size``.

        Args:
            images: [B, 3, H, W], uint8 or 0..1. Shorter sides are padded on the right and below
                after normalisation, as SAM does.

        Returns:
            [B, C, s, s] with s = image_size / 16; C is 256 (neck) or the trunk's width.
        """
        height, width = images.shape[2:]
        if max(height, width) > self.image_size:
            raise ValueError(
                f"pictures of {height}x{width} pixels are larger than teacher.image_size "
                f"{self.image_size}"
            )
        images = F.pad(
            self.normalise(images), (0, self.image_size - width, 0, self.image_size - height)
        )
        return self.features(images)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder itself: normalised [B, 3, H, W], sides multiples of 16, to [B, C, h, w]."""
        vit = self.encoder
        x = vit.patch_embed(images)  # [B, h, w, D]
        x = x + self._absolute_positions(x)
        for block, tables in zip(vit.blocks, self._relative_positions(x), strict=True):
            x = _block(block, x, tables)
        x = x.permute(0, 3, 1, 2)
        return vit.neck(x) if self.layer == "neck" else x

    def _absolute_positions(self, x: torch.Tensor) -> torch.Tensor:
        """SAM's positions [1, 64, 64, D] resized (bicubic) to the grid of ``x`` [B, h, w, D]."""
        stored = self.encoder.pos_embed
        key = (*x.shape[1:3], x.device, x.dtype, stored.data_ptr(), stored._version)
        if key not in self._positions:
            self._positions = {
                key: resize_positions(self.encoder.pos_embed, *x.shape[1:3]).to(x.dtype)
            }
        return self._positions[key]

    def _relative_positions(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per block the tables [q, k, d] of rows and columns, interpolated by ``get_rel_pos``."""
        stored = [b.attn.rel_pos_h for b in self.encoder.blocks]
        key = (*x.shape[1:3], x.device, tuple((t.data_ptr(), t._version) for t in stored))
        if key not in self._tables:
            tables = []
            for block in self.encoder.blocks:
                height, width = (block.window_size,) * 2 if block.window_size else x.shape[1:3]
                with torch.autocast(x.device.type, enabled=False):
                    rows = get_rel_pos(height, height, block.attn.rel_pos_h)
                    columns = get_rel_pos(width, width, block.attn.rel_pos_w)
                tables.append((rows, columns))
            self._tables = {key: tables}
        return self._tables[key]


def resize_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Absolute positions [1, H, W, D] at another grid [1, height, width, D], bicubic."""
    if positions.shape[1:3] == (height, width):
        return positions
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def to_grid(features: torch.Tensor, grid: int, pool: str) -> torch.Tensor:
    """Features [B, C, h, w] brought to the student's grid, as tokens [B, grid * grid, C]."""
    if features.shape[2:] != (grid, grid):
        options = {"mode": "area"} if pool == "area" else {"mode": "bilinear", "antialias": True}
        features = F.interpolate(features.float(), (grid, grid), **options)
    return rearrange(features, "b c h w -> b (h w) c")


def build_sam_encoder(
    width: int, depth: int, heads: int, global_blocks: tuple[int, ...]
) -> ImageEncoderViT:
    """segment-anything's image encoder as its own ``build_sam`` puts it together."""
    return ImageEncoderViT(
        img_size=NATIVE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4,
        out_chans=NECK_CHANNELS,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=WINDOW,
        global_attn_indexes=global_blocks,
    )


def load_teacher(config: TeacherConfig) -> Teacher:
    """The frozen teacher of a configuration.

    Raises:
        UserError: no checkpoint, or one that does not fit strictly.
    """
    require(
        config.name != "none",
        "teacher.name none gives no features; choose sam_vit_h, sam_vit_l or sam_vit_b",
    )
    width, depth, heads = config.shape
    blocks = (
        SIZES[config.name][3]
        if config.name in SIZES
        else tuple((i + 1) * depth // 4 - 1 for i in range(4))
    )
    if config.checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # one and the same random teacher in every run and process
            encoder = build_sam_encoder(width, depth, heads, blocks)
    else:
        path = _checkpoint_path(config)
        with torch.device("meta"):
            encoder = build_sam_encoder(width, depth, heads, blocks)
        _load_strictly(encoder, path, config.name)
    return Teacher(encoder, config.layer, config.image_size)


def describe_teacher(config: TeacherConfig, teacher: Teacher) -> dict[str, object]:
    """Name, sha256 and whether random, for the summary of a run.

    The hash is that of the file; a random teacher's is taken over its tensors.
    """
    random = config.checkpoint == "random"
    digest = hashlib.sha256()
    if random:
        for name, tensor in sorted(teacher.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    else:
        with open(config.checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return {
        "name": config.name,
        "checkpoint": config.checkpoint,
        "sha256": digest.hexdigest(),
        "random": random,
        "image_size": config.image_size,
        "layer": config.layer,
    }


def _checkpoint_path(config: TeacherConfig) -> Path:
    file = SIZES[config.name][4] if config.name in SIZES else "a checkpoint of that shape"
    remedy = (
        f"fetch {DOWNLOADS}{file}, put it at checkpoints/{file} and set teacher.checkpoint to "
        "that path"
        if config.name in SIZES
        else "give the .pth of a SAM of that shape"
    )
    ask_random = "(or ask for an untrained teacher by name: teacher.checkpoint=random)"
    require(bool(config.checkpoint), f"teacher.checkpoint is empty; {remedy} {ask_random}")
    path = Path(config.checkpoint)
    require(path.is_file(), f"teacher.checkpoint {path} does not exist; {remedy} {ask_random}")
    return path


def _load_strictly(encoder: ImageEncoderViT, path: Path, name: str) -> None:
    """Official SAM weights into the encoder; every tensor has to be there in its shape."""
    right = (
        f"for {name} fetch {DOWNLOADS}{SIZES[name][4]}"
        if name in SIZES
        else "give a SAM of the configured shape"
    )
    right += " and point teacher.checkpoint at it"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher.checkpoint {path} is not a readable .pth or is cut short; {right}"
        ) from error
    prefix = "image_encoder."
    tensors = {}
    if isinstance(state, dict):
        tensors = {
            key[len(prefix) :]: value for key, value in state.items() if str(key).startswith(prefix)
        }
    expected = encoder.state_dict()
    problems = [f"{prefix}{key} is missing" for key in expected if key not in tensors]
    problems += [f"{prefix}{key} is not part of {name}" for key in tensors if key not in expected]
    problems += [
        f"{prefix}{key} is {list(value.shape)}, {name} has {list(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if problems:
        raise UserError(
            f"teacher.checkpoint {path} does not fit {name}: {problems[0]}"
            f"{f' and {len(problems) - 1} more' if len(problems) > 1 else ''}; {right}"
        )
    encoder.load_state_dict(
        {key: value.float().clone() for key, value in tensors.items()}, assign=True
    )


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
