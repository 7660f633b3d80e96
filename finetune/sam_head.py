"""SAM's own prompt encoder and mask decoder (``decoder.kind: sam``), for many pictures at once.

Modules, names, weights and function are segment-anything's. SAM appends one token that is not a
point to prompts without a box and none to others, so that prompts of different lengths cannot share
a batch: they are grouped by their length, and each group goes through the package's own forward.
"""

from collections.abc import Iterator

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from finetune.mask_decoder import best_of, no_masks
from finetune.prompt_encoder import (
    BACKGROUND,
    FOREGROUND,
    TOP_LEFT,
    Positions,
    check_given,
    placed,
    rescale,
    unplaced,
)

HEADS, DEPTH, MLP_RATIO = 8, 2, 8
MASK_CHANNELS = 16  # of the mask prompt's first layers


class SamPromptEncoder(PromptEncoder):
    """segment-anything's, for models that stretch pictures to a square too."""

    def __init__(self, width: int, grid: int, image_size: int, square: bool = False) -> None:
        """
        Args:
            grid: side of the image embedding, in tokens.
            image_size: side of the model's square input in pixels.
            square: pictures fill the input whatever their shape.
        """
        super().__init__(width, (grid, grid), (image_size, image_size), MASK_CHANNELS)
        self.pe_layer, self.image_size, self.square = Positions(width // 2), image_size, square

    def get_dense_pe(self) -> torch.Tensor:
        """Positional encoding of the image tokens, [1, D, h, w], in the type of the weights."""
        return super().get_dense_pe().to(self.no_mask_embed.weight.dtype)

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """segment-anything's, with any type of number; see PromptEncoder's of the other head.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if points is None and boxes is None:
            return self.embed(points, boxes, masks)
        check_given(points, boxes)

        def place(frame: tuple[int, int]) -> torch.Tensor:
            clicks, corners = points, boxes
            if clicks is not None:
                clicks = rescale(clicks[0], self.image_size, frame), clicks[1]
            if corners is not None:
                corners = rescale(corners.reshape(-1, 2, 2), self.image_size, frame).flatten(1)
            return self.embed(clicks, corners, None)[0]

        sparse, dense = self.embed(points, boxes, masks)
        return (unplaced(place, self.image_size) if self.square else sparse), dense

    def embed(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The package's forward, with points and boxes in pixels of the model's square input.

        Returns:
            Sparse [Q, P, D] and dense [Q, D, h, w] embeddings, in the type of the weights.
        """
        dtype = self.no_mask_embed.weight.dtype
        if points is not None:
            points = points[0].float(), points[1].long()  # half a pixel is lost in integers or fp16
        if boxes is not None:
            boxes = boxes.float()
        if masks is not None:
            masks = masks.to(dtype)
        sparse, dense = super().forward(points, boxes, masks)
        return sparse.to(dtype), dense


class SamMaskDecoder(MaskDecoder):
    """segment-anything's; without a trained mask 0, the best of 1..3 stands in for it."""

    def __init__(self, width: int, single_mask: bool) -> None:
        """``single_mask``: whether mask 0 is trained."""
        super().__init__(
            transformer_dim=width,
            transformer=TwoWayTransformer(DEPTH, width, HEADS, MLP_RATIO * width),
            iou_head_hidden_dim=width,
        )
        self.single_mask = single_mask

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What segment_anything's predictor calls.

        Returns:
            Logits [Q, 3 or 1, 4h, 4w] and predicted IoU [Q, 3 or 1], fp32.

        Raises:
            ValueError: prompts that the picture of this embedding cannot place.
        """
        tokens = placed(sparse_prompt_embeddings, image_embeddings)
        if len(tokens) == 0:
            return no_masks(image_embeddings, 3 if multimask_output else 1)
        logits, iou = super().forward(
            image_embeddings,
            image_pe,
            tokens,
            dense_prompt_embeddings,
            multimask_output=multimask_output or not self.single_mask,
        )
        logits, iou = logits.float(), iou.float()
        return (logits, iou) if multimask_output or self.single_mask else best_of(logits, iou)


def predict(
    prompt_encoder: SamPromptEncoder,
    mask_decoder: SamMaskDecoder,
    embeddings: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four masks of prompts.

    Args:
        embeddings: of pictures, [B, C, h, w].
        points: [B, Q, P, 2] in pixels of the model's square input.
        labels: [B, Q, P]: 0 background, 1 click, 2 and 3 corners of a box, -1 none.
        masks: logits [B, Q, 4h, 4w] of earlier masks as prompts; None for none.

    Returns:
        Logits [B, Q, 4, 4h, 4w] and predicted IoU [B, Q, 4].
    """
    positions = prompt_encoder.get_dense_pe()
    pictures = []
    for number, embedding in enumerate(embeddings):
        order, found = [], []
        for rows, clicks, box in _groups(points[number], labels[number]):
            earlier = None if masks is None else masks[number, rows].unsqueeze(1)
            sparse, dense = prompt_encoder.embed(clicks, box, earlier)
            found.append(
                mask_decoder.predict_masks(embedding.unsqueeze(0), positions, sparse, dense)
            )
            order.append(rows)
        back = torch.cat(order).argsort()
        pictures.append([torch.cat(parts)[back] for parts in zip(*found, strict=True)])
    logits, iou = (torch.stack(parts) for parts in zip(*pictures, strict=True))
    return logits, iou


def _groups(
    points: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]]:
    """Prompts [Q, P] of one picture by their number of clicks and whether they have a box.

    Yields:
        Which prompts [G]; their clicks [G, c, 2] with labels [G, c]; their boxes [G, 4] or None.
    """
    known = labels.cpu()  # one wait for the device, for all groups
    click = (known == FOREGROUND) | (known == BACKGROUND)
    # slots in the order clicks, corners, unused
    rank = torch.where(click, 0, torch.where(known >= TOP_LEFT, known, 9))
    order = rank.argsort(dim=1, stable=True)
    kinds = torch.stack([click.sum(1), (known == TOP_LEFT).any(1).long()], 1)
    for kind in kinds.unique(dim=0):
        rows = (kinds == kind).all(1).nonzero().squeeze(1)
        slots = order[rows].to(points.device)
        count, has_box = kind.tolist()
        rows = rows.to(points.device)
        where = points[rows].gather(1, slots.unsqueeze(-1).expand(-1, -1, 2))
        what = labels[rows].gather(1, slots)
        box = where[:, count : count + 2].flatten(1) if has_box else None
        clicks = (where[:, :count], what[:, :count]) if count or not has_box else None
        yield rows, clicks, box
