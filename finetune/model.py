"""EfficientSAM: a plain ViT, a neck, and a promptable mask decoder, under the released names.

``load_model`` opens what can segment: the released EfficientSAM, ours, and SAM itself.
"""

import json
import logging
import pickle
import re
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
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.images import Normalise
from sami.encoder import (
    EncoderConfig,
    initialise,
    load_encoder,
    sincos_positions,
    vit_block,
)

NECK = 256  # channels of the image embedding
HEAD_WIDTH = 64  # of the released models' attention heads


@dataclass
class DecoderConfig:
    """The prompt encoder and mask decoder.

    Attributes:
        kind: efficientsam, the released architecture.
        checkpoint: a model to take them from (model.safetensors, a released .pt), or SAM's .pth;
            null to begin from scratch.
        freeze: what is not trained.
        dropout: in the mask decoder, while training.
    """

    kind: Literal["efficientsam"] = "efficientsam"
    checkpoint: str | None = None
    freeze: Literal["none", "encoder", "decoder"] = "none"
    dropout: float = 0.0

    def check(self) -> None:
        require(
            0 <= self.dropout < 1, f"decoder.dropout {self.dropout} must be 0 (none) or under 1"
        )


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

    @property
    def mask_size(self) -> int:
        """Side of the mask decoder's output."""
        return 4 * self.grid

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
        self.pos_embed.data[:, 1:] = sincos_positions(shape.pretrained_grid, width)
        self.patch_embed = PatchEmbed(
            shape.image_size, shape.patch_size, embed_dim=width, flatten=False
        )
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(width, -1))
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
            logits = self.resize_logits(logits, (input_h, input_w), (output_h, output_w))
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
        return self.resize_logits(masks.unsqueeze(0), original_size, original_size)[0]

    # -- geometry -----------------------------------------------------------------------------

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        """Zeros on the right and below, up to the model's input."""
        size = self.shape.image_size
        return F.pad(images, (0, size - images.shape[3], 0, size - images.shape[2]))

    def resize_logits(
        self, logits: torch.Tensor, picture: tuple[int, int], size: tuple[int, int]
    ) -> torch.Tensor:
        """Logits [B, Q, M, 4h, 4w] of a picture at another size, without its padding.

        Args:
            picture: height and width of the picture in pixels.
            size: wanted height and width.
        """
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


def height_of(name: str, depth: int) -> int:
    """How many blocks lie above a parameter, for the layer decay; 0 for all behind the encoder."""
    parts = name.split("image_encoder.")[-1].split(".")
    if parts[0] in ("pos_embed", "patch_embed"):
        return depth + 1
    return depth - int(parts[1]) if parts[0] == "blocks" else 0


def build_model(
    encoder: EncoderConfig,
    decoder: DecoderConfig,
    image_size: int,
    resize: str,
    checkpointing: bool,
) -> EfficientSam:
    """The model of a configuration, with the weights that it names.

    ``encoder.checkpoint`` is stage 1's encoder.safetensors or its run folder, or a model whose
    image encoder, neck included, is taken. ``decoder.checkpoint`` is a model, or SAM's own .pth,
    whose tensors fit but whose function differs (recipe: a start, not a working decoder).

    Raises:
        UserError: sizes that do not fit each other or the checkpoints.
    """
    width, depth, heads = encoder.shape
    start = None if encoder.checkpoint is None else _load_image_encoder(encoder.checkpoint)
    grid = 14 if start is None else round((start["pos_embed"].shape[1] - 1) ** 0.5)
    if image_size % encoder.patch_size:
        raise UserError(
            f"data.image_size {image_size} is not divisible by encoder.patch_size "
            f"{encoder.patch_size}"
        )
    shape = ModelShape(width, depth, heads, encoder.patch_size, image_size, grid, resize)
    model = EfficientSam(shape, checkpointing, decoder.dropout)
    if start is not None:
        what = f"encoder.checkpoint {encoder.checkpoint}"
        _take(model.image_encoder, start, what, may_miss="neck.")
    if decoder.checkpoint is not None:
        parts = _load_decoder(decoder.checkpoint)
        for name, tensors in parts.items():
            what = f"decoder.checkpoint {decoder.checkpoint}"
            _take(getattr(model, name), tensors, what)
    if decoder.freeze == "encoder":
        model.image_encoder.requires_grad_(False)
    if decoder.freeze == "decoder":
        model.prompt_encoder.requires_grad_(False)
        model.mask_decoder.requires_grad_(False)
    # Mask 0 is not asked for while training: nothing would ever reach its network.
    model.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)
    return model


def _load_image_encoder(path: str) -> dict[str, torch.Tensor]:
    """The tensors of an image encoder, of stage 1 (without neck) or of a model."""
    place = Path(path)
    of_stage_1 = place.name == "encoder.safetensors" or (place / "encoder.safetensors").exists()
    if not of_stage_1 and place.suffix != ".safetensors" or place.name == "model.safetensors":
        return load_model(path).image_encoder.state_dict()
    stored = load_encoder(path).state_dict()
    left = ("cls_token", "norm.weight", "norm.bias")  # stage 2 has no class token and no last norm
    return {name: tensor for name, tensor in stored.items() if name not in left}


def _load_decoder(path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a prompt encoder and a mask decoder, by attribute."""
    if Path(path).suffix == ".pth":
        return _from_sam(path)
    model = load_model(path)
    return {name: getattr(model, name).state_dict() for name in ("prompt_encoder", "mask_decoder")}


# SAM's parameter names and the released model's.
RENAMED = (
    (r"^output_upscaling\.0\.", "final_output_upscaling_layers.0.0."),
    (r"^output_upscaling\.1\.", "final_output_upscaling_layers.0.1."),
    (r"^output_upscaling\.3\.", "final_output_upscaling_layers.1.0."),
    (r"^(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.([01])\.", r"\1.layers.\2.0."),
    (r"^(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.fc."),
    (r"\.mlp\.lin1\.", ".mlp.layers.0.0."),
    (r"\.mlp\.lin2\.", ".mlp.fc."),
    (r"^point_embeddings\.1\.", "point_embeddings."),
    (r"^point_embeddings\.2\.", "bbox_top_left_embeddings."),
    (r"^point_embeddings\.3\.", "bbox_bottom_right_embeddings."),
    (r"^not_a_point_embed\.", "invalid_points."),
)
NOT_HERE = ("point_embeddings.0.", "no_mask_embed.", "mask_downscaling.")


def _from_sam(path: str) -> dict[str, dict[str, torch.Tensor]]:
    """The prompt encoder and mask decoder of SAM's official .pth, under the released names."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        parts: dict[str, dict[str, torch.Tensor]] = {"prompt_encoder": {}, "mask_decoder": {}}
        for name, tensor in stored.items():
            part, _, rest = name.partition(".")
            if part in parts and not rest.startswith(NOT_HERE):
                for pattern, replacement in RENAMED:
                    rest = re.sub(pattern, replacement, rest)
                parts[part][rest] = tensor
        return parts
    except (OSError, RuntimeError, AttributeError, pickle.UnpicklingError, EOFError) as error:
        what = " ".join(str(error).split())[:120]
        raise UserError(f"decoder.checkpoint {path} cannot be read as SAM's ({what})") from error


def _take(
    module: nn.Module, tensors: dict[str, torch.Tensor], what: str, may_miss: str = ""
) -> None:
    """Load tensors into a module, strictly but for names that begin with ``may_miss``."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if own.get(name) != tensor.shape]
    wrong += [n for n in own if n not in tensors and not (may_miss and n.startswith(may_miss))]
    if wrong:
        name = wrong[0]
        theirs = tuple(tensors[name].shape) if name in tensors else "none"
        ours = tuple(own[name]) if name in own else "none"
        raise UserError(
            f"{what} does not fit the configuration: {name} is {theirs} and should be {ours}; set "
            "encoder.name and decoder.kind to what it holds"
        )
    module.load_state_dict(tensors, strict=False)


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
