"""ImageNet finetuning of a pretrained encoder: what the paper measures stage 1 by.

python finetune/classify.py --config configs/classify/sami_ti.yaml [--group.field v ...] [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml finetune/classify.py
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import torch
from timm.models import VisionTransformer

from finetune.classification import (
    AugmentConfig,
    Classification,
    LabelDataConfig,
    LabelTransform,
    build_classifier,
    build_groups,
)
from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require, to_dict
from sami.core.dataset import (
    Bad,
    ShardSource,
    Validation,
    load_training,
    load_validation,
    open_data,
)
from sami.core.exits import FINISHED, run_entry
from sami.core.index import Shard, fingerprint
from sami.core.labels import check_labels, check_names, tell_held_out, tell_neighbours
from sami.core.optim import OptimConfig, TrainConfig, poison, unfinished_warmup
from sami.core.order import Order
from sami.core.processes import exact
from sami.core.run import Run, RunConfig, is_due
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.encoder import TAKES, EncoderConfig
from sami.validation import tell_unusable

STARTS = {"encoder.checkpoint": Start(TAKES)}
BATCH = 64  # pictures per forward of the evaluation
# What may change between two starts of one run; see sami/pretrain.py.
FREE = {f"run.{item.name}" for item in fields(RunConfig) if item.name != "seed"} | {
    "eval",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.shards",
    "data.val_shards",
    "data.allow_val_in_train",
    "data.max_bad_fraction",
    "encoder.checkpoint",
    "train.micro_batch_size",
    "train.compile",
    "train.precision",
    "train.max_bad_steps",
}


@dataclass
class EvalConfig:
    """Top-1 on ``data.val_shards``.

    Attributes:
        every: steps between measurements; 0 for the end of the run alone.
        samples: at most so many pictures, the first ones; null for all.
    """

    every: int = 0
    samples: int | None = None

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(
            self.samples is None or self.samples > 0,
            f"eval.samples {self.samples} must be positive, or null for all",
        )


@dataclass
class ClassifyConfig:
    """ImageNet finetuning after stage 1."""

    run: RunConfig = field(default_factory=RunConfig)
    data: LabelDataConfig = field(default_factory=LabelDataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
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
    # ---- What it starts from
    files, started_from = find_starts(run, cfg, STARTS)

    # ---- What it is trained on
    sources, held_out = open_data(cfg.data, run)
    order = Order(
        sources,
        batch_size=cfg.train.batch_size,
        seed=cfg.run.seed,
        window=cfg.data.window,
        epoch_samples=cfg.data.epoch_samples,
    )
    require(
        order.steps_per_epoch > 0,
        f"data.shards hold {order.samples} pictures, less than one train.batch_size of "
        f"{cfg.train.batch_size}; lower it or give more shards",
    )
    micro_batch = cfg.train.micro_batch(run.processes)
    parts = cfg.train.batch_size // run.processes // micro_batch  # micro-batches per step and rank
    share = 1 / (parts * run.processes)  # of a micro-batch in its step
    mixed = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
    require(
        not mixed or micro_batch % 2 == 0,
        f"augment.mixup needs an even micro-batch, and it has {micro_batch} pictures; "
        "set --train.micro_batch_size even, or --augment.mixup 0 --augment.cutmix 0",
    )
    steps = cfg.train.total_steps(order.steps_per_epoch)
    if run.is_main:
        check_labels(order.shards, "data.shards", cfg.data.classes, cfg.data.max_bad_fraction)
        if held_out:
            check_labels(held_out, "data.val_shards", cfg.data.classes, 1.0)
            check_names(order.shards, held_out, ("data.shards", "data.val_shards"))

    # ---- What is trained
    start = replace(cfg.encoder, checkpoint=files["encoder.checkpoint"])
    model = build_classifier(start, cfg.data, cfg.augment)
    objective = Classification(model, cfg.augment, cfg.data.classes).to(run.device)
    state = State(
        objective,
        cfg.optim,
        cfg.train,
        run,
        optimizer=build_groups(model, cfg.optim),
    )
    samples = LabelTransform(cfg.data, cfg.augment, cfg.run.seed)
    facts = {
        "started_from": started_from,
        "data": {
            "pictures": order.samples,
            "shards": len(order.shards),
            "fingerprint": fingerprint(sources),
            "weights": [source.weight for source in sources],
        },
    }

    export = partial(make_export, model)

    if only_check:
        origin = cfg.encoder.checkpoint or "random weights"
        made = {"classifier": f"{cfg.encoder.name}, from {origin}, {cfg.data.classes} classes"}
        return tell_checked(order, held_out, samples, cfg.train.batch_size, made)

    # ---- Where training stands
    identity = {"config": to_dict(cfg), "facts": facts}
    step = state.resume(identity, FREE)
    if step == steps and run.is_finished():
        run.say(f"{run.dir} is finished; start another with --run.dir, or delete the folder")
        return FINISHED
    run.begin(cfg, step, facts)
    if run.is_main:
        tell_neighbours(order, run.say)
        if held_out:
            tell_held_out(order.shards, held_out, cfg.eval.samples, run.say)
    run.say(
        f"{run.dir}: {cfg.encoder.name} from {cfg.encoder.checkpoint or 'random weights'} on "
        f"{order.samples} pictures of {cfg.data.classes} classes, {order.steps_per_epoch} steps "
        f"an epoch, {steps} steps, now at {step}"
    )
    if words := unfinished_warmup(cfg.optim, steps, cfg.train.batch_size):
        run.say(words)
    if cfg.train.compiles(run.device):
        model.compile()  # in place: its weights keep their names
    wrapped = run.accelerator.prepare(objective)
    batches = load_training(
        order, samples, run, micro_batch_size=micro_batch, step=step, workers=cfg.data.workers
    )

    log_every = cfg.run.log_interval(steps)
    while step < steps:
        # ---- One optimizer step
        state.begin_step(step, steps)
        run.seed_step(step)
        for part in range(parts):
            with state.clock.wait():
                batch, bad = next(batches)
            state.note_bad(bad)
            run.advance(step, steps)
            batch = batch.to(run.device)
            np.random.seed(run.number_of(step))  # timm's mixup draws from it, alike in all parts
            last_part = part == parts - 1
            with contextlib.nullcontext() if last_part else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch.images, batch.labels)
                run.accelerator.backward(poison(losses["loss"]) / parts)
            state.window.add("loss", losses["loss"], share)
        state.update(step)
        step += 1

        # ---- What is due after it
        last = step == steps
        measure = bool(held_out) and is_due(step, cfg.eval.every or steps, last)
        if is_due(step, log_every, last) or measure:
            record = state.read_metrics(step)
            if measure:
                with state.averaged():
                    measures = evaluate(run, model, samples, held_out, cfg)
                record.update({f"val_{name}": value for name, value in measures.items()})
            run.record(step, steps, record)
        whole = step % order.steps_per_epoch == 0
        if is_due(step, log_every, last or whole):
            state.stop_if_hopeless(step, cfg.data.max_bad_fraction, whole)
        run.advance(step, steps)
        state.clock.pause()
        stop, by_clock = run.stop_and_save()
        if is_due(step, cfg.run.save_every, last) or by_clock or stop:
            state.save(step, identity, export)
            if stop and not last:
                return run.leave_asked(step, **state.bad_summary())

    # ---- What is left behind
    finish(run, steps, state, export)
    return FINISHED


@torch.no_grad()
def evaluate(
    run: Run,
    model: VisionTransformer,
    samples: LabelTransform,
    shards: list[Shard],
    cfg: ClassifyConfig,
) -> dict[str, float]:
    """Top-1 and top-5 in %, and how many pictures were measured. Collective."""
    source = ShardSource.first(shards, samples.fields, cfg.eval.samples)
    dataset = Validation(source, samples.decode_held_out, samples.collate)
    counts = torch.zeros(3, dtype=exact(run.device), device=run.device)  # right, among 5, pictures
    unusable: Bad = []
    model.eval()
    share, workers = (run.rank, run.processes), cfg.data.workers
    told = {"share": share, "say": run.say}
    for batch, bad in load_validation(dataset, BATCH, workers, run.device, **told):
        unusable += bad
        if batch is None:
            continue
        batch = batch.to(run.device)
        with run.accelerator.autocast():
            logits = model(batch.images)
        best = logits.topk(min(5, cfg.data.classes), dim=1).indices == batch.labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum(), best.new_ones(len(best)).sum()])
    model.train()
    tell_unusable(run, unusable, len(source))
    right, among, pictures = run.accelerator.reduce(counts, "sum").tolist()
    require(
        pictures > 0,
        "data.val_shards hold no labelled picture (.cls) under data.classes; leave them empty, or "
        "make shards with labels (tools/make_shards.py on a folder per class)",
    )
    return {
        "top1": 100 * right / pictures,
        "top5": 100 * among / pictures,
        "pictures": pictures,
    }


def make_export(model: VisionTransformer, step: int, weights: str) -> Export:
    """The classifier under timm's names, at every checkpoint and at the end."""
    told = {"format": "timm", "weights": weights, "training": {"steps": step}}
    return Export("classifier.safetensors", model.state_dict(), {"classifier": json.dumps(told)})


def finish(run: Run, steps: int, state: State, export: Callable[[int, str], Export]) -> None:
    """Export the classifier under timm's names and close the summary."""
    bad = state.bad_summary()
    if not run.is_main:
        return
    state.leave(run.dir, steps, export)
    final = next((line for line in reversed(run.metrics.read()) if line["step"] == steps), {})
    held_out = {k.removeprefix("val_"): v for k, v in final.items() if k.startswith("val_")}
    run.summarise(
        status="finished",
        exit_code=FINISHED,
        steps=steps,
        loss=final.get("loss"),
        **bad,
        evaluation=held_out or None,
    )
    run.say(f"finished: {run.dir}/classifier.safetensors, metrics.jsonl beside it")


if __name__ == "__main__":
    sys.exit(run_entry(main))
