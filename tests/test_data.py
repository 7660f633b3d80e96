"""Masks, regions, and the stream of micro-batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from sami.core.errors import UserError
from sami.core.shards import Layout, expand, index_shards, sample_rng
from sami.data import (
    HeldOut,
    TrainStream,
    Views,
    deal,
    draw,
    draw_held_out,
    make_loader,
    random_region,
    visible_count,
)
from tests.runs import write_shards

VIEWS = Views(0, 32, 48, 4, 0.75, (0.2, 1.0), True)
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
    assert visible_count(tokens, ratio) == visible
    views = Views(0, 224, None, round(tokens**0.5), ratio, (0.2, 1.0), True)
    drawn = draw(views, 0, "key", (300, 200))
    assert len(drawn.visible) == visible and len(drawn.masked) == tokens - visible
    assert sorted([*drawn.visible, *drawn.masked]) == list(range(tokens))


def test_masks_are_uniform_and_fresh():
    views = Views(0, 224, None, 14, 0.75, (0.2, 1.0), True)
    seen = np.zeros(196)
    masks, flips = set(), 0
    for epoch in range(2000):
        drawn = draw(views, epoch, "key", (300, 200))
        seen[drawn.visible] += 1
        masks.add(tuple(drawn.visible))
        flips += drawn.flip
    assert len(masks) == 2000
    # binomial(2000, 1/4): mean 500, standard deviation 19.4
    assert np.abs(seen - 500).max() < 5 * 19.4
    assert abs(flips - 1000) < 5 * 22.4


def test_a_draw_depends_on_seed_epoch_and_key_alone():
    def drawn(seed=0, epoch=0, key="a"):
        one = draw(Views(seed, 224, None, 14, 0.75, (0.2, 1.0), True), epoch, key, (300, 200))
        return one.box, one.flip, tuple(one.visible)

    assert drawn() == drawn()
    assert len({drawn(), drawn(seed=1), drawn(epoch=1), drawn(key="b")}) == 4
    fixed = draw_held_out(VIEWS, "a", (300, 200))
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


@pytest.fixture
def index(tmp_path):
    return index_shards(expand(write_shards(tmp_path, (7, 3, 15)), "k"))


def batches(index, layout, count, rank=0, first=0, workers=None):
    dataset = TrainStream(index, VIEWS, layout, rank, first, 8000)
    loader = iter(DataLoader(dataset, None, num_workers=layout.workers if workers is None else 0))
    return [next(loader) for _ in range(count)]


def same(a, b):
    tensors = ("student", "teacher", "visible", "masked")
    return a.keys == b.keys and all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_once_an_epoch_and_alike_wherever_it_is_read(index, processes, workers):
    layout = Layout(25, 8, 2, processes, workers)
    alone = Layout(25, 8, 2, 1, 1)
    expected = {}
    for batch in batches(index, alone, 12, workers=0):
        expected |= {
            key: (s, v) for key, s, v in zip(batch.keys, batch.student, batch.visible, strict=True)
        }
    keys = []
    for rank in range(processes):
        for batch in batches(index, layout, layout.micro_batches_per_epoch, rank):
            keys += batch.keys
            for key, student, visible in zip(batch.keys, batch.student, batch.visible, strict=True):
                if key in expected:
                    assert torch.equal(expected[key][0], student)
                    assert torch.equal(expected[key][1], visible)
    assert len(keys) == len(set(keys)) == 24
    assert len(set(keys) & expected.keys()) >= 23


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_starting_anywhere_equals_having_come_there(index, workers):
    """Within an epoch, at its border, and in later ones."""
    layout = Layout(25, 6, 2, 2, workers)
    for rank in (0, 1):
        whole = batches(index, layout, 17, rank)
        for first in (1, 3, 4, 7, 8, 11, 15):
            rest = batches(index, layout, 17 - first, rank, first)
            assert all(same(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_a_bad_sample_keeps_its_position(tmp_path):
    good = index_shards(expand(write_shards(tmp_path / "good", (8, 6)), "k"))
    spoilt = index_shards(expand(write_shards(tmp_path / "bad", (8, 6), corrupt=3), "k"))
    layout = Layout(14, 2, 2, 1, 1)
    spoilt = [type(s)(s.url, s.name, g.sizes) for s, g in zip(spoilt, good, strict=True)]
    expected, found = (batches(i, layout, 7, workers=0) for i in (good, spoilt))
    order = [key for batch in expected for key in batch.keys]
    reported = [key for batch in found for reason, key in batch.bad]
    assert sorted(reported) == ["s-000/p0000", "s-000/p0001", "s-000/p0002"]
    filled = [key for batch in found for key in batch.keys]
    for place, key in enumerate(order):
        if key not in reported:
            assert filled[place] == key
        else:  # the next good one stands in, in another crop, and still comes itself
            following = [k for k in order[place:] if k not in reported]
            assert not following or filled[place] == following[0]
            assert filled[place] not in reported
    for batch in found:
        assert batch.student.shape == (2, 3, 32, 32)
    for first in range(7):  # the rule is a function of the position
        again = batches(spoilt, layout, 7 - first, first=first, workers=0)
        assert all(same(a, b) for a, b in zip(found[first:], again, strict=True))


def test_nothing_but_bad_samples_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("sami.core.shards.MAX_BAD_IN_A_ROW", 50)
    index = index_shards(expand(write_shards(tmp_path, (6,), corrupt=6), "k"))
    (told,) = batches(index, Layout(6, 2, 2, 1, 1), 1, workers=0)
    assert isinstance(told, UserError) and "50 samples in a row" in str(told)


def test_views_and_masks_of_a_batch(index):
    (batch,) = batches(index, Layout(25, 5, 5, 1, 1), 1, workers=0)
    assert batch.student.shape == (5, 3, 32, 32) and batch.student.dtype == torch.uint8
    assert batch.teacher_view.shape == (5, 3, 48, 48)
    assert batch.visible.shape == (5, 4) and batch.masked.shape == (5, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_held_out_samples_in_order(index, workers):
    parts = [deal(range(20), rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [6, 7, 7]
    keys = []
    for part in parts:
        for batch in make_loader(HeldOut(index, VIEWS, part, 4), workers, CPU):
            keys += batch.keys
    assert keys == [f"{s.name}/p{n:04d}" for s in index for n in range(s.count)][:20]


def test_real_photographs(photos):
    index = index_shards(expand(photos, "k"))
    assert [shard.count for shard in index] == [125] * 8
    views = Views(0, 224, 448, 14, 0.75, (0.2, 1.0), True)
    found = list(HeldOut(index, views, range(120, 150), 10))
    assert sum(len(batch.keys) for batch in found) == 30 and not any(b.bad for b in found)
    for batch in found:  # both views are of one picture: shrunk, the large one is the small one
        small = torch.nn.functional.interpolate(batch.teacher_view.float(), (224, 224), mode="area")
        assert (small - batch.student.float()).abs().mean() < 6
