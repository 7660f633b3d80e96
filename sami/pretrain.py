"""Stage 1, SAMI: pretrain a small ViT to reconstruct SAM's features of what it does not see.

python sami/pretrain.py --config configs/pretrain/sami_ti.yaml [--group.field value ...] [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml sami/pretrain.py ...
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require, to_dict
from sami.core.dataset import load_training, open_data
from sami.core.errors import BadSample
from sami.core.exits import FINISHED, run_entry
from sami.core.index import Shard, fingerprint
from sami.core.labels import check_names, require_labels, tell_neighbours
from sami.core.optim import OptimConfig, TrainConfig, poison, unfinished_warmup
from sami.core.order import Order
from sami.core.reading import read_range
from sami.core.run import Run, RunConfig, is_due
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.data import CropBatch, CropTransform, DataConfig
from sami.encoder import TAKES, EncoderConfig, build_encoder, export_header
from sami.encoders.protocol import ImageEncoder
from sami.encoders.registry import names_of_encoders
from sami.masking import MaskConfig
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.pictures import draw_reconstruction
from sami.probe import probe
from sami.targets import TargetConfig, Targets, open_targets
from sami.teacher import TeacherConfig, takes_of
from sami.validation import EvalConfig, measure

SHOWN = 4  # pictures in a picture
# What may change between two starts of one run. Shards and the teacher's file may have moved; that
# they are the same is checked by fingerprint and sha256.
FREE = {f"run.{item.name}" for item in fields(RunConfig) if item.name != "seed"} | {
    "eval",
    "data.workers",
    "data.cache_dir",
    "data.cache_gb",
    "data.shards",
    "data.val_shards",
    "data.allow_val_in_train",
    "data.max_bad_fraction",
    "teacher.checkpoint",
    "teacher.attention",
    "facts.teacher.checkpoint",
    "encoder.checkpoint",
    "train.micro_batch_size",
    "train.compile",
    "train.precision",
    "train.max_bad_steps",
}


@dataclass
class PretrainConfig:
    """Stage 1: SAM-leveraged masked image pretraining, and its baselines."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
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
            self.target.kind == "pixels" or self.teacher.name != "none",
            "target.kind teacher needs a teacher; set --teacher.name, or --target.kind pixels",
        )
        require(
            self.target.kind == "teacher" or not self.teacher.cached,
            "teacher.cached true goes with target.kind teacher; pixels need no teacher",
        )
        require(
            not self.eval.probe or bool(self.data.val_shards),
            f"eval.probe {self.eval.probe} needs data.val_shards, with labels (.cls)",
        )


def main(argv: list[str] | None = None) -> int:
    return start_entry(PretrainConfig, argv, starts_of, train)


def train(cfg: PretrainConfig, run: Run, only_check: bool = False) -> int:
    # ---- What it starts from
    files, started_from = find_starts(run, cfg, starts_of(cfg))

    # ---- What it is trained on
    sources, held_out = open_data(cfg.data, run)
    encoder = build_encoder(
        replace(cfg.encoder, checkpoint=files["encoder.checkpoint"]), cfg.data.image_size
    )
    targets = open_targets(
        cfg.target,
        cfg.teacher,
        encoder,
        run,
        shards=[shard for source in sources for shard in source.shards] + held_out,
        file=files.get("teacher.checkpoint"),
        sha256=(started_from.get("teacher.checkpoint") or {}).get("sha256"),
        checksums=not only_check,
    )
    transform = make_transform(cfg, targets)
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
    steps = cfg.train.total_steps(order.steps_per_epoch)

    if cfg.eval.probe and run.is_main:
        remedy = "k-NN and linear probe need labels: name others, or do without (eval.probe 0)"
        require_labels(order.shards, "data.shards", remedy)
        require_labels(held_out, "data.val_shards", remedy)
        check_names(order.shards, held_out, ("data.shards", "data.val_shards"))

    # ---- What is trained
    model = MaskedReconstruction(encoder, cfg.decoder, cfg.loss, targets.channels, cfg.mask.ratio)
    state = State(model.to(run.device), cfg.optim, cfg.train, run)
    facts = {
        "teacher": targets.info,
        "started_from": started_from,
        "data": {
            "pictures": order.samples,
            "shards": len(order.shards),
            "fingerprint": fingerprint(sources),
            "weights": [source.weight for source in sources],
        },
    }
    export = partial(make_export, cfg, encoder, facts)

    if only_check:
        made = {"student": f"{cfg.encoder.name}, from {cfg.encoder.checkpoint or 'random weights'}"}
        if targets.info is not None:
            made["teacher"] = f"{targets.info['name']}, sha256 {targets.info['sha256'][:12]}"
        return tell_checked(order, held_out, transform, cfg.train.batch_size, made)

    # ---- Where training stands
    identity = {"config": to_dict(cfg), "facts": facts}
    step = state.resume(identity, FREE)
    if step == steps and run.is_finished():
        run.say(f"{run.dir} is finished; start another with --run.dir, or delete the folder")
        return FINISHED
    run.begin(cfg, step, facts)
    if run.is_main:
        tell_neighbours(order, run.say)
    announce(cfg, run, order, micro_batch, steps, step, model, facts)
    shown = load_shown(run, held_out or order.shards, transform)
    if cfg.train.compiles(run.device):
        model.predict = torch.compile(model.predict)
    wrapped = run.accelerator.prepare(model)
    batches = load_training(
        order, transform, run, micro_batch_size=micro_batch, step=step, workers=cfg.data.workers
    )

    log_every = cfg.run.log_interval(steps)
    while step < steps:
        # ---- One optimizer step
        state.begin_step(step, steps)
        for part in range(parts):
            with state.clock.wait():
                batch, bad = next(batches)
            state.note_bad(bad)
            run.advance(step, steps)
            batch = batch.to(run.device)
            target = targets(batch)
            last_part = part == parts - 1
            with contextlib.nullcontext() if last_part else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch.student, batch.visible, batch.masked, target)
                run.accelerator.backward(poison(losses["loss"]) / parts)
            for name, value in losses.items():
                state.window.add(name, value, share)
        state.update(step)
        step += 1

        # ---- What is due after it
        last = step == steps
        evaluate = bool(held_out) and is_due(step, cfg.eval.every or steps, last)
        if is_due(step, log_every, last) or evaluate:
            record = state.read_metrics(step)
            if evaluate:
                with state.averaged():
                    measures = measure(
                        run, model, targets, held_out, transform, cfg.eval.samples, cfg.data.workers
                    )
                    if cfg.eval.probe:
                        measures |= probe(
                            run, encoder, order.shards, held_out, cfg.eval.probe, cfg.data.workers
                        )
                record.update({f"val_{name}": value for name, value in measures.items()})
            run.record(step, steps, record)
        whole = step % order.steps_per_epoch == 0
        if is_due(step, log_every, last or whole):
            state.stop_if_hopeless(step, cfg.data.max_bad_fraction, whole)
        run.advance(step, steps)
        state.clock.pause()
        if is_due(step, cfg.run.picture_every, last) and shown is not None:
            with state.averaged():
                draw(cfg, run, model, targets, shown, step)
        stop, by_clock = run.stop_and_save()
        if is_due(step, cfg.run.save_every, last) or by_clock or stop:
            state.save(step, identity, export)
            if stop and not last:
                return run.leave_asked(step, **state.bad_summary())

    # ---- What is left behind
    finish(run, steps, state, facts, export)
    return FINISHED


def starts_of(cfg: PretrainConfig) -> dict[str, Start]:
    """The options that name weights, and what they take."""
    starts = {"encoder.checkpoint": Start(TAKES)}
    if cfg.target.kind == "teacher":
        needed = "never" if cfg.teacher.cached else "always"
        starts["teacher.checkpoint"] = Start(takes_of(cfg.teacher), needed)
    return starts


def make_transform(cfg: PretrainConfig, targets: Targets) -> CropTransform:
    """How samples are made under a configuration."""
    return CropTransform(
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


def load_shown(run: Run, shards: list[Shard], transform: CropTransform) -> CropBatch | None:
    """The few pictures that are drawn: the first usable ones; rank 0 only."""
    if not run.is_main:
        return None
    items, total = [], sum(shard.count for shard in shards)
    for sample in read_range(shards, range(min(10 * SHOWN, total)), transform.fields):
        with contextlib.suppress(BadSample):
            items.append(transform.decode_held_out(sample))
        if len(items) == SHOWN:
            break
    return transform.collate(items) if items else None


@torch.no_grad()
def draw(
    cfg: PretrainConfig,
    run: Run,
    model: MaskedReconstruction,
    targets: Targets,
    shown: CropBatch | None,
    step: int,
) -> None:
    """Masked input, target and reconstruction as ``pictures/reconstruction-<step>.png``."""
    if shown is None:
        return
    batch = shown.to(run.device)
    model.eval()
    target = targets(batch)
    with run.accelerator.autocast():
        prediction = model.predict(batch.student, batch.visible, batch.masked)
    model.train()
    path = run.dir / "pictures" / f"reconstruction-{step:07d}.png"
    title = f"{run.dir.name}, step {step}"
    patch = cfg.encoder.patch_size
    draw_reconstruction(
        path, batch.student, batch.masked, target, prediction, patch, cfg.target.kind, title
    )
    run.picture(path, step)


def announce(
    cfg: PretrainConfig,
    run: Run,
    order: Order,
    micro_batch: int,
    steps: int,
    step: int,
    model: MaskedReconstruction,
    facts: dict[str, Any],
) -> None:
    """Say what is about to happen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    student = sum(p.numel() for p in model.encoder.parameters())
    run.say(
        f"{run.dir}: {cfg.encoder.name} ({student / 1e6:.2f} M parameters, {trained / 1e6:.2f} M "
        f"with the decoder) on {order.samples} pictures, {order.steps_per_epoch} steps an epoch, "
        f"{steps} steps, now at {step}"
    )
    if steps < (cfg.train.steps or steps):
        run.say(f"train.epochs {cfg.train.epochs} end it before train.steps {cfg.train.steps}")
    if words := unfinished_warmup(cfg.optim, steps, cfg.train.batch_size):
        run.say(words)
    parts = cfg.train.batch_size // run.processes // micro_batch
    run.say(
        f"{run.processes} process(es) on {run.device.type}, {'bf16' if run.bf16 else 'fp32'}, "
        f"batch {cfg.train.batch_size} = {run.processes} x {micro_batch} x "
        f"{parts}, {torch.get_num_threads()} thread(s) each"
    )
    if frozen:
        run.say(f"not trained, but kept as at the start: {', '.join(frozen)}")
    if not cfg.data.val_shards:
        run.say("no data.val_shards: nothing will tell whether more than the mean was learnt")
    teacher = facts["teacher"]
    if teacher is not None:
        run.say(
            f"teacher {teacher['name']} at {teacher['image_size']} px, {teacher['layer']}, "
            f"sha256 {teacher['sha256'][:12]}"
        )
        if teacher["random"]:
            run.say(
                "*** THE TEACHER IS RANDOM (--teacher.checkpoint random): what is learnt here is "
                "not SAM ***"
            )


def make_export(
    cfg: PretrainConfig, encoder: ImageEncoder, facts: dict[str, Any], step: int, weights: str
) -> Export:
    """The student as the next stage takes it, at every checkpoint and at the end."""
    training = {"steps": step, "target": cfg.target.kind, "teacher": facts["teacher"]}
    header = export_header(encoder, weights=weights, training=training)
    return Export("encoder.safetensors", encoder.state_dict(), header)


def finish(
    run: Run,
    steps: int,
    state: State,
    facts: dict[str, Any],
    export: Callable[[int, str], Export],
) -> None:
    """Export the encoder and close the summary."""
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
        weights=state.weights,
        **bad,
        evaluation=held_out or None,
    )
    if bad["bad_samples"]:
        run.say(f"bad samples: {bad['bad_samples']}")
    if facts["teacher"] is not None and facts["teacher"]["random"]:
        run.say("*** this encoder was trained by a random teacher ***")
    run.say(f"finished: {run.dir}/encoder.safetensors, metrics.jsonl and pictures/ beside it")


if __name__ == "__main__":
    sys.exit(run_entry(main))
