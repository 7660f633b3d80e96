"""Answers without a model, against painted masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from finetune.evaluation import paint
from finetune.trivial import RADII, discs, fill_boxes, filled_box, grid_of_boxes
from tests.test_evaluation import ends_of


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6), st.floats(0.05, 1))
def test_a_box_and_discs_against_painted_ones(height, width, seed, share):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, height, width)) < share
    masks[:, rng.integers(height), rng.integers(width)] = True
    masks[0, :, rng.integers(width) :] = True  # runs over the foot of a column
    ends = [ends_of(mask) for mask in masks]
    assert all(np.array_equal(paint(e, height, width), m) for e, m in zip(ends, masks, strict=True))
    clicks = rng.integers(0, (width, height), (3, 2, 2))
    boxes, round_ones = filled_box(ends, height, width), discs(ends, height, width, clicks)
    assert boxes.shape == (1, 3) and round_ones.shape == (len(RADII), 3)
    rows, columns = np.mgrid[:height, :width]
    for number, mask in enumerate(masks):
        ys, xs = np.nonzero(mask)
        filled = np.zeros_like(mask)
        filled[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
        assert np.isclose(boxes[0, number], iou(mask, filled))
        x, y = clicks[number].mean(0)
        for radius, found in zip(RADII, round_ones[:, number], strict=True):
            far = (rows - y) ** 2 + (columns - x) ** 2
            disc = far <= radius**2 * height * width
            assert np.isclose(found, iou(mask, disc))


def test_a_disc_is_found_by_its_own_radius():
    rows, columns = np.mgrid[:200, :200]
    disc = (rows - 90) ** 2 + (columns - 110) ** 2 <= (RADII[6] * 200) ** 2
    found = discs([ends_of(disc)], 200, 200, np.array([[[110, 90]]]))
    assert found[:, 0].argmax() == 6 and found[6, 0] == 1


def test_the_grid_of_boxes_favours_no_corner():
    boxes = grid_of_boxes(10, 60, 80)
    assert boxes[0].tolist() == [0, 0, 80, 60]
    assert sorted(boxes[1:].tolist()) == sorted(
        [x, y, x + 40.0, y + 30.0] for x in (0, 20, 40) for y in (0, 15, 30)
    )
    assert len(np.unique(grid_of_boxes(1245, 60, 80), axis=0)) == 1245 == 1 + 9 + 49 + 225 + 961
    many = grid_of_boxes(700, 60, 80)
    assert (many[:, :2] >= 0).all() and (many[:, 2:] <= [80, 60]).all()
    centres = (many[284:, :2] + many[284:, 2:]) / 2
    assert np.abs(centres.mean(0) - [40, 30]).max() < 2
    assert (grid_of_boxes(700, 60, 80) == many).all() and (many[:10] == boxes).all()
    assert len(grid_of_boxes(0, 60, 80)) == 0


# pycocotools under NumPy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_boxes_are_filled():
    boxes = np.array([[3, 4, 10, 9], [0, 0, 80, 60], [5, 5, 5, 9], [2.5, 3.5, 4.5, 8.5]])
    found = [coco_mask.decode(one) for one in fill_boxes(boxes, 60, 80)]
    assert found[0][4:9, 3:10].all() and found[0].sum() == 35
    assert found[1].all() and found[2].sum() == 0
    assert found[3].sum() == 2 * 5
    assert fill_boxes(boxes[:0], 60, 80) == []
