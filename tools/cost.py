"""What a run costs, before anyone rents a machine for it.

python tools/cost.py CONFIG [--images N] [--card A100] [--share 0.3] [--group.field value ...]

CONFIG is one of configs/ or a run folder's config.yaml, of any entry; further options are those
of its entry. Printed are, of each part, the parameters and multiply-adds per image, attention
included, as torch's flop counter finds them; the bytes of a feature cache; the steps; and hours on
--card, if it does --share of its peak (dense bf16, as its maker has it). A backward pass counts as
two forward ones, and a teacher has none. What a card really reaches, tools/bench.py measures.
"""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.classification import build_classifier
from finetune.model import build_model
from finetune.sam import Sam
from sami.core.config import load_config, require
from sami.core.configfile import entry_of, meant_for, merge, read_layers
from sami.core.entries import ENTRIES
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.index import open_sources
from sami.core.network import is_url
from sami.core.options import Options, require_least
from sami.core.paths import local_path
from sami.core.patterns import expand
from sami.core.shipped import find
from sami.core.tables import show_table
from sami.encoder import build_encoder
from sami.encoders.files import read_model
from sami.encoders.registry import TEACHERS, build
from sami.features import DTYPES, Cache
from sami.masking import count_patches
from sami.model import MaskedReconstruction, TokenLossConfig
from sami.teacher import Teacher, TeacherConfig, build_teacher, takes_of

# Dense bf16 (V100: fp16) TFLOP/s with fp32 accumulation, from the makers' data sheets.
CARDS = {
    "V100": 125,
    "A100": 312,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "L4": 121,
    "L40S": 362,
    "A6000": 155,
    "RTX4090": 165,
}
IMAGENET, SA1B = 1_281_167, 11_185_362  # images
ASPECT = (400, 300)  # width and height of an image, where none is at hand
BATCH = 64  # images of a forward: what they share counts once


@dataclass
class Part:
    """A part of a step.

    Attributes:
        parameters: their number.
        macs: multiply-adds of a forward pass, per image.
        passes: forward passes that an image costs: 3 with the backward one.
        once: it is run once per image, not in every epoch.
    """

    name: str
    parameters: int
    macs: float
    passes: int = 3
    once: bool = False


def count(call: Callable[[], Any]) -> FlopCounterMode:
    """Floating-point operations of a call, attention as its matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter


def macs(counter: FlopCounterMode, name: str = "Global") -> float:
    """Multiply-adds of a module."""
    return sum(counter.get_flop_counts().get(name, {}).values()) / 2


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def resolve(config: Path, options: list[str]) -> tuple[str, Any]:
    """The entry, and the whole configuration as it understands it.

    Raises:
        UserError: what the entry refuses.
    """
    content = merge(read_layers(str(config), ""))
    if "stages" in content:
        stages = content["stages"].values() if isinstance(content["stages"], dict) else []
        named = [one["config"] for one in stages if isinstance(one, dict) and "config" in one]
        raise UserError(
            f"{config} is a sweep; name the configuration of one stage: {_either(named)}"
        )
    entry = entry_of(content)
    if entry is None:
        words = meant_for(content, str(config)) or f"has keys that none of {_either(ENTRIES)} knows"
        raise UserError(f"{config} {words}")
    argv = ["--config", str(config), *options, "--run.device=cpu"]
    return entry, load_config(ENTRIES[entry].config_class, argv)


def _either(names: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(names)) or "it has none"


def open_teacher(config: TeacherConfig, mode: FakeTensorMode) -> Teacher:
    """The teacher in shapes alone; its checkpoint is only read where it tells them."""
    takes, option = takes_of(config), "teacher.checkpoint"
    kind = "tiny_vit" if config.name == "mobile_sam" else "sam"
    if not TEACHERS[config.name].shape_in_file or config.checkpoint in ("", "random"):
        return in_shapes(lambda: build_teacher(config), kind, mode)
    weights, file = read_model(config.checkpoint, takes, option)
    shape = build_teacher(config, weights, f"{option} {file}", takes.remedy(option)).encoder.shape
    encoder = in_shapes(lambda: build(shape), shape.kind, mode)
    with mode:
        return Teacher(encoder, config.layer, config.image_size)


def teacher_part(config: TeacherConfig, teacher: Teacher) -> Part:
    """The teacher: once per image with a cache."""
    side = teacher.image_size
    passed = macs(count(lambda: teacher.features(torch.zeros(1, 3, side, side))))
    name = f"teacher {config.name}, {side} px"
    return Part(name, parameters(teacher), passed, 1, config.cached)


def pretrain_parts(config: Any, teacher: Teacher | None) -> list[Part]:
    """Stage 1: student, decoder, head, and the teacher."""
    size, channels, parts = config.data.image_size, 3 * config.encoder.patch_size**2, []
    if teacher is not None:
        parts = [teacher_part(config.teacher, teacher)]
        channels = teacher.channels
    student = build_encoder(replace(config.encoder, checkpoint=None), size)
    ratio = config.mask.ratio
    model = MaskedReconstruction(student, config.decoder, TokenLossConfig(), channels, ratio)
    number, masked = count_patches(config.mask, size // student.stride)
    predicted = max(1, round(masked * config.decoder.predict_fraction)) if masked else 0
    order = torch.arange(number + predicted).expand(BATCH, -1)
    images, visible = torch.zeros(BATCH, 3, size, size), order[:, :number]
    encoded = macs(count(lambda: student.tokens(images, visible if ratio else None))) / BATCH
    parts.append(Part("student", parameters(student), encoded))
    counter = count(lambda: model.predict(images, visible, order[:, number:]))
    total = macs(counter) / BATCH - encoded
    if model.decoder is not None:
        # The flop counter names modules whose forward is called from outside by their class.
        own = macs(counter, type(model.decoder).__name__) / BATCH
        parts.append(Part("decoder", parameters(model.decoder), own))
        total -= own
    return [*parts, Part("head", parameters(model.head), total)]


def in_shapes(build: Callable[[], nn.Module], kind: str, mode: FakeTensorMode) -> nn.Module:
    """What ``build`` makes, in shapes alone. A TinyViT, which is small, is built before that: timm
    reads numbers off a tensor, which a fake one does not have."""
    if kind != "tiny_vit":
        with mode:
            return build()
    built = build()
    with FakeCopyMode(mode):
        return copy.deepcopy(built)


def finetune_parts(config: Any, mode: FakeTensorMode) -> list[Part]:
    """Stage 2: image encoder and mask decoder, for masks_per_image prompts."""
    size = config.data.image_size
    without = [replace(group, checkpoint=None) for group in (config.encoder, config.decoder)]
    build = partial(build_model, *without, size, config.data.resize, False)
    model = in_shapes(build, config.encoder.kind, mode)
    with mode:
        return _finetune_parts(config, model)


def _finetune_parts(config: Any, model: Sam) -> list[Part]:
    size, prompts, head = config.data.image_size, config.data.masks_per_image, config.decoder
    encoder, rounds = model.image_encoder, 1 + config.prompt.corrections
    images, points = torch.zeros(1, 3, size, size), torch.zeros(1, prompts, 2, 2)
    labels = torch.ones(1, prompts, 2)
    maps = torch.zeros(1, head.width, *[size // config.encoder.patch_size] * 2)
    of_encoder = macs(count(lambda: encoder(images)))

    def decode() -> None:
        if head.kind == "sam":  # prompts of one length: grouping them looks at their values
            clicks = model.prompt_encoder.embed_prompts((points[0], labels[0]), None, None)
            positions = model.prompt_encoder.get_dense_pe()
            model.mask_decoder.predict_masks(maps, positions, *clicks)
        else:
            model.predict_low_resolution(maps, points, labels)

    of_decoder = rounds * macs(count(decode))
    own, passes = parameters(encoder), 1 if head.freeze == "encoder" else 3
    name = f"mask decoder, {prompts} prompts" + f" x {rounds} rounds" * (rounds > 1)
    return [
        Part("image encoder", own, of_encoder, passes),
        Part(name, parameters(model) - own, of_decoder),
    ]


def distill_parts(config: Any, teacher: Teacher, mode: FakeTensorMode) -> list[Part]:
    """Distillation: teacher and student, and where masks are compared both under the decoder."""
    with mode:
        first = teacher_part(config.teacher, teacher)
    parts = [first, *finetune_parts(config, mode)]
    if not config.distill.coupled:
        return parts[:2]
    # Once for the teacher; of a frozen one the backward pass ends at its inputs, as one forward.
    parts[2].passes = 1 + (2 if config.distill.freeze == "decoder" else 3)
    parts[2].name += ", of both"
    return parts


def classify_parts(config: Any) -> list[Part]:
    """Classification: the whole image through the encoder, and one linear layer."""
    data, encoder = config.data, replace(config.encoder, checkpoint=None)
    # Built with values: timm reads numbers off a tensor while it builds a model.
    model = build_classifier(encoder, data, config.augment).to("meta")
    images = torch.zeros(BATCH, 3, data.image_size, data.image_size, device="meta")
    counter = count(lambda: model(images))
    head = macs(counter, "VisionTransformer.head") / BATCH
    own = parameters(model) - parameters(model.head)
    return [
        Part("encoder", own, macs(counter) / BATCH - head),
        Part(f"{data.classes} classes", parameters(model.head), head),
    ]


def find_parts(entry: str, config: Any) -> list[Part]:
    """What a step consists of; in shapes alone: nothing is computed."""
    if entry == "finetune/classify.py":
        return classify_parts(config)
    mode, teacher = FakeTensorMode(), None
    if entry == "finetune/train.py":
        return finetune_parts(config, mode)
    if entry == "finetune/distill.py":
        return distill_parts(config, open_teacher(config.teacher, mode), mode)
    if config.target.kind == "teacher":
        teacher = open_teacher(config.teacher, mode)
    with mode:
        return pretrain_parts(config, teacher)


def count_images(config: Any, entry: str, given: int | None) -> int:
    """What an epoch has, as far as that can be known here."""
    if given is not None:
        return given
    with tempfile.TemporaryDirectory() as folder:
        try:
            groups = expand(config.data.shards, "data.shards")
            if not any(is_url(url) for urls, _ in groups for url in urls):
                sources = open_sources(groups, Path(folder), lambda text: None)
                found = min(int(one.count / (one.weight or 1.0)) for one in sources)
                print(f"data.shards: {found} images")
                return found
        except UserError:
            pass
    on_sa1b = entry in ("finetune/train.py", "finetune/distill.py")
    assumed, name = (SA1B, "SA-1B") if on_sa1b else (IMAGENET, "ImageNet-1K")
    print(f"data.shards are not here: {assumed} images assumed ({name}); --images tells others")
    return assumed


def hours_of(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def cache_bytes(config: TeacherConfig) -> dict[str, int]:
    """Bytes per image of ASPECT by what is stored."""
    teacher = open_teacher(config, FakeTensorMode())
    info = {"name": config.name, "sha256": "", "random": False}
    tokens = teacher.image_size // teacher.stride
    return {
        f"{grid} x {grid} {dtype}": Cache.of(teacher, info, grid, dtype).bytes_of(*ASPECT)
        for grid in (tokens, tokens // 2)[: 2 - tokens % 2]
        for dtype in DTYPES
    }


def main(argv: list[str] | None = None) -> int:
    parser = Options(description=__doc__)
    parser.add_argument("config", type=local_path)
    parser.add_argument("--images", type=int, help="of an epoch; default: those of data.shards")
    parser.add_argument("--card", choices=tuple(CARDS), default="A100")
    parser.add_argument("--share", type=float, default=0.3, help="of the peak; default: 0.3")
    args, options = parser.parse_known_args(argv)
    require(0 < args.share <= 1, f"--share {args.share} must be over 0 and at most 1")
    require_least(1, args, "images")
    entry, config = resolve(find(args.config), options)
    parts = find_parts(entry, config)

    train = config.train
    images = count_images(config, entry, args.images)
    images = min(images, config.data.epoch_samples or images)
    lengths = [train.steps, train.epochs and train.epochs * (images // train.batch_size)]
    steps = min(length for length in lengths if length is not None)
    samples = steps * train.batch_size

    rate, hours, rows = args.share * CARDS[args.card] * 1e12, 0.0, []
    for part in parts:
        flops = 2 * part.macs * part.passes
        own = flops * (images if part.once else samples) / rate / 3600
        hours += own
        sizes = f"{part.parameters / 1e6:.2f}", f"{part.macs / 1e9:.2f}", f"{flops / 1e9:.1f}"
        rows.append([part.name + " (once per image)" * part.once, *sizes, hours_of(own)])
    head = ["part", "parameters, M", "forward, GMAC", "step, GFLOP", "hours"]
    show_table(f"{args.config}, per image", head, rows)
    epochs = f"{samples / images:.4g} epochs of {images} images"
    print(f"{steps} steps of {train.batch_size} images, {epochs}")
    print(
        f"{hours_of(hours)} hours of one {args.card} at {args.share:.0%} of its {CARDS[args.card]} "
        "TFLOP/s, if the data keeps up"
    )
    learns = entry == "sami/pretrain.py" and config.target.kind == "teacher"
    if learns or (entry == "finetune/distill.py" and not config.distill.coupled):
        print("a feature cache of them, at 4:3, without the images:")
        for name, size in cache_bytes(config.teacher).items():
            print(f"  {name:14} {size / 1e3:7.0f} kB an image, {size * images / 1e9:8.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
