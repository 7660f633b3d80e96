"""Boxes with SAM's noise, clicks, and corrections where the prediction is wrong."""

import numpy as np
import pytest
import torch

from finetune.prompting import correction_clicks, noisy_box
from finetune.prompts import (
    _depths_by_scipy,
    _depths_on_device,
    append_clicks,
    as_box,
    as_clicks,
    depths,
)
from tests.reference import next_click


def test_the_noise_is_sams():
    """Std 10 % of the side, at most 20 px, within the image."""
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [noisy_box(np.array([[300, 400], [400, 440]]), (1024, 1024), 20, rng) for _ in range(4000)]
    )
    moved = drawn - [[300, 400], [400, 440]]
    assert np.abs(moved.mean(0)).max() < 0.6
    assert np.abs(moved).max() <= 20
    assert abs(moved[:, :, 1].std() - 4) < 0.2  # 10 % of 40
    assert 8.5 < moved[:, :, 0].std() < 10  # 10 % of 100, cut at two standard deviations
    wide = np.stack(
        [noisy_box(np.array([[0, 0], [1024, 1024]]), (1024, 1024), 20, rng) for _ in range(500)]
    )
    assert wide.min() >= 0 and wide.max() <= 1024
    thin = np.stack(
        [noisy_box(np.array([[5, 5], [6, 900]]), (1024, 1024), 20, rng) for _ in range(500)]
    )
    assert (thin[:, 0] <= thin[:, 1]).all()


def test_prompts_fill_their_slots():
    points, labels = as_box(np.array([[1.0, 2], [3, 4]]))
    assert points.tolist() == [[1, 2], [3, 4]] + [[-1, -1]] * 4
    assert labels.tolist() == [2, 3, -1, -1, -1, -1]
    points, labels = as_clicks(np.array([[5, 6], [7, 8], [9, 9]]))
    assert labels.tolist() == [1, 1, 1, -1, -1, -1] and points[2].tolist() == [9, 9]


def blots(rng, shape):
    """A random region with some depth."""
    coarse = rng.random((-(-shape[0] // 3), -(-shape[1] // 3))) < rng.uniform(0.2, 0.9)
    region = np.kron(coarse, np.ones((3, 3), bool))[: shape[0], : shape[1]]
    return region ^ (rng.random(shape) < 0.03)


@pytest.mark.parametrize("background", [True, False])
def test_the_deeper_of_missed_and_taken_is_clicked(background):
    """Every object of a batch against a literal loop over all pixels."""
    rng, labels_seen = np.random.default_rng(0), set()
    for _ in range(12):
        shape = (2, 3, *rng.integers(1, 14, 2))
        mask, truth = (np.array([blots(rng, shape[2:]) for _ in range(6)]) for _ in range(2))
        mask, truth = mask.reshape(shape), truth.reshape(shape)
        mask[0, 0] = truth[0, 0]  # nothing is wrong
        inside = np.ones((2, *shape[2:]), bool)
        inside[1, -(shape[2] // 3) - 1 :] = False
        places = torch.from_numpy(rng.random((2, 2, max(shape[2:]))).astype(np.float32))
        points, labels = correction_clicks(
            *map(torch.from_numpy, (mask, truth)), places, background, torch.from_numpy(inside)
        )
        assert points.shape == (2, 3, 1, 2) and labels.shape == (2, 3, 1)
        for b in range(2):
            for k in range(3):
                missed, taken = truth[b, k] & ~mask[b, k], mask[b, k] & ~truth[b, k]
                expected = next_click(missed & inside[b], taken & inside[b] & background)
                labels_seen.add(labels[b, k].item())
                if expected is None:
                    assert labels[b, k].item() == -1 and points[b, k].tolist() == [[-1, -1]]
                    continue
                x, y, label = expected
                assert labels[b, k].item() == label
                assert points[b, k, 0].tolist() == [places[b, 0, x], places[b, 1, y]]
    assert labels_seen == ({-1, 0, 1} if background else {-1, 1})


def test_a_click_is_never_on_the_border_between_a_miss_and_a_false_area():
    """Their union would be a square with its middle there."""
    truth, mask = torch.zeros(2, 1, 1, 11, 11, dtype=torch.bool)
    truth[..., 1:10, 1:6] = True
    mask[..., 1:10, 6:10] = True
    places = torch.arange(11.0).expand(1, 2, -1)
    for background in (True, False):
        points, labels = correction_clicks(mask, truth, places, background)
        assert points.flatten().tolist() == [3, 3] and labels.item() == 1
    mask[..., 1:10, 6:11] = True  # equally deep: what was wrongly taken, as SAM 2 and RITM
    points, labels = correction_clicks(mask, truth, places, True)
    assert points.flatten().tolist() == [8, 3] and labels.item() == 0
    mask[..., 1:10, 6:11] = False  # deeper by far, but only if the border of the image counts
    truth[:] = False
    truth[..., :, :3], truth[..., 3:8, 5:10] = True, True
    points, _ = correction_clicks(mask, truth, places, True)
    assert points.flatten().tolist() == [7, 5]


def test_distances_on_a_device_are_scipys():
    """Squares of distances are whole numbers: no tolerance is needed."""
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 9), (9, 1), (2, 2), (13, 40), (40, 13), (33, 32)):
        regions = torch.from_numpy(np.stack([blots(rng, shape), np.ones(shape, bool)]))
        assert torch.equal(_depths_on_device(regions), _depths_by_scipy(regions)), shape
        assert torch.equal(depths(regions[:, None])[:, 0], _depths_by_scipy(regions))


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
