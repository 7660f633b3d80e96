"""mIoU of a model that segments.

By box and by clicks drawn in the mask (EfficientSAM, section 4.3), and by clicks on what is still
wrong, the centre first (Segment Anything, section 7.1 and appendix D.1).

A box is the mask's tight one. Masks are compared at the picture's own size. Scored are the mask
that the model itself thinks best, and the oracle, the best of three against the truth.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.coco import LEFT_OUT
from finetune.coco_masks import DEGENERATE
from finetune.data import UNSURE
from finetune.losses import mask_iou
from finetune.prompt_encoder import BOTTOM_RIGHT, FOREGROUND, TOP_LEFT
from finetune.prompts import centre_of, correction_clicks
from finetune.rle import area, box, decode_counts, parse_annotations, random_points
from finetune.sam import ModelShape, Sam
from finetune.trivial import RADII, discs, filled_box
from sami.core.config import require
from sami.core.dataset import SampleSource, ShardSource, load_validation
from sami.core.errors import BadSample
from sami.core.images import Drawn, drawn_on, open_image, resize_whole
from sami.core.index import Shard
from sami.core.order import sample_rng
from sami.core.processes import exact
from sami.core.reading import RawSample
from sami.core.run import Run
from sami.core.scanning import PICTURE
from sami.validation import tell_unusable

FIELDS = (PICTURE, "json")  # what is read of a sample
CHOICES = ("predicted", "oracle")  # which of three masks is scored
DECODED_AT_ONCE = 64  # prompts of a picture
PIXELS_AT_ONCE = 2**25  # of masks that are compared together


@dataclass
class MaskEvalConfig:
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


@dataclass(frozen=True)
class PromptSpec:
    """How each object is prompted.

    Attributes:
        kind: box; random, clicks drawn uniformly in the mask; centre, a click farthest from the
            mask's boundary, and each later one likewise in what is still wrong.
        clicks: how many.
        draw: which of a picture's random draws. Fewer clicks are the first of more.
    """

    kind: Literal["box", "random", "centre"]
    clicks: int = 0
    draw: int = 0

    @property
    def name(self) -> str:
        """As tables say it."""
        if self.kind == "box":
            return "box"
        clicks = f"{self.clicks} click" + "s" * (self.clicks > 1)
        return clicks if self.kind == "random" else f"{clicks}, centre first"

    @staticmethod
    def parse(word: str, seeds: int) -> list["PromptSpec"]:
        """``box``, ``3`` (random clicks, in ``seeds`` draws) or ``centre-3``.

        Raises:
            ValueError: none of them.
        """
        if word == "box":
            return [PromptSpec("box")]
        kind, number = ("centre", word[7:]) if word.startswith("centre-") else ("random", word)
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(word)
        draws = seeds if kind == "random" else 1
        return [PromptSpec(kind, int(number), draw) for draw in range(draws)]


PROMPTS = (PromptSpec("box"), PromptSpec("random", 1), PromptSpec("random", 3))  # while training


@dataclass
class EvalSample:
    """A picture to be evaluated on, with K objects.

    ``image`` uint8 [3, h, w], within the model's input; ``size`` the picture's own height and
    width; ``ends`` the run ends of its masks. In pixels of the picture: ``boxes`` [K, 4],
    ``clicks`` [draws, K, P, 2], and ``centres`` [K, 2], NaN if they were not asked for.
    ``trivial``: IoU of what needs no model, for each prompting that was asked for fp64 [answers,
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

    def prompts(self, prompting: PromptSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Points [K, P, 2] and labels [K, P]; of ``centre`` the first click alone."""
        if prompting.kind == "box":
            points, label = self.boxes.view(-1, 2, 2), [TOP_LEFT, BOTTOM_RIGHT]
        elif prompting.kind == "centre":
            points, label = self.centres[:, None], [FOREGROUND]
        else:
            points = self.clicks[prompting.draw, :, : prompting.clicks]
            label = [FOREGROUND] * prompting.clicks
        return points, torch.tensor(label).expand(len(points), -1)

    def trivial_iou(self, prompting: PromptSpec) -> np.ndarray:
        """IoU of the answers that need no model, fp64 [answers, K]: the filled box, or discs."""
        if prompting.kind == "box":
            return filled_box(self.ends, *self.size)
        return discs(self.ends, *self.size, self.prompts(prompting)[0].numpy())


class EvalDataset(Dataset):
    """Pictures with their objects and prompts; of those that cannot be used, the reason."""

    def __init__(
        self,
        source: SampleSource,
        shape: ModelShape,
        promptings: tuple[PromptSpec, ...] = PROMPTS,
        masks: int | None = None,
        seed: int = 0,
        drawn: Drawn = "upright",
    ) -> None:
        """
        Args:
            masks: at most so many of a picture, drawn with ``seed``; None for all.
            drawn: where masks lie if nothing else tells, see :func:`sami.core.images.drawn_on`.
        """
        self.source, self.shape, self.masks, self.seed = source, shape, masks, seed
        self.promptings = promptings
        self.drawn: Drawn = drawn
        random = [prompting for prompting in promptings if prompting.kind == "random"]
        self.draws = max((prompting.draw + 1 for prompting in random), default=1)
        self.clicks = max((prompting.clicks for prompting in random), default=1)
        self.centres = any(prompting.kind == "centre" for prompting in promptings)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> EvalSample | RawSample:
        (sample,) = self.source.read([number])
        try:
            return self._judged(sample)
        except BadSample as error:
            return RawSample(sample.key, reason=str(error))

    def __getitems__(self, numbers: Sequence[int]) -> list[EvalSample | RawSample]:
        return [self[number] for number in numbers]

    def _judged(self, sample: RawSample) -> EvalSample:
        encoded, told = open_image(sample.part(PICTURE)), parse_annotations(sample.part("json"))
        size = (told.height, told.width)
        drawn, unsure = drawn_on(encoded, told.width, told.height, told.drawn_on, self.drawn)
        rng = sample_rng(self.seed, -1, sample.key)
        before = Counter(json.loads(sample.parts.get(LEFT_OUT, b"{}")))  # by the source itself
        ends, left_out = [], told.left_out + before
        for number in rng.permutation(len(told.masks)):
            try:
                found = decode_counts(told.masks[number].counts, *size)
            except BadSample as error:
                left_out[str(error)] += 1
                continue
            if area(found) > 0:
                ends.append(found)
            if len(ends) == self.masks:
                break
        if not ends:
            raise BadSample(left_out.most_common(1)[0][0] if left_out else "no usable mask")
        clicks = []
        for draw in range(self.draws):
            rng = sample_rng(self.seed, -2 - draw, sample.key)
            clicks.append([random_points(e, size[0], self.clicks, rng) for e in ends])
        centres = np.full((len(ends), 2), np.nan)
        if self.centres:
            centres = np.array([centre_of(paint(e, *size)) for e in ends], float)
        picture = resize_whole(encoded, *self.shape.frame(*size), drawn).transpose(2, 0, 1)
        judged = EvalSample(
            sample.key,
            torch.from_numpy(np.ascontiguousarray(picture)),
            size,
            ends,
            torch.tensor([box(e, size[0]) for e in ends], dtype=torch.float32),
            torch.from_numpy(np.array(clicks, np.float32)),
            torch.from_numpy(centres.astype(np.float32)),
            notes=[
                f"{'left out' if why == DEGENERATE else 'object left out'}: {why}"
                for why in left_out.elements()
            ]
            + [UNSURE] * unsure,
        )
        judged.trivial += [judged.trivial_iou(prompting) for prompting in self.promptings]
        return judged


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
        ``trivial_box`` and so on, ``pictures`` and ``objects``; None where nothing could be
        measured.
    """
    source = ShardSource.first(shards, FIELDS, config.samples)
    dataset = EvalDataset(source, model.shape, PROMPTS, config.masks, seed, drawn)
    unusable, noted = [], Counter()
    sums = torch.zeros(len(PROMPTS) + 2, dtype=exact(run.device), device=run.device)
    answers = [1 if p.kind == "box" else len(RADII) for p in PROMPTS]
    trivial = torch.zeros(sum(answers), dtype=exact(run.device), device=run.device)
    model.eval()
    share = run.rank, run.processes
    for (judged,) in load_validation(dataset, 1, workers, run.device, share=share, say=run.say):
        if isinstance(judged, RawSample):
            unusable.append((judged.reason, judged.key))
            continue
        noted.update(judged.notes)
        with run.accelerator.autocast():
            iou = score(model, judged, run.device, PROMPTS, CHOICES[:1])[:, 0]
        sums += torch.cat([iou.sum(1), iou.new_tensor([1, iou.shape[1]])])
        trivial += trivial.new_tensor(np.concatenate(judged.trivial).sum(1))
    model.train()
    *totals, pictures, objects = run.accelerator.reduce(sums, "sum").tolist()
    best = [part.max().item() for part in run.accelerator.reduce(trivial, "sum").split(answers)]
    tell_unusable(run, unusable, len(source))
    noted = sum(run.gather(noted), Counter())
    if noted:
        run.say_once(f"noted of held-out pictures: {dict(noted)}")
    words = [prompting.name.replace(" ", "_") for prompting in PROMPTS]
    names = [f"{kind}_{word}" for kind in ("miou", "trivial") for word in words]
    means = {
        name: total / objects if objects else None
        for name, total in zip(names, totals + best, strict=True)
    }
    return means | {"pictures": pictures, "objects": objects}


@torch.no_grad()
def score(
    model: Sam,
    judged: EvalSample,
    device: torch.device,
    promptings: tuple[PromptSpec, ...],
    choices: tuple[str, ...] = CHOICES,
) -> torch.Tensor:
    """IoU of each object, fp64 [promptings, choices, K] on the device, at the picture's size.

    Of ``centre`` promptings of several lengths each is begun anew.
    """
    embedding = model.get_image_embeddings(judged.image.to(device)[None])
    height, width = judged.size
    step = max(1, PIXELS_AT_ONCE // (3 * height * width))
    table = []
    for prompting in promptings:
        found = []
        for part in _parts(len(judged.ends), DECODED_AT_ONCE):
            logits, best, *_ = _decode(model, embedding, judged, prompting, part)
            for inner in _parts(len(logits), step):
                ends = judged.ends[part][inner]
                truth = torch.stack([torch.from_numpy(paint(e, height, width)) for e in ends])
                truth = truth.to(device)[:, None]
                rows = []
                for choice in choices:
                    masks = logits[inner, 1:]
                    if choice == "predicted":
                        masks = logits[inner].take_along_dim(best[inner, None, None, None], 1)
                    iou = mask_iou(_at_full_size(model, masks, judged.size), truth)
                    rows.append(iou.to(exact(device)).max(1).values)
                found.append(torch.stack(rows))
        table.append(torch.cat(found, 1))
    return torch.stack(table)


@torch.no_grad()
def masks_of(
    model: Sam, judged: EvalSample, device: torch.device, prompting: PromptSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The masks that the model thinks best, and what it was asked, on the CPU.

    Returns:
        bool [K, H, W]; points [K, P, 2] in pixels of the picture, with labels [K, P].
    """
    embedding = model.get_image_embeddings(judged.image.to(device)[None])
    logits, best, points, labels = _decode(model, embedding, judged, prompting, slice(None))
    chosen = logits.take_along_dim(best[:, None, None, None], 1)
    masks = torch.cat([_at_full_size(model, c[None], judged.size)[0].cpu() for c in chosen])
    return masks, points.cpu(), labels.cpu()


def _decode(
    model: Sam, embedding: torch.Tensor, judged: EvalSample, prompting: PromptSpec, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All four masks' logits [K, 4, 4h, 4w], the number [K] of the one thought best, the prompts.

    Of ``centre`` with several clicks: after the last one. SAM's own decoder is given the mask of
    the click before; EfficientSAM, which knows no background, only clicks where it missed.
    """
    points, labels = (x[part].to(embedding.device) for x in judged.prompts(prompting))
    logits, best = _ask(model, embedding, judged.size, points, labels)
    for _ in range(prompting.clicks - 1 if prompting.kind == "centre" else 0):
        points, labels = _correct(model, logits, best, judged, part, points, labels)
        earlier = logits.take_along_dim(best[:, None, None, None], 1)[None, :, 0]
        earlier = earlier if model.takes_background else None
        logits, best = _ask(model, embedding, judged.size, points, labels, earlier)
    return logits, best, points, labels


def _ask(
    model: Sam,
    embedding: torch.Tensor,
    size: tuple[int, int],
    points: torch.Tensor,
    labels: torch.Tensor,
    earlier: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of the decoder for prompts [K, P, 2] and [K, P]; see :func:`_decode`."""
    logits, iou = model.predict_all(embedding, points[None], labels[None], *size, earlier)
    best = iou.float().masked_fill(~model.asked(labels[None]), -torch.inf).argmax(2)
    return logits[0].float(), best[0]


def _correct(
    model: Sam,
    logits: torch.Tensor,
    best: torch.Tensor,
    judged: EvalSample,
    part: slice,
    points: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [K, P, 2] and [K, P] with one more click, in the middle of what is wrong."""
    places = torch.arange(float(max(judged.size)), device=points.device).expand(1, 2, -1)
    more = []
    for ends, masks, number in zip(judged.ends[part], logits, best, strict=True):
        truth = torch.from_numpy(paint(ends, *judged.size)).to(points.device)[None, None]
        mask = _at_full_size(model, masks[None, number, None], judged.size)
        more.append(correction_clicks(mask, truth, places, model.takes_background))
    clicks, kinds = (torch.cat(parts)[:, 0] for parts in zip(*more, strict=True))
    return torch.cat([points, clicks], 1), torch.cat([labels, kinds.to(labels)], 1)


def _at_full_size(model: Sam, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits [K, M, 4h, 4w] to bool masks [K, M, H, W]."""
    return model.resize_logits(logits.float()[None], size, size)[0] > 0


def _parts(count: int, most: int) -> Iterator[slice]:
    for start in range(0, count, most):
        yield slice(start, start + most)


def paint(ends: np.ndarray, height: int, width: int) -> np.ndarray:
    """A whole mask of its run ends, bool [H, W]."""
    inside = np.repeat(np.arange(len(ends)) % 2 == 1, np.diff(ends, prepend=0))
    return inside.reshape(width, height).T.copy()
