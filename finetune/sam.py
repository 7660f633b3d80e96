"""A promptable model: image encoder, prompt encoder and mask decoder, released EfficientSAM's or
SAM's own."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from finetune.mask_decoder import MaskDecoder
from finetune.predictor import rescale
from finetune.prompt_encoder import (
    BACKGROUND,
    FOREGROUND,
    MAX_POINTS,
    TOP_LEFT,
    PromptEncoder,
    keep_unused,
    refuse_background,
)
from finetune.sam_head import SamMaskDecoder, SamPromptEncoder
from sami.core.images import frame_of
from sami.encoders.protocol import EncoderShape
from sami.encoders.registry import build
from sami.encoders.vit import initialise


@dataclass(frozen=True)
class ModelShape:
    """All that rebuilds a model; the JSON header of ``model.safetensors``.

    Attributes:
        encoder: the image encoder.
        decoder: the prompt encoder and mask decoder: efficientsam, or SAM's own.
        resize: square, the whole input whatever the image's aspect, as released; longest, as SAM
            resizes, the rest is padding on the right and below.
        single_mask: whether mask 0 is trained.
    """

    encoder: EncoderShape = EncoderShape()
    decoder: Literal["efficientsam", "sam"] = "efficientsam"
    resize: Literal["square", "longest"] = "square"
    single_mask: bool = False

    @property
    def image_size(self) -> int:
        """Side in pixels of the input."""
        return self.encoder.image_size

    @property
    def grid(self) -> int:
        """Side of the image embedding; the mask decoder's output has four times as many pixels."""
        return self.image_size // self.encoder.patch_size

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that an image has within the model's input."""
        return frame_of(self.image_size, self.resize, height, width)


class Sam(nn.Module):
    """The released model's interface, and that of segment_anything's ``Sam``.

    ``SamPredictor(model)`` and ``SamAutomaticMaskGenerator(model)`` work.
    """

    mask_threshold, image_format = 0.0, "RGB"

    def __init__(
        self, shape: ModelShape, checkpointing: bool = False, dropout: float = 0.0
    ) -> None:
        """
        Args:
            checkpointing: recompute the encoder's blocks in the backward pass.
            dropout: of EfficientSAM's mask decoder, while training; SAM's own has none.
        """
        super().__init__()
        self.shape = shape
        channels = shape.encoder.channels
        self.image_encoder = build(shape.encoder)
        self.image_encoder.checkpointing = checkpointing
        self.image_encoder.register_forward_hook(_keep_frame)
        geometry = shape.grid, shape.image_size, shape.resize == "square"
        if shape.decoder == "sam":
            self.prompt_encoder = SamPromptEncoder(channels, *geometry)
            self.mask_decoder = SamMaskDecoder(channels, shape.single_mask)
        else:  # SAM's modules, and any encoder, bring their own initialisation
            self.prompt_encoder = PromptEncoder(channels, *geometry)
            self.mask_decoder = MaskDecoder(channels, dropout, shape.single_mask)
            self.prompt_encoder.apply(initialise)
            self.mask_decoder.apply(initialise)

    @property
    def takes_background(self) -> bool:
        """Whether clicks on the background (label 0) and masks can be prompts."""
        return self.shape.decoder == "sam"

    @property
    def max_points(self) -> int | None:
        """Of a prompt, a box counted as two; None for any number."""
        return None if self.takes_background else MAX_POINTS

    # -- the released model's interface -------------------------------------------------------

    def forward(
        self, images: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Three masks for each prompt, at the images' size.

        Args:
            images: [B, 3, H, W], integers in 0..255 or floating point in 0..1.
            points: [B, Q, P, 2], x and y in pixels of these images, any type of number.
            labels: [B, Q, P]: 1 click, 2 and 3 corners of a box, -1 none.

        Returns:
            Logits [B, Q, 3, H, W] and predicted IoU [B, Q, 3], unsorted.

        Raises:
            ValueError: shapes that do not belong together, or images without a pixel.
        """
        size = tuple(images.shape[2:])
        embeddings = self.get_image_embeddings(images)
        return self.predict_masks(embeddings, points, labels, True, *size, *size)

    def get_image_embeddings(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, which are resized as for training: antialiased bilinear.

        The released code does not antialias; the two differ where an image is made smaller.

        Args:
            images: [B, 3, H, W], integers in 0..255 or floating point in 0..1.

        Returns:
            [B, 256, h, w]; they tell the shape of their images, see :meth:`with_size`.

        Raises:
            ValueError: no images of three channels, or without a pixel.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images {tuple(images.shape)}; give [B, 3, H, W] with pixels")
        size = tuple(images.shape[2:])
        if not images.dtype.is_floating_point:
            images = images.float() / 255
        images = self._resized(images.float(), self.shape.frame(*size))
        return self.with_size(self.image_encoder(self._prepared(images)), size)

    def with_size(self, embeddings: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Embeddings [B, 256, h, w] that tell the shape of their images (restored ones, say).

        With ``resize: square`` SamPredictor's prompts cannot be placed without. The note stays with
        this very tensor, through torch.save too, but not with what is computed or copied from it.

        Args:
            original_size: height and width in pixels.
        """
        if not torch.compiler.is_compiling():
            embeddings.frame = frame_of(self.shape.image_size, "longest", *original_size)
        return embeddings

    def predict_masks(
        self,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor,
        multimask_output: bool,
        input_h: int,
        input_w: int,
        output_h: int = -1,
        output_w: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of prompts, from embeddings made once.

        Args:
            embeddings: [B, 256, h, w].
            points: [B, Q, P, 2] in pixels of an image of ``input_h`` x ``input_w``, any type of
                number; EfficientSAM drops those behind the sixth.
            labels: [B, Q, P]: 1 click, 2 and 3 corners of a box, -1 none, and for SAM's own
                decoder 0 for the background.
            multimask_output: masks 1..3; otherwise mask 0, which the released weights, and ours
                without ``loss.single_mask``, never trained.
            output_h, output_w: size of the logits; without one they come as they are, four times
                the embedding's.

        Returns:
            Logits [B, Q, M, H, W] and predicted IoU [B, Q, M]; M is 3 or 1.

        Raises:
            ValueError: a background click that the decoder does not know, or shapes that do not
                belong together.
        """
        if not self.takes_background:
            refuse_background(labels)
        if not multimask_output and not self.shape.single_mask:
            logging.getLogger(__name__).warning(
                "multimask_output=False asks for mask 0, which was never trained; take the best "
                "of three by its predicted IoU"
            )
        logits, iou = self.predict_all(embeddings, points, labels, input_h, input_w)
        logits, iou = (x[:, :, 1:] if multimask_output else x[:, :, :1] for x in (logits, iou))
        if output_h > 0 and output_w > 0:
            logits = self.resize_logits(logits, (input_h, input_w), (output_h, output_w))
        return logits, iou

    def predict_all(
        self,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor,
        input_h: int,
        input_w: int,
        masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks, as :meth:`predict_low_resolution`, of points in pixels of an image."""
        if min(input_h, input_w) < 1:
            raise ValueError(f"an image of {input_h} x {input_w} pixels has no place for prompts")
        scaled = rescale(points, self.shape.frame(input_h, input_w), (input_h, input_w))
        if not self.takes_background:
            scaled = keep_unused(points, scaled)
        return self.predict_low_resolution(embeddings, scaled, labels, masks)

    def asked(self, labels: torch.Tensor) -> torch.Tensor:
        """Which of four masks prompts [B, Q, P] ask for, bool [B, Q, 4].

        1..3; or 0 alone, where it is trained and a prompt of several points or boxes leaves less
        doubt (Segment Anything, appendix A).
        """
        given = (labels == FOREGROUND) | (labels == BACKGROUND) | (labels == TOP_LEFT)
        single = (given.sum(2) > 1) & self.shape.single_mask
        return (torch.arange(4, device=labels.device) == 0) == single.unsqueeze(2)

    def predict_low_resolution(
        self,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks [B, Q, 4, 4h, 4w] and their predicted IoU [B, Q, 4].

        Args:
            points: [B, Q, P, 2] in pixels of the model's own square input.
            labels: [B, Q, P].
            masks: logits [B, Q, 4h, 4w] of earlier masks, as prompts for SAM's own decoder.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if points.ndim != 4 or points.shape != (*labels.shape, 2):
            raise ValueError(
                f"points {tuple(points.shape)} with labels {tuple(labels.shape)}; give "
                "[B, Q, P, 2] with [B, Q, P]"
            )
        images, prompts = labels.shape[:2]
        if images != len(embeddings):
            raise ValueError(f"points for {images} images, embeddings of {len(embeddings)}")
        if images == 0 or prompts == 0:
            height, width = (4 * side for side in embeddings.shape[2:])
            logits = embeddings.new_zeros(images, prompts, 4, height, width)
            return logits, logits[..., 0, 0]
        points, labels = points.float(), labels.long()
        return self.mask_decoder.predict(self.prompt_encoder, embeddings, points, labels, masks)

    # -- the interface of segment_anything's Sam ----------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        """What SamPredictor resized, [1, 3, H, W] in 0..255, as the encoder takes it.

        Raises:
            ValueError: an image without a pixel.
        """
        if 0 in x.shape:
            raise ValueError(f"an image of {tuple(x.shape)} has no pixels")
        frame, images = tuple(x.shape[2:]), x.float() / 255
        if self.shape.resize == "square":
            images = self._resized(images, (self.shape.image_size,) * 2)
        return self.with_size(self._prepared(images), frame)

    def postprocess_masks(
        self, masks: torch.Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [Q, M, 4h, 4w] at the size of the image, [Q, M, H, W]."""
        return self.resize_logits(masks.unsqueeze(0), original_size, original_size)[0]

    # -- geometry -----------------------------------------------------------------------------

    def _resized(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Images at another size, antialiased as those of training and evaluation are."""
        if tuple(images.shape[2:]) == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images in 0..1 normalised, with zeros on the right and below, as the encoder's type."""
        size, images = self.shape.image_size, self.image_encoder.normalise(images)
        images = F.pad(images, (0, size - images.shape[3], 0, size - images.shape[2]))
        return images.to(next(self.image_encoder.parameters()).dtype)

    def resize_logits(
        self, logits: torch.Tensor, image: tuple[int, int], size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [B, Q, M, 4h, 4w] of an image at another size, without its padding.

        Args:
            image: height and width of the image in pixels.
            size: wanted height and width.
        """
        if 0 in size:
            raise ValueError(f"masks of {size[0]} x {size[1]} pixels: the image is empty")
        flat = logits.flatten(0, 1)
        if self.shape.resize == "longest":  # as segment_anything's Sam
            flat = F.interpolate(flat, (self.shape.image_size,) * 2, mode="bilinear")
            height, width = self.shape.frame(*image)
            flat = F.interpolate(flat[..., :height, :width], size, mode="bilinear")
        else:  # as the released EfficientSAM
            flat = F.interpolate(flat, size, mode="bicubic")
        return flat.unflatten(0, logits.shape[:2])


def _keep_frame(encoder: nn.Module, given: tuple[torch.Tensor], embedding: torch.Tensor) -> None:
    """What a prepared image tells of its shape, its embedding tells too (a forward hook).

    Not in a compiled step of training, which asks for no shape: torch would warn of gradients.
    """
    training_step = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if not training_step and hasattr(given[0], "frame"):
        embedding.frame = given[0].frame
