"""The protocol that every encoder and every teacher keeps, and the headers of their files."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune.model import MaskDecoderConfig, build_model, load_model
from finetune.sam import ModelShape, Sam
from sami.core.checkpoint import write_weights
from sami.core.images import Normalise
from sami.encoder import EncoderConfig, build_encoder, export_header, load_encoder
from sami.encoders.protocol import EncoderShape, token_map
from sami.encoders.registry import (
    ENCODERS,
    KINDS,
    TEACHERS,
    Architecture,
    TeacherSource,
    build,
    names_of_encoders,
)
from sami.extraction import describe_preprocessing, extract_whole, prepare
from sami.features import Cache
from sami.model import CrossDecoderConfig
from sami.pretrain import PretrainConfig
from sami.teacher import TeacherConfig, describe_teacher, load_teacher
from tests.test_images import encode
from tools.cost import cache_bytes, find_parts

SHAPES = [
    EncoderShape.stage_one(32, 3, 2, 8, 64),
    EncoderShape("vit", 32, 3, 2, 8, 64, 5, 24),
    EncoderShape("sam", 32, 3, 2, 8, 64, 8, 24),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["stage 1", "stage 2", "sam"])
@torch.no_grad()
def test_the_protocol(shape):
    encoder = build(shape).eval()
    assert encoder.shape == shape and encoder.image_size == 64
    assert (encoder.width, encoder.channels) == (32, shape.channels or 32)
    assert encoder.stride == 8 and encoder.resize == "longest"
    images = encoder.normalise(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    tokens, maps = encoder.tokens(images), encoder.maps(images)
    assert tokens.shape == (2, encoder.class_tokens + 64, 32)
    assert maps.shape == (2, encoder.channels, 8, 8)
    of_tokens = token_map(encoder, images)
    if shape.channels is None:
        assert torch.equal(of_tokens, maps)
        assert torch.equal(tokens, encoder(images))
    else:
        assert torch.equal(encoder.neck(of_tokens), maps)
        assert torch.equal(maps, encoder(images))
    visible = torch.stack([torch.randperm(64)[:5] for _ in range(2)])
    if shape.channels is None:
        assert encoder.pretrains and encoder.tokens(images, visible).shape == (2, 6, 32)
    else:
        with pytest.raises(ValueError, match="visible patches alone"):
            encoder.tokens(images, visible)
    bottom, top = {"cls_token", "pos_embed", "patch_embed"}, {"norm", "neck"}
    for name, _ in encoder.named_parameters():
        first, number = name.split(".")[0], 0 if name.count(".") < 2 else name.split(".")[1]
        expected = 0 if first in bottom else 4 if first in top else 1 + int(number)
        assert encoder.layer_id(encoder.prefix + name) == expected, name
    header = json.loads(json.dumps(shape.header()))
    assert ("kind" in header) == (shape.channels is not None)


def test_every_name_stands_for_a_class():
    assert list(ENCODERS) and all(one.kind in KINDS for one in ENCODERS.values())
    assert set(names_of_encoders(pretrains=True)) == {"vit_ti", "vit_s", "vit_b", "custom"}
    assert set(names_of_encoders()) == set(ENCODERS)


@torch.no_grad()
def test_headers_of_earlier_files(tmp_path):
    """As they have always been written: what is read is the shape, what is written is the same."""
    told = {"width": 64, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 96}
    encoder = build(EncoderShape.stage_one(64, 2, 2, 16, 96))
    text = json.dumps({**told, "weights": "last", "training": {"steps": 3}})
    write_weights(tmp_path / "e.safetensors", encoder.state_dict(), {"encoder": text})
    again = load_encoder(tmp_path / "e.safetensors")
    assert again.shape == encoder.shape
    assert export_header(again, weights="last", training={"steps": 3}) == {"encoder": text}
    assert list(again.state_dict())[:2] == ["cls_token", "pos_embed"]

    for kind in ("vit", "sam"):
        told = {"kind": kind, "width": 32, "depth": 4, "heads": 4, "patch_size": 16}
        told |= {"image_size": 64, "grid": 4, "channels": 64}
        head = {"decoder": "sam", "resize": "longest", "single_mask": False}
        model = load_made(tmp_path / f"{kind}.safetensors", told, head)
        assert asdict(model.shape) == {"encoder": told, **head}


def load_made(path, told, head):
    model = Sam(ModelShape(EncoderShape(**told), **head))
    header = {"model": json.dumps({"encoder": told, **head, "steps": 2})}
    write_weights(path, model.state_dict(), header)
    return load_model(path)


# -- a teacher that is nothing like SAM ---------------------------------------------------------


class Mine(nn.Module):
    """Patches of 12 pixels, its own statistics, images squeezed to a square, no neck."""

    shape, width, channels, stride, image_size = None, 6, 4, 12, 48
    class_tokens, resize, prefix, pretrains, checkpointing = 2, "square", "backbone.", False, False

    def __init__(self):
        super().__init__()
        self.normalise = Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.5))
        self.patches = nn.Conv2d(3, 6, 12, 12)
        self.last = nn.Conv2d(6, 4, 1)

    def tokens(self, images, visible=None):
        patches = self.patches(images).flatten(2).mT
        return torch.cat([patches[:, :2] * 0, patches], dim=1)

    def maps(self, images):
        return self.last(token_map(self, images))


@pytest.fixture
def mine(monkeypatch, tmp_path):
    source = TeacherSource(lambda config, weights, what, remedy: Mine(), stride=12)
    monkeypatch.setitem(TEACHERS, "mine", source)
    path = tmp_path / "mine.pth"
    torch.save({f"backbone.{name}": tensor for name, tensor in Mine().state_dict().items()}, path)
    return TeacherConfig("mine", str(path), 48)


@torch.no_grad()
def test_a_teacher_is_asked_for_all_that_is_its_own(mine):
    mine.check()
    teacher = load_teacher(mine)
    assert (teacher.channels, teacher.stride, teacher.resize) == (4, 12, "square")
    assert load_teacher(TeacherConfig("mine", mine.checkpoint, 48, "trunk")).channels == 6
    stored = torch.load(mine.checkpoint)
    assert torch.equal(teacher.encoder.last.weight, stored["backbone.last.weight"])
    image = np.random.default_rng(0).integers(0, 256, (31, 90, 3), dtype=np.uint8)
    cache = Cache.of(teacher, describe_teacher(mine, teacher), 4, "fp16")
    assert (cache.patch_size, cache.channels, cache.pool) == (12, 4, 1)
    size, pixels = prepare(encode(Image.fromarray(image)), cache)
    assert size == (90, 31) and pixels.shape == (48, 48, 3) and cache.cells(*size) == (4, 4)
    seen = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    scaled = (seen - 0.5) / torch.tensor([0.25, 0.25, 0.5]).view(1, 3, 1, 1)
    expected = teacher.encoder.last(teacher.encoder.patches(scaled))
    torch.testing.assert_close(extract_whole(teacher, [pixels]), expected)
    assert Cache(**json.loads(json.dumps(cache.header()))) == cache
    told = describe_preprocessing(teacher)
    assert told["mean"] == [127.5] * 3 and told["std"] == [63.75, 63.75, 127.5]
    assert "both sides" in told["resize"]


def test_what_it_costs_is_asked_of_it(mine):
    config = PretrainConfig(encoder=EncoderConfig("custom"), teacher=mine)
    config.data.image_size = 64
    config.decoder = CrossDecoderConfig(width=48, depth=1, heads=4)
    parts = {part.name.split()[0]: part for part in find_parts("sami/pretrain.py", config)}
    assert parts["teacher"].macs == 16 * (3 * 144 * 6 + 6 * 4)
    assert parts["head"].parameters == 48 * 4 + 4
    assert cache_bytes(mine)["4 x 4 int8"] == 4 * (16 + 4)


def test_a_size_that_is_no_multiple_of_its_stride(mine):
    mine.image_size = 50
    with pytest.raises(ValueError, match="must be a positive multiple of 12, such as 168 or 768"):
        mine.check()


# -- a student that is not the plain ViT --------------------------------------------------------


def test_a_student_of_another_kind(monkeypatch, tmp_path):
    """Its files say what it is, and both stages rebuild it from them."""

    class Other(KINDS["vit"]):
        def __init__(self, shape):
            super().__init__(shape)
            self.scale = nn.Parameter(torch.full((1,), 2.0))

    monkeypatch.setitem(KINDS, "other", Other)
    monkeypatch.setitem(ENCODERS, "other_ti", Architecture("other", 32, 2, 2))
    config = EncoderConfig("other_ti")
    config.check()
    encoder = build_encoder(config, 64)
    path = tmp_path / "encoder.safetensors"
    write_weights(path, encoder.state_dict(), export_header(encoder))
    again = load_encoder(path)
    assert type(again) is Other and again.shape == encoder.shape
    start = EncoderConfig("other_ti", checkpoint=str(path))
    model = build_model(start, MaskDecoderConfig(width=32), 64, "square", False)
    assert type(model.image_encoder) is Other and model.shape.encoder.grid == 4
    assert torch.equal(model.image_encoder.pos_embed, encoder.pos_embed)
