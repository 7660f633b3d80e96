"""Stage 2: finetune EfficientSAM on masks of SA-1B's layout, and measure it.

python finetune/train.py --config configs/finetune/efficient_sam_ti.yaml [--group.field value ...]
                         [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml finetune/train.py ...
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch

from finetune.data import UNSURE, MaskDataConfig, PromptTransform
from finetune.evaluation import EvalDataset, EvalSample, MaskEvalConfig, evaluate
from finetune.losses import MaskLossConfig
from finetune.model import (
    TAKES,
    TAKES_ENCODER,
    MaskDecoderConfig,
    build_model,
    model_header,
)
from finetune.objective import Objective
from finetune.pictures import draw_masks
from finetune.prompt_encoder import MAX_POINTS
from finetune.prompting import PromptConfig
from finetune.sam import Sam
from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require, to_dict
from sami.core.dataset import ShardSource, load_training, open_data
from sami.core.exits import FINISHED, run_entry
from sami.core.images import Drawn
from sami.core.index import Shard, fingerprint
from sami.core.optim import OptimConfig, TrainConfig, poison, unfinished_warmup
from sami.core.order import Order
from sami.core.run import Run, RunConfig, is_due
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.core.weights import find_weights
from sami.encoder import EncoderConfig

STARTS = {"encoder.checkpoint": Start(TAKES_ENCODER), "decoder.checkpoint": Start(TAKES)}
SHOWN = 4  # pictures in a picture
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
    "decoder.checkpoint",
    "train.micro_batch_size",
    "train.checkpointing",
    "train.compile",
    "train.precision",
    "train.max_bad_steps",
}


@dataclass
class LengthConfig(TrainConfig):
    """How long, and in which pieces.

    Attributes:
        checkpointing: recompute the encoder's blocks in the backward pass: less memory, more time.
    """

    checkpointing: bool = False


@dataclass
class FinetuneConfig:
    """Stage 2: the encoder of stage 1 with SAM's mask decoder, trained together on SA-1B."""

    run: RunConfig = field(default_factory=RunConfig)
    data: MaskDataConfig = field(default_factory=MaskDataConfig)
    eval: MaskEvalConfig = field(default_factory=MaskEvalConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: MaskDecoderConfig = field(default_factory=MaskDecoderConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    loss: MaskLossConfig = field(default_factory=MaskLossConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=4e-4,
            base_batch=128,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            schedule="linear",
            warmup=250,
        )
    )
    train: LengthConfig = field(default_factory=lambda: LengthConfig(epochs=5, batch_size=128))

    def check(self) -> None:
        """What no group can see alone."""
        require(
            self.decoder.kind == "sam" or self.prompt.corrections < MAX_POINTS,
            f"prompt.corrections {self.prompt.corrections} must be under {MAX_POINTS}, which is "
            "all that a prompt of EfficientSAM holds; or set --decoder.kind sam",
        )


def main(argv: list[str] | None = None) -> int:
    return start_entry(FinetuneConfig, argv, lambda cfg: STARTS, train)


def train(cfg: FinetuneConfig, run: Run, only_check: bool = False) -> int:
    # ---- What it starts from
    files, started_from = find_starts(run, cfg, STARTS)
    if cfg.encoder.checkpoint and not files["encoder.checkpoint"]:  # gone: its grid of positions
        own = find_weights(run.dir / "checkpoints", TAKES, "encoder.checkpoint").file
        files["encoder.checkpoint"] = str(own)

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
    steps = cfg.train.total_steps(order.steps_per_epoch)

    # ---- What is trained
    model = build_model(
        replace(cfg.encoder, checkpoint=files["encoder.checkpoint"]),
        replace(cfg.decoder, checkpoint=files["decoder.checkpoint"]),
        cfg.data.image_size,
        cfg.data.resize,
        cfg.train.checkpointing,
        cfg.loss.single_mask,
    )
    objective = Objective(model, cfg.loss, cfg.prompt).to(run.device)
    state = State(objective, cfg.optim, cfg.train, run, model.image_encoder.layer_id)
    samples = PromptTransform(
        cfg.data, cfg.prompt, cfg.loss.size or model.shape.mask_size, cfg.run.seed
    )
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
        made = {
            "encoder": f"{cfg.encoder.name}, from {cfg.encoder.checkpoint or 'random weights'}",
            "decoder": f"{cfg.decoder.kind}, from {cfg.decoder.checkpoint or 'random weights'}",
        }
        return tell_checked(order, held_out, samples, cfg.train.batch_size, made)

    # ---- Where training stands
    identity = {"config": to_dict(cfg), "facts": facts}
    step = state.resume(identity, FREE)
    if step == steps and run.is_finished():
        run.say(f"{run.dir} is finished; start another with --run.dir, or delete the folder")
        return FINISHED
    run.begin(cfg, step, facts)
    announce(cfg, run, order, micro_batch, steps, step, model)
    if cfg.train.compiles(run.device):
        model.image_encoder.compile()  # in place: its weights keep their names
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
            state.note_left_out(batch.left_out)
            state.note_unsure(batch.unsure)
            run.advance(step, steps)
            batch = batch.to(run.device)
            last_part = part == parts - 1
            with contextlib.nullcontext() if last_part else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch)
                run.accelerator.backward(poison(losses["loss"]) / parts)
            for name, value in losses.items():
                state.window.add(name, value, share)
        state.update(step)
        step += 1

        # ---- What is due after it
        last = step == steps
        measure = bool(held_out) and is_due(step, cfg.eval.every or steps, last)
        if is_due(step, log_every, last) or measure:
            record = state.read_metrics(step)
            if measure:
                with state.averaged():
                    measures = evaluate(
                        run,
                        model,
                        held_out,
                        cfg.eval,
                        cfg.data.workers,
                        drawn=cfg.data.masks_drawn_on,
                    )
                record.update({f"val_{name}": value for name, value in measures.items()})
            run.record(step, steps, record)
        whole = step % order.steps_per_epoch == 0
        if is_due(step, log_every, last or whole):
            state.stop_if_hopeless(step, cfg.data.max_bad_fraction, whole)
        run.advance(step, steps)
        state.clock.pause()
        if is_due(step, cfg.run.picture_every, last):
            with state.averaged():
                draw(run, model, held_out or order.shards, step, cfg.data.masks_drawn_on)
        stop, by_clock = run.stop_and_save()
        if is_due(step, cfg.run.save_every, last) or by_clock or stop:
            state.save(step, identity, export)
            if stop and not last:
                counted = state.bad_summary() | state.left_out_summary()
                return run.leave_asked(step, **counted)

    # ---- What is left behind
    finish(run, steps, state, export)
    return FINISHED


def draw(run: Run, model: Sam, shards: list[Shard], step: int, drawn: Drawn) -> None:
    """Masks by box and by click on a few pictures, as ``pictures/masks-<step>.png``; rank 0."""
    if not run.is_main:
        return
    path = run.dir / "pictures" / f"masks-{step:07d}.png"
    found = EvalDataset(
        ShardSource.first(shards, EvalDataset.fields, SHOWN), model.shape, masks=8, drawn=drawn
    )
    shown = [judged for judged in found if isinstance(judged, EvalSample)]
    if shown:
        model.eval()
        with run.accelerator.autocast():
            draw_masks(path, model, shown, run.device, f"{run.dir.name}, step {step}")
        model.train()
        run.picture(path, step)


def announce(
    cfg: FinetuneConfig,
    run: Run,
    order: Order,
    micro_batch: int,
    steps: int,
    step: int,
    model: Sam,
) -> None:
    """Say what is about to happen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    run.say(
        f"{run.dir}: {cfg.encoder.name}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M "
        f"trained, on {order.samples} pictures, {order.steps_per_epoch} steps an epoch, {steps} "
        f"steps, now at {step}"
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
    start = cfg.encoder.checkpoint or "random weights"
    decoder = cfg.decoder.checkpoint or "random weights"
    run.say(f"encoder from {start}, decoder from {decoder}")
    if frozen:
        parts = Counter(name.partition(".")[0].replace("_", " ") for name in frozen)
        told = ", ".join(f"{number} of the {part}" for part, number in parts.items())
        run.say(f"not trained, but kept as at the start: {told} ({len(frozen)} tensors in all)")
    if not cfg.data.val_shards:
        run.say("no data.val_shards: nothing will be measured")


def make_export(model: Sam, step: int, weights: str) -> Export:
    """The model as it is opened by others, at every checkpoint and at the end."""
    header = model_header(model, weights=weights, training={"steps": step})
    return Export("model.safetensors", model.state_dict(), header)


def finish(run: Run, steps: int, state: State, export: Callable[[int, str], Export]) -> None:
    """Export the model and close the summary."""
    bad, left_out = state.bad_summary(), state.left_out_summary()
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
        evaluation=held_out or None,
        **bad,
        **left_out,
    )
    if bad["bad_samples"]:
        run.say(f"bad samples: {bad['bad_samples']}")
    if left_out["objects_left_out"]:
        run.say(f"objects left out: {left_out['objects_left_out']}")
    if left_out["orientation_unsure"]:
        run.say(f"{UNSURE}: {left_out['orientation_unsure']} times")
    run.say(f"finished: {run.dir}/model.safetensors, metrics.jsonl and pictures/ beside it")


if __name__ == "__main__":
    sys.exit(run_entry(main))
