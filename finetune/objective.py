"""A model with its loss, as it is trained: one forward from a batch to losses."""

import torch
from torch import nn

from finetune.data import Batch
from finetune.losses import LossConfig, stage2_losses
from finetune.model import EfficientSam
from finetune.prompts import PromptConfig, append_clicks, correction_clicks


class Objective(nn.Module):
    """First prompts, and rounds of correction clicks where they are asked for.

    The loss is the mean over the rounds. Randomness (dropout, correction clicks) comes from
    torch's default generator, which the loop seeds by the step.
    """

    def __init__(self, model: EfficientSam, loss: LossConfig, prompt: PromptConfig) -> None:
        super().__init__()
        self.model, self.loss, self.prompt = model, loss, prompt

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch on the device; see :func:`stage2_losses`."""
        points, labels, total = batch.points, batch.labels, {}
        embeddings = self.model.get_image_embeddings(batch.images)
        rounds = 1 + self.prompt.corrections
        for turn in range(rounds):
            logits, iou = self.model.predict_low_resolution(embeddings, points, labels)
            logits, iou = logits[:, :, 1:], iou[:, :, 1:]
            losses = stage2_losses(logits, iou, batch.targets, self.loss.mask)
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value / rounds
            if turn + 1 < rounds:
                best = iou.argmax(2, keepdim=True)[..., None, None]
                chosen = logits.detach().take_along_dim(best, 2).squeeze(2)
                size = self.model.shape.image_size
                more = correction_clicks(
                    chosen, batch.masks, size, background=False, inside=batch.inside
                )
                points, labels = append_clicks(points, labels, *more)
        return total
