"""Held-out shards that are trained on too: what is measured on them is not held out."""

import itertools
import os

import numpy as np

from sami.core.errors import UserError
from sami.core.index import Shard
from sami.core.network import is_url
from sami.core.reading import key_of, read_samples
from sami.core.scanning import FIELDS, IMAGE

CONFIRMED = 32  # pairs of one key and size whose bytes are compared, at most
PROBED, ALIKE = 16, 16  # held-out images that are looked for under other keys; of one size each
COLUMN = FIELDS.index(IMAGE)

SampleIndex = tuple[Shard, int]  # a shard and a row in it


def refuse_overlap(
    train: list[Shard], held_out: list[Shard], keys: tuple[str, str], allow: str
) -> None:
    """Refuse held-out shards that hold training images.

    Args:
        keys: what train and held_out were given by, for the message.
        allow: what to type if it is meant.

    Raises:
        UserError: they share a file, or images.
    """
    found = find_overlap(train, held_out, *keys)
    if found is not None:
        raise UserError(
            f"{found}, so that nothing measured there is held out; name other shards, or say that "
            f"it is meant: {allow}"
        )


def find_overlap(
    train: list[Shard], held_out: list[Shard], train_key: str, held_out_key: str
) -> str | None:
    """What the two have in common, in words; None if nothing.

    Looked for are one file under two names, images of one key, size and content (the keys without
    the shard's name), and, on a sample, of one content under other keys. The indexes tell what may
    be alike; a few images are read to be sure.
    """
    files = {_identity(shard.url): shard.url for shard in train}
    same = [(shard.url, files.get(_identity(shard.url))) for shard in held_out]
    same = [pair for pair in same if pair[1] is not None]
    if same:
        mine, theirs = same[0]
        other = "" if mine == theirs else f", which is {theirs}"
        return (
            f"{len(same)} of the {len(held_out)} shards of {held_out_key} are shards of "
            f"{train_key} too, such as {mine}{other}"
        )
    pairs, probes = _candidates(train, held_out)
    readable = [pair for pair in pairs if not any(shard.streamed for shard, _ in pair)]
    total = sum(shard.count for shard in held_out)
    equal = (pair for pair in _some(readable, CONFIRMED) or pairs[:2] if _equal(*pair))
    if len(sure := list(itertools.islice(equal, 2))) == min(2, total):  # one may be a placeholder
        mine, theirs = sure[0]
        return (
            f"{held_out_key} hold images of {train_key}, such as {_describe(mine)} and "
            f"{_describe(theirs)} ({len(pairs)} of {total} have the same key and size)"
        )
    again = []
    for mine, others in probes:
        again += [(mine, other) for other in others if _equal(mine, other)][:1]
    # Many a set holds a few images twice; a single held-out one is all that is measured.
    if len(again) >= min(2, total) and 4 * len(again) >= len(probes) > 0:
        mine, theirs = again[0]
        return (
            f"{held_out_key} hold images of {train_key} under other keys, such as "
            f"{_describe(mine)} and {_describe(theirs)} ({len(again)} of {len(probes)} that were "
            "compared)"
        )
    return None


def _candidates(
    train: list[Shard], held_out: list[Shard]
) -> tuple[list[tuple[SampleIndex, SampleIndex]], list[tuple[SampleIndex, list[SampleIndex]]]]:
    """Pairs of one key and size; and some held-out images with training images of their size.

    Nothing but the indexes is read; the latter are in shards that need not be fetched for it.
    """
    wanted: dict[tuple[bytes, int], SampleIndex] = {}
    readable: list[tuple[SampleIndex, int]] = []
    for shard in held_out:
        members = shard.members()
        named = zip(members.keys.tolist(), members.sizes[:, COLUMN].tolist(), strict=True)
        for row, (key, size) in enumerate(named):
            if size:
                wanted.setdefault((key, size), (shard, row))
                if not shard.streamed:
                    readable.append(((shard, row), size))
    probed = _some(readable, PROBED)
    probes: list[tuple[SampleIndex, list[SampleIndex]]] = [(sample, []) for sample, _ in probed]
    of_size: dict[int, list[list[SampleIndex]]] = {}
    for (_, size), (_, others) in zip(probed, probes, strict=True):
        of_size.setdefault(size, []).append(others)
    pairs: list[tuple[SampleIndex, SampleIndex]] = []
    known = np.unique([size for _, size in wanted])
    for shard in train if len(known) else []:
        members = shard.members()
        sizes = members.sizes[:, COLUMN]
        rows = np.flatnonzero(
            known[np.searchsorted(known, sizes).clip(max=len(known) - 1)] == sizes
        )
        named = zip(members.keys[rows].tolist(), sizes[rows].tolist(), strict=True)
        for row, (key, size) in zip(rows.tolist(), named, strict=True):
            if (key, size) in wanted:
                pairs.append((wanted[key, size], (shard, row)))
            for others in [] if shard.streamed else of_size.get(size, []):
                if len(others) < ALIKE:
                    others.append((shard, row))
    return pairs, probes


def _identity(url: str) -> object:
    """The same for one file under two names."""
    if is_url(url):
        return url
    status = os.stat(url)
    return status.st_dev, status.st_ino


def _some(items: list, most: int) -> list:
    """At most so many, evenly spread."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _equal(mine: SampleIndex, theirs: SampleIndex) -> bool:
    """Whether two images are the same bytes."""
    found = [
        next(read_samples(shard, np.array([row]), (IMAGE,))).parts.get(IMAGE)
        for shard, row in (mine, theirs)
    ]
    return bool(found[0]) and found[0] == found[1]


def _describe(sample: SampleIndex) -> str:
    shard, row = sample
    return f"{key_of(shard, shard.members(), row)} in {shard.url}"
