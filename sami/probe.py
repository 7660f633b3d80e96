"""What a pretrained encoder knows of labels it has not seen: k-NN and a linear probe.

Quick measures for during and after stage 1, on shards with .cls, of the mean of the patch tokens of
each image's central square. They rank encoders; the paper's numbers are those of finetuning
(finetune/classify.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sami.core.config import require
from sami.core.dataset import ShardSource, TensorBatch, Validation, load_validation
from sami.core.errors import BadSample
from sami.core.images import cut, open_image
from sami.core.index import Shard
from sami.core.labels import check_names, require_labels
from sami.core.reading import RawSample
from sami.core.run import Run
from sami.core.scanning import IMAGE, parse_label
from sami.data import centre_square, stack_views
from sami.encoders.protocol import ImageEncoder

BATCH = 64  # images per forward
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of k-NN, as DINO has them (arXiv 2104.14294, appendix F.2)
STEPS, DECAY = 200, 1e-4  # of the linear probe: full batches, L2 on its weights


@dataclass
class LabelledBatch(TensorBatch):
    """``images`` [B, 3, H, H], uint8 or normalised, ``labels`` [B], ``keys`` of the samples."""

    images: torch.Tensor
    labels: torch.Tensor
    keys: list[str] = field(default_factory=list)


def labelled_squares(shards: list[Shard], numbers: np.ndarray, size: int) -> Validation:
    """The central squares of some samples with their labels; those without either are left out.

    Args:
        numbers: of the samples in the shards laid end to end, ascending.
        size: in pixels.
    """
    source = ShardSource(shards, (IMAGE, "cls"), numbers)
    return Validation(source, partial(_decode, size=size), _collate)


def _decode(sample: RawSample, size: int) -> tuple[np.ndarray, int]:
    image = open_image(sample.part(IMAGE))
    square = cut(image, centre_square(*image.upright), [size], False)[0]
    return square, read_label(sample)


def _collate(items: list[tuple[np.ndarray, int]]) -> LabelledBatch:
    images, labels = zip(*items, strict=True)
    return LabelledBatch(stack_views(images), torch.tensor(labels))


def read_label(sample: RawSample) -> int:
    """The class number of a sample.

    Raises:
        BadSample: it has none, or not a number from 0 on.
    """
    try:
        return parse_label(sample.part("cls"))
    except ValueError as error:
        raise BadSample("cls member is not a class number") from error


def check_probe(train: list[Shard], held_out: list[Shard]) -> None:
    """
    Raises:
        UserError: one of the two has no labels, or their classes have other names.
    """
    keys = ("data.shards", "data.val_shards")
    remedy = "k-NN and linear probe need labels: name others, or do without (eval.probe 0)"
    for shards, key in zip((train, held_out), keys, strict=True):
        require_labels(shards, key, remedy)
    check_names(train, held_out, keys)


def spread(shards: list[Shard], samples: int) -> np.ndarray:
    """Numbers of at most ``samples`` samples, evenly over the shards laid end to end."""
    total = sum(shard.count for shard in shards)
    return np.unique(np.linspace(0, total - 1, min(samples, total)).astype(np.int64))


@torch.no_grad()
def embed(
    encoder: ImageEncoder,
    shards: list[Shard],
    numbers: np.ndarray,
    device: torch.device,
    bf16: bool,
    workers: int,
    say: Callable[[str], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features fp32 [P, D] and labels [P], on the CPU, of the samples that have a label.

    Args:
        numbers: of the samples in the shards laid end to end, ascending.
        share: (rank, processes); only that rank's part of them.
    """
    features, labels = [torch.zeros(0, encoder.width)], [torch.zeros(0, dtype=torch.long)]
    training = encoder.training
    encoder.eval()
    dataset = labelled_squares(shards, numbers, encoder.image_size)
    loading = {"share": share, "say": say, "what": "probing"}
    for batch, _ in load_validation(dataset, BATCH, workers, device, **loading):
        if batch is None:
            continue
        images = encoder.normalise(batch.images.to(device, non_blocking=True))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = encoder.tokens(images)[:, encoder.class_tokens :]
        features.append(tokens.float().mean(1).cpu())
        labels.append(batch.labels)
    encoder.train(training)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor
) -> float:
    """Queries [Q, D] in % whose neighbours in the bank [P, D] vote for their class.

    Votes weigh exp(cosine / TEMPERATURE).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    right, classes = 0, int(torch.cat([labels, truth]).max()) + 1
    for part, wanted in zip(queries.split(1024), truth.split(1024), strict=True):
        near, at = (part @ bank.T).topk(min(NEIGHBOURS, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=bank.device)
        votes.scatter_add_(1, labels[at], (near / TEMPERATURE).exp())
        right += int((votes.argmax(1) == wanted).sum())
    return 100 * right / len(queries)


@torch.enable_grad()
def linear_accuracy(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor
) -> float:
    """The same with one linear layer on standardised features, trained on the bank (L-BFGS)."""
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp(min=1e-6)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    classes = int(torch.cat([labels, truth]).max()) + 1
    layer = nn.Linear(bank.shape[1], classes, device=bank.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(bank), labels) + DECAY * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return 100 * float((layer(queries).argmax(1) == truth).float().mean())


def compare(
    bank: tuple[torch.Tensor, torch.Tensor], queries: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Top-1 in % of k-NN and linear probe, from features and labels as :func:`embed` gives them.

    Raises:
        UserError: no labels.
    """
    for name, (_, labels) in (("training", bank), ("held-out", queries)):
        require(len(labels) > 0, f"the {name} shards hold no image with a usable label (.cls)")
    return {"knn": knn_accuracy(*bank, *queries), "linear": linear_accuracy(*bank, *queries)}


def probe(
    run: Run,
    encoder: ImageEncoder,
    train: list[Shard],
    held_out: list[Shard],
    samples: int,
    workers: int,
) -> dict[str, float]:
    """Top-1 of both on held-out images, in %. Collective: the ranks share the images.

    Args:
        samples: at most so many training images make the bank; of held_out likewise.

    Raises:
        UserError: no labels.
    """

    def gathered(shards: list[Shard]) -> tuple[torch.Tensor, torch.Tensor]:
        how = (run.device, run.bf16, workers, run.say, (run.rank, run.processes))
        found = run.gather(embed(encoder, shards, spread(shards, samples), *how))
        features, labels = (torch.cat(kind).to(run.device) for kind in zip(*found, strict=True))
        return features, labels

    return compare(gathered(train), gathered(held_out))
