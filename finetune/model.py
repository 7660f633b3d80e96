"""Models by configuration and by file.

``load_model`` opens what can segment: the released EfficientSAM, SAM itself, and ours.
"""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import nn

from finetune.sam import ModelShape, Sam
from sami.core.config import PATH, require
from sami.core.errors import UserError
from sami.encoder import EncoderConfig, load_encoder
from sami.image_encoder import (
    MODEL_FILE,
    ImageEncoderShape,
    encoder_of_header,
    find_model,
    read_header,
)
from sami.sam_encoder import NECK_CHANNELS, SAM_SHAPES

HEAD_WIDTH = 64  # of the released models' attention heads


@dataclass
class DecoderConfig:
    """The prompt encoder and mask decoder.

    Attributes:
        kind: efficientsam, the released architecture; sam, segment-anything's own, which also
            takes background clicks and masks as prompts.
        checkpoint: a model to take them from (model.safetensors, a released .pt, SAM's .pth); null
            to begin from scratch. SAM's tensors fit efficientsam too, as a start: its function
            differs.
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
    single_mask: bool = False,
) -> Sam:
    """The model of a configuration, with the weights that it names.

    ``encoder.checkpoint`` is stage 1's encoder.safetensors or its run folder, or a model whose
    image encoder, neck included, is taken. ``decoder.checkpoint`` is a model.

    Args:
        checkpointing: recompute the encoder's blocks in the backward pass.
        single_mask: train mask 0 too.

    Raises:
        UserError: sizes that do not fit each other or the checkpoints.
    """
    width, depth, heads = encoder.shape
    patch = encoder.patch_size
    require(
        image_size % patch == 0,
        f"data.image_size {image_size} is not divisible by encoder.patch_size {patch}",
    )
    kind = "sam" if encoder.name in SAM_SHAPES else "vit"
    start = None
    # An encoder of our own keeps stage 1's grid of positions, 14 x 14 as released.
    grid = 14 if kind == "vit" else image_size // patch
    if encoder.checkpoint is not None:
        start = _load_image_encoder(encoder.checkpoint)
        grid = _grid_of(start["pos_embed"])
    shape = ModelShape(
        ImageEncoderShape(kind, width, depth, heads, patch, image_size, grid, decoder.width),
        decoder.kind,
        resize,
        single_mask,
    )
    model = Sam(shape, checkpointing, decoder.dropout)
    if start is not None:
        what = f"encoder.checkpoint {encoder.checkpoint}"
        _take(model.image_encoder, start, what, may_miss="neck." if kind == "vit" else "")
    if decoder.checkpoint is not None:
        for name, tensors in _load_decoder(decoder.checkpoint, decoder.kind).items():
            _take(getattr(model, name), tensors, f"decoder.checkpoint {decoder.checkpoint}")
    if decoder.freeze == "encoder":
        model.image_encoder.requires_grad_(False)
    if decoder.freeze == "decoder":
        model.prompt_encoder.requires_grad_(False)
        model.mask_decoder.requires_grad_(False)
    if not single_mask:  # mask 0 is not asked for while training: nothing would reach its network
        model.mask_decoder.output_hypernetworks_mlps[0].requires_grad_(False)
    return model


def _grid_of(positions: torch.Tensor) -> int:
    """Side of the grid of stored positions: SAM's [1, h, w, D] or ours [1, 1 + h * w, D]."""
    return positions.shape[1] if positions.ndim == 4 else round((positions.shape[1] - 1) ** 0.5)


def _load_image_encoder(path: str) -> dict[str, torch.Tensor]:
    """The tensors of an image encoder, of stage 1 (without neck) or of a model."""
    place = Path(path)
    of_stage_1 = place.name == "encoder.safetensors" or (place / "encoder.safetensors").exists()
    if not of_stage_1 and (find_model(place) or not place.is_dir()):
        return load_model(path).image_encoder.state_dict()
    stored = load_encoder(path).state_dict()
    left = ("cls_token", "norm.weight", "norm.bias")  # stage 2 has no class token and no last norm
    return {name: tensor for name, tensor in stored.items() if name not in left}


PARTS = ("prompt_encoder", "mask_decoder")


def _load_decoder(path: str, kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a prompt encoder and a mask decoder, by attribute.

    SAM's own are renamed where ``kind`` is efficientsam.
    """
    if find_model(path):
        model = load_model(path)
        parts = {name: getattr(model, name).state_dict() for name in PARTS}
    else:
        tensors = _read_tensors(Path(path))
        parts = {
            part: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(part)}
            for part in PARTS
        }
    of_sam = "no_mask_embed.weight" in parts["prompt_encoder"]
    return {n: _renamed(p) for n, p in parts.items()} if kind != "sam" and of_sam else parts


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
            "encoder.name, decoder.kind and decoder.width to what it holds"
        )
    module.load_state_dict(tensors, strict=False)


def export_header(model: Sam, **more: Any) -> dict[str, str]:
    """Metadata of ``model.safetensors``: JSON with the shape and what else there is to know."""
    return {"model": json.dumps({**model.shape.header(), **more})}


def load_model(path: str | Path) -> Sam:
    """A model that segments, in eval mode, with the released interface.

    Args:
        path: ``model.safetensors`` of ours or the run folder that holds it; the released
            EfficientSAM's ``.pt``; SAM's ``.pth``.

    Raises:
        UserError: missing, damaged, or of no kind that is known.
    """
    path = Path(path)
    ours = find_model(path)
    file = ours or path
    if not file.is_file():
        at = path / MODEL_FILE if path.is_dir() else path
        raise UserError(
            f"{at} does not exist; name a {MODEL_FILE}, the folder of a finished run of "
            "finetune/train.py, a released .pt or SAM's .pth"
        )
    if ours:
        header = read_header(file)
        shape = ModelShape(
            encoder_of_header(header, file),
            *(header.get(name) for name in ("decoder", "resize", "single_mask")),
        )
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    else:
        tensors = _read_tensors(file)
        shape = _shape_of(tensors, file)
    model = Sam(shape)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{file} does not fit {shape.decoder}: {what}") from error
    return model.eval()


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """A state dict as EfficientSAM's authors (below ``model``) and SAM's publish it."""
    require(
        file.is_file(),
        f"{file} does not exist; fetch it from its authors, or name another checkpoint",
    )
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        tensors = stored.get("model", stored)
        return {name: tensor.float() for name, tensor in tensors.items()}
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        what = " ".join(str(error).split())[:120]
        raise UserError(f"{file} cannot be read as weights ({what}); fetch it again") from error
    except AttributeError as error:
        raise _no_model(file, "its values are no tensors") from error


def _shape_of(tensors: dict[str, torch.Tensor], file: Path) -> ModelShape:
    """What published weights are, by their names and shapes."""
    prefix = "image_encoder."
    try:
        width, _, patch, _ = tensors[f"{prefix}patch_embed.proj.weight"].shape
        positions = tensors[f"{prefix}pos_embed"]
        depth = len({name.split(".")[2] for name in tensors if name.startswith(f"{prefix}blocks.")})
        channels = tensors[f"{prefix}neck.0.weight"].shape[0]
        kind = "sam" if positions.ndim == 4 else "vit"
        grid, image_size, heads = _grid_of(positions), 1024, width // HEAD_WIDTH
        if kind == "sam":
            image_size = grid * patch
            heads = width // tensors[f"{prefix}blocks.0.attn.rel_pos_h"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise _no_model(file, f"{type(error).__name__}: {error}") from error
    encoder = ImageEncoderShape(kind, width, depth, heads, patch, image_size, grid, channels)
    of_sam = "prompt_encoder.no_mask_embed.weight" in tensors
    return ModelShape(
        encoder,
        "sam" if of_sam else "efficientsam",
        "longest" if kind == "sam" else "square",
        single_mask=of_sam,
    )


def _no_model(file: Path, why: str) -> UserError:
    return UserError(
        f"{file} holds no model that is known here ({why}); give efficient_sam_vitt.pt, "
        f"efficient_sam_vits.pt, sam_vit_b_01ec64.pth or its relatives, or a {MODEL_FILE}"
    )
