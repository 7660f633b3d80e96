"""Which shards a pattern means, and what they are called."""

import contextlib
import glob
import os
import re

from webdataset.shardlists import expand_urls

from sami.core.errors import UserError
from sami.core.network import is_url
from sami.core.paths import exists


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


def name_shards(urls: list[str]) -> dict[str, str]:
    """File names without ``.tar``, preceded by as many folders as make them differ."""
    parts = {url: path_of(url).rstrip("/ ").split("/") for url in urls}
    for depth in range(1, max(map(len, parts.values())) + 1):
        names = {url: "/".join(part[-depth:]) for url, part in parts.items()}
        names = {url: re.sub(r"\.tar(\.\w+)?$|\.tgz$", "", name) for url, name in names.items()}
        if len(set(names.values())) == len(urls):
            return names
    return {url: url for url in urls}


def path_of(url: str) -> str:
    """Without what follows the path of a URL."""
    return url.split("?")[0] if is_url(url) else url
