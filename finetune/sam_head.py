"""SAM's own prompt encoder and mask decoder (``decoder.kind: sam``), for many pictures at once.

Modules, names, weights and function are segment-anything's. SAM appends one token that is not a
point to prompts without a box and none to others, so that prompts of different lengths cannot share
a batch: they are grouped by their length, and each group goes through the package's own forward.
"""

from collections.abc import Iterator

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from finetune.mask_decoder import best_of
from finetune.prompt_encoder import BACKGROUND, FOREGROUND, TOP_LEFT, Positions

HEADS, DEPTH, MLP_RATIO = 8, 2, 8
MASK_CHANNELS = 16  # of the mask prompt's first layers


class SamPromptEncoder(PromptEncoder):
    """segment-anything's, which can also count in the pixels of SamPredictor's picture."""

    def __init__(self, width: int, grid: int, image_size: int) -> None:
        """
        Args:
            grid: side of the image embedding, in tokens.
            image_size: side of the picture whose pixels the points count in.
        """
        super().__init__(width, (grid, grid), (image_size, image_size), MASK_CHANNELS)
        self.pe_layer = Positions(width // 2)
        self.frame: tuple[int, int] | None = None  # SamPredictor's picture: height, width

    def forward(
        self,
        points: tuple[torch.Tensor, torch.Tensor] | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """segment-anything's, with points and boxes in pixels of ``frame``."""
        if self.frame is not None:
            side, (height, width) = self.input_image_size[0], self.frame
            scale = torch.tensor([side / width, side / height], device=self._get_device())
            if points is not None:
                points = (points[0] * scale, points[1])
            if boxes is not None:
                boxes = boxes * scale.repeat(2)
        return super().forward(points, boxes, masks)


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

    def forward(self, *args: torch.Tensor, **given: torch.Tensor) -> tuple:
        """What segment_anything's predictor calls."""
        multimask = given.pop("multimask_output")
        if multimask or self.single_mask:
            return super().forward(*args, **given, multimask_output=multimask)
        return best_of(*super().forward(*args, **given, multimask_output=True))


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
            # frame is for SamPredictor: these points count in pixels of the input
            sparse, dense = PromptEncoder.forward(prompt_encoder, clicks, box, earlier)
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
