"""What stands in a tar: its samples, and where each of their members lies.

A *sample* is an image (``<key>.jpg``, jpeg, png, webp) and what lies beside it under the same key:
``.json``, ``.cls``, ``.teacher.npz``.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sami.core.errors import UserError, raise_if_machine
from sami.core.images import IMAGE_EXTENSIONS
from sami.core.network import by_fsspec, describe, is_url
from sami.core.remote import ShardCache, is_streamed, open_shard

IMAGE, TEACHER = "image", "teacher.npz"
FIELDS = (IMAGE, "json", "cls", TEACHER)  # the columns of an index
EXTENSIONS = dict.fromkeys(IMAGE_EXTENSIONS, IMAGE) | {name: name for name in FIELDS[1:]}
NO_LABEL, BAD_LABEL = -1, -2  # in an index: no .cls; one that is not a class number
MAX_LABEL = 2**31  # class numbers are below
LABEL_BYTES = 64  # of a .cls that is looked at
BLOCK = tarfile.BLOCKSIZE  # a member's header, just before its data
MAX_MEMBER = 1 << 48  # bytes; positions behind it stay far below what seeking can take
EXTENDED_HEADERS = (b"L", b"K", b"x", b"g", b"X")  # long names and the like
MAX_EXTENDED = 1 << 20  # bytes
UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error)
DAMAGED_INDEX = (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile)
HOP = 4096  # bytes read at once to find the next header: it and a .cls before it, but no image


@dataclass
class Members:
    """Where the samples of a shard lie, in the order of their images.

    ``keys`` [n] bytes; ``starts`` [n, F] where the data of each of FIELDS begins, in bytes from
    the shard's start, -1 where there is none; ``sizes`` [n, F] its bytes, 0 where there is none.
    ``seekable`` tells whether it is read where it lies; ``notes`` what is odd.
    ``labels`` [n] class numbers, NO_LABEL or BAD_LABEL.
    """

    keys: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    seekable: bool
    stamp: str
    notes: list[str]
    labels: np.ndarray

    def digest(self) -> str:
        """Names the samples, wherever the shard lies."""
        return hashlib.sha256(b"\n".join(self.keys) + self.sizes.tobytes()).hexdigest()

    @property
    def end(self) -> int:
        """Bytes up to the end of the last sample."""
        return int((self.starts + self.sizes).max(initial=0))

    def save(self, path: Path) -> None:
        """As npz, atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, **vars(self))
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "Members":
        with path.open("rb") as stream:
            return Members.read(stream)

    @staticmethod
    def read(stream: BinaryIO) -> "Members":
        """From an npz. Raises one of DAMAGED_INDEX."""
        with np.load(stream) as file:
            labels = np.full(len(file["keys"]), NO_LABEL, np.int64)
            if (file["sizes"][:, FIELDS.index("cls")] > 0).any():
                labels = file["labels"]  # not in an index of before: it is made anew
            facts = (file[name].tolist() for name in ("seekable", "stamp", "notes"))
            return Members(file["keys"], file["starts"], file["sizes"], *facts, labels)


def scan(url: str, cache: ShardCache | None = None) -> Members:
    """Read the headers of a shard. A tar that is cut short counts as far as it goes.

    Of members of the same key and field the first counts. Their data is sought over, not read.

    Raises:
        UserError: not a readable tar.
    """
    cache = cache or ShardCache()
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    twice: list[str] = []
    notes: list[str] = []
    seekable, sparse = True, 0
    try:
        seekable = not is_streamed(url, cache.patience)
        with open_tar(url, cache) as tar:
            for key, kind, member in named_members(tar):
                tar.members = []  # tarfile would keep them all
                if member.issparse():
                    sparse += 1
                    continue
                row = rows.setdefault(key, {})
                if kind in row:
                    twice.append(member.name)
                else:
                    row[kind] = (member.offset_data, member.size)
                    if kind == "cls":
                        labels[key] = _label_of(tar, member)
            if _anything_left(tar.fileobj):
                notes.append(
                    f"goes on after the mark that ends a tar, at byte {tar.offset}; nothing "
                    "behind it counts; fetch it again or write it as one tar"
                )
    except UNREADABLE as error:
        raise_if_machine(error, url)
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(":")
        if isinstance(error, OSError) and not rows:
            raise UserError(f"{url} cannot be read ({reason}); mend it or leave it out") from error
        if not rows:
            raise UserError(
                f"{url} is not a readable tar ({reason}); fetch it again or leave it out"
            ) from error
        notes.append(f"cut short ({reason}), {len(rows)} samples stand in it; fetch it again")
    if sparse:
        notes.append(f"{sparse} members are stored with holes and do not count; write it anew")
    alone = [f"{key}.{next(iter(row))}" for key, row in rows.items() if IMAGE not in row]
    if alone:
        notes.append(f"{len(alone)} samples have no image and do not count, such as {alone[0]}")
    if twice:
        notes.append(
            f"{len(twice)} members have the key and kind of an earlier one and do not count, such "
            f"as {twice[0]}"
        )
    kept = {key: row for key, row in rows.items() if IMAGE in row}
    kept = dict(sorted(kept.items(), key=lambda item: item[1][IMAGE][0]))
    table = np.array(
        [[row.get(name, (-1, 0)) for name in FIELDS] for row in kept.values()], np.int64
    ).reshape(-1, len(FIELDS), 2)
    keys = np.array([key.encode("utf-8", "backslashreplace") for key in kept], np.bytes_)
    numbers = np.array([labels.get(key, NO_LABEL) for key in kept], np.int64)
    stamp = stamp_of(url, cache)
    return Members(keys, table[:, :, 0], table[:, :, 1], seekable, stamp, notes, numbers)


@contextlib.contextmanager
def open_tar(url: str, cache: ShardCache | None = None) -> Iterator[tarfile.TarFile]:
    """A shard as a tar whose headers have to be whole; see :func:`sami.core.remote.open_shard`."""
    with (
        io.BufferedReader(open_shard(url, cache), HOP) as stream,
        tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar,
    ):
        yield tar


def named_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, field and header of what belongs to a sample."""
    for member in tar:
        named = split_name(member.name) if member.isreg() else None
        if named is not None:
            yield *named, member


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member's name; None if it is no part of a sample, or hidden.

    Dots belong to the key: ``a/b.v2.jpg`` is the image of ``a/b.v2``.
    """
    name = name.removeprefix("./")
    base = name.rpartition("/")[2]
    for extension, kind in EXTENSIONS.items():
        if base.lower().endswith(f".{extension}") and not base.startswith("."):
            return name[: -len(extension) - 1], kind
    return None


def parse_label(data: bytes) -> int:
    """The class number that a .cls member holds.

    Raises:
        ValueError: it holds none from 0 to under MAX_LABEL.
    """
    label = int(data[:LABEL_BYTES]) if len(data) <= LABEL_BYTES else BAD_LABEL
    if not 0 <= label < MAX_LABEL:
        raise ValueError("not a class number")
    return label


def _label_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """The class number in a member: it lies just behind the header, which was read anyway."""
    if member.size > LABEL_BYTES:
        return BAD_LABEL
    try:
        return parse_label(tar.extractfile(member).read())
    except (ValueError, tarfile.ReadError):  # the latter: cut off, as the next header will tell
        return BAD_LABEL


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a damaged one for the end, without a word.

    It also believes any size: a negative one sends it round in circles, a huge one overflows.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        return cls._plausible(super().frombuf(buf, encoding, errors))

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return cls._plausible(super().fromtarfile(tar))
        except tarfile.EOFHeaderError:  # the mark that ends a tar
            raise
        except tarfile.EmptyHeaderError as error:
            raise tarfile.ReadError("no end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    @staticmethod
    def _plausible(header: "_Header") -> "_Header":
        extended = header.type in EXTENDED_HEADERS  # tarfile reads these into memory
        if not 0 <= header.size < (MAX_EXTENDED if extended else MAX_MEMBER):
            raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")
        return header


def _anything_left(stream: BinaryIO) -> bool:
    """Whether there is more than padding up to the end of a stream."""
    return any(block.strip(b"\0") for block in iter(lambda: stream.read(1 << 20), b""))


def stamp_of(url: str, cache: ShardCache | None = None) -> str:
    """Changes when a shard does; what a program gives is taken to be fixed."""
    if by_fsspec(url):
        return describe(url, (cache or ShardCache()).patience).version
    if is_url(url):
        return ""
    status = os.stat(url)
    return f"{status.st_size}-{status.st_mtime_ns}"
