"""mIoU of a model that segments: by box, by one click and by three (EfficientSAM, section 4.3).

Clicks are drawn uniformly in the mask, a box is the mask's tight one; of the three masks the one
with the highest predicted IoU is scored, at the picture's own size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from finetune.losses import mask_iou
from finetune.model import EfficientSam
from finetune.prompts import as_box, as_clicks
from finetune.rle import area, box, decode_counts, parse_annotations, random_points
from sami.core.config import require
from sami.core.errors import BadSample
from sami.core.images import open_image, resize_stored
from sami.core.order import deal, sample_rng
from sami.core.run import Run
from sami.core.shards import PICTURE, RawSample, Shard, read_range
from sami.core.stream import make_loader

PROTOCOLS = ("box", "1 click", "3 clicks")
AT_ONCE = 16  # masks of a picture that are brought to its size together


@dataclass
class EvalConfig:
    """The evaluation on ``data.val_shards``.

    Attributes:
        every: steps between evaluations; 0 for the end of the run alone.
        samples: at most so many pictures, the first of val_shards.
        masks: at most so many objects of a picture.
    """

    every: int = 2000
    samples: int = 200
    masks: int = 64

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(self.samples > 0, f"eval.samples {self.samples} must be positive, such as 200")
        require(self.masks > 0, f"eval.masks {self.masks} must be positive, such as 64")


@dataclass
class Judged:
    """A picture to be evaluated on, with K objects.

    ``image`` uint8 [3, h, w], within the model's input; ``size`` the picture's own; ``ends`` the
    run ends of its masks; ``points`` [protocols, K, 6, 2] in pixels of the picture, and ``labels``
    [protocols, K, 6].
    """

    key: str
    image: torch.Tensor
    size: tuple[int, int]
    ends: list[np.ndarray]
    points: torch.Tensor
    labels: torch.Tensor


def prompts_of(
    ends: np.ndarray, height: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An object's prompts in the order of PROTOCOLS: points [3, 6, 2] and labels [3, 6]."""
    corners = np.array(box(ends, height), float).reshape(2, 2)
    clicks = random_points(ends, height, 3, rng)
    prompts = [as_box(corners), as_clicks(clicks[:1]), as_clicks(clicks)]
    points, labels = zip(*prompts, strict=True)
    return np.stack(points), np.stack(labels)


class Pictures(IterableDataset):
    """The held-out pictures of one rank, in fixed order; those that cannot be used are left out."""

    def __init__(
        self, shards: list[Shard], model: EfficientSam, positions: range, masks: int, seed: int
    ) -> None:
        """``masks``: at most so many of a picture, drawn with ``seed``."""
        self.shards, self.shape, self.positions = shards, model.shape, positions
        self.masks, self.seed = masks, seed

    def __iter__(self) -> Iterator[Judged]:
        info = get_worker_info()
        number, of = (0, 1) if info is None else (info.id, info.num_workers)
        positions = deal(self.positions, number, of)
        for sample in read_range(self.shards, positions, (PICTURE, "json")):
            try:
                yield self._judged(sample)
            except BadSample:
                continue

    def _judged(self, sample: RawSample) -> Judged:
        rng = sample_rng(self.seed, -1, sample.key)
        image, told = open_image(sample.part(PICTURE)), parse_annotations(sample.part("json"))
        size = (told.height, told.width)
        if image.size != size[::-1]:
            raise BadSample("annotation of another picture size")
        ends, prompts = [], []
        for number in rng.permutation(len(told.masks)):
            found = decode_counts(told.masks[number].counts, *size)
            if area(found) > 0:
                ends.append(found)
                prompts.append(prompts_of(found, size[0], rng))
            if len(ends) == self.masks:
                break
        if not ends:
            raise BadSample("no usable mask")
        points, labels = (np.stack(column, 1) for column in zip(*prompts, strict=True))
        picture = resize_stored(image, *self.shape.frame(*size)).transpose(2, 0, 1)
        return Judged(
            sample.key,
            torch.from_numpy(np.ascontiguousarray(picture)),
            size,
            ends,
            torch.from_numpy(points),
            torch.from_numpy(labels),
        )


@torch.no_grad()
def evaluate(
    run: Run,
    model: EfficientSam,
    shards: list[Shard],
    config: EvalConfig,
    workers: int,
    seed: int = 0,
) -> dict[str, float | None]:
    """Mean IoU over objects by protocol, the same on all ranks. Collective.

    Args:
        model: unwrapped.

    Returns:
        ``miou_box``, ``miou_1_click``, ``miou_3_clicks``, ``pictures`` and ``objects``; None where
        nothing could be measured.
    """
    positions = range(min(config.samples, sum(shard.count for shard in shards)))
    mine = deal(positions, run.rank, run.processes)
    dataset = Pictures(shards, model, mine, config.masks, seed)
    sums = torch.zeros(len(PROTOCOLS) + 2, dtype=torch.float64, device=run.device)
    model.eval()
    for judged in make_loader(dataset, workers, run.device):
        with run.accelerator.autocast():
            iou = score(model, judged, run.device)
        sums += torch.cat([iou.sum(1), iou.new_tensor([1, iou.shape[1]])])
    model.train()
    *totals, pictures, objects = run.accelerator.reduce(sums, "sum").tolist()
    if pictures < len(positions):
        run.say(f"{len(positions) - int(pictures)} of {len(positions)} held-out pictures unusable")
    names = [f"miou_{name.replace(' ', '_')}" for name in PROTOCOLS]
    means = {
        n: total / objects if objects else None for n, total in zip(names, totals, strict=True)
    }
    return means | {"pictures": pictures, "objects": objects}


def score(model: EfficientSam, judged: Judged, device: torch.device) -> torch.Tensor:
    """IoU of each object by protocol, fp64 [protocols, K], at the picture's size."""
    height, width = judged.size
    embedding = model.get_image_embeddings(judged.image.to(device)[None])
    rows = []
    for protocol in range(len(PROTOCOLS)):
        found = []
        for start in range(0, len(judged.ends), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            truth = torch.stack([paint(ends, height, width) for ends in judged.ends[part]])
            masks = _predict(model, embedding, judged, protocol, part)
            found.append(mask_iou(masks, truth.to(device)).double())
        rows.append(torch.cat(found))
    return torch.stack(rows)


@torch.no_grad()
def masks_of(
    model: EfficientSam, judged: Judged, device: torch.device, protocol: int
) -> torch.Tensor:
    """The masks of all objects by one of PROTOCOLS, bool [K, H, W] on the CPU."""
    embedding = model.get_image_embeddings(judged.image.to(device)[None])
    return _predict(model, embedding, judged, protocol, slice(None)).cpu()


def _predict(
    model: EfficientSam, embedding: torch.Tensor, judged: Judged, protocol: int, part: slice
) -> torch.Tensor:
    """Of three masks the one with the highest predicted IoU, bool [K, H, W]."""
    points = judged.points[protocol, part].to(embedding.device)
    labels = judged.labels[protocol, part].to(embedding.device)
    logits, iou = model.predict_masks(embedding, points[None], labels[None], True, *judged.size)
    best = iou.argmax(2, keepdim=True)[..., None, None]
    chosen = logits.take_along_dim(best, 2).float()
    return model.resize_logits(chosen, judged.size, judged.size)[0, :, 0] > 0


def paint(ends: np.ndarray, height: int, width: int) -> torch.Tensor:
    """A whole mask of its run ends, bool [H, W]."""
    inside = np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(ends, prepend=0))
    return torch.from_numpy(inside.reshape(width, height).T.copy())
