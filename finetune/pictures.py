"""Pictures for a person: what was to be found, and what a box and a click found."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune.evaluation import PROMPTINGS, Judged, Prompting, masks_of, paint
from finetune.sam import Sam
from sami.core.images import resize_array

SIDE = 320  # pixels of a tile's longer side
SHOWN = PROMPTINGS[:2]  # box and one click


def draw_masks(
    path: Path, model: Sam, pictures: list[Judged], device: torch.device, title: str
) -> None:
    """A row for each picture: true masks, then the masks by box and by one click, with prompts."""
    columns = ("true", *(prompting.name for prompting in SHOWN))
    figure = Figure(figsize=(3.2 * len(columns), 3.0 * len(pictures)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), len(columns), squeeze=False)
    for row, judged in zip(axes, pictures, strict=True):
        height, width = judged.size
        frame = model.shape.frame(height, width)
        image = judged.image[:, : frame[0], : frame[1]].permute(1, 2, 0).numpy()
        scale = SIDE / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = resize_array(image, *size)
        truth = torch.from_numpy(np.stack([paint(ends, height, width) for ends in judged.ends]))
        found = [masks_of(model, judged, device, prompting) for prompting in SHOWN]
        for number, (axis, masks) in enumerate(zip(row, [truth, *found], strict=True)):
            axis.imshow(overlay(image, shrink(masks, size)))
            axis.set_axis_off()
            axis.set_title(columns[number], fontsize=9)
            if number:
                _draw_prompts(axis, judged, SHOWN[number - 1], scale)
                axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=80)


def shrink(masks: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Bool masks [K, H, W] at another size, by their nearest pixels: bool [K, h, w]."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * full / new).long()
        for new, full in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns].numpy()


def overlay(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] with bool masks [K, h, w] in colours, large ones below."""
    result = image.astype(float)
    colours = np.random.default_rng(0).uniform(60, 255, (len(masks), 3))
    for number in np.argsort(-masks.sum((1, 2)), kind="stable"):
        result[masks[number]] = 0.45 * result[masks[number]] + 0.55 * colours[number]
    return result.round().astype(np.uint8)


def _draw_prompts(axis: Axes, judged: Judged, prompting: Prompting, scale: float) -> None:
    for points, labels in zip(*judged.prompts(prompting), strict=True):
        used = (points * scale).numpy()
        if (labels == 2).any():
            (x0, y0), (x1, y1) = used
            axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], "w-", linewidth=0.6)
        else:
            axis.plot(used[:, 0], used[:, 1], "w*", markersize=4)
