"""Stage 1: training steps, the teacher's pass, the data path."""

import argparse
from collections.abc import Callable

import torch
from segment_anything.modeling import ImageEncoderViT

from benches.stream import data_rates
from benches.timing import Step, count_flops, introduce, kinds_of, measure, report, update
from sami.core.images import Normalise
from sami.core.optim import OptimConfig, build_optimizer
from sami.encoder import EncoderConfig, build_encoder
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import pixel_target
from sami.teacher import TeacherConfig, load_teacher


def stage1_steps(
    args: argparse.Namespace, device: torch.device, bf16: bool, compiled: bool
) -> dict[str, Step]:
    """Whole training steps (forward, backward, update) with given targets, by name."""
    generator = torch.Generator().manual_seed(0)
    size = (args.batch, 3, 224, 224)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    order = torch.rand(args.batch, 196, generator=generator).argsort(1)
    visible, masked = order[:, :49].sort(1).values, order[:, 49:].sort(1).values
    target = torch.randn(args.batch, 196, 256, generator=generator)
    images, visible, masked, target = (x.to(device) for x in (images, visible, masked, target))

    def make(decoder: CrossDecoderConfig, loss: TokenLossConfig, channels: int) -> Step:
        train = trainer(args.encoder, decoder, loss, channels, device, bf16, compiled)
        predicted = masked[:, : round(147 * decoder.predict_fraction)].contiguous()

        def step() -> None:
            wanted = target if channels == 256 else pixel_target(normalise(images), 16)
            train(images, visible, predicted, wanted)

        return step

    normalise = Normalise().to(device)
    mae = make(CrossDecoderConfig(kind="self"), TokenLossConfig(tokens="masked"), 768)
    decoders = {
        "sami": CrossDecoderConfig(),
        "sami, memory visible": CrossDecoderConfig(memory="visible"),
        "sami, predict_fraction 0.5": CrossDecoderConfig(predict_fraction=0.5),
        "sami, predict_fraction 0.25": CrossDecoderConfig(predict_fraction=0.25),
    }
    sami = {name: make(one, TokenLossConfig(), 256) for name, one in decoders.items()}
    return {"mae": mae, **sami}


def trainer(
    encoder: str,
    decoder: CrossDecoderConfig,
    loss: TokenLossConfig,
    channels: int,
    device: torch.device,
    bf16: bool,
    compiled: bool,
) -> Callable[..., None]:
    """A new model of stage 1, and one optimizer step of it on what its forward takes."""
    student = build_encoder(EncoderConfig(encoder), 224)
    model = MaskedReconstruction(student, decoder, loss, channels, 0.75).to(device)
    optimizer = build_optimizer(model, OptimConfig())
    if compiled:
        model.predict = torch.compile(model.predict)

    def train(*batch: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(*batch)["loss"]
        update(optimizer, loss)

    return train


def teacher_passes(
    args: argparse.Namespace, device: torch.device, size: int, bf16: bool
) -> dict[str, Step]:
    """The on-the-fly teacher and segment-anything's own forward pass over the same weights."""
    teacher = load_teacher(TeacherConfig(args.teacher, "random", size)).to(device)
    images = torch.randint(0, 256, (args.teacher_batch, 3, size, size), dtype=torch.uint8)
    normalised = teacher.normalise(images.to(device))

    def see(features: Callable[[torch.Tensor], torch.Tensor], flex: bool = False) -> Step:
        @torch.no_grad()
        def step() -> None:
            teacher.encoder.flex = flex
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features(normalised)

        return step

    name = f"{args.teacher} {size} px"
    passes: dict[str, Step] = {f"{name}, ours": see(teacher.features)}
    if size == 1024:  # segment-anything takes no other size
        theirs = see(lambda images: ImageEncoderViT.forward(teacher.encoder, images))
        passes = {f"{name}, segment-anything": theirs, **passes}
    if device.type == "cuda":
        compiled = [torch.compile(teacher.features, dynamic=False) for _ in range(2)]
        passes |= {
            f"{name}, ours, flex": see(teacher.features, True),
            f"{name}, ours, compiled": see(compiled[0]),
            f"{name}, ours, flex, compiled": see(compiled[1], True),
        }
    return passes


def stage1(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    args.batch = args.batch or 16
    peak = introduce(args, device)
    for bf16, compiled in kinds_of(device):
        title = f"training step, {args.encoder}, batch {args.batch}, {'bf16' if bf16 else 'fp32'}"
        steps = stage1_steps(args, device, bf16, compiled)
        flops = count_flops(stage1_steps(args, device, bf16, False)) if peak else {}
        title += ", compiled" * compiled
        report(title, measure(steps, args.rounds, device), args.batch, flops, peak)
        del steps
    for size in args.teacher_sizes:
        for bf16 in (False,) if device.type == "cpu" else (False, True):
            passes = teacher_passes(args, device, size, bf16)
            title = f"teacher, batch {args.teacher_batch}, {'bf16' if bf16 else 'fp32'}"
            flops: dict[str, float] = {}
            if peak:  # as multiplications go, all do the same
                ours = next(step for name, step in passes.items() if "ours" in name)
                flops = dict.fromkeys(passes, count_flops({"": ours})[""])
            seconds = measure(passes, min(args.rounds, 3), device)
            report(title, seconds, args.teacher_batch, flops, peak)
    data_rates(args)
