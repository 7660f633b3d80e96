"""Weights at a path: which file holds them, and whether they are of the kind that is wanted.

One place for every option and every tool that takes weights. A run folder holds them under the
name of what it exports; one that has not ended, in its newest whole checkpoint.
"""

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sami.core.checkpoint import META, STATE, Damaged, check_file, list_checkpoints, read_meta
from sami.core.entries import ENTRIES, entry_of_groups, exporters
from sami.core.errors import UserError, raise_if_machine
from sami.core.paths import exists, is_file
from sami.core.weightfile import WEIGHTS, NotWeights, identify, read_header, read_tensors

TIMM = "timm:"  # before a name of timm's


@dataclass(frozen=True)
class Takes:
    """What an option that names weights takes.

    Attributes:
        kinds: what entries export (``Entry.exports``), looked for in a run folder in this order.
        words: all that it takes, for a sentence.
    """

    kinds: tuple[str, ...]
    words: str

    def remedy(self, option: str) -> str:
        """The end of a sentence; ``option`` is empty for a function's argument."""
        return f"{option} takes {self.words}" if option else f"give {self.words}"

    def refuse(self, kind: str | None, what: str, option: str) -> None:
        """Raise UserError if ``kind`` is one of our exports and none of ``kinds``."""
        if kind is not None and kind not in self.kinds:
            makers = exporters([kind])
            scripts = " or ".join(entry.script for entry in makers)
            raise UserError(f"{what} is {makers[0].makes} (of {scripts}); {self.remedy(option)}")


@dataclass(frozen=True)
class Found:
    """A file of weights.

    Attributes:
        file: what is to be opened.
        step: of the checkpoint that it lies in; None for a file that stands alone.
        note: what there is to say about the choice.
    """

    file: Path
    step: int | None = None
    note: str = ""


@dataclass
class Weights:
    """Tensors by name, floating ones as fp32, and the metadata of a safetensors file."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def header(self, kind: str) -> dict[str, Any] | None:
        """The JSON that one of our exports describes itself with; None if it is none of these.

        Raises:
            ValueError: it is no JSON.
        """
        content = json.loads(self.metadata.get(kind, "null"))
        return content if isinstance(content, dict) else None

    @property
    def kind(self) -> str | None:
        """Which of our exports it is; None for weights of others."""
        return _kind_of(self.metadata)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        found = {n: t for n, t in self.tensors.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def find_weights(path: str | Path | None, takes: Takes, option: str = "") -> Found:
    """The file of weights at a path: a file, a run folder or a checkpoint of one, or timm:NAME.

    Of a run folder it is what the run exported at its end or, before that, what its newest whole
    checkpoint holds.

    Args:
        option: that the path was given by, such as encoder.checkpoint.

    Raises:
        UserError: there is none, or another than ``takes`` tells.
    """
    what, remedy = f"{option} {path}".strip(), takes.remedy(option)
    if path is None or path == "":
        raise UserError(f"{option or 'the path'} is empty; {remedy}")
    if not isinstance(path, (str, Path)):
        raise UserError(f"{option or 'the path'} is {path!r}, which is no path; {remedy}")
    if str(path).startswith(TIMM):
        from sami.core.hub import fetch_timm  # timm takes a second to import

        return Found(fetch_timm(str(path).removeprefix(TIMM), what))
    place = Path(path)
    if not exists(place):
        link = f" (a link to {place.readlink()})" if os.path.islink(place) else ""
        raise UserError(f"{what} does not exist{link}; {remedy}")
    if is_file(place):
        if place.name == STATE and exists(place.parent / META):
            raise UserError(
                f"{what} is what a run goes on from, with the optimizer's state; name its folder "
                f"{place.parent}, whose weights are taken"
            )
        return Found(place)
    if not place.is_dir():
        raise UserError(f"{what} is neither a file nor a folder; {remedy}")
    names = [f"{kind}.safetensors" for kind in takes.kinds]
    if exists(place / META):  # one checkpoint
        return _of_checkpoint(place, names, what, remedy)
    for name in names:
        if is_file(place / name):
            return Found(place / name)
    folder = place if place.name == "checkpoints" else place / "checkpoints"
    spoilt: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            found = _of_checkpoint(checkpoint, names, str(checkpoint), remedy)
        except UserError as error:
            raise_if_machine(error)
            spoilt.append(str(error))
            continue
        note = f"{path} has not ended: the weights of its step {found.step} are taken"
        if spoilt:
            note += f" (of a later one: {spoilt[0].split(';')[0]})"
        return Found(found.file, found.step, note)
    raise UserError(f"{what} {_describe(place, takes, spoilt)}; {remedy}")


def _of_checkpoint(place: Path, names: list[str], what: str, remedy: str) -> Found:
    """The weights of one checkpoint, whole.

    Raises:
        UserError: damaged, of an earlier version, or of another kind.
    """
    name = next((name for name in names if is_file(place / name)), None)
    if name is None:
        other = next((one for one in ENTRIES.values() if is_file(place / one.file)), None)
        if other is not None:
            raise UserError(
                f"{what} is a checkpoint of {other.script} and holds {other.makes}; {remedy}"
            )
        raise UserError(
            f"{what} has no weights of its own, as checkpoints of earlier versions: the same "
            f"command that made it goes on from it, and leaves some; {remedy}"
        )
    try:
        check_file(place, name)
        return Found(place / name, read_meta(place)["step"])
    except (Damaged, KeyError) as error:
        raise UserError(f"{what} cannot be used ({error}); {remedy}") from error


def _describe(place: Path, takes: Takes, spoilt: list[str]) -> str:
    """What a folder without the weights that are wanted is."""
    entry = entry_of_run(place)
    wanted = [entry.script for entry in exporters(takes.kinds)]
    if entry is not None and entry not in wanted:
        makes = ENTRIES[entry].makes if entry in ENTRIES else "other weights"
        return f"is a run of {entry}, which makes {makes}"
    if spoilt:
        return f"is a run without whole weights ({spoilt[0].split(';')[0]})"
    failed = read_summary(place).get("status") == "failed"
    if entry is not None and failed:
        return "is a run that failed before its first checkpoint: summary.json says why"
    if entry is not None:
        return "is a run that has not saved yet: wait for its first checkpoint"
    if failed:
        return "is a start that failed, and has no weights"
    files = sorted(one.name for one in place.iterdir() if one.suffix in WEIGHTS)
    if files:
        return f"is a folder; name the file in it, such as {place / files[0]}"
    return "is a folder without weights" if any(place.iterdir()) else "is an empty folder"


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty where there is none that can be read."""
    try:
        content = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, folder / "summary.json")
        return {}
    return content if isinstance(content, dict) else {}


def entry_of_run(folder: Path) -> str | None:
    """The entry whose run a folder holds, such as sami/pretrain.py; None if it holds no run.

    A start that failed before it began leaves a summary.json alone, and is no run.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    exported = [entry for entry in ENTRIES.values() if exists(folder / entry.file)]
    if not (checkpoints or exported or exists(folder / "config.yaml")):
        return None
    script = read_summary(folder).get("entry")
    if isinstance(script, str):
        return script
    try:  # a run of an earlier version, or without its summary
        groups = re.findall(r"^(\w+):", (folder / "config.yaml").read_text(encoding="utf-8"), re.M)
    except (OSError, ValueError) as error:
        raise_if_machine(error, folder / "config.yaml")
        groups = []
    entry = entry_of_groups(groups) or next(iter(exported), None)
    return entry and entry.script


def check_weights(path: str | Path | None, takes: Takes, option: str) -> str | None:
    """What is wrong with a path that an option names, without loading; None if nothing is.

    An empty path names nothing and is right.
    """
    if not path:
        return None
    try:
        file = find_weights(path, takes, option).file
        with file.open("rb") as stream:
            what = f"{option} {file}".strip()
            if identify(stream, file, what) == "safetensors":
                metadata = read_header(stream).get("__metadata__") or {}
                takes.refuse(_kind_of(metadata), what, option)
    except NotWeights as error:
        return f"{error}; {takes.remedy(option)}"
    except UserError as error:
        return str(error)
    return None


def read_weights(file: Path, takes: Takes, option: str = "") -> Weights:
    """The tensors of a file, whoever wrote it; see :func:`sami.core.weightfile.read_tensors`.

    Raises:
        UserError: it is something else, cut short, damaged, or would have to be unpickled.
        OSError: the machine cannot read it.
    """
    what = f"{option} {file}".strip()
    try:
        with file.open("rb") as stream:
            weights = Weights(*read_tensors(stream, file, what))
    except NotWeights as error:
        raise UserError(f"{error}; {takes.remedy(option)}") from error
    except OSError as error:
        if error.errno is None:  # safetensors calls a file not there, whatever the reason
            file.open("rb").close()
        raise_if_machine(error, file)
        raise
    takes.refuse(weights.kind, what, option)
    return weights


def _kind_of(metadata: Collection[str]) -> str | None:
    return next((entry.exports for entry in ENTRIES.values() if entry.exports in metadata), None)


def load_strictly(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    what: str,
    remedy: str,
    may_miss: str = "",
    prefix: str = "",
) -> None:
    """Give a module its tensors: every one has to be there in its shape, and no other.

    The module's own tensors are replaced, so that it may lie on the meta device.

    Args:
        what: "FILE does not fit NAME", for a sentence.
        may_miss: names that begin with it keep what they have; empty for none.
        prefix: of the names in the file, for a sentence.

    Raises:
        UserError: they do not fit.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in tensors and not (may_miss and n.startswith(may_miss))]
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not part of it" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        theirs, ours = tensors[name], own[name]
        if theirs.shape != ours.shape:
            problems.append(f"{name} is {_shape(theirs)} and should be {_shape(ours)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            problems.append(f"{name} is {theirs.dtype}, as quantised weights are")
    if problems:
        problems[0] = prefix + problems[0]
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{what}: {problems[0]}{more}; {remedy}")
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict(
        {name: tensor.to(own[name].dtype).clone() for name, tensor in tensors.items()},
        strict=False,
        assign=True,
    )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"
