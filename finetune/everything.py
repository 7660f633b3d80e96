"""All masks of an image: segment_anything's SamAutomaticMaskGenerator in less time and memory.

Prompts on a grid; of their masks those stay whose predicted IoU and stability are high, without
those whose box another one covers (section 5 and appendix B of Segment Anything). segment_anything
resizes each of an image's 3,072 masks to its size before it looks at one. Here predicted IoU, and
the stability that the low resolution leaves possible, come first; of the rest only the outlines are
resized (:mod:`finetune.full_size`), and no array of floats has the image's size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage
from segment_anything import SamPredictor
from segment_anything.utils.amg import (
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
)
from torchvision.ops.boxes import batched_nms, box_area

from finetune.full_size import Enlarger, PackedMask, run_ends
from finetune.rle import area
from finetune.rle import box as tight_box
from finetune.sam import Sam
from sami.core.config import require

MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# Prompts at once on a CPU. A prompt's image tokens are 4 MB: 1, 2 and 4 take the same time each,
# more no longer fit the caches.
ON_CPU = 4
# Stability of a mask of SMALL samples or more differs by at most 0.053 between the low resolution
# and the image (850 masks of two trained models and of random weights). Smaller ones take no time.
MARGIN, SMALL = 0.1, 200


@dataclass
class Found:
    """A mask that was found, in pixels of the whole image."""

    mask: PackedMask  # in its crop
    box: tuple[int, int, int, int]  # x0, y0, x1, y1, the last two inclusive
    point: list[float]
    iou: float
    stability: float
    crop: list[int]  # x0, y0, x1, y1, the last two exclusive
    ends: np.ndarray | None = None  # its runs, see finetune.rle; once it is no duplicate


class MaskGenerator:
    """segment_anything's SamAutomaticMaskGenerator: the same arguments, and the same results."""

    def __init__(
        self,
        model: Sam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        """
        Args:
            model: what :func:`finetune.model.load_model` opens.
            points_per_side: of the grid of prompts; None with ``point_grids``.
            points_per_batch: prompts at once, at most; on a CPU never more than 4.
            pred_iou_thresh: predicted IoU of a mask that stays; 0 for all.
            stability_score_thresh: least stability of a mask that stays; 0 for all.
            stability_score_offset: what is added to and taken from the logits' threshold; stability
                is the IoU of the two masks.
            box_nms_thresh: IoU of two boxes above which the mask of lower predicted IoU goes.
            crop_n_layers: layer i has 2^i x 2^i crops of the image, which are segmented too.
            crop_nms_thresh: as ``box_nms_thresh``, between crops, where the smaller crop's stays.
            crop_overlap_ratio: of the first layer's crops, as a part of the image's short side.
            crop_n_points_downscale_factor: layer i has points_per_side / factor^i points a side.
            point_grids: [N, 2] for each layer, x and y in 0..1, in place of points_per_side.
            min_mask_region_area: holes and islands of fewer pixels are filled, or removed.
            output_mode: binary_mask, uncompressed_rle or coco_rle.

        Raises:
            UserError: arguments that make no masks.
        """
        require(
            isinstance(model, Sam),
            f"{type(model).__name__} is no model of ours; give what finetune.model.load_model "
            "opens (a run of stage 2, a released EfficientSAM .pt, SAM's .pth)",
        )
        require(
            (points_per_side is None) != (point_grids is None),
            "give points_per_side or point_grids, one of the two",
        )
        require(output_mode in MODES, f"output_mode {output_mode!r} is none of {', '.join(MODES)}")
        whole = {
            "points_per_side": (points_per_side, 1),
            "points_per_batch": (points_per_batch, 1),
            "crop_n_layers": (crop_n_layers, 0),
            "crop_n_points_downscale_factor": (crop_n_points_downscale_factor, 1),
        }
        for name, (value, least) in whole.items():
            given = value is not None and (isinstance(value, bool) or value != int(value))
            require(not given, f"{name} {value} must be a whole number, {least} or more")
            require(value is None or value >= least, f"{name} {value} must be {least} or more")
        require(
            0 <= crop_overlap_ratio < 1,
            f"crop_overlap_ratio {crop_overlap_ratio} must be 0 or more and under 1, such as 0.34",
        )
        if points_per_side is not None:
            last = int(points_per_side / crop_n_points_downscale_factor**crop_n_layers)
            require(
                last > 0,
                f"points_per_side {points_per_side} leaves no point in crop layer {crop_n_layers}; "
                f"lower crop_n_points_downscale_factor {crop_n_points_downscale_factor}",
            )
            point_grids = build_all_layer_point_grids(
                points_per_side, crop_n_layers, crop_n_points_downscale_factor
            )
        self.point_grids = _check_grids(point_grids, crop_n_layers)
        self.predictor = SamPredictor(model)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    @torch.no_grad()
    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Masks of an image, those of high predicted IoU first.

        Args:
            image: uint8 [H, W, 3], RGB.

        Returns:
            For each mask: ``segmentation``, bool [H, W] or run lengths; ``bbox``, x, y, width and
            height in pixels (the last two one less than the mask's, as segment_anything has it);
            ``area`` in pixels; ``predicted_iou``; ``stability_score``; ``point_coords``, the prompt
            [[x, y]]; ``crop_box``, x, y, width and height.

        Raises:
            UserError: no such image, or one too small for its crops.
        """
        image = np.asarray(image)
        require(
            image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0,
            f"an image of {image.dtype} {list(image.shape)}: give uint8 [height, width, 3], RGB "
            "with pixels, such as np.asarray(Image.open(path).convert('RGB'))",
        )
        size = image.shape[:2]
        crops, layers = generate_crop_boxes(size, self.crop_n_layers, self.crop_overlap_ratio)
        require(
            all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in crops),
            f"crop_n_layers {self.crop_n_layers} cuts an image of {size[0]} x {size[1]} pixels "
            "into crops without a pixel; lower it",
        )
        found = []
        for crop, layer in zip(crops, layers, strict=True):
            found += self._of_crop(image, crop, self.point_grids[layer])
        if len(crops) > 1:
            scores = 1 / box_area(torch.tensor([one.crop for one in found]).reshape(-1, 4))
            found = _distinct(found, scores, self.crop_nms_thresh)
        for one in found:
            one.ends = one.mask.ends(*one.crop[:2], *size)
        if self.min_mask_region_area > 0:
            found = self._without_small_regions(found, size)
        return [self._record(one, size) for one in found]

    def _of_crop(self, image: np.ndarray, crop: list[int], grid: np.ndarray) -> list[Found]:
        """Masks of a crop of the image without duplicates, prompted by a grid of points."""
        x0, y0, x1, y1 = crop
        size, predictor = (y1 - y0, x1 - x0), self.predictor
        predictor.set_image(image[y0:y1, x0:x1])
        points = grid * np.array(size)[None, ::-1]
        step = self.points_per_batch
        if predictor.device.type == "cpu":
            step = min(step, ON_CPU)
        shape = predictor.model.shape
        frame = None if shape.resize == "square" else predictor.input_size
        enlarger = Enlarger(4 * shape.grid, size, frame, shape.image_size)
        features, positions = (  # as the mask decoder reads them
            x.contiguous(memory_format=torch.channels_last)
            for x in (predictor.features, predictor.model.prompt_encoder.get_dense_pe())
        )
        seen = predictor.model.with_size(features, size), positions
        found = []
        for start in range(0, len(points), step):
            some = points[start : start + step]
            found += self._select(
                *self._decode(seen, some, size), some, crop, image.shape[:2], enlarger
            )
        predictor.reset_image()
        return _distinct(found, torch.tensor([one.iou for one in found]), self.box_nms_thresh)

    def _decode(
        self,
        seen: tuple[torch.Tensor, torch.Tensor],
        points: np.ndarray,
        size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of single clicks [Q, 2] that stay, [G]; their logits and predicted IoU, [G, 3].

        Args:
            seen: the image's embedding and the positions of its tokens.
            size: height and width of the image.
        """
        predictor, model = self.predictor, self.predictor.model
        clicks = torch.as_tensor(predictor.transform.apply_coords(points, size))[:, None]
        clicks = clicks.to(predictor.device, torch.float32)
        labels = torch.ones(clicks.shape[:2], dtype=torch.int, device=clicks.device)
        sparse, dense = model.prompt_encoder(points=(clicks, labels), boxes=None, masks=None)
        return model.mask_decoder.predict_promising(*seen, sparse, dense, self._least_iou)

    @property
    def _least_iou(self) -> float:
        return self.pred_iou_thresh if self.pred_iou_thresh > 0 else -np.inf

    def _select(
        self,
        which: torch.Tensor,
        logits: torch.Tensor,
        iou: torch.Tensor,
        points: np.ndarray,
        crop: list[int],
        size: tuple[int, int],
        enlarger: Enlarger,
    ) -> list[Found]:
        """Of masks [G, 3, n, n] those good enough, and not cut off by the crop's edge.

        Args:
            which: the points that they are of.
            points: x and y in pixels of the crop, [Q, 2].
            size: height and width of the image.
        """
        logits, given = logits.flatten(0, 1), np.repeat(which.cpu().numpy(), logits.shape[1])
        iou = iou.flatten()
        threshold, offset = self.predictor.model.mask_threshold, self.stability_score_offset
        least = self.stability_score_thresh
        numbers = (iou > self._least_iou).nonzero().squeeze(1)
        if least > 0:
            there = enlarger.without_padding(logits[numbers])
            inner, outer = ((there > threshold + at).sum((1, 2)) for at in (offset, -offset))
            numbers = numbers[(inner >= (least - MARGIN) * outer) | (outer < SMALL)]
        found, corner = [], np.array(crop[:2])
        for number, low in zip(numbers.tolist(), logits[numbers].cpu(), strict=True):
            mask = enlarger.paint(low, threshold, offset, least)
            if mask is None:
                continue
            box = torch.tensor([mask.box()])
            if is_box_near_crop_edge(box, crop, [0, 0, size[1], size[0]]).any():
                continue
            found.append(
                Found(
                    mask.packed(),
                    tuple((box[0].numpy() + np.tile(corner, 2)).tolist()),
                    (points[given[number]] + corner).tolist(),
                    float(iou[number]),
                    mask.stability,
                    crop,
                )
            )
        return found

    def _without_small_regions(self, found: list[Found], size: tuple[int, int]) -> list[Found]:
        """Masks without small holes and islands; of new duplicates, those that needed no change."""
        scores, height = [], size[0]
        for one in found:
            mask = _painted(one.ends, size)
            changes = [_fill(mask, self.min_mask_region_area)]
            changes.append(_drop_islands(mask, self.min_mask_region_area))
            if any(changes):
                one.ends = run_ends(mask.T, 0, 0, *size)
                x0, y0, x1, y1 = tight_box(one.ends, height)
                one.box = (x0, y0, max(x1 - 1, 0), max(y1 - 1, 0))
            scores.append(float(not any(changes)))
        thresh = max(self.box_nms_thresh, self.crop_nms_thresh)
        return _distinct(found, torch.tensor(scores), thresh)

    def _record(self, one: Found, size: tuple[int, int]) -> dict[str, Any]:
        x0, y0, x1, y1 = one.box
        left, top, right, bottom = one.crop
        return {
            "segmentation": self._written(one.ends, size),
            "area": area(one.ends),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "predicted_iou": one.iou,
            "point_coords": [one.point],
            "stability_score": one.stability,
            "crop_box": [left, top, right - left, bottom - top],
        }

    def _written(self, ends: np.ndarray, size: tuple[int, int]) -> np.ndarray | dict[str, Any]:
        """A mask in the form that is asked for."""
        if self.output_mode == "binary_mask":
            return _painted(ends, size)
        counts = np.diff(ends, prepend=0).tolist()
        runs = {"size": list(size), "counts": counts}
        if self.output_mode == "uncompressed_rle":
            return runs
        runs = coco_mask.frPyObjects(runs, *size)
        return {"size": runs["size"], "counts": runs["counts"].decode()}


def _check_grids(grids: list[np.ndarray], layers: int) -> list[np.ndarray]:
    """Grids of points, one for each layer of crops."""
    require(
        len(grids) > layers,
        f"point_grids has {len(grids)} grids; crop_n_layers {layers} needs {layers + 1}, the whole "
        "image's first",
    )
    grids = [np.asarray(grid) for grid in grids]
    for grid in grids:
        inside = grid.ndim == 2 and grid.shape[1:] == (2,) and len(grid) > 0
        require(
            inside and bool(((grid >= 0) & (grid <= 1)).all()),
            f"a point grid {list(grid.shape)} is not [N, 2] of x and y in 0..1; divide pixels by "
            "width and height",
        )
    return grids


def _distinct(found: list[Found], scores: torch.Tensor, thresh: float) -> list[Found]:
    """Masks without those whose box another mask of a higher score covers, best first."""
    if not found:
        return []
    boxes = torch.tensor([one.box for one in found]).float()
    keep = batched_nms(boxes, scores, torch.zeros(len(found)), thresh)
    return [found[number] for number in keep.tolist()]


def _painted(ends: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Run ends as bool [H, W]."""
    height, width = size
    inside = np.zeros(height * width, bool)
    for start, stop in zip(ends[0::2], ends[1::2], strict=False):
        inside[start:stop] = True
    return inside.reshape(width, height).T


def _regions(mask: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbered regions of a mask, which touch at corners too; their sizes; which are too small."""
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    small = sizes < least
    small[0] = False
    return regions, sizes, small


def _fill(mask: np.ndarray, least: float) -> bool:
    """Fill a mask's holes of fewer than ``least`` pixels, in place; whether it had one."""
    regions, _, small = _regions(~mask, least)
    if small.any():
        mask |= small[regions]
    return bool(small.any())


def _drop_islands(mask: np.ndarray, least: float) -> bool:
    """Empty a mask's islands of fewer than ``least`` pixels, the largest one stays; as above."""
    regions, sizes, small = _regions(mask, least)
    if not small.any():
        return False
    if small[1:].all():
        small[1 + sizes[1:].argmax()] = False
    mask &= ~small[regions]
    return True
