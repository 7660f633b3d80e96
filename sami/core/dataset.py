"""From shards to batches: what is trained on, and what is held out, under torch's DataLoader.

:class:`Training` is a map-style dataset over the samples of a run, numbered from its beginning:
sample index i is position i % P of epoch i // P, where P is an epoch's positions, and the batch of
step s holds the indices s * batch_size up to (s + 1) * batch_size. :class:`MicroBatches` gives each
rank its parts of the batches, from a step on, without end. :class:`Validation` goes through samples
that are held out, in their own order. A stage brings how a sample is decoded and how a batch is
made of samples (:class:`Transform`).
"""

import contextlib
import itertools
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.queues import Queue
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sami.core.config import PATH, require
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
from sami.core.index import Shard
from sami.core.order import Order
from sami.core.progress import follow
from sami.core.reading import RawSample, Reader, locate
from sami.core.run import Run

MAX_BAD_IN_A_ROW = 1000  # samples tried for one position: nothing that is left will be usable
NEAR = 16  # of these come from the position's own window, which is open; then from the whole epoch

Bad = list[tuple[str, str]]  # (reason, key) of samples that could not be used


@dataclass
class ShardsConfig:
    """Shards and how they are read.

    Attributes:
        shards: one pattern of tar shards, several, or several with the share of the samples that
            comes from each ({"a/*.tar": 3, "b/*.tar": 1}); braces, globs, URLs.
        val_shards: one pattern or several for what is held out; empty for none.
        allow_val_in_train: measure on images that are trained on, too, instead of refusing it.
        workers: processes per rank that decode; 0 decodes in the training process.
        epoch_samples: samples of one epoch if it shall be shorter than the shards; null for all.
        max_bad_fraction: stop once more than this share of the samples was bad; exactly so at the
            end of an epoch, within one with an allowance for chance.
        window: shards whose samples are shuffled together. 64 is what a process holds open, and
            local shards are read by seeking, so that it costs nothing; of shards that are fetched
            two windows have to fit into cache_gb.
        cache_dir: where shards are kept that cannot be sought in (pipe:, compressed tars); empty
            for a folder of this user among the temporary files (TMPDIR).
        cache_gb: GB that they may take there; what was opened longest ago goes first.
    """

    shards: str | list[str] | dict[str, float] = field(default="", metadata=PATH)
    val_shards: str | list[str] = field(default="", metadata=PATH)
    allow_val_in_train: bool = False
    workers: int = 8
    epoch_samples: int | None = None
    max_bad_fraction: float = 0.1
    window: int = 64
    cache_dir: str = field(default="", metadata=PATH)
    cache_gb: float = 50.0

    def check(self) -> None:
        require(self.workers >= 0, f"data.workers {self.workers} must be 0 or more")
        require(self.window > 0, f"data.window {self.window} must be positive, such as 64")
        require(self.cache_gb > 0, f"data.cache_gb {self.cache_gb} must be positive, such as 50")
        require(
            self.epoch_samples is None or self.epoch_samples > 0,
            f"data.epoch_samples {self.epoch_samples} must be positive, or null for all",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction {self.max_bad_fraction} must be within 0..1, such as 0.1",
        )


class TensorBatch:
    """A batch, a dataclass, whose tensors are moved together, and those of batches within it."""

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with ``change`` done to each tensor."""
        changed = {
            name: change(value) if isinstance(value, torch.Tensor) else value.map(change)
            for name, value in vars(self).items()
            if isinstance(value, (torch.Tensor, TensorBatch))
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> Self:
        """The tensors on a device, without waiting for the copy."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """In page-locked memory, which lets the copy to the device overlap."""
        return self.map(torch.Tensor.pin_memory)


class Transform(Protocol):
    """What a stage makes of raw samples."""

    fields: tuple[str, ...]  # the members that it reads

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> Any:
        """One sample's arrays; ``replacement``: of a bad one. Raises BadSample."""

    def collate(self, items: list[Any]) -> TensorBatch:
        """A batch of decoded samples."""


class Training(Dataset):
    """The samples of a run by their index; what is read is a function of (order, index) alone."""

    def __init__(self, order: Order, transform: Transform) -> None:
        self.order, self.transform = order, transform
        together = order.window * len(order.sources)
        self.reader = Reader(order.shards, transform.fields, together)

    def __getitems__(self, indices: range) -> tuple[Any, Bad]:
        """A batch of samples of one epoch, and those that had to be replaced, each in its place.

        Raises:
            UserError: nothing takes the place of a bad sample.
        """
        epoch, first = divmod(indices.start, self.order.epoch_positions)
        positions = np.arange(first, first + len(indices))
        items: list[Any] = [None] * len(indices)
        bad: dict[int, tuple[str, str]] = {}
        for slot, sample in self.reader.read(*self.order.rows(epoch, positions)):
            try:
                items[slot] = self.transform.decode(sample, epoch, False)
            except BadSample as error:
                bad[slot] = str(error), sample.key
        for slot in sorted(bad):
            items[slot] = self._replacement(epoch, first + slot, *bad[slot])
        return self.transform.collate(items), [bad[slot] for slot in sorted(bad)]

    def _replacement(self, epoch: int, position: int, reason: str, key: str) -> Any:
        """A good sample for a bad one's position, decoded as such: in another crop."""
        candidates = self.order.candidates(epoch, position, NEAR)
        for shard, row in itertools.islice(candidates, MAX_BAD_IN_A_ROW - 1):
            ((_, sample),) = self.reader.read(np.array([shard]), np.array([row]))
            with contextlib.suppress(BadSample):
                return self.transform.decode(sample, epoch, True)
        raise UserError(
            f"{MAX_BAD_IN_A_ROW} samples in a row are unusable, the first is {key} ({reason}); "
            "look at data.shards: does it hold what this run reads?"
        )


@dataclass(eq=False)
class MicroBatches(Sampler):
    """The sample indices of one rank's micro-batches, from a step on, without end.

    A rank's part of a batch is contiguous, and so is each micro-batch.
    """

    batch_size: int
    micro_batch_size: int
    rank: int
    processes: int
    step: int

    def __iter__(self) -> Iterator[range]:
        share = self.batch_size // self.processes
        for step in itertools.count(self.step):
            start = step * self.batch_size + self.rank * share
            for first in range(start, start + share, self.micro_batch_size):
                yield range(first, first + self.micro_batch_size)


class SampleSource(Protocol):
    """Where encoded samples come from, in fixed order."""

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> Iterator[RawSample]:
        """Some of them by number; the numbers ascend."""


class ShardSource:
    """Some samples of shards that are laid end to end."""

    def __init__(
        self, shards: list[Shard], fields: tuple[str, ...], numbers: Sequence[int] | np.ndarray
    ) -> None:
        """``numbers``: of the samples, ascending."""
        self.shards, self.numbers = shards, numbers
        self.reader = Reader(shards, fields)

    @classmethod
    def first(
        cls, shards: list[Shard], fields: tuple[str, ...], samples: int | None = None
    ) -> Self:
        """The first ``samples``, or all."""
        total = sum(shard.count for shard in shards)
        return cls(shards, fields, range(total if samples is None else min(samples, total)))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, numbers: Sequence[int]) -> Iterator[RawSample]:
        picked = np.array([self.numbers[number] for number in numbers], np.int64)
        for _, sample in self.reader.read(*locate(self.shards, picked)):
            yield sample


@dataclass(eq=False)
class Validation(Dataset):
    """Batches of held-out samples in fixed order; bad samples are left out of theirs.

    What is in a batch depends neither on processes nor on workers.
    """

    source: SampleSource
    decode: Callable[[RawSample], Any]
    collate: Callable[[list[Any]], Any]

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Any, Bad]:
        """A batch, or None where no sample can be used, and those that cannot."""
        items: list[Any] = []
        bad: Bad = []
        for sample in self.source.read(numbers):
            try:
                items.append(self.decode(sample))
            except BadSample as error:
                bad.append((str(error), sample.key))
        return self.collate(items) if items else None, bad


def load_training(
    order: Order, transform: Transform, run: Run, micro_batch_size: int, step: int, workers: int
) -> Iterator[tuple[Any, Bad]]:
    """One rank's micro-batches with the bad samples met, from a step on, without end.

    Args:
        workers: processes that decode; 0 decodes in this one.

    Raises:
        UserError: the data cannot be used, or a worker was killed.
    """
    parts = MicroBatches(order.batch_size, micro_batch_size, run.rank, run.processes, step)
    parts = fetching_ahead(order, parts)
    return load(Training(order, transform), parts, workers, run.device)


def fetching_ahead(order: Order, parts: Iterable[range]) -> Iterator[range]:
    """The parts as they are; what their windows and the next ones stream is fetched meanwhile."""
    wanted: list[int] = []
    streamed = {number for number, shard in enumerate(order.shards) if shard.streamed}
    for part in parts:
        before, wanted = wanted, order.shards_ahead(part.start) if streamed else []
        if wanted != before:
            ahead = [order.shards[number] for number in wanted if number in streamed]
            for shard in ahead[:1]:
                shard.cache.prefetch([shard.url for shard in ahead])
        yield part


def load_validation(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    device: torch.device,
    *,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], None] | None = None,
    what: str = "held out",
) -> Iterator[Any]:
    """What a dataset with a ``source`` makes of it, batch by batch, in order.

    Args:
        share: (rank, processes); each rank has a contiguous part of the batches, which are the same
            for any number of processes.
        say: called with how far it is, if it takes long; ``what`` names it.
    """
    count, (rank, processes) = len(dataset.source), share
    parts = [range(at, min(at + batch_size, count)) for at in range(0, count, batch_size)]
    parts = parts[len(parts) * rank // processes : len(parts) * (rank + 1) // processes]
    batches = zip(load(dataset, parts, workers, device), parts, strict=True)
    total = sum(map(len, parts))
    for batch, _ in follow(batches, what, total, say, lambda pair: len(pair[1])):
        yield batch


def load(
    dataset: Dataset, parts: Iterable[Sequence[int]], workers: int, device: torch.device
) -> Iterator[Any]:
    """What a dataset makes of some parts, in order. Never prepare it: Accelerate would deal anew.

    Torch's own warning of too many workers comes twice for each loader; :func:`open_data` says it.

    Raises:
        UserError: what a worker raised, with its sentence; or a worker was killed.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    loader = DataLoader(
        HandsOver(dataset),
        batch_sampler=parts,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_start_worker if workers else None,
        generator=torch.Generator(),  # or it would draw from the one that a step has seeded
        pin_memory=device.type == "cuda",
    )
    source = iter(loader)
    while True:
        try:
            content = next(source)
        except StopIteration:
            return
        except RuntimeError as error:
            gone = reader_gone(error)
            if gone is None:
                raise
            raise gone from error
        if isinstance(content, UserError):
            raise content
        yield content


@dataclass(eq=False)
class HandsOver(Dataset):
    """Hands over what the user can mend as it was raised; torch would make a traceback of it."""

    dataset: Dataset

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        try:
            return self.dataset.__getitems__(numbers)
        except UserError as error:
            return error
        except (OSError, MemoryError) as error:
            refused = machine_error(error)
            if refused is None:
                raise
            return refused


def _leave_for_it(error: Exception, item: Any) -> None:
    """End a worker that cannot hand over a batch: else it is dropped, and waited for in vain."""
    refused = machine_error(error)
    if refused is None:
        traceback.print_exception(error)
    elif str(refused) == shared_memory_full():
        os._exit(NO_SHARED_MEMORY)
    os._exit(HANDING_OVER + (machine_number(error) or 0))


def _start_worker(worker: int) -> None:
    """What a process that reads data does first: from now on it heeds its parent alone.

    It outlives a signal that asks the whole process group to stop, as SLURM and Ctrl-C send it: the
    training process answers with a checkpoint, and goes on reading until all ranks agree.
    """
    Queue._on_queue_feeder_error = staticmethod(_leave_for_it)
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


def _as_it_is(content: Any) -> Any:
    return content
