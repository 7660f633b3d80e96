"""Class numbers of shards, by their indexes: looked at before the first step."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sami.core.config import require
from sami.core.errors import UserError, raise_if_machine
from sami.core.index import Shard
from sami.core.network import is_url
from sami.core.order import Order
from sami.core.paths import is_file
from sami.core.reading import key_of, locate
from sami.core.scanning import BAD_LABEL, FIELDS, NO_LABEL

CLASSES = "classes.json"  # what tools/make_shards.py calls the list of names beside its shards
LOOKED_AT = 256  # samples of a batch whose classes are counted
MIXED = 0.6  # of the classes that a mixed batch would hold: with fewer, neighbours share theirs


def labels_of(shards: list[Shard]) -> np.ndarray:
    """Class numbers [n] of the shards laid end to end; NO_LABEL or BAD_LABEL where there is none.

    Nothing but the indexes is read.
    """
    return np.concatenate([np.zeros(0, np.int64), *(s.members().labels for s in shards)])


def require_labels(shards: list[Shard], key: str, remedy: str) -> None:
    """Raise UserError if no sample in the shards has a label."""
    column = FIELDS.index("cls")
    labelled = any((shard.members().sizes[:, column] > 0).any() for shard in shards)
    require(labelled, f"{key} hold no labelled image (.cls); {remedy}")


def check_labels(shards: list[Shard], key: str, classes: int, max_bad_fraction: float) -> None:
    """Look at every class number before training meets it.

    Args:
        key: what the shards were given by.
        classes: numbers are below.
        max_bad_fraction: so many may have none.

    Raises:
        UserError: no labels, too few, or one that is not below ``classes``.
    """
    labels = labels_of(shards)
    over = np.flatnonzero(labels >= classes)
    if len(over):
        raise UserError(
            f"{key}: {_name_of(shards, int(over[0]))} is of class {labels[over[0]]}, and "
            f"data.classes {classes} has 0 to {classes - 1} ({len(over)} of {len(labels)} images "
            f"are beyond, up to class {labels.max()}); set --data.classes {labels.max() + 1}, or "
            "make the shards anew with numbers from 0 on"
        )
    remedy = "make shards with labels (tools/make_shards.py on a folder per class), or name others"
    require_labels(shards, key, remedy)
    without, bad = np.flatnonzero(labels == NO_LABEL), np.flatnonzero(labels == BAD_LABEL)
    if len(without) + len(bad) > max_bad_fraction * len(labels):
        first = _name_of(shards, int(min([*without[:1], *bad[:1]])))
        raise UserError(
            f"{key}: {len(without)} of {len(labels)} images have no label (.cls), {len(bad)} one "
            f"that is not a class number from 0 on, such as {first}; make the shards anew, or "
            f"raise --data.max_bad_fraction above {max_bad_fraction}"
        )


def check_names(train: list[Shard], held_out: list[Shard], keys: tuple[str, str]) -> None:
    """Compare what tools/make_shards.py wrote about the classes of both.

    Args:
        keys: what train and held_out were given by.

    Raises:
        UserError: a number of held_out's list is another name's in the other, or nobody's.
    """
    for ours in _lists_beside(train):
        names = _read_names(ours)
        for theirs in _lists_beside(held_out):
            for number, name in enumerate(_read_names(theirs)):
                known = names[number] if number < len(names) else None
                require(
                    not names or known == name,
                    f"class {number} is '{name}' in {keys[1]} ({theirs}) and "
                    f"{f'{known!r}' if known else 'unknown'} in {keys[0]} ({ours}); make the "
                    f"former anew with tools/make_shards.py --classes {ours}",
                )


def classes_in_a_batch(order: Order) -> tuple[int, float, int]:
    """How well an epoch's beginning is mixed; from the order itself and the indexes.

    Returns:
        Classes in its first samples; in as many drawn at random; and how many samples these are.
        Zeros where there are no labels.
    """
    counts = np.bincount(_good(labels_of(order.shards)))
    shards, rows = order.rows(0, np.arange(min(LOOKED_AT, order.epoch_positions)))
    first = np.zeros(len(rows), np.int64)
    for number in np.unique(shards):
        mine = shards == number
        first[mine] = order.shards[number].members().labels[rows[mine]]
    first = _good(first)
    return len(np.unique(first)), _classes_drawn(counts, len(first)), len(first)


def tell_neighbours(order: Order, say: Callable[[str], None]) -> None:
    """Say so if neighbours in the shards share their class, and a window is too small to mix them.

    Costs nothing where the shards have no labels, as a few of their indexes tell.
    """
    some = order.shards[:: max(1, len(order.shards) // 8)]
    if not (labels_of(some) >= 0).any():
        return
    found, mixed, samples = classes_in_a_batch(order)
    if mixed >= 1.5 and found <= MIXED * mixed:
        say(
            f"neighbours in data.shards share their class: a batch of {samples} will hold about "
            f"{found} classes, and {mixed:.0f} if they were mixed; make the shards anew with "
            "tools/make_shards.py, which shuffles once and for all, or raise --data.window from "
            f"{order.window} towards {max(len(source.shards) for source in order.sources)}, the "
            "number of shards"
        )


def tell_held_out(
    train: list[Shard], held_out: list[Shard], samples: int | None, say: Callable[[str], None]
) -> None:
    """Say so if what is measured is not what the name says.

    Args:
        samples: only so many of held_out are measured on, the first ones; None for all.
    """
    labels = labels_of(held_out)
    known, theirs = np.unique(labels_of(train)), _good(labels)
    strange = int((~np.isin(theirs, known)).sum())
    if strange:
        say(
            f"{strange} of {len(theirs)} labelled images of data.val_shards are of classes that "
            "never occur in data.shards"
        )
    first = _good(labels[:samples])
    mixed = _classes_drawn(np.bincount(theirs), len(first))
    found = len(np.unique(first))
    if mixed >= 1.5 and found <= MIXED * mixed:
        say(
            f"eval.samples {samples} are the first images of data.val_shards, and neighbours "
            f"there share their class: {found} classes, of {len(np.unique(theirs))} in all; set "
            "--eval.samples null, or make the shards anew with tools/make_shards.py, which shuffles"
        )


def _classes_drawn(counts: np.ndarray, samples: int) -> float:
    """Classes expected among samples drawn at random; ``counts`` [C] are those of all."""
    return float((1 - (1 - counts / max(1, counts.sum())) ** samples).sum())


def _good(labels: np.ndarray) -> np.ndarray:
    return labels[labels >= 0]


def _name_of(shards: list[Shard], number: int) -> str:
    """The key of a sample of the shards laid end to end."""
    (shard,), (row,) = locate(shards, np.array([number]))
    return key_of(shards[shard], shards[shard].members(), row)


def _lists_beside(shards: list[Shard]) -> list[Path]:
    """The classes.json in the folders of local shards."""
    folders = dict.fromkeys(Path(shard.url).parent for shard in shards if not is_url(shard.url))
    return [folder / CLASSES for folder in folders if is_file(folder / CLASSES)]


def _read_names(path: Path) -> list[str]:
    """The list in a classes.json; empty if it is another kind of file."""
    try:
        info = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, path)
        return []
    return [name for name in info if isinstance(name, str)] if isinstance(info, list) else []
