"""Time and memory of a model that is compared: its two steps, batches, everything mode."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.candidates import Candidate, open_candidate
from sami.core.dataset import SampleSource
from sami.core.errors import BadSample, MachineError, UserError
from sami.core.images import open_image
from sami.core.memory import forget_highest, held, highest, is_counted, release
from sami.core.processes import seconds_of
from sami.core.progress import track
from sami.core.scanning import IMAGE

LARGEST_BATCH = 64
GAIN = 1.05  # a larger batch is tried as long as it brings so many times the images a second


def first_image(source: SampleSource) -> np.ndarray:
    """The first image that can be read, uint8 [H, W, 3].

    Raises:
        UserError: there is none.
    """
    reason = "there are none"
    for number in range(len(source)):
        (raw,) = source.read([number])
        try:
            return np.asarray(open_image(raw.part(IMAGE)).decode())
        except BadSample as error:
            reason = str(error)
    raise UserError(f"none of the images can be read ({reason}); name others")


@torch.no_grad()
def time_steps(
    model: Candidate, image: np.ndarray, device: torch.device, bf16: bool, rounds: int
) -> dict[str, Any]:
    """Latency in ms at batch 1, of the first step and of one click; images/s at the best batch.

    Medians, after a call that does not count.

    Args:
        image: that is timed, uint8 [H, W, 3].
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        one = model.inputs(image, 1)
        embedded = model.first_step(one)
        first = _seconds(lambda: model.first_step(one), rounds, device)
        click = _seconds(lambda: model.click(embedded), rounds, device)
        found = {"encoder_ms": 1e3 * first, "decoder_ms": 1e3 * click}
        found |= {"images_per_second": 1 / first, "batch": 1}
        batch = 1
        while 2 * batch <= LARGEST_BATCH:
            batch *= 2
            several = model.inputs(image, batch)
            try:
                seconds = _seconds(
                    lambda x=several: model.first_step(x), max(3, rounds // 3), device
                )
            except torch.OutOfMemoryError:
                break
            if batch / seconds < GAIN * found["images_per_second"]:
                break
            found |= {"images_per_second": batch / seconds, "batch": batch}
    return found


def _seconds(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The median of a call's time, after one that does not count."""
    return statistics.median([seconds_of(call, device) for _ in range(rounds + 1)][1:])


def time_everything(
    model: Candidate, image: np.ndarray, sides: list[int]
) -> dict[str, dict[str, float]]:
    """Everything mode on an image: ms and masks by points a side, after a call that does not count.

    Without a grid of points it is timed once, and stands for all.
    """
    found: dict[str, dict[str, float]] = {}
    if sides:
        model.everything(image, 1)
    for side in track(sides, "everything mode", total=len(sides)):
        if found and not model.uses_grid:
            found[str(side)] = next(iter(found.values()))
            continue
        started = time.perf_counter()
        masks = model.everything(image, side)
        found[str(side)] = {"ms": 1e3 * (time.perf_counter() - started), "masks": masks}
    return found


def peak_memory(
    path: Path, option: str, image: np.ndarray, device: torch.device, bf16: bool
) -> float | None:
    """GB of a model and of both its steps at batch 1, at most; None where nothing counts it.

    On a GPU what tensors take. On a CPU what a process of its own takes more than before it read
    the weights: neither the libraries, nor what reading took in passing.

    Args:
        path: of weights, see :func:`finetune.candidates.open_candidate`.

    Raises:
        UserError: they cannot be opened.
    """
    given = path, option, image, device, bf16, torch.get_num_threads()
    if not is_counted(device):
        return None
    if device.type == "cuda":
        return _peak_memory(*given)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_peak_memory, *given).result()
    except BrokenProcessPool as error:
        raise MachineError(
            f"{option} {path} ended the process that measured its memory; the machine may have too "
            "little of it for this model"
        ) from error


@torch.no_grad()
def _peak_memory(
    path: Path, option: str, image: np.ndarray, device: torch.device, bf16: bool, threads: int
) -> float:
    torch.set_num_threads(threads)
    found = 0.0
    for _ in range(2):  # what the first time loads of libraries, 70 MB, is not the model's
        release()
        before = held(device)
        model = open_candidate(path, option, device)
        inputs = model.inputs(image, 1)
        release()
        forget_highest(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model.click(model.first_step(inputs))
        found = highest(device) - before
        del model, inputs
    return found
