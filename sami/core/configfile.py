"""Reading YAML files of ours strictly; and knowing one that is meant for something else."""

import codecs
import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

import yaml

from sami.core.entries import ENTRIES
from sami.core.errors import UserError, raise_if_machine
from sami.core.paths import exists, expand_path
from sami.core.shipped import find

BASE = "base"  # key of a configuration that is another one but for what it says itself
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class _Loader(yaml.SafeLoader):
    """YAML in which no name stands twice: the first one would vanish."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"'{twice}' stands twice in the map that begins in line {line}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike, option: str, see: str = "configs/") -> dict[str, Any]:
    """The map that a YAML file holds.

    Args:
        option: what the user called the file by, such as ``--config``; may be empty.
        see: where files of this kind are.

    Raises:
        UserError: no such file, no text, no YAML, no map, or a name that stands twice.
    """
    name = f"{option} {path}".strip()

    def refuse(problem: str) -> UserError:
        return UserError(" ".join(f"{name} {problem}".split()))

    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise refuse(f"does not exist; see {see}") from error
    except IsADirectoryError as error:
        raise refuse(f"is a folder; name a YAML file, such as those in {see}") from error
    except OSError as error:
        raise_if_machine(error, path)
        raise refuse(f"cannot be read ({error.strerror}); name one of {see}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16" if data.startswith(UTF_16) else "no text in UTF-8"
        raise refuse(f"is {what}; save it as UTF-8, or name one of {see}") from error
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        tab = "\t" in str(error.problem) or "\t" in _line(text, mark)
        remedy = "indent with spaces, not with tabs" if tab else "correct it"
        raise refuse(f"is no YAML ({where}{error.problem}); {remedy}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = str(error).partition(' in "<unicode')[0]
        raise refuse(f"cannot be read ({' '.join(problem.split())}); correct it") from error
    if content is None:
        raise refuse(f"is empty; name one of {see}")
    if not isinstance(content, dict):
        what = {str: "plain text", list: "a list"}.get(type(content), f"{content}")
        raise refuse(f"holds {what} and no map of keys; see {see}")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None or None in content:
        raise refuse(f"has the key {odd}, which is no name; see {see}")
    return content


def read_layers(path: str, option: str) -> list[tuple[str, dict[str, Any]]]:
    """What a configuration file holds, and below it what the file holds that it names as ``base``.

    A base lies beside the file that names it, or else where ``--config`` would find it.

    Args:
        path: the file, which need not exist in the working directory (:func:`find`).
        option: what the user called it by, such as ``--config``; may be empty.

    Returns:
        Path and content of each file without the key ``base``, the lowest first.

    Raises:
        UserError: as :func:`read_yaml`; or bases that lead back to where they began.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    found: set[Path] = set()
    while True:
        file = Path(find(path))
        if file.resolve() in found:
            raise UserError(
                f"{option} {path} leads back to a file that begins from it; take it out"
            )
        found.add(file.resolve())
        content = read_yaml(file, option)
        base = content.pop(BASE, None)
        layers.insert(0, (path, content))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise UserError(f"{path}: {BASE} must be the path of a configuration, got {base}")
        option, base = f"{path}: {BASE}", expand_path(base, f"{path}: {BASE}")
        beside = file.parent / base
        path = str(beside) if exists(beside) else base


def merge(layers: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One content of several, by field; a later one wins. Dotted keys go into their groups."""
    whole: dict[str, Any] = {}
    for _, content in layers:
        for key, value in content.items():
            group, dot, field = key.partition(".")
            if dot or isinstance(value, dict):
                before = whole.get(group)
                own = {field: value} if dot else value
                whole[group] = (before if isinstance(before, dict) else {}) | own
            elif value is not None:
                whole[group] = value
    return whole


def flatten(tree: dict[str, Any], types: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested content by dotted key, down to what ``types`` has as a value; {}: all the way."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        group = key not in types or dataclasses.is_dataclass(types[key])
        if isinstance(value, dict) and value and group:
            flat.update(flatten(value, types, f"{key}."))
        else:
            flat[key] = value
    return flat


def types_of(config_class: type) -> dict[str, Any]:
    """Dotted key to declared type, the groups themselves included."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if typing.get_origin(kind) is typing.ClassVar:
            continue
        keys[name] = kind
        if dataclasses.is_dataclass(kind):
            keys.update({f"{name}.{key}": inner for key, inner in types_of(kind).items()})
    return keys


def meant_for(content: dict[str, Any], path: str) -> str | None:
    """What a file is that is no configuration of this entry; None if nothing accepts it."""
    if {"stages", "measures"} <= content.keys():
        return f"is a sweep; run it with python tools/sweep.py run {path} 0"
    if "rows" in content:
        return f"is a comparison; run it with python tools/compare.py {path}"
    if "compute_environment" in content or "distributed_type" in content:
        return f"is the launcher's; write accelerate launch --config_file {path}"
    if {"task", "mode"} <= content.keys():
        return f"is for ultralytics; run yolo train cfg={path} data=DATA.yaml"
    entry = entry_of(content)
    return entry and f"is a configuration of {entry}; run python {entry} --config {path}"


def entry_of(content: dict[str, Any]) -> str | None:
    """The first entry that has all keys of a configuration; None if none has."""
    for script, entry in ENTRIES.items():
        types = types_of(entry.config_class)
        if all(key in types for key in flatten(content, types)):
            return script
    return None


def _line(text: str, mark: Any) -> str:
    lines = text.splitlines()
    return lines[mark.line] if mark is not None and mark.line < len(lines) else ""
