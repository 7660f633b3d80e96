"""Stage 1, SAMI: pretrain a small ViT to reconstruct SAM's features of what it does not see.

python sami/pretrain.py --config configs/pretrain/sami_ti.yaml [--group.field value ...] [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml sami/pretrain.py ...
"""

import contextlib
import sys
from dataclasses import dataclass, field, replace

import torch

from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require
from sami.core.exits import FINISHED, run_entry
from sami.core.labels import tell_neighbours
from sami.core.optim import OptimConfig, TrainConfig, propagate_nonfinite
from sami.core.run import Run, RunConfig
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.core.training import Loop, plan_training
from sami.data import CropTransform, DataConfig
from sami.encoder import TAKES_STUDENT, EncoderConfig, build_encoder, export_header
from sami.encoders.registry import names_of_encoders
from sami.masking import MaskConfig
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.pictures import draw_shown, load_shown
from sami.probe import check_probe, probe
from sami.targets import TargetConfig, open_targets
from sami.teacher import TeacherConfig, takes_of
from sami.validation import ValidationConfig, measure

# What may change between two starts beside what may in every entry; the teacher's sha256 may not.
FREE = {"teacher.checkpoint", "teacher.attention", "facts.teacher.checkpoint"}


@dataclass
class PretrainConfig:
    """Stage 1: SAM-leveraged masked image pretraining, and its baselines."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: ValidationConfig = field(default_factory=ValidationConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    decoder: CrossDecoderConfig = field(default_factory=CrossDecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    loss: TokenLossConfig = field(default_factory=TokenLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=400))

    def check(self) -> None:
        """What no group can see alone."""
        students = names_of_encoders(pretrains=True)
        require(
            self.encoder.name in students,
            f"encoder.name {self.encoder.name} can only be finetuned; for stage 1 choose "
            f"{', '.join(students[:-1])} or {students[-1]}",
        )
        self.mask.check_grid(self.data.image_size // self.encoder.patch_size)
        require(
            self.mask.ratio > 0 or self.loss.tokens == "all",
            "loss.tokens masked needs masked tokens; set --loss.tokens all, or --mask.ratio over 0",
        )
        require(
            self.target.kind != "teacher" or self.teacher.name != "none",
            "target.kind teacher needs a teacher; set --teacher.name, or --target.kind pixels",
        )
        require(
            self.target.kind == "teacher" or not self.teacher.cached,
            f"teacher.cached true goes with target.kind teacher, not {self.target.kind}",
        )
        require(
            not self.eval.probe or bool(self.data.val_shards),
            f"eval.probe {self.eval.probe} needs data.val_shards, with labels (.cls)",
        )


def main(argv: list[str] | None = None) -> int:
    return start_entry(PretrainConfig, argv, starts_of, train)


def starts_of(cfg: PretrainConfig) -> dict[str, Start]:
    """The options that name weights, and what they take."""
    starts = {"encoder.checkpoint": Start(TAKES_STUDENT)}
    if cfg.target.kind == "teacher":
        needed = "never" if cfg.teacher.cached else "always"
        starts["teacher.checkpoint"] = Start(takes_of(cfg.teacher), needed)
    return starts


def train(cfg: PretrainConfig, run: Run, only_check: bool = False) -> int:
    """Train to the end, or with ``only_check`` up to a first batch; returns the exit code."""
    # ---- What it starts from, and what it is trained on
    files, started_from = find_starts(run, cfg, starts_of(cfg))
    plan = plan_training(cfg.data, cfg.train, run)
    shards, held_out = plan.order.shards, plan.held_out
    start = replace(cfg.encoder, checkpoint=files["encoder.checkpoint"])
    encoder = build_encoder(start, cfg.data.image_size)
    targets = open_targets(
        cfg.target,
        cfg.teacher,
        encoder,
        run,
        shards=shards + held_out,
        file=files.get("teacher.checkpoint"),
        sha256=(started_from.get("teacher.checkpoint") or {}).get("sha256"),
        checksums=not only_check,
    )
    transform = CropTransform(
        seed=cfg.run.seed,
        student_size=cfg.data.image_size,
        teacher_size=targets.teacher_size,
        grid=cfg.data.image_size // cfg.encoder.patch_size,
        mask=cfg.mask,
        crop_scale=cfg.data.crop_scale,
        hflip=cfg.data.hflip,
        predict_fraction=cfg.decoder.predict_fraction,
        cache=targets.cache,
        pool=cfg.teacher.pool,
    )
    if cfg.eval.probe and run.is_main:
        check_probe(shards, held_out)

    # ---- What is trained
    model = MaskedReconstruction(encoder, cfg.decoder, cfg.loss, targets.channels, cfg.mask.ratio)
    state = State(model.to(run.device), cfg.optim, cfg.train, run)

    def export(step: int, weights: str) -> Export:
        """The student as the next stage takes it, at every checkpoint and at the end."""
        training = {"steps": step, "target": cfg.target.kind, "teacher": targets.info}
        header = export_header(encoder, weights=weights, training=training)
        return Export("encoder.safetensors", encoder.state_dict(), header)

    if only_check:
        made = {"student": f"{cfg.encoder.name}, from {cfg.encoder.checkpoint or 'random weights'}"}
        if targets.info is not None:
            random = " RANDOM," * targets.info["random"]
            made["teacher"] = "{name},{0} sha256 {sha256:.12}".format(random, **targets.info)
        return tell_checked(plan.order, held_out, transform, cfg.train.batch_size, made)

    # ---- Where training stands
    metadata = {"teacher": targets.info, "started_from": started_from}
    loop = Loop(run, plan, state, metadata, export)
    if not loop.resume(cfg, FREE):
        return FINISHED
    if run.is_main:
        tell_neighbours(plan.order, run.say)
    loop.announce(cfg.encoder.name, model, cfg.optim, cfg.train)
    if not held_out:
        run.say("no data.val_shards: nothing will tell whether more than the mean was learnt")
    if targets.info is not None:
        teacher = "{name} at {image_size} px, {layer}".format(**targets.info)
        run.say(f"teacher {teacher}, sha256 {targets.info['sha256'][:12]}")
    random = targets.info is not None and targets.info["random"]
    if random:
        run.say(
            "*** THE TEACHER IS RANDOM (--teacher.checkpoint random): what is learnt here is not "
            "SAM ***"
        )
    shown = load_shown(held_out or shards, transform) if run.is_main else None
    if cfg.train.compiles(run.device):
        model.predict = torch.compile(model.predict)
    wrapped = run.accelerator.prepare(model)
    loop.open(transform)
    while loop.step < loop.steps:
        # ---- One optimizer step
        for batch, last in loop.micro_batches():
            target = targets(batch)
            with contextlib.nullcontext() if last else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch.student, batch.visible, batch.masked, target)
                run.accelerator.backward(propagate_nonfinite(losses["loss"]) / plan.parts)
            loop.add(losses)
        state.update(loop.step)

        # ---- What is due after it
        measures = {}
        if loop.advance(cfg.eval.every):
            options = (held_out, transform, cfg.eval.samples, plan.workers)
            with state.averaged():
                measures = measure(run, model, targets, *options)
                if cfg.eval.probe:
                    measures |= probe(run, encoder, shards, held_out, cfg.eval.probe, plan.workers)
        loop.report(measures)
        if loop.is_due(cfg.run.picture_every) and shown is not None:
            with state.averaged():
                draw_shown(run, model, targets, shown, loop.step, cfg.target.kind)
        if loop.save():
            return loop.leave(state.counted())

    # ---- What is left behind
    remarks = ["*** this encoder was trained by a random teacher ***"] * random
    return loop.finish(state.counted(), remarks)


if __name__ == "__main__":
    sys.exit(run_entry(main))
