"""A cache of features on disk: its manifest, its checksums, and whether it fits a run.

The manifest is shared by all processes that fill a folder, under a lock, and tells what training
compares with its configuration. Beside it stands which shards were found to have their checksums,
so that a cache is read for that once, and not by every run of a sweep.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sami.core.checkpoint import sha256_of, write_text
from sami.core.config import require
from sami.core.errors import BadSample, UserError, not_written, raise_if_machine
from sami.core.images import open_image
from sami.core.index import Shard
from sami.core.locks import locked
from sami.core.network import is_url
from sami.core.paths import exists, is_file
from sami.core.reading import read_samples
from sami.core.scanning import IMAGE
from sami.features import Cache
from sami.teacher import TeacherConfig

MANIFEST, VERIFIED = "manifest.json", "verified.json"
FORMAT = 1
OVERHEAD = 3 * 512 + 700  # bytes of a member's header and padding, and of an npz around its arrays
READERS = 8  # shards that a process reads at once for their checksums
REMEDY = "bring it back, or delete the folder"  # of a manifest that is damaged


class Manifest:
    """The manifest of a folder of cached shards, shared by all processes that fill it."""

    def __init__(self, folder: Path, cache: Cache, preprocessing: dict[str, Any]) -> None:
        self.folder, self.cache, self.preprocessing = folder, cache, preprocessing
        self.path = folder / MANIFEST

    def claim(self, names: list[str], made: dict[str, Any]) -> None:
        """Put down that these shards are to be there.

        Raises:
            UserError: the folder holds features of another kind, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with changed(self.path, REMEDY) as content:
                self._compare(content.setdefault("cache", self.cache.header()))
                content.setdefault("format", FORMAT)
                content.setdefault("preprocessing", self.preprocessing)
                content.setdefault("made", made)
                shards = content.setdefault("shards", {})
                for name in names:
                    shards.setdefault(name, None)
        except OSError as error:
            raise not_written(error, str(self.folder), "name another --out") from error

    def finished(self) -> dict[str, dict[str, Any] | None]:
        """What stands there of each shard; None where it is not finished, or gone."""
        shards = json.loads(self.path.read_bytes())["shards"]
        return {name: one if is_file(self.folder / name) else None for name, one in shards.items()}

    def check(self) -> None:
        """
        Raises:
            UserError: the folder holds no features, or some of another kind.
        """
        self._compare(read_manifest(self.folder, whole=False)["cache"])

    def _compare(self, theirs: dict[str, Any]) -> None:
        own, theirs = asdict(self.cache), {"resize": "longest"} | theirs
        differing = next((name for name in own if own[name] != theirs.get(name)), None)
        require(
            differing is None,
            f"{self.folder} holds features with {differing} {theirs.get(differing)}, and "
            f"{own.get(differing)} is asked for; name another --out, or delete it",
        )

    def put(self, name: str, record: dict[str, Any] | None) -> None:
        """Put down that a shard is finished."""
        with changed(self.path, REMEDY) as content:
            content["shards"][name] = record


@contextlib.contextmanager
def changed(path: Path, remedy: str | None = None) -> Iterator[dict[str, Any]]:
    """A JSON file's content, written again at the end; one process at a time.

    Args:
        remedy: if it is damaged; None begins it anew.

    Raises:
        UserError: it is damaged.
        OSError: it cannot be written, or its file system knows no locks.
    """
    with locked(path.parent / f".{path.name}.lock"):
        content: dict[str, Any] = {}
        if exists(path):
            try:
                content = json.loads(path.read_bytes())
            except ValueError as error:
                if remedy is not None:
                    raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
        yield content
        write_text(path, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path, whole: bool = True) -> dict[str, Any]:
    """The manifest beside cached shards: ``format``, ``cache`` (:class:`Cache`), and ``shards``:
    by file name the number of ``samples``, what was ``left_out`` and the ``sha256``.

    Args:
        whole: all shards have to be there.

    Raises:
        UserError: none, unreadable, or the cache is still being written.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        cache, shards = manifest["cache"], manifest["shards"]
        Cache(**cache)
        pending = [name for name, record in shards.items() if record is None]
        number = manifest["format"]
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist, so these shards hold no cached features; make them with "
            "tools/cache_teacher.py, or set --teacher.cached false"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_if_machine(error, path)
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run tools/cache_teacher.py "
            "again, which keeps finished shards"
        ) from error
    require(number == FORMAT, f"{path} has format {number}, this code reads {FORMAT}")
    require(
        not (whole and pending),
        f"{folder} is still being written: {len(pending)} of {len(shards)} shards are missing, "
        f"such as {pending[0] if pending else ''}; let tools/cache_teacher.py end",
    )
    return manifest


def open_cache(
    shards: list[Shard],
    config: TeacherConfig,
    sha256: str | None,
    fallback: Path,
    say: Callable[[str], None] = print,
    part: tuple[int, int] | None = (0, 1),
) -> Cache:
    """The cache that some shards hold, if it is what a configuration asks for.

    Args:
        shards: those that are trained on and those that are held out.
        sha256: of teacher.checkpoint's weights; None if none was given.
        fallback: a folder of the run, which remembers which checksums were found right if the
            cache's own cannot be written.
        say: told when shards are read for it.
        part: (number, of): look only at every ``of``-th checksum, from ``number`` on: the ranks
            share the work. None: at none.

    Raises:
        UserError: no manifest, or one that tells of another teacher, or of other shards.
    """
    asked = {"name": config.name, "layer": config.layer, "image_size": config.image_size}
    if sha256 is not None:
        asked["sha256"] = sha256
    found: dict[Path, dict[str, Any]] = {}
    for shard in shards:
        require(
            not is_url(shard.url),
            f"{shard.url}: cached features are read from local shards; fetch it, or set "
            "--teacher.cached false",
        )
        path = Path(shard.url)
        if path.parent not in found:
            found[path.parent] = read_manifest(path.parent)
        names = found[path.parent]["shards"]
        require(
            path.name in names,
            f"{path} is not in {path.parent / MANIFEST}, which has {len(names)} other shards; "
            "cache it too, or leave it out of data.shards",
        )
    first = next(iter(found))
    own = asdict(Cache(**found[first]["cache"]))
    for folder, manifest in found.items():
        names, theirs = manifest["shards"], asdict(Cache(**manifest["cache"]))
        for name, value in asked.items():
            require(
                theirs[name] == value,
                f"{folder / MANIFEST} has features of teacher.{name} {theirs[name]}, and the "
                f"configuration asks for {value}; set teacher.{name} {theirs[name]}, or make "
                "another cache",
            )
        gone = [name for name in names if not exists(folder / name)]
        require(
            not gone,
            f"{folder / MANIFEST} names {len(names)} shards and {len(gone)} of them are not there, "
            f"such as {', '.join(gone[:1])}; bring them back, or run tools/cache_teacher.py again",
        )
        differing = [f"{k} {own[k]} and {theirs[k]}" for k in own if own[k] != theirs[k]]
        require(
            not differing,
            f"{first} and {folder} hold features of different kinds ({', '.join(differing)}); "
            "cache both alike",
        )
    if part is not None:
        check_sums(shards, found, fallback, say, part)
    return Cache(**own)


class Verified:
    """Which shards of a cache were found to have the checksum that its manifest tells.

    Each is known by size, time and inode, so that a copy of the folder is read anew.
    """

    def __init__(self, folder: Path, fallback: Path, say: Callable[[str], None]) -> None:
        """``fallback``: a folder to remember it in, if ``folder`` cannot be written."""
        number = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self.own, self.other = folder / VERIFIED, fallback / f"verified-{number}.json"
        self.say = say

    def read(self) -> dict[str, Any]:
        """By name what identifies the file that was found right."""
        found: dict[str, Any] = {}
        for file in (self.own, self.other):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found |= json.loads(file.read_bytes())
        return found

    def add(self, name: str, identity: list[Any]) -> None:
        """Remember it; what cannot be written into the cache's folder, into the run's."""
        if not exists(self.other):
            try:
                with changed(self.own) as content:
                    content[name] = identity
                return
            except OSError as error:
                self.say(
                    f"{self.own} cannot be written ({error.strerror}): checksums are remembered in "
                    f"{self.other.parent}, for this run alone"
                )
        self.other.parent.mkdir(parents=True, exist_ok=True)
        with changed(self.other) as content:
            content[name] = identity


def check_sums(
    shards: list[Shard],
    manifests: dict[Path, dict[str, Any]],
    fallback: Path,
    say: Callable[[str], None],
    part: tuple[int, int],
) -> None:
    """Whether each shard is the one that the manifest tells of; looked up before it is read.

    Args:
        part: see :func:`open_cache`. What another run has read meanwhile is not read again.

    Raises:
        UserError: one is another, or damaged.
    """
    verified = {folder: Verified(folder, fallback, say) for folder in manifests}
    found = {folder: one.read() for folder, one in verified.items()}
    paths, identities = sorted({Path(shard.url) for shard in shards}), {}
    for path in paths:
        status, sha256 = path.stat(), manifests[path.parent]["shards"][path.name]["sha256"]
        identities[path] = [status.st_size, status.st_mtime_ns, status.st_ino, sha256]
    unread = {path for path in paths if found[path.parent].get(path.name) != identities[path]}
    if unread:
        say(f"reading {len(unread)} cached shards for their checksums, once")
    number, of = part
    mine = [path for path in paths[number::of] if path in unread]
    start = os.getpid() % max(1, len(mine))  # runs that start together read different shards first
    mine = mine[start:] + mine[:start]

    def sum_of(path: Path) -> str | None:
        known = verified[path.parent].read().get(path.name)  # another run may have read it since
        return None if known == identities[path] else sha256_of(path)

    with ThreadPoolExecutor(READERS) as pool:
        for path, own in zip(mine, pool.map(sum_of, mine), strict=True):
            if own is None:
                continue
            wanted = identities[path][-1]
            if own != wanted:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f"{path} has the sha256 {own[:16]}... and {path.parent / MANIFEST} says "
                    f"{wanted[:16]}...; it was changed or damaged: delete it and run "
                    "tools/cache_teacher.py again"
                )
            verified[path.parent].add(path.name, identities[path])


def estimate_bytes(shards: list[Shard], cache: Cache, looked_at: int = 200) -> int:
    """Bytes of the shards that will be written, from the shapes of some images.

    Raises:
        UserError: none of these can be used.
    """
    sizes = []
    share = -(-looked_at // len(shards))
    for shard in shards[:looked_at]:
        rows = np.unique(np.linspace(0, shard.count - 1, min(share, shard.count)).astype(int))
        for sample in read_samples(shard, rows, (IMAGE,)):
            with contextlib.suppress(BadSample):
                size = open_image(sample.part(IMAGE)).upright
                sizes.append(cache.bytes_of(*size) + OVERHEAD)
    require(bool(sizes), f"{shards[0].url}: none of the images that were looked at can be used")
    images = sum(shard.count for shard in shards)
    return int(images * np.mean(sizes)) + sum(Path(shard.url).stat().st_size for shard in shards)


def require_room(folder: Path, needed: int) -> None:
    """
    Raises:
        UserError: the disk has less.
    """
    while not exists(folder):
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    require(
        needed <= free,
        f"about {needed / 1e9:.1f} GB are to be written and {folder} has {free / 1e9:.1f} GB free; "
        "make room, name another --out, or store less: --dtype int8, a smaller --grid",
    )
