"""Images for a person: the embeddings of teacher and student as colours, and the masks of both."""

import contextlib

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure

from finetune.agreement import draw_clicks, masks_of_both
from finetune.data import cells_inside
from finetune.distillation import Distillation, teacher_maps
from finetune.image_data import ImageBatch, ImageTransform
from finetune.losses import mask_iou
from finetune.pictures import overlay
from sami.core.errors import BadSample
from sami.core.index import Shard
from sami.core.order import sample_rng
from sami.core.plots import new_figure, object_colour, plain, save_png
from sami.core.reading import read_range
from sami.core.run import Run
from sami.pictures import pca_basis, pca_colours
from sami.targets import Target

SHOWN = 4  # rows of a figure
CLICKS = 6  # of an image
SIDE = 4.0  # inches of an image, 400 pixels
KEY = (
    "Embeddings as colours: the three principal directions of the teacher's, the same in both "
    "columns and all rows; alike in colour is alike to the mask decoder.\nStar: a click; its mask "
    "has its colour. %: mean IoU of the student's masks with the teacher's by the same clicks."
)


def load_shown(shards: list[Shard], transform: ImageTransform) -> ImageBatch | None:
    """The few images that are drawn while training: the first usable ones."""
    items, total = [], sum(shard.count for shard in shards)
    for sample in read_range(shards, range(min(10 * SHOWN, total)), transform.fields):
        with contextlib.suppress(BadSample):
            items.append(transform.decode_held_out(sample))
        if len(items) == SHOWN:
            break
    return transform.collate(items) if items else None


@torch.no_grad()
def draw_shown(
    run: Run, student: Distillation, target: Target, shown: ImageBatch, seed: int, step: int
) -> None:
    """Embeddings and masks of both as ``pictures/distillation-<step>.png``.

    Args:
        target: of a cache, the student's masks are drawn alone.
    """
    batch = shown.to(run.device)
    student.eval()
    taught = teacher_maps(target, batch)
    with run.accelerator.autocast():
        found = student.embed(batch)
        masks = []
        for number, key in enumerate(batch.keys):
            frame = tuple(batch.frames[number].tolist())
            clicks = draw_clicks(frame, CLICKS, 0, sample_rng(seed, -1, key))
            pair = (one[number : number + 1] for one in (found, taught))
            masks.append((clicks, *masks_of_both(student, *pair, clicks, frame)))
    student.train()
    path = run.dir / "pictures" / f"distillation-{step:07d}.png"
    content = (batch, taught, found, masks, target.cache is None)
    save_png(figure_of(*content, f"{run.dir.name}, step {step}"), path)
    run.image(path, step)


def figure_of(
    batch: ImageBatch,
    taught: torch.Tensor,
    found: torch.Tensor,
    masks: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]],
    live: bool,
    title: str,
) -> Figure:
    """A row per image: the image, both embeddings, and the masks of both.

    Args:
        taught, found: the teacher's and the student's embeddings, [B, C, h, w].
        masks: of each image its clicks [K, 1, 2], and the student's and the teacher's masks, bool
            [K, H, W].
        live: whether the teacher's masks are its own; those of a cache are left out.
    """
    grid, size = taught.shape[-1], batch.images.shape[-1]
    cells = cells_inside(batch.frames, grid, size, whole=False).flatten(1).cpu()
    tokens = [rearrange(maps.float().cpu(), "b c h w -> b (h w) c") for maps in (taught, found)]
    basis = pca_basis(tokens[0][cells])
    colours = [pca_colours(maps, basis).numpy() for maps in tokens]
    columns = 5 if live else 4
    figure = new_figure(SIDE * columns, (SIDE + 0.3) * len(masks) + 0.9)
    axes = figure.subplots(len(masks), columns, squeeze=False)
    for number, (row, (clicks, ours, theirs)) in enumerate(zip(axes, masks, strict=True)):
        height, width = batch.frames[number].tolist()
        image = batch.images[number, :, :height, :width].permute(1, 2, 0).cpu().numpy()
        h, w = (-(-side * grid // size) for side in (height, width))
        panels = [(plain(batch.keys[number]), image)]
        names = ("teacher's embedding", "student's embedding")
        panels += [(name, maps[number, :h, :w]) for name, maps in zip(names, colours, strict=True)]
        share = f": {100 * mask_iou(ours, theirs).mean().item():.0f} %"
        if live:
            panels.append(("teacher's masks", overlay(image, theirs.cpu().numpy())))
        panels.append(("student's masks" + share * live, overlay(image, ours.cpu().numpy())))
        for axis, (name, panel) in zip(row, panels, strict=True):
            axis.set_title(name, fontsize=13)
            axis.imshow(panel, interpolation="nearest")
            axis.set_axis_off()
        for axis in (row[0], *row[3:]):
            for place, (x, y) in enumerate(clicks[:, 0]):
                style = {"color": object_colour(place), "markeredgecolor": "white"}
                axis.plot(x, y, "*", markersize=13, **style)
    figure.suptitle(f"{plain(title)}\n{KEY}", fontsize=13)
    return figure
