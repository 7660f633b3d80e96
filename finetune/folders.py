"""Folders of pictures: their files, the files that other files name, and the classes.

Names that a user chose are joined here, so here is looked for what does not fit: names that differ
in case or in their Unicode form, two files for one name, folders that are no classes.
"""

import csv
import difflib
import io
import json
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scipy.io import loadmat

from sami.core.config import require
from sami.core.errors import BadSample, UserError, raise_if_machine
from sami.core.images import IMAGE_EXTENSIONS, open_image
from sami.core.labels import CLASSES
from sami.core.shards import expand

# By their names; shards keep the first four kinds as they are (IMAGE_EXTENSIONS).
PICTURES = (*IMAGE_EXTENSIONS, "jpe", "jfif", "bmp", "dib", "gif", "tif", "tiff")
# What systems and tools leave in folders, besides names with a dot in front.
SYSTEM = {
    "__macosx", "@eadir", "#recycle", "@recycle", "lost+found", "$recycle.bin",
    "system volume information", "thumbs.db", "desktop.ini", "__pycache__",
}  # fmt: skip
# Words of which the names of folders between the source and its classes are made.
LEVELS = set(
    "all data dataset datasets dev eval evaluation image images imagenet img imgs jpeg jpegimages "
    "jpegs jpg photo photos pic pics picture pictures raw set split splits test testing train "
    "training trainval val valid validation".split()
)
SHOWN = 10  # names in a message
HEADS = {  # of the second column of a CSV of labels
    "predictionstring", "class", "classes", "class_name", "label", "labels", "target", "category",
    "synset", "wnid", "id", "class_id", "label_id",
}  # fmt: skip


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
        UserError: it is not a folder.
    """
    require(folder.is_dir(), f"{folder} is not a folder; name the one with the pictures")
    listing = Listing([])

    def visit(path: str, above: tuple[tuple[int, int], ...]) -> None:
        place = folder / path
        try:
            status = place.stat()
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise_if_machine(error, place)
            raise UserError(
                f"{place} cannot be listed ({error.strerror}); mend that, or move it away"
            ) from error
        above = (*above, (status.st_dev, status.st_ino))
        for entry in found:
            if is_hidden(entry.name):
                continue
            name = f"{path}/{entry.name}" if path else entry.name
            if entry.is_symlink() and not os.path.exists(entry.path):
                listing.remarks.append((name, "a link that leads nowhere"))
            elif entry.is_dir():
                status = os.stat(entry.path)
                if (status.st_dev, status.st_ino) in above:
                    reason = f"a link to a folder that it lies in, {os.path.realpath(entry.path)}"
                    listing.remarks.append((name, reason))
                else:
                    visit(name, above)
            elif entry.is_file():
                listing.files.append(name)

    visit("", ())
    listing.files.sort(key=lambda name: name.split("/"))
    return listing


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's or a tool's own, not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM


def find_pictures(folder: Path) -> tuple[Listing, Counter[str]]:
    """The pictures of a folder: by their names, or, without an extension, by their content.

    Returns:
        And the other files, counted by extension.

    Raises:
        UserError: no folder, or no picture in it.
    """
    listing, others = walk(folder), Counter()
    pictures = []
    for name in listing.files:
        extension = extension_of(name)
        if extension in PICTURES or not extension and _is_picture(folder / name):
            pictures.append(name)
        else:
            others[f".{extension}" if extension else "without an extension"] += 1
    told = f"; {told_counts(others)} other files" if others else ""
    links = f"; {len(listing.remarks)} links lead nowhere" if listing.remarks else ""
    require(
        bool(pictures),
        f"{folder} holds no picture ({', '.join(PICTURES)}){told}{links}; name "
        "the folder of the pictures",
    )
    return Listing(pictures, listing.remarks), others


def extension_of(name: str) -> str:
    """In lower case, without the dot; empty if there is none."""
    return posixpath.splitext(name)[1].lower().lstrip(".")


def _is_picture(path: Path) -> bool:
    try:
        open_image(path.read_bytes())
    except BadSample:
        return False
    return True


def told_counts(counts: Counter[str], most: int = SHOWN) -> str:
    """Counts in words, the largest first."""
    told = [f"{count} {name}" for name, count in counts.most_common(most)]
    return ", ".join(told) + (f" and {len(counts) - most} kinds more" if len(counts) > most else "")


# ---- Names in a file, files in a folder


def plain_path(name: str) -> str:
    """A path with forward slashes, no detours, in Unicode's composed form."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.strip().replace("\\", "/")))


def as_text(name: str) -> str:
    """A file's name in Unicode, if it is UTF-8, in whatever locale it was listed.

    Under LC_ALL=C, without Python's UTF-8 mode, the bytes of what is not ASCII come as escapes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


@dataclass
class FoundFiles:
    """Where the files lie that a list names.

    ``files``: path below the folder by name; ``moved``: what was found under another folder, as it
    is told; ``counted``: how many of the names that were only counted have a file.
    """

    files: dict[str, str]
    moved: list[str] = field(default_factory=list)
    counted: int = 0


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
    require(folder.is_dir(), f"{folder} is not a folder; name the one with the pictures")
    found = FoundFiles({n: n for n in names if not n.startswith("/") and (folder / n).is_file()})
    lacking = [name for name in names if name not in found.files]
    others = [name for name in counted if name.startswith("/") or not (folder / name).is_file()]
    found.counted = len(counted) - len(others)
    if not lacking and not others:
        return found
    anywhere = not any("/" in name for name in found.files)
    taken = set(found.files.values())
    by_last: dict[tuple[str, bool], list[tuple[str, list[str]]]] = defaultdict(list)
    for file in walk(folder).files:
        if file not in taken:
            parts = _loose(file)
            by_last[parts[-1], True].append((file, parts))
            if extension_of(file) in PICTURES:
                by_last[posixpath.splitext(parts[-1])[0], False].append((file, parts))
    owner: dict[str, str] = {}
    for name in lacking:
        best = _best(name, by_last, anywhere or "/" not in name or name.startswith("/"))
        if not best:
            if name.startswith("/") and Path(name).is_file():
                found.files[name] = name
            continue
        if len(best) > 1:
            raise UserError(
                f"'{name}' could be {best[0]} or {best[1]} in {folder}; name the folder that the "
                "names are relative to, or write the folders into them"
            )
        if best[0] in owner:
            raise UserError(
                f"'{owner[best[0]]}' and '{name}' could both be {best[0]} in {folder}; name the "
                "folder that the names are relative to"
            )
        owner[best[0]], found.files[name] = name, best[0]
        if len(_loose(best[0])) != len(_loose(name)):
            found.moved.append(f"'{name}' is {best[0]}")
    for name in others:
        best = _best(name, by_last, anywhere or "/" not in name or name.startswith("/"))
        free = [file for file in best if file not in owner]
        owner.update({free[0]: name} if free else {})
        found.counted += bool(free) or not best and name.startswith("/") and Path(name).is_file()
    return found


def _best(
    name: str, by_last: dict[tuple[str, bool], list[tuple[str, list[str]]]], anywhere: bool
) -> list[str]:
    """The files that a name fits best; several if it cannot be told.

    Args:
        by_last: files by the last part of their path, with (True) and without extension.
        anywhere: in another folder than the name says, too.
    """
    for form in dict.fromkeys((name, _unescaped(name))):
        parts = _loose(form)
        near = [
            (1 + _common(parts[:-1], other[:-1]), len(other) == len(parts), file)
            for whole in ((True,) if extension_of(form) in PICTURES else (True, False))
            for file, other in by_last.get((parts[-1], whole), [])
        ]
        best = [file for common, same, file in near if same and common == len(parts)]
        if not best and anywhere:
            longest = max((common for common, _, _ in near), default=0)
            best = [file for common, _, file in near if common == longest]
        if best:
            return best
    return []


def _loose(name: str) -> list[str]:
    """The parts of a path without what differs between systems: case and Unicode form."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", as_text(name)).casefold())
    return [part for part in folded.split("/") if part not in ("", ".", "..")] or [""]


def _unescaped(name: str) -> str:
    """A name that was written as a URL, or as a part of one."""
    if re.match(r"[a-z0-9+]+:/", name):
        name = urlsplit(name).path
    return plain_path(unquote(name))


def _common(one: list[str], other: list[str]) -> int:
    """Parts that two paths have in common at their ends."""
    count = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count


# ---- Classes


@dataclass(frozen=True)
class Classes:
    """Names in the order of their numbers; ``file`` tells where they are from, if from a file."""

    names: list[str]
    file: Path | None = None

    @staticmethod
    def read(path: Path) -> "Classes":
        """From a classes.json: a list of names, or an object of name and number.

        Raises:
            UserError: not such a file.
        """
        try:
            told = json.loads(path.read_bytes())
        except OSError as error:
            raise_if_machine(error, path)
            raise UserError(
                f"--classes {path} cannot be read ({error.strerror}); name the {CLASSES} beside "
                "the training shards"
            ) from error
        except ValueError as error:
            raise UserError(f"--classes {path} is not JSON ({error})") from error
        if isinstance(told, dict) and sorted(map(str, told.values())) == sorted(
            map(str, range(len(told)))
        ):
            told = sorted(told, key=lambda name: int(told[name]))
        names = isinstance(told, list) and all(isinstance(name, str) and name for name in told)
        require(
            names and len(set(told)) == len(told) > 0,
            f"--classes {path} is not a list of different names; name the {CLASSES} beside the "
            "training shards",
        )
        return Classes(told, path)

    @staticmethod
    def beside(place: str) -> "Classes":
        """Of the training shards: a folder, one of them, or a pattern.

        Raises:
            UserError: there is no classes.json beside them.
        """
        folder = Path(place)
        if not folder.is_dir():
            folder = Path(expand(place, "--like")[0][0][0]).parent
        require(
            (folder / CLASSES).is_file(),
            f"--like {place}: there is no {CLASSES} in {folder}; name the training shards that "
            "tools/make_shards.py wrote, or a list of names by --classes",
        )
        return Classes.read(folder / CLASSES)

    def numbers(self, used: set[str]) -> dict[str, int]:
        """The number of each name that is used.

        Raises:
            UserError: some of them are not known; all are named.
        """
        numbers = {unicodedata.normalize("NFC", name): n for n, name in enumerate(self.names)}
        found = {name: numbers.get(unicodedata.normalize("NFC", name)) for name in sorted(used)}
        unknown = [name for name, number in found.items() if number is None]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(used)} class names are not in {self.file}: "
                f"{', '.join(map(self._nearest, unknown))}; rename them as they are there, or move "
                "them away"
            )
        return found

    def _nearest(self, name: str) -> str:
        alike = {_fold(known): known for known in self.names}
        near = difflib.get_close_matches(_fold(name), alike, 1, 0.8)
        known = alike.get(_fold(name)) or (alike[near[0]] if near else None)
        return f"'{name}'" + (f" ('{known}' there)" if known else "")


def _fold(name: str) -> str:
    return "/".join(_loose(name)).strip()


def class_folders(files: list[str], source: Path) -> dict[str, str]:
    """Each picture's class: the name of its first folder; empty where all lie in the source itself.

    Raises:
        UserError: pictures both beside and inside of folders.
    """
    loose = [file for file in files if "/" not in file]
    require(
        not loose or len(loose) == len(files),
        f"{source} holds pictures both in folders (classes) and beside them, such as "
        f"{loose[0] if loose else ''}; move the loose ones away",
    )
    return {} if loose else {file: as_text(file.split("/")[0]) for file in files}


def question_names(class_of: dict[str, str], source: Path) -> None:
    """Refuse folders that do not look like classes.

    Raises:
        UserError: with what to do if they are.
    """
    counts = Counter(class_of.values())
    sure = "or say that these are the classes: --these-are-classes"
    levels = [name for name in counts if _is_level(name)]
    if len(levels) >= min(2, len(counts)) and levels:
        raise UserError(
            f"the folders in {source} would be the classes, and {_listed(levels)} do not look so; "
            f"name the folder of the class folders, such as {source / levels[0]}, and each split "
            f"in a call of its own, {sure}"
        )
    if len(counts) == 1:
        below = {file.split("/")[1] for file in class_of if file.count("/") > 1}
        (only,) = counts
        require(
            len(below) < 2,
            f"{source} holds one folder of pictures, {only}, with folders in it "
            f"({_listed(sorted(below))}); name {source / only} if those are the classes, {sure}",
        )
    twins: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        twins[_fold(name)].append(name)
    for names in twins.values():
        require(
            len(names) == 1,
            f"the folders {_listed(names)} in {source} differ in case or Unicode form alone; "
            f"join them, {sure}",
        )


def _is_level(name: str) -> bool:
    words = re.findall(r"[a-z]+", name.casefold())
    return bool(words) and all(word in LEVELS for word in words)


def _listed(names: list[str]) -> str:
    told = ", ".join(f"'{name}'" for name in names[:SHOWN])
    return told + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def told_classes(classes: list[str], labels: list[int]) -> str:
    """How many pictures each class has, in words: the first few classes and the last."""
    counts = Counter(labels)
    told = [f"{name} {counts[number]}" for number, name in enumerate(classes)]
    told = told if len(told) <= 8 else [*told[:5], f"... ({len(told) - 6} more)", told[-1]]
    empty = [name for number, name in enumerate(classes) if not counts[number]]
    without = f"; no picture of {_listed(empty)}" if empty else ""
    return f"{len(classes)} classes: {', '.join(told)}{without}"


# ---- Labels in a file of their own, as ImageNet's val has them


def listed_classes(
    path: Path, files: list[str], source: Path, synsets: Path | None, known: Classes | None
) -> tuple[dict[str, str], int]:
    """Each picture's class by a file of labels.

    Its lines are ``name class``, the same as CSV with or without a head (LOC_val_solution.csv: of
    the prediction the first word), or, in the order of the pictures' names, a class alone. With
    ``synsets``, the devkit's meta.mat, numbers are ILSVRC2012's own; otherwise the numbers of lines
    with a name are places in the list of classes, from 0 on.

    Returns:
        And how many lines belong to none of the pictures.

    Raises:
        UserError: it does not tell the class of each picture.
    """
    named, plain = _read_labels(path)
    words = [word for _, word in named] + plain
    numeric = all(re.fullmatch(r"\d{1,9}", word) for word in words)
    if synsets is not None:
        require(numeric, f"--synsets goes with numbers, and --labels {path} holds names")
        wnids = read_synsets(synsets)
        strange = next((word for word in words if int(word) not in wnids), None)
        require(
            strange is None,
            f"--labels {path} holds {strange}, which is no ILSVRC2012_ID of {synsets}",
        )
        named, plain = (
            [(name, wnids[int(word)]) for name, word in named],
            [wnids[int(word)] for word in plain],
        )
    elif numeric and plain:
        raise UserError(
            f"--labels {path} holds numbers without names: ILSVRC2012's own, from 1 to 1000 in "
            "an order that is not that of the classes' names; give the devkit's list, --synsets "
            "ILSVRC2012_devkit_t12/data/meta.mat, or a file with names "
            "(LOC_val_solution.csv)"
        )
    elif numeric:
        named = _places(path, named, known)
    if plain:
        require(
            len(plain) == len(files),
            f"--labels {path} has {len(plain)} lines, in the order of the pictures' names, and "
            f"{source} holds {len(files)} pictures; take a file with names, or all of the pictures",
        )
        return dict(zip(files, plain, strict=True)), 0
    told: dict[str, str] = {}
    for name, word in named:
        require(
            told.setdefault(plain_path(name), word) == word,
            f"--labels {path}: '{name}' is of two classes, {told[plain_path(name)]} and {word}",
        )
    pictures = set(files)
    found = find_files(list(told), source).files
    class_of = {file: told[name] for name, file in found.items() if file in pictures}
    lacking = [file for file in files if file not in class_of]
    require(
        not lacking,
        f"--labels {path} tells nothing of {len(lacking)} of the {len(files)} pictures of "
        f"{source}, such as {lacking[0] if lacking else ''}; add them, or move the pictures away",
    )
    return class_of, len(told) - len(class_of)


def number_classes(
    class_of: dict[str, str], known: Classes | None, listed: bool
) -> tuple[list[str], list[int]]:
    """The names of the classes, and the number of each picture's, in the order of ``class_of``.

    Args:
        known: the classes to number by; None: the names are put in alphabetical order.
        listed: they are of :func:`listed_classes`, whose numbers stay what they are; folders that
            are called by numbers are names as any (ImageFolder).

    Raises:
        UserError: names that are not known.
    """
    used = set(class_of.values())
    if known is None:
        numeric = listed and all(name.isdecimal() for name in used) and {int(name) for name in used}
        known = Classes([str(n) for n in range(max(numeric) + 1)] if numeric else sorted(used))
    numbers = known.numbers(used)
    return known.names, [numbers[name] for name in class_of.values()]


def read_synsets(path: Path) -> dict[int, str]:
    """WordNet's id by ILSVRC2012_ID, from the devkit's meta.mat.

    Raises:
        UserError: not that file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise_if_machine(error, path)
        raise UserError(f"--synsets {path} cannot be read ({error.strerror})") from error
    try:
        rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # the reader raises whatever its parsing runs into
        raise UserError(
            f"--synsets {path} is not the meta.mat of ILSVRC2012's devkit (a list of names will "
            "not do: its numbers follow none); take ILSVRC2012_devkit_t12/data/meta.mat"
        ) from error


def _read_labels(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, class) of each line, or the class alone; one of the two lists is empty.

    Raises:
        UserError: neither.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise_if_machine(error, path)
        raise UserError(f"--labels {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--labels {path} is not text in UTF-8 ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    require(bool(lines), f"--labels {path} is empty")
    if "," in lines[0]:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
        head = rows[0][1].casefold() if len(rows[0]) > 1 else ""
        if head in HEADS:
            rows = rows[1:]
        if head == "predictionstring":  # "n01440764 240 170 260 240": a box follows each class
            rows = [[row[0], row[1].split()[0]] if len(row) > 1 and row[1] else row for row in rows]
    else:
        rows = [line.split("\t") if "\t" in line else line.rsplit(None, 1) for line in lines]
    width = len(rows[0]) if rows else 0
    odd = next((row for row in rows if len(row) != width or not all(row[:2])), None)
    require(
        width > 0 and odd is None,
        f"--labels {path} holds '{' '.join(odd or [])}', which is neither a name with a class nor "
        "like the first line; write one 'name class' a line",
    )
    if width == 1:
        return [], [row[0] for row in rows]
    return [(row[0], row[1]) for row in rows], []


def _places(
    path: Path, named: list[tuple[str, str]], known: Classes | None
) -> list[tuple[str, str]]:
    """Numbers of lines with names, as the names of their classes."""
    numbers = [int(word) for _, word in named]
    first, last = min(numbers), max(numbers)
    require(
        known is None or last < len(known.names),
        f"--labels {path} holds the number {last}, and the classes are 0 to "
        f"{len(known.names) - 1 if known else 0}; if it counts from 1, make that 0",
    )
    require(
        first == 0 or known is not None,
        f"--labels {path} holds numbers from {first} on; write them from 0 on, or the classes' "
        "names",
    )
    names = known.names if known else [str(number) for number in range(last + 1)]
    return [(name, names[number]) for (name, _), number in zip(named, numbers, strict=True)]
