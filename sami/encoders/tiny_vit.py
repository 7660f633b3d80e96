"""TinyViT as MobileSAM has it (Faster Segment Anything, section 3.2): convolutions, then windows of
attention, at a stride of 16 in its last two stages.

The modules and names are timm's, without the classification head. MobileSAM's files and timm's
ImageNet weights load: :meth:`TinyVit.rename` brings MobileSAM's names to timm's. The function is
MobileSAM's to 1e-4 (tested).
"""

import re
from typing import Any

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import Attention
from timm.models.tiny_vit import TinyVit as PackageTinyVit
from torch import nn
from torch.utils.checkpoint import checkpoint

from sami.core.config import require
from sami.core.weights import Weights
from sami.encoders.files import read_shape
from sami.encoders.protocol import EncoderShape, FromShape, ImageEncoder
from sami.encoders.registry import ENCODERS, KINDS, TEACHERS, Architecture, TeacherSource

STRIDE = 16
# By the last stage's width: widths, depths, attention heads and windows of the four stages. The
# last is small enough for a test on a CPU.
STAGES = {
    320: ((64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)),
    448: ((64, 128, 256, 448), (2, 2, 6, 2), (2, 4, 8, 14), (7, 7, 14, 7)),
    576: ((96, 192, 384, 576), (2, 2, 6, 2), (3, 6, 12, 18), (7, 7, 14, 7)),
    64: ((16, 32, 48, 64), (1, 1, 2, 1), (1, 2, 3, 4), (7, 7, 14, 7)),
}
SIZES = (320, 12, 10)  # width, depth and heads of TinyViT-5M
RENAMED = (  # MobileSAM's names and timm's
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"\.c\.", ".conv."),
)


class TinyVit(FromShape, PackageTinyVit):
    """timm's, the last downsampling at stride 1 and SAM's neck in place of the head.

    Batch normalisation depends on which images share a forward. With ``frozen_statistics`` it
    keeps what it has, as a start from trained weights wants it where batches are of an image or
    two.
    """

    def __init__(self, shape: EncoderShape) -> None:
        """
        Raises:
            UserError: of no size that there is.
        """
        known = {width: (sum(depths), heads[-1]) for width, (_, depths, heads, _) in STAGES.items()}
        names = [name for name, one in ENCODERS.items() if one.kind == "tiny_vit"]
        require(
            known.get(shape.width) == (shape.depth, shape.heads) and shape.patch_size == STRIDE,
            f"encoder.width, depth, heads and patch_size of a TinyViT are those of {names}; leave "
            "them out",
        )
        widths, depths, heads, windows = STAGES[shape.width]
        with torch.device("cpu"):  # also on the meta device: timm reads numbers off a tensor
            super().__init__(
                num_classes=0,
                embed_dims=widths,
                depths=depths,
                num_heads=heads,
                window_sizes=windows,
                drop_path_rate=0.0,
            )
        self.head = nn.Identity()
        self.take_shape(shape)
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Identity()
        if shape.channels is not None:
            self.neck = nn.Sequential(
                nn.Conv2d(shape.width, shape.channels, 1, bias=False),
                LayerNorm2d(shape.channels),
                nn.Conv2d(shape.channels, shape.channels, 3, padding=1, bias=False),
                LayerNorm2d(shape.channels),
            )
        self.frozen_statistics = False
        self._attentions = [m for m in self.modules() if isinstance(m, Attention)]
        for attention in self._attentions:
            # On the CPU even where the module is built on the meta device: no file holds it.
            attention.attention_bias_idxs = bias_table(attention.resolution[0])

    def train(self, mode: bool = True) -> "TinyVit":
        """Also keeps the batch statistics as they are, where they are frozen."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised [B, 3, H, W], sides multiples of 16, to [B, C, h, w]."""
        return self.neck(self._last_stage(images))

    def tokens(self, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """The last block's output [B, N, D]; it has convolutions and sees whole images alone."""
        if visible is not None:
            raise ValueError("a TinyViT has convolutions and does not take visible patches alone")
        return self._last_stage(images).flatten(2).transpose(1, 2)

    def _last_stage(self, images: torch.Tensor) -> torch.Tensor:
        """[B, D, h, w]."""
        for attention in self._attentions:  # timm keeps what it looked up of earlier weights
            attention.attention_bias_cache = {}
        x = self.patch_embed(images)
        for stage in self.stages:
            if self.checkpointing and self.training and self.frozen_statistics:
                x = checkpoint(stage, x, use_reentrant=False)
            else:  # a second forward would count the batch's statistics twice
                x = stage(x)
        return x

    @staticmethod
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """MobileSAM's encoder, or Microsoft's or timm's TinyViT, under the names used here.

        Returns:
            Without the classification head and tables that follow from the sizes; None if they
            are no TinyViT's.
        """
        if "patch_embed.seq.0.c.weight" not in tensors:
            if "patch_embed.conv1.conv.weight" not in tensors:
                return None
        renamed = {}
        for name, tensor in tensors.items():
            if name.startswith(("norm_head.", "head.")) or name.endswith("attention_bias_idxs"):
                continue
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                later = rest.startswith("downsample.")  # timm counts it to the stage behind it
                name = f"stages.{int(number) + later}.{rest}"
            renamed[name] = tensor
        return renamed

    @staticmethod
    def infer(tensors: dict[str, torch.Tensor], heads: int | None) -> EncoderShape | None:
        """The shape that these tensors have; None if they are no TinyViT's."""
        last = tensors.get("stages.3.downsample.conv3.conv.weight")
        if last is None or len(last) not in STAGES:
            return None
        _, depths, heads_of, _ = STAGES[len(last)]
        channels = len(tensors["neck.0.weight"]) if "neck.0.weight" in tensors else None
        sizes = (len(last), sum(depths), heads_of[-1], STRIDE, 1024, 64)
        return EncoderShape("tiny_vit", *sizes, channels)

    def layer_id(self, name: str) -> int:
        """As TinyViT's own recipe counts them: each block is a layer, and what makes a stage's
        input smaller goes with the block before it."""
        found = re.search(r"stages\.(\d)\.(downsample|blocks\.(\d+))", name)
        if not found:
            return 0 if "patch_embed." in name else 1 + self.shape.depth
        before = sum(self.depths[: int(found[1])])
        return before if found[3] is None else 1 + before + int(found[3])


def bias_table(window: int) -> torch.Tensor:
    """Which bias each pair of a window's tokens has, by rows and columns apart: [N, N]."""
    places = torch.arange(window**2, device="cpu")
    rows, columns = places // window, places % window
    apart = [(x[:, None] - x).abs() for x in (rows, columns)]
    return apart[0] * window + apart[1]


def build_mobile_sam(config: Any, weights: Weights | None, what: str, remedy: str) -> ImageEncoder:
    """MobileSAM's encoder, or another TinyViT with a neck.

    Raises:
        UserError: weights of another encoder.
    """
    if weights is None:
        return TinyVit(EncoderShape("tiny_vit", *SIZES, STRIDE, 1024, 64))
    shape = read_shape(weights, "model", what, remedy)
    require(shape.kind == "tiny_vit", f"{what} is no MobileSAM; {remedy}")
    return TinyVit(shape)


KINDS["tiny_vit"] = TinyVit
ENCODERS |= {
    "tiny_vit_5m": Architecture("tiny_vit", *SIZES),
    "tiny_vit_11m": Architecture("tiny_vit", 448, 12, 14),
    "tiny_vit_21m": Architecture("tiny_vit", 576, 12, 18),
    "tiny_vit_test": Architecture("tiny_vit", 64, 5, 4),  # for tests on a CPU
}
TEACHERS["mobile_sam"] = TeacherSource(
    build_mobile_sam, STRIDE, takes="MobileSAM's mobile_sam.pt", shape_in_file=True
)
