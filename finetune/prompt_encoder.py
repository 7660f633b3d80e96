"""EfficientSAM's prompt encoder: points and box corners to tokens.

The released model's architecture and parameter names. What differs from SAM's: a slot that is not
used keeps its positional encoding, there is no embedding for background clicks, and no mask prompt.
"""

import torch
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import nn
from torch.nn import functional as F

MAX_POINTS = 6  # of a prompt; a box is two
PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3  # labels of points


class Positions(PositionEmbeddingRandom):
    """segment-anything's random Fourier features, in fp32 whatever autocast says.

    In bf16 a coordinate of a 1024-px picture would be off by up to four pixels.
    """

    def _pe_encoding(self, coords: torch.Tensor) -> torch.Tensor:
        with torch.autocast(coords.device.type, enabled=False):
            return super()._pe_encoding(coords.float())


class PromptEncoder(nn.Module):
    """Points with labels to embeddings of ``width`` channels."""

    def __init__(self, width: int, grid: int, image_size: int) -> None:
        """
        Args:
            grid: side of the image embedding, in tokens.
            image_size: side of the picture whose pixels the points count in.
        """
        super().__init__()
        self.grid, self.image_size = grid, image_size
        self.frame: tuple[int, int] | None = None  # SamPredictor's picture: height, width
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
                none.
            labels: [..., P]: 1 click, 2 and 3 corners of a box, -1 none. 0 has no embedding.

        Returns:
            [..., P, D].
        """
        size = (self.image_size, self.image_size)
        # pe_layer takes [B, P, 2]; half a pixel brings indices to the pixels' centres
        flat = (points + 0.5).reshape(1, -1, 2)
        tokens = self.pe_layer.forward_with_coords(flat, size).view(*points.shape[:-1], -1)
        for label, embedding in (
            (PADDING, self.invalid_points),
            (FOREGROUND, self.point_embeddings),
            (TOP_LEFT, self.bbox_top_left_embeddings),
            (BOTTOM_RIGHT, self.bbox_bottom_right_embeddings),
        ):
            tokens = tokens + embedding.weight[0] * (labels == label).unsqueeze(-1)
        return tokens

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What segment_anything's predictor calls: prompts of one picture.

        Args:
            points: coordinates [Q, P, 2] in pixels of ``frame``, and labels [Q, P].
            boxes: [Q, 4], x0, y0, x1, y1.
            masks: None.

        Returns:
            Sparse embeddings [Q, 6, D] and a dense one [1, D, 1, 1] of zeros.

        Raises:
            ValueError: a background click, a mask, or too many points.
        """
        if masks is not None:
            raise ValueError(
                "mask_input: EfficientSAM's prompt encoder takes no masks; train with "
                "decoder.kind sam for that"
            )
        given = []
        if points is not None:
            given.append(points)
        if boxes is not None:
            corners = boxes.reshape(-1, 2, 2)
            labels = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
            given.append((corners, labels.expand(len(corners), 2)))
        if not given:
            raise ValueError("give points or boxes")
        where = torch.cat([coordinates for coordinates, _ in given], dim=1)
        labels = torch.cat([label for _, label in given], dim=1)
        if where.shape[1] > MAX_POINTS:
            raise ValueError(
                f"{where.shape[1]} points in a prompt (a box counts as two); EfficientSAM takes "
                f"{MAX_POINTS}"
            )
        refuse_background(labels)
        height, width = self.frame or (self.image_size, self.image_size)
        scale = where.new_tensor([self.image_size / width, self.image_size / height])
        tokens = self.embed(*pad_points(rescale(where, scale), labels))
        return tokens, tokens.new_zeros(1, tokens.shape[-1], 1, 1)


def rescale(points: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Points [..., 2] times a scale [2]; -1, which marks a slot not used, stays."""
    return torch.where(points >= 0, points * scale, -1.0)


def pad_points(points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [..., P, 2] and labels [..., P] filled up with -1, or cut, to MAX_POINTS."""
    missing = MAX_POINTS - points.shape[-2]
    return F.pad(points, (0, 0, 0, missing), value=-1.0), F.pad(labels, (0, missing), value=PADDING)


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
