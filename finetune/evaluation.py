"""mIoU of a model that segments.

By box and by clicks drawn in the mask (EfficientSAM, section 4.3), and by clicks on what is still
wrong, the centre first (Segment Anything, section 7.1 and appendix D.1).

A box is the mask's tight one. Masks are compared at the image's own size. Scored are the mask
that the model itself thinks best, and the oracle, the best of three against the truth.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.coco import LEFT_OUT
from finetune.coco_masks import DEGENERATE
from finetune.data import UNSURE
from finetune.losses import mask_iou
from finetune.prompt_encoder import BOTTOM_RIGHT, FOREGROUND, TOP_LEFT
from finetune.prompting import PROMPTS, PromptSpec, centre_of, correction_clicks
from finetune.rle import area, box, most_frequent, parse_annotations, random_points
from finetune.sam import Sam
from finetune.trivial import RADII, discs, filled_box
from sami.core.config import require
from sami.core.dataset import SampleSource, ShardSource, load_validation
from sami.core.errors import BadSample
from sami.core.images import Drawn, EncodedImage, drawn_on, open_image, resize_whole
from sami.core.index import Shard
from sami.core.order import sample_rng
from sami.core.processes import exact
from sami.core.reading import RawSample
from sami.core.run import Run
from sami.core.scanning import IMAGE
from sami.validation import tell_unusable

CHOICES = ("predicted", "oracle")  # which of three masks is scored
DECODED_AT_ONCE = 64  # prompts of an image
PIXELS_AT_ONCE = 2**25  # of masks that are compared together


@dataclass
class MaskEvalConfig:
    """The evaluation on ``data.val_shards``.

    Attributes:
        every: steps between evaluations; 0 for the end of the run alone.
        samples: at most so many images, the first of val_shards.
        masks: at most so many objects of an image.
    """

    every: int = 2000
    samples: int = 200
    masks: int = 64

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(self.samples > 0, f"eval.samples {self.samples} must be positive, such as 200")
        require(self.masks > 0, f"eval.masks {self.masks} must be positive, such as 64")


@dataclass
class EvalSample:
    """An image to be evaluated on, with K objects.

    ``image`` uint8 [3, h, w], within the model's input; ``size`` the image's own height and
    width; ``ends`` the run ends of its masks. In pixels of the image: ``boxes`` [K, 4],
    ``clicks`` [draws, K, P, 2], and ``centres`` [K, 2], NaN if they were not asked for.
    ``trivial``: IoU of what needs no model, for each spec that was asked for fp64 [answers,
    K]. ``notes`` tell of each object that was left out, and whether a default told how its
    masks lie.
    """

    key: str
    image: torch.Tensor
    size: tuple[int, int]
    ends: list[np.ndarray]
    boxes: torch.Tensor
    clicks: torch.Tensor
    centres: torch.Tensor
    trivial: list[np.ndarray] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def head(self, count: int) -> "EvalSample":
        """The same with its first objects alone."""
        return replace(
            self,
            ends=self.ends[:count],
            boxes=self.boxes[:count],
            clicks=self.clicks[:, :count],
            centres=self.centres[:count],
            trivial=[iou[:, :count] for iou in self.trivial],
        )

    def prompts(self, spec: PromptSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Points [K, P, 2] and labels [K, P]; of ``centre`` the first click alone."""
        if spec.kind == "box":
            points, label = self.boxes.view(-1, 2, 2), [TOP_LEFT, BOTTOM_RIGHT]
        elif spec.kind == "centre":
            points, label = self.centres[:, None], [FOREGROUND]
        else:
            points = self.clicks[spec.draw, :, : spec.clicks]
            label = [FOREGROUND] * spec.clicks
        return points, torch.tensor(label).expand(len(points), -1)

    def trivial_iou(self, spec: PromptSpec) -> np.ndarray:
        """IoU of the answers that need no model, fp64 [answers, K]: the filled box, or discs."""
        if spec.kind == "box":
            return filled_box(self.ends, *self.size)
        return discs(self.ends, *self.size, self.prompts(spec)[0].numpy())


class Frames(Protocol):
    """A model's shape, as far as images are concerned: :class:`finetune.sam.ModelShape`."""

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels to which an image of so many is brought."""
        ...


@dataclass(frozen=True)
class EvalDataset(Dataset):
    """Images with their objects and prompts; of those that cannot be used, the reason.

    Attributes:
        masks: at most so many of an image, drawn with ``seed``; None for all.
        drawn: where masks lie if nothing else tells, see :func:`sami.core.images.drawn_on`.
    """

    source: SampleSource
    shape: Frames
    specs: tuple[PromptSpec, ...] = PROMPTS
    masks: int | None = None
    seed: int = 0
    drawn: Drawn = "upright"

    fields: ClassVar[tuple[str, ...]] = (IMAGE, "json")  # what is read of a sample

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> EvalSample | RawSample:
        (raw,) = self.source.read([number])
        try:
            return self._prepare(raw)
        except BadSample as error:
            return RawSample(raw.key, reason=str(error))

    def __getitems__(self, numbers: Sequence[int]) -> list[EvalSample | RawSample]:
        return [self[number] for number in numbers]

    def _prepare(self, raw: RawSample) -> EvalSample:
        encoded, info = open_image(raw.part(IMAGE)), parse_annotations(raw.part("json"))
        size = (info.height, info.width)
        drawn, unsure = drawn_on(encoded, info.width, info.height, info.drawn_on, self.drawn)
        before = Counter(json.loads(raw.parts.get(LEFT_OUT, b"{}")))  # by the source itself
        ends, left_out = [], info.left_out + before
        for found in info.decoded(info.masks, sample_rng(self.seed, -1, raw.key), left_out):
            if area(found) > 0:
                ends.append(found)
            if len(ends) == self.masks:
                break
        if not ends:
            raise BadSample(most_frequent(left_out))
        random = [spec for spec in self.specs if spec.kind == "random"]
        count, clicks = max((spec.clicks for spec in random), default=1), []
        for draw in range(max((spec.draw + 1 for spec in random), default=1)):
            rng = sample_rng(self.seed, -2 - draw, raw.key)
            clicks.append([random_points(one, size[0], count, rng) for one in ends])
        centres = np.full((len(ends), 2), np.nan)
        if any(spec.kind == "centre" for spec in self.specs):
            centres = np.array([centre_of(paint(one, *size)) for one in ends], float)
        what = {DEGENERATE: "left out"}  # the object itself is kept
        notes = [f"{what.get(why, 'object left out')}: {why}" for why in left_out.elements()]
        sample = EvalSample(
            raw.key,
            framed(encoded, self.shape, size, drawn),
            size,
            ends,
            torch.tensor([box(one, size[0]) for one in ends], dtype=torch.float32),
            torch.from_numpy(np.array(clicks, np.float32)),
            torch.from_numpy(centres.astype(np.float32)),
            notes=notes + [UNSURE] * unsure,
        )
        sample.trivial += [sample.trivial_iou(spec) for spec in self.specs]
        return sample


def framed(
    encoded: EncodedImage, shape: Frames, size: tuple[int, int], drawn: Drawn
) -> torch.Tensor:
    """An image of height and width ``size`` as it lies within a model's input, uint8 [3, h, w]."""
    image = resize_whole(encoded, *shape.frame(*size), drawn).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(image))


@torch.no_grad()
def evaluate(
    run: Run,
    model: Sam,
    shards: list[Shard],
    config: MaskEvalConfig,
    workers: int,
    seed: int = 0,
    drawn: Drawn = "upright",
) -> dict[str, float | None]:
    """Mean IoU over objects by PROMPTS, the same on all ranks. Collective.

    Args:
        model: unwrapped.
        drawn: as :class:`EvalDataset` has it.

    Returns:
        ``miou_box``, ``miou_1_click`` and ``miou_3_clicks``, each with what needs no model as
        ``trivial_box`` and so on, ``images`` and ``objects``; None where nothing could be
        measured.
    """
    source = ShardSource.first(shards, EvalDataset.fields, config.samples)
    dataset = EvalDataset(source, model.shape, PROMPTS, config.masks, seed, drawn)
    unusable, noted = [], Counter()
    sums = torch.zeros(len(PROMPTS) + 2, dtype=exact(run.device), device=run.device)
    answers = [1 if p.kind == "box" else len(RADII) for p in PROMPTS]
    trivial = torch.zeros(sum(answers), dtype=exact(run.device), device=run.device)
    model.eval()
    share = run.rank, run.processes
    for (sample,) in load_validation(dataset, 1, workers, run.device, share=share, say=run.say):
        if isinstance(sample, RawSample):
            unusable.append((sample.reason, sample.key))
            continue
        noted.update(sample.notes)
        with run.accelerator.autocast():
            iou = score(model, sample, run.device, PROMPTS, CHOICES[:1])[:, 0]
        sums += torch.cat([iou.sum(1), iou.new_tensor([1, iou.shape[1]])])
        trivial += trivial.new_tensor(np.concatenate(sample.trivial).sum(1))
    model.train()
    *totals, images, objects = run.accelerator.reduce(sums, "sum").tolist()
    best = [part.max().item() for part in run.accelerator.reduce(trivial, "sum").split(answers)]
    tell_unusable(run, unusable, len(source))
    noted = sum(run.gather(noted), Counter())
    if noted:
        run.say_once(f"noted of held-out images: {dict(noted)}")
    prompts = [spec.name.replace(" ", "_") for spec in PROMPTS]
    names = [f"{kind}_{prompt}" for kind in ("miou", "trivial") for prompt in prompts]
    means = [total / objects if objects else None for total in totals + best]
    return dict(zip(names, means, strict=True)) | {"pictures": images, "objects": objects}


@torch.no_grad()
def score(
    model: Sam,
    sample: EvalSample,
    device: torch.device,
    specs: tuple[PromptSpec, ...],
    choices: tuple[str, ...] = CHOICES,
) -> torch.Tensor:
    """IoU of each object, fp64 [specs, choices, K] on the device, at the image's size.

    Of ``centre`` specs of several lengths each is begun anew.
    """
    embedding = model.get_image_embeddings(sample.image.to(device)[None])
    height, width = sample.size
    step = max(1, PIXELS_AT_ONCE // (3 * height * width))
    table = []
    for spec in specs:
        found = []
        for part in in_parts(len(sample.ends), DECODED_AT_ONCE):
            logits, best, *_ = decode(model, embedding, sample, spec, part)
            masks = {"predicted": take_masks(logits, best), "oracle": logits[:, 1:]}
            for inner in in_parts(len(logits), step):
                truth = [paint(ends, height, width) for ends in sample.ends[part][inner]]
                truth = torch.from_numpy(np.stack(truth)).to(device)[:, None]
                rows = []
                for choice in choices:
                    full = at_full_size(model, masks[choice][inner], sample.size)
                    rows.append(mask_iou(full, truth).to(exact(device)).max(1).values)
                found.append(torch.stack(rows))
        table.append(torch.cat(found, 1))
    return torch.stack(table)


@torch.no_grad()
def masks_of(
    model: Sam, sample: EvalSample, device: torch.device, spec: PromptSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The masks that the model thinks best, and what it was asked, on the CPU.

    Returns:
        bool [K, H, W]; points [K, P, 2] in pixels of the image, with labels [K, P].
    """
    embedding = model.get_image_embeddings(sample.image.to(device)[None])
    logits, best, points, labels = decode(model, embedding, sample, spec, slice(None))
    chosen = take_masks(logits, best)
    masks = torch.cat([at_full_size(model, c[None], sample.size)[0].cpu() for c in chosen])
    return masks, points.cpu(), labels.cpu()


def decode(
    model: Sam, embedding: torch.Tensor, sample: EvalSample, spec: PromptSpec, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All four masks' logits [K, 4, 4h, 4w], the number [K] of the one thought best, the prompts.

    Of ``centre`` with several clicks: after the last one. SAM's own decoder is given the mask of
    the click before; EfficientSAM, which knows no background, only clicks where it missed.
    """
    points, labels = (x[part].to(embedding.device) for x in sample.prompts(spec))
    rounds, earlier = spec.clicks if spec.kind == "centre" else 1, None
    for turn in range(rounds):
        asked = (points[None], labels[None], *sample.size, earlier)
        logits, iou = model.predict_all(embedding, *asked)
        best = iou.float().masked_fill(~model.asked(labels[None]), -torch.inf).argmax(2)[0]
        logits = logits[0].float()
        if turn + 1 < rounds:
            chosen = take_masks(logits, best)
            clicks, kinds = _correct(model, chosen, sample, part)
            points = torch.cat([points, clicks], 1)
            labels = torch.cat([labels, kinds.to(labels)], 1)
            earlier = chosen[None, :, 0] if model.takes_background else None
    return logits, best, points, labels


def _correct(
    model: Sam, logits: torch.Tensor, sample: EvalSample, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """A click [K, 1, 2] with its label [K, 1] in the middle of what is wrong in each mask, of whose
    logits [K, 1, 4h, 4w]."""
    places = torch.arange(float(max(sample.size)), device=logits.device).expand(1, 2, -1)
    more = []
    for ends, one in zip(sample.ends[part], logits, strict=True):
        truth = torch.from_numpy(paint(ends, *sample.size)).to(logits.device)[None, None]
        mask = at_full_size(model, one[None], sample.size)
        more.append(correction_clicks(mask, truth, places, model.takes_background))
    clicks, kinds = (torch.cat(parts)[:, 0] for parts in zip(*more, strict=True))
    return clicks, kinds


def take_masks(logits: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Of logits [K, 4, 4h, 4w] those numbered ``best`` [K]: [K, 1, 4h, 4w]."""
    return logits.take_along_dim(best[:, None, None, None], 1)


def at_full_size(model: Sam, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits [K, M, 4h, 4w] to bool masks [K, M, H, W]."""
    return model.resize_logits(logits.float()[None], size, size)[0] > 0


def in_parts(count: int, most: int) -> Iterator[slice]:
    """Slices of at most ``most`` that make up ``count``."""
    for start in range(0, count, most):
        yield slice(start, start + most)


def paint(ends: np.ndarray, height: int, width: int) -> np.ndarray:
    """A whole mask of its run ends, bool [H, W]."""
    inside = np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(ends, prepend=0))
    return inside.reshape(width, height).T.copy()
