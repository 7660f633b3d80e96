"""Which sample comes when: a pure function of (seed, epoch), whatever reads it.

The shards of an epoch are permuted and taken in windows of at most ``window`` shards; the samples
of a window are permuted among themselves. Sources with weights are interleaved in proportion. The
batch of step s holds the positions s * batch_size up to (s + 1) * batch_size of its epoch, always:
processes and workers only take parts of it. So a run sees the same batches on any machine, and
nothing about the order is stored. What does not fill a batch, another part in each epoch, is left
out.

Only one permutation of the shards and a few of windows are ever held: SA-1B has 11 million samples.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sami.core.index import Shard, Source

# Permuted windows that are held beside those that are read, for replacements from anywhere: one of
# 64 of SA-1B's shards takes 6 MB in each process that reads.
HELD_WINDOWS = 2


@dataclass(frozen=True)
class Windows:
    """The windows of one source in one epoch.

    ``shards`` [S] are permuted; window k is ``shards[cuts[k] : cuts[k + 1]]``, and its samples
    stand at ``starts[k]`` up to ``starts[k + 1]`` of the source's order.
    """

    shards: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray

    def of(self, ordinals: np.ndarray) -> np.ndarray:
        """The window [n] of each place in the source's order."""
        return np.searchsorted(self.starts, ordinals, side="right") - 1


class Order:
    """The order of the samples of some sources in every epoch."""

    def __init__(
        self,
        sources: list[Source],
        *,
        batch_size: int,
        seed: int,
        window: int,
        epoch_samples: int | None = None,
    ) -> None:
        """
        Args:
            sources: with weights, an epoch is as long as no sample of any source comes twice.
            batch_size: global.
            window: shards that are shuffled together, of each source.
            epoch_samples: a shorter epoch.
        """
        self.sources, self.seed = sources, seed
        self.batch_size, self.window = batch_size, window
        self.shards: list[Shard] = [shard for source in sources for shard in source.shards]
        fitting = (source.count / (source.weight or 1.0) for source in sources)
        # In floats, 35 samples for a share of 7/12 are a hair less than 60 in all.
        self.samples = int(min(fitting) * (1 + 1e-12))
        self.samples = min(self.samples, epoch_samples or self.samples)
        self.steps_per_epoch = self.samples // batch_size
        self._counts = np.array([shard.count for shard in self.shards], np.int64)
        self._first = np.cumsum([0, *(len(source.shards) for source in sources)])
        self._open_caches()

    def __getstate__(self) -> dict:
        """Without what can be made again, for a process that is not forked."""
        return {key: value for key, value in vars(self).items() if not hasattr(value, "cache_info")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open_caches()

    def _open_caches(self) -> None:
        self._windows = lru_cache(2 * len(self.sources))(self._windows_of)
        self._permuted = lru_cache(HELD_WINDOWS + 2 * len(self.sources))(self._permutation_of)

    @property
    def epoch_positions(self) -> int:
        """Positions of an epoch: its samples as far as they fill batches."""
        return self.steps_per_epoch * self.batch_size

    def rows(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which samples stand at some positions [n] of an epoch: shard [n] and row [n]."""
        positions = np.asarray(positions, np.int64)
        source, ordinal = self._interleaved(positions)
        shard, row = np.empty((2, len(positions)), np.int64)
        for number in np.unique(source):
            mine = source == number
            shard[mine], row[mine] = self._of_source(epoch, int(number), ordinal[mine])
        return shard, row

    def candidates(self, epoch: int, position: int, near: int) -> Iterator[tuple[int, int]]:
        """Samples (shard, row) that may take the place of a bad one at a position, without end.

        The first ``near`` are drawn from its own window, whose shards are open; the others from the
        whole epoch, in case all of the window is bad.
        """
        rng = sample_rng(self.seed, epoch, f"replacement/{position}")
        source, ordinal = (int(one[0]) for one in self._interleaved(np.array([position])))
        windows = self._windows(epoch, source)
        window = int(windows.of(np.array([ordinal]))[0])
        low, high = windows.starts[window : window + 2]
        for _ in range(near):
            shard, row = self._of_source(epoch, source, rng.integers(low, high, 1))
            yield int(shard[0]), int(row[0])
        while True:
            shard, row = self.rows(epoch, rng.integers(0, self.epoch_positions, 1))
            yield int(shard[0]), int(row[0])

    def shards_ahead(self, index: int) -> list[int]:
        """The shards of the windows that a sample index lies in, and of those that are read next.

        What an epoch leaves out, as it is short or a batch does not fill, is not among them.
        """
        epoch, position = divmod(index, self.epoch_positions)
        parts = apportion([source.weight or 1.0 for source in self.sources], self.epoch_positions)
        found: list[list[int]] = [[], []]
        for number, (part, at) in enumerate(zip(parts, passed(parts, position), strict=True)):
            if not part:
                continue
            of, at = (epoch, at) if at < part else (epoch + 1, 0)
            for shards in found:
                windows = self._windows(of, number)
                window = int(windows.of(np.array([at]))[0])
                shards += windows.shards[windows.cuts[window] : windows.cuts[window + 1]].tolist()
                at = int(windows.starts[window + 1])
                if at >= part:
                    of, at = of + 1, 0
        return list(dict.fromkeys(found[0] + found[1]))

    # -- of one source ------------------------------------------------------------------------

    def _interleaved(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [n] at each position, and the place [n] in that source's order."""
        if len(self.sources) == 1 or not len(positions):
            return np.zeros_like(positions), positions
        parts = apportion([source.weight for source in self.sources], self.epoch_positions)
        return interleaved(parts, positions)

    def _of_source(
        self, epoch: int, number: int, ordinals: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shard [n] and row [n] at places [n] of a source's own order."""
        windows = self._windows(epoch, number)
        window = windows.of(ordinals)
        shard, row = np.empty((2, len(ordinals)), np.int64)
        for k in np.unique(window):
            mine = window == k
            shards = windows.shards[windows.cuts[k] : windows.cuts[k + 1]]
            ends = np.cumsum(self._counts[shards])
            flat = self._permuted(epoch, number, int(k))[ordinals[mine] - windows.starts[k]]
            which = np.searchsorted(ends, flat, side="right")
            shard[mine] = shards[which]
            row[mine] = flat - (ends - self._counts[shards])[which]
        return shard, row

    def _windows_of(self, epoch: int, number: int) -> Windows:
        first, count = self._first[number], len(self.sources[number].shards)
        shards = sample_rng(self.seed, epoch, f"shards/{number}").permutation(count) + first
        of = -(-count // self.window)
        cuts = np.array([count * k // of for k in range(of + 1)])
        counted = np.concatenate([[0], np.cumsum(self._counts[shards])])
        return Windows(shards, cuts, counted[cuts])

    def _permutation_of(self, epoch: int, number: int, window: int) -> np.ndarray:
        starts = self._windows(epoch, number).starts
        rng = sample_rng(self.seed, epoch, f"window/{number}/{window}")
        return rng.permutation(starts[window + 1] - starts[window])


def interleaved(parts: list[int], positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which source stands where if sources are mixed as evenly as can be.

    Sample o of a source with n samples stands at (o + 1/2) / n of the way; of two at one place the
    earlier source's comes first. Only the stretch around the positions is ever laid out.

    Args:
        parts: samples n of each source.
        positions: [n] of all sources' samples, neither empty nor beyond them.

    Returns:
        Source [n], and which of its samples [n].
    """
    before, source, ordinal = _stretch(parts, int(positions.min()), int(positions.max()) + 1)
    picked = positions - sum(before)
    return source[picked], ordinal[picked]


def passed(parts: list[int], position: int) -> list[int]:
    """How many samples of each source stand before a position; see :func:`interleaved`."""
    before, source, _ = _stretch(parts, position, position)
    here = np.bincount(source[: position - sum(before)], minlength=len(parts))
    return (np.array(before) + here).tolist()


def _stretch(parts: list[int], low: int, high: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The order around positions low to high: samples of each source before it, and then its
    sources and which of their samples."""
    # So many sources are at most so many positions away from their proportion.
    low, high = max(low - len(parts), 0), min(high + len(parts), sum(parts))
    bounds = [[_before(place, n, sum(parts)) for n in parts] for place in (low, high)]
    source = np.repeat(np.arange(len(parts)), np.subtract(*bounds[::-1]))
    ordinal = np.concatenate([np.arange(*ends) for ends in zip(*bounds, strict=True)])
    order = np.argsort((ordinal + 0.5) / np.array(parts)[source], kind="stable")
    return bounds[0], source[order], ordinal[order]


def _before(place: int, part: int, total: int) -> int:
    """Samples of a source of ``part`` that stand before ``place`` / ``total`` of the way."""
    return -(-2 * place * part // total) // 2  # (2 o + 1) / (2 part) < place / total, exactly


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of rank, worker and position."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def apportion(weights: list[float], total: int) -> list[int]:
    """``total`` in whole parts as near to the weights (of sum 1) as can be: largest remainder."""
    exact = np.array(weights) * total
    parts = np.floor(exact + 1e-9).astype(np.int64)
    largest = np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]
    parts[largest] += 1
    return parts.tolist()
