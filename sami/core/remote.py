"""Open any shard for seeking: a local tar, one on the network, or one that can only be streamed.

What fsspec knows (http, s3, gs, ...) is read by ranges. What cannot seek (``pipe:``, compressed
tars, servers without ranges) is fetched whole into a bounded folder of this machine, decompressed,
and read from there.
"""

import contextlib
import errno
import hashlib
import io
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sami.core.errors import MachineError, UserError
from sami.core.locks import is_named, locked
from sami.core.network import (
    DEFAULT_PATIENCE,
    SECOND_BYTES,
    Patience,
    RangeFile,
    by_fsspec,
    compression_of,
    describe,
    is_url,
    persist,
)
from sami.core.streams import CHUNK, DAMAGED, Stream, decompressed

# Of this user, where temporary files go (TMPDIR): mostly a disk of this machine, as it should be.
DEFAULT_FOLDER = Path(tempfile.gettempdir(), f"sami-shards-{getattr(os, 'getuid', int)()}")
GB = 1e9
STEP = 64 << 20  # bytes by which room grows for a shard whose length nobody tells
END_MARK = 1024  # zero bytes at the end of a tar
PAUSE = 0.1  # s between two looks whether others have made room


def open_shard(
    url: str, cache: "ShardCache | None" = None, streamed: bool | None = None
) -> BinaryIO:
    """A shard's bytes, decompressed and unbuffered, for reading and seeking.

    Args:
        url: a local path, taken as it is whatever characters it has, or what :func:`is_url` knows.
        cache: for what cannot seek; the default one if None.
        streamed: see :func:`is_streamed`, which is asked if None.

    Raises:
        OSError: a local file cannot be opened.
        UserError: a remote one is not there, may not be read, or needs a package.
        MachineError: the network fails for longer than ``cache.patience``, or the disk is full.
    """
    cache = cache or ShardCache()
    if streamed if streamed is not None else is_streamed(url, cache.patience):
        return cache.open(url)
    if is_url(url):
        return RangeFile(url, describe(url, cache.patience).size, cache.patience)
    return open(url, "rb", buffering=0)


def is_streamed(url: str, patience: Patience) -> bool:
    """Whether a shard cannot seek, and is read from a cache. Raises as :func:`open_shard` does."""
    if is_url(url):
        return not (by_fsspec(url) and describe(url, patience).seekable)
    with open(url, "rb") as file:
        return compression_of(file.read(SECOND_BYTES.stop)[SECOND_BYTES]) is not None


class ShardCache:
    """A bounded folder of this machine that holds, decompressed, what cannot seek.

    Processes of a machine share it, and fetch a shard once. A file ``.part`` is being written, and
    locked by its writer; its size is the room that it was given. Of whole shards, those opened
    longest ago go first; one that is being read stays readable until it is closed.
    """

    def __init__(
        self,
        folder: str | os.PathLike = "",
        gigabytes: float = 50.0,
        patience: Patience | None = None,
    ) -> None:
        self.folder = Path(folder or DEFAULT_FOLDER)
        self.gigabytes, self.patience = gigabytes, patience or DEFAULT_PATIENCE
        self._ahead: deque[str] = deque()
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_ahead": deque(), "_thread": None}

    def require(self, sizes: list[int], window: int) -> None:
        """Check that two windows fit: the one that is read and the one that is fetched ahead.

        Args:
            sizes: bytes of the shards that have to be held, decompressed.
            window: how many shards are read together.

        Raises:
            UserError: they do not.
        """
        needed = sum(sorted(sizes, reverse=True)[: 2 * window])
        if needed > self._limit:
            raise UserError(
                f"data.cache_gb {self.gigabytes:g} cannot hold two windows of {window} shards that "
                f"have to be fetched whole; --data.cache_gb {_gigabytes(needed)} would do, or a "
                "smaller --data.window"
            )

    def open(self, url: str) -> BinaryIO:
        """A shard's bytes, from the folder, where it is fetched if it is not there.

        Raises:
            OSError: a local file cannot be read.
            UserError: it cannot be read, or does not fit.
            MachineError: the network fails, or the disk is full.
        """
        path = self.folder / f"{self._name(url)}.tar"
        part = path.with_suffix(".part")
        room = 0  # that it waits for before it begins anew
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return path.open("rb", buffering=0)
            with self._writable(), locked(part) as file:  # waits for who is fetching it
                if path.exists() or not is_named(part, file):
                    continue
                try:
                    self._fill(url, file, part, room)
                    with locked(self.folder / ".lock"):  # who counts must not find it twice
                        part.replace(path)
                        return path.open("rb", buffering=0)  # before it can be let go of
                except _Crowded as error:
                    room = error.room
                finally:
                    part.unlink(missing_ok=True)
            time.sleep(PAUSE)

    def prefetch(self, urls: Iterable[str]) -> None:
        """Fetch shards in the background, instead of what an earlier call has not begun yet.

        What fails is left to the reader who needs it.
        """
        self._ahead = deque(urls)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch_ahead, daemon=True)
            self._thread.start()

    @property
    def _limit(self) -> int:
        return int(self.gigabytes * GB)

    def _fetch_ahead(self) -> None:
        while self._ahead:
            with contextlib.suppress(UserError, OSError, IndexError):
                self.open(self._ahead.popleft()).close()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Errors of writing into the folder, as sentences."""
        try:
            yield
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            reason = f"{self.folder}, where shards are kept that cannot be sought in: {reason}; "
            remedy = "name another --data.cache_dir (for a tool another TMPDIR)"
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                remedy = f"make room, lower --data.cache_gb, or {remedy}"
                raise MachineError(reason + remedy) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
                raise UserError(reason + remedy) from error
            raise

    def _name(self, url: str) -> str:
        """What another content of a shard is not called, as far as one can know."""
        version = ""
        if by_fsspec(url):
            version = describe(url, self.patience).version
        elif not is_url(url):
            status = os.stat(url)
            version = f"{status.st_size}-{status.st_mtime_ns}"
            url = os.path.abspath(url)
        return hashlib.sha256(os.fsencode(f"{url} {version}")).hexdigest()[:32]

    def _fill(self, url: str, file: BinaryIO, part: Path, room: int) -> None:
        """Write a shard's bytes.

        A length that the server tells has to be right. Where there is none, a stream without the
        mark that ends a tar is taken for what the shard is if it comes twice in the same length.
        """
        unmarked: set[int] = set()
        step = min(STEP, self._limit // 256)  # several are fetched at once

        def attempt() -> None:
            written, tail, damaged = 0, b"", False
            file.seek(0)
            file.truncate()
            if room:  # or a program would be begun again and again until there is some
                self._reserve(url, file, part, room)
            with Stream(url, self.patience) as stream:
                self._reserve(url, file, part, max(room, stream.size or 0))
                raw = io.BufferedReader(stream, CHUNK)
                try:
                    for block in decompressed(url, raw):
                        if written + len(block) > os.fstat(file.fileno()).st_size:
                            self._reserve(url, file, part, written + len(block), step)
                        file.write(block)
                        written, tail = written + len(block), (tail + block)[-END_MARK:]
                except DAMAGED as error:
                    if stream.failed or getattr(error, "errno", None):
                        raise
                    damaged = True  # it counts as far as it goes
                    while raw.read1(CHUNK):
                        pass
                raw.close()
            file.truncate(written)
            os.fsync(file.fileno())  # or the name could outlive the bytes in a loss of power
            if stream.size is None and (damaged or tail != bytes(END_MARK)):
                if written not in unmarked:
                    unmarked.add(written)
                    raise EOFError(f"{written} bytes came, without the mark that ends a tar")
            elif stream.size not in (None, stream.count):
                raise EOFError(f"{stream.count} of {stream.size} bytes came")

        persist(url, attempt, self.patience)

    def _reserve(self, url: str, file: BinaryIO, part: Path, size: int, more: int = 0) -> None:
        """Make room for ``size`` bytes of a part and ``more``; shards opened longest ago go.

        Raises:
            UserError: it is larger than the whole folder may be.
            _Crowded: other parts take the room. One of all waits, the others begin anew.
        """
        if size > self._limit:
            raise UserError(
                f"data.cache_gb {self.gigabytes:g} cannot hold {url}, of which {size / GB:.3g} GB "
                f"are known so far; give more, such as --data.cache_gb {_gigabytes(2 * size)}"
            )
        while True:
            with locked(self.folder / ".lock"):
                others = _sizes_of_others(part)
                kept = sorted(self.folder.glob("*.tar"), key=lambda one: one.stat().st_mtime_ns)
                sizes = [one.stat().st_size for one in kept]
                spare = self._limit - sum(others.values()) - sum(sizes)
                wanted = max(size, min(size + more, spare))
                while spare < wanted and kept:
                    kept.pop(0).unlink()
                    spare += sizes.pop(0)
                if spare >= wanted:
                    file.truncate(wanted)
                    return
            if part > min(others):
                raise _Crowded(min(2 * size, self._limit))  # twice: so it begins anew a few times
            time.sleep(PAUSE)


class _Crowded(Exception):
    """Parts of others take the room that this one needs."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room


def _sizes_of_others(part: Path) -> dict[Path, int]:
    """The parts that others are writing; those of killed writers go."""
    sizes = {}
    for other in set(part.parent.glob("*.part")) - {part}:
        with contextlib.suppress(FileNotFoundError):
            sizes[other] = other.stat().st_size
            with contextlib.suppress(BlockingIOError), locked(other, wait=False) as file:
                if is_named(other, file):
                    other.unlink()
                    del sizes[other]
    return sizes


def _gigabytes(size: int) -> str:
    """Rounded up to what one would type."""
    return f"{math.ceil(size / GB * 10) / 10:g}"
