"""Shards and their indexes, which say where each sample lies.

The headers of every shard are scanned once (scanning.py): so samples are counted before training,
and one is read by seeking to it (reading.py).
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from sami.core.errors import UserError, raise_if_machine
from sami.core.images import IMAGE_EXTENSIONS
from sami.core.network import by_fsspec, describe, is_url, read_small
from sami.core.patterns import name_shards, path_of
from sami.core.progress import follow
from sami.core.remote import ShardCache, open_shard
from sami.core.scanning import DAMAGED_INDEX, Members, scan, stamp_of

SHOWN_NOTES = 10
SCANS = 8  # shards that are scanned at once


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        name: begins the keys of its samples: its file name without ``.tar``.
        count: of its samples.
        size: bytes up to the end of its last sample.
        streamed: it cannot seek, and is read from the cache.
    """

    url: str
    name: str
    index: Path
    count: int
    digest: str
    size: int = 0
    streamed: bool = False
    cache: ShardCache | None = field(default=None, repr=False, compare=False)

    def open(self) -> BinaryIO:
        """See :func:`sami.core.remote.open_shard`."""
        return open_shard(self.url, self.cache, self.streamed)

    def members(self) -> "Members":
        """Where its samples lie.

        Raises:
            UserError: the index is gone or damaged.
        """
        try:
            return Members.load(self.index)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.index}, the index of {self.url}, is gone; bring back what was taken away "
                "and start again"
            ) from error
        except DAMAGED_INDEX as error:
            raise_if_machine(error, self.index)
            raise UserError(f"{self.index} is damaged; delete it and start again") from error


@dataclass(frozen=True)
class Source:
    """Shards among which an epoch makes no difference; ``weight`` is its share of the samples.

    ``weight`` None: the only source, all of it.
    """

    shards: list[Shard]
    weight: float | None = None

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


def open_sources(
    groups: list[tuple[list[str], float | None]],
    folder: Path,
    say: Callable[[str], None] = print,
    build: tuple[int, int] = (0, 1),
    cache: ShardCache | None = None,
    window: int = 0,
) -> list[Source]:
    """The shards of :func:`expand` with their indexes, which are made where there are none.

    An index lies beside its shard (``<shard>.index.npz``, from tools/index_shards.py) or in
    ``folder``. A shard whose size or time differs from its index's is scanned again.

    Args:
        say: told what is worth telling, such as a shard that is cut short.
        build: (number, of): make only every ``of``-th missing index, from ``number`` on; the
            ranks share the work, and call again with the default afterwards.
        cache: for shards that cannot seek; the default one if None.
        window: shards of each group that are read together, of which the cache has to hold two
            windows; 0 for no such check.

    Raises:
        UserError: a shard is not a readable tar, none holds an image, or the cache is too small.
    """
    cache = cache or ShardCache()
    urls = [url for group, _ in groups for url in group]
    folder.mkdir(parents=True, exist_ok=True)
    number, of = build
    streamed: list[int] = []

    def make(url: str) -> Members:
        """The index of a shard; the cache is asked as soon as can be, not once all are fetched."""
        cache.require(streamed, window * len(groups))
        members = _make_index(url, cache)
        if window and not members.seekable:
            streamed.append(members.end)
        return members

    with ThreadPoolExecutor(SCANS) as pool:
        stamps = dict(zip(urls, pool.map(lambda url: stamp_of(url, cache), urls), strict=True))
        missing = [url for url in urls if _find_index(url, folder, stamps[url]) is None]
        if len(missing) > 100 and number == 0:
            say(f"reading the headers of {len(missing)} shards, once")
        mine = missing[number::of]
        made = zip(mine, pool.map(make, mine), strict=True)
        for url, members in follow(made, "shard", len(mine), say):
            members.save(_index_path(url, folder))
    if of > 1:
        return []
    names = name_shards(urls)
    shards, notes = {}, []
    for url in urls:
        index, members = _find_index(url, folder, stamps[url])
        facts = len(members.keys), members.digest(), members.end, not members.seekable
        shards[url] = Shard(url, names[url], index, *facts, cache)
        notes += [f"{url}: {note}" for note in members.notes]
    for note in notes[:SHOWN_NOTES]:
        say(note)
    if len(notes) > SHOWN_NOTES:
        say(f"... and {len(notes) - SHOWN_NOTES} more remarks of this kind")
    cache.require([shard.size for shard in shards.values() if shard.streamed], window * len(groups))
    sources = [Source([shards[url] for url in group], weight) for group, weight in groups]
    for source in sources:
        if not source.count:
            first, others = source.shards[0].url, len(source.shards) - 1
            raise UserError(
                f"{first} {f'and the other {others} shards hold' if others else 'holds'} no "
                f"image ({', '.join(IMAGE_EXTENSIONS)}); make shards with tools/make_shards.py"
            )
    return sources


def fingerprint(sources: list[Source]) -> str:
    """Names the samples of shards wherever they lie: a hash over names, keys and sizes."""
    digest = hashlib.sha256()
    for shard in (shard for source in sources for shard in source.shards):
        digest.update(os.fsencode(f"{shard.name} {shard.digest}\n"))
    return digest.hexdigest()[:16]


def _index_path(url: str, folder: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.abspath(url))).hexdigest()[:8]
    return folder / f"{Path(path_of(url)).name[-80:]}-{digest}.npz"


def index_beside(url: str) -> Path:
    """Where tools/index_shards.py puts the index of a local shard."""
    return Path(f"{url}.index.npz")


def stored_index(path: Path, stamp: str) -> Members | None:
    """An index that was saved, if it is whole and its shard has not changed since."""
    try:
        members = Members.load(path)
    except DAMAGED_INDEX as error:
        raise_if_machine(error, path)
        return None
    return members if members.stamp == stamp else None


def _find_index(url: str, folder: Path, stamp: str) -> tuple[Path, Members] | None:
    beside = [] if is_url(url) else [index_beside(url)]
    for path in (*beside, _index_path(url, folder)):
        members = stored_index(path, stamp)
        if members is not None:
            return path, members
    return None


def _make_index(url: str, cache: ShardCache) -> Members:
    """The index beside a remote shard, if it is of a file of this length; or a new one."""
    remote = describe(url, cache.patience) if by_fsspec(url) else None
    if remote is not None and remote.seekable:
        path, mark, query = url.partition("?")
        try:
            found = read_small(f"{path}.index.npz{mark}{query}", cache.patience)
            members = Members.read(io.BytesIO(found))
            if members.stamp.partition("-")[0] == str(remote.size):
                return replace(members, stamp=remote.version)
        except (UserError, *DAMAGED_INDEX):
            pass  # there is none, or none that helps
    return scan(url, cache)
