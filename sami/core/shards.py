"""Which sample comes when, and reading it from tar shards.

The order is a pure function of (seed, epoch, number of processes and workers), so the position in
the data is a function of the step and nothing of it needs to be saved:

1. the shards of an epoch are permuted, their samples laid end to end and rotated;
2. the first ``steps_per_epoch * batch_size`` are dealt out in contiguous ranges to the *readers*,
   one per rank and worker (what is left out, less than one batch, is another part each epoch);
3. each reader shuffles its range through a buffer of raw, still encoded samples. The buffer is
   simulated on integers first, so resuming seeks: it re-reads only what had not been handed out.

A micro-batch of a rank belongs to the worker ``number % workers``, the order in which PyTorch's
DataLoader asks them.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import webdataset as wds
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sami.core.errors import BadSample, UserError
from sami.core.images import IMAGE_EXTENSIONS

Decoded = TypeVar("Decoded")

# A reader that meets so many unusable samples in a row gives up: nothing behind them is usable.
MAX_BAD_IN_A_ROW = 1000


@dataclass(frozen=True)
class Shard:
    """One tar. ``name`` is its file name without ``.tar``; ``sizes`` [n] the pictures' bytes.

    An array, because a list of integers would be copied into every worker, page by page.
    """

    url: str
    name: str
    sizes: np.ndarray

    @property
    def count(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class RawSample:
    """A picture as it stands in its shard, in one epoch; ``data`` is None if it cannot be read."""

    key: str
    data: bytes | None
    reason: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class Layout:
    """How an epoch is dealt out. Two runs of one layout see the same batches."""

    samples: int
    batch_size: int
    micro_batch_size: int
    processes: int
    workers: int

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch_size

    @property
    def micro_batches_per_step(self) -> int:
        return self.batch_size // (self.processes * self.micro_batch_size)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Of one rank."""
        return self.steps_per_epoch * self.micro_batches_per_step

    def numbers(self, epoch: int, worker: int) -> range:
        """The micro-batches of an epoch, counted from the run's start, that fall to a worker."""
        first, count = epoch * self.micro_batches_per_epoch, self.micro_batches_per_epoch
        return range(first + (worker - first) % self.workers, first + count, self.workers)

    def share(self, epoch: int, rank: int, worker: int) -> range:
        """Positions in the epoch's sequence of samples that one reader hands out."""
        counts = [len(self.numbers(epoch, w)) * self.micro_batch_size for w in range(self.workers)]
        start = rank * sum(counts) + sum(counts[:worker])
        return range(start, start + counts[worker])


def expand(patterns: str | list[str], key: str) -> list[str]:
    """Paths or URLs of shards from braces and globs, in order, each once.

    Args:
        patterns: one pattern or several, such as ``train-{000..127}.tar`` or ``data/sa_*.tar``.
        key: the configuration key to name in an error.

    Raises:
        UserError: a pattern that matches nothing, or names a file that is not there.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns or not all(patterns):
        raise UserError(f"{key} is empty; give the shards, for example --{key} 'data/train-*.tar'")
    found: list[str] = []
    for pattern in patterns:
        expanded = expand_urls(pattern)
        local = [path for path in expanded if not _is_url(path)]
        matches = [
            (path, sorted(glob.glob(path)) or ([path] if os.path.exists(path) else []))
            for path in local
        ]
        missing = [path for path, files in matches if not files]
        folder = next((path for path, _ in matches if os.path.isdir(path)), None)
        if folder is not None:
            raise UserError(f"{key}: {folder} is a folder; name the shards in it: {folder}/*.tar")
        if len(missing) == len(expanded):
            raise UserError(
                f"{key}: '{pattern}' matches no file; make shards with tools/make_shards.py or "
                "correct the pattern"
            )
        if missing:
            raise UserError(
                f"{key}: {len(missing)} of the {len(expanded)} shards of '{pattern}' are missing, "
                f"the first is {missing[0]}; fetch them or narrow the pattern"
            )
        files = dict(matches)
        found += [file for path in expanded for file in files.get(path, [path])]
    return list(dict.fromkeys(found))


def index_shards(
    urls: list[str], cache: Path | None = None, say: Callable[[str], None] = print
) -> list[Shard]:
    """The samples of each shard, from the headers of its members; kept in ``cache`` (JSON).

    A sample is a member with a picture's extension; nothing is decoded. A shard whose size or
    time differs from what the cache has is read again.

    Args:
        say: told what is worth telling, such as a shard that is cut short.

    Raises:
        UserError: a shard is not a readable tar, or none holds a picture.
    """
    known: dict[str, dict] = {}
    if cache is not None and cache.exists():
        with contextlib.suppress(ValueError):
            known = json.loads(cache.read_text())
    stamps = {url: _stamp(url) for url in urls}
    stale = [url for url in urls if url not in known or known[url]["stamp"] != stamps[url]]
    if len(stale) > 100:
        say(f"reading the headers of {len(stale)} shards, once")
    entries = {url: known[url] for url in urls if url not in stale}
    entries |= {url: {"stamp": stamps[url], "sizes": _picture_sizes(url, say)} for url in stale}
    index = [Shard(url, _name(url), np.array(entries[url]["sizes"], np.int64)) for url in urls]
    if not any(shard.count for shard in index):
        raise UserError(
            f"{urls[0]} {f'and the other {len(urls) - 1} shards hold' if urls[1:] else 'holds'} no "
            f"picture ({', '.join(IMAGE_EXTENSIONS)}); make shards with tools/make_shards.py"
        )
    if cache is not None and stale:
        temporary = cache.with_suffix(f".tmp{os.getpid()}")
        temporary.write_text(json.dumps(entries))
        temporary.replace(cache)
    return index


def fingerprint(shards: list[Shard]) -> str:
    """Names the samples of a list of shards wherever it lies: a hash over names and sizes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name} {shard.count} ".encode() + shard.sizes.tobytes())
    return digest.hexdigest()[:16]


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample in one epoch: independent of rank, worker and position."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def read_epoch(
    shards: list[Shard],
    layout: Layout,
    *,
    seed: int,
    epoch: int,
    rank: int,
    worker: int,
    skip: int,
    buffer_bytes: int,
) -> Iterator[RawSample]:
    """The samples that one reader hands out in one epoch, in order.

    Args:
        shards: of the whole data set.
        skip: samples already handed out in this epoch; they are not read again.
        buffer_bytes: bound of the shuffle buffer.
    """
    order = sample_rng(seed, epoch, "shards").permutation(len(shards))
    permuted = [shards[i] for i in order]
    counts = np.array([shard.count for shard in permuted])
    total = int(counts.sum())
    rotation = int(sample_rng(seed, epoch, "rotation").integers(total))
    positions = (np.array(layout.share(epoch, rank, worker), dtype=np.int64) + rotation) % total
    if len(positions) == 0:
        return
    starts = np.concatenate([[0], np.cumsum(counts)])
    which = np.searchsorted(starts, positions, side="right") - 1
    local = positions - starts[which]
    sizes = np.concatenate([shard.sizes for shard in permuted])[positions]

    sequence = shuffled(sizes, buffer_bytes, sample_rng(seed, epoch, f"shuffle/{rank}/{worker}"))
    waiting: dict[int, RawSample] = {}
    wanted = np.zeros(len(sequence), dtype=bool)
    wanted[sequence[skip:]] = True
    source = _read_positions(permuted, which, local, wanted)
    for item in sequence[skip:]:
        while item not in waiting:
            position, sample = next(source)
            waiting[position] = sample
        yield replace(waiting.pop(item), epoch=epoch)


def shuffled(sizes: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """The order in which a shuffle buffer of at most ``limit`` bytes hands out what it is fed.

    Args:
        sizes: [n] bytes of the samples in the order in which they are read.
        limit: a sample enters while the bytes in the buffer are under it, so at least one does.

    Returns:
        [n] the samples' numbers in the order handed out.
    """
    draws = rng.random(len(sizes))
    buffer: list[int] = []
    held = entered = 0
    order = np.empty(len(sizes), dtype=np.int64)
    for turn, draw in enumerate(draws):
        while entered < len(sizes) and (not buffer or held + sizes[entered] <= limit):
            buffer.append(entered)
            held += int(sizes[entered])
            entered += 1
        pick = int(draw * len(buffer))
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        order[turn] = buffer.pop()
        held -= int(sizes[order[turn]])
    return order


def read_shard(shard: Shard, first: int, last: int) -> Iterator[RawSample]:
    """Samples ``first`` to ``last`` (exclusive) of a shard; exactly ``last - first`` of them.

    Members before ``first`` are passed over unread. What cannot be read comes as a sample without
    data, so that positions never shift.
    """
    number = itertools.count()

    def select(name: str) -> bool:
        return is_picture(name) and first <= next(number) < last

    expected = last - first
    given = 0
    try:
        with wds.gopen(shard.url) as stream:
            for member in tar_file_iterator(stream, skip_meta=None, select_files=select):
                yield RawSample(
                    f"{shard.name}/{member['fname'].rpartition('.')[0]}", member["data"]
                )
                given += 1
                if given == expected:
                    return
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        reason = "shard cannot be read"
        yield from (
            RawSample(f"{shard.name}#{first + i} ({error})", None, reason)
            for i in range(given, expected)
        )
        return
    yield from (
        RawSample(f"{shard.name}#{first + i}", None, "missing in shard")
        for i in range(given, expected)
    )


def read_range(shards: list[Shard], positions: range) -> Iterator[RawSample]:
    """Samples of the shards laid end to end, unshuffled: what evaluation reads."""
    start = 0
    for shard in shards:
        first, last = max(positions.start, start), min(positions.stop, start + shard.count)
        if first < last:
            yield from read_shard(shard, first - start, last - start)
        start += shard.count


def fill_slots(
    samples: Iterator[RawSample],
    decode: Callable[[RawSample, bool], Decoded],
    report: Callable[[str, str], None],
) -> Iterator[Decoded]:
    """Decoded samples, one per slot, whatever is bad.

    The slot of a bad sample is filled by the next good one of the same reader, decoded as a
    stand-in; that one still comes in its own slot too. So positions do not shift, and what fills
    a slot depends on the position alone.

    Args:
        samples: endless.
        decode: (sample, is it a stand-in) to anything; raises BadSample.
        report: called with (reason, key) for each bad sample, in its own slot.

    Raises:
        UserError: MAX_BAD_IN_A_ROW samples in a row are bad.
    """
    ahead: deque[RawSample] = deque()
    while True:
        sample = ahead.popleft() if ahead else next(samples)
        decoded = None
        try:
            decoded = decode(sample, False)
        except BadSample as error:
            report(str(error), sample.key)
        distance = 0
        while decoded is None:
            if distance == MAX_BAD_IN_A_ROW:
                raise UserError(
                    f"{MAX_BAD_IN_A_ROW} samples in a row are unusable, the first is {sample.key}; "
                    "look at data.shards: are its members pictures?"
                )
            if distance == len(ahead):
                ahead.append(next(samples))
            try:
                decoded = decode(ahead[distance], True)
            except BadSample:
                distance += 1
        yield decoded


def is_picture(name: str) -> bool:
    """Whether a member of a tar is a sample's picture; hidden files are not."""
    base, _, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() in IMAGE_EXTENSIONS and base != "" and not base.startswith(".")


def describe(layout: Layout) -> dict[str, int]:
    """The layout as plain data, for a checkpoint."""
    return asdict(layout)


def _read_positions(
    permuted: list[Shard], which: np.ndarray, local: np.ndarray, wanted: np.ndarray
) -> Iterator[tuple[int, RawSample]]:
    """Wanted samples in reading order, as (number in the reader's range, sample).

    A run of consecutive samples of one shard is read in one pass that starts at its first wanted
    sample; a shard of which nothing is wanted is not opened.
    """
    breaks = np.flatnonzero((np.diff(which) != 0) | (np.diff(local) != 1)) + 1
    for run in np.split(np.arange(len(which)), breaks):
        needed = run[wanted[run]]
        if len(needed) == 0:
            continue
        first, last = int(needed[0]), int(needed[-1])
        samples = read_shard(permuted[which[first]], int(local[first]), int(local[last]) + 1)
        for number, sample in zip(range(first, last + 1), samples, strict=True):
            if wanted[number]:
                yield number, sample


def _is_url(path: str) -> bool:
    return "://" in path or path.startswith("pipe:") or path == "-"


def _stamp(url: str) -> str:
    """Changes when a local shard does; a URL's content is taken to be fixed."""
    if _is_url(url):
        return ""
    status = os.stat(url)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _name(url: str) -> str:
    last = Path(url.split("?")[0].rstrip("/ ")).name
    return last.removesuffix(".gz").removesuffix(".tar")


def _picture_sizes(url: str, say: Callable[[str], None]) -> list[int]:
    sizes: list[int] = []
    try:
        with wds.gopen(url) as stream:
            mode = "r|*" if _is_url(url) else "r:*"  # a file's members are sought over unread
            with tarfile.open(fileobj=stream, mode=mode) as tar:
                for member in tar:
                    if member.isreg() and is_picture(member.name):
                        sizes.append(member.size)
                    tar.members = []  # tarfile would keep them all
    except (tarfile.TarError, EOFError, zlib.error) as error:
        if not sizes:
            raise UserError(
                f"{url} is not a readable tar ({str(error).splitlines()[0].rstrip(':')}); "
                "fetch it again or leave it out"
            ) from error
        say(f"{url} is cut short ({error}): {len(sizes)} pictures stand in it; fetch it again")
    except OSError as error:
        raise UserError(
            f"{url} cannot be read ({error.strerror or error}); mend it or leave it out"
        ) from error
    return sizes
