"""Distillation of SAM's image encoder (Faster Segment Anything, arXiv 2306.14289, section 3): the
student with its loss.

- decoupled: the student's embedding against the teacher's; no prompt, no mask decoder.
- semi_coupled: the masks of both under SAM's frozen decoder; the encoder is trained through it.
- fully_coupled: the same, and the student's decoder is trained too. The teacher keeps SAM's.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from finetune.data import MaskDataConfig, PromptBatch, cells_inside, prepare
from finetune.image_data import ImageBatch
from finetune.losses import PIXEL_LOSSES, dice_loss, mask_iou, pixel_loss
from finetune.model import MaskDecoderConfig
from finetune.sam import Sam
from sami.core.config import require
from sami.core.index import Shard
from sami.core.run import Run
from sami.targets import Target, TargetConfig, open_targets
from sami.teacher import TeacherConfig


@dataclass
class DistillationConfig:
    """What the student learns from the teacher.

    Attributes:
        form: decoupled, from its embedding; semi_coupled, from its masks through SAM's frozen
            decoder; fully_coupled, likewise, and the decoder is trained too.
        mask: of the coupled forms, one of PIXEL_LOSSES: focal, 20 : 1 with dice as SAM was trained;
            bce, 1 : 1 with dice, which learns faster from scratch.
    """

    form: Literal["decoupled", "semi_coupled", "fully_coupled"] = "decoupled"
    mask: Literal[tuple(PIXEL_LOSSES)] = "focal"

    @property
    def coupled(self) -> bool:
        """Whether masks are compared, which takes prompts and a teacher at work."""
        return self.form != "decoupled"

    @property
    def freeze(self) -> Literal["none", "decoder"]:
        """What of the student is not trained, as ``decoder.freeze`` says it."""
        return "none" if self.form == "fully_coupled" else "decoder"

    def check_with(
        self, teacher: TeacherConfig, decoder: MaskDecoderConfig, data: MaskDataConfig
    ) -> None:
        """What no group can see alone."""
        require(teacher.name != "none", "teacher.name none teaches nothing; set sam_vit_h")
        require(
            decoder.kind == "sam",
            f"decoder.kind {decoder.kind}: the student works under SAM's own decoder; set sam",
        )
        require(
            decoder.freeze == "none",
            f"decoder.freeze {decoder.freeze}: distill.form says what is trained; set none",
        )
        require(
            teacher.layer == "neck",
            f"teacher.layer {teacher.layer}: SAM's decoder takes the neck's output; set neck",
        )
        require(
            teacher.image_size == data.image_size,
            f"teacher.image_size {teacher.image_size} differs from data.image_size "
            f"{data.image_size}: both see the same image; set one to the other",
        )
        require(
            not (teacher.cached and self.coupled),
            f"distill.form {self.form} needs the teacher's masks, and a cache has nothing of the "
            "padding that SAM's decoder sees; set --teacher.cached false",
        )
        require(
            not (teacher.cached and data.hflip),
            "data.hflip true: cached features are of the images as they are; set false, or "
            "--teacher.cached false",
        )


class Distillation(nn.Module):
    """A student under SAM's decoder, and how far it is from the teacher."""

    def __init__(self, model: Sam, config: DistillationConfig) -> None:
        """``model``: with SAM's prompt encoder and mask decoder, which the teacher gets as they
        are now."""
        super().__init__()
        self.model, self.config = model, config
        model.prompt_encoder.mask_downscaling.requires_grad_(False)  # no mask is ever given
        self.teachers = None
        if config.form == "fully_coupled":
            both = copy.deepcopy([model.prompt_encoder, model.mask_decoder])
            self.teachers = nn.ModuleList(both).requires_grad_(False)
        if not config.coupled:  # batches are large enough for statistics of their own
            model.image_encoder.frozen_statistics = False
            model.image_encoder.train()

    def embed(self, batch: ImageBatch | PromptBatch) -> torch.Tensor:
        """The student's embeddings [B, C, h, w]."""
        return self.model.image_encoder(prepare(self.model.image_encoder.normalise, batch))

    def student_masks(
        self, embeddings: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, K, 4, 4h, 4w] and predicted IoU [B, K, 4] under the student's decoder.

        Args:
            points: [B, K, P, 2] in pixels of the input.
            labels: [B, K, P].
        """
        return self.model.predict_low_resolution(embeddings, points, labels)

    @torch.no_grad()
    def teacher_masks(
        self, embeddings: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the teacher's embeddings, under SAM's decoder as it was at the start."""
        prompts, masks = self.teachers or (self.model.prompt_encoder, self.model.mask_decoder)
        return masks.predict(prompts, embeddings, points.float(), labels.long())

    def forward(
        self, batch: ImageBatch | PromptBatch, target: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Losses of a micro-batch: ``loss`` to train on, and its parts for the log, detached.

        Args:
            target: the teacher's embeddings, [B, C, h, w].
        """
        embeddings = self.embed(batch)
        cells = cells_inside(
            batch.frames, embeddings.shape[-1], batch.images.shape[-1], whole=False
        )
        error = embedding_error(embeddings, target, cells).mean()
        if not self.config.coupled:
            return {"loss": error}
        points, labels = batch.points, batch.labels
        taught, taught_iou = self.teacher_masks(target, points, labels)
        logits, iou = self.student_masks(embeddings, points, labels)
        wanted = self.model.asked(labels) & batch.there.unsqueeze(2)
        if not self.model.shape.single_mask:  # mask 0 is never asked for
            logits, iou, taught, taught_iou, wanted = (
                x[:, :, 1:] for x in (logits, iou, taught, taught_iou, wanted)
            )
        pixels = cells_inside(batch.frames, logits.shape[-1], batch.images.shape[-1], whole=True)
        losses = mask_losses(logits, iou, taught, taught_iou, wanted, pixels, self.config.mask)
        # A batch without, say, boxes leaves their embedding out; several processes have to agree on
        # which parameters have a gradient, if only of zero.
        prompts = [p for p in self.model.prompt_encoder.parameters() if p.requires_grad]
        losses["loss"] = losses["loss"] + sum(0.0 * p.sum() for p in prompts)
        return losses | {"mse": error.detach()}


def open_teacher(
    config: TeacherConfig,
    model: Sam,
    run: Run,
    shards: list[Shard],
    held_out: list[Shard],
    file: str | None,
    sha256: str | None,
    checksums: bool,
) -> tuple[Target, Target]:
    """What is learnt from, and what held-out images are compared with. Collective.

    With cached features the latter is the teacher itself, if its weights are here: a cache has
    nothing of the padding, which SAM's decoder sees.

    Args:
        model: the student, which gives the size of the embeddings.
        file: of the teacher's weights, and ``sha256``, as far as they are here.
        checksums: read the shards of a cache for them.

    Raises:
        UserError: teacher or cache cannot be used, or embeddings of another size or preprocessing.
    """
    shards = shards + ([] if file else held_out)
    rest = (model.image_encoder, run, shards, file, sha256, checksums)
    target = judge = open_targets(TargetConfig(), config, *rest)
    if config.cached and file and held_out:
        judge = open_targets(TargetConfig(), replace(config, cached=False), *rest)
    for one in {id(target): target, id(judge): judge}.values():
        source = one.cache or one.teacher
        stride = one.cache.patch_size if one.cache else one.teacher.stride
        grid = config.image_size // stride
        require(
            one.cache is None or one.cache.grid == grid,
            f"the cache was made with --grid {one.cache and one.cache.grid}, which is not the "
            f"teacher's {grid}; make one with --grid {grid}, or set --teacher.cached false",
        )
        require(
            grid == model.shape.grid,
            f"the teacher's embedding has {grid} x {grid} cells and the student's "
            f"{model.shape.grid} x {model.shape.grid}; set encoder.patch_size {stride}",
        )
        require(
            source.channels == model.shape.encoder.channels,
            f"the teacher's embedding has {source.channels} channels and the student's "
            f"{model.shape.encoder.channels}; set decoder.width {source.channels}",
        )
        require(
            source.resize == model.shape.resize,
            f"the teacher was made for data.resize {source.resize}, and it is "
            f"{model.shape.resize}; set {source.resize}",
        )
    return target, judge


def teacher_maps(target: Target, batch: ImageBatch | PromptBatch) -> torch.Tensor:
    """The teacher's embeddings of a batch, computed or out of a cache: [B, C, h, w].

    Of a cache, cells that hold nothing of the image are 0.
    """
    if target.cache is not None:
        return rearrange(target(batch), "b (h w) c -> b c h w", h=target.cache.grid)
    with torch.no_grad(), target.autocast():
        return target.teacher.features(prepare(target.teacher.normalise, batch))


def embedding_error(
    prediction: torch.Tensor, target: torch.Tensor, cells: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over channels and the image's cells, in fp32: [B].

    Args:
        prediction, target: [B, C, h, w].
        cells: bool [B, h, w], what is image.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        error = (prediction.float() - target.float()).square().mean(1)
        return torch.where(cells, error, 0.0).sum((1, 2)) / cells.sum((1, 2))


def mask_losses(
    logits: torch.Tensor,
    iou: torch.Tensor,
    taught: torch.Tensor,
    taught_iou: torch.Tensor,
    wanted: torch.Tensor,
    pixels: torch.Tensor,
    kind: str,
) -> dict[str, torch.Tensor]:
    """The student's masks against the teacher's, mask by mask, in fp32.

    Both decoders begin as the same one, so that mask m of one is mask m of the other: nothing has
    to be matched, and the teacher's ambiguity (Segment Anything, section 3) is learnt with it. The
    student's predicted IoU is to be the teacher's.

    Args:
        logits, taught: [B, K, M, h, w].
        iou, taught_iou: predicted ones, [B, K, M].
        wanted: bool [B, K, M], which masks are compared.
        pixels: bool [B, h, w], what is image.
        kind: of PIXEL_LOSSES.

    Returns:
        0-dim tensors: ``loss``, its parts ``loss_pixel``, ``loss_dice`` and ``loss_iou``, and
        ``iou`` of both masks. The mean is over an image's masks and then over images.
    """
    truth, seen = taught > 0, pixels[:, None, None]
    pixel = (pixel_loss(logits, truth, kind) * seen).sum((-2, -1)) / seen.sum((-2, -1))
    dice = dice_loss(logits, truth, seen)
    score = F.mse_loss(iou.float(), taught_iou.float(), reduction="none")
    parts = {
        "loss": PIXEL_LOSSES[kind][1] * pixel + dice + score,
        "loss_pixel": pixel.detach(),
        "loss_dice": dice.detach(),
        "loss_iou": score.detach(),
        "iou": mask_iou(logits.detach() > 0, truth, seen),
    }
    count = wanted.sum((1, 2))
    return {
        name: (torch.where(wanted, part, 0.0).sum((1, 2)) / count).mean()
        for name, part in parts.items()
    }
