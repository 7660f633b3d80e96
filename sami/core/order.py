"""Which sample comes when: a pure function of (seed, epoch) and of how the readers are arranged.

Nothing here reads a sample; the position in the data follows from the step, and resuming seeks.

1. The shards of an epoch are permuted, laid end to end and rotated; sources with weights are then
   interleaved in proportion. The first ``steps_per_epoch * batch_size`` places are the epoch; what
   is left out, less than one batch, is another part each epoch.
2. The places are dealt out in contiguous ranges to the *readers*, one per rank and worker, equal up
   to one sample.
3. Each reader shuffles its range through a buffer of raw samples that is bounded in bytes. The
   buffer is simulated on integers, so that what had been handed out by a step is known exactly.

Where processes or workers change within an epoch, a new *leg* begins: what had not been handed out
is dealt out anew.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sami.core.shards import Shard, Source


@dataclass(frozen=True)
class Layout:
    """How steps are dealt out to readers; ``workers`` per process, at least 1.

    A rank's micro-batches fall to its workers in turn, the order in which PyTorch's DataLoader asks
    them. The last few of a leg, fewer than there are workers, are made of equal parts of all.
    """

    batch_size: int
    micro_batch_size: int
    processes: int
    workers: int

    @property
    def micro_batches_per_step(self) -> int:
        """Of one rank."""
        return self.batch_size // (self.processes * self.micro_batch_size)

    def rounds(self, steps: int) -> int:
        """Micro-batches that each worker makes alone in a leg of ``steps``."""
        return steps * self.micro_batches_per_step // self.workers

    def shared(self, steps: int) -> int:
        """Micro-batches of a rank at the end of such a leg that its workers make together."""
        return steps * self.micro_batches_per_step % self.workers

    def part(self, steps: int, worker: int) -> range:
        """A worker's part of the shared micro-batches' samples."""
        return deal(range(self.shared(steps) * self.micro_batch_size), worker, self.workers)

    def share(self, steps: int, rank: int, worker: int) -> range:
        """A reader's range of a leg's ``steps * batch_size`` places."""
        alone = self.rounds(steps) * self.micro_batch_size
        start = rank * (steps * self.batch_size // self.processes)
        start += worker * alone + self.part(steps, worker).start
        return range(start, start + alone + len(self.part(steps, worker)))

    def handed_out(self, steps: int, done: int, worker: int) -> int:
        """Samples of a reader's share that are in the first ``done`` steps of its leg."""
        micro_batches, turns = done * self.micro_batches_per_step, self.rounds(steps) * self.workers
        if micro_batches < turns:
            return len(range(worker, micro_batches, self.workers)) * self.micro_batch_size
        part = self.part(steps, worker)
        of_part = (micro_batches - turns) * self.micro_batch_size - part.start
        return self.rounds(steps) * self.micro_batch_size + min(max(of_part, 0), len(part))


@dataclass(frozen=True)
class Leg:
    """A stretch of one epoch, from ``first_step`` on, with one layout."""

    first_step: int
    layout: Layout

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Leg":
        return Leg(values["first_step"], Layout(**values["layout"]))


@dataclass(frozen=True)
class Places:
    """Places of an epoch, in order: which sample stands at each.

    ``visit`` [n] numbers the stretches of one shard, ascending within a source; ``shard`` [n] and
    ``row`` [n] name the sample.
    """

    visit: np.ndarray
    shard: np.ndarray
    row: np.ndarray

    def __getitem__(self, index: Any) -> "Places":
        return Places(self.visit[index], self.shard[index], self.row[index])

    def __len__(self) -> int:
        return len(self.row)


class Order:
    """The order of the samples of some sources in every epoch."""

    def __init__(
        self,
        sources: list[Source],
        *,
        fields: tuple[str, ...],
        batch_size: int,
        seed: int,
        buffer_bytes: int,
        epoch_samples: int | None = None,
    ) -> None:
        """
        Args:
            sources: with weights, an epoch is as long as no sample of any source comes twice.
            fields: members that are read, whose bytes the buffer holds.
            batch_size: global.
            buffer_bytes: bound of one reader's shuffle buffer.
            epoch_samples: a shorter epoch.
        """
        self.sources, self.fields, self.seed = sources, fields, seed
        self.batch_size, self.buffer_bytes = batch_size, buffer_bytes
        self.shards: list[Shard] = [shard for source in sources for shard in source.shards]
        self.samples = min(int(source.count / (source.weight or 1.0)) for source in sources)
        self.samples = min(self.samples, epoch_samples or self.samples)
        self.steps_per_epoch = self.samples // batch_size
        self.epoch_places = self.steps_per_epoch * batch_size

    # -- where a step stands ------------------------------------------------------------------

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def legs(self, step: int, before: Sequence[Leg], layout: Layout) -> list[Leg]:
        """The legs of the epoch of ``step`` when training goes on there with ``layout``.

        Args:
            before: the legs of a checkpoint at ``step``; none: the epoch began with ``layout``.
        """
        start = self.epoch(step) * self.steps_per_epoch
        legs = [leg for leg in before or [Leg(start, layout)] if leg.first_step < step]
        inner = [leg for leg in legs if leg.first_step > start]
        first = [Leg(start, leg.layout) for leg in legs if leg.first_step <= start][-1:]
        legs = first + inner if start < step else []
        return legs if legs and legs[-1].layout == layout else [*legs, Leg(step, layout)]

    def remaining(self, legs: list[Leg]) -> np.ndarray:
        """Places of the epoch, ascending, that are left for the last of its legs."""
        epoch = self.epoch(legs[0].first_step)
        end = (epoch + 1) * self.steps_per_epoch
        left = np.arange(self.epoch_places)
        for leg, following in zip(legs, legs[1:], strict=False):
            steps, done = end - leg.first_step, following.first_step - leg.first_step
            kept = []
            for rank in range(leg.layout.processes):
                for worker in range(leg.layout.workers):
                    share = left[_slice(leg.layout.share(steps, rank, worker))]
                    out = self.reading(epoch, share, rank, worker)[1]
                    kept.append(share[out[leg.layout.handed_out(steps, done, worker) :]])
            left = np.sort(np.concatenate(kept))
        return left

    # -- what a reader reads ------------------------------------------------------------------

    def reading(
        self, epoch: int, places: np.ndarray, rank: int, worker: int
    ) -> tuple[Places, np.ndarray]:
        """What a reader reads, in order, and the order [n] in which it hands that out."""
        read = self.places(epoch, places)
        sizes = np.zeros(len(read), np.int64)
        by_shard = np.argsort(read.shard, kind="stable")
        for group in np.split(by_shard, np.flatnonzero(np.diff(read.shard[by_shard])) + 1):
            if len(group):
                members = self.shards[read.shard[group[0]]].members()
                sizes[group] = members.bytes(self.fields)[read.row[group]]
        rng = sample_rng(self.seed, epoch, f"shuffle/{rank}/{worker}")
        return read, shuffled(sizes, self.buffer_bytes, rng)

    def places(self, epoch: int, places: np.ndarray) -> Places:
        """Which samples stand at some places (numbers, ascending) of an epoch."""
        if len(self.sources) == 1:
            return self._of_source(epoch, 0, places)
        parts = apportion([source.weight for source in self.sources], self.epoch_places)
        source = np.repeat(np.arange(len(parts)), parts)
        ordinal = np.concatenate([np.arange(part) for part in parts])
        order = np.argsort((ordinal + 0.5) / np.repeat(parts, parts), kind="stable")
        source, ordinal = source[order][places], ordinal[order][places]
        result = Places(*np.empty((3, len(places)), np.int64))
        for number in range(len(self.sources)):
            mine = source == number
            found = self._of_source(epoch, number, ordinal[mine])
            for column, values in zip(vars(result).values(), vars(found).values(), strict=True):
                column[mine] = values
        return result

    def _of_source(self, epoch: int, number: int, ordinals: np.ndarray) -> Places:
        """The samples of one source in its own order."""
        source, before = self.sources[number], self.sources[:number]
        first = sum(len(other.shards) for other in before)
        order = sample_rng(self.seed, epoch, f"shards/{number}").permutation(len(source.shards))
        counts = np.array([source.shards[i].count for i in order])
        rotation = int(sample_rng(self.seed, epoch, f"rotation/{number}").integers(source.count))
        starts = np.concatenate([[0], np.cumsum(np.concatenate([counts, counts]))])
        positions = ordinals + rotation
        visit = np.searchsorted(starts, positions, side="right") - 1
        return Places(
            visit + 2 * first, order[visit % len(order)] + first, positions - starts[visit]
        )


def shuffled(sizes: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a shuffle buffer of at most ``limit`` bytes hands out what it is fed.

    Args:
        sizes: [n] bytes of the samples in the order in which they are read.
        limit: a sample enters while the bytes in the buffer stay under it; one is always in it.

    Returns:
        [n] the samples' numbers in the order handed out.
    """
    draws, weights = rng.random(len(sizes)).tolist(), sizes.tolist()
    buffer: list[int] = []
    held = entered = 0
    order = []
    for draw in draws:
        while entered < len(weights) and (not buffer or held + weights[entered] <= limit):
            buffer.append(entered)
            held += weights[entered]
            entered += 1
        pick = int(draw * len(buffer))
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        order.append(buffer.pop())
        held -= weights[order[-1]]
    return np.array(order, np.int64)


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of rank, worker and position."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def deal(positions: range, number: int, of: int) -> range:
    """The ``number``-th of ``of`` contiguous parts, equal up to one."""
    return positions[len(positions) * number // of : len(positions) * (number + 1) // of]


def apportion(weights: list[float], total: int) -> list[int]:
    """``total`` in whole parts as near to the weights (of sum 1) as can be: largest remainder."""
    exact = np.array(weights) * total
    parts = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]
    parts[largest] += 1
    return parts.tolist()


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
