"""Stage 2's losses against formulas worked out by hand, pixel by pixel."""

import math

import pytest
import torch

from finetune.losses import (
    MaskLossConfig,
    MaskTargets,
    dice_loss,
    mask_iou,
    pixel_loss,
    stage2_losses,
)


def example(seed=0, images=3, objects=4, masks=3, side=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, objects, masks, side, side, generator=generator)
    iou = torch.rand(images, objects, masks, generator=generator)
    truth = torch.rand(images, objects, side, side, generator=generator) < 0.4
    there = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    return logits, iou, truth, there


def by_hand(logits, iou, truth, there, kind, inside=None):
    """The definition, in plain Python."""
    images = []
    for b in range(len(logits)):
        objects = []
        for k in range(logits.shape[1]):
            if not there[b, k]:
                continue
            found = []
            for m in range(logits.shape[2]):
                pixel = both = p_sum = t_sum = hit = union = count = 0.0
                for y in range(logits.shape[3]):
                    for x in range(logits.shape[4]):
                        if inside is not None and not inside[b, y, x]:
                            continue
                        z, t = logits[b, k, m, y, x].item(), float(truth[b, k, y, x])
                        p = 1 / (1 + math.exp(-z))
                        right = p if t else 1 - p
                        focal = (0.25 if t else 0.75) * (1 - right) ** 2
                        pixel += -math.log(right) * (focal if kind == "focal" else 1)
                        both, p_sum, t_sum = both + p * t, p_sum + p, t_sum + t
                        hit, union = hit + (z > 0 and t), union + (z > 0 or t > 0)
                        count += 1
                dice = 1 - (2 * both + 1) / (p_sum + t_sum + 1)
                pixel /= count
                weight = 20 if kind == "focal" else 1
                found.append((weight * pixel + dice, pixel, dice, hit / union if union else 1.0))
            best = min(found)
            score = sum((iou[b, k, m].item() - f[3]) ** 2 for m, f in enumerate(found)) / len(found)
            objects.append((best[0] + score, best[1], best[2], score, best[3]))
        images.append([sum(column) / len(objects) for column in zip(*objects, strict=True)])
    return [sum(column) / len(images) for column in zip(*images, strict=True)]


@pytest.mark.parametrize("kind", ["focal", "bce"])
@pytest.mark.parametrize("padded", [False, True])
def test_against_the_definition(kind, padded):
    logits, iou, truth, there = example()
    inside = torch.ones(3, 6, 6, dtype=torch.bool)
    inside[:, :, 4:] = False
    inside[2, 5] = False
    inside = inside if padded else None
    losses = stage2_losses(logits, iou, MaskTargets(truth, there, inside), MaskLossConfig(kind))
    expected = by_hand(logits, iou, truth, there, kind, inside)
    names = ("loss", "loss_pixel", "loss_dice", "loss_iou", "iou")
    for name, value in zip(names, expected, strict=True):
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


def test_only_the_best_mask_and_every_score_are_trained():
    logits, iou, truth, there = example()
    logits.requires_grad_(), iou.requires_grad_()
    stage2_losses(logits, iou, MaskTargets(truth, there), MaskLossConfig("focal"))[
        "loss"
    ].backward()
    trained = (logits.grad.abs().sum((-2, -1)) > 0).sum(2)
    assert torch.equal(trained, there.long())  # one of three where an object is, none elsewhere
    assert torch.equal(iou.grad != 0, there.unsqueeze(2).expand(iou.shape))


def test_the_gradient_is_that_of_the_plain_minimum():
    logits, iou, truth, there = example(1)
    gradients = []
    for plain in (False, True):
        z = logits.clone().requires_grad_()
        if plain:
            wide = truth.unsqueeze(2).expand(z.shape)
            each = 20 * pixel_loss(z, wide, "focal").mean((-2, -1)) + dice_loss(z, wide)
            lowest = torch.where(there, each.min(2).values, 0.0)
            (lowest.sum(1) / there.sum(1)).mean().backward()
        else:
            stage2_losses(z, iou, MaskTargets(truth, there), MaskLossConfig("focal"))[
                "loss"
            ].backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_a_batch_in_pieces_gives_the_same_loss():
    logits, iou, truth, there = example()
    whole = stage2_losses(logits, iou, MaskTargets(truth, there), MaskLossConfig("focal"))["loss"]
    parts = [
        stage2_losses(
            logits[b : b + 1],
            iou[b : b + 1],
            MaskTargets(truth[b : b + 1], there[b : b + 1]),
            MaskLossConfig(),
        )["loss"]
        for b in range(3)
    ]
    torch.testing.assert_close(sum(parts) / 3, whole)


def test_extremes_are_finite():
    truth = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    truth[0, 1] = True
    there = torch.ones(1, 2, dtype=torch.bool)
    for value in (-1e4, 0.0, 1e4):
        logits = torch.full((1, 2, 3, 4, 4), value, requires_grad=True)
        losses = stage2_losses(
            logits, torch.zeros(1, 2, 3), MaskTargets(truth, there), MaskLossConfig("focal")
        )
        losses["loss"].backward()
        assert all(loss.isfinite() for loss in losses.values()) and logits.grad.isfinite().all()
    half = torch.full((1, 2, 3, 4, 4), 30.0, dtype=torch.bfloat16)
    assert stage2_losses(
        half, torch.zeros(1, 2, 3), MaskTargets(truth, there), MaskLossConfig("bce")
    )["loss"].dtype == (torch.float32)
    empty = torch.zeros(4, 4, dtype=torch.bool)
    assert mask_iou(empty, empty) == 1 and mask_iou(~empty, empty) == 0
