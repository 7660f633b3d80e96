"""FastSAM (arXiv 2306.12156): segment everything once, then choose by points, box or text.

The first step, all-instance segmentation, is YOLOv8-seg of the package ultralytics (AGPL-3.0, the
extra ``fastsam``). The second, prompt-guided selection, is in selection.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from segment_anything.utils.transforms import ResizeLongestSide

from finetune.selection import select_by_box, select_by_points, select_by_text_scores
from finetune.yolo_weights import TAKES, read_yolo
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.images import longest_frame
from sami.core.weights import load_strictly

MASK_SIDE = 256  # of SAM's low-resolution logits
LOGIT = 10.0  # of a pixel that is inside
STEM = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # channels of YOLOv8's first layer: its size
NEEDS = (
    "FastSAM needs the package ultralytics, whose licence is AGPL-3.0 (it extends to what is built "
    "on it); if that suits you: pip install -e '.[fastsam]'"
)
NO_MASKS = "FastSAM takes no earlier masks; leave mask_input out"


class Instances(NamedTuple):
    """All that is found in an image, the most confident first.

    ``masks`` bool [N, H, W]; ``boxes`` fp32 [N, 4] in pixels; ``scores`` fp32 [N], confidence.
    """

    masks: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor


class FastSam:
    """FastSAM with the interface of segment_anything's ``SamPredictor``.

    An image's instances are found when it is set; prompts then choose among them. Three things
    differ from SAM: there is one mask for a prompt, also with ``multimask_output``; points and a
    box exclude each other; earlier masks are not taken as a prompt.

    Attributes:
        instances: of the image that is set.
        parameters: how many the network has.
        original_size: its height and width in pixels.
        transform: for ``predict_torch``, as SamPredictor's.
    """

    def __init__(self, segmenter: Any, image_size: int = 1024, parameters: int = 0) -> None:
        """
        Args:
            segmenter: ultralytics' predictor with its model; :meth:`load` makes it.
            image_size: longest side of what the model sees, in pixels.
            parameters: how many its network has; the predictor does not tell.
        """
        self._segmenter, self.parameters = segmenter, parameters
        self.transform = ResizeLongestSide(image_size)
        self.reset_image()

    @staticmethod
    def load(
        path: str | Path,
        device: str | torch.device = "cpu",
        image_size: int = 1024,
        conf: float = 0.4,
        iou: float = 0.9,
        max_det: int = 100,
    ) -> "FastSam":
        """A model from a file; the defaults are those of FastSAM's inference.

        The file is read without executing what it holds; see :mod:`finetune.yolo_weights`.

        Args:
            path: FastSAM's .pt, or what ultralytics trained YOLOv8-seg to.
            conf: least confidence of an instance.
            iou: boxes that overlap more are one instance.
            max_det: most instances of an image.

        Raises:
            UserError: ultralytics is missing, or the file is no YOLOv8-seg.
        """
        for name, value in (("conf", conf), ("iou", iou)):
            require(0 <= value <= 1, f"{name} {value} must be within 0..1")
        for name, value in (("image_size", image_size), ("max_det", max_det)):
            require(value > 0, f"{name} {value} must be positive")
        tensors = read_yolo(path)
        predictor = import_predictor()
        settings = {"conf": conf, "iou": iou, "imgsz": image_size, "max_det": max_det}
        settings |= {"retina_masks": True, "agnostic_nms": True, "save": False, "verbose": False}
        settings |= {"task": "segment", "mode": "predict", "device": str(device)}
        threads = torch.get_num_threads()
        segmenter = predictor(overrides=settings)
        network = build_yolo(tensors, path)
        segmenter.setup_model(network, verbose=False)
        torch.set_num_threads(threads)  # ultralytics takes all but one on a CPU
        return FastSam(segmenter, image_size, sum(p.numel() for p in network.parameters()))

    @property
    def device(self) -> torch.device:
        return self._segmenter.device

    @property
    def network(self) -> torch.nn.Module:
        """YOLOv8-seg alone, from normalised images [B, 3, h, w]."""
        return self._segmenter.model

    @contextmanager
    def limits(self, conf: float, max_det: int) -> Iterator[None]:
        """Other limits than those of :meth:`load` for a while."""
        settings = self._segmenter.args
        before = settings.conf, settings.max_det
        settings.conf, settings.max_det = conf, max_det
        try:
            yield
        finally:
            settings.conf, settings.max_det = before

    def everything(self, image: np.ndarray) -> Instances:
        """All instances of an image, uint8 [H, W, 3] in RGB.

        Raises:
            UserError: another type or shape.
        """
        return self.find([image])[0]

    def find(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """All instances of each of several images, uint8 [H, W, 3] in RGB, in one batch.

        In fp32, under autocast too: the network's head would round boxes to bf16, which at 1024 px
        is to 4 px.

        Raises:
            UserError: another type or shape.
        """
        given = []
        for image in map(np.asarray, images):
            usable = image.dtype == np.uint8 and image.ndim == 3 and image.size > 0
            require(
                usable and image.shape[2] == 3,
                f"an image is uint8 [height, width, 3], got {image.dtype} {list(image.shape)}",
            )
            given.append(np.ascontiguousarray(image[..., ::-1]))  # ultralytics takes BGR
        with torch.autocast(self.device.type, enabled=False):
            results = self._segmenter(given)
        found = []
        for image, one in zip(given, results, strict=True):
            boxes, scores = one.boxes.xyxy.float(), one.boxes.conf.float()
            if one.masks is None:
                masks = boxes.new_zeros((0, *image.shape[:2]), dtype=torch.bool)
            else:
                masks = one.masks.data.bool()
            found.append(Instances(masks, boxes, scores))
        return found

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Find an image's instances, for :meth:`predict`.

        Args:
            image: uint8 [H, W, 3].
            image_format: order of its channels, RGB or BGR.
        """
        require(image_format in ("RGB", "BGR"), f"image_format must be RGB or BGR: {image_format}")
        self.reset_image()
        image = np.asarray(image)
        self.instances = self.everything(image if image_format == "RGB" else image[..., ::-1])
        self.original_size, self.is_image_set = image.shape[:2], True
        self.input_size = longest_frame(self.transform.target_length, *self.original_size)

    def reset_image(self) -> None:
        """Forget the image."""
        self.instances: Instances | None = None
        self.original_size: tuple[int, int] | None = None
        self.input_size: tuple[int, int] | None = None
        self.is_image_set = False

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mask of a prompt; see SamPredictor's.

        Args:
            point_coords: [P, 2] in pixels of the image.
            point_labels: [P], 1 for foreground, 0 for background.
            box: [4], in place of points.
            mask_input: must be None.
            multimask_output: makes no difference.
            return_logits: masks as fp32, 10 inside and -10 outside.

        Returns:
            Masks bool [1, H, W]; scores [1], the lowest confidence of the instances in it, 0 for an
            empty mask; and low-resolution logits [1, 256, 256] in SAM's frame, positive where at
            least half of the pixels are inside.

        Raises:
            UserError: no image is set, or prompts that FastSAM has no rule for.
        """
        require(point_coords is None or point_labels is not None, "point_coords need point_labels")
        require(mask_input is None, NO_MASKS)
        mask, score = self.select(point_coords, point_labels, box)
        found = mask, score, low_resolution(mask)
        masks, scores, low = (part[None].cpu().numpy() for part in found)
        return (masks * 2 - 1.0).astype(np.float32) * LOGIT if return_logits else masks, scores, low

    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of Q prompts: ``point_coords`` [Q, P, 2], ``point_labels`` [Q, P], ``boxes`` [Q, 4]
        in pixels of ``transform``'s frame.

        Returns:
            As :meth:`predict`: [Q, 1, H, W], [Q, 1] and [Q, 1, 256, 256].
        """
        self._require_image()
        require(mask_input is None, NO_MASKS)
        (height, width), (h, w) = self.original_size, self.input_size
        given = [one for one in (point_coords, boxes) if one is not None]
        require(bool(given), "give points or boxes; instances holds all masks")
        scale = torch.tensor([width / w, height / h], dtype=torch.float64)
        found = []
        for number in range(len(given[0])):
            points = labels = box = None
            if point_coords is not None:
                # Rounding must not move a click off its pixel.
                points = (point_coords[number].cpu() * scale).round(decimals=3).numpy()
                labels = point_labels[number].cpu().numpy()
            if boxes is not None:
                box = (boxes[number].cpu().reshape(2, 2) * scale).numpy()
            mask, score = self.select(points, labels, box)
            found.append((mask, score, low_resolution(mask)))
        masks, scores, low = (torch.stack(parts)[:, None] for parts in zip(*found, strict=True))
        return (masks * 2 - 1.0) * LOGIT if return_logits else masks, scores, low

    def predict_text(
        self, scores: Sequence | np.ndarray | torch.Tensor
    ) -> tuple[np.ndarray, float]:
        """The mask that a text describes best, bool [H, W], and its confidence.

        Args:
            scores: [N], see :func:`finetune.selection.select_by_text_scores`.

        Raises:
            UserError: no image is set, or not one finite score for each instance.
        """
        self._require_image()
        mask, score = self._chosen(select_by_text_scores(self.instances.masks, scores))
        return mask.cpu().numpy(), float(score)

    def _require_image(self) -> None:
        require(self.is_image_set, "no image is set; call set_image(image) first")

    def select(
        self, points: Any = None, labels: Any = None, box: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of one prompt: bool [H, W], and its score [].

        Args:
            points: [P, 2] in pixels of the image, with ``labels`` [P], 1 foreground, 0 background.
            box: [4], in place of points.

        Raises:
            UserError: no image is set, or prompts that FastSAM has no rule for.
        """
        self._require_image()
        require(
            (points is None) != (box is None),
            "FastSAM takes points or a box, and has no rule for both; give one of them "
            "(instances holds all masks)",
        )
        if box is not None:
            return self._chosen(select_by_box(self.instances.masks, box))
        mask, painted = select_by_points(self.instances.masks, points, labels)
        return mask, self._score(mask, painted)

    def _chosen(self, number: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        masks = self.instances.masks
        if number is None:
            mask = masks.new_zeros(masks.shape[1:])
            return mask, self._score(mask, [])
        return masks[number], self._score(masks[number], [number])

    def _score(self, mask: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        """The lowest confidence of the instances in a mask; 0 if it is empty."""
        scores = self.instances.scores
        return scores[numbers].min() if numbers and mask.any() else scores.new_zeros(())


def import_predictor() -> Any:
    """ultralytics' class of predictors that segment.

    Raises:
        UserError: the package is missing, or one that it needs.
    """
    try:
        from ultralytics.models.yolo.segment import SegmentationPredictor
    except ImportError as error:
        raise UserError(f"{NEEDS} ({error})") from error
    return SegmentationPredictor


def low_resolution(mask: torch.Tensor) -> torch.Tensor:
    """A mask, bool [H, W], as SAM's low-resolution logits, fp32 [256, 256]: the longest side fills
    them, the rest is padding on the right and below."""
    height, width = longest_frame(MASK_SIDE, *mask.shape)
    covered = F.interpolate(mask[None, None].float(), (height, width), mode="area")[0, 0]
    return F.pad(
        (2 * covered - 1) * LOGIT, (0, MASK_SIDE - width, 0, MASK_SIDE - height), value=-LOGIT
    )


def build_yolo(tensors: dict[str, torch.Tensor], path: str | Path) -> torch.nn.Module:
    """YOLOv8-seg of the size, classes and bins that its tensors tell, with these tensors.

    FastSAM has 26 bins for a box's distances in place of 16 (section 3.2), and one class.

    Raises:
        UserError: the tensors are not YOLOv8-seg's.
    """
    import ultralytics
    from ultralytics.nn.tasks import SegmentationModel

    stem, boxes = tensors.get("0.conv.weight"), tensors.get("22.cv2.0.2.bias")
    classes, masks = tensors.get("22.cv3.0.2.bias"), tensors.get("22.cv4.0.2.bias")
    size = None if stem is None else STEM.get(len(stem))
    if None in (size, boxes, classes):
        raise UserError(f"{path} holds another model than YOLOv8; {TAKES.remedy('')}")
    if masks is None:
        raise UserError(f"{path} is a YOLOv8 without masks (boxes alone); {TAKES.remedy('')}")
    # The package's own file: by its name alone, one in the working directory would be taken.
    file = Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8-seg.yaml"
    definition = yaml.safe_load(file.read_text())
    definition |= {"scale": size, "reg_max": len(boxes) // 4, "nc": len(classes)}
    module = SegmentationModel(definition, verbose=False)
    load_strictly(module.model, tensors, f"{path} does not fit YOLOv8{size}-seg", TAKES.remedy(""))
    return module.float().eval()
