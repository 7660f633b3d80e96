"""Boxes with SAM's noise, clicks, and corrections where the prediction is wrong."""

import numpy as np
import torch

from finetune.prompts import append_clicks, as_box, as_clicks, correction_clicks, noisy_box


def test_the_noise_is_sams():
    """Std 10 % of the side, at most 20 px, within the picture."""
    rng = np.random.default_rng(0)
    drawn = np.stack([noisy_box((300, 400, 400, 440), (1024, 1024), 20, rng) for _ in range(4000)])
    moved = drawn - [[300, 400], [400, 440]]
    assert np.abs(moved.mean(0)).max() < 0.6
    assert np.abs(moved).max() <= 20
    assert abs(moved[:, :, 1].std() - 4) < 0.2  # 10 % of 40
    assert 8.5 < moved[:, :, 0].std() < 10  # 10 % of 100, cut at two standard deviations
    wide = np.stack([noisy_box((0, 0, 1024, 1024), (1024, 1024), 20, rng) for _ in range(500)])
    assert wide.min() >= 0 and wide.max() <= 1024
    thin = np.stack([noisy_box((5, 5, 6, 900), (1024, 1024), 20, rng) for _ in range(500)])
    assert (thin[:, 0] <= thin[:, 1]).all()


def test_prompts_fill_their_slots():
    points, labels = as_box(np.array([[1.0, 2], [3, 4]]))
    assert points.tolist() == [[1, 2], [3, 4]] + [[-1, -1]] * 4
    assert labels.tolist() == [2, 3, -1, -1, -1, -1]
    points, labels = as_clicks(np.array([[5, 6], [7, 8], [9, 9]]))
    assert labels.tolist() == [1, 1, 1, -1, -1, -1] and points[2].tolist() == [9, 9]


def masks():
    truth = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    truth[:, :, 2:6, 2:6] = True
    logits = torch.where(truth, 1.0, -1.0)
    logits[0, 0, 2:4, 2:6] = -1  # missed
    logits[0, 1, 0, :] = 1  # wrongly taken
    logits[1, 2] = -1
    return logits, truth


def test_corrections_fall_uniformly_on_what_is_wrong():
    logits, truth = masks()
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(2, 3, 8, 8)
    for _ in range(2000):
        points, labels = correction_clicks(logits, truth, 32, background=True, generator=generator)
        assert points.shape == (2, 3, 1, 2) and labels.shape == (2, 3, 1)
        for b in range(2):
            for k in range(3):
                x, y = ((points[b, k, 0] + 0.5) / 4 - 0.5).tolist()
                if labels[b, k, 0] >= 0:
                    hits[b, k, round(y), round(x)] += 1
                    assert labels[b, k, 0] == truth[b, k, round(y), round(x)]
    wrong = (logits > 0) != truth
    assert torch.equal(hits > 0, wrong)
    for b, k, count in ((0, 0, 8), (0, 1, 8), (1, 2, 16)):
        expected = 2000 / count
        assert (hits[b, k][wrong[b, k]] - expected).abs().max() < 5 * expected**0.5


def test_without_background_only_what_was_missed_is_clicked():
    logits, truth = masks()
    generator = torch.Generator().manual_seed(0)
    points, labels = correction_clicks(logits, truth, 32, False, generator=generator)
    assert labels.squeeze(2).tolist() == [[1, -1, -1], [-1, -1, 1]]
    assert points[0, 1].tolist() == [[-1, -1]]
    inside = torch.ones(2, 8, 8, dtype=torch.bool)
    inside[0, :4] = False
    _, labels = correction_clicks(logits, truth, 32, False, inside, generator)
    assert labels[0, 0].item() == -1


def test_clicks_go_into_the_first_free_slot():
    points = torch.full((1, 3, 4, 2), -1.0)
    labels = torch.full((1, 3, 4), -1)
    labels[0, 1, :2], labels[0, 2] = torch.tensor([2, 3]), 1
    more, more_labels = torch.full((1, 3, 1, 2), 7.0), torch.tensor([[[1], [1], [1]]])
    points, labels = append_clicks(points, labels, more, more_labels)
    assert labels[0].tolist() == [[1, -1, -1, -1], [2, 3, 1, -1], [1, 1, 1, 1]]
    assert (points[0] == 7).all(-1).tolist() == [
        [True, False, False, False],
        [False, False, True, False],
        [False] * 4,
    ]
