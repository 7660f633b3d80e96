"""One file of weights, whoever wrote it: what it is, by its first bytes, and its tensors by name.

Pickles are never executed: torch reads its own files with ``weights_only``, and what needs more is
refused. What is wrong with a file is said in words that begin with ``what``, the file's name in a
sentence.
"""

import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from sami.core.errors import raise_if_machine
from sami.core.paths import exists

WEIGHTS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
# Where files keep their state dict, the most likely place first; an average is taken where nothing
# else is there.
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
TORCH_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6
AGAIN = "fetch or copy it again"
ANSWERED = "as a server answers with an error; look into it, and fetch it again"
UNPACK = "unpack it and name what is inside"
# What other files begin with, and what to do about it.
OTHERS = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file; run git lfs pull where it "
     "is"),
    (rb"\x1f\x8b", "is packed by gzip; unpack it (gunzip) and name what is inside"),
    (rb"\xfd7zXZ", f"is packed by xz; {UNPACK}"),
    (rb"BZh", f"is packed by bzip2; {UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"is packed by zstd; {UNPACK}"),
    (rb"7z\xbc\xaf", f"is a 7z archive; {UNPACK}"),
    (rb"Rar!", f"is a RAR archive; {UNPACK}"),
    (rb".{257}ustar", f"is a tar archive; {UNPACK}"),
    (rb"PK\x05\x06", "is an empty zip archive"),
    (rb"\x89HDF", "is an HDF5 file, as Keras writes it, and not torch's weights"),
    (rb"\x93NUMPY", "is a NumPy array, and not torch's weights"),
    (rb"[\xef\xbb\xbf\s]*<(?i:!doctype html|html|head|body|script)", "is a web page (HTML), which "
     "was saved in place of the file; fetch the file itself, by the link of its download"),
    (rb"[\xef\xbb\xbf\s]*<", f"is XML, {ANSWERED}"),
    (rb"[\xef\xbb\xbf\s]*[{\[]", f"is JSON, {ANSWERED}"),
    (rb"\x80[\x02-\x05]", "is a Python pickle, which could run anything when it is loaded, and is "
     "not read"),
    (rb"\0*\Z", f"begins with zeros: nothing was written there yet, or it is lost; {AGAIN}"),
)  # fmt: skip
ZIP_END = 65_557  # bytes at the end of a zip in which its table begins
BROKEN = (  # what torch, pickle and zipfile raise on bytes that are not what they should be
    *(RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, AssertionError, OverflowError, ImportError, struct.error, SafetensorError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


class NotWeights(Exception):
    """What a file is instead, or what is wrong with it, in words; the remedy is the caller's."""


def identify(stream: BinaryIO, file: Path, what: str) -> str:
    """torch, zip, old (torch before 1.6) or safetensors, by its first bytes and its size.

    Raises:
        NotWeights: it is none of these, or shorter than it should be.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(512)
    beside = [one for one in BESIDE if exists(file.with_name(file.name + one))]
    if ".aria2" in beside:
        raise NotWeights(f"{what} is still being downloaded ({file.name}.aria2 lies beside it)")
    if not head:
        raise NotWeights(f"{what} is empty (0 bytes); {AGAIN}")
    cut = NotWeights(f"{what} is cut short: {AGAIN}, after the download or copy has ended")
    if beside or file.suffix.lower() in UNFINISHED:
        cut = NotWeights(f"{what} is a download that has not ended; wait for it, or fetch it again")
    if head.startswith(b"PK\x03\x04"):
        stream.seek(max(0, size - ZIP_END))
        stream.read()  # what is_zipfile looks at, and takes an error of the disk for no zip
        if not zipfile.is_zipfile(stream):
            raise cut
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
        depths = {name.count("/") for name in names if name.split("/")[-1] == "data.pkl"}
        if depths & {0, 1} and any("/code/" in f"/{name}" for name in names):
            raise NotWeights(f"{what} is a TorchScript program and not plain weights")
        return "torch" if depths & {0, 1} else "zip"
    if head.startswith(TORCH_PICKLE):
        return "old"
    if TORCH_PICKLE.startswith(head):
        raise cut
    # Before all others: the length that it begins with may be any bytes, those of "<" too.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 27:
        if size < 8 + length:
            raise cut
        try:
            found = read_header(stream)
            ends = [one["data_offsets"][1] for n, one in found.items() if n != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise NotWeights(f"{what} is damaged: its header is no JSON of safetensors") from error
        if size < 8 + length + max(ends, default=0):
            raise cut
        return "safetensors"
    for pattern, words in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise NotWeights(f"{what} {words}")
    if file.suffix.lower() == ".onnx":
        raise NotWeights(f"{what} is an ONNX file, a program and not plain weights")
    try:
        head.decode()
    except UnicodeDecodeError:
        raise NotWeights(
            f"{what} is no file of weights that is known here, or is damaged"
        ) from None
    raise NotWeights(f"{what} is a text and no weights")


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The JSON that a safetensors file begins with."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    return json.loads(stream.read(length))


def read_tensors(
    stream: BinaryIO, file: Path, what: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, floating ones as fp32, and the metadata of a safetensors file.

    Read are torch's files, new and old, safetensors, and a zip that holds one of these. A state
    dict may lie below one of WRAPPERS, and its names may be those of a wrapped module.

    Raises:
        NotWeights: it is something else, cut short, damaged, or would have to be unpickled.
        OSError: the machine cannot read it.
    """
    form, metadata = identify(stream, file, what), {}
    if form == "zip":
        return _read_packed(stream, what)
    if form == "torch":
        check_sums(stream, what)
    in_memory = isinstance(stream, io.BytesIO)
    try:
        if form == "safetensors":
            metadata = read_header(stream).get("__metadata__") or {}
            stored = load_safetensors(stream.getvalue()) if in_memory else load_file(file)
        else:
            stream.seek(0)
            # torch.load goes by the ending of a name
            mapped = form == "torch" and not in_memory and file.suffix != ".safetensors"
            place = file if mapped else stream
            stored = torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    except BROKEN as error:
        raise_if_machine(error, file)
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign and isinstance(error, pickle.UnpicklingError):
            raise NotWeights(
                f"{what} holds Python objects ({foreign[1]}) beside tensors; pickles could run "
                "anything and are not executed: let its author save the state_dict alone, as "
                "safetensors or by torch.save(model.state_dict(), ...)"
            ) from error
        raise _damaged(what, error) from error
    return _plain_names(_state_dict(stored, what), what), metadata


def _damaged(what: str, error: Exception) -> NotWeights:
    words = " ".join(str(error).split())[:100] or type(error).__name__
    return NotWeights(f"{what} is cut short or damaged ({words}): {AGAIN}")


def check_sums(stream: BinaryIO, what: str) -> None:
    """Check that all of torch's file is there: torch itself would read a hole in it as zeros.

    Raises:
        NotWeights: a checksum is wrong.
    """
    with zipfile.ZipFile(stream) as archive:
        for item in archive.infolist():
            if item.CRC == 0:  # torch can be told not to compute them
                continue
            try:
                with archive.open(item) as member:
                    while member.read(1 << 22):
                        pass
            except BROKEN as error:
                raise NotWeights(
                    f"{what} is damaged, or its download has not ended (a checksum is wrong): "
                    f"{AGAIN}"
                ) from error


def _read_packed(stream: BinaryIO, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
            raise NotWeights(
                f"{what} is a zip archive with {len(items) or 'no'} files of weights "
                f"({', '.join(inside[:3])}); unpack it and name one"
            )
        if items[0].flag_bits & 1:
            raise NotWeights(f"{what} is locked by a password; unpack it first")
        try:
            data = io.BytesIO(archive.read(items[0]))
        except BROKEN as error:
            raise _damaged(what, error) from error
    inner = Path(items[0].filename)
    what = f"{what}, {inner} in it,"
    if identify(data, inner, what) == "zip":
        raise NotWeights(f"{what} is a zip archive again; unpack it and name one")
    return read_tensors(data, inner, what)


def _state_dict(stored: Any, what: str) -> dict[str, torch.Tensor]:
    """The tensors by name in what a file holds, wherever it keeps them."""
    if isinstance(stored, dict):
        sides = [side for side in SIDES if _holds_tensors(stored.get(side))]
        inner = next((key for key in WRAPPERS if _holds_tensors(stored.get(key))), None)
        if inner is None and len(sides) > 1:
            raise NotWeights(
                f"{what} holds two sets of weights ({', '.join(sides)}), and which is meant cannot "
                "be known; save one of them alone"
            )
        if inner is not None or sides:
            return _state_dict(stored[inner or sides[0]], what)
        found = {
            str(name): tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in stored.items()
            if isinstance(tensor, torch.Tensor)
        }
        if found:
            return found
    raise NotWeights(f"{what} holds no tensors by name ({type(stored).__name__})")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(one, torch.Tensor) or _holds_tensors(one) for one in value.values()
    )


def _plain_names(tensors: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """The names without what wrappers put into them.

    Raises:
        NotWeights: two names become one.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPED)
        if plain in result:
            raise NotWeights(f"{what} holds {plain} twice, wrapped and not")
        result[plain] = tensor
    for root in ROOTS:
        if result and all(name.startswith(f"{root}.") for name in result):
            result = {name.removeprefix(f"{root}."): tensor for name, tensor in result.items()}
    return result
