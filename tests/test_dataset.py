"""From shards to batches: the same ones on any number of processes, whatever is bad."""

import os
import pickle
import resource
from collections import Counter

import numpy as np
import pytest
import torch

from finetune.classification import AugmentConfig, LabelDataConfig, LabelTransform
from sami.core import dataset as module
from sami.core import reading
from sami.core.dataset import HandsOver, MicroBatches, ShardSource, Training, Validation, load
from sami.core.errors import BadSample, UserError
from sami.core.index import Source
from sami.core.order import Order
from sami.core.scanning import IMAGE
from sami.data import CropTransform
from sami.masking import MaskConfig
from sami.probe import labelled_squares
from tests.runs import opened, write_shards

VIEWS = CropTransform(0, 32, 48, 4, MaskConfig(ratio=0.75), (0.2, 1.0), True)
CPU = torch.device("cpu")
# processes, workers, micro-batch: with a batch of 12
LAYOUTS = [(1, 0, 12), (1, 1, 6), (2, 1, 3), (1, 3, 2), (2, 2, 1), (3, 0, 4)]


class Keys:
    """Samples reduced to their keys."""

    fields = (IMAGE,)

    def decode(self, sample, epoch, replacement):
        if len(sample.part(IMAGE)) < 10:
            raise BadSample("too short")
        return sample.key, epoch, replacement

    def collate(self, items):
        return items


def order_of(sources, batch, window=2, **more):
    return Order(sources, batch_size=batch, seed=0, window=window, **more)


def steps_of(order, first, count, processes=1, workers=0, micro=None, transform=None):
    """What all ranks make of some steps: for each its micro-batches, with what was bad."""
    micro = micro or order.batch_size // processes
    ranks = [
        load(
            Training(order, transform or Keys()),
            MicroBatches(order.batch_size, micro, rank, processes, first),
            workers,
            CPU,
        )
        for rank in range(processes)
    ]
    per_rank = order.batch_size // processes // micro
    return [[next(rank) for rank in ranks for _ in range(per_rank)] for _ in range(count)]


def merged(step):
    """The items of a step and what was bad in it, whoever read it."""
    return [i for items, _ in step for i in items], [b for _, bad in step for b in bad]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    return opened(write_shards(folder, (7, 1, 25, 4, 9)), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_batches_on_any_layout(sources, layout):
    """From the start, and from the middle of an epoch: what a run sees that was moved there."""
    order = order_of(sources, 12)
    assert order.steps_per_epoch == 3
    expected = [merged(step) for step in steps_of(order, 0, 7)]
    for first in (0, 1, 5):
        found = steps_of(order, first, 7 - first, *layout)
        assert [merged(step) for step in found] == expected[first:]


def test_exactly_once_in_every_epoch(sources):
    order, left_out = order_of(sources, 12), set()
    everything = {f"{s.name}/p{n:04d}" for s in sources[0].shards for n in range(s.count)}
    steps = steps_of(order, 0, 9, 2, 1, 3)
    for epoch in range(3):
        items = [i for step in steps[3 * epoch : 3 * epoch + 3] for i in merged(step)[0]]
        keys = [key for key, _, _ in items]
        assert {(number, replaced) for _, number, replaced in items} == {(epoch, False)}
        assert len(keys) == len(set(keys)) == 36 and set(keys) < everything
        left_out |= {frozenset(everything - set(keys))}
    assert len(left_out) > 1  # others in each epoch


def test_fewer_samples_than_workers(tmp_path):
    order = order_of(opened(write_shards(tmp_path, (5,)), tmp_path), 4)
    for step in steps_of(order, 0, 3, 1, 8, 1):
        assert len({key for key, _, _ in merged(step)[0]}) == 4


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    """And few indexes, however many are read by turns."""
    monkeypatch.setattr(reading, "OPEN", 3)
    sources = opened(write_shards(tmp_path, (3,) * 12), tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    order = order_of(sources, 6, window=5)
    training = Training(order, Keys())
    for step in range(order.steps_per_epoch * 2):
        training.__getitems__(range(6 * step, 6 * step + 6))
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 3
        assert len(training.reader._members) <= 5
    del training
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_each_shard_of_a_window_is_opened_once(tmp_path, monkeypatch):
    """Reading goes on where the files are open, also after a start in the middle."""
    order = order_of(opened(write_shards(tmp_path, (6,) * 10), tmp_path), 3)
    opened_paths, real = [], open

    def counted(path, *arguments, **options):
        if str(path).endswith(".tar"):
            opened_paths.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", counted)
    for first in (0, 7):
        opened_paths.clear()
        steps_of(order, first, 20 - first)
        assert max(Counter(opened_paths).values()) == 1


def spoilt(sources, folder):
    """Sources in which some images are damaged, and the same whole: a window, and single ones."""
    shards = {}
    for name, corrupt in (("good", 0), ("bad", 5)):
        pattern = write_shards(folder / name, (6, 6, 8), corrupt=corrupt)
        shards[name] = opened(pattern, folder / name)
    return shards


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_sample_is_replaced_by_its_position_alone(tmp_path, layout):
    """In its own place, counted once in each epoch; the others are not changed by it."""
    shards = spoilt(None, tmp_path)
    found = {name: steps_of(order_of(s, 12), 0, 3, transform=VIEWS) for name, s in shards.items()}
    bad_keys = {f"s-000/p{n:04d}" for n in range(5)}
    replaced = 0
    for good, bad in zip(found["good"], found["bad"], strict=True):
        ((good, none),), ((bad, told),) = good, bad
        assert not none and {reason for reason, _ in told} <= {"damaged image"}
        places = [place for place, key in enumerate(good.keys) if key in bad_keys]
        assert [key for _, key in told] == [good.keys[place] for place in places]
        for place, key in enumerate(good.keys):
            if place in places:
                replaced += 1
                assert bad.keys[place] not in bad_keys
                if bad.keys[place] in good.keys:  # it also comes in its own place, in another crop
                    twin = good.keys.index(bad.keys[place])
                    assert not torch.equal(bad.student[place], good.student[twin])
            else:
                assert bad.keys[place] == key
                assert torch.equal(good.student[place], bad.student[place])
                assert torch.equal(good.visible[place], bad.visible[place])
    assert replaced >= 5
    # Other processes, workers and micro-batches, and a start at any step, replace alike.
    order = order_of(shards["bad"], 12)
    for first in (0, 1, 2):
        again = steps_of(order, first, 3 - first, *layout, transform=VIEWS)
        for parts, ((whole, told),) in zip(again, found["bad"][first:], strict=True):
            assert [key for batch, _ in parts for key in batch.keys] == whole.keys
            assert [b for _, bad in parts for b in bad] == told
            assert torch.equal(torch.cat([batch.student for batch, _ in parts]), whole.student)


def test_a_window_without_a_good_sample_is_left(tmp_path, monkeypatch):
    """All of it bad, the whole epoch is asked; nothing good anywhere ends with a sentence."""
    sources = opened(write_shards(tmp_path, (6, 6), corrupt=6), tmp_path)
    order = order_of(sources, 12, window=1)
    ((items, bad),) = steps_of(order, 0, 1, transform=VIEWS)[0]
    assert len(bad) == 6 and all(key.startswith("s-001/") for key in items.keys)
    monkeypatch.setattr(module, "MAX_BAD_IN_A_ROW", 50)
    nothing = [Source(sources[0].shards[:1])]
    with pytest.raises(UserError, match="50 samples in a row are unusable, the first is s-000/p0"):
        steps_of(order_of(nothing, 2), 0, 1, transform=VIEWS)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_keeps_its_sentence(sources, workers):
    class Refusing(Keys):
        def decode(self, sample, epoch, replacement):
            raise UserError("one sentence")

    with pytest.raises(UserError) as caught:
        steps_of(order_of(sources, 4), 0, 1, workers=workers, transform=Refusing())
    assert str(caught.value) == "one sentence"


def test_a_killed_worker_ends_with_a_sentence(sources):
    class Deadly(Keys):
        def decode(self, sample, epoch, replacement):
            os._exit(9)

    with pytest.raises(UserError, match="a process that reads data was killed"):
        steps_of(order_of(sources, 4), 0, 1, workers=1, transform=Deadly())


def test_what_workers_are_given_can_be_sent_to_them(sources):
    """Where processes are not forked: on macOS, and on Linux from Python 3.14 on."""
    shards, part = sources[0].shards, range(6)
    source = ShardSource.first(shards, VIEWS.fields)
    datasets = [
        Training(order_of(sources, 12), VIEWS),
        Validation(source, VIEWS.decode_held_out, VIEWS.collate),
        labelled_squares(shards, np.arange(46), 32),
        Training(order_of(sources, 12), LabelTransform(LabelDataConfig(), AugmentConfig(), 0)),
    ]
    for number, dataset in enumerate(datasets):
        if number < 2:
            dataset.__getitems__(part)  # with shards open
        again = pickle.loads(pickle.dumps(HandsOver(dataset)))
        if number < 2:
            (ours, _), (theirs, _) = (one.__getitems__(part) for one in (dataset, again))
            assert torch.equal(ours.student, theirs.student) and ours.keys == theirs.keys


@pytest.mark.slow
def test_eight_workers_within_256_files(tmp_path):
    """However many shards are shuffled together."""
    order = order_of(opened(write_shards(tmp_path, (2,) * 150), tmp_path), 100, window=150)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = len(os.listdir("/proc/self/fd"))  # of this test's process; a run's own are some 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (others + 216, limits[1]))
    try:
        steps = steps_of(order, 0, 6, workers=8, transform=VIEWS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for epoch in range(2):
        keys = [key for ((batch, _),) in steps[3 * epoch : 3 * epoch + 3] for key in batch.keys]
        assert len(set(keys)) == 300


def test_samples_of_shards_laid_end_to_end(sources):
    shards = sources[0].shards
    everything = [f"{s.name}/p{n:04d}" for s in shards for n in range(s.count)]
    source = ShardSource.first(shards, (IMAGE,), 100)
    assert len(source) == 46
    assert [s.key for s in source.read(range(46))] == everything
    few = ShardSource(shards, (IMAGE,), np.array([0, 6, 7, 8, 45]))
    assert [s.key for s in few.read([1, 2, 4])] == [everything[n] for n in (6, 7, 45)]
    with pytest.raises(IndexError):
        list(few.read([5]))
