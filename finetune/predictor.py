"""How segment_anything's predictor calls a prompt encoder and a mask decoder, for both heads.

The predictor embeds prompts before a mask decoder has seen the image's embedding. Where images
are stretched to a square, prompts can only be placed when the image's shape is known, so that
tokens wait for it: the embedding that a mask decoder is given tells it.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

Points = tuple[torch.Tensor, torch.Tensor]  # coordinates [Q, P, 2] and labels [Q, P]


class Unplaced(torch.Tensor):
    """Tokens of prompts whose image has a shape that is not known yet; see :func:`placed`.

    As they are they are those of a square image. ``place`` makes those of any other from its
    frame. What is computed from them is Unplaced too and has no ``place``: it can be looked at, and
    no mask is made of it.
    """

    place: Callable[[tuple[int, int]], torch.Tensor]


def placed(tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Tokens for the image that an embedding is of; those that do not wait for one as they are.

    Raises:
        ValueError: the embedding does not tell the image's shape.
    """
    if not isinstance(tokens, Unplaced):
        return tokens
    frame, place = getattr(embedding, "frame", None), getattr(tokens, "place", None)
    if frame is None:
        raise ValueError(
            "these features do not tell the shape of their image, which resize square needs to "
            "place prompts (a copy, another device or NumPy loses it); set the image again, or "
            "restore them with model.with_size(features, original_size)"
        )
    if place is None:
        raise ValueError(
            "these prompt embeddings were computed on, and resize square cannot place them in the "
            "image any more; give the mask decoder what the prompt encoder returned"
        )
    return place(frame)


class PredictorPrompts(nn.Module):
    """A prompt encoder as the predictor calls it.

    Attributes:
        image_size: side of the model's square input in pixels.
        square: images fill the input whatever their shape.
    """

    image_size: int
    square: bool

    def embed_prompts(
        self, points: Points | None, boxes: torch.Tensor | None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse [Q, P, D] and dense embeddings of prompts in pixels of the square input."""
        raise NotImplementedError

    def forward(
        self, points: Points | None, boxes: torch.Tensor | None, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sparse [Q, P, D] and dense embeddings of prompts of one image, in pixels of it as the
        predictor's ResizeLongestSide makes it.

        Where images are stretched to a square, sparse ones are for a square image, and the mask
        decoder takes them to where they lie in its own.

        Args:
            points: coordinates [Q, P, 2] and labels [Q, P], any type of number.
            boxes: [Q, 4], x0, y0, x1, y1.
            masks: logits of earlier masks, where the head takes them.

        Raises:
            ValueError: prompts that the head does not take, or shapes that do not fit.
        """
        if points is not None or boxes is not None:
            check_given(points, boxes)
        sparse, dense = self.embed_prompts(points, boxes, masks)
        if not self.square or points is None and boxes is None:
            return sparse, dense

        def place(frame: tuple[int, int]) -> torch.Tensor:
            clicks, corners, side = points, boxes, (self.image_size,) * 2
            if clicks is not None:
                clicks = rescale(clicks[0], side, frame), clicks[1]
            if corners is not None:
                corners = rescale(corners.reshape(-1, 2, 2), side, frame).flatten(1)
            return self.embed_prompts(clicks, corners, None)[0]

        tokens = sparse.as_subclass(Unplaced)
        tokens.place = place
        return tokens, dense


class PredictorMasks(nn.Module):
    """A mask decoder as the predictor calls it.

    Attributes:
        single_mask: whether mask 0, meant for prompts that leave no doubt, is trained.
        iou_prediction_head: from the first token to the masks' IoU.
        output_hypernetworks_mlps: from the four next to the weights of what :meth:`upscale` makes.
    """

    single_mask: bool
    iou_prediction_head: nn.Module
    output_hypernetworks_mlps: nn.ModuleList

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of prompts [Q, P, D] in one image [1, D, h, w].

        Without ``multimask_output`` it is mask 0 if that was trained, otherwise the mask of 1..3
        with the highest predicted IoU.

        Returns:
            Logits [Q, 3 or 1, 4h, 4w] and predicted IoU [Q, 3 or 1], fp32.

        Raises:
            ValueError: prompts that the image of this embedding cannot place.
        """
        tokens = placed(sparse_prompt_embeddings, image_embeddings)
        if len(tokens) == 0:
            height, width = (4 * side for side in image_embeddings.shape[2:])
            masks = 3 if multimask_output else 1
            logits = torch.zeros(0, masks, height, width, device=image_embeddings.device)
            return logits, logits[:, :, 0, 0]
        found = self.predict_masks(image_embeddings, image_pe, tokens, dense_prompt_embeddings)
        logits, iou = (x.float() for x in found)
        if multimask_output:
            return logits[:, 1:], iou[:, 1:]
        best = torch.zeros_like(iou[:, :1], dtype=torch.long)
        if not self.single_mask:
            best = 1 + iou[:, 1:].argmax(1, keepdim=True)
        return logits.take_along_dim(best[..., None, None], 1), iou.gather(1, best)

    def predict_masks(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks [Q, 4, 4h, 4w] of prompts in one image, and their predicted IoU [Q, 4]."""
        tokens, image = self.attend(
            image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings
        )
        logits = self.draw(tokens, image, *image_embeddings.shape[2:])
        return logits, self.iou_prediction_head(tokens[:, 0])

    def predict_promising(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        least: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks 1..3 of those of Q prompts for which one's predicted IoU is above ``least``.

        The others' masks are never drawn: that is a third of the mask decoder's time.

        Returns:
            Which prompts [G]; their logits [G, 3, 4h, 4w] and predicted IoU [G, 3], fp32.
        """
        sparse = placed(sparse_prompt_embeddings, image_embeddings)
        tokens, image = self.attend(image_embeddings, image_pe, sparse, dense_prompt_embeddings)
        iou = self.iou_prediction_head(tokens[:, 0])[:, 1:].float()
        which = (iou > least).any(1).nonzero().squeeze(1)
        height, width = image_embeddings.shape[2:]
        if len(which) == 0:
            return which, iou.new_zeros(0, iou.shape[1], 4 * height, 4 * width), iou[which]
        logits = self.draw(tokens[which], image[which], height, width)
        return which, logits[:, 1:].float(), iou[which]

    def attend(
        self,
        image_embeddings: torch.Tensor,
        image_pe: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the transformer makes of Q prompts in one image.

        Returns:
            Tokens [Q, T, D], the first for predicted IoU and four for the masks; and image tokens
            [Q, N, D].
        """
        raise NotImplementedError

    def draw(
        self, tokens: torch.Tensor, image: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        """All four masks' logits [Q, 4, 4h, 4w] of what :meth:`attend` returns.

        Args:
            height, width: of the image's embedding.
        """
        weights = [
            network(tokens[:, 1 + number])
            for number, network in enumerate(self.output_hypernetworks_mlps)
        ]
        logits = torch.stack(weights, dim=1) @ self.upscale(image).mT
        order = "q m (h w top left lower right) -> q m (h top lower) (w left right)"
        return rearrange(logits, order, h=height, w=width, top=2, left=2, lower=2)

    def upscale(self, image: torch.Tensor) -> torch.Tensor:
        """Image tokens [Q, N, D] at four times the resolution, [Q, 16N, D/8]."""
        raise NotImplementedError


def doubled(tokens: torch.Tensor, layer: nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution of kernel and stride 2, which is a matrix product.

    Args:
        tokens: [Q, N, C].

    Returns:
        [Q, 4N, C']; each token's 2 x 2 follow one another.
    """
    weight = rearrange(layer.weight, "i o y x -> (y x o) i")
    made = F.linear(tokens, weight, layer.bias.repeat(4))
    return rearrange(made, "q n (four o) -> q (n four) o", four=4)


def rescale(points: torch.Tensor, to: tuple[int, int], image: tuple[int, int]) -> torch.Tensor:
    """Points [..., 2] in pixels of an image to pixels of the same at another size, in fp32.

    x becomes x * s, as in all released code: an index stays one of a pixel's upper left corner, and
    the prompt encoder adds half a pixel of the input.

    Args:
        to: wanted height and width in pixels.
        image: height and width in pixels.
    """
    x, y = points.float().unbind(-1)
    return torch.stack([x * (to[1] / image[1]), y * (to[0] / image[0])], -1)


def check_given(points: Points | None, boxes: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: neither points nor boxes, or not of the shapes that belong together.
    """
    if points is None and boxes is None:
        raise ValueError("give points or boxes")
    prompts = []
    if points is not None:
        where, labels = points
        if labels is None or where.shape != (*labels.shape, 2) or labels.ndim != 2:
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"points {tuple(where.shape)} with labels {shape}; give [Q, P, 2] with [Q, P]"
            )
        prompts.append(len(where))
    if boxes is not None:
        single = boxes.ndim == 3 and boxes.shape[:2] == (1, 1)  # predict(box=[[x0, y0, x1, y1]])
        if boxes.shape[-1] != 4 or boxes.ndim != 2 and not single:
            raise ValueError(
                f"boxes {tuple(boxes.shape)}; give one of four numbers to predict, any number "
                "[Q, 4] to predict_torch"
            )
        prompts.append(len(boxes))
    if len(set(prompts)) > 1:
        raise ValueError(f"points of {prompts[0]} prompts, boxes of {prompts[1]}; give as many")
