"""What training changes, how it is updated, counted, saved and found again.

Weights, moments, averages and counts are state; learning rate, position in the data and what is
random about a sample are functions of the step, and the step is in the checkpoint's name.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sami.core.checkpoint import (
    Damaged,
    Export,
    list_checkpoints,
    read_meta,
    read_state,
    save_checkpoint,
)
from sami.core.config import differences
from sami.core.errors import UserError
from sami.core.metrics import BadSamples, Clock, Window
from sami.core.optim import (
    Ema,
    Guard,
    OptimConfig,
    Statistics,
    TrainConfig,
    build_optimizer,
    guarded_step,
    learning_rate,
)
from sami.core.run import Run


class State:
    """Model, optimizer, moving average, and what was counted."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        train: TrainConfig,
        run: Run,
        layer_id: Callable[[str], int] = lambda name: 0,
        optimizer: torch.optim.AdamW | None = None,
    ) -> None:
        """
        Args:
            model: on its device, not yet wrapped.
            layer_id: for the layer decay, see :func:`parameter_groups`.
            optimizer: fused, with ``lr_scale`` in its groups; built from ``optim`` if None.
        """
        self.optim, self.train, self.run, self.model = optim, train, run, model
        self.optimizer = optimizer or build_optimizer(model, optim, layer_id)
        self.ema = Ema(model, optim.ema) if optim.ema else None
        self.statistics = Statistics(model)
        self.window, self.guard, self.clock = Window(run.device), Guard(run.device), Clock()
        # Of this rank: bad samples, objects that good ones had to do without, and images of which
        # a default decided how their masks lie.
        self.bad, self.left_out, self.unsure = BadSamples(), BadSamples(), BadSamples()
        self._counters = {"bad": self.bad, "left_out": self.left_out, "unsure": self.unsure}

    # -- one step -----------------------------------------------------------------------------

    def begin_step(self, step: int, steps: int) -> None:
        """Learning rate of the step, no gradients."""
        self.clock.start()
        rate = learning_rate(self.optim, step, steps, self.train.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, step: int) -> None:
        """Clip and take ``step`` to ``step + 1``, unless a gradient is not finite.

        Nothing here waits for the device.
        """
        norm, skipped = guarded_step(self.optimizer, self.optim.clip)
        self.window.add("grad_norm", norm, 1 / self.run.processes)
        self.guard.count(skipped)
        self.statistics.update(skipped, self.run.accelerator)
        if self.ema is not None:
            self.ema.update(step, skipped)
        self.clock.steps += 1

    def note_bad(self, bad: list[tuple[str, str]]) -> None:
        """Count unusable samples, given as (reason, key); name the first of each reason."""
        for reason, key in bad:
            if self.bad.add(reason, key):
                sentence = f"bad sample {key}: {reason}; another one takes its place"
                self.run.say(sentence, any_rank=True)

    def note_left_out(self, objects: list[tuple[str, str]]) -> None:
        """Count objects that a good sample had to do without, given as (reason, key)."""
        for reason, key in objects:
            self.left_out.add(reason, key)

    def note_unsure(self, images: list[tuple[str, str]]) -> None:
        """Count images of which a default told how their masks lie, given as (what, key)."""
        for what, key in images:
            self.unsure.add(what, key)
            if self.unsure.counts.total() == 1:
                self.run.say(f"{what} (the first is {key}; counted in summary.json)")

    # -- when it is due -----------------------------------------------------------------------

    def read_metrics(self, step: int) -> dict[str, Any]:
        """The common part of a line of ``metrics.jsonl``; the only place that waits for the device.

        Collective: every rank calls it.
        """
        means = self.window.read(self.run.accelerator)
        steps, seconds, waiting = self.clock.read()
        record = {
            "step": step,
            "samples": step * self.train.batch_size,
            "loss": means.pop("loss"),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": steps * self.train.batch_size / seconds,
            "data_wait": waiting,
            "seconds_per_step": seconds / steps,
            **means,
            "skipped_updates": int(self.guard.state()[0]),
        }
        if self.run.device.type == "cuda":
            record["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return record

    def stop_if_diverged(self, step: int, max_bad_fraction: float, whole: bool) -> None:
        """Stop where going on would train on nothing. Collective: every rank calls it.

        Args:
            whole: the step ends an epoch. Within one, three standard deviations are put down
                to chance.

        Raises:
            UserError: too many updates in a row were not finite, or too many samples were bad.
        """
        saved = list_checkpoints(self.run.dir / "checkpoints")
        last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        _, _, worst_row = self.guard.state()
        if worst_row >= self.train.max_bad_steps:
            raise UserError(
                f"loss or gradient was not finite in {int(worst_row)} updates in a row before "
                f"step {step}; lower --optim.lr, set --optim.clip 1.0 or --train.precision fp32; "
                f"{last}"
            )
        counts, samples = self._of_all(self.bad).counts, step * self.train.batch_size
        allowed = max_bad_fraction * samples
        if counts.total() > allowed + (0 if whole else 3 * math.sqrt(allowed)):
            self.run.summarise(**self.counted())  # every rank comes here
            raise UserError(
                f"{counts.total()} of {samples} samples were bad ({dict(counts)}), more than "
                f"data.max_bad_fraction {max_bad_fraction}; mend the shards or raise it; {last}"
            )

    def counted(self, objects: bool = False) -> dict[str, Any]:
        """What was counted on all ranks, for ``summary.json``. Collective.

        Args:
            objects: of good samples, too: those left out, and images whose masks' orientation a
                default decided.
        """
        bad = self._of_all(self.bad)
        counts = {"bad_samples": dict(bad.counts), "bad_sample_keys": bad.keys}
        if not objects:
            return counts
        left_out, unsure = self._of_all(self.left_out), self._of_all(self.unsure)
        return counts | {
            "objects_left_out": dict(left_out.counts),
            "left_out_of": left_out.keys,
            "orientation_unsure": unsure.counts.total(),
            "orientation_unsure_keys": [key for keys in unsure.keys.values() for key in keys],
        }

    def _of_all(self, mine: BadSamples) -> BadSamples:
        """What all ranks counted. Collective."""
        whole = BadSamples()
        for part in self.run.gather(mine.state()):
            whole.merge(part)
        return whole

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights, where an average is kept."""
        if self.ema is not None:
            self.ema.swap()
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.swap()

    # -- checkpoints --------------------------------------------------------------------------

    def leave(self, folder: Path, step: int, export: Callable[[int, str], Export]) -> str:
        """Write the weights as others take them, the averaged ones where an average is kept.

        Args:
            export: from the step and which weights they are (ema, last) to the file.

        Returns:
            The file's name.
        """
        with self.averaged():
            return export(step, self.weights).write(folder)

    @property
    def weights(self) -> str:
        """Which weights are exported: ema or last."""
        return "last" if self.ema is None else "ema"

    def save(
        self, step: int, identity: dict[str, Any], export: Callable[[int, str], Export]
    ) -> None:
        """Write ``checkpoints/step-<step>``. Collective; rank 0 writes.

        Args:
            identity: ``config`` and ``facts`` (its metadata); see :meth:`resume`.
            export: as :meth:`leave` takes it.
        """
        counted = {name: counter.state() for name, counter in self._counters.items()}
        ranks = self.run.gather({"window": self.window.state(), **counted})
        if self.run.is_main:
            tensors = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": None if self.ema is None else self.ema.average,
                "guard": self.guard.state(),
                "ranks": ranks,
            }
            save_checkpoint(
                self.run.dir / "checkpoints",
                step,
                tensors,
                {**identity, "entry": self.run.entry, "machine": _machine()},
                self.run.config.keep,
                lambda folder: self.leave(folder, step, export),
            )
        self.run.saved()

    def resume(self, identity: dict[str, Any], free: set[str]) -> int:
        """Load the newest whole checkpoint of the run folder.

        Args:
            identity: what the checkpoint must agree with.
            free: dotted keys of ``config`` and ``facts`` that may differ.

        Returns:
            Its step; 0 where a run begins.

        Raises:
            UserError: the folder belongs to another configuration, or no checkpoint is whole.
        """
        run = self.run
        checkpoints = list_checkpoints(run.dir / "checkpoints")
        for checkpoint in reversed(checkpoints):
            try:
                meta, stored = read_meta(checkpoint), read_state(checkpoint, run.device)
            except Damaged as error:
                run.say(f"{error}; looking for an earlier one")
                continue
            self._refuse_another(meta, identity, free)
            self._load(stored)
            return meta["step"]
        if checkpoints:
            raise UserError(
                f"none of the {len(checkpoints)} checkpoints in {run.dir}/checkpoints can be "
                "read; move the folder away to start over, or give another --run.dir"
            )
        return 0

    def _refuse_another(self, meta: dict, identity: dict, free: set[str]) -> None:
        run = self.run
        if "legs" in meta.get("data", {}):
            raise UserError(
                f"{run.dir} was begun by an earlier version, whose samples came in another order "
                "(data.shuffle_mb became data.window); finish it with that version, or give "
                "another --run.dir"
            )
        changed = differences(meta["config"], identity["config"], free)
        if run.is_main:  # only rank 0 hashed the teacher
            changed += _other_metadata(meta["facts"], identity["facts"], free)
        if changed:
            raise UserError(
                f"{run.dir} holds a run of another configuration: {'; '.join(changed[:3])}; "
                "give the old values, or another --run.dir"
            )
        if meta["machine"] != _machine():
            before, now = (
                f"torch {info.get('torch')} on {info.get('threads')} thread(s)"
                for info in (meta["machine"], _machine())
            )
            run.say(
                f"saved with {before}, resumed with {now}: losses will not be bit-equal to an "
                "uninterrupted run's"
            )

    def _load(self, stored: dict[str, Any]) -> None:
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.ema is not None:
            self.ema.average = stored["ema"]
        self.guard.load(stored["guard"])
        self.statistics = Statistics(self.model)
        mine = stored["ranks"] if self.run.is_main else []  # of another number of processes
        if len(stored["ranks"]) == self.run.processes:
            mine = [stored["ranks"][self.run.rank]]
        self.window.load([rank["window"] for rank in mine])
        for rank in mine:
            for name in self._counters.keys() & rank.keys():  # older checkpoints have less
                self._counters[name].merge(rank[name])


def _other_metadata(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> list[str]:
    """What a run depends on beside its configuration and has changed, in words."""
    changed = []
    old, new = before.get("data") or {}, now.get("data") or {}
    weights = old.get("weights"), new.get("weights")
    if weights[0] != weights[1]:
        changed.append(f"the weights of data.shards were {weights[0]} and are now {weights[1]}")
    if old.get("fingerprint") != new.get("fingerprint") or (old != new and not changed):
        there, here = (
            f"{info.get('pictures')} images in {info.get('shards')} shards, fingerprint "
            f"{str(info.get('fingerprint'))[:12]}"
            for info in (old, new)
        )
        changed.append(
            f"data.shards hold other samples than those this run was begun with ({there} there; "
            f"{here} here)"
        )
    known = free | {"facts.data", "facts.started_from"}
    for change in differences({"facts": before}, {"facts": now}, known):
        group, _, rest = change.removeprefix("facts.").partition(".")
        changed.append(f"the {group}'s {rest}" if rest else change.removeprefix("facts."))
    return changed


def _machine() -> dict[str, Any]:
    """What bit-equality on a CPU depends on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}
