"""YAML files and dotted overrides into dataclasses, strictly.

jsonargparse does the parsing. Three things it does not do by itself are done here: the command
line wins wherever ``--config`` stands, every error is one sentence with the nearest key, and each
dataclass may refuse values that its types allow (a method ``check``).
"""

import contextlib
import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from sami.core.configfile import flatten, meant_for, merge, read_layers, types_of
from sami.core.errors import UserError
from sami.core.options import QUOTE, join_lists, nearest
from sami.core.paths import expand_path
from sami.core.shipped import find

Config = TypeVar("Config")
# Keys of before, and what a file or a command line that has one is told.
GONE = {
    "data.shuffle_mb": "the order of the samples depends on no buffer; leave it out, or set "
    "data.window, the number of shards that are shuffled together"
}
PATH = {"path": True}  # metadata of a field that holds a path, or a pattern of shards


def load_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    The order of precedence is command line, then the files of ``--config`` (a later one over an
    earlier one), then the defaults of the dataclasses. ``--print_config`` prints and exits,
    ``--check=values`` exits where nothing is wrong.

    Args:
        config_class: dataclass of dataclasses, one per group.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that a ``check`` refuses.
    """
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, description=config_class.__doc__
    )
    parser.add_argument("--config", action="config", help="YAML file; see configs/")
    parser.add_class_arguments(config_class, fail_untyped=True)
    files, words = _split_files(list(sys.argv[1:] if argv is None else argv))
    only_values, only_print = "--check=values" in words, "--print_config" in words
    words = [word for word in words if word not in ("--check=values", "--print_config")]
    types = types_of(config_class)
    words = join_lists(words, {key for key, kind in types.items() if _takes_list(kind)})
    before = [f"--config={_read_file(file, config_class)}" for file in files]
    try:
        namespace = parser.instantiate(parser.parse_args([*before, *words]))
    except ArgumentError as error:
        raise UserError(_sentence(str(error), config_class)) from error
    groups = {
        field.name: getattr(namespace, field.name) for field in dataclasses.fields(config_class)
    }
    for group_name, group in groups.items():
        _expand_paths(group_name, group)
    config = config_class(**groups)
    if only_print:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    for key, value in flatten(to_dict(config), {}).items():
        for number in value if isinstance(value, list) else [value]:
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{key} must be a finite number, got {number}")
    for group in (*groups.values(), config):
        if hasattr(group, "check"):
            group.check()
    if only_values:
        raise SystemExit(0)
    return config


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
    flat_old, flat_new = flatten(old, {}), flatten(new, {})
    changed = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        parts = key.split(".")
        if any(".".join(parts[:depth]) in ignore for depth in range(1, len(parts) + 1)):
            continue
        before, after = flat_old.get(key), flat_new.get(key)
        if before == after:
            continue
        if key in flat_old and key in flat_new:
            changed.append(f"{key} was {before} and is now {after}")
        else:
            changed.append(
                f"{key} is {after} and was not there" if key in flat_new else f"{key} is gone"
            )
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


def _read_file(path: str, config_class: type) -> str:
    """A configuration file, with what it begins from, as YAML that holds known keys only."""
    layers = read_layers(expand_path(path, "--config"), "--config")
    types = types_of(config_class)
    for file, content in layers:
        flat = flatten(content, types)
        unknown = next((key for key in flat if key not in types), None)
        if unknown is not None:
            other = meant_for(merge(layers), path)
            require(other is None, f"{path} {other}")
            raise UserError(f"{file}: {unknown} is not a known key{_nearest(unknown, types, '')}")
        for key, value in flat.items():
            group = dataclasses.is_dataclass(types[key])
            require(
                not group or value in (None, {}),
                f"{file}: {key} must be a group of keys, got {value}",
            )
            require(
                value is not None or group or type(None) in typing.get_args(types[key]),
                f"{file}: {key} must be {_describe_type(types[key])}, got null",
            )
    return yaml.safe_dump(merge(layers), sort_keys=False)


def _split_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files of every --config, and the other words.

    Raises:
        UserError: a --config without a file.
    """
    files, rest = [], []
    words = iter(argv)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            file = word.partition("=")[2] if "=" in word else next(words, "")
            require(
                bool(file) and not file.startswith("--"),
                "--config needs a YAML file, such as one of configs/",
            )
            files.append(file)
        else:
            rest.append(word)
    return files, rest


def needs_of(argv: Sequence[str]) -> str:
    """What the head of a command line's last configuration file says that it needs; "" if nothing.

    Shipped files, or their bases, have a line ``# Needs   SA-1B's tars as they are, and ...``; its
    first sentence.
    """
    files = _split_files(list(argv))[0][-1:]
    layers = [layer for file in files for layer in read_layers(expand_path(file, "--config"), "")]
    for path, _ in reversed(layers):
        head = find(path).read_text(encoding="utf-8")
        if found := re.search(r"^# Needs +(.*(?:\n# {4,}.*)*)", head, re.M):
            needs = re.split(r"\.(?=\s|$)", re.sub(r"\s*\n# +", " ", found[1]))[0]
            return f"{files[0]} needs {needs} (docs/data.md tells how they are got and made)"
    return ""


def _describe_type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (typing.Union, UnionType):
        return " or ".join(_describe_type(choice) for choice in inner)
    if origin is tuple:
        return f"a list of {len(inner)} numbers"
    if origin is list:
        return "a list of strings"
    if origin is dict:
        return "a map from strings to numbers"
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    return "null" if kind is type(None) else words.get(kind, "a group of keys")


def _takes_list(kind: Any) -> bool:
    """Whether several values may stand behind an option of this type."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return any(map(_takes_list, typing.get_args(kind)))
    return typing.get_origin(kind) in (list, tuple)


def _sentence(message: str, config_class: type) -> str:
    """jsonargparse's message as one sentence that names the key and the remedy."""
    types = types_of(config_class)
    if found := re.search(r"unrecognized arguments: ?(\S*)", message):
        return _unknown_word(found[1], types)
    if found := re.search(r"argument (?:-\w/)?--([^\s/:]+)\S*: (expected one|ignored)", message):
        key, needs = found[1], found[2] != "ignored"
        kind = _describe_type(types[key]) if key in types else "one word"
        return f"--{key} needs a value: {kind}" if needs else f"--{key} takes no value"
    if found := (
        re.search(r"Group '([^']+)' does not accept option '([^']+)'", message)
        or re.search(r"[Kk]ey [\"']([^\"']+)[\"'] is not expected", message)
        or re.search(r"does not accept option '([^']+)'", message)
    ):
        key = ".".join(found.groups())
        return f"{key} is not a known key{_nearest(key, types, '')}"
    found = re.search(r"Parser key \"([^\"]+)\"", message)
    if found and found[1] in types:
        key = found[1]
        value = re.findall(r"(?:Got|Given) value: (.*)", message)
        got = f", got {'null' if value[-1] == 'None' else value[-1].strip()}" if value else ""
        return f"{key} must be {_describe_type(types[key])}{got}{_remedy(types[key], value)}"
    return " ".join(message.split())


def _remedy(kind: Any, values: list[str]) -> str:
    """How a value is written that was meant well."""
    if typing.get_origin(kind) is tuple:
        return "; write it as [0.9, 0.95], or as 0.9 0.95"
    if int in (kind, *typing.get_args(kind)) and values:
        with contextlib.suppress(ValueError, OverflowError):
            if float(values[-1]).is_integer():
                return f"; write {int(float(values[-1]))}"
    return ""


def _unknown_word(word: str, types: dict[str, Any]) -> str:
    """What is said of a word that no option takes."""
    option = word.split("=")[0]
    if option.startswith("--") and option != "--":
        return f"{option} is not a known option{_nearest(option.lstrip('-'), types, '--')}"
    start = f"'{word}' is not an option; "
    if word.endswith((".yaml", ".yml")):
        return f"{start}did you mean --config {word}?"
    if option.lstrip("-") in types:
        return f"{start}did you mean --{word.lstrip('-')}?"
    quote = f"; {QUOTE}" if word and not word.startswith("-") else ""
    return f"{start}options are written --group.field value{quote}"


def _nearest(key: str, types: dict[str, Any], prefix: str) -> str:
    if key in GONE:
        return f" any more: {GONE[key]}"
    known = [name for name, kind in types.items() if not dataclasses.is_dataclass(kind)]
    hint = nearest(key, known, "--print_config")
    if not hint.startswith("; did"):  # the right field in the wrong group, or no group at all
        last = [name.split(".")[-1] for name in known]
        close = difflib.get_close_matches(key.split(".")[-1], last, n=1, cutoff=0.7)
        if close:
            hint = f"; did you mean {known[last.index(close[0])]}?"
    return hint.replace("did you mean ", f"did you mean {prefix}")
