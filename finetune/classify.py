"""ImageNet finetuning of a pretrained encoder: what the paper measures stage 1 by.

python finetune/classify.py --config configs/classify/sami_ti.yaml [--group.field v ...] [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml finetune/classify.py
"""

import contextlib
import json
import sys
from dataclasses import dataclass, field, replace

import numpy as np

from finetune.classification import (
    AugmentConfig,
    Classification,
    LabelDataConfig,
    LabelEvalConfig,
    LabelTransform,
    build_classifier,
    build_groups,
    evaluate,
)
from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require
from sami.core.exits import FINISHED, run_entry
from sami.core.labels import check_labels, check_names, tell_held_out, tell_neighbours
from sami.core.optim import OptimConfig, TrainConfig, propagate_nonfinite
from sami.core.run import Run, RunConfig
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.core.training import Loop, plan_training
from sami.encoder import TAKES_STUDENT, EncoderConfig

STARTS = {"encoder.checkpoint": Start(TAKES_STUDENT)}


@dataclass
class ClassifyConfig:
    """ImageNet finetuning after stage 1."""

    run: RunConfig = field(default_factory=RunConfig)
    data: LabelDataConfig = field(default_factory=LabelDataConfig)
    eval: LabelEvalConfig = field(default_factory=LabelEvalConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-3, base_batch=1024, betas=(0.9, 0.999), warmup=0.05, layer_decay=0.75
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=100, batch_size=1024))

    def check(self) -> None:
        """What no group can see alone."""
        require(
            self.encoder.kind == "vit",
            f"encoder.name {self.encoder.name} is no classifier; choose vit_ti, vit_s, vit_b or "
            "custom",
        )


def main(argv: list[str] | None = None) -> int:
    return start_entry(ClassifyConfig, argv, lambda cfg: STARTS, train)


def train(cfg: ClassifyConfig, run: Run, only_check: bool = False) -> int:
    """Train to the end, or with ``only_check`` up to a first batch; returns the exit code."""
    # ---- What it starts from, and what it is trained on
    files, started_from = find_starts(run, cfg, STARTS)
    plan = plan_training(cfg.data, cfg.train, run)
    shards, held_out = plan.order.shards, plan.held_out
    require(
        not cfg.augment.mixes or plan.micro_batch % 2 == 0,
        f"augment.mixup needs an even micro-batch, and it has {plan.micro_batch} images; "
        "set --train.micro_batch_size even, or --augment.mixup 0 --augment.cutmix 0",
    )
    if run.is_main:
        check_labels(shards, "data.shards", cfg.data.classes, cfg.data.max_bad_fraction)
        if held_out:
            check_labels(held_out, "data.val_shards", cfg.data.classes, 1.0)
            check_names(shards, held_out, ("data.shards", "data.val_shards"))

    # ---- What is trained
    start = replace(cfg.encoder, checkpoint=files["encoder.checkpoint"])
    model = build_classifier(start, cfg.data, cfg.augment)
    objective = Classification(model, cfg.augment, cfg.data.classes).to(run.device)
    groups = build_groups(model, cfg.optim)
    state = State(objective, cfg.optim, cfg.train, run, optimizer=groups)
    transform = LabelTransform(cfg.data, cfg.augment, cfg.run.seed)

    def export(step: int, weights: str) -> Export:
        """The classifier under timm's names, at every checkpoint and at the end."""
        info = {"format": "timm", "weights": weights, "training": {"steps": step}}
        header = {"classifier": json.dumps(info)}
        return Export("classifier.safetensors", model.state_dict(), header)

    origin = cfg.encoder.checkpoint or "random weights"
    made = f"{cfg.encoder.name}, from {origin}, {cfg.data.classes} classes"
    if only_check:
        facts = {"classifier": made}
        return tell_checked(plan.order, held_out, transform, cfg.train.batch_size, facts)

    # ---- Where training stands
    loop = Loop(run, plan, state, {"started_from": started_from}, export)
    if not loop.resume(cfg):
        return FINISHED
    if run.is_main:
        tell_neighbours(plan.order, run.say)
        if held_out:
            tell_held_out(shards, held_out, cfg.eval.samples, run.say)
    loop.announce(made, model, cfg.optim, cfg.train)
    if cfg.train.compiles(run.device):
        model.compile()  # in place: its weights keep their names
    wrapped = run.accelerator.prepare(objective)
    loop.open(transform)
    while loop.step < loop.steps:
        # ---- One optimizer step
        run.seed_step(loop.step)
        for batch, last in loop.micro_batches():
            np.random.seed(run.seed_of(loop.step))  # timm's mixup draws alike in all parts
            with contextlib.nullcontext() if last else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch.images, batch.labels)
                run.accelerator.backward(propagate_nonfinite(losses["loss"]) / plan.parts)
            loop.add(losses)
        state.update(loop.step)

        # ---- What is due after it
        measures = {}
        if loop.advance(cfg.eval.every):
            with state.averaged():
                measures = evaluate(run, model, transform, held_out, cfg.eval.samples, plan.workers)
        loop.report(measures)
        if loop.save():
            return loop.leave(state.counted())

    # ---- What is left behind
    return loop.finish(state.counted())


if __name__ == "__main__":
    sys.exit(run_entry(main))
