"""Weights at a path: which file holds them, what that file is, and its tensors.

One place for every option and every tool that takes weights. A run folder holds them under the
name of what it exports; one that has not ended, in its newest whole checkpoint. A file is read as
what its first bytes say it is, whatever its name. Pickles are never executed: torch reads its own
files with ``weights_only``, and what needs more is refused.
"""

import errno
import io
import json
import pickle
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import nn

from sami.core.checkpoint import META, STATE, Damaged, check_file, list_checkpoints, read_meta
from sami.core.errors import UserError, raise_if_machine
from sami.core.paths import NOT_THERE, exists, is_file

# What the entries leave behind: the key of the file's header, what it is, and who writes it.
EXPORTS = {
    "encoder": ("encoder.safetensors", "an encoder of stage 1", "sami/pretrain.py"),
    "model": ("model.safetensors", "a model of stage 2", "finetune/train.py"),
    "classifier": ("classifier.safetensors", "a classifier", "finetune/classify.py"),
}
# Where files that others write keep their state dict, the most likely place first; an average is
# taken where nothing else is there.
WRAPPERS = (
    *("model", "state_dict", "model_state", "model_state_dict", "module", "net", "network"),
    *("weights", "params", "model_ema", "ema", "ema_model", "ema_state_dict", "state_dict_ema"),
)
SIDES = ("student", "teacher")  # of a distillation: both are whole models
# Parts of names that wrappers put in: DDP, torch.compile, FSDP, activation checkpointing.
WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
ROOTS = ("model", "net", "sam")  # of a module that holds the model as an attribute
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".opdownload", ".tmp", ".incomplete")
BESIDE = (".aria2", ".part", ".crdownload", ".incomplete")  # what downloaders keep beside the file
WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
TORCH_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6
AGAIN = "fetch or copy it again"
# What other files begin with, and what to do about it.
OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file; run git lfs pull where it is"),
    (b"\x1f\x8b", "packed by gzip; unpack it (gunzip) and name what is inside"),
    (b"\xfd7zXZ", "packed by xz; unpack it and name what is inside"),
    (b"BZh", "packed by bzip2; unpack it and name what is inside"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it and name what is inside"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it and name what is inside"),
    (b"Rar!", "a RAR archive; unpack it and name what is inside"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it, and not torch's weights"),
    (b"\x93NUMPY", "a NumPy array, and not torch's weights"),
)
ZIP_END = 65_557  # bytes at the end of a zip in which its table begins
BROKEN = (  # what torch, pickle and zipfile raise on bytes that are not what they should be
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, OverflowError, ImportError, struct.error, SafetensorError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


@dataclass(frozen=True)
class Takes:
    """What an option that names weights takes.

    Attributes:
        kinds: keys of EXPORTS whose files are looked for in a run folder, in this order.
        words: all that it takes, for a sentence.
    """

    kinds: tuple[str, ...]
    words: str

    def remedy(self, option: str) -> str:
        """The end of a sentence; ``option`` is empty for a function's argument."""
        return f"{option} takes {self.words}" if option else f"give {self.words}"

    def refuse(self, kind: str | None, what: str, option: str) -> None:
        """
        Raises:
            UserError: one of our exports, and none of ``kinds``.
        """
        if kind is not None and kind not in self.kinds:
            _, is_a, entry = EXPORTS[kind]
            raise UserError(f"{what} is {is_a} (of {entry}); {self.remedy(option)}")


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
        told = json.loads(self.metadata.get(kind, "null"))
        return told if isinstance(told, dict) else None

    @property
    def kind(self) -> str | None:
        """Which of EXPORTS it is; None for weights of others."""
        return next((kind for kind in EXPORTS if kind in self.metadata), None)

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        found = {n: t for n, t in self.tensors.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def find_weights(path: str | Path | None, takes: Takes, option: str = "") -> Found:
    """The file of weights at a path: a file, a run folder, or a checkpoint of one.

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
    place = Path(path)
    try:
        mode = place.stat().st_mode
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        link = ""
        if error.errno == errno.ENOENT and place.is_symlink():
            link = f" (a link to {place.readlink()})"
        raise UserError(f"{what} does not exist{link}; {remedy}") from error
    if stat.S_ISREG(mode):
        if place.name == STATE and exists(place.parent / META):
            raise UserError(
                f"{what} is what a run goes on from, with the optimizer's state; name its folder "
                f"{place.parent}, whose weights are taken"
            )
        return Found(place)
    if not stat.S_ISDIR(mode):
        raise UserError(f"{what} is neither a file nor a folder; {remedy}")
    names = [EXPORTS[kind][0] for kind in takes.kinds]
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
        other = next((one for one in EXPORTS.values() if is_file(place / one[0])), None)
        if other is not None:
            raise UserError(f"{what} is a checkpoint of {other[2]} and holds {other[1]}; {remedy}")
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
    entry = entry_of(place)
    wanted = {EXPORTS[kind][2] for kind in takes.kinds}
    if entry is not None and entry not in wanted:
        holds = next((what for _, what, who in EXPORTS.values() if who == entry), "other weights")
        return f"is a run of {entry}, which makes {holds}"
    if spoilt:
        return f"is a run without whole weights ({spoilt[0].split(';')[0]})"
    if entry is not None:
        return "is a run that has not saved yet: wait for its first checkpoint"
    if read_summary(place).get("status") == "failed":
        return "is a start that failed, and has no weights"
    files = sorted(one.name for one in place.iterdir() if one.suffix in WEIGHTS)
    if files:
        return f"is a folder; name the file in it, such as {place / files[0]}"
    return "is a folder without weights" if any(place.iterdir()) else "is an empty folder"


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; empty where there is none that can be read."""
    try:
        told = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, folder / "summary.json")
        return {}
    return told if isinstance(told, dict) else {}


def entry_of(folder: Path) -> str | None:
    """The entry whose run a folder holds, such as sami/pretrain.py; None if it holds no run.

    A start that failed before it began leaves a summary.json alone, and is no run.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    exported = [who for name, _, who in EXPORTS.values() if exists(folder / name)]
    if not (checkpoints or exported or exists(folder / "config.yaml")):
        return None
    entry = read_summary(folder).get("entry")
    if isinstance(entry, str):
        return entry
    try:  # a run of an earlier version, or without its summary
        groups = re.findall(r"^(\w+):", (folder / "config.yaml").read_text(encoding="utf-8"), re.M)
    except (OSError, ValueError) as error:
        raise_if_machine(error, folder / "config.yaml")
        groups = []
    return entry_of_groups(groups) or next(iter(exported), None)


def entry_of_groups(groups: Collection[str]) -> str | None:
    """The entry that has these groups of fields."""
    of_group = (("mask", "encoder"), ("prompt", "model"), ("augment", "classifier"))
    return next((EXPORTS[kind][2] for group, kind in of_group if group in groups), None)


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
            if _identify(stream, file, what, takes.remedy(option)) == "safetensors":
                told = _header(stream).get("__metadata__") or {}
                takes.refuse(next((k for k in EXPORTS if k in told), None), what, option)
    except UserError as error:
        return str(error)
    return None


def read_weights(file: Path, takes: Takes, option: str = "") -> Weights:
    """The tensors of a file, whoever wrote it.

    Read are torch's files, new and old, safetensors, and a zip that holds one of these. A state
    dict may lie below one of WRAPPERS, and its names may be those of a wrapped module.

    Raises:
        UserError: it is something else, cut short, damaged, or would have to be unpickled.
        OSError: the machine cannot read it.
    """
    what, remedy = f"{option} {file}".strip(), takes.remedy(option)
    try:
        with file.open("rb") as stream:
            weights = _read(stream, file, what, remedy)
    except OSError as error:
        if error.errno is None:  # safetensors calls a file not there, whatever the reason
            file.open("rb").close()
        raise_if_machine(error, file)
        raise
    takes.refuse(weights.kind, what, option)
    return weights


def _identify(stream: BinaryIO, file: Path, what: str, remedy: str) -> str:
    """torch, zip, old (torch before 1.6) or safetensors, by its first bytes and its size.

    Raises:
        UserError: it is none of these, or shorter than it should be.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(512)
    stream.seek(0)
    for ending in BESIDE:
        beside = file.with_name(file.name + ending)
        if ending == ".aria2" and exists(beside):
            raise UserError(f"{what} is still being downloaded ({beside.name} lies beside it)")
    cut = f"is cut short: {AGAIN}, after the download or copy has ended"
    if any(exists(file.with_name(file.name + ending)) for ending in BESIDE) or (
        file.suffix.lower() in UNFINISHED
    ):
        cut = "is a download that has not ended; wait for it, or fetch it again"

    def no(words: str) -> UserError:
        return UserError(f"{what} {words}; {remedy}")

    if not head:
        raise no(f"is empty (0 bytes); {AGAIN}")
    for magic, words in OTHERS:
        if head.startswith(magic):
            raise no(f"is {words}")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        raise no(
            "is a web page (HTML), which was saved in place of the file; fetch the file itself, "
            "by the link of its download"
        )
    if text.startswith(b"<"):
        raise no("is XML, as a server answers with an error; look into it, and fetch it again")
    if head.startswith(b"PK\x03\x04"):
        stream.seek(max(0, size - ZIP_END))
        stream.read()  # what is_zipfile looks at, and takes an error of the disk for no zip
        if not zipfile.is_zipfile(stream):
            raise no(cut)
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
        stream.seek(0)
        depths = {name.count("/") for name in names if name.split("/")[-1] == "data.pkl"}
        if depths & {0, 1} and any("/code/" in f"/{n}" for n in names):
            raise no("is a TorchScript program and not plain weights")
        return "torch" if depths & {0, 1} else "zip"
    if head.startswith(b"PK\x05\x06"):
        raise no("is an empty zip archive")
    if head.startswith(TORCH_PICKLE):
        return "old"
    if head.startswith(TORCH_PICKLE[: len(head)]):
        raise no(cut)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise no("is a Python pickle, which could run anything when it is loaded, and is not read")
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and length < 1 << 27:
        if size < 8 + length:
            raise no(cut)
        try:
            told = _header(stream)
            ends = [one["data_offsets"][1] for n, one in told.items() if n != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise no("is damaged: its header is no JSON of safetensors") from error
        stream.seek(0)
        if size < 8 + length + max(ends, default=0):
            raise no(cut)
        return "safetensors"
    if text.startswith((b"{", b"[")):
        raise no("is JSON, as a server answers with an error; look into it, and fetch it again")
    if head[257:262] == b"ustar":
        raise no("is a tar archive; unpack it and name what is inside")
    if not head.strip(b"\0"):
        raise no(f"begins with zeros: nothing was written there yet, or it is lost; {AGAIN}")
    if file.suffix.lower() == ".onnx":
        raise no("is an ONNX file, a program and not plain weights")
    try:
        head.decode()
        raise no("is a text and no weights")
    except UnicodeDecodeError:
        pass
    raise no("is no file of weights that is known here, or is damaged")


def _header(stream: BinaryIO) -> dict[str, Any]:
    """The JSON that a safetensors file begins with."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    return json.loads(stream.read(length))


def _read(stream: BinaryIO, file: Path, what: str, remedy: str) -> Weights:
    form = _identify(stream, file, what, remedy)
    if form == "zip":
        return _read_packed(stream, file, what, remedy)
    if form == "torch":
        _check_sums(stream, what, remedy)
    metadata: dict[str, str] = {}
    try:
        if form == "safetensors":
            metadata = _header(stream).get("__metadata__") or {}
            stream.seek(0)
            alone = isinstance(stream, io.BytesIO)
            stored = load_safetensors(stream.read()) if alone else load_file(file)
        else:
            # torch.load goes by the ending of a name
            named = file.suffix == ".safetensors" or isinstance(stream, io.BytesIO)
            mapped = form == "torch" and not named
            place = file if mapped else stream
            stored = torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as error:
        raise_if_machine(error, file)
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{what} holds Python objects ({foreign[1]}) beside tensors; pickles could run "
                "anything and are not executed: let its author save the state_dict alone, as "
                f"safetensors or by torch.save(model.state_dict(), ...); {remedy}"
            ) from error
        words = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"{what} is cut short or damaged ({words}): {AGAIN}; {remedy}") from error
    tensors = _state_dict(stored, what, remedy)
    return Weights(_plain_names(tensors, what, remedy), metadata)


def _check_sums(stream: BinaryIO, what: str, remedy: str) -> None:
    """Whether all of torch's file is there: torch itself would read a hole in it as zeros."""
    with zipfile.ZipFile(stream) as archive:
        for item in archive.infolist():
            if item.CRC == 0:  # torch can be told not to compute them
                continue
            try:
                with archive.open(item) as member:
                    while member.read(1 << 22):
                        pass
            except BROKEN as error:
                raise UserError(
                    f"{what} is damaged, or its download has not ended (a checksum is wrong): "
                    f"{AGAIN}; {remedy}"
                ) from error
    stream.seek(0)


def _read_packed(stream: BinaryIO, file: Path, what: str, remedy: str) -> Weights:
    """The one file of weights in a zip archive, as EfficientSAM-S is shipped."""
    with zipfile.ZipFile(stream) as archive:
        items = [
            item
            for item in archive.infolist()
            if Path(item.filename).suffix.lower() in WEIGHTS
            and not any(part[0] in "._" for part in Path(item.filename).parts)
        ]
        if len(items) != 1:
            inside = [item.filename for item in items] or archive.namelist()
            raise UserError(
                f"{what} is a zip archive with {len(items) or 'no'} files of weights "
                f"({', '.join(inside[:3])}); unpack it and name one; {remedy}"
            )
        if items[0].flag_bits & 1:
            raise UserError(f"{what} is locked by a password; unpack it first; {remedy}")
        inner = Path(items[0].filename)
        try:
            data = io.BytesIO(archive.read(items[0]))
        except BROKEN as error:
            raise UserError(
                f"{what} is cut short or damaged ({error}): {AGAIN}; {remedy}"
            ) from error
    what = f"{what}, {inner} in it,"
    if _identify(data, inner, what, remedy) == "zip":
        raise UserError(f"{what} is a zip archive again; unpack it and name one; {remedy}")
    return _read(data, inner, what, remedy)


def _state_dict(stored: Any, what: str, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors by name in what a file holds, wherever it keeps them."""
    if isinstance(stored, dict):
        sides = [side for side in SIDES if _holds_tensors(stored.get(side))]
        inner = next((key for key in WRAPPERS if _holds_tensors(stored.get(key))), None)
        if inner is None and len(sides) > 1:
            raise UserError(
                f"{what} holds two sets of weights ({', '.join(sides)}), and which is meant cannot "
                f"be known; save one of them alone; {remedy}"
            )
        if inner is not None or sides:
            return _state_dict(stored[inner or sides[0]], what, remedy)
        found = {
            str(name): tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in stored.items()
            if isinstance(tensor, torch.Tensor)
        }
        if found:
            return found
    raise UserError(f"{what} holds no tensors by name ({type(stored).__name__}); {remedy}")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(one, torch.Tensor) or _holds_tensors(one) for one in value.values()
    )


def _plain_names(
    tensors: dict[str, torch.Tensor], what: str, remedy: str
) -> dict[str, torch.Tensor]:
    """The names without what wrappers put into them.

    Raises:
        UserError: two names become one.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPED]
        plain = ".".join(parts)
        if plain in result:
            raise UserError(f"{what} holds {plain} twice, wrapped and not; {remedy}")
        result[plain] = tensor
    for root in ROOTS:
        if result and all(name.startswith(f"{root}.") for name in result):
            result = {name.removeprefix(f"{root}."): tensor for name, tensor in result.items()}
    return result


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
