"""Learning rate, parameter groups, and updates that are left out."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sami.core.errors import UserError
from sami.core.optim import (
    Ema,
    Guard,
    OptimConfig,
    TrainConfig,
    build_optimizer,
    guarded_step,
    learning_rate,
    parameter_groups,
    propagate_nonfinite,
    unfinished_warmup,
)
from sami.encoder import EncoderConfig, build_encoder
from sami.model import CrossDecoderConfig, MaskedReconstruction, TokenLossConfig
from tests import reference


def test_the_papers_schedule():
    """40 of 400 epochs of warm-up to 2.4e-3 at a batch of 4096."""
    steps = 400 * 312
    rates = [learning_rate(OptimConfig(), step, steps, 4096) for step in range(steps)]
    np.testing.assert_allclose(rates, reference.learning_rate(2.4e-3, 40 * 312, steps), rtol=1e-12)
    assert max(rates) == 2.4e-3 == rates[40 * 312 - 1] == rates[40 * 312]
    assert rates[-1] < 1e-11
    assert learning_rate(OptimConfig(), 20000, steps, 1024) == pytest.approx(rates[20000] / 4)


def test_short_and_warmless_schedules():
    assert learning_rate(OptimConfig(warmup=0), 0, 10, 4096) == 2.4e-3
    rates = [learning_rate(OptimConfig(), step, 1, 4096) for step in range(1)]
    assert rates == [2.4e-3]


def test_what_decays():
    encoder = build_encoder(EncoderConfig("custom"), 64)
    for kind in ("cross", "self"):
        decoder = CrossDecoderConfig(kind=kind, width=32, depth=1, heads=2)
        model = MaskedReconstruction(encoder, decoder, TokenLossConfig(), 256, 0.75)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay, rest = (
            {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.05)
        )
        assert decay | rest == {n for n, p in model.named_parameters() if p.requires_grad}
        assert {
            "encoder.cls_token",
            "decoder.mask_token",
            "head.bias",
            "encoder.norm.weight",
        } <= rest
        assert {"encoder.patch_embed.proj.weight", "decoder.embed.weight", "head.weight"} <= decay
        assert not any("norm" in name or "bias" in name or "token" in name for name in decay)
        assert all("norm" in name or "bias" in name or "token" in name for name in rest)
    assert [g["weight_decay"] for g in parameter_groups(model, 0.05)] == [0.05, 0.0]


def test_stage_twos_schedule():
    """250 updates of warm-up to 4e-4 at a batch of 128, then a line to 0."""
    config = OptimConfig(lr=4e-4, base_batch=128, warmup=250, schedule="linear")
    rates = [learning_rate(config, step, 1250, 128) for step in range(1250)]
    expected = [4e-4 * (k + 1) / 250 for k in range(250)]
    expected += [4e-4 * (1000 - k) / 1000 for k in range(1000)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_a_run_that_ends_inside_its_warmup_is_told():
    config = OptimConfig(lr=4e-4, base_batch=128, warmup=250, schedule="linear")
    told = unfinished_warmup(config, 20, 64)
    assert "20 steps end inside the warm-up of 250" in told and "rises to 1.6e-05 of 0.0002" in told
    assert "rises to 0.0004 of 0.0004" in unfinished_warmup(config, 250, 128)
    assert unfinished_warmup(config, 251, 128) is None
    for steps in range(1, 60):
        assert unfinished_warmup(OptimConfig(warmup=0.1), steps, 64) is None


def test_layer_decay_and_embeddings():
    model = nn.ModuleDict(
        {"low": nn.Linear(2, 2), "high": nn.Linear(2, 2), "e": nn.Embedding(3, 2)}
    )
    ids = {"low": 0, "high": 1, "e": 2}
    groups = parameter_groups(model, 0.1, 0.5, lambda name: ids[name.split(".")[0]])
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        "low.weight": (0.25, 0.1),
        "low.bias": (0.25, 0.0),
        "high.weight": (0.5, 0.1),
        "high.bias": (0.5, 0.0),
        "e.weight": (1.0, 0.0),
    }


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    config = OptimConfig(lr=0.1, weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    return model, optimizer, config


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_updates_against_adamw_by_hand():
    model, optimizer, config = problem()
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    gradients = {name: [] for name in before}
    for seed in range(4):
        give_gradients(model, seed)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.numpy().copy())
        guarded_step(optimizer, 0.0)
    for name, parameter in model.named_parameters():
        decay = 0.3 if name == "0.weight" else 0.0
        expected = reference.adamw(before[name], gradients[name], 0.1, config.betas, decay)
        np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_left_out_changes_no_bit(value, clip):
    """And what follows is as if it had never been: not a step with zero gradients, which decays."""
    model, optimizer, _ = problem()
    ema, guard = Ema(model, 0.9), Guard(torch.device("cpu"))

    def step(seed, spoil=False):
        give_gradients(model, seed)
        if spoil:
            model[0].weight.grad[1, 2] = value
        _, skipped = guarded_step(optimizer, clip)
        ema.update(100 + seed, skipped)
        guard.count(skipped)

    def everything():
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], ema.average))

    step(0)
    before = everything()
    step(1, spoil=True)
    step(2, spoil=True)
    after = everything()
    assert str(before) == str(after)
    for a, b in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(a, b)
    for number in before[1]:
        for name, tensor in before[1][number].items():
            assert torch.equal(tensor, after[1][number][name])
    assert guard.state() == [2.0, 2.0, 2.0]
    step(3)
    assert guard.state() == [2.0, 0.0, 2.0]
    with_bad = everything()
    model, optimizer, _ = problem()
    ema, guard = Ema(model, 0.9), Guard(torch.device("cpu"))
    step(0)
    step(3)
    for a, b in zip(with_bad[0].values(), everything()[0].values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(with_bad[2].values(), everything()[2].values(), strict=True):
        assert torch.equal(a, b)


def test_clipping_is_torchs():
    ours, optimizer, _ = problem()
    theirs, other, _ = problem()
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    norm, _ = guarded_step(optimizer, 0.5)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    other.step()
    assert norm == expected and norm > 0.5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_bad_loss_poisons_every_gradient_and_a_good_one_none():
    weights = torch.randn(5, requires_grad=True)
    (expected,) = torch.autograd.grad(weights.square().sum(), weights)
    loss = propagate_nonfinite(weights.square().sum())
    assert torch.equal(loss, weights.square().sum())
    assert torch.equal(torch.autograd.grad(loss, weights)[0], expected)
    for bad in (float("nan"), float("inf")):
        (gradient,) = torch.autograd.grad(propagate_nonfinite(weights.sum() + bad), weights)
        assert gradient.isnan().all()


def test_moving_average():
    """Its decay rises: 1/10, 2/11, 3/12, then the 0.26 that is asked for."""
    model, optimizer, _ = problem()
    ema = Ema(model, 0.26)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.26, 0.26)):
        give_gradients(model, step)
        _, skipped = guarded_step(optimizer, 0.0)
        ema.update(step, skipped)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    weights = copy.deepcopy(model.state_dict())
    ema.swap()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    ema.swap()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_a_short_run_does_not_export_its_initial_weights():
    """With 0.9999 from the start they would have a weight of 0.9999^1000 = 0.90."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = Ema(model, 0.9999)
    nn.init.zeros_(model.weight)
    for step in range(1000):
        ema.update(step, torch.zeros(()))
    assert ema.average["weight"].item() < 1e-6
    assert ema.decay_at(10**6) == 0.9999
    once = Ema(nn.Linear(1, 1), 0.5)
    assert [once.decay_at(step) for step in (0, 7, 8, 9)] == [0.1, 8 / 17, 0.5, 0.5]


def test_guard_survives_a_checkpoint():
    guard = Guard(torch.device("cpu"))
    for value in (1.0, 1.0, 0.0, 1.0):
        guard.count(torch.tensor(value))
    assert guard.state() == [3.0, 1.0, 2.0]
    other = Guard(torch.device("cpu"))
    other.load(guard.state())
    other.count(torch.tensor(1.0))
    assert other.state() == [4.0, 2.0, 2.0]


def test_batches_and_lengths():
    assert TrainConfig(batch_size=96, micro_batch_size=8, steps=1).micro_batch(4) == 8
    assert TrainConfig(batch_size=96, micro_batch_size=None, steps=1).micro_batch(4) == 24
    assert TrainConfig(batch_size=16, micro_batch_size=256, steps=1).micro_batch(2) == 8
    with pytest.raises(UserError, match="8 processes x micro_batch_size 4 = 32; .* 96 or 128"):
        TrainConfig(batch_size=100, micro_batch_size=4, steps=1).micro_batch(8)
    assert TrainConfig(epochs=3).total_steps(10) == 30
    assert TrainConfig(epochs=3, steps=20).total_steps(10) == 20
    assert TrainConfig(steps=50, epochs=3).total_steps(10) == 30
    with pytest.raises(UserError, match="train.steps or train.epochs"):
        TrainConfig().check()
