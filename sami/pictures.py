"""Images for a person: masked input, target and reconstruction side by side."""

import contextlib

import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch.nn import functional as F

from sami.core.errors import BadSample
from sami.core.images import MEAN, STD, patchify, unpatchify
from sami.core.index import Shard
from sami.core.plots import new_figure, plain, save_png
from sami.core.reading import read_range
from sami.core.run import Run
from sami.data import CropBatch, CropTransform
from sami.model import MaskedReconstruction
from sami.targets import Target

SHOWN = 4  # rows of a figure
SIDE = 4.0  # inches of an image, 400 pixels


def load_shown(shards: list[Shard], transform: CropTransform) -> CropBatch | None:
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
    run: Run,
    model: MaskedReconstruction,
    targets: Target,
    shown: CropBatch,
    step: int,
    kind: str,
) -> None:
    """Masked input, target and reconstruction as ``pictures/reconstruction-<step>.png``.

    Args:
        kind: of the target.
    """
    batch = shown.to(run.device)
    model.eval()
    target = targets(batch)
    with run.accelerator.autocast():
        prediction = model.predict(batch.student, batch.visible, batch.masked)
    model.train()
    path = run.dir / "pictures" / f"reconstruction-{step:07d}.png"
    title, patch = f"{run.dir.name}, step {step}", batch.student.shape[-1] // model.grid
    content = (batch.student, batch.masked, target, prediction)
    save_png(figure_of(*content, patch, kind, title), path)
    run.image(path, step)


def pca_basis(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three principal directions of features, as a colour space.

    Args:
        features: [T, C], the teacher's tokens.

    Returns:
        mean [C], directions [C, 3], and the range [2, 3] that maps to 0..1 (percentiles 2 to 98).
    """
    features = features.double()
    mean = features.mean(0)
    _, vectors = torch.linalg.eigh((features - mean).T @ (features - mean))
    directions = vectors[:, -3:].flip(1)
    if directions.shape[1] < 3:
        directions = F.pad(directions, (0, 3 - directions.shape[1]))
    # A direction's sign is arbitrary: fix it, so that colours stay from one figure to the next.
    directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, 1.0)
    ends = torch.tensor([0.02, 0.98], dtype=torch.float64)
    return mean, directions, torch.quantile((features - mean) @ directions, ends, dim=0)


def pca_colours(
    features: torch.Tensor, basis: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Features [B, N, C] in the colours of a basis: [B, h, w, 3] in 0..1."""
    mean, directions, (low, high) = basis
    projected = ((features.double() - mean) @ directions - low) / (high - low).clamp(min=1e-12)
    side = round(features.shape[1] ** 0.5)
    return rearrange(projected.clamp(0, 1).float(), "b (h w) c -> b h w c", h=side)


def hide(images: torch.Tensor, masked: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images [B, 3, H, H] in 0..1 with the masked patches [B, M] in grey."""
    patches = patchify(images, patch_size).clone()
    patches.scatter_(1, masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), 0.5)
    return unpatchify(patches, patch_size)


def pixels_back(patches: torch.Tensor, images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Normalised pixels [B, N, C] as images in 0..1, with each true patch's mean and spread."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    true = patchify((images - mean) / std, patch_size)
    restored = patches * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    return (unpatchify(restored, patch_size) * std + mean).clamp(0, 1)


def explained(target: torch.Tensor, prediction: torch.Tensor, masked: torch.Tensor) -> list[float]:
    """Of each image, how much of its masked tokens' variance about their mean is predicted.

    1 is a perfect reconstruction, 0 that of one vector for all; it may be below.

    Args:
        target, prediction: [B, N, C].
        masked: [B, M].
    """
    places = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
    true, found = (tokens.double().gather(1, places) for tokens in (target, prediction))
    error = (found - true).square().sum((1, 2))
    spread = (true - true.mean(1, keepdim=True)).square().sum((1, 2))
    return (1 - error / spread.clamp(min=1e-12)).tolist()


def figure_of(
    images: torch.Tensor,
    masked: torch.Tensor,
    target: torch.Tensor,
    prediction: torch.Tensor,
    patch_size: int,
    target_kind: str,
    title: str,
) -> Figure:
    """A row per image with input, masked input, target and reconstruction.

    Features are shown as PCA colours in one basis, fitted on the teacher's; pixels as pixels.

    Args:
        images: uint8 [B, 3, H, H].
        masked: [B, M].
        target, prediction: [B, N, C].
    """
    images, masked = images.cpu().float() / 255, masked.cpu()
    target, prediction = target.cpu().float(), prediction.cpu().float()
    if target_kind == "pixels":
        names = ("target: pixels of each patch", "reconstruction")
        both = (pixels_back(tokens, images, patch_size) for tokens in (target, prediction))
        maps = [rearrange(pixels, "b c h w -> b h w c") for pixels in both]
        key = "Each patch is shown with its true mean and spread, which are not predicted."
    else:
        names = ("target: the teacher's features", "reconstruction of the features")
        if target_kind != "teacher":
            names = (f"target: {target_kind}", "reconstruction")
        basis = pca_basis(target.flatten(0, 1))
        maps = [pca_colours(tokens, basis) for tokens in (target, prediction)]
        key = (
            "Features as colours: the three principal directions of the targets shown, the same "
            "in both columns and all rows; alike in colour is alike in the target."
        )
    hidden = masked.shape[1] / target.shape[1]
    columns = [
        ("image", rearrange(images, "b c h w -> b h w c")),
        (
            f"what the student sees: {100 * (1 - hidden):.0f} %",
            rearrange(hide(images, masked, patch_size), "b c h w -> b h w c"),
        ),
        *zip(names, maps, strict=True),
    ]
    figure = new_figure(SIDE * len(columns), (SIDE + 0.3) * len(images) + 0.9)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    shares = explained(target, prediction, masked) if hidden else [None] * len(images)
    for column, (name, cells) in enumerate(columns):
        for row, cell in enumerate(cells):
            heading = name
            if column == len(columns) - 1 and shares[row] is not None:
                heading = f"{name}: {100 * shares[row]:.0f} %"
            axes[row][column].set_title(heading, fontsize=13)
            axes[row][column].imshow(cell.numpy(), interpolation="nearest")
            axes[row][column].set_axis_off()
    percent = (
        "of the variance of this image's masked tokens, how much is predicted; 0 is their mean."
    )
    figure.suptitle(f"{plain(title)}\n{key}\n%: {percent}", fontsize=13)
    return figure
