"""From shards to micro-batches: the readers in the DataLoader's workers, and their gathering.

Both stages stream through here; a stage brings how a sample is decoded and how a batch is made of
samples (:class:`Samples`). Decoding comes after the shuffle, in the workers.
"""

import itertools
import os
import signal
import threading
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sami.core.errors import (
    HANDING_OVER,
    NO_SHARED_MEMORY,
    BadSample,
    UserError,
    machine_error,
    machine_number,
    reader_gone,
    shared_memory_full,
)
from sami.core.order import Layout, Leg, Order
from sami.core.overlap import refuse_overlap
from sami.core.run import Run
from sami.core.shards import RawSample, Shard, Source, expand, open_sources, read_samples

# A reader that meets so many unusable samples in a row gives up: nothing behind them is usable.
MAX_BAD_IN_A_ROW = 1000

Bad = list[tuple[str, str]]  # (reason, key) of samples that could not be used


class Samples(Protocol):
    """What a stage makes of raw samples."""

    fields: tuple[str, ...]  # the members that it reads

    def decode(self, sample: RawSample, epoch: int, stand_in: bool) -> Any:
        """One sample's arrays; ``stand_in``: it fills the slot of a bad one. Raises BadSample."""

    def collate(self, items: list[Any]) -> Any:
        """A batch of decoded samples, with methods ``to(device)`` and ``pin_memory()``."""


@dataclass
class Handed:
    """What a reader hands to the training process.

    ``content`` is a whole batch, decoded samples for a shared micro-batch (``part``), or an error
    that the user can mend: a worker's exception would lose its sentence. ``open`` names the shards
    that the reader is in the middle of.
    """

    content: Any
    worker: int = 0
    bad: Bad = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    part: bool = False

    def pin_memory(self) -> "Handed":
        """Called by the DataLoader; page-locked memory lets the copy to the device overlap."""
        pinnable = hasattr(self.content, "pin_memory")
        return replace(self, content=self.content.pin_memory()) if pinnable else self


class Readers(IterableDataset):
    """The readers of one rank, from a step on; iterated by the DataLoader's workers, without end.

    What a worker hands out is a function of (order, legs, rank, worker, step) alone.
    """

    def __init__(
        self, order: Order, samples: Samples, legs: list[Leg], rank: int, step: int
    ) -> None:
        """``legs``: of the epoch of ``step``, as :meth:`Order.legs` tells."""
        self.order, self.samples, self.rank = order, samples, rank
        leg = legs[-1]
        self.layout, self.epoch = leg.layout, order.epoch(step)
        self.left = order.remaining(legs) if len(legs) > 1 else None
        self.steps = (self.epoch + 1) * order.steps_per_epoch - leg.first_step
        done = (step - leg.first_step) * self.layout.micro_batches_per_step
        alone = self.layout.rounds(self.steps) * self.layout.workers
        self.done = min(done, alone)  # micro-batches of the leg before the first one handed over
        self.made = done - self.done  # shared ones that the training process has had already

    def __iter__(self) -> Iterator[Handed]:
        info = get_worker_info()
        # The DataLoader asks its worker 0 first, whoever's turn it is.
        numbers = range(self.layout.workers) if info is None else [info.id]
        readers = [self._read((self.done + number) % self.layout.workers) for number in numbers]
        for reader in itertools.cycle(readers):  # all of them in turn, where there is no worker
            yield next(reader)

    def _read(self, worker: int) -> Iterator[Handed]:
        """What one worker hands over, without end, or up to an error."""
        bad: Bad = []
        opened: dict[int, tuple[str, Iterator[RawSample]]] = {}
        slots = fill_slots(
            self._hand_out(worker, opened), self.samples.decode, lambda *what: bad.append(what)
        )

        def hand(content: Any, part: bool) -> Handed:
            names = [name for name, _ in opened.values()]
            handed = Handed(content, worker, list(bad), names, part)
            bad.clear()
            return handed

        size, layout = self.layout.micro_batch_size, self.layout
        steps, first = self.steps, len(range(worker, self.done, layout.workers))
        try:
            while True:
                for _ in range(first, layout.rounds(steps)):
                    yield hand(self.samples.collate([next(slots) for _ in range(size)]), False)
                if layout.shared(steps):
                    yield hand([next(slots) for _ in layout.part(steps, worker)], True)
                steps, first = self.order.steps_per_epoch, 0
        except UserError as error:
            yield Handed(error)
        except (OSError, MemoryError) as error:
            refused = machine_error(error)
            if refused is None:
                raise
            yield Handed(refused)

    def _hand_out(
        self, worker: int, opened: dict[int, tuple[str, Iterator[RawSample]]]
    ) -> Iterator[tuple[int, RawSample]]:
        """A reader's samples with their epochs, without end; ``opened`` is kept up to date."""
        epoch, steps, left = self.epoch, self.steps, self.left
        skip = len(range(worker, self.done, self.layout.workers)) * self.layout.micro_batch_size
        while True:
            share = self.layout.share(steps, self.rank, worker)
            places = np.arange(share.start, share.stop)
            read, out = self.order.reading(
                epoch, places if left is None else left[places], self.rank, worker
            )
            wanted = np.zeros(len(read), bool)
            wanted[out[skip:]] = True
            unfinished = Counter(read.visit[wanted].tolist())
            entries = iter(np.flatnonzero(wanted))
            waiting: dict[int, RawSample] = {}
            for number in out[skip:]:
                while number not in waiting:
                    entry = next(entries)
                    visit = int(read.visit[entry])
                    if visit not in opened:
                        shard = self.order.shards[read.shard[entry]]
                        rows = read.row[wanted & (read.visit == visit)]
                        source = read_samples(shard, rows, self.order.fields)
                        opened[visit] = (shard.name, source)
                    waiting[entry] = next(opened[visit][1])
                visit = int(read.visit[number])
                unfinished[visit] -= 1
                if not unfinished[visit]:
                    del opened[visit]
                yield epoch, waiting.pop(number)
            epoch, steps, left, skip = epoch + 1, self.order.steps_per_epoch, None, 0


class Batches:
    """An iterator over one rank's (micro-batch, bad samples met), from a step on, without end."""

    def __init__(
        self,
        order: Order,
        samples: Samples,
        legs: list[Leg],
        *,
        rank: int,
        step: int,
        workers: int,
        device: torch.device,
    ) -> None:
        """``workers``: processes that decode; 0 decodes in this one."""
        self.order, self.samples, self.rank, self.device = order, samples, rank, device
        self.readers = Readers(order, samples, legs, rank, step)
        self.legs, self.layout = legs, legs[-1].layout
        self.open: dict[int, list[str]] = {}
        self._loader = make_loader(self.readers, workers, device)
        self._source: Iterator[Handed] | None = None
        self._parts: list[Handed] = []
        self._ready: deque[tuple[Any, Bad]] = deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Any, Bad]:
        """
        Raises:
            UserError: the data cannot be used, or a worker was killed.
        """
        while not self._ready:
            handed = self._next()
            self.open[handed.worker] = handed.open
            if not handed.part:
                self._ready.append((handed.content, handed.bad))
                continue
            self._parts.append(handed)
            if len(self._parts) == self.layout.workers:
                self._share()
        return self._ready.popleft()

    def position(self, step: int) -> dict[str, Any]:
        """Where this rank's readers stand after ``step``, as plain data, for a checkpoint."""
        legs = self.order.legs(step, self.legs, self.layout)
        epoch, leg = self.order.epoch(step), legs[-1]
        steps = (epoch + 1) * self.order.steps_per_epoch - leg.first_step
        readers = [
            {
                "rank": self.rank,
                "worker": worker,
                "epoch": epoch,
                "position": self.layout.handed_out(steps, step - leg.first_step, worker),
                "of": len(self.layout.share(steps, self.rank, worker)),
                "open": self.open.get(worker, []),
            }
            for worker in range(self.layout.workers)
        ]
        return {"legs": [leg.to_dict() for leg in legs], "readers": readers}

    def _share(self) -> None:
        """Put the shared micro-batches together of the workers' parts."""
        size, made = self.layout.micro_batch_size, self.readers.made
        items = [item for part in self._parts for item in part.content]
        # Those before ``made`` are in the checkpoint, and what was bad about them too.
        bad = [] if made else [what for part in self._parts for what in part.bad]
        for start in range(made * size, len(items), size):
            batch = self.samples.collate(items[start : start + size])
            self._ready.append((batch.pin_memory() if self.device.type == "cuda" else batch, bad))
            bad = []
        self._parts, self.readers.made = [], 0

    def _next(self) -> Handed:
        if self._source is None:
            self._source = iter(self._loader)
        try:
            handed = next(self._source)
        except RuntimeError as error:
            gone = reader_gone(error)
            if gone is None:
                raise
            raise gone from error
        if isinstance(handed.content, UserError):
            raise handed.content
        return handed


def fill_slots(
    samples: Iterator[tuple[int, RawSample]],
    decode: Callable[[RawSample, int, bool], Any],
    report: Callable[[str, str], None],
) -> Iterator[Any]:
    """Decoded samples, one per slot, whatever is bad.

    The slot of a bad sample is filled by the next good one of the same reader, decoded as a
    stand-in; that one still comes in its own slot too. So positions do not shift, and what fills
    a slot depends on the position alone.

    Args:
        samples: (epoch, sample), endless.
        decode: see :class:`Samples`.
        report: called with (reason, key) for each bad sample, in its own slot.

    Raises:
        UserError: MAX_BAD_IN_A_ROW samples in a row are bad.
    """
    ahead: deque[tuple[int, RawSample]] = deque()
    while True:
        epoch, sample = ahead.popleft() if ahead else next(samples)
        decoded = None
        try:
            decoded = decode(sample, epoch, False)
        except BadSample as error:
            first = str(error)
            report(first, sample.key)
        distance = 0
        while decoded is None:
            if distance == MAX_BAD_IN_A_ROW:
                raise UserError(
                    f"{MAX_BAD_IN_A_ROW} samples in a row are unusable, the first is {sample.key} "
                    f"({first}); look at data.shards: does it hold what this run reads?"
                )
            if distance == len(ahead):
                ahead.append(next(samples))
            try:
                decoded = decode(ahead[distance][1], ahead[distance][0], True)
            except BadSample:
                distance += 1
        yield decoded


def open_data(data: Any, run: Run) -> tuple[list[Source], list[Shard]]:
    """What is trained on and what is held out; the ranks share the indexing.

    Args:
        data: a configuration with ``shards``, ``val_shards`` and ``allow_val_in_train``.

    Raises:
        UserError: see :func:`expand` and :func:`open_sources`; or what is held out is trained on.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if data.workers > cores:
        run.say(
            f"data.workers {data.workers} are more than the {cores} core(s) to be had here: they "
            f"wait for each other; --data.workers {cores} is as fast"
        )
    folder, part = run.dir / "index", (run.rank, run.processes)
    opened: list[list[Source]] = []
    for key in ("shards", "val_shards"):
        patterns = getattr(data, key)
        if not patterns and key == "val_shards":
            opened.append([])
            continue
        groups = expand(patterns, f"data.{key}")
        if run.processes > 1:
            open_sources(groups, folder, run.say, part)
            run.wait_for_all()
        opened.append(open_sources(groups, folder, run.say))
    train, held_out = ([one for source in found for one in source.shards] for found in opened)
    if run.is_main and held_out and not data.allow_val_in_train:
        keys = ("data.shards", "data.val_shards")
        refuse_overlap(train, held_out, keys, "--data.allow_val_in_train true")
    return opened[0], held_out


def take_up(run: Run, order: Order, layout: Layout, step: int, before: list[Leg]) -> list[Leg]:
    """The legs of the epoch of ``step`` with the present layout; says what is unusual about it.

    Args:
        before: the legs in the checkpoint.
    """
    legs = order.legs(step, before, layout)
    if len(legs) > 1 and legs[-1].first_step == step:
        old = legs[-2].layout
        run.say(
            f"{old.processes} process(es) x {old.workers} worker(s) x {old.micro_batch_size} "
            f"became {layout.processes} x {layout.workers} x {layout.micro_batch_size}: what is "
            "left of this epoch is dealt out anew, in another order; no sample comes twice"
        )
    readers = layout.processes * layout.workers
    if len(order.shards) < readers:
        run.say(
            f"{len(order.shards)} shard(s) for {readers} readers: several read in one shard, each "
            "its own part (one that is compressed or behind a URL is read from its start by each), "
            "and shuffle within that part; more and smaller shards mix better"
        )
    return legs


def make_loader(dataset: IterableDataset, workers: int, device: torch.device) -> DataLoader:
    """A loader over ready batches. Never prepare it: Accelerate would read all on rank 0.

    Torch's own warning of too many workers comes twice for each loader; :func:`open_data` says it.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # or it would draw from the one that a step has seeded
        pin_memory=device.type == "cuda",
    )


def _start_worker(worker: int) -> None:
    """What a process that reads data does first."""
    Queue._on_queue_feeder_error = staticmethod(_leave_for_it)
    _heed_the_parent_alone(worker)


def _leave_for_it(error: Exception, item: Any) -> None:
    """End a worker that cannot hand over a batch: else it is dropped, and waited for in vain."""
    refused = machine_error(error)
    if refused is None:
        traceback.print_exception(error)
    elif str(refused) == shared_memory_full():
        os._exit(NO_SHARED_MEMORY)
    os._exit(HANDING_OVER + (machine_number(error) or 0))


def _heed_the_parent_alone(worker: int) -> None:
    """Outlive a signal that asks the whole process group to stop, as SLURM and Ctrl-C send it.

    The training process answers it with a checkpoint, and goes on reading until all ranks agree.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who has sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _as_it_is(handed: Any) -> Any:
    return handed
