"""Distil SAM's image encoder into a small one, as MobileSAM does, and measure how near it comes.

python finetune/distill.py --config configs/distill/decoupled_tiny_vit.yaml
                           [--group.field value ...] [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml, and then the same.
"""

import contextlib
import sys
from dataclasses import dataclass, field, replace

from finetune.agreement import AgreementConfig, measure
from finetune.data import UNSURE, MaskDataConfig, PromptTransform
from finetune.distillation import Distillation, DistillationConfig, open_teacher, teacher_maps
from finetune.distillation_pictures import draw_shown, load_shown
from finetune.image_data import ImageTransform
from finetune.model import (
    TAKES_ENCODER,
    TAKES_MODEL,
    LengthConfig,
    MaskDecoderConfig,
    build_model,
    model_header,
    trains_single_mask,
)
from finetune.prompting import PromptConfig
from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require
from sami.core.exits import FINISHED, run_entry
from sami.core.optim import OptimConfig, propagate_nonfinite
from sami.core.run import Run, RunConfig
from sami.core.starts import RANDOM, Start, find_starts
from sami.core.state import State
from sami.core.training import Loop, plan_training
from sami.core.weights import find_weights
from sami.encoder import EncoderConfig
from sami.teacher import TeacherConfig, takes_of

# What may change between two starts beside what may in every entry; the teacher's sha256 may not.
FREE = {"decoder.checkpoint", "train.checkpointing", "teacher.attention", "teacher.checkpoint"}
FREE |= {"facts.teacher.checkpoint"}
NOT_SAM = "what is learnt here is not SAM"


@dataclass
class DistillConfig:
    """MobileSAM: a small encoder that takes the place of SAM's own, under SAM's mask decoder."""

    run: RunConfig = field(default_factory=RunConfig)
    data: MaskDataConfig = field(
        default_factory=lambda: MaskDataConfig(resize="longest", masks_per_image=16)
    )
    eval: AgreementConfig = field(default_factory=AgreementConfig)
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig("tiny_vit_5m"))
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(image_size=1024))
    decoder: MaskDecoderConfig = field(default_factory=lambda: MaskDecoderConfig("sam"))
    distill: DistillationConfig = field(default_factory=DistillationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-3, base_batch=8, betas=(0.9, 0.999), weight_decay=5e-4, warmup=0.02, clip=1.0
        )
    )
    train: LengthConfig = field(default_factory=lambda: LengthConfig(epochs=8, batch_size=8))

    def check(self) -> None:
        """What no group can see alone."""
        if not self.decoder.checkpoint and self.teacher.checkpoint != RANDOM:
            self.decoder.checkpoint = self.teacher.checkpoint or None  # SAM's file holds both
        self.distill.check_with(self.teacher, self.decoder, self.data)
        require(
            self.prompt.corrections == 0,
            f"prompt.corrections {self.prompt.corrections}: student and teacher are asked the same "
            "first prompts; set 0",
        )


def main(argv: list[str] | None = None) -> int:
    return start_entry(DistillConfig, argv, starts_of, train)


def starts_of(cfg: DistillConfig) -> dict[str, Start]:
    """The options that name weights, and what they take."""
    needed = "never" if cfg.teacher.cached else "always"
    same = cfg.decoder.checkpoint == cfg.teacher.checkpoint and needed == "always"
    return {
        "encoder.checkpoint": Start(TAKES_ENCODER),
        "decoder.checkpoint": Start(TAKES_MODEL, "never" if same else "begin"),  # named once
        "teacher.checkpoint": Start(takes_of(cfg.teacher), needed),
    }


def train(cfg: DistillConfig, run: Run, only_check: bool = False) -> int:
    """Train to the end, or with ``only_check`` up to a first batch; returns the exit code."""
    # ---- What it starts from, and what it is trained on
    files, started_from = find_starts(run, cfg, starts_of(cfg))
    for option in ("encoder.checkpoint", "decoder.checkpoint"):
        group = getattr(cfg, option.split(".")[0])
        if group.checkpoint and not files[option]:  # gone: the run's own tells its shape
            files[option] = str(find_weights(run.dir / "checkpoints", TAKES_MODEL, option).file)
    plan = plan_training(cfg.data, cfg.train, run)
    held_out = plan.held_out

    # ---- What is trained
    source = files["decoder.checkpoint"]
    require(
        source is not None or cfg.teacher.checkpoint == RANDOM,
        "decoder.checkpoint is empty, and so is teacher.checkpoint, whose file would be taken; "
        "name SAM's .pth, such as checkpoints/sam_vit_h_4b8939.pth",
    )
    model = build_model(
        replace(cfg.encoder, checkpoint=files["encoder.checkpoint"]),
        replace(cfg.decoder, checkpoint=source, freeze=cfg.distill.freeze),
        cfg.data.image_size,
        cfg.data.resize,
        cfg.train.checkpointing,
        single_mask=source is None or trains_single_mask(source),
    )
    student = Distillation(model, cfg.distill).to(run.device)
    state = State(student, cfg.optim, cfg.train, run, model.image_encoder.layer_id)

    # ---- What it learns from
    sha256 = (started_from.get("teacher.checkpoint") or {}).get("sha256")
    data = (plan.order.shards, held_out, files["teacher.checkpoint"], sha256, not only_check)
    target, judge = open_teacher(cfg.teacher, model, run, *data)
    held = ImageTransform(cfg.data, cfg.run.seed, judge.cache)
    if cfg.distill.coupled:
        transform = PromptTransform(cfg.data, cfg.prompt, 4 * model.shape.grid, cfg.run.seed)
    else:
        transform = ImageTransform(cfg.data, cfg.run.seed, target.cache)

    def export(step: int, weights: str) -> Export:
        """The student under its decoder, as it is opened by others."""
        header = model_header(model, weights=weights, training={"steps": step})
        return Export("model.safetensors", model.state_dict(), header)

    made = {
        "teacher": f"{cfg.teacher.name} at {cfg.teacher.image_size} px, from "
        f"{cfg.teacher.checkpoint or 'a cache'}",
        "encoder": f"{cfg.encoder.name}, from {cfg.encoder.checkpoint or 'random weights'}",
        "decoder": f"SAM's, from {cfg.decoder.checkpoint or 'random weights'}",
    }
    if only_check:
        return tell_checked(plan.order, held_out, transform, cfg.train.batch_size, made)

    # ---- Where training stands
    metadata = {"teacher": target.info, "started_from": started_from}
    loop = Loop(run, plan, state, metadata, export)
    if not loop.resume(cfg, FREE):
        return FINISHED
    loop.announce(f"{cfg.encoder.name}, {cfg.distill.form}", model, cfg.optim, cfg.train)
    run.say("; ".join(f"{part} {words}" for part, words in made.items()))
    random = target.info is not None and target.info["random"]
    if random:
        run.say(f"*** THE TEACHER IS RANDOM (--teacher.checkpoint random): {NOT_SAM} ***")
    if not held_out:
        run.say("no data.val_shards: nothing will be measured")
    elif judge.cache is not None:
        run.say("no teacher.checkpoint: masks will not be compared, embeddings alone")
    shown = load_shown(held_out or plan.order.shards, held) if run.is_main else None
    if cfg.train.compiles(run.device):
        model.image_encoder.compile()  # in place: its weights keep their names
    wrapped = run.accelerator.prepare(student)
    loop.open(transform)
    while loop.step < loop.steps:
        # ---- One optimizer step
        run.seed_step(loop.step)
        for batch, last in loop.micro_batches():
            state.note_left_out(batch.left_out)
            state.note_unsure(batch.unsure)
            taught = teacher_maps(target, batch)
            with contextlib.nullcontext() if last else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch, taught)
                run.accelerator.backward(propagate_nonfinite(losses["loss"]) / plan.parts)
            loop.add(losses)
        state.update(loop.step)

        # ---- What is due after it
        measures = {}
        if loop.advance(cfg.eval.every):
            with state.averaged():
                measures = measure(run, student, judge, held_out, held, cfg.eval, plan.workers)
        loop.report(measures)
        if loop.is_due(cfg.run.picture_every) and shown is not None:
            with state.averaged():
                draw_shown(run, student, judge, shown, cfg.run.seed, loop.step)
        if loop.save():
            return loop.leave(state.counted(objects=True))

    # ---- What is left behind
    counted = state.counted(objects=True)
    unsure = counted["orientation_unsure"]
    remarks = [f"*** this model was distilled from a random teacher: {NOT_SAM} ***"] * random
    return loop.finish(counted, remarks + [f"{UNSURE}: {unsure} times"] * bool(unsure))


if __name__ == "__main__":
    sys.exit(run_entry(main))
