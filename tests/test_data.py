"""Masks, regions, and the stream of micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from sami.core.dataset import ShardSource, Validation, load_validation
from sami.core.order import sample_rng
from sami.core.reading import read_range
from sami.data import CropTransform, random_region
from sami.masking import STRATEGIES, MaskConfig, count_patches, draw_mask
from tests.runs import opened, write_shards

VIEWS = CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize(
    ("tokens", "ratio", "visible"),
    [
        (196, 0.75, 49),
        (196, 0.5, 98),
        (196, 0.85, 29),
        (196, 0.95, 9),
        (100, 0.9, 10),
        (196, 0, 196),
    ],
)
def test_how_many_stay_visible(tokens, ratio, visible):
    assert count_patches(MaskConfig(ratio=ratio), round(tokens**0.5)) == (visible, tokens - visible)
    views = CropTransform(
        0, 224, None, round(tokens**0.5), MaskConfig(ratio=ratio), (0.2, 1.0), True
    )
    drawn = views.draw(0, "key", (300, 200))
    assert len(drawn.visible) == visible and len(drawn.masked) == tokens - visible
    assert sorted([*drawn.visible, *drawn.masked]) == list(range(tokens))


def test_masks_are_uniform_and_fresh():
    views = CropTransform(0, 224, None, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    seen = np.zeros(196)
    masks, flips = set(), 0
    for epoch in range(2000):
        drawn = views.draw(epoch, "key", (300, 200))
        seen[drawn.visible] += 1
        masks.add(tuple(drawn.visible))
        flips += drawn.flip
    assert len(masks) == 2000
    # binomial(2000, 1/4): mean 500, standard deviation 19.4
    assert np.abs(seen - 500).max() < 5 * 19.4
    assert abs(flips - 1000) < 5 * 22.4


def test_another_strategy_is_a_function(monkeypatch):
    """Half of the patches at the left stay, whatever the image; the order does not matter."""

    def left(config, grid, rng):
        numbers = np.arange(grid * grid)
        inside = numbers % grid < grid // 2
        return rng.permutation(numbers[inside]), rng.permutation(numbers[~inside])

    monkeypatch.setitem(STRATEGIES, "left", left)
    config = MaskConfig("left")
    assert count_patches(config, 4) == (8, 8)
    visible, masked = draw_mask(config, 4, np.random.default_rng(0))
    assert visible.tolist() == [0, 1, 4, 5, 8, 9, 12, 13] == (masked - 2).tolist()
    drawn = CropTransform(0, 64, None, 4, config, (0.2, 1.0), True).draw(0, "a", (30, 20))
    assert drawn.visible.tolist() == visible.tolist()


@pytest.mark.parametrize(
    "strategy",
    [
        lambda config, grid, rng: (np.arange(3), np.arange(4, 16)),  # not all
        lambda config, grid, rng: (np.arange(4), np.arange(3, 16)),  # one twice
        lambda config, grid, rng: np.split(np.arange(16), [rng.integers(1, 15)]),  # not as many
    ],
)
def test_a_strategy_that_cannot_be_stacked_is_found_at_the_start(strategy, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "wrong", strategy)
    with pytest.raises(AssertionError, match="mask.kind wrong has to give each patch once"):
        MaskConfig("wrong").check_grid(4)


def test_a_part_of_the_masked_patches_leaves_the_rest_of_the_draw_alone():
    whole = CropTransform(0, 224, None, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    part = replace(whole, predict_fraction=0.25)
    seen = np.zeros(196)
    for epoch in range(2000):
        every, some = (one.draw(epoch, "key", (300, 200)) for one in (whole, part))
        assert (every.box, every.flip) == (some.box, some.flip)
        assert every.visible.tolist() == some.visible.tolist()
        assert len(some.masked) == 37 and set(some.masked) < set(every.masked)
        assert (np.diff(some.masked) > 0).all()
        seen[some.masked] += 1
    # binomial(2000, 37/196): mean 377.6, standard deviation 17.5
    assert np.abs(seen - 377.6).max() < 5 * 17.5
    assert len(whole.draw_held_out("a", (30, 20)).masked) == 147
    assert len(part.draw_held_out("a", (30, 20)).masked) == 147


def test_a_draw_depends_on_seed_epoch_and_key_alone():
    def drawn(seed=0, epoch=0, key="a"):
        transform = CropTransform(seed, 224, None, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
        one = transform.draw(epoch, key, (300, 200))
        return one.box, one.flip, tuple(one.visible)

    assert drawn() == drawn()
    assert len({drawn(), drawn(seed=1), drawn(epoch=1), drawn(key="b")}) == 4
    fixed = VIEWS.draw_held_out("a", (300, 200))
    assert fixed.box == (50, 0, 250, 200) and not fixed.flip


def test_regions_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    rng = sample_rng(0, 0, "regions")
    image = torch.empty(3, 200, 350)
    ours, theirs = [], []
    for _ in range(4000):
        left, top, right, bottom = random_region(350, 200, (0.2, 1.0), rng)
        assert 0 <= left < right <= 350 and 0 <= top < bottom <= 200
        ours.append((left, top, right - left, bottom - top))
        y, x, h, w = RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3))
        theirs.append((x, y, w, h))
    ours, theirs = np.array(ours, float), np.array(theirs, float)
    for statistic in (np.mean, np.std):
        np.testing.assert_allclose(statistic(ours, 0), statistic(theirs, 0), rtol=0.06)


def shards_of(pattern, folder):
    (source,) = opened(pattern, folder)
    return source.shards


def test_views_and_masks_of_a_batch(tmp_path):
    shards = shards_of(write_shards(tmp_path, (5,)), tmp_path)
    samples = list(read_range(shards, range(5), VIEWS.fields))
    batch = VIEWS.collate([VIEWS.decode(sample, 0, False) for sample in samples])
    assert batch.student.shape == (5, 3, 32, 32) and batch.student.dtype == torch.uint8
    assert batch.teacher_view.shape == (5, 3, 48, 48)
    assert batch.visible.shape == (5, 4) and batch.masked.shape == (5, 12)
    assert batch.student.is_contiguous() or batch.student.stride()[1] == 1
    again, other = (VIEWS.decode(samples[0], 0, replaces) for replaces in (False, True))
    assert np.array_equal(again[1].transpose(2, 0, 1), batch.student[0])
    assert not np.array_equal(other[1], again[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_samples_in_order(tmp_path, workers):
    shards = shards_of(write_shards(tmp_path, (7, 3, 15)), tmp_path)
    source = ShardSource.first(shards, VIEWS.fields, 18)
    dataset = Validation(source, VIEWS.decode_held_out, VIEWS.collate)
    for processes in (1, 2, 3, 7):  # the batches are the same, whoever has them
        batches = []
        for rank in range(processes):
            share = rank, processes
            mine = load_validation(dataset, 4, workers, CPU, share=share)
            batches += [batch.keys for batch, bad in mine if not bad]
        assert [len(keys) for keys in batches] == [4, 4, 4, 4, 2]
        everything = [f"{s.name}/p{n:04d}" for s in shards for n in range(s.count)]
        assert [key for keys in batches for key in keys] == everything[:18]


def test_held_out_samples_that_are_bad(tmp_path):
    """They leave their batch smaller, and one of nothing else out."""
    shards = shards_of(write_shards(tmp_path, (5, 6), corrupt=5), tmp_path)
    source = ShardSource(shards, VIEWS.fields, [0, 1, 3, 4, 5, 6, 10])
    dataset = Validation(source, VIEWS.decode_held_out, VIEWS.collate)
    found = list(load_validation(dataset, 2, 0, CPU))
    assert [batch and batch.keys for batch, _ in found] == [
        None,
        None,
        ["s-001/p0000", "s-001/p0001"],
        ["s-001/p0005"],
    ]
    assert [key for _, bad in found for _, key in bad] == [f"s-000/p000{n}" for n in (0, 1, 3, 4)]
    assert {reason for _, bad in found for reason, _ in bad} == {"damaged image"}


def test_real_photographs(photos, tmp_path):
    shards = shards_of(photos, tmp_path)
    assert [shard.count for shard in shards] == [125] * 8
    views = CropTransform(0, 224, 448, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    source = ShardSource(shards, views.fields, range(120, 150))
    dataset = Validation(source, views.decode_held_out, views.collate)
    found = [batch for batch, _ in load_validation(dataset, 10, 0, CPU)]
    assert sum(len(batch.keys) for batch in found) == 30
    for batch in found:  # both views are of one image: shrunk, the large one is the small one
        small = torch.nn.functional.interpolate(batch.teacher_view.float(), (224, 224), mode="area")
        assert (small - batch.student.float()).abs().mean() < 6


def test_a_share_of_the_masked_patches():
    """The visible ones stay what they are, a quarter of the others is left, each as often."""
    whole = CropTransform(0, 224, None, 14, MaskConfig(ratio=0.75), (0.2, 1.0), True)
    part = replace(whole, predict_fraction=0.25)
    counts = np.zeros(196)
    for number in range(400):
        a, b = (views.draw(0, f"key-{number}", (300, 200)) for views in (whole, part))
        assert a.box == b.box and a.flip == b.flip and np.array_equal(a.visible, b.visible)
        assert len(b.masked) == 37 and set(b.masked) < set(a.masked)
        assert (np.diff(b.masked) > 0).all()
        counts[b.masked] += 1
    expected = 400 * 37 / 196
    assert abs(counts - expected).max() < 5 * expected**0.5
    held_out = part.draw_held_out("key", (300, 200))
    assert len(held_out.masked) == 147
