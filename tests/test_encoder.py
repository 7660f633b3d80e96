"""The student ViT: timm's own function, and only the visible tokens in its blocks."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.encoder import EncoderConfig, build_encoder, export_header, load_encoder
from sami.encoders.vit import sincos_positions


def small(**more):
    return build_encoder(EncoderConfig("custom", **more), 64).eval()


def randomise(module):
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "parameters"),
    [
        ("vit_ti", "vit_tiny_patch16_224", 5_524_416),
        ("vit_s", "vit_small_patch16_224", 21_665_664),
        ("vit_b", "vit_base_patch16_224", 85_798_656),
    ],
)
@torch.no_grad()
def test_the_exported_file_is_a_timm_model(name, theirs, parameters, tmp_path):
    torch.manual_seed(0)
    ours = build_encoder(EncoderConfig(name), 224).eval()
    assert sum(p.numel() for p in ours.parameters()) == parameters
    torch.nn.init.normal_(ours.norm.weight)
    torch.nn.init.normal_(ours.cls_token)
    write_weights(tmp_path / "encoder.safetensors", ours.state_dict(), export_header(ours))
    model = timm.create_model(theirs, num_classes=0).eval()
    model.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 224, 224)
    expected = model.forward_features(images)
    assert (ours(images) - expected).norm() / expected.norm() <= 1e-5
    again = load_encoder(tmp_path).eval()
    assert torch.equal(again(images), ours(images))


@torch.no_grad()
def test_all_visible_equals_the_whole_image():
    encoder, images = randomise(small()), torch.randn(3, 3, 64, 64)
    whole = encoder(images)
    in_order = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(encoder(images, in_order), whole, rtol=1e-5, atol=1e-6)
    shuffled = torch.rand(3, 16).argsort(1)
    mixed = encoder(images, shuffled)
    torch.testing.assert_close(mixed[:, :1], whole[:, :1], rtol=1e-4, atol=1e-5)
    expected = torch.stack([row[order] for row, order in zip(whole[:, 1:], shuffled, strict=True)])
    torch.testing.assert_close(mixed[:, 1:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hidden_patches_have_no_influence_and_visible_ones_do():
    encoder, images = randomise(small()), torch.randn(1, 3, 64, 64)
    visible = torch.tensor([[0, 5, 10]])
    before = encoder(images, visible)
    assert before.shape == (1, 4, 64)
    changed = images.clone()
    changed[:, :, 0:16, 16:32] += 1  # patch 1
    assert torch.equal(encoder(changed, visible), before)
    changed = images.clone()
    changed[:, :, 16:32, 16:32] += 1  # patch 5
    assert not torch.allclose(encoder(changed, visible), before)


def test_positions_are_maes():
    """Half the channels for x, half for y; sines then cosines of the position times 10000^-k."""
    positions = sincos_positions(3, 8)[0]
    for y in range(3):
        for x in range(3):
            expected = []
            for value in (x, y):
                angles = [value / 10000 ** (k / 2) for k in range(2)]
                expected += [torch.sin(torch.tensor(a)) for a in angles]
                expected += [torch.cos(torch.tensor(a)) for a in angles]
            torch.testing.assert_close(positions[3 * y + x], torch.stack(expected))


def test_positions_do_not_train_and_the_class_slot_is_empty():
    encoder = small()
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[:, 0].abs().sum() == 0


def test_files_that_are_no_encoder(tmp_path):
    with pytest.raises(UserError, match="is an empty folder.*sami/pretrain.py"):
        load_encoder(tmp_path)
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(b"text")
    with pytest.raises(UserError, match="is a text and no weights"):
        load_encoder(tmp_path)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is not an encoder"):
        load_encoder(file)
    encoder = small()
    write_weights(file, {"norm.weight": encoder.norm.weight}, export_header(encoder))
    with pytest.raises(UserError, match="does not fit an encoder with width 64.*cls_token is miss"):
        load_encoder(file)


def test_starting_from_a_checkpoint(tmp_path):
    start = randomise(small())
    write_weights(tmp_path / "encoder.safetensors", start.state_dict(), export_header(start))
    begun = small(checkpoint=str(tmp_path))
    assert all(
        torch.equal(a, b) for a, b in zip(start.parameters(), begun.parameters(), strict=True)
    )
    with pytest.raises(UserError, match="width 64, depth 2, 2 heads.*asks for width 64, depth 3"):
        small(checkpoint=str(tmp_path), depth=3)
