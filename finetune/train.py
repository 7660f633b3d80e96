"""Stage 2: finetune EfficientSAM on masks of SA-1B's layout, and measure it.

python finetune/train.py --config configs/finetune/efficient_sam_ti.yaml [--group.field value ...]
                         [--check]

On several GPUs: accelerate launch --config_file configs/accelerate/gpu_8.yaml finetune/train.py ...
"""

import contextlib
import sys
from dataclasses import dataclass, field, replace

from finetune.data import UNSURE, MaskDataConfig, PromptTransform
from finetune.evaluation import MaskEvalConfig, evaluate
from finetune.losses import MaskLossConfig
from finetune.model import (
    TAKES_ENCODER,
    TAKES_MODEL,
    LengthConfig,
    MaskDecoderConfig,
    build_model,
    model_header,
)
from finetune.objective import Objective
from finetune.pictures import draw_shown
from finetune.prompt_encoder import MAX_POINTS
from finetune.prompting import PromptConfig
from sami.core.checkpoint import Export
from sami.core.checks import start_entry, tell_checked
from sami.core.config import require
from sami.core.exits import FINISHED, run_entry
from sami.core.optim import OptimConfig, propagate_nonfinite
from sami.core.run import Run, RunConfig
from sami.core.starts import Start, find_starts
from sami.core.state import State
from sami.core.training import Loop, plan_training
from sami.core.weights import find_weights
from sami.encoder import EncoderConfig

STARTS = {"encoder.checkpoint": Start(TAKES_ENCODER), "decoder.checkpoint": Start(TAKES_MODEL)}


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
    """Train to the end, or with ``only_check`` up to a first batch; returns the exit code."""
    # ---- What it starts from, and what it is trained on
    files, started_from = find_starts(run, cfg, STARTS)
    if cfg.encoder.checkpoint and not files["encoder.checkpoint"]:  # gone: its grid of positions
        own = find_weights(run.dir / "checkpoints", TAKES_MODEL, "encoder.checkpoint").file
        files["encoder.checkpoint"] = str(own)
    plan = plan_training(cfg.data, cfg.train, run)
    held_out = plan.held_out

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
    loss_size = cfg.loss.size or 4 * model.shape.grid
    transform = PromptTransform(cfg.data, cfg.prompt, loss_size, cfg.run.seed)

    def export(step: int, weights: str) -> Export:
        """The model as it is opened by others, at every checkpoint and at the end."""
        header = model_header(model, weights=weights, training={"steps": step})
        return Export("model.safetensors", model.state_dict(), header)

    made = {
        "encoder": f"{cfg.encoder.name}, from {cfg.encoder.checkpoint or 'random weights'}",
        "decoder": f"{cfg.decoder.kind}, from {cfg.decoder.checkpoint or 'random weights'}",
    }
    if only_check:
        return tell_checked(plan.order, held_out, transform, cfg.train.batch_size, made)

    # ---- Where training stands
    loop = Loop(run, plan, state, {"started_from": started_from}, export)
    if not loop.resume(cfg, {"decoder.checkpoint", "train.checkpointing"}):
        return FINISHED
    loop.announce(cfg.encoder.name, model, cfg.optim, cfg.train)
    run.say("; ".join(f"{part} {words}" for part, words in made.items()))
    if not held_out:
        run.say("no data.val_shards: nothing will be measured")
    if cfg.train.compiles(run.device):
        model.image_encoder.compile()  # in place: its weights keep their names
    wrapped = run.accelerator.prepare(objective)
    loop.open(transform)
    while loop.step < loop.steps:
        # ---- One optimizer step
        run.seed_step(loop.step)
        for batch, last in loop.micro_batches():
            state.note_left_out(batch.left_out)
            state.note_unsure(batch.unsure)
            with contextlib.nullcontext() if last else run.accelerator.no_sync(wrapped):
                losses = wrapped(batch)
                run.accelerator.backward(propagate_nonfinite(losses["loss"]) / plan.parts)
            loop.add(losses)
        state.update(loop.step)

        # ---- What is due after it
        measures, drawn = {}, cfg.data.masks_drawn_on
        if loop.advance(cfg.eval.every):
            with state.averaged():
                measures = evaluate(run, model, held_out, cfg.eval, plan.workers, drawn=drawn)
        loop.report(measures)
        if loop.is_due(cfg.run.picture_every) and run.is_main:
            with state.averaged():
                draw_shown(run, model, held_out or plan.order.shards, loop.step, drawn)
        if loop.save():
            return loop.leave(state.counted(objects=True))

    # ---- What is left behind
    counted = state.counted(objects=True)
    unsure = counted["orientation_unsure"]
    return loop.finish(counted, [f"{UNSURE}: {unsure} times"] if unsure else [])


if __name__ == "__main__":
    sys.exit(run_entry(main))
