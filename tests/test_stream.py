"""From shards to micro-batches: exactly once, from anywhere, whatever is bad."""

import numpy as np
import pytest
import torch
import webdataset as wds

from sami.core import shards as shards_module
from sami.core import stream as stream_module
from sami.core.errors import BadSample, UserError
from sami.core.order import Layout, Order
from sami.core.shards import PICTURE, RawSample
from sami.core.stream import Batches, fill_slots
from sami.data import Views
from tests.runs import opened, write_shards

VIEWS = Views(0, 32, 48, 4, 0.75, (0.2, 1.0), True)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Keys:
    """Samples reduced to their keys."""

    fields = (PICTURE,)

    def decode(self, sample, epoch, stand_in):
        if len(sample.part(PICTURE)) < 10:
            raise BadSample("too short")
        return sample.key, epoch, stand_in

    def collate(self, items):
        return items


def order_of(sources, batch, buffer=8000):
    return Order(sources, fields=(PICTURE,), batch_size=batch, seed=0, buffer_bytes=buffer)


def batches(order, layout, first, count, *, rank=0, workers=0, samples=None, legs=()):
    """Micro-batches of a rank from step ``first`` on, ``count`` steps, with what was bad."""
    legs = order.legs(first, legs, layout)
    source = Batches(
        order, samples or Keys(), legs, rank=rank, step=first, workers=workers, device=CPU
    )
    return [next(source) for _ in range(count * layout.micro_batches_per_step)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    return opened(write_shards(folder, (7, 1, 15, 4)), folder)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_exactly_once_in_every_epoch(sources, processes, workers):
    order = order_of(sources, 4)
    layout = Layout(4, 2, processes, max(1, workers))
    everything = {f"{s.name}/p{n:04d}" for s in sources[0].shards for n in range(s.count)}
    ranks = [
        batches(order, layout, 0, 3 * order.steps_per_epoch, rank=rank, workers=workers)
        for rank in range(processes)
    ]
    assert len({len(of_rank) for of_rank in ranks}) == 1  # every rank makes the same steps
    per_epoch, left_out = order.steps_per_epoch * layout.micro_batches_per_step, set()
    for epoch in range(3):
        items = [
            item
            for of_rank in ranks
            for batch, bad in of_rank[epoch * per_epoch : (epoch + 1) * per_epoch]
            for item in batch
        ]
        keys = [key for key, _, _ in items]
        assert {(number, stand_in) for _, number, stand_in in items} == {(epoch, False)}
        assert len(keys) == len(set(keys)) == 24 and set(keys) < everything
        assert len(everything) - len(keys) < 4
        left_out |= {frozenset(everything - set(keys))}
    assert len(left_out) > 1  # others in each epoch


@pytest.mark.parametrize("layout", [Layout(6, 2, 1, 1), Layout(6, 1, 2, 4), Layout(6, 2, 1, 3)])
def test_starting_anywhere_equals_having_come_there(sources, layout):
    """Within an epoch, at its border, in the shared micro-batches at its end, and later."""
    order = order_of(sources, 6)
    assert order.steps_per_epoch == 4
    for rank in range(layout.processes):
        whole = batches(order, layout, 0, 10, rank=rank)
        assert len({tuple(map(str, batch)) for batch, _ in whole}) == len(whole)
        for first in range(10):
            rest = batches(order, layout, first, 10 - first, rank=rank)
            assert rest == whole[first * layout.micro_batches_per_step :]


def test_workers_hand_over_what_this_process_would(sources):
    """Prefetching processes change nothing."""
    order, layout = order_of(sources, 6), Layout(6, 2, 1, 3)
    for first in (0, 3):
        alone = expected_order(order, layout, first, 9)
        assert [batch for batch, _ in batches(order, layout, first, 9, workers=3)] == alone


def expected_order(order, layout, first, count):
    """What workers that are asked in turn give, read one worker after the other."""
    found = []
    for epoch in range(order.epoch(first), order.epoch(first + count) + 1):
        steps, size = order.steps_per_epoch, layout.micro_batch_size
        handed = []
        for worker in range(layout.workers):
            share = layout.share(steps, 0, worker)
            read, out = order.reading(epoch, np.arange(share.start, share.stop), 0, worker)
            handed.append(
                [
                    (f"{order.shards[read.shard[i]].name}/p{read.row[i]:04d}", epoch, False)
                    for i in out
                ]
            )
        rounds = layout.rounds(steps)
        for turn in range(rounds):
            found += [one[turn * size : (turn + 1) * size] for one in handed]
        rest = [item for one in handed for item in one[rounds * size :]]
        found += [rest[start : start + size] for start in range(0, len(rest), size)]
    begin = (first - order.epoch(first) * order.steps_per_epoch) * layout.micro_batches_per_step
    return found[begin : begin + count * layout.micro_batches_per_step]


def test_another_number_of_workers_and_processes_in_the_middle_of_an_epoch(sources):
    order = order_of(sources, 4)
    seen, legs = [], []
    for first, count, layout in (
        (0, 2, Layout(4, 2, 1, 1)),
        (2, 2, Layout(4, 1, 2, 2)),
        (4, 2, Layout(4, 4, 1, 3)),
    ):
        legs = order.legs(first, legs, layout)
        for rank in range(layout.processes):
            for batch, _ in batches(order, layout, first, count, rank=rank, legs=legs):
                seen += [key for key, _, _ in batch]
        position = [
            Batches(order, Keys(), legs, rank=r, step=first, workers=0, device=CPU)
            for r in range(layout.processes)
        ]
        told = [reader for p in position for reader in p.position(first + count)["readers"]]
        assert [reader["position"] for reader in told] and {r["epoch"] for r in told} == (
            {0} if first < 4 else {1}
        )
        if first < 4:
            assert sum(reader["position"] for reader in told) == count * 4
    assert len(seen) == len(set(seen)) == 24


def test_resuming_opens_only_what_is_needed(tmp_path, monkeypatch):
    """Finished shards are not opened again, whatever the step; each open one is opened once."""
    order = order_of(opened(write_shards(tmp_path, (6,) * 10), tmp_path), 3, buffer=6000)
    layout, urls = Layout(3, 3, 1, 2), []
    real = wds.gopen
    monkeypatch.setattr(shards_module.wds, "gopen", lambda url: urls.append(url) or real(url))
    counts = []
    for first in range(20):
        source = Batches(
            order, Keys(), order.legs(first, [], layout), rank=0, step=first, workers=0, device=CPU
        )
        urls.clear()
        next(source)
        counts.append(len(urls))
        assert len(urls) == len(set(urls))
    # The buffer holds two or three pictures: what is open is one shard, two at a border.
    assert max(counts) <= 3 and np.mean(counts[10:]) <= np.mean(counts[:10]) + 0.5


def test_checkpoints_tell_position_and_open_shards(sources):
    order, layout = order_of(sources, 4), Layout(4, 2, 1, 2)
    source = Batches(
        order, Keys(), order.legs(0, [], layout), rank=0, step=0, workers=2, device=CPU
    )
    for step in range(1, 6):
        for _ in range(layout.micro_batches_per_step):
            next(source)
        told = source.position(step)
        assert told["legs"] == [{"first_step": 0, "layout": vars(layout)}]
        assert [r["position"] for r in told["readers"]] == [2 * step, 2 * step]
        assert [r["of"] for r in told["readers"]] == [12, 12]
        for reader in told["readers"]:
            assert set(reader["open"]) <= {shard.name for shard in order.shards}
    assert any(reader["open"] for reader in told["readers"])


def test_fewer_samples_than_readers_have_turns(tmp_path):
    order = order_of(opened(write_shards(tmp_path, (5,)), tmp_path), 4)
    found = batches(order, Layout(4, 4, 1, 8), 0, 3, workers=8)
    assert [len({key for key, _, _ in batch}) for batch, _ in found] == [4, 4, 4]


def test_a_bad_sample_keeps_its_position(tmp_path):
    shards = {}
    for name, corrupt in (("good", 0), ("bad", 3)):
        shards[name] = opened(
            write_shards(tmp_path / name, (8, 6), corrupt=corrupt), tmp_path / name
        )
    layout, found = Layout(2, 2, 1, 1), {}
    for name, sources in shards.items():
        order = order_of(sources, 2, buffer=1)  # the sizes differ: no shuffling
        found[name] = batches(order, layout, 0, 14, samples=VIEWS)
    order = [key for batch, _ in found["good"] for key in batch.keys]
    reported = [key for _, bad in found["bad"][:7] for reason, key in bad]
    assert sorted(reported) == ["s-000/p0000", "s-000/p0001", "s-000/p0002"]
    assert {reason for _, bad in found["bad"] for reason, _ in bad} == {"damaged picture"}
    filled = [key for batch, _ in found["bad"] for key in batch.keys]
    for place, key in enumerate(order[:14]):
        if key not in reported:
            assert filled[place] == key
        else:  # the next good one stands in, in another crop, and still comes itself
            following = [k for k in order[place:] if k not in reported]
            assert filled[place] == following[0]
    for (good, _), (bad, _) in zip(found["good"], found["bad"], strict=True):
        for i, key in enumerate(good.keys):
            if key not in reported:  # a good sample is not changed by bad ones
                assert bad.keys[i] == key and torch.equal(good.student[i], bad.student[i])
                assert torch.equal(good.visible[i], bad.visible[i])
    order = order_of(shards["bad"], 2, buffer=1)
    for first in range(7):  # the rule is a function of the position
        again = batches(order, layout, first, 14 - first, samples=VIEWS)
        for (a, bad_a), (b, bad_b) in zip(found["bad"][first:], again, strict=True):
            assert a.keys == b.keys and bad_a == bad_b and torch.equal(a.student, b.student)


def test_bad_samples_of_shared_micro_batches_are_reported_once(tmp_path):
    """A resumed run does not count again what stands in its checkpoint."""
    sources = opened(write_shards(tmp_path, (9,), corrupt=9), tmp_path)
    good = opened(write_shards(tmp_path / "good", (3,)), tmp_path / "good")
    order, layout = (
        order_of([type(sources[0])(sources[0].shards + good[0].shards)], 2),
        Layout(2, 2, 1, 4),
    )
    whole = batches(order, layout, 0, 12, samples=VIEWS)
    for first in range(12):
        rest = batches(order, layout, first, 12 - first, samples=VIEWS)
        counts = [sum(len(bad) for _, bad in part) for part in (whole[:first], rest, whole)]
        assert counts[0] + counts[1] == counts[2]


def test_nothing_but_bad_samples_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "MAX_BAD_IN_A_ROW", 50)
    order = order_of(opened(write_shards(tmp_path, (6,), corrupt=6), tmp_path), 2)
    with pytest.raises(UserError, match="50 samples in a row"):
        batches(order, Layout(2, 2, 1, 1), 0, 1, samples=VIEWS)


def test_slots_against_a_literal_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        good = rng.random(40) < 0.5
        good[-1] = True
        samples = (
            (n, RawSample(str(n), {} if not ok else {PICTURE: b"x" * 10}))
            for n, ok in enumerate(good)
        )
        told = []
        slots = fill_slots(samples, Keys().decode, lambda *what, told=told: told.append(what[1]))
        for n in range(39):
            later = n + int(np.flatnonzero(good[n:])[0])
            assert next(slots) == (str(later), later, later != n)
        assert told == [str(n) for n in range(39) if not good[n]]


def test_a_killed_worker_ends_with_a_sentence(sources):
    class Deadly(Keys):
        def decode(self, sample, epoch, stand_in):
            import os

            os._exit(9)

    with pytest.raises(UserError, match="a process that reads data was killed"):
        batches(order_of(sources, 4), Layout(4, 2, 1, 1), 0, 1, workers=1, samples=Deadly())
