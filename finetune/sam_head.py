"""SAM's own prompt encoder and mask decoder (``decoder.kind: sam``), for many images at once.

Modules, names, weights and function are segment-anything's; attention and upscaling are computed
in less time, as for the other head. SAM appends one token that is not a point to prompts without a
box and none to others, so that prompts of different lengths cannot share a batch: they are grouped
by their length.
"""

from collections.abc import Iterator

import torch
from segment_anything.modeling import MaskDecoder as PackageMasks
from segment_anything.modeling import PromptEncoder as PackagePrompts
from segment_anything.modeling import TwoWayTransformer
from segment_anything.modeling.transformer import Attention as PackageAttention
from torch.nn import functional as F

from finetune.mask_decoder import DEPTH, HEADS, MLP_RATIO, Attention
from finetune.predictor import Points, PredictorMasks, PredictorPrompts, doubled
from finetune.prompt_encoder import BACKGROUND, FOREGROUND, PADDING, TOP_LEFT, Positions

MASK_CHANNELS = 16  # of the mask prompt's first layers


class SamPromptEncoder(PredictorPrompts, PackagePrompts):
    """segment-anything's, for models that stretch images to a square too."""

    def __init__(self, width: int, grid: int, image_size: int, square: bool = False) -> None:
        """``grid``: side of the image embedding, in tokens."""
        super().__init__(width, (grid, grid), (image_size, image_size), MASK_CHANNELS)
        self.pe_layer, self.image_size, self.square = Positions(width // 2), image_size, square

    def get_dense_pe(self) -> torch.Tensor:
        """Positional encoding of the image tokens, [1, D, h, w], in the type of the weights."""
        return super().get_dense_pe().to(self.no_mask_embed.weight.dtype)

    def embed_prompts(
        self, points: Points | None, boxes: torch.Tensor | None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse [Q, P, D] and dense [Q, D, h, w] embeddings, in the type of the weights: the
        package's forward, with points and boxes in pixels of the model's square input."""
        dtype = self.no_mask_embed.weight.dtype
        if points is not None:
            points = points[0].float(), points[1].long()  # half a pixel is lost in integers or fp16
        if boxes is not None:
            boxes = boxes.float()
        if masks is not None:
            masks = masks.to(dtype)
        sparse, dense = PackagePrompts.forward(self, points, boxes, masks)
        return sparse.to(dtype), dense

    def _embed_points(self, points: torch.Tensor, labels: torch.Tensor, pad: bool) -> torch.Tensor:
        """The package's own, which indexes by masks: each time a wait for the device."""
        points = points + 0.5  # to the pixels' centres
        if pad:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING)
        found = self.pe_layer.forward_with_coords(points, self.input_image_size)
        labels = labels.unsqueeze(2)
        found = torch.where(labels == PADDING, self.not_a_point_embed.weight, found)
        for label in (BACKGROUND, FOREGROUND):
            own = self.point_embeddings[label].weight
            found = torch.where(labels == label, found + own, found)
        return found


class SamMaskDecoder(PredictorMasks, PackageMasks):
    """segment-anything's; without a trained mask 0, the best of 1..3 replaces it."""

    def __init__(self, width: int, single_mask: bool) -> None:
        """``single_mask``: whether mask 0 is trained."""
        super().__init__(
            transformer_dim=width,
            transformer=TwoWayTransformer(DEPTH, width, HEADS, MLP_RATIO * width),
            iou_head_hidden_dim=width,
        )
        self.single_mask = single_mask
        for block in [*self.transformer.layers, self.transformer]:
            for name, theirs in list(block.named_children()):
                if isinstance(theirs, PackageAttention):
                    ours = Attention(theirs.embedding_dim, theirs.internal_dim)
                    ours.load_state_dict(theirs.state_dict())
                    setattr(block, name, ours)

    def predict(
        self,
        prompt_encoder: SamPromptEncoder,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`finetune.mask_decoder.MaskDecoder.predict`; labels may be 0 (background), and
        ``masks`` are logits [B, Q, 4h, 4w] of earlier masks as prompts, or None."""
        positions = prompt_encoder.get_dense_pe()
        images = []
        for number, embedding in enumerate(embeddings):
            order, found = [], []
            for rows, clicks, box in _groups(points[number], labels[number]):
                earlier = None if masks is None else masks[number, rows].unsqueeze(1)
                prompts = prompt_encoder.embed_prompts(clicks, box, earlier)
                found.append(self.predict_masks(embedding.unsqueeze(0), positions, *prompts))
                order.append(rows)
            back = torch.cat(order).argsort()
            images.append([torch.cat(parts)[back] for parts in zip(*found, strict=True)])
        logits, iou = (torch.stack(parts) for parts in zip(*images, strict=True))
        return logits, iou

    def attend(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The package's, where prompts without a mask share their image tokens."""
        dense = dense_prompt_embeddings
        if dense.stride(0) == 0:
            dense = dense[:1]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        own = own.expand(len(sparse_prompt_embeddings), -1, -1)
        tokens = torch.cat([own, sparse_prompt_embeddings], dim=1)
        image, image_pe = (
            x.contiguous(memory_format=torch.channels_last)
            for x in (image_embeddings + dense, image_pe)
        )
        return self.transformer(image, image_pe, tokens)

    def upscale(self, image: torch.Tensor) -> torch.Tensor:
        first, norm, act, second, last = self.output_upscaling
        fine = doubled(image, first)
        fine = F.layer_norm(fine, norm.weight.shape, norm.weight, norm.bias, norm.eps)
        return last(doubled(act(fine), second))


def _groups(
    points: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, Points | None, torch.Tensor | None]]:
    """Prompts [Q, P] of one image by their number of clicks and whether they have a box.

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
