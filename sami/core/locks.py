"""Files that one process at a time may write; the kernel drops a lock with the process."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO


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


def try_lock(file: IO) -> bool | None:
    """Lock an open file for this process, which its children do not hold; also between machines.

    Returns:
        Whether it has the lock now; None where the file system knows none.
    """
    import fcntl  # not on Windows

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None


def is_named(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
