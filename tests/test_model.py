"""Decoders, merge and loss against literal versions; what the queries see."""

import numpy as np
import pytest
import torch

from sami.encoder import EncoderConfig, build_encoder
from sami.model import (
    CrossBlock,
    CrossDecoder,
    CrossDecoderConfig,
    JointDecoder,
    MaskedReconstruction,
    TokenLossConfig,
    restore_order,
    token_errors,
)
from sami.targets import pixel_target
from tests import reference

N, V, D, W = 16, 4, 12, 16


def randomise(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def masks(batch=2, seed=0):
    order = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :V], order[:, V:]


def config(**more):
    return CrossDecoderConfig(width=W, depth=2, heads=2, **more)


def as_arrays(tokens):
    return [token.detach().numpy().astype(np.float64) for token in tokens]


@pytest.mark.parametrize("masked_memory", [True, False])
def test_cross_block_against_the_literal_one(masked_memory):
    block = randomise(CrossBlock(W, 2, masked_memory))
    tokens, memory = torch.randn(1, 5, W), torch.randn(1, 3, W)
    weight, bias = (x.detach().numpy() for x in (block.attn.kv.weight, block.attn.kv.bias))
    queries = [reference.layer_norm(x, block.norm1) for x in as_arrays(tokens[0])]
    keys = [reference.layer_norm(x, block.norm_memory) for x in as_arrays(memory[0])]
    attended = reference.attend(
        queries,
        keys + queries if masked_memory else keys,
        q=lambda x: reference.linear(x, block.attn.q),
        k=lambda x: weight[:W] @ x + bias[:W],
        v=lambda x: weight[W:] @ x + bias[W:],
        out=block.attn.proj,
        heads=2,
    )
    middle = [x + a for x, a in zip(as_arrays(tokens[0]), attended, strict=True)]
    expected = [x + reference.mlp(reference.layer_norm(x, block.norm2), block.mlp) for x in middle]
    np.testing.assert_allclose(block(tokens, memory)[0].detach(), np.stack(expected), 1e-4, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["visible_and_masked", "visible"])
def test_what_the_queries_see(memory):
    """Change one masked token's position, or one visible feature, and look who notices."""
    decoder = randomise(CrossDecoder(config(memory=memory), D, 4))
    visible, masked = masks(1)
    encoded = torch.randn(1, 1 + V, D)
    before = decoder(encoded, visible, masked)
    changed = randomise(CrossDecoder(config(memory=memory), D, 4))
    first = masked[0, 0]
    changed.positions[0, first] += torch.randn(W)
    moved = (changed(encoded, visible, masked) - before).abs().sum(-1)[0] > 1e-5
    others = masked[0, 1:]
    assert moved[first]
    assert bool(moved[others].all()) is (memory == "visible_and_masked")
    assert bool(moved[others].any()) is (memory == "visible_and_masked")
    assert not moved[visible[0]].any()  # anchors never see a masked token

    encoded[0, 1] += 1  # the first visible token's feature
    moved = (decoder(encoded, visible, masked) - before).abs().sum(-1)[0] > 1e-5
    assert moved[masked[0]].all()  # every query sees it
    assert moved[visible[0, 0]] and not moved[visible[0, 1:]].any()  # anchors pass by unchanged


@torch.no_grad()
def test_the_class_token_is_neither_memory_nor_merged():
    decoder = randomise(CrossDecoder(config(), D, 4))
    visible, masked = masks()
    encoded = torch.randn(2, 1 + V, D)
    before = decoder(encoded, visible, masked)
    encoded[:, 0] += 1
    assert torch.equal(decoder(encoded, visible, masked), before)


def test_anchors_and_mask_tokens_stand_where_their_patches_are():
    visible, masked = masks(3)
    seen, made = torch.randn(3, V, W), torch.randn(3, N - V, W)
    expected = torch.full((3, N, W), torch.nan)
    for image in range(3):
        for place, token in zip(visible[image], seen[image], strict=True):
            expected[image, place] = token
        for place, token in zip(masked[image], made[image], strict=True):
            expected[image, place] = token
    assert torch.equal(restore_order(seen, made, visible, masked), expected)


@torch.no_grad()
def test_joint_decoder_is_maes():
    """All tokens attend to each other: mask tokens filled in, positions added, class token too."""
    decoder = randomise(JointDecoder(config(), D, 4))
    visible, masked = masks(1)
    encoded = torch.randn(1, 1 + V, D)
    tokens: list = [None] * (N + 1)
    positions = as_arrays(decoder.positions[0])
    embedded = [reference.linear(x, decoder.embed) for x in as_arrays(encoded[0])]
    tokens[0] = embedded[0]
    for place, token in zip(visible[0].tolist(), embedded[1:], strict=True):
        tokens[1 + place] = token + positions[place]
    for place in masked[0].tolist():
        tokens[1 + place] = decoder.mask_token[0, 0].numpy() + positions[place]
    for block in decoder.blocks:
        weight, bias = block.attn.qkv.weight.numpy(), block.attn.qkv.bias.numpy()
        q, k, v = (
            lambda x, w=weight[i * W : (i + 1) * W], b=bias[i * W : (i + 1) * W]: w @ x + b
            for i in range(3)
        )
        normed = [reference.layer_norm(x, block.norm1) for x in tokens]
        attended = reference.attend(normed, normed, q, k, v, block.attn.proj, heads=2)
        tokens = [x + a for x, a in zip(tokens, attended, strict=True)]
        tokens = [
            x + reference.mlp(reference.layer_norm(x, block.norm2), block.mlp) for x in tokens
        ]
    expected = np.stack([reference.layer_norm(x, decoder.norm) for x in tokens[1:]])
    np.testing.assert_allclose(decoder(encoded, visible, masked)[0], expected, 1e-3, 1e-3)


def model(loss=None, channels=6, ratio=0.75, **decoder):
    encoder = build_encoder(EncoderConfig("custom", width=D, depth=1), 64)
    return MaskedReconstruction(
        encoder, config(**decoder), loss or TokenLossConfig(), channels, ratio
    )


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_loss_against_a_hand_computation(kind, tokens):
    net = randomise(model(TokenLossConfig(kind, tokens)))
    visible, masked = masks()
    images, target = torch.rand(2, 3, 64, 64), torch.randn(2, N, 6)
    result = net(images, visible, masked, target)
    prediction = net.predict(images, visible, masked).detach().double().numpy()
    errors = {
        (b, n): reference.token_error(prediction[b, n], target[b, n].double().numpy(), kind)
        for b in range(2)
        for n in range(N)
    }
    hidden = [errors[b, n] for b in range(2) for n in masked[b].tolist()]
    seen = [errors[b, n] for b in range(2) for n in visible[b].tolist()]
    expected = np.mean(hidden + seen if tokens == "all" else hidden)
    assert result["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert result["loss_masked"].item() == pytest.approx(np.mean(hidden), rel=1e-5)
    assert result["loss_visible"].item() == pytest.approx(np.mean(seen), rel=1e-5)


@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_a_part_of_the_masked_tokens_by_hand(tokens):
    """What is left out is not scored; what is scored stands for it."""
    net = randomise(model(TokenLossConfig(tokens=tokens)))
    visible, masked = masks()
    part = masked[:, torch.tensor([7, 2, 5])].sort(1).values
    images, target = torch.rand(2, 3, 64, 64), torch.randn(2, N, 6)
    result = net(images, visible, part, target)
    prediction = net.predict(images, visible, part).detach().double().numpy()
    hidden, seen = [], []
    for b in range(2):
        given = sorted(visible[b].tolist() + part[b].tolist())
        for place, n in enumerate(given):
            error = reference.token_error(
                prediction[b, place], target[b, n].double().numpy(), "mse"
            )
            (hidden if n in part[b].tolist() else seen).append(error)
    assert len(hidden) == 6 and len(seen) == 2 * V
    whole = (V * np.mean(seen) + (N - V) * np.mean(hidden)) / N
    assert result["loss"].item() == pytest.approx(
        whole if tokens == "all" else np.mean(hidden), rel=1e-5
    )
    assert result["loss_masked"].item() == pytest.approx(np.mean(hidden), rel=1e-5)


@torch.no_grad()
def test_a_token_that_is_not_predicted_is_nowhere():
    """Not a query, not a key, not a value: whatever it is, nothing changes."""
    decoder = randomise(CrossDecoder(config(), D, 4))
    visible, masked = masks(1)
    part, encoded = masked[:, ::3], torch.randn(1, 1 + V, D)
    before = decoder(encoded, visible, part)
    assert before.shape == (1, V + part.shape[1], W)
    for place in masked[0].tolist():
        changed = randomise(CrossDecoder(config(), D, 4))
        changed.positions[0, place] += 1.0
        same = torch.equal(changed(encoded, visible, part), before)
        assert same == (place not in part[0].tolist())


def test_the_loss_is_computed_in_fp32():
    """Under autocast, differences that bf16 cannot hold still count."""
    target = torch.full((1, 1, 4), 256.0)
    prediction = target + 0.25  # bf16 has steps of 2 here
    with torch.autocast("cpu", torch.bfloat16):
        assert token_errors(prediction, target, "mse").item() == pytest.approx(0.0625)
        assert token_errors(prediction, target, "mse").dtype == torch.float32


def test_pixel_target_against_a_loop():
    images = torch.randn(2, 3, 32, 32)
    expected = torch.empty(2, 4, 768)
    for b in range(2):
        for place in range(4):
            y, x = divmod(place, 2)
            patch = images[b, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten()
            expected[b, place] = (patch - patch.mean()) / torch.sqrt(patch.var() + 1e-6)
    torch.testing.assert_close(pixel_target(images, 16), expected)


def test_without_a_mask_no_decoder_is_built():
    net = model(ratio=0.0)
    assert net.decoder is None
    visible, masked = torch.arange(N).expand(2, -1), torch.empty(2, 0, dtype=torch.int64)
    result = net(torch.rand(2, 3, 64, 64), visible, masked, torch.randn(2, N, 6))
    assert "loss_masked" not in result
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"encoder", "head"}


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"memory": "visible"},
        {"kind": "self"},
        {"kind": "self", "loss": TokenLossConfig(tokens="masked")},
        {"loss": TokenLossConfig(tokens="masked")},
        {"ratio": 0.0},
    ],
)
def test_every_trainable_parameter_gets_a_gradient(kind):
    """What DDP needs to do without find_unused_parameters."""
    net = model(**kind)
    visible, masked = masks()
    if kind.get("ratio") == 0.0:
        visible, masked = torch.arange(N).expand(2, -1), torch.empty(2, 0, dtype=torch.int64)
    net(torch.rand(2, 3, 64, 64), visible, masked, torch.randn(2, N, 6))["loss"].backward()
    silent = [
        name
        for name, parameter in net.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent


def test_the_papers_decoder():
    """8 blocks of width 512: per block 12 D^2 weights, as in MAE's."""
    encoder = build_encoder(EncoderConfig(), 224)
    decoder = CrossDecoder(CrossDecoderConfig(), 192, 14)
    assert len(decoder.blocks) == 8 and decoder.blocks[0].attn.heads == 16
    matrices = sum(p.numel() for b in decoder.blocks for p in b.parameters() if p.ndim == 2)
    assert matrices == 8 * 12 * 512**2
    net = MaskedReconstruction(encoder, CrossDecoderConfig(), TokenLossConfig(), 256, 0.75)
    assert net.head.weight.shape == (256, 512)


@pytest.mark.parametrize("masked_memory", [True, False])
def test_a_table_of_tokens_equals_its_rows(masked_memory):
    block = randomise(CrossBlock(W, 2, masked_memory))
    memory, rows = torch.randn(3, V, W), torch.randint(0, N, (3, 7))
    results = []
    for tabled in (True, False):
        table = torch.randn(N, W, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = block(table, memory, rows) if tabled else block(table[rows], memory)
        block.zero_grad()
        out.square().sum().backward()
        results.append([out, table.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
