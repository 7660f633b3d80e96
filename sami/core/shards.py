"""Tar shards: which samples stand in them, and reading these.

A *sample* is a picture (``<key>.jpg``, jpeg, png, webp) and what lies beside it under the same key:
``.json``, ``.cls``, ``.teacher.npz``. The headers of every shard are read once, into an index that
says where each member lies: so samples are counted before training, and one is read by seeking to
it. What cannot be sought in (a URL, a compressed tar) is read from its start.
"""

import contextlib
import glob
import hashlib
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset as wds
from webdataset.shardlists import expand_urls
from webdataset.tariterators import tar_file_iterator

from sami.core.errors import BadSample, UserError, raise_if_machine
from sami.core.images import IMAGE_EXTENSIONS
from sami.core.paths import exists
from sami.core.progress import follow

PICTURE, TEACHER = "picture", "teacher.npz"
FIELDS = (PICTURE, "json", "cls", TEACHER)  # the columns of an index
EXTENSIONS = dict.fromkeys(IMAGE_EXTENSIONS, PICTURE) | {name: name for name in FIELDS[1:]}
NO_LABEL, BAD_LABEL = -1, -2  # in an index: no .cls; one that is not a class number
MAX_LABEL = 2**31  # class numbers are below
LABEL_BYTES = 64  # of a .cls that is looked at
BLOCK = tarfile.BLOCKSIZE  # a member's header, just before its data
MAX_MEMBER = 1 << 48  # bytes; positions behind it stay far below what seeking can take
EXTENDED_HEADERS = (b"L", b"K", b"x", b"g", b"X")  # long names and the like
MAX_EXTENDED = 1 << 20  # bytes
UNREADABLE = (tarfile.TarError, OSError, EOFError, zlib.error)
DAMAGED_INDEX = (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile)
SHOWN_NOTES = 10
# Shards that a process holds open: many systems allow 256 files, and workers take some for pipes.
OPEN = 64


@dataclass(frozen=True)
class Shard:
    """One tar. ``name`` begins the keys of its samples: its file name without ``.tar``."""

    url: str
    name: str
    index: Path
    count: int
    digest: str

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


@dataclass
class Members:
    """Where the samples of a shard lie, in the order of their pictures.

    ``keys`` [n] bytes; ``starts`` [n, F] where the data of each of FIELDS begins, in bytes from
    the shard's start, -1 where there is none; ``sizes`` [n, F] its bytes, 0 where there is none.
    ``seekable`` tells whether these positions can be read directly; ``notes`` what is odd.
    ``labels`` [n] class numbers, NO_LABEL or BAD_LABEL.
    """

    keys: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    seekable: bool
    stamp: str
    notes: list[str]
    labels: np.ndarray

    def bytes(self, fields: tuple[str, ...]) -> np.ndarray:
        """[n] bytes of a sample's ``fields`` together."""
        return self.sizes[:, [FIELDS.index(name) for name in fields]].sum(1)

    def digest(self) -> str:
        """Names the samples, wherever the shard lies."""
        return hashlib.sha256(b"\n".join(self.keys) + self.sizes.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """As npz, atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez(file, **vars(self))
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "Members":
        with path.open("rb") as stream, np.load(stream) as file:
            labels = np.full(len(file["keys"]), NO_LABEL, np.int64)
            if (file["sizes"][:, FIELDS.index("cls")] > 0).any():
                labels = file["labels"]  # not in an index of before: it is made anew
            return Members(
                file["keys"],
                file["starts"],
                file["sizes"],
                bool(file["seekable"]),
                str(file["stamp"]),
                file["notes"].tolist(),
                labels,
            )


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
            raise BadSample(self.reason or f"no {name}" + " member" * (name != PICTURE))
        return self.parts[name]


def expand(
    patterns: str | list[str] | dict[str, float], key: str
) -> list[tuple[list[str], float | None]]:
    """Paths or URLs of shards from braces and globs, in order, each once; with their weights.

    Args:
        patterns: one pattern, several, or several with weights, such as
            ``train-{000..127}.tar`` or ``{"a/sa_*.tar": 3, "b/*.tar": 1}``.
        key: the configuration key to name in an error.

    Returns:
        One (shards, None), or one (shards, share of the samples) for each weighted pattern.

    Raises:
        UserError: a pattern that matches nothing, names a file that is not there, or, with
            weights, a shard of another pattern.
    """
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    if not names or not all(names):
        raise UserError(f"{key} is empty; give the shards, for example --{key} 'data/train-*.tar'")
    weights = patterns if isinstance(patterns, dict) else {}
    for name, weight in weights.items():
        if not weight > 0:
            raise UserError(f"{key}: the weight {weight} of '{name}' must be positive")
    found = {name: list(dict.fromkeys(_expand_one(name, key))) for name in names}
    if not weights:
        return [(list(dict.fromkeys(url for urls in found.values() for url in urls)), None)]
    owner: dict[str, str] = {}
    for name, urls in found.items():
        for url in urls:
            if owner.setdefault(url, name) != name:
                raise UserError(
                    f"{key}: {url} belongs to '{owner[url]}' and to '{name}'; with weights, the "
                    "patterns may not share a shard"
                )
    total = sum(weights.values())
    return [(found[name], weights[name] / total) for name in names]


def open_sources(
    groups: list[tuple[list[str], float | None]],
    folder: Path,
    say: Callable[[str], None] = print,
    build: tuple[int, int] = (0, 1),
) -> list[Source]:
    """The shards of :func:`expand` with their indexes, which are made where there are none.

    An index lies beside its shard (``<shard>.index.npz``, from tools/index_shards.py) or in
    ``folder``. A shard whose size or time differs from its index's is read again.

    Args:
        say: told what is worth telling, such as a shard that is cut short.
        build: (number, of): make only every ``of``-th missing index, from ``number`` on; the
            ranks share the work, and call again with the default afterwards.

    Raises:
        UserError: a shard is not a readable tar, or none holds a picture.
    """
    urls = [url for group, _ in groups for url in group]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [url for url in urls if _find_index(url, folder) is None]
    number, of = build
    if len(missing) > 100 and number == 0:
        say(f"reading the headers of {len(missing)} shards, once")
    mine = missing[number::of]
    with ThreadPoolExecutor(8) as pool:
        scanned = zip(mine, pool.map(scan, mine), strict=True)
        for url, members in follow(scanned, "shard", len(mine), say):
            members.save(_index_path(url, folder))
    if of > 1:
        return []
    names = _names(urls)
    shards, notes = {}, []
    for url in urls:
        index, members = _find_index(url, folder)
        shards[url] = Shard(url, names[url], index, len(members.keys), members.digest())
        notes += [f"{url}: {note}" for note in members.notes]
    for note in notes[:SHOWN_NOTES]:
        say(note)
    if len(notes) > SHOWN_NOTES:
        say(f"... and {len(notes) - SHOWN_NOTES} more remarks of this kind")
    sources = [Source([shards[url] for url in group], weight) for group, weight in groups]
    for source in sources:
        if not source.count:
            first, others = source.shards[0].url, len(source.shards) - 1
            raise UserError(
                f"{first} {f'and the other {others} shards hold' if others else 'holds'} no "
                f"picture ({', '.join(IMAGE_EXTENSIONS)}); make shards with tools/make_shards.py"
            )
    return sources


def fingerprint(sources: list[Source]) -> str:
    """Names the samples of shards wherever they lie: a hash over names, keys and sizes."""
    digest = hashlib.sha256()
    for shard in (shard for source in sources for shard in source.shards):
        digest.update(os.fsencode(f"{shard.name} {shard.digest}\n"))
    return digest.hexdigest()[:16]


def scan(url: str) -> Members:
    """Read the headers of a shard. A tar that is cut short counts as far as it goes.

    Of members of the same key and field the first counts. The data of a file's members is sought
    over, not read.

    Raises:
        UserError: not a readable tar.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    labels: dict[str, int] = {}
    twice: list[str] = []
    notes: list[str] = []
    seekable = not is_url(url)
    try:
        with _open(url) as stream:
            mode = "r:*" if seekable else "r|*"
            with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header) as tar:
                seekable = seekable and tar.fileobj is stream  # not so if it is decompressed
                for member in tar:
                    tar.members = []  # tarfile would keep them all
                    named = split_name(member.name) if member.isreg() else None
                    if named is None:
                        continue
                    seekable = seekable and not member.issparse()
                    row = rows.setdefault(named[0], {})
                    if named[1] in row:
                        twice.append(member.name)
                    else:
                        row[named[1]] = (member.offset_data, member.size)
                        if named[1] == "cls":
                            labels[named[0]] = _label_of(tar, member)
                if _anything_left(tar.fileobj):
                    notes.append(
                        f"goes on after the mark that ends a tar, at byte {tar.offset}; nothing "
                        "behind it counts; fetch it again or write it as one tar"
                    )
    except UNREADABLE as error:
        raise_if_machine(error, url)
        words = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(":")
        ended = re.search(r"exit (\d+) \(read\)", words)  # webdataset's words are its whole call
        words = f"the program that opens it ended with {ended[1]}" if ended else words
        if isinstance(error, OSError) and not rows:
            raise UserError(f"{url} cannot be read ({words}); mend it or leave it out") from error
        if not rows:
            raise UserError(
                f"{url} is not a readable tar ({words}); fetch it again or leave it out"
            ) from error
        notes.append(f"cut short ({words}), {len(rows)} samples stand in it; fetch it again")
    alone = [f"{key}.{next(iter(row))}" for key, row in rows.items() if PICTURE not in row]
    if alone:
        notes.append(f"{len(alone)} samples have no picture and do not count, such as {alone[0]}")
    if twice:
        notes.append(
            f"{len(twice)} members have the key and kind of an earlier one and do not count, such "
            f"as {twice[0]}"
        )
    kept = {key: row for key, row in rows.items() if PICTURE in row}
    kept = dict(sorted(kept.items(), key=lambda item: item[1][PICTURE][0]))
    table = np.array(
        [[row.get(name, (-1, 0)) for name in FIELDS] for row in kept.values()], np.int64
    ).reshape(-1, len(FIELDS), 2)
    keys = np.array([key.encode("utf-8", "backslashreplace") for key in kept], np.bytes_)
    numbers = np.array([labels.get(key, NO_LABEL) for key in kept], np.int64)
    return Members(keys, table[:, :, 0], table[:, :, 1], seekable, stamp_of(url), notes, numbers)


class Reader:
    """Reads samples by shard and row, where they lie; a few shards and their indexes stay open.

    Each process opens its own. What cannot be sought in is read from its start each time.
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
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(part):
                yield from zip(
                    part.tolist(), self._of_shard(int(shards[part[0]]), rows[part]), strict=True
                )

    def _of_shard(self, number: int, rows: np.ndarray) -> Iterator[RawSample]:
        shard, members = self.shards[number], self._index(number)
        if not members.seekable:
            yield from _read_through(shard, members, rows, self._columns)
            return
        for row in rows.tolist():
            key = key_of(shard, members, row)
            try:
                file, size = self._file(number)
                yield RawSample(key, _read_parts(file, size, members, row, self._columns))
            except OSError as error:
                raise_if_machine(error, shard.url)
                yield RawSample(key, reason="shard cannot be read")
            except BadSample as error:
                yield RawSample(key, reason=str(error))

    def _index(self, number: int) -> "Members":
        if number not in self._members:
            self._members[number] = self.shards[number].members()
            if len(self._members) > self._most:
                self._members.popitem(last=False)
        self._members.move_to_end(number)
        return self._members[number]

    def _file(self, number: int) -> tuple[int, int]:
        """A shard's open file and its size; one that was replaced or deleted is opened anew."""
        if number in self._files:
            status = os.fstat(self._files[number].fileno())
            if status.st_nlink:
                self._files.move_to_end(number)
                return self._files[number].fileno(), status.st_size
            self._files.pop(number).close()
        file = self._files[number] = open(self.shards[number].url, "rb", buffering=0)
        if len(self._files) > OPEN:
            self._files.popitem(last=False)[1].close()
        return file.fileno(), os.fstat(file.fileno()).st_size


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


def read_whole(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample of a local shard: its key, and its members under their own names.

    In the order of their pictures, as far as the tar goes. Of members of the same key and field
    the first counts; a sample that is cut off has no members.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        opened = tarfile.open(path, tarinfo=_Header)
    except OSError as error:
        raise_if_machine(error, path)
        raise
    with opened as tar:
        with _as_far_as_it_goes(path):
            for member in tar:
                named = split_name(member.name) if member.isreg() else None
                if named is not None:
                    groups.setdefault(named[0], {}).setdefault(named[1], member)
        kept = [(key, row) for key, row in groups.items() if PICTURE in row]
        for key, row in sorted(kept, key=lambda item: item[1][PICTURE].offset_data):
            members = {}
            with _as_far_as_it_goes(path):
                members = {info.name: tar.extractfile(info).read() for info in row.values()}
            yield key, members


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field of a member's name; None if it is no part of a sample, or hidden.

    Dots belong to the key: ``a/b.v2.jpg`` is the picture of ``a/b.v2``.
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


def is_url(path: str) -> bool:
    """Whether webdataset opens this through something else than the file system."""
    return "://" in path or path.startswith("pipe:") or path == "-"


def _open(url: str) -> BinaryIO:
    """A shard's bytes; a local path is taken as it is, whatever characters it has."""
    return wds.gopen(url) if is_url(url) else open(url, "rb")


@contextlib.contextmanager
def _as_far_as_it_goes(path: str) -> Iterator[None]:
    """Damage ends what is inside without a word; an error of the machine does not."""
    try:
        yield
    except UNREADABLE as error:
        raise_if_machine(error, path)


def _read_parts(
    file: int, size: int, members: "Members", row: int, columns: list[int]
) -> dict[str, bytes]:
    """The members of one sample by field.

    Args:
        file: open; ``size`` its bytes.

    Raises:
        BadSample: they are not what the index says.
    """
    spans = {}
    for column in columns:
        start, length = int(members.starts[row, column]), int(members.sizes[row, column])
        if start >= 0:
            if start + length > size:
                raise BadSample("cut off in shard")  # not after making room for it
            spans[FIELDS[column]] = start - BLOCK, start + length
    parts = {}
    for field_, (start, end) in spans.items():
        parts[field_] = _checked(_read_at(file, start, end - start), end - start - BLOCK)
    return parts


def _read_at(file: int, start: int, count: int) -> bytes:
    """So many bytes from a place on, fewer where the file ends."""
    data = os.pread(file, count, start)
    while len(data) < count:  # the kernel gives at most 2 GB at once
        more = os.pread(file, count - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def _read_through(
    shard: Shard, members: Members, rows: np.ndarray, columns: list[int]
) -> Iterator[RawSample]:
    """Members in the order of the tar, put together to samples."""
    number = {_name(members.keys[row]): row for row in rows}
    wanted = {
        (row, FIELDS[column])
        for row in rows
        for column in columns
        if members.starts[row, column] >= 0
    }
    lacking = Counter(row for row, _ in wanted)
    parts: dict[int, dict[str, bytes]] = {row: {} for row in rows}

    def place(name: str) -> tuple[int, str] | None:
        key, kind = split_name(name) or ("", "")
        row = number.get(_name(key.encode("utf-8", "backslashreplace")))
        return (row, kind) if (row, kind) in wanted else None

    next_row, reason = 0, "missing in shard"
    try:
        with _open(shard.url) as stream:
            for member in tar_file_iterator(
                stream, skip_meta=None, select_files=lambda name: place(name) is not None
            ):
                row, kind = place(member["fname"])
                wanted.discard((row, kind))
                parts[row][kind] = member["data"]
                lacking[row] -= 1
                while next_row < len(rows) and lacking[rows[next_row]] == 0:
                    row = rows[next_row]
                    yield RawSample(key_of(shard, members, row), parts.pop(row))
                    next_row += 1
                if next_row == len(rows):
                    return
    except UNREADABLE as error:
        raise_if_machine(error, shard.url)
        reason = "shard cannot be read"
    for row in rows[next_row:]:
        whole = lacking[row] == 0
        yield RawSample(
            key_of(shard, members, row), parts[row] if whole else {}, "" if whole else reason
        )


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


def _checked(data: bytes, size: int) -> bytes:
    """The data behind its header, if the two are what the index says."""
    if len(data) < BLOCK + size:
        raise BadSample("cut off in shard")
    try:
        header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    if header is None or header.size != size:
        raise BadSample("shard changed since it was indexed")
    return data[BLOCK:]


def key_of(shard: Shard, members: Members, row: int) -> str:
    """A sample's key, as logs have it."""
    return f"{shard.name}/{_name(members.keys[row])}"


def _name(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _expand_one(pattern: str, key: str) -> list[str]:
    if os.path.lexists(pattern):  # a file of just this name, whatever its characters mean elsewhere
        expanded = [os.path.abspath(pattern) if is_url(pattern) else pattern]
    else:
        expanded = [re.sub(r"^file:(//)?", "", path) for path in expand_urls(pattern)]
    local = [path for path in expanded if not is_url(path)]
    matches = {path: _matching(path) for path in local}
    missing = [path for path, files in matches.items() if not files]
    folder = next((path for path in matches if os.path.isdir(path)), None)
    if folder is not None:
        raise UserError(f"{key}: {folder} is a folder; name the shards in it: {folder}/*.tar")
    if len(missing) == len(expanded):
        raise UserError(
            f"{key}: '{pattern}' matches no file; fetch the shards, make them with "
            "tools/make_shards.py, or correct the pattern ([, ] and * in it match characters)"
        )
    if missing:
        raise UserError(
            f"{key}: {len(missing)} of the {len(expanded)} shards of '{pattern}' are missing, "
            f"the first is {missing[0]}; fetch them or narrow the pattern"
        )
    found = [
        os.path.normpath(file) if path in matches else file
        for path in expanded
        for file in matches.get(path, [path])
    ]
    for file in found:
        if not is_url(file) and not exists(file):
            raise UserError(
                f"{key}: {file} is a symbolic link to {os.readlink(file)}, which does not exist; "
                "mend the link or leave it out"
            )
    return found


def _matching(pattern: str) -> list[str]:
    """The files that a path or a glob means, a dangling link too."""
    if os.path.lexists(pattern):
        return [pattern]
    place = pattern
    while glob.has_magic(place):  # glob takes a folder that it may not list for an empty one
        place, last = os.path.split(place)
        if glob.has_magic(last):
            for folder in glob.glob(place) if glob.has_magic(place) else [place or "."]:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    os.scandir(folder).close()
    exists(pattern)  # as for os.path.lexists, no permission is the same to it as not there
    return sorted(glob.glob(pattern))


def _names(urls: list[str]) -> dict[str, str]:
    """File names without ``.tar``, preceded by as many folders as make them differ."""
    parts = {url: _path_of(url).rstrip("/ ").split("/") for url in urls}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {url: "/".join(part[-depth:]) for url, part in parts.items()}
        names = {url: re.sub(r"\.tar(\.\w+)?$|\.tgz$", "", name) for url, name in names.items()}
        if len(set(names.values())) == len(urls):
            return names
    return {url: url for url in urls}


def _path_of(url: str) -> str:
    """Without what follows the path of a URL."""
    return url.split("?")[0] if is_url(url) else url


def _index_path(url: str, folder: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(os.path.abspath(url))).hexdigest()[:8]
    return folder / f"{Path(_path_of(url)).name[-80:]}-{digest}.npz"


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


def stamp_of(url: str) -> str:
    """Changes when a local shard does; a URL's content is taken to be fixed."""
    if is_url(url):
        return ""
    status = os.stat(url)
    return f"{status.st_size}-{status.st_mtime_ns}"


def _find_index(url: str, folder: Path) -> tuple[Path, Members] | None:
    beside = [] if is_url(url) else [index_beside(url)]
    for path in (*beside, _index_path(url, folder)):
        members = stored_index(path, stamp_of(url))
        if members is not None:
            return path, members
    return None
