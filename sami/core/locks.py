"""Files that one process at a time may write; the kernel drops a lock with the process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[BinaryIO]:
    """A file for reading and writing, made where it is not, that this caller alone holds.

    Whoever had it before may have renamed or deleted it: see :func:`is_named`.

    Raises:
        BlockingIOError: another has it, and ``wait`` is false.
        OSError: it cannot be opened, or its file system knows no locks.
    """
    import fcntl  # not on Windows

    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do if a fork has a copy of it


def is_named(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
