"""Models side by side: cost, speed and mIoU of each by one protocol, a file for each row."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.box_masks import Choose
from finetune.candidates import Candidate, open_candidate
from finetune.evaluation import EvalDataset, EvalSample
from finetune.instances import BoxedImages, measure_instances
from finetune.losses import mask_iou
from finetune.measures import mean as mean_of
from finetune.measures import resample
from finetune.measuring import measure, promptings_of
from finetune.proposals import measure_proposals
from finetune.speed import first_image, peak_memory, time_everything, time_steps
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.dataset import SampleSource
from sami.core.progress import track

SEE = "see docs/compare.md"
POSITIVE = ("samples", "masks", "seeds", "rounds", "proposals")  # of a file, if given
ONE_CLICK = "1 click"
PROMPTS = ("box", ONE_CLICK, "3 clicks")  # that papers have mIoU for
PAPER = (*PROMPTS, "parameters", "latency")  # what a row's paper may tell
VERSION = 3  # of what a row holds and how it is measured; a kept row of another one is not read


@dataclass
class Row:
    """A model that is compared.

    Attributes:
        name: as it stands in the table.
        checkpoint: whatever :func:`finetune.candidates.open_candidate` opens; null for one whose
            weights are not public: it is listed with its paper's numbers.
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
        everything: points a side of the grids that everything mode is timed with; FastSAM has
            none, and one time.
        boxes: of a detector, in COCO's results format: AP on ``coco``; ``choose``: which of a
            box's masks is taken, as of tools/evaluate.py.
        proposals: points a side of the grid whose masks AR on ``coco`` is of.
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
    boxes: str | None = None
    choose: Choose = "predicted"
    proposals: int | None = None
    rounds: int = 11


def check_file(file: ComparisonFile, path: str) -> None:
    """
    Raises:
        UserError: no images or two sets of them, a number that is too small, no prompts, or what
            needs annotations of COCO's format does without.
    """
    require(
        bool(file.shards) or file.coco is not None,
        f"{path} names no images; give --shards PATTERN, or --coco FILE --images DIR",
    )
    require(
        not file.shards or file.coco is None,
        f"{path} names shards and coco, and a comparison is on one of them; leave one out",
    )
    require(bool(file.prompts), f"{path}: prompts is empty; name one, such as box")
    for name in POSITIVE:
        value = getattr(file, name)
        require(value is None or value > 0, f"{path}: {name} {value} must be positive")
    for side in file.everything:
        require(side > 0, f"{path}: everything {side} must be positive, points a side")
    require(file.seed >= 0, f"{path}: seed {file.seed} must be 0 or more")
    for name in ("boxes", "proposals"):
        require(
            getattr(file, name) is None or file.coco is not None,
            f"{path}: {name} go with coco, annotations in COCO's format; give --coco FILE "
            "--images DIR",
        )


def check_rows(rows: list[Row], reference: str | None, path: str) -> None:
    """
    Raises:
        UserError: no rows, a name twice or none, a paper's number that is none, or a reference that
            is none or has no weights.
    """
    require(bool(rows), f"{path} names no rows; see configs/compare/")
    names = [row.name.strip() for row in rows]
    require(all(names), f"{path} has a row without a name; give it one")
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{path} names the row '{twice}' twice; call one of them otherwise")
    for row in rows:
        for key, value in row.paper.items():
            told = f"{path}: row '{row.name}': paper: {key}"
            if key == "source":
                continue
            require(key in PAPER, f"{told} is none of source, {', '.join(PAPER)}")
            right = not isinstance(value, str) and 0 < value < float("inf")
            require(right, f"{told} is {value!r}, which is no positive number; leave it out")
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
        self.folder, self.protocol = folder / "rows", protocol | {"version": VERSION}

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


@torch.no_grad()
def agreement(
    model: Candidate, reference: Candidate, source: SampleSource, asked: Any
) -> dict[str, dict[str, Any]]:
    """Mean IoU of a model's masks with another's, for the same prompts; by prompt, with interval.

    Of random clicks the first draw alone. ``asked`` as :func:`finetune.measuring.measure` has it.
    """
    both = model, reference
    specs = [s for s in promptings_of(asked.prompts, asked.seeds, model) if s.draw == 0]
    options = tuple(specs), asked.masks, asked.seed, asked.masks_drawn_on
    sets = [EvalDataset(source, one.shape, *options) for one in both]
    values: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in specs}
    images: list[int] = []
    for number in track(range(len(source)), "agreement", total=len(source)):
        pair = [dataset[number] for dataset in sets]
        if not all(isinstance(one, EvalSample) for one in pair):
            continue
        images += [number] * len(pair[0].ends)
        masks = [one.masks(sample, tuple(specs)) for one, sample in zip(both, pair, strict=True)]
        for spec, ours, theirs in zip(specs, *masks, strict=True):
            values[spec.name].append(mask_iou(ours, theirs).double())
    where = np.unique(np.array(images), return_inverse=True)[1]
    weights = resample(int(where.max()) + 1, asked.seed)
    return {name: mean_of(torch.cat(v).numpy(), where, weights) for name, v in values.items()}


def compute_row(
    path: Path,
    option: str,
    source: SampleSource,
    asked: Any,
    device: torch.device,
    file: ComparisonFile,
    reference: Candidate | None,
    boxed: BoxedImages | None = None,
) -> dict[str, Any]:
    """All numbers of one model.

    Args:
        path: of its weights.
        option: what an error's sentence begins with.
        asked: as :func:`finetune.measuring.measure` and
            :func:`finetune.instances.measure_instances` have it.
        boxed: what ``file.boxes`` holds.

    Raises:
        UserError: the weights cannot be used.
    """
    bf16, image = asked.precision == "bf16", first_image(source)
    memory = peak_memory(path, option, image, device, bf16)  # before another copy is read here
    model = open_candidate(path, option, device)
    specs = promptings_of(asked.prompts, asked.seeds, model)
    found: dict[str, Any] = {"shape": model.describe(), **model.count()}
    found["precision"] = asked.precision if model.takes_bf16 else "fp32"
    found |= {"peak_memory_gb": memory, **time_steps(model, image, device, bf16, file.rounds)}
    found["everything"] = time_everything(model, image, file.everything)
    measured, _, unusable, _ = measure(model, source, specs, asked, device)
    found |= {"images": len(measured.areas), "unusable": dict(unusable)}
    found["miou"] = measured.rows(asked.seed)
    if reference is not None:  # behind what refuses images of which none can be used
        found["agreement"] = agreement(model, reference, source, asked)
    if boxed is not None:
        found["instances"] = measure_instances(model, boxed, asked, device).report
    if file.proposals is not None:
        propose = model.propose(file.proposals)
        found["proposals"] = measure_proposals(propose, source, asked, device)
    return found
