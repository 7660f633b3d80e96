"""The classes of images: by their folders, by a file of labels, by the training set's list.

Names are joined here that a user chose twice, so here is looked for what does not fit: other case
or Unicode form, folders that are no classes, lines of no image.
"""

import csv
import difflib
import io
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from scipy.io import loadmat

from finetune.folders import as_text, find_files, fold, listed, plain_path, read_file
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.labels import CLASSES
from sami.core.patterns import expand

# Words of which the names of folders between the source and its classes are made.
LEVELS = set(
    "all data dataset datasets dev eval evaluation image images imagenet img imgs jpeg jpegimages "
    "jpegs jpg photo photos pic pics picture pictures raw set split splits test testing train "
    "training trainval val valid validation".split()
)
HEADS = {  # of the second column of a CSV of labels
    "predictionstring", "class", "classes", "class_name", "label", "labels", "target", "category",
    "synset", "wnid", "id", "class_id", "label_id",
}  # fmt: skip


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
        beside = f"name the {CLASSES} beside the training shards"
        try:
            names = json.loads(read_file(path, "--classes", beside))
        except UserError:  # is a ValueError, and has its own words
            raise
        except ValueError as error:
            raise UserError(f"--classes {path} is not JSON ({error})") from error
        if isinstance(names, dict):  # numbered from 0 on, or no list of names
            of_number = {str(number): name for name, number in names.items()}
            names = [of_number.get(str(number)) for number in range(len(names))]
        texts = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        require(
            texts and len(set(names)) == len(names) > 0,
            f"--classes {path} is not a list of different names; {beside}",
        )
        return Classes(names, path)

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
        require(
            not unknown,
            f"{len(unknown)} of {len(used)} class names are not in {self.file}: "
            f"{', '.join(map(self._nearest, unknown))}; rename them as they are there, or move "
            "them away",
        )
        return found

    def _nearest(self, name: str) -> str:
        alike = {_folded(known): known for known in self.names}
        near = difflib.get_close_matches(_folded(name), alike, 1, 0.8)
        known = alike.get(_folded(name)) or (alike[near[0]] if near else None)
        return f"'{name}'" + (f" ('{known}' there)" if known else "")

    def describe(self, labels: list[int]) -> str:
        """How many images each class has, in words: the first few classes and the last."""
        counts = Counter(labels)
        each = [f"{name} {counts[number]}" for number, name in enumerate(self.names)]
        if len(each) > 8:
            each = [*each[:5], f"... ({len(each) - 6} more)", each[-1]]
        empty = [name for number, name in enumerate(self.names) if not counts[number]]
        without = f"; no image of {_listed(empty)}" if empty else ""
        return f"{len(self.names)} classes: {', '.join(each)}{without}"


def _folded(name: str) -> str:
    return "/".join(fold(name)).strip()


def _listed(names: list[str]) -> str:
    return listed([f"'{name}'" for name in names])


def class_folders(files: list[str], source: Path) -> dict[str, str]:
    """Each image's class: the name of its first folder; empty where all lie in the source itself.

    Raises:
        UserError: images both beside and inside of folders.
    """
    loose = [file for file in files if "/" not in file]
    require(
        not loose or len(loose) == len(files),
        f"{source} holds images both in folders (classes) and beside them, such as "
        f"{''.join(loose[:1])}; move the loose ones away",
    )
    return {} if loose else {file: as_text(file.split("/")[0]) for file in files}


def question_names(class_of: dict[str, str], source: Path) -> None:
    """
    Raises:
        UserError: the folders do not look like classes; with what to do if they are.
    """
    names = list(dict.fromkeys(class_of.values()))
    sure = "or say that these are the classes: --these-are-classes"
    levels = [name for name in names if _is_level(name)]
    if levels and len(levels) >= min(2, len(names)):
        raise UserError(
            f"the folders in {source} would be the classes, and {_listed(levels)} do not look so; "
            f"name the folder of the class folders, such as {source / levels[0]}, and each split "
            f"in a call of its own, {sure}"
        )
    below = sorted({file.split("/")[1] for file in class_of if file.count("/") > 1})
    if len(names) == 1 and len(below) > 1:
        raise UserError(
            f"{source} holds one folder of images, {names[0]}, with folders in it "
            f"({_listed(below)}); name {source / names[0]} if those are the classes, {sure}"
        )
    forms = Counter(map(_folded, names))
    alike = [name for name in names if forms[_folded(name)] > 1]
    require(
        not alike,
        f"the folders {_listed(alike)} in {source} differ in case or Unicode form alone; join "
        f"them, {sure}",
    )


def _is_level(name: str) -> bool:
    words = re.findall(r"[a-z]+", name.casefold())
    return bool(words) and all(word in LEVELS for word in words)


def number_classes(
    class_of: dict[str, str], known: Classes | None, from_file: bool
) -> tuple[Classes, list[int]]:
    """The classes, and the number of each image's, in the order of ``class_of``.

    Args:
        known: the classes to number by; None: the names are put in alphabetical order.
        from_file: they are of :func:`listed_classes`, whose numbers stay what they are; folders
            that are called by numbers are names as any (ImageFolder).

    Raises:
        UserError: names that are not known.
    """
    used = set(class_of.values())
    if known is None and from_file and all(name.isdecimal() for name in used):
        known = Classes([str(number) for number in range(max(map(int, used)) + 1)])
    known = known or Classes(sorted(used))
    numbers = known.numbers(used)
    return known, [numbers[name] for name in class_of.values()]


# ---- Labels in a file of their own, as ImageNet's val has them


def listed_classes(
    path: Path, files: list[str], source: Path, synsets: Path | None, known: Classes | None
) -> tuple[dict[str, str], int]:
    """Each image's class by a file of labels.

    Its lines are ``name class``, the same as CSV with or without a head (LOC_val_solution.csv: of
    the prediction the first word), or, in the order of the images' names, a class alone. With
    ``synsets``, the devkit's meta.mat, numbers are ILSVRC2012's own; otherwise the numbers of lines
    with a name are places in the list of classes, from 0 on.

    Returns:
        And how many lines belong to none of the images.

    Raises:
        UserError: it does not tell the class of each image.
    """
    names, labels = _read_labels(path)
    numeric = all(re.fullmatch(r"\d{1,9}", label) for label in labels)
    if synsets is not None:
        require(numeric, f"--synsets goes with numbers, and --labels {path} holds names")
        wnids = read_synsets(synsets)
        strange = [label for label in labels if int(label) not in wnids][:1]
        require(
            not strange,
            f"--labels {path} holds {''.join(strange)}, which is no ILSVRC2012_ID of {synsets}",
        )
        labels = [wnids[int(label)] for label in labels]
    elif numeric and names is None:
        raise UserError(
            f"--labels {path} holds numbers without names: ILSVRC2012's own, from 1 to 1000 in "
            "an order that is not that of the classes' names; give the devkit's list, --synsets "
            "ILSVRC2012_devkit_t12/data/meta.mat, or a file with names "
            "(LOC_val_solution.csv)"
        )
    elif numeric:
        labels = _places(path, [int(label) for label in labels], known)
    if names is None:
        require(
            len(labels) == len(files),
            f"--labels {path} has {len(labels)} lines, in the order of the images' names, and "
            f"{source} holds {len(files)} images; take a file with names, or all of the images",
        )
        return dict(zip(files, labels, strict=True)), 0
    class_of_name: dict[str, str] = {}
    for name, label in zip(names, labels, strict=True):
        first = class_of_name.setdefault(plain_path(name), label)
        require(first == label, f"--labels {path}: '{name}' is of two classes, {first} and {label}")
    images, found = set(files), find_files(list(class_of_name), source).files
    class_of = {file: class_of_name[name] for name, file in found.items() if file in images}
    lacking = [file for file in files if file not in class_of]
    require(
        not lacking,
        f"--labels {path} tells nothing of {len(lacking)} of the {len(files)} images of "
        f"{source}, such as {''.join(lacking[:1])}; add them, or move the images away",
    )
    return class_of, len(class_of_name) - len(class_of)


def read_synsets(path: Path) -> dict[int, str]:
    """WordNet's id by ILSVRC2012_ID, from the devkit's meta.mat.

    Raises:
        UserError: not that file.
    """
    data = read_file(path, "--synsets")
    try:
        rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # the reader raises whatever its parsing runs into
        raise UserError(
            f"--synsets {path} is not the meta.mat of ILSVRC2012's devkit (a list of names will "
            "not do: its numbers follow none); take ILSVRC2012_devkit_t12/data/meta.mat"
        ) from error


def _read_labels(path: Path) -> tuple[list[str] | None, list[str]]:
    """The name and the class of each line; None and the class where there are no names.

    Raises:
        UserError: neither.
    """
    try:
        text = read_file(path, "--labels").decode("utf-8-sig")
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
    return [row[0] for row in rows] if width > 1 else None, [row[min(width, 2) - 1] for row in rows]


def _places(path: Path, numbers: list[int], known: Classes | None) -> list[str]:
    """Numbers of lines with names, as the names of their classes."""
    if known is None:
        require(
            min(numbers) == 0,
            f"--labels {path} holds numbers from {min(numbers)} on; write them from 0 on, or the "
            "classes' names",
        )
        return [str(number) for number in numbers]
    require(
        max(numbers) < len(known.names),
        f"--labels {path} holds the number {max(numbers)}, and the classes are 0 to "
        f"{len(known.names) - 1}; if it counts from 1, make that 0",
    )
    return [known.names[number] for number in numbers]
