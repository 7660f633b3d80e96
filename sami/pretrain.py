"""Stage 1, SAMI: pretrain a small ViT to reconstruct SAM's features of what it does not see.

accelerate launch sami/pretrain.py --config configs/pretrain/sami_ti.yaml [--group.field value ...]
"""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sami.core.checkpoint import (
    Damaged,
    list_checkpoints,
    read_meta,
    read_state,
    save_checkpoint,
    write_weights,
)
from sami.core.config import differences, load_config, require, to_dict
from sami.core.errors import UserError
from sami.core.metrics import Clock, Window
from sami.core.optim import (
    Ema,
    Guard,
    OptimConfig,
    TrainConfig,
    build_optimizer,
    guarded_step,
    learning_rate,
    poison,
)
from sami.core.run import FINISHED, Run, RunConfig, is_due, run_entry
from sami.core.shards import Layout, Shard, describe, expand, fingerprint, index_shards
from sami.data import (
    Batch,
    DataConfig,
    HeldOut,
    MaskConfig,
    TrainStream,
    Views,
    make_loader,
    visible_count,
)
from sami.encoder import Encoder, EncoderConfig, build_encoder, export_header
from sami.heldout import EvalConfig, measure
from sami.model import DecoderConfig, LossConfig, MaskedReconstruction, TargetConfig, pixel_target
from sami.pictures import draw_reconstruction
from sami.teacher import Teacher, TeacherConfig, describe_teacher, load_teacher, to_grid

SHOWN = 4  # pictures in a picture
# What may change between two starts of one run. Shards and the teacher's file may have moved; that
# they are the same is checked by fingerprint and sha256.
FREE = {f"run.{item.name}" for item in fields(RunConfig) if item.name != "seed"} | {
    "eval",
    "data.workers",
    "data.shards",
    "data.val_shards",
    "data.max_bad_fraction",
    "teacher.checkpoint",
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
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=400))

    def check(self) -> None:
        """What no group can see alone."""
        tokens = (self.data.image_size // self.encoder.patch_size) ** 2
        visible = visible_count(tokens, self.mask.ratio)
        require(
            visible >= 1 and (self.mask.ratio == 0 or visible < tokens),
            f"mask.ratio {self.mask.ratio} leaves {visible} of {tokens} patches visible; at least one has to be "
            "visible and, unless the ratio is 0, one masked",
        )
        require(
            self.mask.ratio > 0 or self.loss.tokens == "all",
            "loss.tokens masked needs masked tokens; set loss.tokens all or mask.ratio above 0",
        )
        require(
            self.target.kind == "pixels" or self.teacher.name != "none",
            "target.kind teacher needs a teacher; set teacher.name, or target.kind pixels",
        )


def main(argv: list[str] | None = None) -> int:
    cfg = load_config(PretrainConfig, argv)
    with Run(cfg.run, cfg.train.precision) as run:
        return train(cfg, run)


def train(cfg: PretrainConfig, run: Run) -> int:
    # ---- What it is trained on
    shards, val_shards = open_shards(cfg, run)
    micro = cfg.train.micro_batch(run.processes)
    samples = sum(shard.count for shard in shards)
    samples = min(samples, cfg.data.epoch_samples or samples)
    layout = Layout(samples, cfg.train.batch_size, micro, run.processes, max(1, cfg.data.workers))
    require(
        layout.steps_per_epoch > 0,
        f"data.shards hold {samples} pictures, less than one train.batch_size of {cfg.train.batch_size}; "
        "lower it or give more shards",
    )
    steps = cfg.train.total_steps(layout.steps_per_epoch)

    # ---- What is trained
    encoder = build_encoder(cfg.encoder, cfg.data.image_size)
    teacher = load_teacher(cfg.teacher).to(run.device) if cfg.target.kind == "teacher" else None
    channels = 3 * cfg.encoder.patch_size**2 if teacher is None else cfg.teacher.channels
    model = MaskedReconstruction(encoder, cfg.decoder, cfg.loss, channels, cfg.mask.ratio).to(
        run.device
    )
    optimizer = build_optimizer(model, cfg.optim)
    ema = Ema(model, cfg.optim.ema) if cfg.optim.ema else None
    targets = make_targets(cfg, run, model, teacher)
    views = Views(
        seed=cfg.run.seed,
        student_size=cfg.data.image_size,
        teacher_size=None if teacher is None else cfg.teacher.image_size,
        grid=encoder.grid,
        mask_ratio=cfg.mask.ratio,
        crop_scale=cfg.data.crop_scale,
        hflip=cfg.data.hflip,
    )

    # ---- Where training stands
    window, guard, bad = Window(run.device), Guard(run.device), Counter()
    facts = {
        "teacher": describe_teacher(cfg.teacher, teacher)
        if teacher is not None and run.is_main
        else None,
        "data": {"pictures": samples, "fingerprint": fingerprint(shards)},
    }
    step = resume(cfg, run, layout, facts, model, optimizer, ema, window, guard, bad)
    if step == steps and is_finished(run):
        run.say(f"{run.dir} is finished; start another run with --run.dir, or delete the folder")
        return FINISHED
    run.begin(cfg, facts)
    run.metrics.cut_back(step) if run.is_main else None
    run.wait_for_all()
    announce(cfg, run, layout, steps, step, model, facts)
    shown = load_shown(run, val_shards or shards, views)
    if cfg.train.compile:
        model.predict = torch.compile(model.predict)
    wrapped = run.accelerator.prepare(model)
    loader = stream(cfg, run, layout, shards, views, step) if step < steps else iter(())
    clock, steps_timed, named = Clock(), 0, set()

    while step < steps:
        # ---- One optimizer step
        clock.start()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg.optim, step, steps, cfg.train.batch_size)
        optimizer.zero_grad(set_to_none=True)
        for part in range(layout.micro_batches_per_step):
            batch = next_batch(loader, clock)
            note_bad(run, batch, bad, named)
            batch = batch.to(run.device)
            target = targets(batch)
            last_part = part == layout.micro_batches_per_step - 1
            with contextlib.nullcontext() if last_part else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch.student, batch.visible, batch.masked, target)
                run.accelerator.backward(poison(losses["loss"]) / layout.micro_batches_per_step)
            for name, value in losses.items():
                window.add(name, value)
        norm, skipped = guarded_step(optimizer, cfg.optim.clip)
        window.add("grad_norm", norm)
        guard.count(skipped)
        if ema is not None:
            ema.update(skipped)
        step += 1
        steps_timed += 1

        # ---- What is due after it
        last = step == steps
        evaluate = bool(val_shards) and is_due(step, cfg.eval.every or steps, last)
        if is_due(step, cfg.run.log_every, last) or evaluate:
            record = read_metrics(cfg, run, step, optimizer, window, guard, clock, steps_timed)
            steps_timed = 0
            if evaluate:
                with averaged(ema):
                    values, unusable = measure(
                        run,
                        model,
                        targets,
                        val_shards,
                        views,
                        cfg.eval.samples,
                        micro,
                        cfg.data.workers,
                    )
                bad.update(
                    {f"held out: {reason}": count for reason, count in unusable.items()}
                    if last
                    else {}
                )
                record.update({f"val_{name}": value for name, value in values.items()})
            run.record(step, steps, record)
            stop_if_hopeless(cfg, run, step, guard, bad)
        run.advance(step, steps)
        clock.pause()
        if is_due(step, cfg.run.picture_every, last) and run.is_main:
            with averaged(ema):
                draw(cfg, run, model, targets, shown, step)
        stop, by_clock = run.stop_and_save()
        if is_due(step, cfg.run.save_every, last) or by_clock or stop:
            save(cfg, run, layout, facts, step, model, optimizer, ema, window, guard, bad)
            if stop and not last:
                run.leave_asked(step)
                return 75

    # ---- What is left behind
    finish(cfg, run, steps, encoder, ema, facts, bad)
    return FINISHED


def open_shards(cfg: PretrainConfig, run: Run) -> tuple[list[Shard], list[Shard]]:
    """Training and held-out shards with their samples; rank 0 reads what the cache lacks."""
    opened: list[list[Shard]] = []
    for key, patterns in (
        ("data.shards", cfg.data.shards),
        ("data.val_shards", cfg.data.val_shards),
    ):
        if not patterns and key == "data.val_shards":
            opened.append([])
            continue
        urls, cache = expand(patterns, key), run.dir / f"index-{key.split('.')[1]}.json"
        if run.is_main:
            index_shards(urls, cache)
        run.wait_for_all()
        opened.append(index_shards(urls, cache))
    return opened[0], opened[1]


def make_targets(
    cfg: PretrainConfig, run: Run, model: MaskedReconstruction, teacher: Teacher | None
) -> Callable[[Batch], torch.Tensor]:
    """From a batch on the device to what its tokens are to become, [B, N, C]."""
    if teacher is None:
        return lambda batch: pixel_target(model.normalise(batch.student), cfg.encoder.patch_size)

    def features(batch: Batch) -> torch.Tensor:
        with run.accelerator.autocast():
            maps = teacher(batch.teacher_view)
        return to_grid(maps, model.encoder.grid, cfg.teacher.pool)

    return features


def stream(
    cfg: PretrainConfig, run: Run, layout: Layout, shards: list[Shard], views: Views, step: int
) -> Any:
    """An iterator over this rank's micro-batches, from the first one of ``step`` on."""
    first = step * layout.micro_batches_per_step
    dataset = TrainStream(shards, views, layout, run.rank, first, cfg.data.shuffle_mb * 1_000_000)
    return iter(make_loader(dataset, cfg.data.workers, run.device))


def next_batch(loader: Any, clock: Clock) -> Batch:
    """The next micro-batch; the time until it is there counts as waiting."""
    asked = time.perf_counter()
    batch = next(loader)
    clock.waiting += time.perf_counter() - asked
    if isinstance(batch, UserError):
        raise batch
    return batch


def note_bad(run: Run, batch: Batch, bad: Counter, named: set[str]) -> None:
    """Count unusable samples by reason, and name each once in the log (the first hundred)."""
    for reason, key in batch.bad:
        bad[reason] += 1
        if key not in named and len(named) < 100:
            named.add(key)
            run.say(f"bad sample {key}: {reason}; the next good one takes its place")


def read_metrics(
    cfg: PretrainConfig,
    run: Run,
    step: int,
    optimizer: torch.optim.Optimizer,
    window: Window,
    guard: Guard,
    clock: Clock,
    steps: int,
) -> dict[str, Any]:
    """The line of ``metrics.jsonl``; the only place where the loop waits for the device."""
    means = window.read(run.accelerator)
    seconds, waiting = clock.read()
    record = {
        "step": step,
        "samples": step * cfg.train.batch_size,
        "loss": means.pop("loss"),
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_second": steps * cfg.train.batch_size / seconds,
        "data_wait": waiting,
        "seconds_per_step": seconds / steps,
        **means,
        "skipped_updates": int(guard.state()[0]),
    }
    if run.device.type == "cuda":
        record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return record


def stop_if_hopeless(cfg: PretrainConfig, run: Run, step: int, guard: Guard, bad: Counter) -> None:
    """Stop where going on would train on nothing: updates that are not finite, or bad data.

    Raises:
        UserError: says which, and what to try.
    """
    saved = list_checkpoints(run.dir / "checkpoints")
    last_good = (
        f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    )
    if guard.state()[2] >= cfg.train.max_bad_steps:
        raise UserError(
            f"loss or gradient was not finite in {int(guard.state()[2])} updates in a row before step {step}; "
            f"lower optim.lr, set optim.clip 1.0 or train.precision fp32; {last_good}"
        )
    seen = step * cfg.train.batch_size
    count = sum(sum(part.values()) for part in run.gather(bad))
    if seen >= 1000 and count > cfg.data.max_bad_fraction * seen:
        raise UserError(
            f"{count} of {seen} samples were bad ({dict(bad)}), more than data.max_bad_fraction "
            f"{cfg.data.max_bad_fraction}; mend the shards or raise it; {last_good}"
        )


@contextlib.contextmanager
def averaged(ema: Ema | None) -> Any:
    """Inside, the model holds the averaged weights, where there are any."""
    if ema is not None:
        ema.swap()
    try:
        yield
    finally:
        if ema is not None:
            ema.swap()


def load_shown(run: Run, shards: list[Shard], views: Views) -> Batch | None:
    """The few pictures that are drawn: the first usable ones; rank 0 only."""
    if not run.is_main:
        return None
    positions = range(min(10 * SHOWN, sum(shard.count for shard in shards)))
    return next(iter(HeldOut(shards, views, positions, SHOWN)), None)


@torch.no_grad()
def draw(
    cfg: PretrainConfig,
    run: Run,
    model: MaskedReconstruction,
    targets: Callable[[Batch], torch.Tensor],
    shown: Batch | None,
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


def save(
    cfg: PretrainConfig,
    run: Run,
    layout: Layout,
    facts: dict[str, Any],
    step: int,
    model: MaskedReconstruction,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    window: Window,
    guard: Guard,
    bad: Counter,
) -> None:
    """A checkpoint: what is trained and what was counted. Neither teacher nor data position."""
    ranks = run.gather({"window": window.state(), "bad": dict(bad)})
    if run.is_main:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": None if ema is None else ema.average,
            "guard": guard.state(),
            "ranks": ranks,
        }
        meta = {
            "config": to_dict(cfg),
            "layout": describe(layout),
            "facts": facts,
            "machine": machine(),
        }
        save_checkpoint(run.dir / "checkpoints", step, state, meta, cfg.run.keep)
    run.saved()


def resume(
    cfg: PretrainConfig,
    run: Run,
    layout: Layout,
    facts: dict[str, Any],
    model: MaskedReconstruction,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    window: Window,
    guard: Guard,
    bad: Counter,
) -> int:
    """Load the newest whole checkpoint of the run folder; returns its step, or 0.

    Raises:
        UserError: the folder belongs to another configuration, or no checkpoint in it is whole.
    """
    checkpoints = list_checkpoints(run.dir / "checkpoints")
    for checkpoint in reversed(checkpoints):
        try:
            meta = read_meta(checkpoint)
            state = read_state(checkpoint, run.device)
        except Damaged as error:
            run.say(f"{error}; looking for an earlier one")
            continue
        changed = differences(meta["config"], to_dict(cfg), FREE)
        if run.is_main:  # only rank 0 hashed the teacher
            changed += differences(
                {"facts": meta["facts"]}, {"facts": facts}, {"facts.teacher.checkpoint"}
            )
        if changed:
            raise UserError(
                f"{run.dir} holds a run of another configuration: {'; '.join(changed[:3])}; "
                "give the old values, or another --run.dir"
            )
        if meta["layout"] != describe(layout):
            run.say(
                "the number of processes or workers or the micro-batch changed: samples of this epoch may repeat"
            )
        if meta["machine"] != machine():
            run.say(
                f"resumed under {machine()}, saved under {meta['machine']}: losses will not be bit-equal"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if ema is not None:
            ema.average = state["ema"]
        guard.load(state["guard"])
        if len(state["ranks"]) == run.processes:
            mine = state["ranks"][run.rank]
            window.load(mine["window"])
            bad.update(mine["bad"])
        elif run.is_main:
            for rank in state["ranks"]:
                bad.update(rank["bad"])
        run.say(f"resuming from {checkpoint}")
        return meta["step"]
    if checkpoints:
        raise UserError(
            f"none of the {len(checkpoints)} checkpoints in {run.dir}/checkpoints can be read; "
            "move the folder away to start over, or give another --run.dir"
        )
    return 0


def machine() -> dict[str, Any]:
    """What bit-equality on a CPU depends on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def is_finished(run: Run) -> bool:
    """Whether the folder's run had come to its end."""
    try:
        return json.loads((run.dir / "summary.json").read_text())["status"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def announce(
    cfg: PretrainConfig,
    run: Run,
    layout: Layout,
    steps: int,
    step: int,
    model: MaskedReconstruction,
    facts: dict[str, Any],
) -> None:
    """Say what is about to happen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    student = sum(p.numel() for p in model.encoder.parameters())
    run.say(
        f"{run.dir}: {cfg.encoder.name} ({student / 1e6:.2f} M parameters, {trained / 1e6:.2f} M with the decoder) "
        f"on {layout.samples} pictures, {layout.steps_per_epoch} steps an epoch, {steps} steps, now at {step}"
    )
    run.say(
        f"{run.processes} process(es) on {run.device.type}, {'bf16' if run.bf16 else 'fp32'}, batch "
        f"{cfg.train.batch_size} = {run.processes} x {layout.micro_batch_size} x {layout.micro_batches_per_step}, "
        f"{torch.get_num_threads()} thread(s) each"
    )
    teacher = facts["teacher"]
    if teacher is not None:
        run.say(
            f"teacher {teacher['name']} at {teacher['image_size']} px, {teacher['layer']}, sha256 {teacher['sha256'][:12]}"
        )
        if teacher["random"]:
            run.say(
                "*** THE TEACHER IS RANDOM (teacher.checkpoint=random): what is learnt here is not SAM ***"
            )


def finish(
    cfg: PretrainConfig,
    run: Run,
    steps: int,
    encoder: Encoder,
    ema: Ema | None,
    facts: dict[str, Any],
    bad: Counter,
) -> None:
    """Export the encoder and close the summary."""
    counts: Counter = Counter()
    for part in run.gather(bad):
        counts.update(part)
    if not run.is_main:
        return
    with averaged(ema):
        training = {
            "stage": "pretrain",
            "steps": steps,
            "target": cfg.target.kind,
            "teacher": facts["teacher"],
        }
        header = export_header(
            encoder, weights="last" if ema is None else "ema", training=json.dumps(training)
        )
        write_weights(run.dir / "encoder.safetensors", encoder.state_dict(), header)
    final = next((line for line in reversed(run.metrics.read()) if line["step"] == steps), {})
    run.summarise(
        status="finished",
        exit_code=FINISHED,
        steps=steps,
        loss=final.get("loss"),
        weights="last" if ema is None else "ema",
        bad_samples=dict(counts),
        evaluation={
            name.removeprefix("val_"): final[name] for name in final if name.startswith("val_")
        }
        or None,
    )
    if counts:
        run.say(f"bad samples: {dict(counts)}")
    if facts["teacher"] is not None and facts["teacher"]["random"]:
        run.say("*** this encoder was trained by a random teacher ***")
    run.say(
        f"finished: {run.dir}/encoder.safetensors, {run.dir}/metrics.jsonl, {run.dir}/pictures/"
    )


if __name__ == "__main__":
    sys.exit(run_entry(main))
