"""Reading samples where the index says that they lie."""

import contextlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from sami.core.errors import BadSample, raise_if_machine
from sami.core.index import Shard
from sami.core.network import RangeFile, is_url
from sami.core.scanning import BLOCK, FIELDS, IMAGE, UNREADABLE, Members, named_members, open_tar

# Shards that a process holds open: many systems allow 256 files, and workers take some for pipes.
OPEN = 64
# Samples asked for at once where shards are on the network: an answer takes 10 to 100 ms, whatever
# its size.
AT_ONCE = 16
AHEAD = 16  # samples of local shards that the system is asked for in advance
GAP = 8192  # bytes between members that are read along, rather than asked for twice: their headers


@dataclass(frozen=True)
class RawSample:
    """A sample as it stands in its shard, still encoded; without parts if it cannot be read."""

    key: str
    parts: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""

    def part(self, name: str) -> bytes:
        """The bytes of one of FIELDS.

        Raises:
            BadSample: it is not there.
        """
        if name not in self.parts:
            raise BadSample(self.reason or f"no {name}" + " member" * (name != IMAGE))
        return self.parts[name]


class Reader:
    """Reads samples by shard and row, where they lie; a few shards and their indexes stay open.

    Each process opens its own.
    """

    def __init__(self, shards: list[Shard], fields: tuple[str, ...], together: int = 1) -> None:
        """
        Args:
            fields: the members that are read.
            together: shards that are read by turns; so many indexes are held at least.
        """
        self.shards = shards
        self._columns = [FIELDS.index(name) for name in fields]
        self._most = max(together, OPEN)
        self._members: OrderedDict[int, Members] = OrderedDict()
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict:
        """Without what is open, for a process that is not forked."""
        return vars(self) | {"_members": OrderedDict(), "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in vars(self).get("_files", {}).values():
            file.close()

    def read(self, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, RawSample]]:
        """Samples (shard [n], row [n]), each once, in the order in which they lie.

        Yields:
            Which of the n it is, and the sample; one that cannot be read comes without parts, so
            that positions never shift.
        """
        order = np.lexsort((rows, shards))
        asked = [self.shards[number] for number in np.unique(shards)]
        if all(shard.streamed or not is_url(shard.url) for shard in asked):
            wanted = list(zip(shards[order].tolist(), rows[order].tolist(), strict=True))
            for at, (place, one) in enumerate(zip(order.tolist(), wanted, strict=True)):
                self._ask(wanted[at + AHEAD - 1 : at + AHEAD] if at else wanted[:AHEAD])
                yield place, self._sample(*one)
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, len(order), AT_ONCE):
                part = order[first : first + AT_ONCE]
                for number in np.unique(shards[part]).tolist():  # the threads find them open
                    self._index(number)
                    with contextlib.suppress(OSError):
                        self._file(number)
                found = pool.map(self._sample, shards[part].tolist(), rows[part].tolist())
                yield from zip(part.tolist(), found, strict=True)

    def _sample(self, number: int, row: int) -> RawSample:
        shard, members = self.shards[number], self._index(number)
        key = key_of(shard, members, row)
        try:
            return RawSample(key, _read_parts(self._file(number), members, row, self._columns))
        except OSError as error:
            raise_if_machine(error, shard.url)
            return RawSample(key, reason="shard cannot be read")
        except BadSample as error:
            return RawSample(key, reason=str(error))

    def _ask(self, wanted: list[tuple[int, int]]) -> None:
        """Let the system fetch local samples (shard, row) that are about to be read.

        One after the other, a disk gives 0.55 of what it gives where they are asked for together.
        """
        for number, row in wanted if hasattr(os, "posix_fadvise") else ():
            members = self._index(number)
            for column in self._columns:
                start, size = int(members.starts[row, column]), int(members.sizes[row, column])
                if start >= 0:
                    with contextlib.suppress(OSError):  # reading it will tell
                        file = self._file(number).fileno()
                        os.posix_fadvise(file, start - BLOCK, BLOCK + size, os.POSIX_FADV_WILLNEED)

    def _index(self, number: int) -> Members:
        if number not in self._members:
            self._members[number] = self.shards[number].members()
            if len(self._members) > self._most:
                self._members.popitem(last=False)
        self._members.move_to_end(number)
        return self._members[number]

    def _file(self, number: int) -> BinaryIO:
        """An open shard; a local file that was replaced or deleted is opened anew."""
        shard, file = self.shards[number], self._files.get(number)
        own = not (shard.streamed or is_url(shard.url))  # no copy, which may be let go of
        if file is not None and own and not os.fstat(file.fileno()).st_nlink:
            self._files.pop(number).close()
        if number not in self._files:
            self._files[number] = shard.open()
            if len(self._files) > OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]


def read_samples(shard: Shard, rows: np.ndarray, fields: tuple[str, ...]) -> Iterator[RawSample]:
    """Samples of a shard; exactly one for each of ``rows``, which ascend.

    What cannot be read comes as a sample without parts, so that positions never shift.
    """
    for _, sample in Reader([shard], fields).read(np.zeros_like(rows), rows):
        yield sample


def read_range(
    shards: list[Shard], positions: range, fields: tuple[str, ...]
) -> Iterator[RawSample]:
    """Samples of the shards laid end to end, unshuffled."""
    for _, sample in Reader(shards, fields).read(*locate(shards, np.array(positions, np.int64))):
        yield sample


def locate(shards: list[Shard], numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard [n] and row [n] of samples [n] counted through the shards laid end to end."""
    ends = np.cumsum([shard.count for shard in shards])
    shard = np.searchsorted(ends, numbers, side="right")
    return shard, numbers - np.concatenate([[0], ends])[shard]


def read_whole(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample of a shard: its key, and its members under their own names.

    In the order of their images, as far as the tar goes. Of members of the same key and field
    the first counts; a sample that is cut off has no members.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with contextlib.ExitStack() as stack:
        try:
            tar = stack.enter_context(open_tar(url))
        except OSError as error:
            raise_if_machine(error, url)
            raise
        with _as_far_as_it_goes(url):
            for key, kind, member in named_members(tar):
                groups.setdefault(key, {}).setdefault(kind, member)
        kept = [(key, row) for key, row in groups.items() if IMAGE in row]
        for key, row in sorted(kept, key=lambda item: item[1][IMAGE].offset_data):
            members = {}
            with _as_far_as_it_goes(url):
                members = {info.name: tar.extractfile(info).read() for info in row.values()}
            yield key, members


@contextlib.contextmanager
def _as_far_as_it_goes(url: str) -> Iterator[None]:
    """Damage ends what is inside without a word; an error of the machine does not."""
    try:
        yield
    except UNREADABLE as error:
        raise_if_machine(error, url)


def _read_parts(file: BinaryIO, members: Members, row: int, columns: list[int]) -> dict[str, bytes]:
    """The members of one sample by field.

    Raises:
        BadSample: they are not what the index says.
    """
    size = file.size if isinstance(file, RangeFile) else os.fstat(file.fileno()).st_size
    places = {}  # of the data, by field: from, to
    for column in sorted(columns, key=lambda column: members.starts[row, column]):
        start, count = int(members.starts[row, column]), int(members.sizes[row, column])
        if start + count > size:
            raise BadSample("cut off in shard")  # not after making room for it
        if start >= 0:
            places[FIELDS[column]] = start, start + count
    if isinstance(file, RangeFile):
        return _read_together(file, places)
    # Header and data apart: a copy of a megabyte into fresh memory costs more than reading it.
    parts = {}
    for name, (start, end) in places.items():
        head, data = _read_at(file, start - BLOCK, BLOCK), _read_at(file, start, end - start)
        parts[name] = _checked(head, data, end - start)
    return parts


def _read_together(file: RangeFile, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """Members on the network; those that lie side by side are asked for at once."""
    spans: list[list[str]] = []
    for name, (start, _) in places.items():
        if spans and start - BLOCK <= places[spans[-1][-1]][1] + GAP:
            spans[-1].append(name)
        else:
            spans.append([name])
    parts = {}
    for together in spans:
        first = places[together[0]][0] - BLOCK
        data = file.read_at(first, max(places[name][1] for name in together) - first)
        for name in together:
            start, end = (place - first for place in places[name])
            parts[name] = _checked(data[start - BLOCK : start], data[start:end], end - start)
    return parts


def _read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """So many bytes of a local file from a place on, fewer where it ends."""
    data = os.pread(file.fileno(), count, start)
    # The kernel gives at most 2 GB at once.
    while len(data) < count and (
        more := os.pread(file.fileno(), count - len(data), start + len(data))
    ):
        data += more
    return data


def _checked(head: bytes, data: bytes, size: int) -> bytes:
    """A member's data, if it and its header are what the index says."""
    if len(data) < size or len(head) < BLOCK:
        raise BadSample("cut off in shard")
    try:
        header = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    if header is None or header.size != size:
        raise BadSample("shard changed since it was indexed")
    return data


def key_of(shard: Shard, members: Members, row: int) -> str:
    """A sample's key, as logs have it."""
    return f"{shard.name}/{members.keys[row].decode('utf-8', 'backslashreplace')}"
