"""TinyViT and MobileSAM: the published function, other people's names, and batch statistics."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.core.optim import OptimConfig, Statistics, build_optimizer
from sami.encoder import EncoderConfig
from sami.encoders.protocol import EncoderShape
from sami.encoders.tiny_vit import TinyVit
from sami.teacher import TeacherConfig, load_teacher
from tests.runs import ROOT

PARITY = ROOT.parent / "shared" / "parity"
SMALL = EncoderShape("tiny_vit", 64, 5, 4, 16, 128, 8, 32)


@pytest.fixture(scope="module")
def parity():
    """The fixtures' recipe for weights and images; skips where it is not."""
    if not PARITY.exists():
        pytest.skip("the parity fixtures (../shared/parity) are not here")
    spec = importlib.util.spec_from_file_location("parity_weights", PARITY / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released(parity, tmp_path_factory):
    """The fixture's weights as MobileSAM's authors publish theirs, and where they lie."""
    shapes = json.loads((PARITY / "mobile_sam_shapes.json").read_text())
    tensors, path = parity.parity_state_dict(shapes), tmp_path_factory.mktemp("ms") / "ms.pt"
    torch.save(tensors, path)
    return tensors, path


def distance(ours, reference):
    reference = torch.as_tensor(reference)
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.slow
@torch.no_grad()
def test_the_published_function(parity, released, tmp_path):
    """MobileSAM's code looks its attention biases up in ``eval()``, which its builder calls before
    it loads the weights. The fixture was made in that state, with biases of zero; its README's own
    example calls ``eval()`` again, and so do training and :func:`test_attention_has_its_biases`."""
    tensors, _ = released
    zero = {
        name: torch.zeros_like(t) if name.endswith("attention_biases") else t
        for name, t in tensors.items()
    }
    torch.save(zero, tmp_path / "mobile_sam.pt")
    model, told = load_model(tmp_path / "mobile_sam.pt"), np.load(PARITY / "mobile_sam.npz")
    embedding = model.image_encoder(2 * parity.parity_image(1024, 1024)[None] - 1)
    assert distance(embedding[:, ::8, ::4, ::4], told["embedding"]) < 1e-5
    points, labels = (torch.as_tensor(told[name]) for name in ("points", "labels"))
    logits, iou = model.predict_low_resolution(
        embedding, points[None].float(), labels[None].float()
    )
    assert distance(logits[0, :, 1:, ::4, ::4], told["low_res_masks"]) < 1e-4
    assert distance(iou[0, :, 1:], told["iou"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("side", [7, 64])
def test_attention_has_its_biases(side):
    """Each block's attention against MobileSAM's formula, also after the weights changed."""
    encoder = TinyVit(EncoderShape("tiny_vit", 64, 5, 4, 16, 16 * side, side, 32)).eval()
    block = encoder.stages[3].blocks[0]
    attention, seen = block.attn, []
    attention.register_forward_hook(lambda module, given, made: seen.append((given[0], made)))
    for _ in range(2):
        attention.attention_biases.normal_()
        encoder(torch.randn(1, 3, 16 * side, 16 * side))
        x, made = seen.pop()
        q, k, v = (
            t.transpose(1, 2)
            for t in attention.qkv(attention.norm(x)).unflatten(2, (4, 48)).split(16, 3)
        )
        y, x = np.divmod(np.arange(49), 7)
        table = np.abs(y[:, None] - y) * 7 + np.abs(x[:, None] - x)
        weights = (q @ k.transpose(2, 3) / 4 + attention.attention_biases[:, table]).softmax(3)
        expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_other_peoples_names(released, tmp_path):
    """MobileSAM's model, its encoder alone under both names, and a strict refusal."""
    tensors, path = released
    model = load_model(path)
    assert model.shape.encoder == EncoderShape("tiny_vit", 320, 12, 10, 16, 1024, 64, 256)
    assert (model.shape.decoder, model.shape.resize, model.shape.single_mask) == (
        "sam",
        "longest",
        True,
    )
    own = model.image_encoder.state_dict()
    theirs = tensors["image_encoder.layers.1.downsample.conv2.c.weight"]
    assert torch.equal(own["stages.2.downsample.conv2.conv.weight"], theirs)
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model))
    again = load_model(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())
    torch.save(tensors | {"image_encoder.layers.9.x": torch.ones(1)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"stages\.9\.x is not part of it"):
        load_model(tmp_path / "more.pt")
    fewer = {n: t for n, t in tensors.items() if n != "image_encoder.neck.3.bias"}
    torch.save(fewer, tmp_path / "fewer.pt")
    with pytest.raises(UserError, match=r"image_encoder\.neck\.3\.bias is missing"):
        load_model(tmp_path / "fewer.pt")


def small_model(checkpoint=None):
    return build_model(
        EncoderConfig("tiny_vit_test", checkpoint=checkpoint),
        MaskDecoderConfig("sam", width=32),
        128,
        "longest",
        False,
    )


def test_it_is_a_start_and_a_teacher(tmp_path):
    model = small_model()
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model))
    path = str(tmp_path / "model.safetensors")
    started = small_model(path).image_encoder
    for name, tensor in model.image_encoder.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor)
    # As timm has it: without the neck.
    bare = {n: t for n, t in model.image_encoder.state_dict().items() if "neck" not in n}
    torch.save(bare, tmp_path / "timm.pth")
    started = small_model(str(tmp_path / "timm.pth")).image_encoder.state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in bare.items())
    teacher = load_teacher(TeacherConfig("mobile_sam", path, 128))
    images = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    expected = model.eval().image_encoder(teacher.normalise(images))
    assert torch.equal(teacher(images), expected) and teacher.channels == 32
    with pytest.raises(UserError, match="no MobileSAM"):
        vit = build_model(
            EncoderConfig("custom"), MaskDecoderConfig(width=32), 128, "square", False
        )
        write_weights(tmp_path / "vit.safetensors", vit.state_dict(), model_header(vit))
        load_teacher(TeacherConfig("mobile_sam", str(tmp_path / "vit.safetensors"), 128))


def test_sizes_that_there_are():
    with pytest.raises(UserError, match="of a TinyViT are those of"):
        TinyVit(EncoderShape("tiny_vit", 128, 5, 4, 16, 128, 8, 32))


def test_layers_as_tiny_vit_counts_them():
    encoder = TinyVit(EncoderShape("tiny_vit", 320, 12, 10))
    layer = {
        name: encoder.layer_id(f"image_encoder.{name}") for name, _ in encoder.named_parameters()
    }
    assert layer["patch_embed.conv1.conv.weight"] == 0
    assert layer["stages.0.blocks.0.conv1.conv.weight"] == 1
    assert layer["stages.1.downsample.conv1.conv.weight"] == 2
    assert layer["stages.1.blocks.0.attn.qkv.weight"] == 3
    assert layer["stages.3.blocks.1.mlp.fc2.bias"] == 12 and layer["neck.0.weight"] == 13
    groups = build_optimizer(encoder, OptimConfig()).param_groups
    plain = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert id(encoder.stages[1].blocks[0].attn.attention_biases) in plain


def test_statistics_are_frozen_for_a_start_alone(tmp_path):
    model = small_model()
    write_weights(tmp_path / "model.safetensors", model.state_dict(), model_header(model))
    for checkpoint, moves in ((None, True), (str(tmp_path / "model.safetensors"), False)):
        encoder = small_model(checkpoint).image_encoder
        before = encoder.patch_embed.conv1.bn.running_mean.clone()
        encoder(torch.randn(2, 3, 128, 128))
        assert torch.equal(before, encoder.patch_embed.conv1.bn.running_mean) is not moves


class TwoRanks:
    """Of whom the other one has statistics of 1."""

    num_processes = 2

    def reduce(self, tensor, how):
        return (tensor + 1) / 2


def test_an_update_left_out_leaves_statistics_as_they_were():
    encoder = TinyVit(SMALL)
    statistics = Statistics(encoder)
    norm = encoder.patch_embed.conv1.bn
    encoder(torch.randn(2, 3, 128, 128))
    moved = norm.running_mean.clone()
    statistics.update(torch.zeros(()), TwoRanks())
    averaged = norm.running_mean.clone()
    assert torch.equal(averaged, (moved + 1) / 2)
    encoder(torch.full((2, 3, 128, 128), torch.nan))
    assert norm.running_mean.isnan().any()
    statistics.update(torch.ones(()), TwoRanks())
    assert torch.equal(norm.running_mean, averaged)
    encoder.eval()
    statistics.update(torch.zeros(()), TwoRanks())  # frozen ones are not averaged anew
    assert torch.equal(norm.running_mean, averaged)


def test_gradients_do_not_remember_an_earlier_forward():
    """timm keeps what it looked up in eval mode, with its graph."""
    encoder = TinyVit(SMALL).eval()
    for _ in range(2):
        F.mse_loss(encoder(torch.randn(1, 3, 128, 128)), torch.zeros(1, 32, 8, 8)).backward()
    assert encoder.stages[1].blocks[0].attn.attention_biases.grad is not None
