"""Reading through what cannot seek: the program behind a ``pipe:``, a compressed tar."""

import contextlib
import importlib
import io
import lzma
import os
import select
import zlib
from collections.abc import Iterator

import psutil
import webdataset as wds

from sami.core.errors import UserError
from sami.core.network import (
    SECOND_BYTES,
    NothingCame,
    Patience,
    by_fsspec,
    compression_of,
    describe,
    is_http,
    is_url,
    system_of,
)

CHUNK = 1 << 20  # bytes copied at once
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # of decompressing


class Stream(io.RawIOBase):
    """What can only be read through, as it is stored. ``size``: bytes, if they are known."""

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__()
        self.url, self.patience = url, patience
        self.count, self.size = 0, None
        self.failed = self.ended = False
        if by_fsspec(url):
            self.size = describe(url, patience).size
            system, path = system_of(url, patience)
            # Of http a block of 0 is a stream; its length would be asked for once more.
            options = {"block_size": 0, "size": 1} if is_http(url) else {"block_size": 8 * CHUNK}
            self.source = system.open(path, "rb", **options)
        elif is_url(url):
            try:
                self.source = wds.gopen(url)
            except ValueError as error:
                raise UserError(f"{url}: neither fsspec nor webdataset opens it") from error
        else:
            self.source = open(url, "rb")
            self.size = os.stat(url).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = b""
        try:
            while more := self._read(len(buffer) - len(data)):
                data += more
                if self.count or len(data) >= SECOND_BYTES.stop:  # enough to tell a compression by
                    break
        except Exception:
            self.failed = True
            raise
        self.ended = not data
        self.count += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Raise OSError if the program behind it ended with an error."""
        if self.closed:
            return
        super().close()
        program = getattr(self.source, "proc", None)
        if program is None:
            self.source.close()
        elif not self.ended:
            _kill(program.pid)
            with contextlib.suppress(OSError):
                self.source.close()
        else:
            try:
                self.source.close()
            except OSError:  # whose message is webdataset's whole call
                reason = f"the program that opens it ended with {program.returncode}"
                raise (OSError if self.count else NothingCame)(reason) from None

    def _read(self, size: int) -> bytes:
        if not hasattr(self.source, "proc"):
            return self.source.read(size)
        pipe = self.source.stream.fileno()  # not through its buffer, which would wait to be full
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        if not poll.poll(1000 * self.patience.stall):
            raise TimeoutError
        return os.read(pipe, size)


def decompressed(url: str, raw: io.BufferedReader) -> Iterator[bytes]:
    module = compression_of(raw.peek(SECOND_BYTES.stop)[SECOND_BYTES])
    try:
        source = importlib.import_module(module).open(raw) if module else raw
    except ImportError as error:
        raise UserError(
            f"{url} is compressed with zstd, which Python knows from 3.14 on; read it through a "
            f"program: 'pipe:zstd -dc {url}'"
        ) from error
    return iter(lambda: source.read1(CHUNK), b"")


def _kill(process: int) -> None:
    """End a program and all that it has started, as a shell does not take its pipeline along."""
    with contextlib.suppress(psutil.NoSuchProcess):
        program = psutil.Process(process)
        for one in (*program.children(recursive=True), program):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
