"""A small SAM, students and images for the tests of distillation."""

import numpy as np
import torch

from finetune.data import MaskDataConfig, PromptTransform
from finetune.distillation import (
    Distillation,
    DistillationConfig,
)
from finetune.image_data import ImageTransform
from finetune.model import MaskDecoderConfig, build_model, model_header
from finetune.prompting import PromptConfig
from sami.core.checkpoint import write_weights
from sami.encoder import EncoderConfig
from sami.targets import LiveTeacher
from sami.teacher import TeacherConfig, load_teacher
from tests.test_data_stage2 import raw
from tools.make_toy_shards import write_shard

FORMS = ("decoupled", "semi_coupled", "fully_coupled")
SIZE, GRID, CHANNELS = 128, 8, 32
WIDTH = {"width": 32, "depth": 2, "heads": 2}  # of a custom encoder
DATA = MaskDataConfig(image_size=SIZE, resize="longest", masks_per_image=3)


def write_scenes(folder):
    """22 drawn scenes in two shards, with padding on the right; returns their pattern."""
    for number in range(2):
        write_shard(folder, 0, 96, 72, number, range(11 * number, 11 * number + 11))
    return f"{folder}/*.tar"


def small_model(name="custom", checkpoint=None, decoder=None, freeze="none"):
    encoder = EncoderConfig(name, checkpoint=checkpoint, **({} if name != "custom" else WIDTH))
    head = MaskDecoderConfig("sam", decoder, freeze, width=CHANNELS)
    return build_model(encoder, head, SIZE, "longest", False, single_mask=True)


def write_sam(folder):
    """A small SAM whose masks depend on image and prompt; its file is teacher and decoder."""
    torch.manual_seed(1)
    model = small_model()
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    write_weights(folder / "model.safetensors", model.state_dict(), model_header(model))
    return str(folder / "model.safetensors")


def teacher_of(sam):
    teacher = load_teacher(TeacherConfig("custom", sam, SIZE))
    return LiveTeacher(teacher, GRID, "area", lambda: torch.autocast("cpu", enabled=False))


def student_of(sam, form="decoupled", name="tiny_vit_test", **more):
    torch.manual_seed(0)
    config = DistillationConfig(form, **more)
    return Distillation(small_model(name, decoder=sam, freeze=config.freeze), config)


def samples(count=2):
    found = []
    for number in range(count):
        size = height, width = 90 + 30 * number, 120
        y, x = np.mgrid[:height, :width]
        masks = [(x - 30 * i) ** 2 + (y - 25 * i) ** 2 < 20**2 for i in (1, 2, 3)]
        found.append(raw(masks, f"k{number}", size=size))
    return found


def batch_of(form="decoupled", count=2):
    if form == "decoupled":
        views = ImageTransform(DATA, 0)
    else:
        views = PromptTransform(DATA, PromptConfig(), 4 * GRID, 0)
    return views.collate([views.decode(sample, 0, False) for sample in samples(count)])
