"""A frozen teacher: an image encoder by name, with the weights of its checkpoint."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from sami.core.checkpoint import sha256_of
from sami.core.config import PATH, require
from sami.core.weights import Takes, Weights, find_weights, load_strictly
from sami.encoders.files import read_model
from sami.encoders.protocol import ImageEncoder, token_map
from sami.encoders.registry import TEACHERS
from sami.encoders.sam import NATIVE_SIZE


@dataclass
class TeacherConfig:
    """SAM's image encoder, frozen.

    Attributes:
        name: sam_vit_h, sam_vit_l, sam_vit_b; custom, the same architecture at width, depth and
            heads (small by default); none, where the target is pixels.
        checkpoint: the official .pth; a run folder of stage 2, or its model.safetensors, with
            custom, which then takes its shape from there (likewise a released EfficientSAM's
            .pt); or random, which a run reports loudly.
        image_size: side in pixels of the image that the teacher sees.
        layer: neck, 256 channels; trunk, the last block's output at the encoder's width.
        pool: how its grid is brought to the student's. area averages (torch's adaptive average
            pooling); bilinear is antialiased.
        cached: the features of the whole images stand in the shards (tools/cache_teacher.py),
            and a crop's target is cut out of them; the teacher itself is not loaded. checkpoint
            is then only compared, and may be left out.
        attention: of the blocks that see the whole image: sdpa, with all pairs' relative
            positions as a mask in memory; flex, FlexAttention, without it, for a GPU.
        width: of custom.
        depth: of custom.
        heads: of custom.
    """

    name: Literal[(*TEACHERS, "none")] = "sam_vit_h"
    checkpoint: str = field(default="", metadata=PATH)
    image_size: int = 224
    layer: Literal["neck", "trunk"] = "neck"
    pool: Literal["area", "bilinear"] = "area"
    cached: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None

    def check(self) -> None:
        if self.name == "none":
            return
        stride = TEACHERS[self.name].stride
        require(
            self.image_size > 0 and self.image_size % stride == 0,
            f"teacher.image_size {self.image_size} must be a positive multiple of {stride}, such "
            f"as {14 * stride} or {64 * stride}",
        )
        for name in ("width", "depth", "heads"):
            require(
                self.name == "custom" or getattr(self, name) is None,
                f"teacher.{name} goes with teacher.name custom; leave it out for {self.name}",
            )
        if self.shape is None:
            return
        width, depth, heads = self.shape
        require(min(width, depth, heads) > 0, "teacher.width, depth and heads must be positive")
        require(
            width % heads == 0, f"teacher.width {width} is not divisible by teacher.heads {heads}"
        )

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Width, depth and heads, where they are known."""
        sizes, given = TEACHERS[self.name].sizes, (self.width, self.depth, self.heads)
        return sizes and tuple(
            own if value is None else value for own, value in zip(sizes, given, strict=True)
        )


class Teacher(nn.Module):
    """From images to features: frozen, without gradients, in eval mode whatever happens.

    Channels, stride, normalisation and how a whole image is brought into the square are its
    encoder's own.
    """

    def __init__(
        self, encoder: ImageEncoder, layer: str = "neck", image_size: int = NATIVE_SIZE
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.layer, self.image_size = layer, image_size
        self.file: Path | None = None  # that its weights were read from
        self.stride, self.normalise, self.resize = encoder.stride, encoder.normalise, encoder.resize
        self.channels = encoder.channels if layer == "neck" else encoder.width
        super().train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images of any shape up to ``image_size``.

        Args:
            images: [B, 3, H, W], uint8 or 0..1. Shorter sides are padded on the right and below
                after normalisation, as SAM does.

        Returns:
            [B, C, s, s] with s = image_size / stride; C is ``channels``.
        """
        height, width = images.shape[2:]
        if max(height, width) > self.image_size:
            raise ValueError(
                f"images of {height}x{width} pixels are larger than teacher.image_size "
                f"{self.image_size}"
            )
        padding = (0, self.image_size - width, 0, self.image_size - height)
        return self.features(F.pad(self.normalise(images), padding))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder itself: normalised [B, 3, H, W], sides multiples of its stride, to
        [B, C, h, w]."""
        if self.layer == "neck":
            return self.encoder.maps(images)
        return token_map(self.encoder, images)


def takes_of(config: TeacherConfig, option: str = "teacher.checkpoint") -> Takes:
    """What the checkpoint of a teacher may be, for :func:`sami.core.weights.check_weights`."""
    words = TEACHERS[config.name].takes
    return Takes(
        ("model",), f"{words}; or ask for an untrained one by name: --{option.lstrip('-')} random"
    )


def build_teacher(
    config: TeacherConfig, weights: Weights | None = None, what: str = "", remedy: str = ""
) -> Teacher:
    """The teacher of a configuration, its weights not yet loaded.

    Args:
        weights: those that it shall have, which may tell its shape; None for random ones.
        what: the file that they are of, for a sentence; ``remedy``: the sentence's end.

    Raises:
        UserError: sizes that do not fit each other.
    """
    encoder = TEACHERS[config.name].build(config, weights, what, remedy)
    require(
        config.image_size % encoder.stride == 0,
        f"teacher.image_size {config.image_size} is not divisible by the teacher's patches of "
        f"{encoder.stride} pixels",
    )
    return Teacher(encoder, config.layer, config.image_size)


def load_teacher(
    config: TeacherConfig, option: str = "teacher.checkpoint", say: Callable[[str], None] = print
) -> Teacher:
    """The frozen teacher of a configuration.

    Args:
        option: that the checkpoint was given by, for messages.
        say: told where the weights are not those of a run's end.

    Raises:
        UserError: no checkpoint, or one that does not fit strictly.
        OSError: the machine cannot read it.
    """
    require(
        config.name != "none",
        "teacher.name none gives no features; choose sam_vit_h, sam_vit_l or sam_vit_b",
    )
    if config.checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # one and the same random teacher in every run and process
            teacher = build_teacher(config)
    else:
        takes = takes_of(config, option)
        weights, file = read_model(config.checkpoint, takes, option, say)
        what, remedy = f"{option} {file}", takes.remedy(option)
        teacher = build_teacher(config, weights, what, remedy)
        teacher.file, prefix = file, teacher.encoder.prefix
        does_not = f"{what} does not fit {'itself' if weights.kind else config.name}"
        load_strictly(teacher.encoder, weights.below(prefix), does_not, remedy, prefix=prefix)
    if config.attention == "flex":
        require(
            hasattr(teacher.encoder, "flex"),
            f"teacher.attention flex is for SAM's own encoder; that of teacher.name {config.name}, "
            f"{option} {config.checkpoint}, has no relative positions: set sdpa",
        )
        teacher.encoder.flex = True
    return teacher


def describe_teacher(
    config: TeacherConfig, teacher: Teacher, sha256: str | None = None
) -> dict[str, object]:
    """Name, sha256 and whether random, for the summary of a run.

    Args:
        sha256: of the teacher's file, where it is known already.
    """
    file = teacher.file
    return {
        "name": config.name,
        "checkpoint": config.checkpoint,
        "sha256": tensors_sha256(teacher.encoder) if file is None else sha256 or sha256_of(file),
        "random": file is None,
        "image_size": config.image_size,
        "layer": config.layer,
    }


def checkpoint_sha256(config: TeacherConfig, option: str = "teacher.checkpoint") -> str | None:
    """Of the file of the weights, or of a random teacher's tensors; None if none is given.

    Raises:
        UserError: the file does not exist.
    """
    if not config.checkpoint:
        return None
    if config.checkpoint == "random":
        return tensors_sha256(load_teacher(config).encoder)
    return sha256_of(find_weights(config.checkpoint, takes_of(config, option), option).file)


def tensors_sha256(module: nn.Module) -> str:
    """Of a module's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
