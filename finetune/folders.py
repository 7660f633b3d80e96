"""Files below a folder, and the files that names in another file mean.

Names that a user chose are joined here, so here is looked for what does not fit: names that differ
in case or in their Unicode form, two files for one name, links that lead nowhere.
"""

import errno
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sami.core.config import require
from sami.core.errors import BadSample, UserError, raise_if_machine
from sami.core.images import IMAGE_EXTENSIONS, open_image

# By their names; shards keep the first four kinds as they are (IMAGE_EXTENSIONS).
EXTENSIONS = (*IMAGE_EXTENSIONS, "jpe", "jfif", "bmp", "dib", "gif", "tif", "tiff")
# What systems and tools leave in folders, besides names with a dot in front.
SYSTEM = {
    "__macosx", "@eadir", "#recycle", "@recycle", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "desktop.ini", "__pycache__",
}  # fmt: skip
LISTED = 10  # names in a message


@dataclass
class Listing:
    """The files below a folder, in the order of their paths, with forward slashes.

    ``remarks`` are (path, reason) of what could not be followed.
    """

    files: list[str]
    remarks: list[tuple[str, str]] = field(default_factory=list)


def walk(folder: Path) -> Listing:
    """List a folder; links are followed, hidden and system files and folders passed over.

    Raises:
        UserError: it is not a folder, or cannot be listed.
    """
    require(folder.is_dir(), f"{folder} is not a folder; name the one with the images")
    listing = Listing([])

    def refuse(error: OSError) -> None:
        raise_if_machine(error, error.filename)
        raise UserError(
            f"{error.filename} cannot be listed ({error.strerror}); mend that, or move it away"
        ) from error

    above = {str(folder): {_inode(folder)}}  # of each folder, itself and those that it lies in
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        names, above_it = (
            [n for n in sorted(folders) + sorted(files) if not is_hidden(n)],
            above.pop(place),
        )
        folders[:] = []  # of these, only what is appended below is listed
        for name in names:
            path = os.path.join(place, name)
            relative = Path(path).relative_to(folder).as_posix()
            if not os.path.exists(path):
                listing.remarks.append((relative, "a link that leads nowhere"))
            elif not os.path.isdir(path):
                listing.files += [relative] * os.path.isfile(path)
            elif (inode := _inode(path)) in above_it:
                reason = f"a link to a folder that it lies in, {os.path.realpath(path)}"
                listing.remarks.append((relative, reason))
            else:
                folders.append(name)
                above[path] = {*above_it, inode}
    listing.files.sort(key=lambda name: name.split("/"))
    return listing


def _inode(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's or a tool's own, not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM


def find_images(folder: Path) -> tuple[Listing, Counter[str]]:
    """The images of a folder: by their names, or, without an extension, by their content.

    Returns:
        And the other files, counted by extension.

    Raises:
        UserError: no folder, or no image in it.
    """
    listing, others, images = walk(folder), Counter(), []
    for name in listing.files:
        extension = extension_of(name)
        if extension in EXTENSIONS or not extension and _is_image(folder / name):
            images.append(name)
        else:
            others[f".{extension}" if extension else "without an extension"] += 1
    rest = f"; {count_words(others)} other files" if others else ""
    rest += f"; {len(listing.remarks)} links lead nowhere" if listing.remarks else ""
    require(
        bool(images),
        f"{folder} holds no image ({', '.join(EXTENSIONS)}){rest}; name the folder of the images",
    )
    return Listing(images, listing.remarks), others


def extension_of(name: str) -> str:
    """In lower case, without the dot; empty if there is none."""
    return posixpath.splitext(name)[1].lower().lstrip(".")


def _is_image(path: Path) -> bool:
    try:
        open_image(path.read_bytes())
    except BadSample:
        return False
    return True


def count_words(counts: Counter[str]) -> str:
    """Counts in words, the largest first."""
    return listed([f"{count} {name}" for name, count in counts.most_common()], "kinds more")


def listed(words: list[str], more: str = "more") -> str:
    """The first few of some words, and how many ``more`` there are."""
    rest = f" and {len(words) - LISTED} {more}" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + rest


def read_file(path: Path, option: str, remedy: str = "name another file") -> bytes:
    """What a file holds that an option names.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise_if_machine(error, path)
        raise UserError(f"{option} {path} cannot be read ({error.strerror}); {remedy}") from error


def read_image(path: Path) -> bytes:
    """What the file of an image holds.

    Raises:
        BadSample: it is not there, or cannot be read for a reason that is its own.
        MachineError: the machine cannot read it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise_if_machine(error, path)
        gone = "gone since the folder was listed" if error.errno == errno.ENOENT else error.strerror
        raise BadSample(f"unreadable ({gone})") from error


# ---- Names in a file, files in a folder


def plain_path(name: str) -> str:
    """A path with forward slashes, no detours, in Unicode's composed form."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))


def as_text(name: str) -> str:
    """A file's name in Unicode, if it is UTF-8, in whatever locale it was listed.

    Under LC_ALL=C, without Python's UTF-8 mode, the bytes of what is not ASCII come as escapes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def fold(name: str) -> list[str]:
    """The parts of a path without what differs between systems: case and Unicode form."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", as_text(name)).casefold())
    return [part for part in folded.split("/") if part not in ("", ".", "..")] or [""]


@dataclass
class FoundFiles:
    """Where the files lie that a list names.

    ``files``: path below the folder by name; ``moved``: what was found under another folder, in
    words; ``counted``: how many of the names that were only counted have a file.
    """

    files: dict[str, str]
    moved: list[str] = field(default_factory=list)
    counted: int = 0


# Files with the parts of their paths, by the last part, with (True) and without extension.
ByLast = dict[tuple[str, bool], list[tuple[str, list[str]]]]


def find_files(names: list[str], folder: Path, counted: Sequence[str] = ()) -> FoundFiles:
    """Find the files that ``names`` (of :func:`plain_path`) mean.

    A name is a path below the folder. One that leads nowhere is looked for with the escapes of URLs
    undone, in another case or Unicode form, without its extension if it has none itself; then,
    unless other names with folders in them lead somewhere, under other folders: the file with the
    longest common end of the path.

    Args:
        counted: more names, of which no more is asked than how many have a file.

    Raises:
        UserError: two files for one of ``names``, or two of them for one file.
    """
    require(folder.is_dir(), f"{folder} is not a folder; name the one with the images")
    found = FoundFiles({n: n for n in names if not n.startswith("/") and (folder / n).is_file()})
    lacking = [name for name in names if name not in found.files]
    others = [name for name in counted if name.startswith("/") or not (folder / name).is_file()]
    found.counted = len(counted) - len(others)
    if not lacking and not others:
        return found
    anywhere = not any("/" in name for name in found.files)
    taken, by_last, owner = set(found.files.values()), defaultdict(list), {}
    for file in walk(folder).files:
        if file not in taken:
            parts = fold(file)
            by_last[parts[-1], True].append((file, parts))
            if extension_of(file) in EXTENSIONS:
                by_last[posixpath.splitext(parts[-1])[0], False].append((file, parts))
    for number, name in enumerate([*lacking, *others]):
        best = _best(name, by_last, anywhere or "/" not in name or name.startswith("/"))
        absolute = not best and name.startswith("/") and Path(name).is_file()
        if number >= len(lacking):
            free = [file for file in best if file not in owner][:1]
            owner.update(dict.fromkeys(free, name))
            found.counted += bool(free) or absolute
        elif absolute:
            found.files[name] = name
        elif len(best) > 1:
            raise UserError(
                f"'{name}' could be {best[0]} or {best[1]} in {folder}; name the folder that the "
                "names are relative to, or write the folders into them"
            )
        elif best and best[0] in owner:
            raise UserError(
                f"'{owner[best[0]]}' and '{name}' could both be {best[0]} in {folder}; name the "
                "folder that the names are relative to"
            )
        elif best:
            owner[best[0]], found.files[name] = name, best[0]
            if len(fold(best[0])) != len(fold(name)):
                found.moved.append(f"'{name}' is {best[0]}")
    return found


def _best(name: str, by_last: ByLast, anywhere: bool) -> list[str]:
    """The files that a name fits best; several if it cannot be known.

    Args:
        anywhere: in another folder than the name says, too.
    """
    for form in dict.fromkeys((name, _unescaped(name))):
        parts = fold(form)
        near = [
            (_common(parts[:-1], other[:-1]), other, file)
            for whole in ((True,) if extension_of(form) in EXTENSIONS else (True, False))
            for file, other in by_last.get((parts[-1], whole), [])
        ]
        best = [file for _, other, file in near if other[:-1] == parts[:-1]]
        if not best and anywhere:
            longest = max((common for common, _, _ in near), default=0)
            best = [file for common, _, file in near if common == longest]
        if best:
            return best
    return []


def _common(one: list[str], other: list[str]) -> int:
    """Parts that two paths have in common at their ends."""
    return len(os.path.commonprefix([one[::-1], other[::-1]]))


def _unescaped(name: str) -> str:
    """A name that was written as a URL, or as a part of one."""
    if re.match(r"[a-z0-9+]+:/", name):
        name = urlsplit(name).path
    return plain_path(unquote(name))
