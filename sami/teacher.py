"""A frozen teacher: SAM's image encoder, or that of a model of ours."""

import hashlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from sami.core.config import PATH, require
from sami.core.errors import UserError
from sami.core.images import Normalise
from sami.image_encoder import find_model, load_image_encoder
from sami.sam_encoder import NATIVE_SIZE, PATCH_SIZE, SAM_SHAPES, SamEncoder

DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL = {  # SAM's files
    "sam_vit_h": "sam_vit_h_4b8939.pth",
    "sam_vit_l": "sam_vit_l_0b3195.pth",
    "sam_vit_b": "sam_vit_b_01ec64.pth",
}
CUSTOM = (64, 4, 4)  # width, depth, heads of "custom"


@dataclass
class TeacherConfig:
    """SAM's image encoder, frozen.

    Attributes:
        name: sam_vit_h, sam_vit_l, sam_vit_b; custom, the same architecture at width, depth and
            heads (small by default); none, where the target is pixels.
        checkpoint: the official .pth; a run folder of stage 2, or its model.safetensors, with
            custom, which then takes its shape from there; or random, which a run reports loudly.
        image_size: side in pixels of the picture that the teacher sees.
        layer: neck, 256 channels; trunk, the last block's output at the encoder's width.
        pool: how its grid is brought to the student's. area averages (torch's adaptive average
            pooling); bilinear is antialiased.
        cached: the features of the whole pictures stand in the shards (tools/cache_teacher.py),
            and a crop's target is cut out of them; the teacher itself is not loaded. checkpoint
            is then only compared, and may be left out.
        attention: of the blocks that see the whole picture: sdpa, with all pairs' relative
            positions as a mask in memory; flex, FlexAttention, without it, for a GPU.
        width: of custom.
        depth: of custom.
        heads: of custom.
    """

    name: Literal["sam_vit_h", "sam_vit_l", "sam_vit_b", "custom", "none"] = "sam_vit_h"
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
        require(
            self.image_size > 0 and self.image_size % PATCH_SIZE == 0,
            f"teacher.image_size {self.image_size} must be a positive multiple of {PATCH_SIZE}, "
            "such as 224 or 1024",
        )
        given = [name for name in ("width", "depth", "heads") if getattr(self, name) is not None]
        require(
            self.name == "custom" or not given,
            f"teacher.{given[0] if given else ''} goes with teacher.name custom; leave it out "
            f"for {self.name}",
        )
        width, depth, heads = self.shape
        require(min(width, depth, heads) > 0, "teacher.width, depth and heads must be positive")
        require(
            width % heads == 0, f"teacher.width {width} is not divisible by teacher.heads {heads}"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        if self.name != "custom":
            return SAM_SHAPES[self.name]
        return tuple(
            own if given is None else given
            for own, given in zip(CUSTOM, (self.width, self.depth, self.heads), strict=True)
        )


class Teacher(nn.Module):
    """From pictures to features: frozen, without gradients, in eval mode whatever happens."""

    def __init__(
        self, encoder: nn.Module, layer: str = "neck", image_size: int = NATIVE_SIZE
    ) -> None:
        """``encoder``: as :mod:`sami.image_encoder` describes it."""
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.layer, self.image_size = layer, image_size
        self.normalise = Normalise()
        super().train(False)

    @property
    def channels(self) -> int:
        """Of the features: 256 after SAM's neck, the width of the trunk before it."""
        return self.encoder.channels if self.layer == "neck" else self.encoder.width

    def train(self, mode: bool = True) -> "Teacher":
        """Does nothing: a teacher stays in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures of any shape up to ``image_size``.

        Args:
            images: [B, 3, H, W], uint8 or 0..1. Shorter sides are padded on the right and below
                after normalisation, as SAM does.

        Returns:
            [B, C, s, s] with s = image_size / 16 for SAM; C is ``channels``.
        """
        height, width = images.shape[2:]
        if max(height, width) > self.image_size:
            raise ValueError(
                f"pictures of {height}x{width} pixels are larger than teacher.image_size "
                f"{self.image_size}"
            )
        images = F.pad(
            self.normalise(images), (0, self.image_size - width, 0, self.image_size - height)
        )
        return self.features(images)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder itself: normalised [B, 3, H, W], sides multiples of 16, to [B, C, h, w]."""
        return self.encoder(images) if self.layer == "neck" else self.encoder.trunk(images)


def to_grid(features: torch.Tensor, grid: int, pool: str) -> torch.Tensor:
    """Features [B, C, h, w] brought to the student's grid, as tokens [B, grid * grid, C]."""
    if features.shape[2:] != (grid, grid):
        options = {"mode": "area"} if pool == "area" else {"mode": "bilinear", "antialias": True}
        features = F.interpolate(features.float(), (grid, grid), **options)
    return rearrange(features, "b c h w -> b (h w) c")


def load_teacher(config: TeacherConfig) -> Teacher:
    """The frozen teacher of a configuration.

    Raises:
        UserError: no checkpoint, or one that does not fit strictly.
    """
    require(
        config.name != "none",
        "teacher.name none gives no features; choose sam_vit_h, sam_vit_l or sam_vit_b",
    )
    model = find_model(config.checkpoint)
    if config.checkpoint == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # one and the same random teacher in every run and process
            encoder = SamEncoder(*config.shape)
    elif model is not None:
        encoder = _load_ours(config, model)
    else:
        path = _checkpoint_path(config)
        with torch.device("meta"):
            encoder = SamEncoder(*config.shape)
        _load_strictly(encoder, path, config.name)
    if config.attention == "flex":
        require(
            isinstance(encoder, SamEncoder),
            "teacher.attention flex is for SAM's own encoder; the plain ViT of teacher.checkpoint "
            f"{config.checkpoint} has no relative positions: set sdpa",
        )
        encoder.flex = True
    return Teacher(encoder, config.layer, config.image_size)


def describe_teacher(config: TeacherConfig, teacher: Teacher) -> dict[str, object]:
    """Name, sha256 and whether random, for the summary of a run."""
    random = config.checkpoint == "random"
    return {
        "name": config.name,
        "checkpoint": config.checkpoint,
        "sha256": _tensors_sha256(teacher.encoder) if random else checkpoint_sha256(config),
        "random": random,
        "image_size": config.image_size,
        "layer": config.layer,
    }


def checkpoint_sha256(config: TeacherConfig) -> str | None:
    """Of the file of the weights, or of a random teacher's tensors; None if none is given.

    Raises:
        UserError: the file does not exist.
    """
    if not config.checkpoint:
        return None
    if config.checkpoint == "random":
        return _tensors_sha256(load_teacher(config).encoder)
    with (find_model(config.checkpoint) or _checkpoint_path(config)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensors_sha256(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_ours(config: TeacherConfig, path: Path) -> nn.Module:
    """The image encoder of a model of stage 2."""
    encoder = load_image_encoder(path)
    own = (encoder.width, encoder.depth, encoder.shape.heads)
    for name, value in zip(("width", "depth", "heads"), own, strict=True):
        given = getattr(config, name)
        require(
            given in (None, value),
            f"teacher.{name} {given} differs from the {value} of teacher.checkpoint "
            f"{config.checkpoint}; leave it out",
        )
    require(
        config.name == "custom" or own == config.shape,
        f"teacher.checkpoint {config.checkpoint} is no {config.name}; set teacher.name custom for "
        "a model of your own",
    )
    require(
        config.image_size % encoder.patch_size == 0,
        f"teacher.image_size {config.image_size} is not divisible by the teacher's patches of "
        f"{encoder.patch_size} pixels",
    )
    return encoder


def _checkpoint_path(config: TeacherConfig) -> Path:
    file = OFFICIAL.get(config.name)
    remedy = (
        f"fetch {DOWNLOADS}{file}, put it at checkpoints/{file} and set teacher.checkpoint to "
        "that path"
        if file
        else "give the .pth of a SAM of that shape, or a run folder of stage 2"
    )
    ask_random = "(or ask for an untrained teacher by name: teacher.checkpoint=random)"
    require(bool(config.checkpoint), f"teacher.checkpoint is empty; {remedy} {ask_random}")
    path = Path(config.checkpoint)
    require(path.is_file(), f"teacher.checkpoint {path} does not exist; {remedy} {ask_random}")
    return path


def _load_strictly(encoder: SamEncoder, path: Path, name: str) -> None:
    """Official SAM weights into the encoder; every tensor has to be there in its shape."""
    right = (
        f"for {name} fetch {DOWNLOADS}{OFFICIAL[name]}"
        if name in OFFICIAL
        else "give a SAM of the configured shape"
    )
    right += " and point teacher.checkpoint at it"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher.checkpoint {path} is not a readable .pth or is cut short; {right}"
        ) from error
    prefix = "image_encoder."
    tensors = {}
    if isinstance(state, dict):
        tensors = {
            key[len(prefix) :]: value for key, value in state.items() if str(key).startswith(prefix)
        }
    expected = encoder.state_dict()
    problems = [f"{prefix}{key} is missing" for key in expected if key not in tensors]
    problems += [f"{prefix}{key} is not part of {name}" for key in tensors if key not in expected]
    problems += [
        f"{prefix}{key} is {list(value.shape)}, {name} has {list(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if problems:
        raise UserError(
            f"teacher.checkpoint {path} does not fit {name}: {problems[0]}"
            f"{f' and {len(problems) - 1} more' if len(problems) > 1 else ''}; {right}"
        )
    encoder.load_state_dict(
        {key: value.float().clone() for key, value in tensors.items()}, assign=True
    )
