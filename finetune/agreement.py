"""How near a student comes to its teacher on held-out images: embeddings, and masks by clicks.

The masks follow MobileSAM (Faster Segment Anything, section 4.2 and Table 7): the truth is what the
teacher's embedding gives under SAM's decoder for the same prompt. Prompts are drawn anywhere in the
image: no annotation is read.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from finetune.data import cells_inside
from finetune.distillation import Distillation, teacher_maps
from finetune.image_data import ImageTransform
from finetune.losses import mask_iou
from finetune.prompt_encoder import BACKGROUND, FOREGROUND
from finetune.trivial import RADII, discs
from sami.core.config import require
from sami.core.index import Shard
from sami.core.order import sample_rng
from sami.core.processes import exact
from sami.core.run import Run
from sami.targets import Target
from sami.validation import usable_batches

BATCH = 4  # images of a forward
# Pixels of a 1024-px input between a click on the foreground and one on the background; 0: no
# second click.
DISTANCES = {"teacher_1_click": 0} | {f"teacher_pair_{n}": n for n in range(100, 600, 100)}
DRAWN = 1024  # pairs at a time, of which those outside of the image are dropped


@dataclass
class AgreementConfig:
    """The held-out measure on ``data.val_shards``.

    Attributes:
        every: steps between measurements; 0 for the end of the run alone.
        samples: at most so many images, the first of val_shards; MobileSAM has 200.
        prompts: of each kind (1 click, pairs of five distances) for an image.
    """

    every: int = 2000
    samples: int = 200
    prompts: int = 8

    def check(self) -> None:
        require(self.every >= 0, f"eval.every {self.every} must be 0 (only at the end) or more")
        require(self.samples > 0, f"eval.samples {self.samples} must be positive, such as 200")
        require(self.prompts > 0, f"eval.prompts {self.prompts} must be positive, such as 8")


class MapSums:
    """What the measures of embeddings need of the images, so that batches and ranks add up.

    All in fp64, where the device has it; of the image's cells alone.
    """

    def __init__(self, channels: int, grid: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=exact(device), device=device)

        self.error, self.square, self.cosine, self.images = zeros(), zeros(), zeros(), zeros()
        self.target, self.count = zeros(channels, grid, grid), zeros(grid, grid)

    def add(self, prediction: torch.Tensor, target: torch.Tensor, cells: torch.Tensor) -> None:
        """A batch: prediction and target [B, C, h, w]; which cells are image, bool [B, h, w]."""
        dtype = self.count.dtype
        weight, each = cells.to(dtype), cells.unsqueeze(1)
        prediction, target = (torch.where(each, x.to(dtype), 0.0) for x in (prediction, target))
        self.error += (prediction - target).square().mean(1).sum()
        self.square += target.square().mean(1).sum()
        self.cosine += (F.cosine_similarity(prediction, target, dim=1) * weight).sum()
        self.target += target.sum(0)
        self.count += weight.sum(0)
        self.images += len(target)

    def measures(self) -> dict[str, float | None]:
        """``mse`` and ``cosine`` over all cells, and ``r2``: 1 - squared error / squared error of
        the best constant map, the target's mean over these images at each position. None stands
        for what is not a number, such as r2 of a single image."""
        count = self.count.sum()
        mean = self.target / self.count.clamp(min=1)
        constant = self.square - (self.target * mean).mean(0).sum()
        # Of a single image nothing is left of it but rounding.
        constant = torch.where(constant > 1e-6 * self.square, constant, torch.nan)
        found = {
            "mse": self.error / count,
            "cosine": self.cosine / count,
            "r2": 1 - self.error / constant,
            "pictures": self.images,
        }
        values = {name: float(value) for name, value in found.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@torch.no_grad()
def measure(
    run: Run,
    student: Distillation,
    target: Target,
    shards: list[Shard],
    transform: ImageTransform,
    config: AgreementConfig,
    workers: int,
) -> dict[str, float | None]:
    """Measures over the first held-out images, the same on all ranks. Collective.

    Args:
        student: unwrapped.
        target: a live teacher; of a cache, which has nothing of the padding that SAM's decoder
            sees, the embeddings alone are compared.

    Returns:
        ``mse``, ``cosine``, ``r2``; ``miou_<prompt>`` for each of DISTANCES, with
        ``trivial_<prompt>``, the best constant disc at the click; and ``pictures``, their number.
    """
    shape = student.model.shape
    sums = MapSums(shape.encoder.channels, shape.grid, run.device)
    scores = torch.zeros(len(DISTANCES), 1 + len(RADII), dtype=exact(run.device), device=run.device)
    student.eval()
    options = (config.samples, BATCH, workers)
    for batch in usable_batches(run, shards, transform, *options):
        taught = teacher_maps(target, batch)
        with run.accelerator.autocast():
            found = student.embed(batch)
        sums.add(
            found, taught, cells_inside(batch.frames, shape.grid, shape.image_size, whole=False)
        )
        for number, key in enumerate(batch.keys if target.cache is None else ()):
            one = slice(number, number + 1)
            frame = tuple(batch.frames[number].tolist())
            rng = sample_rng(transform.seed, -1, key)
            for row, distance in zip(scores, DISTANCES.values(), strict=True):
                clicks = draw_clicks(frame, config.prompts, distance * shape.image_size / 1024, rng)
                with run.accelerator.autocast():
                    both = masks_of_both(student, found[one], taught[one], clicks, frame)
                row += row.new_tensor(_scored(*both, clicks))
    student.train()
    for tensor in (*vars(sums).values(), scores):
        tensor.copy_(run.accelerator.reduce(tensor, "sum"))
    result = sums.measures()
    if target.cache is None and result["pictures"]:
        shares = scores / (result["pictures"] * config.prompts)
        rows = dict(zip(DISTANCES, shares, strict=True))
        result |= {f"miou_{name}": row[0].item() for name, row in rows.items()}
        result |= {f"trivial_{name}": row[1:].max().item() for name, row in rows.items()}
    return result


def draw_clicks(
    frame: tuple[int, int], count: int, distance: float, rng: np.random.Generator
) -> np.ndarray:
    """Clicks on pixels of an image, uniformly: [count, 1, 2], x and y.

    Args:
        frame: its height and width.
        distance: 0 < d < its longest side: also a second click so far away, in any direction that
            has a pixel there, [count, 2, 2].
    """
    size = np.array(frame[::-1])
    found = np.zeros((0, 1 + (distance > 0), 2))
    while len(found) < count:
        clicks = rng.uniform(size=(DRAWN, 1, 2)) * size
        if distance > 0:
            angle = rng.uniform(0, 2 * np.pi, (DRAWN, 1))
            away = distance * np.stack([np.cos(angle), np.sin(angle)], -1)
            clicks = np.concatenate([clicks, clicks + away], 1)
        clicks = np.floor(clicks)
        found = np.concatenate([found, clicks[((clicks >= 0) & (clicks < size)).all((1, 2))]])
    return found[:count].astype(np.float32)


@torch.no_grad()
def masks_of_both(
    student: Distillation,
    found: torch.Tensor,
    taught: torch.Tensor,
    clicks: np.ndarray,
    frame: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's masks of one image, each the one that its own decoder thinks
    best: bool [K, H, W] twice, at the size that the image has within the input.

    Args:
        found, taught: embeddings [1, C, h, w].
        clicks: [K, P, 2]; the first is on the foreground, the second on the background.
        frame: height and width of the image within the input.
    """
    points = torch.from_numpy(clicks)[None].to(found.device)
    kinds = torch.tensor([FOREGROUND, BACKGROUND][: clicks.shape[1]], device=found.device)
    labels, model = kinds.expand(points.shape[:3]), student.model
    masks = []
    for decode, embedding in ((student.student_masks, found), (student.teacher_masks, taught)):
        logits, iou = decode(embedding, points, labels)
        best = iou.float().masked_fill(~model.asked(labels), -torch.inf).argmax(2, keepdim=True)
        chosen = logits.float().take_along_dim(best[..., None, None], 2)
        masks.append(model.resize_logits(chosen, frame, frame)[0, :, 0] > 0)
    return masks[0], masks[1]


def _scored(student: torch.Tensor, teacher: torch.Tensor, clicks: np.ndarray) -> list[float]:
    """Sums over the masks [K, H, W]: IoU with the teacher's, the student's and each disc's."""
    ends = [run_ends(mask) for mask in teacher.cpu().numpy()]
    trivial = discs(ends, *teacher.shape[1:], clicks[:, :1])
    return [mask_iou(student, teacher).sum().item(), *trivial.sum(1).tolist()]


def run_ends(mask: np.ndarray) -> np.ndarray:
    """The inverse of :func:`finetune.evaluation.paint`: run ends of a bool mask [H, W], column by
    column, from a run of what is not in it on."""
    line = mask.T.ravel()
    changes = np.flatnonzero(line[1:] != line[:-1]) + 1
    return np.concatenate([[0] * bool(line[0]), changes, [len(line)]]).astype(np.int64)
