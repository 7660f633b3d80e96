"""Reading a YAML file of ours strictly, and knowing one that is meant for something else."""

import codecs
import dataclasses
import importlib
import os
import typing
from pathlib import Path
from typing import Any

import yaml

from sami.core.errors import UserError, raise_if_machine

# The entries and what each is configured by. They are looked up by name, to say whose a file is.
ENTRIES = {
    "sami/pretrain.py": ("sami.pretrain", "PretrainConfig"),
    "finetune/train.py": ("finetune.train", "FinetuneConfig"),
    "finetune/classify.py": ("finetune.classify", "ClassifyConfig"),
}
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


def read_yaml(path: str | os.PathLike, told: str, see: str = "configs/") -> dict[str, Any]:
    """The map that a YAML file holds.

    Args:
        told: what the user called the file by, such as ``--config``; may be empty.
        see: where files of this kind are.

    Raises:
        UserError: no such file, no text, no YAML, no map, or a name that stands twice.
    """
    name = f"{told} {path}".strip()

    def refuse(words: str) -> UserError:
        return UserError(" ".join(f"{name} {words}".split()))

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
        words = str(error).partition(' in "<unicode')[0]
        raise refuse(f"cannot be read ({' '.join(words.split())}); correct it") from error
    if content is None:
        raise refuse(f"is empty; name one of {see}")
    if not isinstance(content, dict):
        what = {str: "plain text", list: "a list"}.get(type(content), f"{content}")
        raise refuse(f"holds {what} and no map of keys; see {see}")
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None or None in content:
        raise refuse(f"has the key {odd}, which is no name; see {see}")
    return content


def flatten(tree: dict[str, Any], types: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A file's content by dotted key, down to what ``types`` has as a value."""
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
    if "compute_environment" in content or "distributed_type" in content:
        return f"is the launcher's; write accelerate launch --config_file {path}"
    entry = entry_of(content)
    return entry and f"is a configuration of {entry}; run python {entry} --config {path}"


def entry_of(content: dict[str, Any]) -> str | None:
    """The first entry that has all keys of a configuration; None if none has."""
    for entry in ENTRIES:
        types = types_of(config_class_of(entry))
        if all(key in types for key in flatten(content, types)):
            return entry
    return None


def config_class_of(entry: str) -> type:
    """The dataclass that an entry is configured by."""
    module, name = ENTRIES[entry]
    return getattr(importlib.import_module(module), name)


def _line(text: str, mark: Any) -> str:
    lines = text.splitlines()
    return lines[mark.line] if mark is not None and mark.line < len(lines) else ""
