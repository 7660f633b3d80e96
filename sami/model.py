"""SAM-leveraged masked image pretraining: decoder, projection and loss (EfficientSAM, section 3.2).

The encoder g_e sees the visible patches. The cross-attention decoder g_d makes the masked ones:
its queries are the masked tokens, its keys and values the visible tokens' features together with
the masked ones. Both outputs are put back in image order (phi) and one linear head h_theta maps
them to the teacher's channels. With a joint decoder and pixels as the target the same class is MAE.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from sami.core.config import require
from sami.encoders.protocol import ImageEncoder
from sami.encoders.vit import gather_tokens, initialise, sincos_positions, vit_block


@dataclass
class CrossDecoderConfig:
    """What turns visible features into masked ones; thrown away after stage 1.

    Attributes:
        kind: cross, SAMI's, through which only masked tokens pass; self, MAE's joint decoder.
        memory: keys and values of the cross decoder. visible_and_masked is the paper's text,
            visible is the other reading (CrossMAE).
        width: of the decoder's tokens.
        depth: number of blocks.
        heads: attention heads per block.
        predict_fraction: share of the masked tokens that is predicted and scored in a training
            step, drawn anew for each image; the others are neither queries, keys nor values
            (CrossMAE, arXiv 2401.14391, section 3.3). 1 is the paper's.
    """

    kind: Literal["cross", "self"] = "cross"
    memory: Literal["visible_and_masked", "visible"] = "visible_and_masked"
    width: int = 512
    depth: int = 8
    heads: int = 16
    predict_fraction: float = 1.0

    def check(self) -> None:
        require(
            min(self.width, self.depth, self.heads) > 0,
            "decoder.width, depth and heads must be positive",
        )
        require(
            self.width % self.heads == 0,
            f"decoder.width {self.width} is not divisible by decoder.heads {self.heads}",
        )
        require(
            self.width % 4 == 0,
            f"decoder.width {self.width} must be divisible by 4 for its positions",
        )
        require(
            0 < self.predict_fraction <= 1,
            f"decoder.predict_fraction {self.predict_fraction} must be over 0 and at most 1, such "
            "as 0.25",
        )
        require(
            self.kind == "cross" or self.predict_fraction == 1,
            f"decoder.predict_fraction {self.predict_fraction} goes with decoder.kind cross; MAE's "
            "joint decoder predicts all",
        )


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over channels: equation 1 divided by C, which AdamW's step does not notice."""
    return (prediction - target).square().mean(dim=-1)


def cosine_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - cos (EfficientSAM, Table 6)."""
    return 1 - F.cosine_similarity(prediction, target, dim=-1)


ERRORS = {"mse": squared_error, "cosine": cosine_error}  # of a token, [B, N, C] twice to [B, N]


@dataclass
class TokenLossConfig:
    """How the reconstruction is scored.

    Attributes:
        kind: of ERRORS: mse, the paper's; cosine, 1 - cos per token (its Table 6).
        tokens: all, equation 1; masked, MAE's.
    """

    kind: Literal[tuple(ERRORS)] = "mse"
    tokens: Literal["all", "masked"] = "all"


class CrossAttention(nn.Module):
    """Multi-head attention with queries and keys from different tokens, projected by the caller."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Projected queries [B, M, D], keys and values [B, K, 2 D]: [B, M, D]."""
        q = rearrange(q, "b m (h d) -> b h m d", h=self.heads)
        k, v = rearrange(kv, "b k (two h d) -> two b h k d", two=2, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h m d -> b m (h d)"))


class CrossBlock(nn.Module):
    """MAE's pre-norm block with the masked tokens as its only queries."""

    def __init__(self, width: int, heads: int, masked_memory: bool) -> None:
        super().__init__()
        self.masked_memory = masked_memory
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_memory = nn.LayerNorm(width, eps=1e-6)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self, tokens: torch.Tensor, memory: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Let the masked tokens look at the memory (and at each other).

        Args:
            tokens: masked tokens [B, M, D]; or, with ``rows``, a table [N, D] of them.
            memory: visible tokens [B, V, D].
            rows: [B, M], which row of the table each masked token is. Projecting the table
                instead of its copies gives the same numbers and saves 3 % of a training step.

        Returns:
            [B, M, D].
        """
        queries = self.norm1(tokens)
        projected = [self.attn.q(queries)]
        if self.masked_memory:
            projected.append(self.attn.kv(queries))
        if rows is not None:
            tokens, *projected = (F.embedding(rows, table) for table in (tokens, *projected))
        q, *kv = projected
        kv = torch.cat([self.attn.kv(self.norm_memory(memory)), *kv], dim=1)
        tokens = tokens + self.attn(q, kv)
        return tokens + self.mlp(self.norm2(tokens))


class Decoder(nn.Module):
    """What both decoders are made of: the blocks make the difference."""

    def __init__(
        self, config: CrossDecoderConfig, encoder_width: int, grid: int, class_tokens: int = 1
    ) -> None:
        super().__init__()
        self.class_tokens = class_tokens
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        positions = sincos_positions(grid, config.width)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(self.make_block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)


class CrossDecoder(Decoder):
    """SAMI's decoder: the visible features are anchors and pass by it unchanged."""

    @staticmethod
    def make_block(config: CrossDecoderConfig) -> nn.Module:
        return CrossBlock(config.width, config.heads, config.memory == "visible_and_masked")

    def forward(
        self, encoded: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
    ) -> torch.Tensor:
        """Encoder output [B, 1 + V, D] (class token first, left out here) to [B, V + M, width].

        The result is in image order; with fewer than all masked tokens [B, M], as if the others
        were not part of the image. One norm closes both streams, so that the head, which serves
        both, sees them on one scale.
        """
        anchors = self.embed(encoded[:, self.class_tokens :])
        memory = anchors + gather_tokens(self.positions.expand(len(encoded), -1, -1), visible)
        tokens, rows = (self.mask_token + self.positions)[0], masked  # all images share them
        for block in self.blocks:
            tokens, rows = block(tokens, memory, rows), None
        return self.norm(restore_order(anchors, tokens, visible, masked))


class JointDecoder(Decoder):
    """MAE's decoder: all tokens, the class token too, attend to each other."""

    @staticmethod
    def make_block(config: CrossDecoderConfig) -> nn.Module:
        return vit_block(config.width, config.heads)

    def forward(
        self, encoded: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
    ) -> torch.Tensor:
        """Encoder output [B, 1 + V, D] to [B, N, width] in image order."""
        tokens, first = self.embed(encoded), self.class_tokens
        mask_tokens = self.mask_token.expand(*masked.shape, -1).to(tokens.dtype)
        patches = restore_order(tokens[:, first:], mask_tokens, visible, masked) + self.positions
        tokens = torch.cat([tokens[:, :first], patches.to(tokens.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, first:])


class MaskedReconstruction(nn.Module):
    """Student, decoder and head: everything that stage 1 trains."""

    def __init__(
        self,
        encoder: ImageEncoder,
        decoder: CrossDecoderConfig,
        loss: TokenLossConfig,
        channels: int,
        mask_ratio: float,
    ) -> None:
        """``channels``: of the target. Without a mask (ratio 0) no decoder is built."""
        super().__init__()
        self.loss_config = loss
        self.encoder, self.normalise = encoder, encoder.normalise
        self.grid, width = encoder.image_size // encoder.stride, encoder.width
        self.decoder: nn.Module | None = None
        if mask_ratio > 0:
            kind = CrossDecoder if decoder.kind == "cross" else JointDecoder
            self.decoder = kind(decoder, width, self.grid, encoder.class_tokens)
            width = decoder.width
        self.head = nn.Linear(width, channels)
        initialise(self.head)

    def predict(
        self, images: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
    ) -> torch.Tensor:
        """Reconstruction in image order.

        Args:
            images: [B, 3, H, H], uint8 or 0..1.
            visible: [B, V], masked: [B, M]: patch numbers, none of them twice.

        Returns:
            [B, V + M, C].
        """
        images = self.normalise(images)
        if self.decoder is None:
            return self.head(self.encoder.tokens(images)[:, self.encoder.class_tokens :])
        return self.head(self.decoder(self.encoder.tokens(images, visible), visible, masked))

    def forward(
        self,
        images: torch.Tensor,
        visible: torch.Tensor,
        masked: torch.Tensor,
        target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Losses of a micro-batch: ``loss`` to train on, and its parts for the log, detached.

        Args:
            target: [B, N, C] in image order. With fewer than N visible and masked tokens the masked
                ones stand for those left out: the loss over all tokens keeps its expectation.
        """
        tokens, places = target.shape[1], [visible, masked]
        if visible.shape[1] + masked.shape[1] < tokens:
            given = torch.cat([visible, masked], dim=1).sort(dim=1).values
            target = gather_tokens(target, given)  # nothing is computed for the rest
            places = [torch.searchsorted(given, one.contiguous()) for one in (visible, masked)]
        error = token_errors(self.predict(images, visible, masked), target, self.loss_config.kind)
        means = {
            name: error.gather(1, where).mean()
            for name, where in zip(("loss_visible", "loss_masked"), places, strict=True)
            if where.shape[1]
        }
        if self.loss_config.tokens == "masked":
            loss = means["loss_masked"]
        elif error.shape[1] == tokens:
            loss = error.mean()
        else:
            share = visible.shape[1] / tokens
            loss = share * means["loss_visible"] + (1 - share) * means["loss_masked"]
        return {"loss": loss, **{name: part.detach() for name, part in means.items()}}


def restore_order(
    encoded: torch.Tensor, decoded: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Put tokens [B, V, D] and [B, M, D] back in image order (phi): [B, N, D]."""
    order = torch.cat([visible, masked], dim=1).argsort(dim=1)
    return gather_tokens(torch.cat([encoded, decoded.to(encoded.dtype)], dim=1), order)


def token_errors(prediction: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Error per token in fp32, by a name of ERRORS: [B, N, C] twice to [B, N]."""
    with torch.autocast(prediction.device.type, enabled=False):
        return ERRORS[kind](prediction.float(), target.float())
