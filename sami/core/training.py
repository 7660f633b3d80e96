"""What the entries share around their loops: the data, where training stands, and what is due.

A loop itself is written out in its entry: forward, backward and step.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from sami.core.checkpoint import Export
from sami.core.config import require, to_dict
from sami.core.dataset import ShardsConfig, Transform, load_training
from sami.core.exits import FINISHED
from sami.core.index import Shard, Source, fingerprint, open_sources
from sami.core.optim import OptimConfig, TrainConfig, unfinished_warmup
from sami.core.order import Order
from sami.core.overlap import refuse_overlap
from sami.core.patterns import expand
from sami.core.remote import ShardCache
from sami.core.run import Run, RunConfig
from sami.core.state import State

# What may change between two starts of one run. Shards may have moved; that they are the same is
# checked by their fingerprint. Weights that a run started from are compared by content (starts.py).
FREE = {f"run.{item.name}" for item in fields(RunConfig) if item.name != "seed"} | {
    "eval",
    "data.workers",
    "data.shards",
    "data.val_shards",
    "data.allow_val_in_train",
    "data.max_bad_fraction",
    "data.cache_dir",
    "data.cache_gb",
    "encoder.checkpoint",
    "train.micro_batch_size",
    "train.compile",
    "train.precision",
    "train.max_bad_steps",
}
NAMED = 3  # frozen tensors that are named; of more, how many there are in each part of the model


@dataclass(frozen=True)
class Plan:
    """What is trained on, and in which steps and pieces.

    Attributes:
        order: of the samples that are trained on.
        held_out: shards that are measured on.
        steps: of the whole run.
        micro_batch: samples of one forward on one rank.
        parts: micro-batches of one step on one rank.
        max_bad_fraction, workers: of the configuration.
        metadata: of the data, for the summary; what a run that goes on has to find again.
    """

    order: Order
    held_out: list[Shard]
    steps: int
    micro_batch: int
    parts: int
    max_bad_fraction: float
    workers: int
    metadata: dict[str, Any]


def plan_training(data: ShardsConfig, train: TrainConfig, run: Run) -> Plan:
    """Open the shards and count the steps.

    Raises:
        UserError: shards that cannot be used, fewer samples than a batch, or a batch that cannot be
            divided among the processes.
    """
    sources, held_out = open_data(data, run)
    order = Order(
        sources,
        batch_size=train.batch_size,
        seed=run.config.seed,
        window=data.window,
        epoch_samples=data.epoch_samples,
    )
    asked = data.epoch_samples or train.batch_size
    require(
        asked >= train.batch_size,
        f"data.epoch_samples {asked} is less than one train.batch_size of {train.batch_size}; "
        "raise the former or lower the latter",
    )
    require(
        order.steps_per_epoch > 0,
        f"data.shards hold {order.samples} images, less than one train.batch_size of "
        f"{train.batch_size}; lower it or give more shards",
    )
    micro_batch = train.micro_batch(run.processes)
    metadata = {
        "pictures": order.samples,
        "shards": len(order.shards),
        "fingerprint": fingerprint(sources),
        "weights": [source.weight for source in sources],
    }
    return Plan(
        order,
        held_out,
        train.total_steps(order.steps_per_epoch),
        micro_batch,
        train.batch_size // run.processes // micro_batch,
        data.max_bad_fraction,
        data.workers,
        metadata,
    )


def open_data(data: ShardsConfig, run: Run) -> tuple[list[Source], list[Shard]]:
    """What is trained on and what is held out; the ranks share the indexing.

    Raises:
        UserError: see :func:`expand` and :func:`open_sources`; or what is held out is trained on;
            or the cache cannot hold two windows of what has to be fetched.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if data.workers > cores:
        run.say(
            f"data.workers {data.workers} are more than the {cores} core(s) to be had here: they "
            f"wait for each other; --data.workers {cores} is as fast"
        )
    folder, part = run.dir / "index", (run.rank, run.processes)
    cache = ShardCache(data.cache_dir, data.cache_gb)
    opened: list[list[Source]] = []
    for key in ("shards", "val_shards"):
        patterns = getattr(data, key)
        if not patterns and key == "val_shards":
            opened.append([])
            continue
        groups, window = expand(patterns, f"data.{key}"), data.window * (key == "shards")
        if run.processes > 1:
            open_sources(groups, folder, run.say, part, cache, window)
            run.wait_for_all()
        opened.append(open_sources(groups, folder, run.say, cache=cache, window=window))
    train, held_out = ([one for source in found for one in source.shards] for found in opened)
    if run.is_main and held_out and not data.allow_val_in_train:
        keys = ("data.shards", "data.val_shards")
        refuse_overlap(train, held_out, keys, "--data.allow_val_in_train true")
    return opened[0], held_out


class Loop:
    """Where a run stands: it is resumed here, handed its micro-batches, saved and ended."""

    def __init__(
        self,
        run: Run,
        plan: Plan,
        state: State,
        metadata: dict[str, Any],
        export: Callable[[int, str], Export],
    ) -> None:
        """
        Args:
            metadata: what the summary and each checkpoint tell of the run from the start.
            export: from the step and which weights they are (ema, last) to the file that is left.
        """
        self.run, self.plan, self.state = run, plan, state
        self.metadata, self.export = metadata | {"data": plan.metadata}, export
        self.step, self.steps = 0, plan.steps
        self.log_every = run.config.log_interval(plan.steps)
        self._identity: dict[str, Any] = {}
        self._batches: Iterator[tuple[Any, list[tuple[str, str]]]] = iter(())
        self._record: dict[str, Any] | None = None

    # -- before it ----------------------------------------------------------------------------

    def resume(self, config: Any, free: Collection[str] = ()) -> bool:
        """Find where training stands, and begin there; False if the run is finished already.

        Args:
            config: the whole configuration, to be compared and written down.
            free: what may have changed beside FREE.

        Raises:
            UserError: see :meth:`State.resume`.
        """
        self._identity = {"config": to_dict(config), "facts": self.metadata}
        self.step = self.state.resume(self._identity, FREE | set(free))
        if self.step == self.steps and self.run.is_finished():
            self.run.say(
                f"{self.run.dir} is finished; start another with --run.dir, or delete the folder"
            )
            return False
        self.run.begin(config, self.step, self.metadata)
        return True

    def announce(self, what: str, model: nn.Module, optim: OptimConfig, train: TrainConfig) -> None:
        """Say what is about to happen.

        Args:
            what: is trained, such as vit_ti.
            model: all of it.
        """
        run, order = self.run, self.plan.order
        total, trained = (
            sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) / 1e6
            for frozen in (True, False)
        )
        run.say(
            f"{run.dir}: {what}, {total:.2f} M parameters, {trained:.2f} M trained, on "
            f"{order.samples} images, {order.steps_per_epoch} steps an epoch, {self.steps} "
            f"steps, now at {self.step}"
        )
        if self.steps < (train.steps or self.steps):
            run.say(f"train.epochs {train.epochs} end it before train.steps {train.steps}")
        if warning := unfinished_warmup(optim, self.steps, train.batch_size):
            run.say(warning)
        run.say(
            f"{run.processes} process(es) on {run.device.type}, {'bf16' if run.bf16 else 'fp32'}, "
            f"batch {train.batch_size} = {run.processes} x {self.plan.micro_batch} x "
            f"{self.plan.parts}, {torch.get_num_threads()} thread(s) each"
        )
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            names = ", ".join(frozen)
            if len(frozen) > NAMED:
                parts = Counter(name.partition(".")[0].replace("_", " ") for name in frozen)
                names = ", ".join(f"{number} of the {part}" for part, number in parts.items())
                names += f" ({len(frozen)} tensors in all)"
            run.say(f"not trained, but kept as at the start: {names}")

    def open(self, transform: Transform) -> None:
        """Begin to read, from the step on at which training stands."""
        plan = self.plan
        self._batches = load_training(
            plan.order, transform, self.run, plan.micro_batch, self.step, plan.workers
        )

    # -- one step -----------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[tuple[Any, bool]]:
        """This rank's micro-batches of a step on the device, and whether each is the last one.

        The learning rate is set and the gradients are cleared before the first.
        """
        self.state.begin_step(self.step, self.steps)
        for part in range(self.plan.parts):
            with self.state.clock.wait():
                batch, bad = next(self._batches)
            self.state.note_bad(bad)
            self.run.advance(self.step, self.steps)
            yield batch.to(self.run.device), part == self.plan.parts - 1

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Count a micro-batch's losses for the log, without waiting for the device."""
        share = 1 / (self.plan.parts * self.run.processes)
        for name, value in losses.items():
            self.state.window.add(name, value, share)

    def advance(self, eval_every: int) -> bool:
        """Count the step; whether to evaluate now. Metrics are read before that takes its time.

        Collective.
        """
        self.step += 1
        evaluate = bool(self.plan.held_out) and self.is_due(eval_every or self.steps)
        self._record = None
        if self.is_due(self.log_every) or evaluate:
            self._record = self.state.read_metrics(self.step)
        return evaluate

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is due; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    def report(self, measures: dict[str, Any]) -> None:
        """Write the line of metrics that is due, and stop where going on would be in vain.

        Args:
            measures: held-out ones, if there are any.

        Raises:
            UserError: see :meth:`State.stop_if_diverged`.
        """
        if self._record is not None:
            held_out = {f"val_{name}": value for name, value in measures.items()}
            self.run.record(self.step, self.steps, self._record | held_out)
        whole = self.step % self.plan.order.steps_per_epoch == 0
        if whole or self.is_due(self.log_every):
            self.state.stop_if_diverged(self.step, self.plan.max_bad_fraction, whole)
        self.run.advance(self.step, self.steps)
        self.state.clock.pause()

    def save(self) -> bool:
        """Write a checkpoint if one is due; whether the run is asked to stop before its end.

        Collective.
        """
        stop, by_clock = self.run.stop_and_save()
        if self.is_due(self.run.config.save_every) or by_clock or stop:
            self.state.save(self.step, self._identity, self.export)
        return stop and self.step < self.steps

    # -- after it -----------------------------------------------------------------------------

    def leave(self, counted: dict[str, Any]) -> int:
        """Note that the run stopped as asked, and :meth:`State.counted`; the exit code."""
        return self.run.leave_asked(self.step, **counted)

    def finish(self, counted: dict[str, Any], remarks: Collection[str] = ()) -> int:
        """Write the weights and close the summary; the exit code.

        Args:
            remarks: what is to be said at last.
        """
        run = self.run
        if not run.is_main:
            return FINISHED
        file = self.state.leave(run.dir, self.steps, self.export)
        lines = reversed(run.metrics.read())
        final = next((line for line in lines if line["step"] == self.steps), {})
        measures = {k.removeprefix("val_"): v for k, v in final.items() if k.startswith("val_")}
        run.summarise(
            status="finished",
            exit_code=FINISHED,
            steps=self.steps,
            loss=final.get("loss"),
            weights=self.state.weights,
            **counted,
            evaluation=measures or None,
        )
        for key in ("bad_samples", "objects_left_out"):
            if counted.get(key):
                run.say(f"{key.replace('_', ' ')}: {counted[key]}")
        for remark in remarks:
            run.say(remark)
        run.say(f"finished: {run.dir}/{file}, metrics.jsonl and pictures/ beside it")
        return FINISHED
