"""EfficientSAM: a plain ViT, a neck, and a promptable mask decoder, under the released names.

``load_model`` opens what can segment: the released EfficientSAM, ours, and SAM itself.
"""

import json
import logging
import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from segment_anything.modeling.common import LayerNorm2d
from timm.layers import PatchEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetune.mask_decoder import MaskDecoder
from finetune.prompt_encoder import PromptEncoder, pad_points, refuse_background, rescale
from sami.core.errors import UserError
from sami.core.images import Normalise
from sami.encoder import Encoder, initialise, vit_block

NECK = 256  # channels of the image embedding
HEAD_WIDTH = 64  # of the released models' attention heads


@dataclass(frozen=True)
class ModelShape:
    """All that rebuilds an EfficientSAM; the JSON header of ``model.safetensors``.

    ``pretrained_grid`` is the side of the stored positions' grid, 14 for an encoder that was
    pretrained at 224 px.
    """

    width: int = 192
    depth: int = 12
    heads: int = 3
    patch_size: int = 16
    image_size: int = 1024
    pretrained_grid: int = 14
    resize: Literal["square", "longest"] = "square"

    @property
    def grid(self) -> int:
        """Side of the image embedding."""
        return self.image_size // self.patch_size

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that a picture has within the model's input."""
        return frame_of(self.image_size, self.resize, height, width)


def frame_of(image_size: int, resize: str, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels that a picture has within a square input.

    ``square``: all of it, whatever the picture's aspect, as released. ``longest``: as SAM
    resizes, the rest is padding on the right and below.
    """
    if resize == "square":
        return image_size, image_size
    scale = image_size / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


class ImageEncoder(nn.Module):
    """Normalised pictures to an embedding of 256 channels; global attention in all blocks."""

    def __init__(self, shape: ModelShape, checkpointing: bool = False) -> None:
        """``checkpointing``: recompute the blocks in the backward pass instead of storing them."""
        super().__init__()
        self.img_size, self.shape, self.checkpointing = shape.image_size, shape, checkpointing
        width = shape.width
        # The first place belongs to the class token, which is not used here.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.pretrained_grid**2, width))
        self.patch_embed = PatchEmbed(
            shape.image_size, shape.patch_size, embed_dim=width, flatten=False
        )
        self.blocks = nn.ModuleList(vit_block(width, shape.heads) for _ in range(shape.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, NECK, 1, bias=False),
            LayerNorm2d(NECK),
            nn.Conv2d(NECK, NECK, 3, padding=1, bias=False),
            LayerNorm2d(NECK),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, H] normalised to [B, 256, h, w]."""
        maps = self.patch_embed(images)
        x = rearrange(maps + self.positions(), "b d h w -> b (h w) d")
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.neck(rearrange(x, "b (h w) d -> b d h w", h=self.shape.grid))

    def positions(self) -> torch.Tensor:
        """The stored positions at the embedding's grid, [1, D, h, w]."""
        stored = rearrange(
            self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=self.shape.pretrained_grid
        )
        size = (self.shape.grid, self.shape.grid)
        return F.interpolate(stored, size, mode="bicubic", align_corners=False)


class EfficientSam(nn.Module):
    """The released model's interface, and that of segment_anything's ``Sam``.

    ``SamPredictor(model)`` and ``SamAutomaticMaskGenerator(model)`` work.
    """

    mask_threshold, image_format = 0.0, "RGB"

    def __init__(
        self, shape: ModelShape, checkpointing: bool = False, dropout: float = 0.0
    ) -> None:
        """``dropout``: of the mask decoder, while training."""
        super().__init__()
        self.shape = shape
        self.image_encoder = ImageEncoder(shape, checkpointing)
        self.prompt_encoder = PromptEncoder(NECK, shape.grid, shape.image_size)
        self.mask_decoder = MaskDecoder(NECK, dropout)
        self.normalise = Normalise()
        self.apply(initialise)

    # -- the released model's interface -------------------------------------------------------

    def forward(
        self, images: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Three masks for each prompt, at the pictures' size.

        Args:
            images: [B, 3, H, W], uint8 or 0..1.
            points: [B, Q, P, 2], x and y in pixels of these pictures.
            labels: [B, Q, P]: 1 click, 2 and 3 corners of a box, -1 none.

        Returns:
            Logits [B, Q, 3, H, W] and predicted IoU [B, Q, 3], unsorted.
        """
        size = tuple(images.shape[2:])
        embeddings = self.get_image_embeddings(images)
        return self.predict_masks(embeddings, points, labels, True, *size, *size)

    def get_image_embeddings(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W], uint8 or 0..1, to embeddings [B, 256, h, w]."""
        frame = self.shape.frame(*images.shape[2:])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.shape[2:] != frame:
            images = F.interpolate(images, frame, mode="bilinear", align_corners=False)
        return self.image_encoder(self._pad(self.normalise(images)))

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
            points: [B, Q, P, 2] in pixels of a picture of ``input_h`` x ``input_w``; points behind
                the sixth are dropped.
            labels: [B, Q, P]: 1 click, 2 and 3 corners of a box, -1 none.
            multimask_output: masks 1..3; otherwise mask 0, which the released weights and ours
                never trained.
            output_h, output_w: size of the logits; without one they come as they are, four times
                the embedding's.

        Returns:
            Logits [B, Q, M, H, W] and predicted IoU [B, Q, M]; M is 3 or 1.

        Raises:
            ValueError: a background click.
        """
        refuse_background(labels)
        if not multimask_output:
            logging.getLogger(__name__).warning(
                "multimask_output=False asks for mask 0, which was never trained; take the best "
                "of three by its predicted IoU"
            )
        height, width = self.shape.frame(input_h, input_w)
        scale = points.new_tensor([width / input_w, height / input_h])
        logits, iou = self.predict_low_resolution(embeddings, rescale(points, scale), labels)
        logits, iou = (x[:, :, 1:] if multimask_output else x[:, :, :1] for x in (logits, iou))
        if output_h > 0 and output_w > 0:
            logits = self._resize(logits, (input_h, input_w), (output_h, output_w))
        return logits, iou

    def predict_low_resolution(
        self, embeddings: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks [B, Q, 4, 4h, 4w] and their predicted IoU [B, Q, 4].

        Args:
            points: [B, Q, P, 2] in pixels of the model's own square input.
        """
        tokens = self.prompt_encoder.embed(*pad_points(points, labels))
        return self.mask_decoder.predict(embeddings, self.prompt_encoder.get_dense_pe(), tokens)

    # -- the interface of segment_anything's Sam ----------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.image_encoder.pos_embed.device

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        """What SamPredictor resized, [1, 3, H, W] in 0..255, as the encoder takes it."""
        size, frame = self.shape.image_size, tuple(x.shape[2:])
        images = x.float() / 255
        if self.shape.resize == "square":
            self.prompt_encoder.frame = frame
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        return self._pad(self.normalise(images))

    def postprocess_masks(
        self, masks: torch.Tensor, input_size: tuple[int, int], original_size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [Q, M, 4h, 4w] at the size of the picture, [Q, M, H, W]."""
        return self._resize(masks.unsqueeze(0), original_size, original_size)[0]

    # -- geometry -----------------------------------------------------------------------------

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """Zeros on the right and below, up to the model's input."""
        size = self.shape.image_size
        return F.pad(images, (0, size - images.shape[3], 0, size - images.shape[2]))

    def _resize(
        self, logits: torch.Tensor, picture: tuple[int, int], size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [B, Q, M, 4h, 4w] of a picture at another size, without its padding."""
        pictures = len(logits)
        logits = rearrange(logits, "b q m h w -> (b q) m h w")
        if self.shape.resize == "longest":
            full = self.shape.image_size
            logits = F.interpolate(logits, (full, full), mode="bilinear", align_corners=False)
            height, width = self.shape.frame(*picture)
            logits = F.interpolate(
                logits[..., :height, :width], size, mode="bilinear", align_corners=False
            )
        else:
            logits = F.interpolate(logits, size, mode="bicubic", align_corners=False)
        return rearrange(logits, "(b q) m h w -> b q m h w", b=pictures)


def start_from_encoder(model: EfficientSam, encoder: Encoder) -> None:
    """Give a model the encoder of stage 1; its final norm stays behind (row 14 of the recipe).

    Raises:
        UserError: the encoder has another shape.
    """
    ours, theirs = model.shape, encoder.shape
    for name in ("width", "depth", "heads", "patch_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"encoder.checkpoint has {name} {getattr(theirs, name)} and the configuration asks "
                f"for {getattr(ours, name)}; set encoder.name or encoder.{name} accordingly"
            )
    if encoder.grid != ours.pretrained_grid:
        raise UserError(
            f"encoder.checkpoint has {encoder.grid} x {encoder.grid} positions and the model "
            f"{ours.pretrained_grid} x {ours.pretrained_grid}"
        )
    left = {"cls_token", "norm.weight", "norm.bias"}
    taken = {name: t for name, t in encoder.state_dict().items() if name not in left}
    told = model.image_encoder.load_state_dict(taken, strict=False)
    assert not told.unexpected_keys and all(name.startswith("neck.") for name in told.missing_keys)


def export_header(model: EfficientSam, **more: Any) -> dict[str, str]:
    """Metadata of ``model.safetensors``: JSON with the shape and what else there is to know."""
    return {"model": json.dumps({"kind": "efficientsam", **asdict(model.shape), **more})}


def load_model(path: str | Path) -> EfficientSam:
    """A model that segments, in eval mode, with the released interface.

    Args:
        path: ``model.safetensors`` of ours or the run folder that holds it; the released
            EfficientSAM's ``.pt``.

    Raises:
        UserError: missing, damaged, or of no kind that is known.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file} does not exist; name a model.safetensors or a released .pt file")
    shape, tensors = (_read_ours if file.suffix == ".safetensors" else _read_released)(file)
    model = EfficientSam(shape)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit EfficientSAM: {what}") from error
    return model.eval()


def _read_ours(file: Path) -> tuple[ModelShape, dict[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as stored:
            header = json.loads((stored.metadata() or {})["model"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        return ModelShape(**{item.name: header[item.name] for item in fields(ModelShape)}), tensors
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} is not a model of stage 2 ({what}); give the model.safetensors of a run"
        ) from error


def _read_released(file: Path) -> tuple[ModelShape, dict[str, torch.Tensor]]:
    """``torch.save({"model": state_dict})`` as EfficientSAM's authors publish it."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        tensors = stored.get("model", stored)
        width = tensors["image_encoder.patch_embed.proj.weight"].shape[0]
        depth = len({name.split(".")[2] for name in tensors if ".blocks." in name})
        grid = round((tensors["image_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        what = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read as weights ({what}); fetch it again") from error
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{file} holds no EfficientSAM ({type(error).__name__}: {error}); give "
            "efficient_sam_vitt.pt, efficient_sam_vits.pt or a model.safetensors"
        ) from error
    return ModelShape(width, depth, width // HEAD_WIDTH, pretrained_grid=grid), tensors
