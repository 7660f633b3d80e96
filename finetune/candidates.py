"""What a comparison asks of a model, and how SAM's kin and FastSAM answer it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.box_masks import Choose, segment_boxes
from finetune.coco_masks import encode_masks
from finetune.evaluation import CHOICES, EvalSample, Frames, masks_of, paint, score
from finetune.everything import MaskGenerator
from finetune.fastsam import FastSam, Instances, import_predictor
from finetune.losses import mask_iou
from finetune.model import TAKES_MODEL, load_model
from finetune.prompting import PromptSpec, correction_clicks
from finetune.proposals import Proposer, propose_by_clicks, propose_by_fastsam
from finetune.sam import Sam
from finetune.selection import select_by_points
from finetune.yolo_weights import is_yolo
from sami.core.errors import MachineError, UserError
from sami.core.processes import exact
from sami.core.weights import Takes

TAKES_CANDIDATE = Takes(TAKES_MODEL.kinds, f"{TAKES_MODEL.words}; or FastSAM's .pt")


class Candidate(Protocol):
    """A model that is compared. It works in two steps: one for an image, one for each prompt.

    Attributes:
        device: where it computes.
        choices: which masks of a prompt are scored, of :data:`finetune.evaluation.CHOICES`.
        shape: tells the size to which the data set brings an image.
        max_points: of a prompt, a box counted as two; None for any number.
        uses_grid: whether everything mode prompts with a grid of points.
        takes_bf16: whether it computes in bf16 where that is asked for.
    """

    device: torch.device
    choices: tuple[str, ...]
    shape: Frames
    max_points: int | None
    uses_grid: bool
    takes_bf16: bool

    def describe(self) -> dict[str, Any]:
        """What there is to know of its shape, for JSON."""
        ...

    def count(self) -> dict[str, float]:
        """``parameters``, ``encoder_parameters``, ``encoder_macs`` of an image's first step, and
        ``decoder_macs`` of a click."""
        ...

    def inputs(self, image: np.ndarray, count: int) -> Any:
        """``count`` images as the first step takes them, already at its size.

        Args:
            image: uint8 [H, W, 3], RGB.
        """
        ...

    def first_step(self, inputs: Any) -> Any:
        """What is computed once for an image."""
        ...

    def click(self, found: Any) -> Any:
        """The masks of one click, in the middle of the image, after its first step."""
        ...

    def everything(self, image: np.ndarray, side: int) -> int:
        """How many masks everything mode finds in an image, with ``side`` x ``side`` points."""
        ...

    def score(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> torch.Tensor:
        """IoU with each object's mask, fp64 [specs, choices, K], at the image's size."""
        ...

    def masks(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> Iterator[torch.Tensor]:
        """For each spec the masks that the model thinks best, bool [K, H, W] on the CPU."""
        ...

    def segment_boxes(
        self, image: torch.Tensor, size: tuple[int, int], boxes: np.ndarray, choose: Choose
    ) -> list[dict[str, Any]]:
        """A mask for each box, see :func:`finetune.box_masks.segment_boxes`."""
        ...

    def propose(self, side: int) -> Proposer:
        """What proposes masks of an image, with ``side`` x ``side`` points."""
        ...


def require_package(path: Path, option: str) -> None:
    """
    Raises:
        UserError: a file of weights needs a package that is not installed.
    """
    if is_yolo(path):
        _under(option, import_predictor)


def open_candidate(path: Path, option: str, device: torch.device) -> Candidate:
    """A model from a file, on a device.

    Args:
        path: of weights, as TAKES_CANDIDATE lists them.
        option: what an error's sentence begins with.

    Raises:
        UserError: damaged, of no kind that is known, or its package is missing.
    """
    if is_yolo(path):
        return FastSamCandidate(_under(option, lambda: FastSam.load(path, device)))
    return SamCandidate(load_model(path, option).to(device))


def _under(option: str, call: Callable[[], Any]) -> Any:
    """A call whose errors name the option."""
    try:
        return call()
    except MachineError:
        raise
    except UserError as error:
        raise UserError(f"{option} {error}") from error


@torch.no_grad()
def count_macs(call: Callable[[], Any]) -> float:
    """Multiply-adds of a call; attention as its two matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


class SamCandidate:
    """What :func:`finetune.model.load_model` opens: encoder and mask decoder."""

    choices, uses_grid, takes_bf16 = CHOICES, True, True

    def __init__(self, model: Sam) -> None:
        self.model, self.shape, self.max_points = model, model.shape, model.max_points

    @property
    def device(self) -> torch.device:
        return self.model.device

    def describe(self) -> dict[str, Any]:
        return asdict(self.model.shape)

    def count(self) -> dict[str, float]:
        encoder, inputs = self.model.image_encoder, self._noise(1)
        with torch.no_grad():
            embedding = self.first_step(inputs)
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "encoder_parameters": sum(p.numel() for p in encoder.parameters()),
            "encoder_macs": count_macs(lambda: self.first_step(inputs)),
            "decoder_macs": count_macs(lambda: self.click(embedding)),
        }

    def inputs(self, image: np.ndarray, count: int) -> torch.Tensor:
        """Noise: what an image shows makes no difference to the time."""
        return self._noise(count)

    def _noise(self, count: int) -> torch.Tensor:
        side = self.shape.image_size
        return torch.randn(count, 3, side, side, device=self.device)

    def first_step(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.image_encoder(inputs)

    def click(self, found: torch.Tensor) -> Any:
        points = found.new_full((1, 1, 1, 2), self.shape.image_size / 2, dtype=torch.float32)
        return self.model.predict_low_resolution(found[:1], points, torch.ones_like(points[..., 0]))

    def everything(self, image: np.ndarray, side: int) -> int:
        return len(MaskGenerator(self.model, side, output_mode="coco_rle").generate(image))

    def score(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> torch.Tensor:
        return score(self.model, sample, self.device, specs)

    def masks(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> Iterator[torch.Tensor]:
        for spec in specs:
            yield masks_of(self.model, sample, self.device, spec)[0]

    def segment_boxes(
        self, image: torch.Tensor, size: tuple[int, int], boxes: np.ndarray, choose: Choose
    ) -> list[dict[str, Any]]:
        return segment_boxes(self.model, image, size, boxes, choose)

    def propose(self, side: int) -> Proposer:
        return propose_by_clicks(self.model, side)


class WholeImage:
    """Images are kept at their own size; FastSAM resizes them by itself."""

    def frame(self, height: int, width: int) -> tuple[int, int]:
        return height, width


class FastSamCandidate:
    """FastSAM: the first step finds all instances, the second chooses among them by its own rules.

    There is one mask for a prompt, so that the best of three is no choice.
    """

    choices, uses_grid, takes_bf16, max_points = CHOICES[:1], False, False, None

    def __init__(self, model: FastSam) -> None:
        self.model, self.shape = model, WholeImage()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def describe(self) -> dict[str, Any]:
        return {"image_size": self.model.transform.target_length, "fastsam": True}

    def count(self) -> dict[str, float]:
        """The network's; NMS and the choice among masks multiply nothing worth counting."""
        network, side = self.model.network, self.model.transform.target_length
        image = torch.zeros(1, 3, side, side, device=self.device)
        macs = count_macs(lambda: network(image))
        return {
            "parameters": self.model.parameters,
            "encoder_parameters": self.model.parameters,
            "encoder_macs": macs,
            "decoder_macs": 0.0,
        }

    def inputs(self, image: np.ndarray, count: int) -> list[np.ndarray]:
        return [self.model.transform.apply_image(image)] * count

    def first_step(self, inputs: list[np.ndarray]) -> Instances:
        """Resizing to a square, network, NMS and masks: the second step needs them all."""
        return self.model.find(inputs)[0]

    def click(self, found: Instances) -> Any:
        height, width = found.masks.shape[1:]
        return select_by_points(found.masks, [[width / 2, height / 2]], [1])

    def everything(self, image: np.ndarray, side: int) -> int:
        return len(self.model.everything(image).masks)

    def score(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> torch.Tensor:
        self._set(sample)
        iou = torch.zeros(len(specs), 1, len(sample.ends), dtype=exact(self.device))
        for number in range(len(sample.ends)):
            truth = self._truth(sample, number)
            for row, spec in zip(iou, specs, strict=True):
                row[0, number] = mask_iou(self._mask(sample, spec, number, truth), truth)
        return iou

    def masks(self, sample: EvalSample, specs: tuple[PromptSpec, ...]) -> Iterator[torch.Tensor]:
        self._set(sample)
        for spec in specs:
            found = (
                self._mask(sample, spec, number, self._truth(sample, number)).cpu()
                for number in range(len(sample.ends))
            )
            yield torch.stack(list(found))

    def segment_boxes(
        self, image: torch.Tensor, size: tuple[int, int], boxes: np.ndarray, choose: Choose
    ) -> list[dict[str, Any]]:
        """By FastSAM's own rule for boxes, whatever ``choose`` says: there is one mask."""
        self.model.set_image(image.permute(1, 2, 0).numpy())
        found = []
        for box in boxes:
            mask = torch.zeros(size, dtype=torch.bool)
            if (box[2:] > box[:2]).all():
                mask = self.model.select(box=box)[0].cpu()
            found += encode_masks(mask.T[None].numpy())
        return found

    def propose(self, side: int) -> Proposer:
        return propose_by_fastsam(self.model)

    def _set(self, sample: EvalSample) -> None:
        self.model.set_image(sample.image.permute(1, 2, 0).numpy())

    def _truth(self, sample: EvalSample, number: int) -> torch.Tensor:
        return torch.from_numpy(paint(sample.ends[number], *sample.size)).to(self.device)

    def _mask(
        self, sample: EvalSample, spec: PromptSpec, number: int, truth: torch.Tensor
    ) -> torch.Tensor:
        """The mask of an object's prompt, bool [H, W]; later clicks on what is wrong included."""
        if spec.kind == "box":
            return self.model.select(box=sample.boxes[number].numpy())[0]
        points, labels = (one[number].to(self.device) for one in sample.prompts(spec))
        places = torch.arange(float(max(sample.size)), device=self.device).expand(1, 2, -1)
        mask, _ = self.model.select(points.cpu().numpy(), labels.cpu().numpy())
        for _ in range(spec.clicks - 1 if spec.kind == "centre" else 0):
            wrong = correction_clicks(mask[None, None], truth[None, None], places, True)
            points = torch.cat([points, wrong[0][0, 0]])
            labels = torch.cat([labels, wrong[1][0, 0].to(labels)])
            mask, _ = self.model.select(points.cpu().numpy(), labels.cpu().numpy())
        return mask
