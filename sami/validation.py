"""The held-out measure: does the student know more of the target than its mean?"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sami.core.config import require
from sami.core.dataset import Bad, ShardSource, Validation, load_validation
from sami.core.index import Shard
from sami.core.processes import exact
from sami.core.run import Run
from sami.data import CropTransform
from sami.model import MaskedReconstruction, token_errors
from sami.targets import Target

BATCH = 32  # images per forward


@dataclass
class ValidationConfig:
    """The held-out measure on ``data.val_shards``.

    Attributes:
        every: steps between measurements; 0 for the end of the run alone.
        samples: at most so many images, the first of val_shards.
        probe: at most so many labelled images (.cls) of data.shards, and of val_shards, for k-NN
            and a linear probe of the encoder (val_knn, val_linear); 0 for none.
    """

    every: int = 2000
    samples: int = 2000
    probe: int = 0

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(self.samples > 0, f"eval.samples {self.samples} must be positive, such as 2000")
        require(self.probe >= 0, f"eval.probe {self.probe} must be 0 (none) or more")


class Sums:
    """What the measure needs of the images, so that batches and ranks can be added up.

    Group 0 is the visible, group 1 the masked tokens; all in fp64, where the device has it.
    """

    def __init__(self, tokens: int, channels: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=exact(device), device=device)

        self.loss, self.error, self.square = zeros(2), zeros(2), zeros(2)
        self.target, self.count = zeros(2, tokens, channels), zeros(2, tokens)
        self.cosine, self.images = zeros(), zeros()

    def add(
        self, prediction: torch.Tensor, target: torch.Tensor, masked: torch.Tensor, kind: str
    ) -> None:
        """A batch: prediction and target [B, N, C], masked patch numbers [B, M]."""
        dtype = self.loss.dtype
        prediction, target = prediction.to(dtype), target.to(dtype)
        hidden = torch.zeros(target.shape[:2], dtype=torch.bool, device=target.device)
        hidden.scatter_(1, masked, True)
        loss = token_errors(prediction, target, kind).to(dtype)
        error = (prediction - target).square().mean(-1)
        for group, mask in enumerate((~hidden, hidden)):
            weight = mask.to(dtype)
            self.loss[group] += (loss * weight).sum()
            self.error[group] += (error * weight).sum()
            self.square[group] += (target.square().mean(-1) * weight).sum()
            self.target[group] += (target * weight.unsqueeze(-1)).sum(0)
            self.count[group] += weight.sum(0)
        self.cosine += F.cosine_similarity(prediction, target, dim=-1).mean(-1).sum()
        self.images += len(target)

    def measures(self, tokens: str = "all") -> dict[str, float | None]:
        """The measures by name.

        ``loss`` is in the kind that is trained, over the tokens that are trained (``tokens``);
        ``r2`` is 1 - squared error / squared error of the best constant map: the target's mean
        over these images at each position. ``r2_masked`` is the same over masked tokens only.
        None stands for what is not a number, such as r2 of a single image.
        """
        count = self.count.sum(1)
        mean = self.target.sum(0) / self.count.sum(0).clamp(min=1).unsqueeze(-1)  # [N, C]
        channels = mean.shape[-1]
        # sum of (t - m)^2 over a group = sum t^2 - 2 m . sum t + count m^2, mean over channels
        constant = self.square - 2 * (self.target * mean).sum((1, 2)) / channels
        constant += (self.count * mean.square().mean(-1)).sum(1)
        loss, scored = (self.loss, count) if tokens == "all" else (self.loss[1], count[1])
        result = {
            "loss": loss.sum() / scored.sum(),
            "cosine": self.cosine / self.images,
            "pictures": self.images,
            "r2": 1 - self.error.sum() / constant.sum(),
        }
        for group, name in enumerate(("visible", "masked")):
            if count[group] > 0:
                result[f"loss_{name}"] = self.loss[group] / count[group]
        if count[1] > 0:
            result["r2_masked"] = 1 - self.error[1] / constant[1]
        values = {name: float(value) for name, value in result.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@torch.no_grad()
def measure(
    run: Run,
    model: MaskedReconstruction,
    targets: Target,
    shards: list[Shard],
    transform: CropTransform,
    samples: int,
    workers: int,
) -> dict[str, float | None]:
    """Measures over the first ``samples`` held-out images, the same on all ranks.

    Collective. Unusable images are left out; ``images`` tells how many were measured.

    Args:
        model: unwrapped.
    """
    sums = Sums(model.grid**2, model.head.out_features, run.device)
    model.eval()
    for batch in usable_batches(run, shards, transform, samples, BATCH, workers):
        target = targets(batch)
        with run.accelerator.autocast():
            prediction = model.predict(batch.student, batch.visible, batch.masked)
        sums.add(prediction, target, batch.masked, model.loss_config.kind)
    model.train()
    for tensor in vars(sums).values():
        tensor.copy_(run.accelerator.reduce(tensor, "sum"))
    return sums.measures(model.loss_config.tokens)


def usable_batches(
    run: Run,
    shards: list[Shard],
    transform: Any,
    samples: int | None,
    batch_size: int,
    workers: int,
) -> Iterator[Any]:
    """This rank's batches of the first held-out samples, on the device. Collective.

    At the end it is said, once for all ranks, what was unusable.

    Args:
        transform: with ``fields``, ``decode_held_out`` and ``collate``.
        samples: at most so many; None for all.
    """
    source = ShardSource.first(shards, transform.fields, samples)
    dataset = Validation(source, transform.decode_held_out, transform.collate)
    unusable: Bad = []
    loading = {"share": (run.rank, run.processes), "say": run.say}
    for batch, bad in load_validation(dataset, batch_size, workers, run.device, **loading):
        unusable += bad
        if batch is not None:
            yield batch.to(run.device)
    tell_unusable(run, unusable, len(source))


def tell_unusable(run: Run, unusable: Bad, images: int) -> None:
    """Say, once, how many held-out images of all ranks are unusable and why. Collective.

    Args:
        unusable: of this rank.
        images: that were asked for, of all ranks.
    """
    gathered = [one for part in run.gather(unusable) for one in part]
    if gathered:
        counts = dict(Counter(reason for reason, _ in gathered))
        run.say_once(
            f"{len(gathered)} of {images} held-out images unusable: {counts}, the first is "
            f"{gathered[0][1]}"
        )
