"""Models side by side: cost, speed and mIoU of each by one protocol, a file for each row."""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.evaluation import EvalDataset, EvalSample, masks_of
from finetune.everything import MaskGenerator
from finetune.losses import mask_iou
from finetune.measures import mean as mean_of
from finetune.measures import resample
from finetune.measuring import measure, promptings_of
from finetune.sam import Sam
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.dataset import SampleSource
from sami.core.images import open_image
from sami.core.progress import track
from sami.core.scanning import IMAGE

LARGEST_BATCH = 64
GAIN = 1.05  # a larger batch is tried as long as it brings so many times the images a second


@dataclass
class Row:
    """A model that is compared.

    Attributes:
        name: as it stands in the table.
        checkpoint: whatever :func:`finetune.model.load_model` opens; null for one whose weights
            are not public: it is listed with its paper's numbers.
        paper: the model's own paper's numbers, by column: ``source``; ``box``, ``1 click``,
            ``3 clicks`` in %; ``parameters`` in millions; ``latency`` in ms.
    """

    name: str
    checkpoint: str | None = None
    paper: dict[str, str | float] = field(default_factory=dict)


@dataclass
class ComparisonFile:
    """A file of configs/compare/; see docs/compare.md.

    Attributes:
        rows: what is compared.
        out: folder of the results.
        shards: SA-1B's layout; or ``coco``, annotations, with ``images``, their folder.
        prompts: as of tools/evaluate.py.
        seeds: draws of random clicks; ``seed``: of all that is drawn.
        samples: at most so many images; ``masks``: at most so many objects of each.
        reference: name of the row whose masks the others' are compared with.
        everything: points a side of the grids that everything mode is timed with.
        rounds: timings, of which the median counts.
    """

    rows: list[dict[str, Any]]
    out: str | None = None
    shards: list[str] = field(default_factory=list)
    coco: str | None = None
    images: str | None = None
    prompts: list[str | int] = field(default_factory=lambda: ["box", 1, 3, "centre-1"])
    seeds: int = 3
    seed: int = 0
    samples: int | None = None
    masks: int | None = None
    reference: str | None = None
    everything: list[int] = field(default_factory=list)
    rounds: int = 11


def check_rows(rows: list[Row], reference: str | None, path: str) -> None:
    """
    Raises:
        UserError: no rows, a name twice, or a reference that is none or has no weights.
    """
    require(bool(rows), f"{path} names no rows; see configs/compare/")
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{path} names the row '{twice}' twice; call one of them otherwise")
    if reference is not None:
        known = [row.name for row in rows if row.checkpoint]
        require(
            reference in known,
            f"{path}: reference '{reference}' is none of the rows with weights: {', '.join(known)}",
        )


# -- one row ------------------------------------------------------------------------------------


class RowFiles:
    """The finished rows of a folder, found again by what they were computed from."""

    def __init__(self, folder: Path, protocol: dict[str, Any]) -> None:
        """``protocol``: all that a row's numbers follow from beside its weights."""
        self.folder, self.protocol = folder / "rows", protocol

    def path(self, sha256: str) -> Path:
        key = json.dumps(self.protocol | {"sha256": sha256}, sort_keys=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def read(self, sha256: str) -> dict[str, Any] | None:
        """A finished row; None if it has to be computed."""
        try:
            content = json.loads(self.path(sha256).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and "miou" in content else None

    def write(self, sha256: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path(sha256), json.dumps(content, indent=1) + "\n")


def count_costs(model: Sam) -> dict[str, float]:
    """Parameters, and multiply-adds of an image and of one click; the model lies on the CPU."""
    image, points, labels = _inputs(model, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as encoder:
            embedding = model.image_encoder(image)
        with FlopCounterMode(display=False) as decoder:
            model.predict_low_resolution(embedding, points, labels)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "encoder_parameters": sum(p.numel() for p in model.image_encoder.parameters()),
        "encoder_macs": encoder.get_total_flops() / 2,
        "decoder_macs": decoder.get_total_flops() / 2,
    }


@torch.no_grad()
def time_model(model: Sam, device: torch.device, bf16: bool, rounds: int) -> dict[str, Any]:
    """Latency in ms at batch 1, encoder and one click apart; images/s at the best batch.

    Medians, after a call that does not count. ``peak_memory_gb`` is the card's, of the best batch.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        image, points, labels = _inputs(model, 1, device)
        embedding = model.image_encoder(image)
        found: dict[str, Any] = {
            "encoder_ms": 1e3 * _seconds(lambda: model.image_encoder(image), rounds, device),
            "decoder_ms": 1e3
            * _seconds(
                lambda: model.predict_low_resolution(embedding, points, labels), rounds, device
            ),
        }
        best, batch = 1e3 / found["encoder_ms"], 1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found |= {"images_per_second": best, "batch": 1, "peak_memory_gb": None}
        while 2 * batch <= LARGEST_BATCH:
            batch *= 2
            images = image.expand(batch, -1, -1, -1).contiguous()
            try:
                seconds = _seconds(
                    lambda x=images: model.image_encoder(x), max(3, rounds // 3), device
                )
            except torch.OutOfMemoryError:
                break
            if batch / seconds < GAIN * best:
                break
            best = batch / seconds
            found |= {"images_per_second": best, "batch": batch}
        if device.type == "cuda":
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _inputs(
    model: Sam, batch: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of noise as the encoder takes them, and one click in the middle of each."""
    side = model.shape.image_size
    images = torch.randn(batch, 3, side, side, device=device)
    points = torch.full((batch, 1, 1, 2), side / 2, device=device)
    return images, points, torch.ones(batch, 1, 1, device=device)


def _seconds(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The median of a call's time, after one that does not count."""
    times = []
    for turn in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def time_everything(
    model: Sam, source: SampleSource, sides: list[int]
) -> dict[str, dict[str, float]]:
    """Everything mode on the first image that can be read: seconds and masks by points a side."""
    if not sides:
        return {}
    (raw,) = source.read([0])
    image = np.asarray(open_image(raw.part(IMAGE)).decode())
    found = {}
    for side in track(sides, "everything mode", total=len(sides)):
        started = time.perf_counter()
        masks = MaskGenerator(model, side, output_mode="coco_rle").generate(image)
        found[str(side)] = {"ms": 1e3 * (time.perf_counter() - started), "masks": len(masks)}
    return found


@torch.no_grad()
def agreement(
    model: Sam, reference: Sam, source: SampleSource, asked: Any, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Mean IoU of a model's masks with another's, for the same prompts; by prompt, with interval.

    Of random clicks the first draw alone. ``asked`` as :func:`finetune.measuring.measure` has it.
    """
    specs = [s for s in promptings_of(asked.prompts, asked.seeds, model) if s.draw == 0]
    sets = [
        EvalDataset(source, one.shape, tuple(specs), asked.masks, asked.seed, asked.masks_drawn_on)
        for one in (model, reference)
    ]
    values: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in specs}
    images: list[int] = []
    for number in track(range(len(source)), "agreement", total=len(source)):
        pair = [dataset[number] for dataset in sets]
        if not all(isinstance(one, EvalSample) for one in pair):
            continue
        images += [number] * len(pair[0].ends)
        for spec in specs:
            ours, theirs = (
                masks_of(one, sample, device, spec)[0]
                for one, sample in zip((model, reference), pair, strict=True)
            )
            values[spec.name].append(mask_iou(ours, theirs).double())
    where = np.unique(np.array(images), return_inverse=True)[1]
    weights = resample(int(where.max()) + 1, asked.seed)
    return {name: mean_of(torch.cat(v).numpy(), where, weights) for name, v in values.items()}


def compute_row(
    model: Sam,
    source: SampleSource,
    asked: Any,
    device: torch.device,
    file: ComparisonFile,
    reference: Sam | None,
) -> dict[str, Any]:
    """All numbers of one model."""
    found: dict[str, Any] = {"shape": asdict(model.shape)}
    found |= count_costs(model)
    model = model.to(device)
    found |= time_model(model, device, asked.precision == "bf16", file.rounds)
    found["everything"] = time_everything(model, source, file.everything)
    if reference is not None:
        found["agreement"] = agreement(model, reference, source, asked, device)
    specs = promptings_of(asked.prompts, asked.seeds, model)
    measured, _, unusable, _ = measure(model, source, specs, asked, device)
    found |= {"images": len(measured.areas), "unusable": dict(unusable)}
    found["miou"] = measured.rows(asked.seed)
    return found
