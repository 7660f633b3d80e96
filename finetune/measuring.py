"""mIoU of a model on a set of images: what evaluate and compare share."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from finetune.candidates import Candidate
from finetune.coco import CocoSource, read_coco
from finetune.evaluation import EvalDataset
from finetune.measures import Measured, data_set
from finetune.prompting import PromptSpec
from finetune.rle import area
from finetune.sam import Sam
from sami.core.config import require
from sami.core.dataset import SampleSource, ShardSource, load
from sami.core.errors import UserError
from sami.core.index import open_sources
from sami.core.patterns import expand
from sami.core.progress import track
from sami.core.reading import RawSample


def open_source(args: argparse.Namespace, folder: Path) -> tuple[SampleSource, str | None]:
    """The samples that a command line names, and which of the paper's data sets they are, whole.

    Args:
        folder: where shards without an index are indexed.
    """
    if args.coco is not None:
        require(args.images is not None, "--coco needs --images, the folder of its images")
        info = read_coco(args.coco)
        source = CocoSource.of(info, args.images, args.samples, args.keep_crowd)
        annotations = [len(one.annotations) for one in info.entries.values()]
        whole = args.masks is None and len(source) == sum(map(bool, annotations))
        whole = whole and not args.keep_crowd
        return source, data_set(len(info.entries), sum(annotations)) if whole else None
    require(not args.keep_crowd, "--keep-crowd goes with --coco")
    sources = open_sources(expand(args.shards, "--shards"), folder, print)
    shards = [shard for source in sources for shard in source.shards]
    count = sum(shard.count for shard in shards)
    require(count > 0, f"--shards {' '.join(args.shards)} hold no samples")
    return ShardSource.first(shards, EvalDataset.fields, args.samples), None


def promptings_of(words: list[str], seeds: int, model: Candidate | Sam) -> tuple[PromptSpec, ...]:
    """What ``--prompts`` asks for.

    Raises:
        UserError: an unknown word, or more clicks than the model takes.
    """
    found: list[PromptSpec] = []
    for word in dict.fromkeys(words):
        try:
            found += PromptSpec.parse(word, seeds)
        except ValueError as error:
            raise UserError(
                f"--prompts {word} is none of box, a number of clicks such as 3, or centre-3"
            ) from error
        most = model.max_points
        require(
            most is None or found[-1].clicks <= most,
            f"--prompts {word}: this model takes {most} points at most; ask for fewer",
        )
    return tuple(found)


def measure(
    model: Candidate,
    source: SampleSource,
    specs: tuple[PromptSpec, ...],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[Measured, list, Counter[str], Counter[str]]:
    """Every image's IoU, and the first few images to be drawn; why others were left out, and
    what is to be told of those that were used."""
    asked = specs, args.masks, args.seed, args.masks_drawn_on
    dataset = EvalDataset(source, model.shape, *asked)
    measured, shown = Measured(specs, choices=model.choices), []
    unusable, noted = Counter(), Counter()
    batches = load(dataset, [[number] for number in range(len(source))], args.workers, device)
    bf16 = args.precision == "bf16"
    for (sample,) in track(batches, "evaluating", total=len(source)):
        if isinstance(sample, RawSample):
            unusable[sample.reason] += 1
            continue
        noted.update(sample.notes)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            iou = model.score(sample, specs)
        areas = np.array([area(ends) for ends in sample.ends])
        measured.add(iou.cpu().numpy(), areas, sample.trivial)
        if len(shown) < args.overlays:
            shown.append(sample)
    remedy = "are these SA-1B's JSON?" if args.coco is None else "crowds are kept by --keep-crowd"
    require(bool(measured.areas), f"none of the images could be used ({dict(unusable)}); {remedy}")
    return measured, shown, unusable, noted
