"""EfficientSAM's prompt encoder: points and box corners to tokens.

The released model's architecture and parameter names. What differs from SAM's: a slot that is not
used keeps its positional encoding, there is no embedding for background clicks, and no mask prompt.
"""

from collections.abc import Callable

import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import nn
from torch.nn import functional as F

from finetune.predictor import Points, PredictorPrompts, check_given

MAX_POINTS = 6  # of a prompt; a box is two
PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3  # labels of points


class Positions(PositionEmbeddingRandom):
    """segment-anything's random Fourier features, in fp32 whatever autocast or the model's type.

    In bf16 a coordinate of a 1024-px image would be off by up to four pixels, and one frequency
    by as much across the image.
    """

    def _apply(self, fn: Callable, recurse: bool = True) -> "Positions":
        frequencies = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        moved = self.positional_encoding_gaussian_matrix
        if moved.dtype != frequencies.dtype:  # model.half(): only the device is followed
            self.positional_encoding_gaussian_matrix = frequencies.to(moved.device)
        return self

    def _pe_encoding(self, coords: torch.Tensor) -> torch.Tensor:
        with torch.autocast(coords.device.type, enabled=False):
            return super()._pe_encoding(coords.float())


class PromptEncoder(PredictorPrompts):
    """Points with labels to embeddings of ``width`` channels."""

    def __init__(self, width: int, grid: int, image_size: int, square: bool = True) -> None:
        """``grid``: side of the image embedding, in tokens."""
        super().__init__()
        self.grid, self.image_size, self.square = grid, image_size, square
        self.pe_layer = Positions(width // 2)
        self.invalid_points = nn.Embedding(1, width)
        self.point_embeddings = nn.Embedding(1, width)
        self.bbox_top_left_embeddings = nn.Embedding(1, width)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, width)

    def get_dense_pe(self) -> torch.Tensor:
        """Positional encoding of the image tokens, [1, D, h, w]."""
        return self.pe_layer((self.grid, self.grid)).unsqueeze(0)

    def embed(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Tokens of prompts.

        Args:
            points: [..., P, 2], x and y in pixels of the model's square input; -1 where there is
                none. Any type of number.
            labels: [..., P]: 1 click, 2 and 3 corners of a box, -1 none. 0 has no embedding.

        Returns:
            [..., P, D], in the type of the weights.
        """
        size, dtype = (self.image_size, self.image_size), self.point_embeddings.weight.dtype
        # pe_layer takes [B, P, 2]; half a pixel brings indices to the pixels' centres
        flat = (points.float() + 0.5).reshape(1, -1, 2)
        tokens = self.pe_layer.forward_with_coords(flat, size)
        tokens = tokens.view(*points.shape[:-1], tokens.shape[-1])
        labels = labels.long()
        for label, embedding in (
            (PADDING, self.invalid_points),
            (FOREGROUND, self.point_embeddings),
            (TOP_LEFT, self.bbox_top_left_embeddings),
            (BOTTOM_RIGHT, self.bbox_bottom_right_embeddings),
        ):
            tokens = tokens + embedding.weight[0] * (labels == label).unsqueeze(-1)
        return tokens.to(dtype)

    def embed_prompts(
        self, points: Points | None, boxes: torch.Tensor | None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [Q, 6, D] of points and boxes together, and zeros [1, D, 1, 1].

        Raises:
            ValueError: a background click, a mask, too many points or none.
        """
        if masks is not None:
            raise ValueError(
                "mask_input: EfficientSAM's prompt encoder takes no masks; train with "
                "decoder.kind sam for that"
            )
        check_given(points, boxes)
        given = [] if points is None else [points]
        if boxes is not None:
            corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
            given.append((boxes.reshape(-1, 2, 2), corners.expand(len(boxes), 2)))
        where = torch.cat([coordinates.float() for coordinates, _ in given], dim=1)
        labels = torch.cat([label.long() for _, label in given], dim=1)
        if where.shape[1] == 0:
            raise ValueError("a prompt without points; give points or boxes")
        if where.shape[1] > MAX_POINTS:
            raise ValueError(
                f"{where.shape[1]} points in a prompt (a box counts as two); EfficientSAM takes "
                f"{MAX_POINTS}"
            )
        refuse_background(labels)
        tokens = self.embed(*pad_points(keep_unused(where, where), labels))
        return tokens, tokens.new_zeros(1, tokens.shape[-1], 1, 1)


def keep_unused(points: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    """Scaled points [..., 2] with -1, which marks a slot not used, where it was.

    As in the released EfficientSAM, whatever lies outside on the left or above becomes -1 too.
    """
    return torch.where(points >= 0, scaled, -1.0)


def pad_points(points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [..., P, 2] and labels [..., P] filled up with -1, or cut, to MAX_POINTS.

    Returns:
        fp32 and int64, which hold a -1 whatever came in.
    """
    missing, labels = MAX_POINTS - points.shape[-2], labels.long()
    points = F.pad(points.float(), (0, 0, 0, missing), value=-1.0)
    return points, F.pad(labels, (0, missing), value=PADDING)


def refuse_background(labels: torch.Tensor) -> None:
    """
    Raises:
        ValueError: a label 0 is among them.
    """
    if not torch.compiler.is_compiling() and (labels == BACKGROUND).any():
        raise ValueError(
            "label 0: EfficientSAM has no embedding for background clicks; leave them out, or "
            "train with decoder.kind sam"
        )
