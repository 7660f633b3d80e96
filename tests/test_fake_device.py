"""The hot path on a device that is not there: nothing stays on the CPU, nothing is read back.

torch's fake tensors know a shape, a type and a device, and no values: whatever needs one raises.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.data import PromptBatch
from finetune.distillation import Distillation, DistillationConfig, teacher_maps
from finetune.losses import MaskLossConfig
from finetune.model import MaskDecoderConfig, build_model
from finetune.objective import Objective
from finetune.prompting import PromptConfig, correction_clicks
from sami.core.optim import propagate_nonfinite
from sami.data import CropBatch
from sami.encoder import EncoderConfig, build_encoder
from sami.features import FeatureBatch
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from sami.targets import LiveTeacher, Pixels
from sami.teacher import TeacherConfig, load_teacher

CUDA = torch.device("cuda", 0)


class NothingOnTheHost(TorchDispatchMode):
    """Fails where an operation leaves a tensor on the CPU: made there, left there or read back."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        found = function(*given, **(named or {}))
        if function is torch.ops.aten.lift_fresh.default and found.ndim == 0:
            return found  # a number of Python's, which goes to the device with its kernel
        for one in pytree.tree_leaves(found):
            if isinstance(one, torch.Tensor):
                assert one.device == CUDA, f"{function} gives a tensor on {one.device}"
        return found


@pytest.fixture(autouse=True)
def fake(monkeypatch) -> Iterator[None]:
    """The mode, with a GPU's autocast to bf16 and the attention that asks no driver."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        yield


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """On the device; the module's own ``to`` cannot replace fake parameters."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    kept[name] = tensor.detach().to(CUDA).requires_grad_(tensor.requires_grad)
    return module


def on_the_device(function, *given):
    """What a step does of it, in bf16."""
    with NothingOnTheHost(), torch.autocast("cuda", torch.bfloat16):
        return function(*given)


def stage_one(channels=256, kind="cross", tokens="all"):
    decoder = CrossDecoderConfig(kind=kind, width=32, depth=1, heads=2)
    encoder = build_encoder(EncoderConfig("custom"), 64)
    loss = TokenLossConfig(tokens=tokens)
    return moved(MaskedReconstruction(encoder, decoder, loss, channels, 0.75))


def crops(**more):
    """Of two images."""
    order = torch.rand(2, 16).argsort(1)
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    return CropBatch(images, None, order[:, :4], order[:, 4:], **more).to(CUDA)


def losses_of(model, batch, targets):
    def step():
        target = targets(batch)
        found = model(batch.student, batch.visible, batch.masked, target)
        return target, found | {"loss": propagate_nonfinite(found["loss"])}

    target, found = on_the_device(step)
    assert target.shape[:2] == (2, 16)
    assert found["loss"].shape == () and found["loss"].requires_grad
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.slow
def test_stage_one_with_a_live_teacher():
    teacher, batch = moved(load_teacher(TeacherConfig("custom", "random", 64))), crops()

    def autocast():
        return torch.autocast("cuda", torch.bfloat16)

    with autocast():
        teacher(batch.teacher_view)  # SAM's tables are made once, by way of the CPU
    losses_of(stage_one(), batch, LiveTeacher(teacher, 4, "area", autocast))


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_stage_one_with_cached_targets(tokens):
    stored = FeatureBatch(
        torch.zeros(2, 256, 8, 8, dtype=torch.int8),
        torch.ones(2, 256),
        torch.rand(2, 4, 8),
        torch.rand(2, 4, 8),
    )
    batch = crops(features=stored)
    fewer = replace(batch, masked=batch.masked[:, :3])  # CrossMAE's share of them
    for one in (batch, fewer):
        losses_of(stage_one(tokens=tokens), one, lambda given: given.features.tokens())


def test_mae():
    model = stage_one(768, "self", "masked")
    losses_of(model, crops(), Pixels(model.normalise, 16))


def prompts(size, points=6):
    """Of two images with three objects each."""
    return PromptBatch(
        torch.zeros(2, 3, size, size, dtype=torch.uint8),
        torch.rand(2, 3, 32, 32) > 0.5,
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 32, 32, dtype=torch.bool),
        torch.rand(2, 3, points, 2) * size,
        torch.tensor([[1, 2, 3, -1, -1, -1]]).expand(2, 3, -1).contiguous(),
        torch.arange(0, size, size / 32).repeat(2, 2, 1),
        torch.tensor([[size, size // 2], [size // 3, size]]),
    )


def one_group(points, labels):
    """All prompts have a click and a box."""
    rows = torch.arange(len(points), device=points.device)
    yield rows, (points[:, :1], labels[:, :1]), points[:, 1:3].flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["efficientsam", "sam"])
@pytest.mark.parametrize(
    "loss",
    [
        MaskLossConfig(),
        MaskLossConfig("bce", iou="l1", iou_masks="chosen", single_mask=True),
    ],
)
def test_stage_two_with_correction_clicks(kind, loss, monkeypatch):
    # SAM's head waits once for each image, to see which prompts are alike; for nothing else.
    monkeypatch.setattr("finetune.sam_head._groups", one_group)
    decoder = MaskDecoderConfig(kind=kind, dropout=0.1 if kind == "efficientsam" else 0.0)
    model = build_model(EncoderConfig("custom"), decoder, 128, "square", loss.single_mask)
    objective = moved(Objective(model, loss, PromptConfig(corrections=2)))
    losses = on_the_device(objective, prompts(128).to(CUDA))
    assert losses["loss"].shape == () and losses["loss"].requires_grad
    assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["decoupled", "semi_coupled", "fully_coupled"])
def test_distillation(form, monkeypatch):
    monkeypatch.setattr("finetune.sam_head._groups", one_group)
    decoder = MaskDecoderConfig("sam", freeze=DistillationConfig(form).freeze)
    model = build_model(EncoderConfig("custom"), decoder, 128, "longest", False, True)
    with FakeCopyMode(detect_fake_mode()):  # of the decoder that the teacher keeps
        student = moved(Distillation(model, DistillationConfig(form)))
    teacher = moved(load_teacher(TeacherConfig("custom", "random", 128)))

    def autocast():
        return torch.autocast("cuda", torch.bfloat16)

    target, batch = LiveTeacher(teacher, 8, "area", autocast), prompts(128).to(CUDA)
    teacher_maps(target, batch)  # SAM's tables are made once, by way of the CPU
    losses = on_the_device(lambda: student(batch, teacher_maps(target, batch)))
    assert losses["loss"].shape == () and losses["loss"].requires_grad
    assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("background", [False, True])
def test_correction_clicks(background):
    batch = prompts(64).to(CUDA)
    found = on_the_device(
        correction_clicks, ~batch.masks, batch.masks, batch.places, background, batch.inside
    )
    assert [one.shape for one in found] == [(2, 3, 1, 2), (2, 3, 1)]


def test_what_waits_or_stays_behind_is_found():
    there = torch.rand(3, device=CUDA)
    for read in (lambda: there.sum().item(), lambda: bool(there.any()), lambda: there.tolist()):
        with pytest.raises(DataDependentOutputException):
            on_the_device(read)
    with pytest.raises(AssertionError, match="a tensor on cpu"):
        on_the_device(there.cpu)
    with pytest.raises(AssertionError, match="a tensor on cpu"):
        on_the_device(lambda: there + torch.ones(3))
    with pytest.raises(Exception, match="device|cpu"):
        there + torch.ones(3)
    with pytest.raises(Exception, match="nonzero"):  # its length would be read
        on_the_device(lambda: there[there > 0.5])
