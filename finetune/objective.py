"""A model with its loss, as it is trained: one forward from a batch to losses."""

import torch
from torch import nn
from torch.nn import functional as F

from finetune.data import PromptBatch, prepare
from finetune.losses import MaskLossConfig, stage2_losses
from finetune.prompt_encoder import PADDING
from finetune.prompting import PromptConfig, correction_clicks
from finetune.prompts import append_clicks
from finetune.sam import Sam


class Objective(nn.Module):
    """First prompts, and rounds of correction clicks where they are asked for.

    The loss is the mean over the rounds. SAM's own decoder is also given the mask of the round
    before, and clicks on what was wrongly taken for the object. Randomness (dropout) comes from
    torch's default generator, which the loop seeds by the step.
    """

    def __init__(self, model: Sam, loss: MaskLossConfig, prompt: PromptConfig) -> None:
        super().__init__()
        self.model, self.loss, self.prompt = model, loss, prompt
        if self.model.takes_background and not prompt.corrections:
            model.prompt_encoder.mask_downscaling.requires_grad_(False)  # no mask is ever given

    def forward(self, batch: PromptBatch) -> dict[str, torch.Tensor]:
        """Losses of a batch on the device; see :func:`stage2_losses`."""
        points, labels, total = batch.points, batch.labels, {}
        both = self.model.takes_background
        if self.model.max_points is None:  # room for every click
            more = self.prompt.corrections
            points = F.pad(points, (0, 0, 0, more), value=-1.0)
            labels = F.pad(labels, (0, more), value=PADDING)
        if batch.frames is None:
            embeddings = self.model.get_image_embeddings(batch.images)
        else:  # with SAM's padding, as images have it that are not of a batch
            encoder = self.model.image_encoder
            embeddings = encoder(prepare(encoder.normalise, batch))
        rounds, masks, size = 1 + self.prompt.corrections, None, batch.masks.shape[2]
        for turn in range(rounds):
            logits, iou = self.model.predict_low_resolution(embeddings, points, labels, masks)
            asked = self.model.asked(labels)
            if not self.loss.single_mask:
                logits, iou, asked = logits[:, :, 1:], iou[:, :, 1:], asked[:, :, 1:]
            losses = stage2_losses(resize(logits, size), iou, batch.targets, self.loss, asked)
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value / rounds
            if turn + 1 < rounds:
                best = iou.masked_fill(~asked, -torch.inf).argmax(2, keepdim=True)
                chosen = logits.detach().take_along_dim(best[..., None, None], 2).squeeze(2)
                mask = resize(chosen, size) > 0
                more = correction_clicks(mask, batch.masks, batch.places, both, batch.inside)
                points, labels = append_clicks(points, labels, *more)
                masks = chosen.float() if both else None
        # A batch without, say, boxes leaves their embedding out; several processes have to agree on
        # which parameters have a gradient, if only of zero.
        prompts = [p for p in self.model.prompt_encoder.parameters() if p.requires_grad]
        total["loss"] = total["loss"] + sum(0.0 * p.sum() for p in prompts)
        return total


def resize(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Logits [B, K, ..., h, h] at another side, bilinear."""
    if logits.shape[-1] == size:
        return logits
    flat = logits.flatten(1, -3)
    flat = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False)
    return flat.view(*logits.shape[:-2], size, size)
