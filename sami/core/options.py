"""Command lines: what stands behind an option, and one sentence for what is wrong with a tool's."""

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from sami.core.errors import UserError

RENAMED = {"--pictures": "--images"}
QUOTE = "put a pattern such as 'data/*.tar' in quotes"


class Help(argparse.RawDescriptionHelpFormatter):
    """A description whose paragraphs are as wide as the terminal; commands keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        found = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if not any(line.startswith((" ", "python ")) for line in lines):
                lines = [" ".join(lines)]
            found.append("\n".join(_fold(line, width) for line in lines))
        return "\n\n".join(found)


def _fold(line: str, width: int) -> str:
    """A line in lines of a width, between its words; what follows of a command is set in."""
    inner = "    " * line.startswith((" ", "python "))
    return textwrap.fill(
        line, width, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False
    )


class Options(argparse.ArgumentParser):
    """argparse whose errors are one sentence each, with the nearest option; no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        prog = f"python {sys.argv[0]}"
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=Help, **settings)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """argparse's, with options under the names that they had before."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_renamed(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with one sentence."""
        raise UserError(self._sentence(" ".join(message.split())))

    def _sentence(self, message: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            word = unknown[1].split()[0]
            if not word.startswith("-"):
                return f"'{word}' is one word too many; {QUOTE}, and see {self.prog} --help"
            option = word.split("=")[0]
            return f"{option} is not a known option{nearest(option, known, f'{self.prog} --help')}"
        lacking = re.match(r"the following arguments are required: (.*)", message)
        either = re.match(r"one of the arguments (.*) is required", message)
        if lacking or either:
            names = lacking[1].split(", ") if lacking else either[1].split()
            names = [name if name.startswith("-") else name.upper() for name in names]
            verb = "are" if lacking and len(names) > 1 else "is"
            names = (", " if lacking else " or ").join(names)
            return f"{names} {verb} missing; {self.prog} --help shows how it is used"
        about = re.match(r"argument ([^:]+): (.*)", message)
        if about is None:
            return message
        name, problem = about[1].split("/")[-1], about[2]
        if found := re.search(r"invalid (\w+) value: '?(.*?)'?$", problem):
            kind = {"int": "an integer", "float": "a number"}.get(found[1], f"a {found[1]}")
            return f"{name} must be {kind}, got {found[2] or 'nothing'}"
        if found := re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$", problem):
            return f"{name} must be one of {found[2].replace(chr(39), '')}, got {found[1]}"
        if found := re.search(r"not allowed with argument (\S+)", problem):
            return f"{name} and {found[1]} exclude each other; give one of them"
        if problem.startswith("expected "):
            return f"{name} needs {'one value or more' if 'at least' in problem else 'a value'}"
        if problem.startswith("ignored explicit argument"):
            return f"{name} takes no value"
        return f"{name}: {problem}"


def _renamed(word: str) -> str:
    name, *value = word.split("=", 1)
    return "=".join([RENAMED.get(name, name), *value])


def require_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Refuse options below 0 or 1; one that was not given may be None.

    Raises:
        UserError: the first of them.
    """
    for name in names:
        value, limit = getattr(args, name), "positive" if least else "0 or more"
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} must be {limit}")


def nearest(word: str, known: Collection[str], shown: str) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or where they are."""
    bare = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.5)
    if not close:
        close = [name for name in bare if len(word) > 4 and name.startswith(word.lstrip("-"))][:1]
    return f"; did you mean {bare[close[0]]}?" if close else f"; {shown} shows the known ones"


def join_lists(words: list[str], lists: Collection[str]) -> list[str]:
    """The words of a command line with several values behind an option put together to a list.

    So ``--data.shards a.tar b.tar``, which a shell makes of a pattern without quotes, is a list;
    and so is one option several times on end, as in ``--data.shards=a.tar --data.shards=b.tar``,
    which it makes of braces.

    Args:
        lists: dotted names of the options that take a list.
    """
    parts: list[tuple[str, list[str]]] = []  # such an option and its values, or "" and one word
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in lists:
            parts.append((name, [value] if equals else []))
        elif word.startswith("--") or not parts or not parts[-1][0]:
            parts.append(("", [word]))
        else:
            parts[-1][1].append(word)
    joined: list[tuple[str, list[str]]] = []
    for name, values in parts:
        before, earlier = joined[-1] if joined else ("", [])
        if name and name == before and earlier and values and all(earlier + values):
            earlier += values
        else:
            joined.append((name, values))
    return [_option(name, values) if name else values[0] for name, values in joined]


def _option(name: str, values: list[str]) -> str:
    """An option with its values as one; a list or map that was written with spaces is one already.

    Of an option without a value the parser says so.
    """
    whole = " ".join(values)
    if len(values) > 1 and not re.fullmatch(r"\[.*\]|\{[^}]*\}", whole):
        whole = json.dumps(values)
    return f"--{name}={whole}" if values else f"--{name}"
