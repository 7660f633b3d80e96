"""EfficientSAM's mask decoder: a two-way transformer between prompt tokens and image tokens.

The released model's architecture and parameter names. What differs from SAM's (section 3 and
appendix A of Segment Anything): GELU, a GroupNorm of one group in the upscaling, a residual around
the first self-attention, and in the second block the prompts' own embedding is added to the tokens
for good. Attention is fused.

Prompts of one image share its image tokens until the first block has changed them, so these are
[B, 1, N, D] there. SAM's head (:mod:`finetune.sam_head`) has the same attention.
"""

import itertools

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from finetune.predictor import PredictorMasks, doubled
from finetune.prompt_encoder import PromptEncoder, pad_points

HEADS, MLP_RATIO, DEPTH = 8, 8, 2


class Attention(nn.Module):
    """Multi-head attention at a width that may be narrower than the tokens'."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Queries [..., T, D] over keys and values [..., S, D]: [..., T, D].

        Leading dimensions of 1 stand for the same in all prompts.
        """
        few, many = sorted((q.shape[-2], k.shape[-2]))
        exact = q.dtype == torch.float32 and not torch.is_autocast_enabled(q.device.type)
        if exact and few < many and HEADS * few < self.q_proj.out_features:
            return self._in_full_width(q, k, v)
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        q, k, v = (_heads(x.expand(*lead, -1, -1).flatten(0, -3)) for x in (q, k, v))
        mixed = _joined(F.scaled_dot_product_attention(q, k, v))
        return self.out_proj(mixed.unflatten(0, lead))

    def _in_full_width(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same, where one side's tokens are so many that projecting them is most of the work.

        The other side's few are brought to their width instead, one for each head: of the product
        (few W) (many V)' it is few (W V') that is computed first. bf16 would round the scores.
        """
        if q.shape[-2] < k.shape[-2]:
            weights = self._scores(self.q_proj(q), self.k_proj, k).softmax(-1)
            mixed = _times(weights.flatten(-3, -2), v).unflatten(-2, weights.shape[-3:-1])
            mixed = mixed @ self.v_proj.weight.unflatten(0, (HEADS, -1)).mT
            return self.out_proj(_joined(mixed) + self.v_proj.bias)
        weights = self._scores(self.k_proj(k), self.q_proj, q).softmax(-2)
        given = _heads(self.v_proj(v)) @ self.out_proj.weight.mT.unflatten(0, (HEADS, -1))
        given = given + self.out_proj.bias / HEADS  # a head's weights add up to 1
        return weights.flatten(-3, -2).mT @ given.flatten(-3, -2)

    def _scores(self, few: torch.Tensor, layer: nn.Linear, many: torch.Tensor) -> torch.Tensor:
        """Of projected tokens [..., T, inner] with ``layer``'s of [..., N, D]: [..., H, T, N]."""
        few = _heads(few) * (few.shape[-1] // HEADS) ** -0.5
        wide = few @ layer.weight.unflatten(0, (HEADS, -1))
        constant = few @ layer.bias.unflatten(0, (HEADS, -1)).unsqueeze(-1)
        scores = _times(wide.flatten(-3, -2), many.mT).unflatten(-2, few.shape[-3:-1])
        return scores.add_(constant)


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Products of matrices [..., Q, X, Y] with [..., Q, Y, Z], or with [..., 1, Y, Z] for all Q."""
    if b.shape[-3] == a.shape[-3]:
        return a @ b
    return (a.flatten(-3, -2) @ b.squeeze(-3)).unflatten(-2, a.shape[-3:-1])


def _heads(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "... t (head d) -> ... head t d", head=HEADS)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "... head t d -> ... t (head d)")


class MLP(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int, out: int, layers: int) -> None:
        """``layers``: hidden ones."""
        super().__init__()
        widths = [width] + [hidden] * layers
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)
        )
        self.fc = nn.Linear(widths[-1], out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image; the image attends to them."""

    def __init__(self, width: int, first: bool, dropout: float) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, width // 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, MLP_RATIO * width, width, 1)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, width // 2)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        token_pe: torch.Tensor,
        image_pe: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, Q, T, D] and image tokens [B, Q or 1, N, D], with their encodings."""
        if not self.first:
            tokens = tokens + token_pe
        tokens = self.norm1(tokens + self.dropout(self.self_attn(tokens, tokens, tokens)))
        placed = image + image_pe
        attended = self.cross_attn_token_to_image(tokens + token_pe, placed, image)
        tokens = self.norm2(tokens + self.dropout(attended))
        tokens = self.norm3(tokens + self.dropout(self.mlp(tokens)))
        attended = self.cross_attn_image_to_token(placed, tokens + token_pe, tokens)
        return tokens, self.norm4(image + attended)


class TwoWayTransformer(nn.Module):
    """Two blocks and a last look at the image."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(width, number == 0, dropout) for number in range(DEPTH)
        )
        self.final_attn_token_to_image = Attention(width, width // 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, image_pe: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, Q, T, D] and image tokens [B, 1, N, D]; both come back per prompt."""
        own = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, own, image_pe)
        attended = self.final_attn_token_to_image(tokens + own, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class MaskDecoder(PredictorMasks):
    """Image embedding and prompt tokens to four masks' logits and their predicted IoU.

    Mask 0 is meant for prompts that leave no doubt; the released model was trained on 1..3 alone.
    """

    MASKS = 4

    def __init__(self, width: int, dropout: float = 0.0, single_mask: bool = False) -> None:
        """``dropout``: behind the tokens' attention and MLP; ``single_mask``: mask 0 is trained."""
        super().__init__()
        self.single_mask = single_mask
        self.transformer = TwoWayTransformer(width, dropout)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(self.MASKS, width)
        middle, fine = width // 4, width // 8
        first = nn.ConvTranspose2d(width, middle, 2, 2), nn.GroupNorm(1, middle), nn.GELU()
        second = nn.ConvTranspose2d(middle, fine, 2, 2), nn.GELU()
        self.final_output_upscaling_layers = nn.ModuleList(
            [nn.Sequential(*first), nn.Sequential(*second)]
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, fine, 2) for _ in range(self.MASKS)
        )
        self.iou_prediction_head = MLP(width, width, self.MASKS, 2)

    def predict(
        self,
        prompt_encoder: PromptEncoder,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor,
        masks: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, Q, 4, 4h, 4w] of all four masks of prompts, and predicted IoU [B, Q, 4].

        Args:
            embeddings: of images, [B, C, h, w].
            points: [B, Q, P, 2] in pixels of the model's square input; those behind the sixth are
                dropped.
            labels: [B, Q, P]: 1 click, 2 and 3 corners of a box, -1 none.
            masks: None; this prompt encoder takes none.
        """
        tokens = prompt_encoder.embed(*pad_points(points, labels))
        return self.decode(embeddings, prompt_encoder.get_dense_pe(), tokens)

    def decode(
        self, embedding: torch.Tensor, image_pe: torch.Tensor, prompts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks.

        Args:
            embedding: of the images, [B, D, h, w].
            image_pe: [1, D, h, w].
            prompts: tokens [B, Q, P, D].

        Returns:
            Logits [B, Q, 4, 4h, 4w] and predicted IoU [B, Q, 4].
        """
        tokens, image = self._transform(embedding, image_pe, prompts)
        count, size = prompts.shape[:2], embedding.shape[2:]
        logits = self.draw(tokens.flatten(0, 1), image.flatten(0, 1), *size).unflatten(0, count)
        return logits, self.iou_prediction_head(tokens[:, :, 0])

    def attend(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._transform(image_embeddings, image_pe, sparse_prompt_embeddings[None])
        return found[0][0], found[1][0]

    def upscale(self, image: torch.Tensor) -> torch.Tensor:
        (first, norm, act), (second, last) = self.final_output_upscaling_layers
        fine = doubled(image, first)
        fine = F.layer_norm(fine, fine.shape[1:], eps=norm.eps) * norm.weight + norm.bias
        return last(doubled(act(fine), second))

    def _transform(
        self, embedding: torch.Tensor, image_pe: torch.Tensor, prompts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, Q, T, D] of IoU, masks and prompts, and image tokens [B, Q, N, D]."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(*prompts.shape[:2], -1, -1), prompts], dim=2)
        image, image_pe = (
            rearrange(x, "b d h w -> b 1 (h w) d").to(tokens.dtype).contiguous()
            for x in (embedding, image_pe)
        )
        return self.transformer(tokens, image, image_pe)
