"""YAML files and dotted overrides into dataclasses, strictly.

jsonargparse does the parsing. Three things it does not do by itself are done here: the command
line wins wherever ``--config`` stands, every error is one sentence with the nearest key, and each
dataclass may refuse values that its types allow (a method ``check``).
"""

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from sami.core.errors import UserError, raise_if_machine
from sami.core.paths import expand_path, is_file
from sami.core.shipped import find

Config = TypeVar("Config")
PATH = {"path": True}  # metadata of a field that holds a path, or a pattern of shards


def load_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    The order of precedence is command line, then the files of ``--config`` (a later one over an
    earlier one), then the defaults of the dataclasses. ``--print_config`` prints and exits.

    Args:
        config_class: dataclass of dataclasses, one per group.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that a ``check`` refuses.
    """
    parser = _Parser(exit_on_error=False, allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file; see configs/")
    parser.add_class_arguments(config_class, fail_untyped=True)
    arguments = _config_first(list(sys.argv[1:] if argv is None else argv))
    arguments = [_find_config(word) for word in arguments]
    only_check, only_print = "--check" in arguments, "--print_config" in arguments
    arguments = [word for word in arguments if word not in ("--check", "--print_config")]
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(_sentence(str(error), config_class)) from error
    except UnicodeDecodeError as error:
        raise UserError(
            "--config is not a text file; give a YAML file such as those in configs/"
        ) from error
    groups = {
        field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)
    }
    for group_name, group in groups.items():
        _expand_paths(group_name, group)
    config = config_class(**groups)
    if only_print:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    for key, value in _flatten(to_dict(config)).items():
        for number in value if isinstance(value, list) else [value]:
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{key} must be a finite number, got {number}")
    for group in (*groups.values(), config):
        if hasattr(group, "check"):
            group.check()
    if only_check:
        raise SystemExit(0)
    return config


class _Parser(ArgumentParser):
    """Reads its files as UTF-8, whatever the locale."""

    def parse_path(self, path: Any, *more: Any, **options: Any) -> Any:
        text = Path(str(path)).read_text(encoding="utf-8-sig")
        return self.parse_string(text, str(path), *more, **options)


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data: dicts, lists, strings, numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def differences(old: dict[str, Any], new: dict[str, Any], ignore: set[str]) -> list[str]:
    """Dotted keys whose values differ, as "optim.lr was 0.1 and is now 0.2".

    Args:
        ignore: dotted keys, or what they begin with (whole groups), that may differ.
    """
    flat_old, flat_new = _flatten(old), _flatten(new)
    changed = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        parts = key.split(".")
        if any(".".join(parts[:depth]) in ignore for depth in range(1, len(parts) + 1)):
            continue
        before, after = flat_old.get(key), flat_new.get(key)
        if before != after:
            changed.append(f"{key} was {before} and is now {after}")
    return changed


def require(condition: bool, sentence: str) -> None:
    """Refuse what the user gave, with a sentence, unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def _expand_paths(name: str, group: Any) -> None:
    """``~`` and ``$VARIABLES`` in the fields that are marked as PATH, lists and keys included."""
    for item in dataclasses.fields(group) if dataclasses.is_dataclass(group) else ():
        if "path" in item.metadata:
            option, value = f"{name}.{item.name}", getattr(group, item.name)
            if isinstance(value, str):
                value = expand_path(value, option)
            elif isinstance(value, list):
                value = [expand_path(path, option) for path in value]
            elif isinstance(value, dict):
                value = {expand_path(path, option): share for path, share in value.items()}
            setattr(group, item.name, value)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config_first(argv: list[str]) -> list[str]:
    """Move every --config to the front, so that what else is given wins over the files."""
    files, rest = [], []
    position = 0
    while position < len(argv):
        if argv[position] == "--config" and position + 1 < len(argv):
            files.append(argv[position + 1])
            position += 1
        elif argv[position].startswith("--config="):
            files.append(argv[position].removeprefix("--config="))
        else:
            rest.append(argv[position])
        position += 1
    files = [expand_path(file, "--config") for file in files]
    for file in filter(is_file, files):
        try:  # for what the machine refuses, which jsonargparse would call not there
            Path(file).read_bytes()
        except OSError as error:
            raise_if_machine(error, file)
            raise
    return [f"--config={file}" for file in files] + rest


def _find_config(word: str) -> str:
    """``--config=FILE`` with the project's own file where the working directory has none."""
    option, equals, path = word.partition("=")
    return f"--config={find(path)}" if option == "--config" and equals and path else word


def _types(config_class: type) -> dict[str, Any]:
    """Dotted key to declared type, the groups themselves included."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        keys[name] = kind
        if dataclasses.is_dataclass(kind):
            keys.update({f"{name}.{key}": inner for key, inner in _types(kind).items()})
    return keys


def _type_words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (typing.Union, UnionType):
        return " or ".join(_type_words(choice) for choice in inner)
    if origin is tuple:
        return f"a list of {len(inner)} numbers"
    if origin is list:
        return "a list of strings"
    if origin is dict:
        return "a map from strings to numbers"
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    return "null" if kind is type(None) else words.get(kind, "a group of keys")


def _sentence(message: str, config_class: type) -> str:
    """jsonargparse's message as one sentence that names the key and the remedy."""
    types = _types(config_class)
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    in_group = re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
    in_file = re.search(
        r"[Kk]ey [\"']([^\"']+)[\"'] is not expected|does not accept option '([^']+)'", message
    )
    wrong = re.search(r"Parser key \"([^\"]+)\"", message)
    if unknown:
        option = unknown.group(1).split("=")[0]
        if not option.startswith("--"):
            return f"'{option}' is not an option; options are written --group.field value"
        return f"{option} is not a known option{_nearest(option.lstrip('-'), types, '--')}"
    if in_group or in_file:
        key = ".".join(in_group.groups()) if in_group else next(filter(None, in_file.groups()))
        return f"{key} is not a known key{_nearest(key, types, '')}"
    if wrong and wrong.group(1) in types:
        key = wrong.group(1)
        value = re.findall(r"(?:Got|Given) value: (.*)", message)
        got = f", got {value[-1].strip()}" if value else ""
        return f"{key} must be {_type_words(types[key])}{got}"
    if "does not exist" in message and "config" in message:
        path = re.search(r"'([^']+)'", message)
        return f"--config {path.group(1) if path else ''} does not exist; see configs/"
    return " ".join(message.split())


def _nearest(key: str, types: dict[str, Any], prefix: str) -> str:
    known = [name for name, kind in types.items() if not dataclasses.is_dataclass(kind)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:  # the right field in the wrong group, or no group at all
        last = difflib.get_close_matches(
            key.split(".")[-1], [k.split(".")[-1] for k in known], n=1, cutoff=0.7
        )
        close = [name for name in known if last and name.split(".")[-1] == last[0]]
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return "; --print_config shows the known ones"
