"""Models by configuration and by file.

``load_model`` opens what can segment: the released EfficientSAM, SAM itself, MobileSAM, and ours.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.sam import ModelShape, Sam
from sami.core.config import PATH, require
from sami.core.optim import TrainConfig
from sami.core.weights import Takes, Weights, load_strictly
from sami.encoder import EncoderConfig
from sami.encoders.files import read_model, read_shape
from sami.encoders.protocol import MODEL_PREFIX, NECK_CHANNELS, EncoderShape
from sami.encoders.registry import KINDS, build
from sami.grids import GRID

TAKES_MODEL = Takes(
    ("model",),
    "the folder of a run of stage 2 (python finetune/train.py ...), its model.safetensors, a "
    "released EfficientSAM .pt (efficient_sam_vitt.pt, efficient_sam_vits.pt.zip), SAM's .pth or "
    "MobileSAM's .pt",
)
TAKES_ENCODER = Takes(  # encoder.checkpoint in stage 2
    ("encoder", "model"),
    "the folder of a run of stage 1 (python sami/pretrain.py ...) or its encoder.safetensors; or "
    "a model, whose image encoder is taken: a run of stage 2, its model.safetensors, a released "
    ".pt, SAM's .pth; or a ViT of MAE's or timm's, as a file or as timm:NAME",
)


@dataclass
class MaskDecoderConfig:
    """The prompt encoder and mask decoder.

    Attributes:
        kind: efficientsam, the released architecture; sam, segment-anything's own, which also
            takes background clicks and masks as prompts.
        checkpoint: a model to take them from (a run of stage 2, model.safetensors, a released
            .pt, SAM's .pth); null or empty to begin from scratch. SAM's tensors fit efficientsam
            too, as a start: its function differs.
        freeze: what is not trained.
        dropout: in efficientsam's mask decoder, while training; sam's has none.
        width: channels of the embedding and of the tokens; 256 in all published models.
    """

    kind: Literal["efficientsam", "sam"] = "efficientsam"
    checkpoint: str | None = field(default=None, metadata=PATH)
    freeze: Literal["none", "encoder", "decoder"] = "none"
    dropout: float = 0.0
    width: int = NECK_CHANNELS

    def check(self) -> None:
        self.checkpoint = self.checkpoint or None
        require(
            0 <= self.dropout < 1, f"decoder.dropout {self.dropout} must be 0 (none) or under 1"
        )
        require(
            self.kind == "efficientsam" or self.dropout == 0,
            f"decoder.dropout {self.dropout}: segment-anything's mask decoder has no dropout; set "
            "0, or decoder.kind efficientsam",
        )
        require(
            self.width > 0 and self.width % 16 == 0,
            f"decoder.width {self.width} must be a positive multiple of 16, such as 256",
        )


@dataclass
class LengthConfig(TrainConfig):
    """How long, and in which pieces.

    Attributes:
        checkpointing: recompute the encoder's blocks in the backward pass: less memory, more time.
    """

    checkpointing: bool = False


def build_model(
    encoder: EncoderConfig,
    decoder: MaskDecoderConfig,
    image_size: int,
    resize: str,
    checkpointing: bool,
    single_mask: bool = False,
    say: Callable[[str], None] = print,
) -> Sam:
    """The model of a configuration, with the weights that it names (TAKES_ENCODER, TAKES_MODEL).

    Args:
        checkpointing: recompute the encoder's blocks in the backward pass.
        single_mask: train mask 0 too.
        say: told where a checkpoint is not that of a run's end.

    Raises:
        UserError: sizes that do not fit each other or the checkpoints.
    """
    width, depth, heads = encoder.shape
    patch = encoder.patch_size
    require(
        image_size % patch == 0,
        f"data.image_size {image_size} is not divisible by encoder.patch_size {patch}",
    )
    start = None
    # A student keeps stage 1's grid of positions, 14 x 14 as released.
    grid = encoder.grid or GRID
    if encoder.checkpoint:
        stored, start, what = _load_image_encoder(encoder, say)
        grid = stored.grid
        encoder.check_grid(grid, f"of {what}")
    elif not KINDS[encoder.kind].pretrains:
        grid = image_size // patch
        encoder.check_grid(grid, f"of {encoder.name}")
    shape = ModelShape(
        EncoderShape(encoder.kind, width, depth, heads, patch, image_size, grid, decoder.width),
        decoder.kind,
        resize,
        single_mask,
    )
    model = Sam(shape, checkpointing, decoder.dropout)
    does_not = "does not fit the configuration"
    remedy = "set encoder.name, decoder.kind and decoder.width to what it holds"
    if start is not None:
        neck = "neck." if stored.channels is None else ""  # stage 1 has none
        load_strictly(model.image_encoder, start, f"{what} {does_not}", remedy, may_miss=neck)
    if decoder.checkpoint:
        parts, what = _load_decoder(decoder, say)
        for name, tensors in parts.items():
            module = getattr(model, name)
            load_strictly(module, tensors, f"{what} {does_not}", remedy, prefix=f"{name}.")
    # A micro-batch of an image or two has no statistics worth having.
    model.image_encoder.frozen_statistics = bool(encoder.checkpoint)
    model.train()
    if decoder.freeze == "encoder":
        model.image_encoder.requires_grad_(False)
    if decoder.freeze == "decoder":
        model.prompt_encoder.requires_grad_(False)
        model.mask_decoder.requires_grad_(False)
    if not single_mask:  # mask 0 is not asked for while training: nothing would reach its network
        model.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)
    return model


def _load_image_encoder(
    encoder: EncoderConfig, say: Callable[[str], None]
) -> tuple[EncoderShape, dict[str, torch.Tensor], str]:
    """Shape and tensors of an image encoder, of stage 1 or of a model; and its file."""
    option = "encoder.checkpoint"
    weights, file = read_model(encoder.checkpoint, TAKES_ENCODER, option, say)
    what = f"{option} {file}"
    remedy = TAKES_ENCODER.remedy(option)
    tensors = weights.below(MODEL_PREFIX)
    if tensors:
        stored = read_shape(weights, "model", what, remedy)
    else:
        stored = read_shape(weights, "encoder", what, remedy, encoder.shape[2])
        with torch.device("meta"):  # stage 2 has no class token and no last norm
            forms = [build(one).state_dict() for one in (stored, replace(stored, channels=1))]
        left = forms[0].keys() - forms[1].keys()
        tensors = {name: t for name, t in weights.tensors.items() if name not in left}
    pairs = {"patch_size": (encoder.patch_size, stored.patch_size)}
    if weights.kind is not None or stored.kind == "sam":  # no tensor's shape tells the heads
        pairs["heads"] = (encoder.shape[2], stored.heads)
    for name, (asked, own) in pairs.items():
        require(
            asked == own,
            f"{what} does not fit the configuration: it has {name} {own}, and encoder.{name} is "
            f"{asked}; set encoder.name or encoder.{name} to its own",
        )
    return stored, tensors, what


def _load_decoder(
    decoder: MaskDecoderConfig, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, torch.Tensor]], str]:
    """The tensors of a prompt encoder and a mask decoder, by attribute; and their file.

    SAM's own are renamed where ``decoder.kind`` is efficientsam.
    """
    option = "decoder.checkpoint"
    weights, file = read_model(decoder.checkpoint, TAKES_MODEL, option, say)
    what = f"{option} {file}"
    parts = {part: weights.below(f"{part}.") for part in ("prompt_encoder", "mask_decoder")}
    require(all(parts.values()), f"{what} holds no mask decoder; {TAKES_MODEL.remedy(option)}")
    if decoder.kind != "sam" and of_sam(weights):
        parts = {name: _renamed(part) for name, part in parts.items()}
    return parts, what


def trains_single_mask(path: str, say: Callable[[str], None] = print) -> bool:
    """Whether mask 0 is trained in the model at ``decoder.checkpoint``.

    Raises:
        UserError: it cannot be read.
    """
    weights, _ = read_model(path, TAKES_MODEL, "decoder.checkpoint", say)
    header = weights.header("model")
    return of_sam(weights) if header is None else bool(header.get("single_mask"))


def of_sam(weights: Weights) -> bool:
    """Whether a model's prompt encoder and mask decoder are segment-anything's."""
    return "prompt_encoder.no_mask_embed.weight" in weights.tensors


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


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SAM's prompt encoder or mask decoder under the released EfficientSAM's names."""
    result = {}
    for name, tensor in tensors.items():
        if not name.startswith(NOT_HERE):
            for pattern, replacement in RENAMED:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor
    return result


def model_header(model: Sam, **more: Any) -> dict[str, str]:
    """Metadata of ``model.safetensors``: JSON with the shape and what else there is to know."""
    return {"model": json.dumps(asdict(model.shape) | more)}


def load_model(path: str | Path, option: str = "", say: Callable[[str], None] = print) -> Sam:
    """A model that segments, in eval mode, with the released interface.

    Args:
        path: as TAKES_MODEL lists them; of a run that has not ended, its newest checkpoint.
        option: that the path was given by, for messages.
        say: told where the weights are not those of the run's end.

    Raises:
        UserError: missing, damaged, or of no kind that is known.
        OSError: the machine cannot read it.
    """
    weights, file = read_model(path, TAKES_MODEL, option, say)
    what = f"{option} {file}".strip()
    remedy = TAKES_MODEL.remedy(option)
    encoder = read_shape(weights, "model", what, remedy)
    header = weights.header("model")
    if header is not None:
        shape = ModelShape(encoder, *(header.get(n) for n in ("decoder", "resize", "single_mask")))
    else:
        theirs = of_sam(weights)
        resize = "longest" if theirs else "square"
        shape = ModelShape(encoder, "sam" if theirs else "efficientsam", resize, theirs)
    model = Sam(shape)
    does_not = f"{what} does not fit {'itself' if header else shape.decoder}"
    load_strictly(model, weights.tensors, does_not, remedy)
    return model.eval()
