"""Memory of this process, as the system or the card counts it, in GB (1e9 bytes)."""

import ctypes
import gc
import os
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held(device: torch.device) -> float:
    """What is held now: of a GPU by tensors, otherwise of main memory by the process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return _status("VmRSS")


def highest(device: torch.device) -> float:
    """The most that was held, since the start or :func:`forget_highest`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return _status("VmHWM")


def forget_highest(device: torch.device) -> None:
    """Let :func:`highest` count from here on.

    Raises:
        OSError: the system does not allow it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        RESET.write_text("5", encoding="ascii")


def release() -> None:
    """Give freed memory back to the system, as far as the C library can; else it is still held."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def is_counted(device: torch.device) -> bool:
    """Whether these functions work here: on a GPU, or on Linux where /proc can be written."""
    return device.type == "cuda" or (device.type == "cpu" and os.access(RESET, os.W_OK))


def _status(name: str) -> float:
    (line,) = [one for one in STATUS.read_text("utf-8").splitlines() if one.startswith(name)]
    return int(line.split()[1]) * 1024 / 1e9
