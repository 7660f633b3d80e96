"""Images for a person: what was to be found, and what each prompt found."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.ndimage import binary_dilation, binary_erosion

from finetune.evaluation import EvalDataset, EvalSample, masks_of, paint
from finetune.losses import mask_iou
from finetune.prompt_encoder import BACKGROUND, FOREGROUND, TOP_LEFT
from finetune.prompting import PROMPTS, PromptSpec
from finetune.sam import Sam
from sami.core.dataset import ShardSource
from sami.core.images import Drawn, resize_array
from sami.core.index import Shard
from sami.core.plots import OBJECTS, ink_on, object_colour, plain, save_png
from sami.core.run import Run

SIDE = 560  # pixels of a panel's longer side
COLUMNS, GAP, STRIP, HEAD, DPI = 3, 12, 26, 64, 100  # panels in a row; pixels
MOST = len(OBJECTS)  # objects of an image: more would share their colours
IMAGES = 4  # that are drawn while training
OUTLINE = 2  # pixels
SHOWN = PROMPTS[:2]  # box and one click
KEY = (
    "Each prompt has its mask's colour: dashed box, star (a click in the object), cross (a click "
    "beside it). At it: the object's number, and its mask's IoU; empty: the mask has no pixel."
)


def draw_shown(run: Run, model: Sam, shards: list[Shard], step: int, drawn: Drawn) -> None:
    """Masks by box and by click on the first few images, as ``pictures/masks-<step>.png``."""
    path = run.dir / "pictures" / f"masks-{step:07d}.png"
    source = ShardSource.first(shards, EvalDataset.fields, IMAGES)
    found = EvalDataset(source, model.shape, masks=8, drawn=drawn)
    shown = [sample for sample in found if isinstance(sample, EvalSample)]
    if shown:
        model.eval()
        with run.accelerator.autocast():
            draw_masks(path, model, shown, run.device, f"{run.dir.name}, step {step}")
        model.train()
        run.image(path, step)


def draw_masks(path: Path, *what: Any) -> None:
    """Write a PNG of :func:`figure_of`; the arguments are its own."""
    save_png(figure_of(*what), path, DPI)


def figure_of(
    model: Sam,
    images: list[EvalSample],
    device: torch.device,
    title: str,
    specs: tuple[PromptSpec, ...] = SHOWN,
) -> Figure:
    """Of each image the true masks, and the masks by each kind of prompt.

    A panel's pixels are pixels of the PNG.
    """
    columns = min(COLUMNS, 1 + len(specs))
    rows = -(-(1 + len(specs)) // columns)
    sizes = [  # of the panels, height and width
        tuple(max(1, round(side * SIDE / max(sample.size))) for side in sample.size)
        for sample in images
    ]
    width = columns * (SIDE + GAP) + GAP
    height = HEAD + sum(rows * (size[0] + STRIP + GAP) for size in sizes)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(GAP / width, 1 - 14 / height, plain(title), fontsize=13, va="center")
    figure.text(GAP / width, 1 - 40 / height, KEY, fontsize=9, va="center", wrap=True)
    top = HEAD
    for sample, size in zip(images, sizes, strict=True):
        axes = []
        for place in range(1 + len(specs)):
            row, column = divmod(place, columns)
            left = GAP + column * (SIDE + GAP)
            bottom = height - top - row * (size[0] + STRIP + GAP) - STRIP - size[0]
            panel = (left / width, bottom / height, size[1] / width, size[0] / height)
            axes.append(figure.add_axes(panel))
        _draw_image(axes, model, sample, size, device, specs)
        top += rows * (size[0] + STRIP + GAP)
    return figure


def _draw_image(
    axes: list[Axes],
    model: Sam,
    sample: EvalSample,
    size: tuple[int, int],
    device: torch.device,
    specs: tuple[PromptSpec, ...],
) -> None:
    """Fill an image's panels: the truth, and then each kind of prompt."""
    frame = model.shape.frame(*sample.size)
    image = sample.image[:, : frame[0], : frame[1]].permute(1, 2, 0).numpy()
    image = resize_array(image, *size)
    objects, sample = len(sample.ends), sample.head(MOST)
    count = len(sample.ends)
    truth = torch.from_numpy(np.stack([paint(ends, *sample.size) for ends in sample.ends]))
    shown = f"{count} of {objects} masks" if count < objects else f"{objects} masks"
    _show(axes[0], image, shrink(truth, size), f"{sample.key}: {shown}, as annotated")
    taken: list[tuple[float, ...]] = []
    for number, point in enumerate(sample.prompts(PromptSpec("random", 1))[0][:, 0]):
        _label(axes[0], number, f"{number + 1}", _on_panel(point, sample.size, size), taken)
    for axis, spec in zip(axes[1:], specs, strict=True):
        masks, points, labels = masks_of(model, sample, device, spec)
        iou = mask_iou(masks, truth).tolist()
        found, without = sum(iou) / count, sample.trivial_iou(spec).mean(1).max()
        title = (
            f"by {spec.name}: mean IoU {100 * found:.1f} % (without a model {100 * without:.1f} %)"
        )
        _show(axis, image, shrink(masks, size), title)
        taken = []
        for number, (place, kinds) in enumerate(zip(points, labels, strict=True)):
            empty = not masks[number].any()
            text = f"{number + 1}: " + ("empty" if empty else f"{100 * iou[number]:.0f} %")
            half = 0.0 if (kinds == TOP_LEFT).any() else 0.5  # a box's sides lie between pixels
            place = _on_panel(place, sample.size, size, half)
            _draw_prompt(axis, number, place, kinds)
            _label(axis, number, text, place[0], taken)


def _show(axis: Axes, image: np.ndarray, masks: np.ndarray, title: str) -> None:
    axis.imshow(overlay(image, masks), interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    axis.set_title(plain(title), fontsize=11, loc="left", pad=4)
    axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def _on_panel(
    points: torch.Tensor, full: tuple[int, int], size: tuple[int, int], half: float = 0.5
) -> np.ndarray:
    """Pixels x, y of the image as pixels of its panel: a pixel's middle on a pixel's middle."""
    scale = np.array([size[1] / full[1], size[0] / full[0]])
    return (points.numpy() + half) * scale - 0.5


def shrink(masks: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Bool masks [K, H, W] at another size, by their nearest pixels: bool [K, h, w]."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * full / new).long()
        for new, full in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns].numpy()


def overlay(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] with bool masks [K, h, w]: tinted, outlined in full colour, large ones below.

    Around an outline lies a black line, so that it is seen on a ground of its own colour.
    """
    result = image.astype(float)
    for number in np.argsort(-masks.sum((1, 2)), kind="stable"):
        mask, colour = masks[number], np.multiply(to_rgb(object_colour(number)), 255)
        result[mask] = 0.6 * result[mask] + 0.4 * colour
        result[mask & ~binary_erosion(mask, iterations=OUTLINE)] = colour
        result[binary_dilation(mask) & ~mask] = 0
    return result.round().astype(np.uint8)


def _draw_prompt(axis: Axes, number: int, points: np.ndarray, labels: torch.Tensor) -> None:
    """A box as two corners, or clicks; [P, 2] and [P]. Padding is not drawn."""
    colour = object_colour(number)
    if (labels == TOP_LEFT).any():
        (x0, y0), (x1, y1) = points[:2]
        xs, ys = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
        axis.plot(xs, ys, color="white", linewidth=3)
        axis.plot(xs, ys, color=colour, linewidth=2, linestyle=(0, (5, 2)))
        return
    edge = {"color": colour, "markeredgecolor": "white", "markeredgewidth": 1.2}
    for label, marker, side in ((FOREGROUND, "*", 15), (BACKGROUND, "X", 10)):
        xs, ys = points[(labels == label).numpy()].T
        axis.plot(xs, ys, marker, markersize=side, **edge)


def _label(
    axis: Axes, number: int, text: str, place: np.ndarray, taken: list[tuple[float, ...]]
) -> None:
    """A text on the object's colour beside a place, where no earlier one stands if there is room.

    Args:
        taken: left, top, right and bottom of the texts before; this one's is added.
    """
    wide, high = 8 + 6.5 * len(text), 17
    most_x, most_y = axis.get_xlim()[1] - wide, axis.get_ylim()[0] - high
    found = []
    for distance in range(0, 160, 6):
        for x, y in ((9, -9), (9, 9), (-9, -9), (-9, 9), (0, -12), (0, 12)):
            right, down = x + np.sign(x) * distance, y + np.sign(y) * distance
            left = place[0] + right - wide * (x < 0) - wide / 2 * (x == 0)
            up = place[1] + down - high * (y < 0)
            left, up = min(max(left, 0), most_x), min(max(up, 0), most_y)
            found.append((left, up, left + wide, up + high))
    free = [
        (a, b, c, d)
        for a, b, c, d in found
        if all(c <= o[0] or o[2] <= a or d <= o[1] or o[3] <= b for o in taken)
    ]
    left, up, right, down = (free or found)[0]
    taken.append((left, up, right, down))
    colour = object_colour(number)
    box = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.8, "pad": 2}
    style = {"color": ink_on(colour), "fontsize": 8, "ha": "center", "va": "center", "bbox": box}
    axis.text((left + right) / 2, (up + down) / 2, text, **style)
