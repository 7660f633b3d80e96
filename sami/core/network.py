"""Reading files on the network by ranges, through fsspec, and waiting for a network that fails.

http, s3, gs and what else fsspec knows: a byte crosses the network when a sample needs it, and
only then.
"""

import errno
import io
import os
import random
import re
import socket
import string
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import fsspec

from sami.core.errors import AGAIN, MachineError, UserError, with_causes

Result = TypeVar("Result")

# webdataset reads sftp through curl; fsspec would need one more package.
NOT_BY_FSSPEC = {"file", "local", "sftp", "ssh"}
# What a compressed stream begins with, from its second byte on: asking a server for a range that
# begins at 0 would not tell whether it heeds ranges. And the module that reads it.
SECOND_BYTES = slice(1, 16)
COMPRESSIONS = {
    rb"\x8b\x08": "gzip",
    rb"Zh[1-9]1AY&SY": "bz2",
    rb"7zXZ\0": "lzma",
    rb"\xb5/\xfd": "compression.zstd",
}
# Errors of this machine, which waiting does not mend; all others are taken for the network's.
LOCAL = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
)
NETWORK_PACKAGES = {
    *("aiohttp", "aiobotocore", "botocore", "gcsfs", "fsspec", "azure"),
    *("huggingface_hub", "httpx", "requests", "urllib3"),
}
ASKS_FOR_PATIENCE = (408, 425, 429)  # of the answers 4xx
TRIES_OF_A_PROGRAM = 3  # where not one byte came: rather a wrong command than the network


@dataclass(frozen=True)
class Patience:
    """How long the network is waited for.

    The pauses outlive the restart of a server (100 s in all).
    """

    stall: float = 60.0  # s without a byte
    pauses: tuple[float, ...] = (1, 3, 9, 27, 60)  # s between two tries


DEFAULT_PATIENCE = Patience()
ANNOUNCED = 5  # s from which on a pause is announced: a log that stands still looks like a hang


@dataclass(frozen=True)
class Remote:
    """What a server says of a shard; ``seekable``: it has ranges, and the tar is not compressed."""

    size: int | None
    version: str
    seekable: bool


def is_url(path: str) -> bool:
    """Whether this is read through something else than the file system."""
    return "://" in path or path.startswith("pipe:") or path == "-"


def by_fsspec(url: str) -> bool:
    """Whether fsspec opens this, rather than webdataset."""
    known = set(fsspec.available_protocols()) - NOT_BY_FSSPEC
    return "://" in url and _protocol(url) in known


_DESCRIBED: dict[str, Remote] = {}


def describe(url: str, patience: Patience) -> Remote:
    """What a server says of a shard that fsspec opens; asked once by a process and its children.

    Raises:
        UserError: it is not there, may not be read, or needs a package.
        MachineError: the network fails.
    """
    if url not in _DESCRIBED:
        system, path = system_of(url, patience)
        info = persist(url, lambda: system.info(path), patience)
        size, seekable = info.get("size"), False

        def second_bytes() -> bytes:
            start, stop = SECOND_BYTES.start, SECOND_BYTES.stop
            if not is_http(url):
                return system.cat_file(path, start=start, end=stop)
            # Not by cat_file, which takes in the whole file if the server ignores ranges.
            with system.open(path, "rb", cache_type="none", size=size) as file:
                file.seek(start)
                try:
                    return file.read(stop - start)
                except ValueError:
                    return b""

        if size and size >= SECOND_BYTES.stop and info.get("partial", True):
            second = persist(url, second_bytes, patience)
            seekable = bool(second) and compression_of(second) is None
        version = next((info[key] for key in ("ETag", "etag", "Last-Modified") if key in info), "")
        _DESCRIBED[url] = Remote(size, f"{size}-{version}", seekable)
    return _DESCRIBED[url]


def read_small(url: str, patience: Patience) -> bytes:
    """All of a small file that need not be there: tried once. Raises as :func:`describe` does."""
    system, path = system_of(url, patience)
    return persist(url, lambda: system.cat_file(path), replace(patience, pauses=()))


class RangeFile(io.RawIOBase):
    """A remote file; each ``read`` is one request for just these bytes, tried again on faults.

    Nothing is read ahead, since the next sample may lie anywhere: who reads small pieces in a row
    wraps it in ``io.BufferedReader``. Several threads may use ``read_at``;
    ``read`` raises what it raises.
    """

    def __init__(self, url: str, size: int, patience: Patience) -> None:
        super().__init__()
        self.url, self.size, self.patience, self._position = url, size, patience, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readall(self) -> bytes:
        data = self.read_at(self._position, self.size)
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read_at(self._position, len(buffer))
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def read_at(self, start: int, size: int) -> bytes:
        """So many bytes from a place on, fewer where the file ends.

        Raises:
            UserError: the file is gone, or may no longer be read.
            MachineError: the network fails.
        """
        stop = min(start + size, self.size)
        if stop <= start:
            return b""

        def ask() -> bytes:
            system, path = system_of(self.url, self.patience)
            data = system.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise EOFError(f"{len(data)} of {stop - start} bytes came")
            return data

        return persist(self.url, ask, self.patience)


class NothingCame(OSError):
    """A program ended with an error before its first byte."""


def compression_of(second_bytes: bytes) -> str | None:
    """The module that reads a stream with these SECOND_BYTES; None for a plain one."""
    found = (name for magic, name in COMPRESSIONS.items() if re.match(magic, second_bytes, re.S))
    return next(found, None)


def persist(url: str, attempt: Callable[[], Result], patience: Patience) -> Result:
    """What an attempt gives; it is made again as long as the network fails.

    Raises:
        UserError: the server refuses.
        MachineError: the patience has come to its end.
        Exception: what has nothing to do with the network, as it is.
    """
    began = time.monotonic()
    for number, pause in enumerate((*patience.pauses, None), 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:
            *_, root = with_causes(error)
            if not is_url(url) or getattr(root, "errno", None) in LOCAL or not _of_network(root):
                raise
            reason = _describe_error(root, patience)
            if by_fsspec(url):
                _raise_if_refused(url, root, reason)
            hopeless = isinstance(root, NothingCame) and number == TRIES_OF_A_PROGRAM
            if pause is None or hopeless:
                raise MachineError(
                    f"{url} cannot be read ({reason}), tried {number} times in "
                    f"{time.monotonic() - began:.0f} s; see whether its server and the network "
                    f"are up, and {AGAIN}"
                ) from error
        if pause >= ANNOUNCED:
            print(f"{url}: {reason}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause * random.Random().uniform(0.5, 1))  # all readers at once would not help


def _of_network(error: BaseException) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, EOFError)) or package in NETWORK_PACKAGES


def _describe_error(error: BaseException, patience: Patience) -> str:
    """An error of the network in a few words."""
    if isinstance(error, TimeoutError):
        return f"no byte came for {patience.stall:g} s"
    if _status(error):
        return f"the server answers {_status(error)}"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())


def _status(error: BaseException) -> int:
    """The answer of a server; 0 if there was none."""
    if isinstance(error, FileNotFoundError):
        return 404
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return 403
    # aiohttp's errors of a body that breaks off have a "code" of 400, which no server sent
    name = "code" if type(error).__module__.startswith("gcsfs") else "status"
    found = (getattr(error, name, None), getattr(getattr(error, "response", 0), "status_code", 0))
    return next((one for one in found if isinstance(one, int)), 0)


def _raise_if_refused(url: str, error: BaseException, reason: str) -> None:
    """Raise UserError if trying again would not help."""
    status = _status(error)
    if status in (401, 403):
        raise UserError(
            f"{url} may not be read ({reason}); give this machine the right to it: credentials, or "
            "an address that was signed anew"
        )
    unknown = getattr(error, "errno", None) == socket.EAI_NONAME and url not in _DESCRIBED
    refused = 400 <= status < 500 and status not in ASKS_FOR_PATIENCE
    if unknown or refused or isinstance(error, ValueError):
        raise UserError(f"{url} is not there ({reason}); correct the address or leave it out")


_SYSTEMS: dict[tuple[int, str, float], fsspec.AbstractFileSystem] = {}


def system_of(url: str, patience: Patience) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that reads a URL, and the latter in its words.

    One for each process, as the threads and connections of one are lost in a fork; and kept for
    good, as collecting it in a child would take the parent's connections out of its event loop.

    Raises:
        UserError: it needs a package.
    """
    protocol, options = _protocol(url), {}
    key = (os.getpid(), protocol, patience.stall)
    try:
        if key not in _SYSTEMS and is_http(url):
            import aiohttp  # not needed otherwise

            timeout = aiohttp.ClientTimeout(sock_connect=patience.stall, sock_read=patience.stall)
            headers = {"Accept-Encoding": "identity"}
            client = {"timeout": timeout, "trust_env": True, "headers": headers}
            options = {"client_kwargs": client, "encoded": True}
        if key not in _SYSTEMS:
            made = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
            _SYSTEMS.setdefault(key, made)
    except ImportError as error:
        *_, root = with_causes(error)
        raise UserError(
            f"{url}: {protocol}:// needs a package that is not here: pip install {root.name}; or "
            "read it through a program, as 'pipe:...'"
        ) from error
    system = _SYSTEMS[key]
    path = system._strip_protocol(url)
    # As it is, since it may be signed; but for what no address may hold.
    return system, urllib.parse.quote(path, string.punctuation) if is_http(url) else path


def _protocol(url: str) -> str:
    return url.partition("://")[0].lower()


def is_http(url: str) -> bool:
    return _protocol(url) in ("http", "https")
