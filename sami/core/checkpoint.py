"""Checkpoints that are whole or not there, and small weight files that describe themselves.

``checkpoints/step-<n>/`` holds ``state.pt`` (tensors and plain data), the weights alone as the run
will export them, and ``meta.json`` (step, configuration, sha256 of the files). It is written under
another name, synced and renamed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sami.core.errors import raise_if_machine
from sami.core.paths import exists

STATE, META = "state.pt", "meta.json"


class Damaged(Exception):
    """A checkpoint that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True)
class Export:
    """A file of weights that describes itself: what a run leaves for others."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def write(self, folder: Path) -> str:
        """Into a folder, atomically; returns its name."""
        write_weights(folder / self.name, self.tensors, self.metadata)
        return self.name


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    leave: Callable[[Path], str] | None = None,
) -> Path:
    """Write ``folder/step-<step>`` atomically, then drop all but the newest ``keep``.

    Args:
        leave: writes the weights alone into a folder, for all but the run itself, and tells the
            file's name.

    Raises:
        OSError: for example a full disk; earlier checkpoints are as they were.
    """
    final = folder / f"step-{step}"
    temporary = folder / f".writing-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_state(state, temporary / STATE)
        info = {**meta, "step": step, "sha256": sha256_of(temporary / STATE)}
        if leave is not None:
            name = leave(temporary)
            info["files"] = {name: sha256_of(temporary / name)}
        (temporary / META).write_text(json.dumps(info, indent=1), encoding="utf-8")
        for name in (STATE, META):
            _sync(temporary / name)
        if exists(final):  # of a run that was cut back behind it
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest step first."""
    # Not glob: to it a folder that may not be listed is empty, and the run would begin anew.
    names = os.listdir(folder) if exists(folder) else []
    found = [folder / name for name in names if re.fullmatch(r"step-\d+", name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        Damaged: no or unreadable ``meta.json``.
    """
    try:
        return json.loads((checkpoint / META).read_bytes())
    except (OSError, ValueError) as error:
        raise_if_machine(error, checkpoint / META)
        raise Damaged(f"{checkpoint} has no readable {META}") from error


def check_file(checkpoint: Path, name: str) -> None:
    """Raise Damaged if a checkpoint's file of weights is missing, cut short or changed."""
    try:
        whole = sha256_of(checkpoint / name) == read_meta(checkpoint)["files"][name]
    except (KeyError, FileNotFoundError) as error:
        raise Damaged(f"{checkpoint} has no {name}") from error
    if not whole:
        raise Damaged(f"{name} differs from its checksum in {META}")


def read_state(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """The tensors and plain data of a checkpoint, after its checksum.

    Raises:
        Damaged: missing, cut short or changed.
        MachineError: it cannot be read, and may be whole.
    """
    try:
        whole = sha256_of(checkpoint / STATE) == read_meta(checkpoint)["sha256"]
    except (OSError, KeyError) as error:
        raise_if_machine(error, checkpoint / STATE)
        raise Damaged(f"{checkpoint} is damaged: {error}") from error
    if not whole:
        raise Damaged(f"{checkpoint} is damaged: {STATE} differs from its recorded checksum")
    place = "cpu" if device.type == "cpu" else device  # torch.load does not know "cpu:0"
    return torch.load(checkpoint / STATE, map_location=place, weights_only=True)


def write_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with its header, atomically.

    With one key of metadata the same content gives the same bytes; the library orders several at
    random.
    """
    temporary = path.with_name(f".{path.name}.writing")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask and the folder have it; the library's is 0600
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:  # its words hold the file system's refusal
        raise_if_machine(error, path)
        raise
    temporary.chmod(mode)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """A small text file, atomically; as UTF-8, names that are not UTF-8 as they are."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    _sync(temporary)
    temporary.replace(path)


def _write_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, with the file system's refusals as OSError."""
    try:
        torch.save(state, path)
        return
    except RuntimeError as error:  # torch's zip writer says so of a write that came out short
        failure = str(error)
    # Out of the handler: the error keeps the writer alive, and the writer its file open.
    short = shutil.disk_usage(path.parent).free < _bytes(state)
    raise OSError(errno.ENOSPC if short else errno.EIO, failure, str(path))


def _bytes(state: Any) -> int:
    """Bytes of the tensors in plain data."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state
    return sum(map(_bytes, values)) if isinstance(state, (dict, list, tuple)) else 0


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
