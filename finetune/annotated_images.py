"""Images of COCO-format annotations, the way round that the annotations have them."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.average_precision import Truth
from finetune.evaluation import Frames, framed
from finetune.folders import read_image
from sami.core.dataset import load
from sami.core.errors import BadSample
from sami.core.images import Drawn, drawn_on, open_image


@dataclass(frozen=True)
class AnnotatedImages(Dataset):
    """Images one by one.

    Attributes:
        paths: by name.
        sizes: height and width in pixels by name, as the annotations have them.
        shape: each comes within this model's input, uint8 [3, h, w]; None: whole, [H, W, 3].
        drawn: where masks lie if nothing else tells, see :func:`sami.core.images.drawn_on`.
    """

    paths: dict[str, Path]
    sizes: dict[str, tuple[int, int]]
    shape: Frames | None
    drawn: Drawn = "upright"

    def __getitems__(self, names: Sequence[str]) -> tuple[str, torch.Tensor | None, str]:
        """The name of an image with the image, or None and why."""
        (name,) = names
        try:
            encoded, size = open_image(read_image(self.paths[name])), self.sizes[name]
            drawn, _ = drawn_on(encoded, size[1], size[0], None, self.drawn)
            if self.shape is not None:
                return name, framed(encoded, self.shape, size, drawn), ""
            return name, torch.from_numpy(np.array(encoded.decode(drawn))), ""
        except BadSample as error:
            return name, None, str(error)


def load_images(
    paths: dict[str, Path],
    truth: Truth,
    shape: Frames | None,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[str, torch.Tensor | None, str]]:
    """Images in the order of ``paths``, decoded by ``args.workers``; see AnnotatedImages."""
    sizes = {name: (truth.images[name]["height"], truth.images[name]["width"]) for name in paths}
    dataset = AnnotatedImages(paths, sizes, shape, args.masks_drawn_on)
    return load(dataset, [[name] for name in paths], args.workers, device)
