"""Paths as a user writes them, and whether something is there."""

import argparse
import errno
import os
import re
import stat
from pathlib import Path

from sami.core.errors import UserError

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
Place = str | os.PathLike


def exists(path: Place) -> bool:
    """Whether there is a file or folder.

    Raises:
        OSError: that cannot be known, for example without the right to look.
    """
    return _status(path) is not None


def is_file(path: Place) -> bool:
    """The same for a file; see :func:`exists`."""
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def expand_path(text: str, option: str = "") -> str:
    """A path with ``~`` and ``$VARIABLES`` replaced, also in patterns of shards and in URLs.

    What exists as it is written stays, and so does a ``pipe:``, which a shell expands.

    Args:
        option: named in an error.

    Raises:
        UserError: a variable that is not set.
    """
    if not text or text.startswith("pipe:") or os.path.lexists(text):
        return text
    expanded = os.path.expanduser(os.path.expandvars(text))
    unset = re.search(r"\$(\w+|\{\w+\})", expanded, re.ASCII)
    if unset and "://" not in text and not os.path.lexists(expanded):
        name = unset[1].strip("{}")
        raise UserError(
            f"{option + ' ' if option else ''}{text}: the environment variable {name} is not set; "
            "set it, or write the path out"
        )
    return os.fsdecode(expanded.encode("utf-8", "surrogateescape"))


def local_path(text: str) -> Path:
    """The same for the options of a tool: a ``type`` for argparse.

    Raises:
        argparse.ArgumentTypeError: a variable that is not set, or nothing.
    """
    if not text:  # Path("") would be the working directory
        raise argparse.ArgumentTypeError("is empty; name a path, or leave the option out")
    return Path(path_pattern(text))


def path_pattern(text: str) -> str:
    """:func:`local_path` for patterns of shards, which stay text."""
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _status(path: Place) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    except ValueError:  # a zero byte
        return None
