"""What stage 2 minimises (Segment Anything, appendix A): focal and dice 20 : 1, and IoU by MSE.

Of the masks of a prompt only the one with the lowest mask loss is trained; the IoU head is trained
on all of them. The mean is over the objects of an image and then over images, so that a
batch gives the same loss however it is cut into micro-batches. To add a loss of the pixels, write a
function of logits and truth to a loss of each pixel, and name it in PIXEL_LOSSES.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sami.core.config import require

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017), as in SAM


def entropy_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each pixel; both fp32, of one shape."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def focal_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The same, less where it is small already (Lin et al. 2017)."""
    entropy = entropy_loss(logits, truth)
    right = torch.exp(-entropy)  # the probability given to what is true
    alpha = torch.where(truth > 0, ALPHA, 1 - ALPHA)
    return alpha * (1 - right) ** GAMMA * entropy


# By ``loss.mask``: the loss of a pixel, and its weight beside a dice loss of weight 1.
PIXEL_LOSSES = {"focal": (focal_loss, 20.0), "bce": (entropy_loss, 1.0)}


@dataclass
class MaskLossConfig:
    """The mask loss.

    Attributes:
        mask: of PIXEL_LOSSES. focal, 20 : 1 with dice as in the paper; bce, 1 : 1 with dice,
            which learns faster from scratch.
        size: side in pixels of the masks that are compared; null for the decoder's own, a quarter
            of the input's. Larger ones are what it predicts, brought there bilinearly.
        iou: mse or l1, between predicted and true IoU.
        iou_masks: all, the IoU head learns from every mask; chosen, from the trained one alone.
        single_mask: train mask 0 too: it alone, where a prompt has more than one point or box.
    """

    mask: Literal[tuple(PIXEL_LOSSES)] = "focal"
    size: int | None = None
    iou: Literal["mse", "l1"] = "mse"
    iou_masks: Literal["all", "chosen"] = "all"
    single_mask: bool = False

    def check(self) -> None:
        require(
            self.size is None or self.size > 0,
            f"loss.size {self.size} must be positive, such as 1024, or null",
        )


@dataclass
class MaskTargets:
    """What the objects of a batch look like at the loss's resolution.

    ``masks`` bool [B, K, h, w]; ``there`` bool [B, K], whether the slot holds an object;
    ``inside`` bool [B, h, w], what is image and not padding, or None for all.
    """

    masks: torch.Tensor
    there: torch.Tensor
    inside: torch.Tensor | None = None


def stage2_losses(
    logits: torch.Tensor,
    iou: torch.Tensor,
    targets: MaskTargets,
    config: MaskLossConfig,
    asked: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """All losses of a batch, in fp32.

    Args:
        logits: [B, K, M, h, w].
        iou: predicted, [B, K, M].
        asked: bool [B, K, M], which masks a prompt asks for; None for all. Others are not trained.

    Returns:
        0-dim tensors: ``loss``, its parts ``loss_pixel``, ``loss_dice`` and ``loss_iou``, and
        without gradients ``iou``, the trained masks' true IoU.
    """
    kind, truth = config.mask, targets.masks.unsqueeze(2)
    weight = PIXEL_LOSSES[kind][1]
    inside = None if targets.inside is None else targets.inside[:, None, None]
    with torch.no_grad():
        # In pieces: only what is chosen needs its intermediate results for the backward pass.
        pixel, dice = _per_mask(logits, truth, inside, kind)
        total = weight * pixel + dice
        asked = torch.ones_like(total, dtype=torch.bool) if asked is None else asked
        chosen = total.masked_fill(~asked, torch.inf).argmin(2, keepdim=True)
        true_iou = mask_iou(logits > 0, truth, inside)
    best = logits.take_along_dim(chosen[..., None, None], 2)
    pixel, dice = (part.squeeze(2) for part in _per_mask(best, truth, inside, kind))
    score = (iou.float() - true_iou).abs() if config.iou == "l1" else (iou.float() - true_iou) ** 2
    if config.iou_masks == "chosen":
        score = score.gather(2, chosen).squeeze(2)
    else:
        score = torch.where(asked, score, 0.0).sum(2) / asked.sum(2)
    parts = {
        "loss": weight * pixel + dice + score,
        "loss_pixel": pixel.detach(),
        "loss_dice": dice.detach(),
        "loss_iou": score.detach(),
        "iou": true_iou.gather(2, chosen).squeeze(2),
    }
    return {name: _mean(part, targets.there) for name, part in parts.items()}


def pixel_loss(logits: torch.Tensor, truth: torch.Tensor, kind: str) -> torch.Tensor:
    """One of PIXEL_LOSSES, in fp32.

    Args:
        logits: any shape.
        truth: bool, broadcast to it.
    """
    return PIXEL_LOSSES[kind][0](logits.float(), truth.expand(logits.shape).float())


def dice_loss(
    logits: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over the last two dimensions, in fp32."""
    probability = logits.float().sigmoid()
    truth = truth.float()
    if inside is not None:
        probability, truth = probability * inside, truth * inside
    both = (probability * truth).sum((-2, -1))
    either = probability.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * both + 1) / (either + 1)


def mask_iou(
    mask: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor | None = None
) -> torch.Tensor:
    """Intersection over union of bool masks over the last two dimensions; 1 if both are empty."""
    if inside is not None:
        mask, truth = mask & inside, truth & inside
    both = (mask & truth).sum((-2, -1))
    either = (mask | truth).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _per_mask(
    logits: torch.Tensor, truth: torch.Tensor, inside: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel loss (mean over pixels) and dice of masks [B, K, M, h, w]: [B, K, M] each."""
    pixel = pixel_loss(logits, truth, kind)
    if inside is None:
        pixel = pixel.mean((-2, -1))
    else:
        pixel = (pixel * inside).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
    return pixel, dice_loss(logits, truth, inside)


def _mean(values: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Over the objects [B, K] of each image, then over images."""
    values = torch.where(there, values, 0.0)  # what stands in an empty slot has no gradient either
    return (values.sum(1) / there.sum(1).clamp(min=1)).mean()
