"""Stage 1's student by configuration and by file.

What an encoder is, and which there are, tells :mod:`sami.encoders`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sami.core.config import PATH, require
from sami.core.weights import Takes, load_strictly
from sami.encoders.files import read_model, read_shape
from sami.encoders.protocol import EncoderShape, ImageEncoder
from sami.encoders.registry import ENCODERS, build, names_of_encoders
from sami.grids import PATCH_SIZE

TAKES_STUDENT = Takes(
    ("encoder",),
    "the folder of a run of stage 1 (python sami/pretrain.py ...) or its encoder.safetensors",
)


@dataclass
class EncoderConfig:
    """The student.

    Attributes:
        name: vit_ti, vit_s, vit_b, or custom, whose defaults suit a test on a CPU; in stage 2
            also SAM's own sam_vit_b, sam_vit_l and sam_vit_h, and tiny_vit_5m, 11m and 21m.
        width: of the tokens; null for the name's own (likewise depth and heads).
        depth: number of blocks.
        heads: attention heads per block.
        patch_size: side of a patch in pixels.
        checkpoint: encoder.safetensors, or the folder of a run of stage 1, to start from; in
            stage 2 also a model (model.safetensors or its run folder, released .pt, SAM's .pth);
            a file of MAE's or of a ViT of timm's, or timm:NAME, which is downloaded; null or empty
            for none.
        grid: side of the grid that positions are stored for; null for the checkpoint's own, and
            without one for the images' in stage 1 and the released model's 14 in stage 2.
    """

    name: str = "vit_ti"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int = PATCH_SIZE
    checkpoint: str | None = field(default=None, metadata=PATH)
    grid: int | None = None

    def check(self) -> None:
        self.checkpoint = self.checkpoint or None
        require(
            self.name in ENCODERS,
            f"encoder.name '{self.name}' is not one of {', '.join(names_of_encoders())}; choose "
            "one of them",
        )
        width, depth, heads = self.shape
        require(
            min(width, depth, heads, self.patch_size) > 0,
            "encoder.width, depth, heads and patch_size must be positive",
        )
        require(
            self.grid is None or self.grid > 0,
            f"encoder.grid {self.grid} must be positive, such as 14, or null",
        )
        require(
            width % heads == 0, f"encoder.width {width} is not divisible by encoder.heads {heads}"
        )
        require(
            width % 4 == 0,
            f"encoder.width {width} must be divisible by 4 for its sine-cosine positions",
        )

    def check_grid(self, grid: int, whose: str) -> None:
        """
        Raises:
            UserError: ``grid`` asks for another one than there is.
        """
        require(
            self.grid in (None, grid),
            f"encoder.grid {self.grid} is not the {grid} {whose}; set null",
        )

    @property
    def kind(self) -> str:
        """Of :data:`sami.encoders.registry.KINDS`."""
        return ENCODERS[self.name].kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads, the name's own where nothing else is given."""
        own = ENCODERS[self.name]
        given = {"width": self.width, "depth": self.depth, "heads": self.heads}
        return tuple(getattr(own, n) if value is None else value for n, value in given.items())

    def student(self, image_size: int) -> EncoderShape:
        """The shape that stage 1 gives it, for square inputs of ``image_size`` pixels."""
        return EncoderShape.stage_one(*self.shape, self.patch_size, image_size, self.kind)


def build_encoder(config: EncoderConfig, image_size: int) -> ImageEncoder:
    """The student of a configuration, with the weights of ``encoder.checkpoint`` if it names some.

    Raises:
        UserError: sizes that do not fit each other or the checkpoint.
    """
    require(
        image_size % config.patch_size == 0,
        f"data.image_size {image_size} is not divisible by encoder.patch_size {config.patch_size}",
    )
    shape = config.student(image_size)
    config.check_grid(shape.grid, "of data.image_size and encoder.patch_size")
    if config.checkpoint:
        return load_encoder(config.checkpoint, "encoder.checkpoint", shape)
    return build(shape)


def export_header(encoder: ImageEncoder, **more: object) -> dict[str, str]:
    """Metadata of ``encoder.safetensors``: JSON with the shape and what else there is to know."""
    return {"encoder": json.dumps({**encoder.shape.header(), **more})}


def load_encoder(
    path: str | Path,
    option: str = "",
    shape: EncoderShape | None = None,
    say: Callable[[str], None] = print,
) -> ImageEncoder:
    """Rebuild a stage-1 encoder from its file, or from the run folder that holds it.

    Args:
        path: ``encoder.safetensors``, the folder of a run of stage 1 (its newest checkpoint, as
            long as it has not ended), or a state dict of such a ViT, MAE's for example.
        option: that the path was given by, for messages.
        shape: what it has to be; None for whatever it is.
        say: told where the weights are not those of the run's end.

    Raises:
        UserError: missing, damaged, no encoder, or one of another shape.
        OSError: the machine cannot read it.
    """
    weights, file = read_model(path, TAKES_STUDENT, option, say)
    what, remedy = f"{option} {file}".strip(), TAKES_STUDENT.remedy(option)
    own = read_shape(weights, "encoder", what, remedy, shape and shape.heads)
    require(
        shape is None or own == shape,
        f"{what} is an encoder with {own.describe()}, and the configuration asks for "
        f"{shape and shape.describe()}; set encoder.name (or width, depth and heads), "
        "encoder.patch_size and data.image_size to its own",
    )
    with torch.device("meta"):
        encoder = build(own)
    does_not = f"{what} does not fit an encoder with {own.describe()}"
    load_strictly(encoder, weights.tensors, does_not, remedy)
    return encoder
