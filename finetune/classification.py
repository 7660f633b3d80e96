"""ImageNet finetuning's parts: timm's ViT on a pretrained encoder, timm's augmentation.

EfficientSAM, section 4.1 "Downstream Tasks", and MAE's recipe (arXiv 2111.06377, table 9) where it
is silent.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from sami.core.config import require
from sami.core.dataset import ShardsConfig
from sami.core.errors import BadSample
from sami.core.images import MEAN, STD, open_image
from sami.core.index import Shard
from sami.core.optim import OptimConfig
from sami.core.order import sample_rng
from sami.core.processes import exact
from sami.core.reading import RawSample
from sami.core.run import Run
from sami.core.scanning import IMAGE
from sami.encoder import EncoderConfig, load_encoder
from sami.probe import LabelledBatch, read_label
from sami.validation import usable_batches

BATCH = 64  # images per forward of the evaluation


@dataclass
class LabelDataConfig(ShardsConfig):
    """Images with labels: shards with .cls.

    Attributes:
        classes: their number.
        image_size: side of the image in pixels.
    """

    classes: int = 1000
    image_size: int = 224

    def check(self) -> None:
        super().check()
        for name in ("classes", "image_size"):
            value = getattr(self, name)
            require(value > 0, f"data.{name} {value} must be positive")


@dataclass
class AugmentConfig:
    """timm's augmentation and regularisation.

    Attributes:
        auto: RandAugment as timm spells it; empty for none.
        erase: share of the images in which a rectangle is erased.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        smoothing: of the labels.
        drop_path: share of the last block's outputs that is dropped; less below.
    """

    auto: str = "rand-m9-mstd0.5-inc1"
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.1

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def check(self) -> None:
        for name in ("erase", "smoothing", "drop_path"):
            value = getattr(self, name)
            require(0 <= value < 1, f"augment.{name} {value} must be at least 0 and under 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(value >= 0, f"augment.{name} {value} must be 0 (none) or more")


@dataclass
class LabelEvalConfig:
    """Top-1 on ``data.val_shards``.

    Attributes:
        every: steps between measurements; 0 for the end of the run alone.
        samples: at most so many images, the first ones; null for all.
    """

    every: int = 0
    samples: int | None = None

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(
            self.samples is None or self.samples > 0,
            f"eval.samples {self.samples} must be positive, or null for all",
        )


class LabelTransform:
    """How samples are made; what is random follows from (seed, epoch, sample key)."""

    fields: ClassVar[tuple[str, ...]] = (IMAGE, "cls")

    def __init__(self, data: LabelDataConfig, augment: AugmentConfig, seed: int) -> None:
        self.seed, self.classes = seed, data.classes
        common = {"interpolation": "bicubic", "mean": MEAN, "std": STD}
        for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
            NAME_TO_OP[name] = _posterize
        self.augmented = create_transform(
            data.image_size,
            is_training=True,
            auto_augment=augment.auto or None,
            color_jitter=0.0,
            re_prob=augment.erase,
            re_mode="pixel",
            **common,
        )
        self.plain = create_transform(data.image_size, crop_pct=224 / 256, **common)

    def decode(self, sample: RawSample, epoch: int, replacement: bool) -> tuple:
        """Key, image [3, H, H] and label of a training sample."""
        key = f"{sample.key}/replacement" if replacement else sample.key
        rng = sample_rng(self.seed, epoch, key)
        # timm draws from all three libraries' own generators.
        before = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(int(rng.integers(2**63)))
                np.random.seed(int(rng.integers(2**32)))
                torch.manual_seed(int(rng.integers(2**63)))
                return self._make(sample, self.augmented)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])

    def decode_held_out(self, sample: RawSample) -> tuple:
        """The same of a held-out sample: the central part, unchanged."""
        return self._make(sample, lambda image: self.plain(_shorten(image)))

    def _make(self, sample: RawSample, transform) -> tuple:
        label = read_label(sample)
        if label >= self.classes:
            raise BadSample("class number is not under data.classes")
        return sample.key, transform(open_image(sample.part(IMAGE)).decode()), label

    def collate(self, items: list[tuple]) -> LabelledBatch:
        keys, images, labels = zip(*items, strict=True)
        return LabelledBatch(torch.stack(images), torch.tensor(labels), list(keys))


def _shorten(image: Image.Image) -> Image.Image:
    """The central part of an image longer than 8 times its width, which is all that is used of it.

    timm brings the short side to 256 px before it cuts: 3000 x 1 would take 590 MB.
    """
    width, height = image.size
    most = 8 * min(width, height)
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def _posterize(image: Image.Image, bits: int, **rest: Any) -> Image.Image:
    """timm's, with black for no bits left, as the magnitude 10 of "PosterizeIncreasing" asks.

    Pillow 13 refuses that with a ValueError; before it gave black, which timm's recipes were
    trained with.
    """
    return posterize(image, bits, **rest) if bits > 0 else Image.new(image.mode, image.size)


def build_classifier(
    encoder: EncoderConfig, data: LabelDataConfig, augment: AugmentConfig
) -> VisionTransformer:
    """timm's ViT with mean pooling; from stage 1's encoder, or from scratch without a checkpoint.

    Raises:
        UserError: a checkpoint of another shape.
    """
    shape = encoder.student(data.image_size)
    model = VisionTransformer(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=data.classes,
        global_pool="avg",
        drop_path_rate=augment.drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    if encoder.checkpoint:  # the final norm is a new one behind the pooling, as in MAE
        start = load_encoder(encoder.checkpoint, "encoder.checkpoint", shape).state_dict()
        tensors = {name: t for name, t in start.items() if not name.startswith("norm.")}
        lacking = model.load_state_dict(tensors, strict=False)
        new = [name for name in lacking.missing_keys if not name.startswith(("fc_norm", "head"))]
        assert not (new or lacking.unexpected_keys), "an Encoder has timm's names"
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    return model


def build_groups(model: VisionTransformer, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over timm's groups, with its layer decay."""
    decay, keep = optim.weight_decay, model.no_weight_decay()
    if optim.layer_decay < 1:
        groups = param_groups_layer_decay(model, decay, keep, layer_decay=optim.layer_decay)
    else:
        groups = param_groups_weight_decay(model, decay, keep)
    groups = [{"lr_scale": 1.0, **group} for group in groups]
    groups.sort(key=lambda group: -group["lr_scale"])  # the first one's rate is the one recorded
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


class Classification(nn.Module):
    """A classifier with its loss: one forward from a batch to losses."""

    def __init__(self, model: VisionTransformer, augment: AugmentConfig, classes: int) -> None:
        super().__init__()
        self.model = model
        self.mixup, self.loss = None, LabelSmoothingCrossEntropy(augment.smoothing)
        if augment.mixes:
            shares = {"mixup_alpha": augment.mixup, "cutmix_alpha": augment.cutmix}
            smoothing = {"label_smoothing": augment.smoothing, "num_classes": classes}
            self.mixup, self.loss = Mixup(**shares, **smoothing), SoftTargetCrossEntropy()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """``loss`` of a micro-batch, mixed up if that is asked for (numpy's generator decides).

        Neighbours are mixed with each other, so that any cut of a batch into even micro-batches
        mixes the same pairs. timm mixes the first image with the last, and so on inwards.
        """
        if self.mixup is not None:
            inwards = torch.arange(len(images), device=images.device).view(-1, 2).T
            inwards = torch.cat([inwards[0], inwards[1].flip(0)])
            images, labels = self.mixup(images[inwards], labels[inwards])
        logits = self.model(images)
        with torch.autocast(images.device.type, enabled=False):
            return {"loss": self.loss(logits.float(), labels)}


@torch.no_grad()
def evaluate(
    run: Run,
    model: VisionTransformer,
    transform: LabelTransform,
    shards: list[Shard],
    samples: int | None,
    workers: int,
) -> dict[str, float]:
    """Top-1 and top-5 in %, and how many images were measured. Collective.

    Args:
        samples: at most so many images, the first ones; None for all.
    """
    counts = torch.zeros(3, dtype=exact(run.device), device=run.device)  # right, among 5, images
    model.eval()
    for batch in usable_batches(run, shards, transform, samples, BATCH, workers):
        with run.accelerator.autocast():
            logits = model(batch.images)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        counts += torch.stack([best[:, 0].sum(), best.sum(), best.new_ones(len(best)).sum()])
    model.train()
    right, among, images = run.accelerator.reduce(counts, "sum").tolist()
    require(
        images > 0,
        "data.val_shards hold no labelled image (.cls) under data.classes; leave them empty, or "
        "make shards with labels (tools/make_shards.py on a folder per class)",
    )
    return {"top1": 100 * right / images, "top5": 100 * among / images, "pictures": images}
