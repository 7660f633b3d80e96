"""Which sample comes when: dealing out, mixing, shuffling, legs."""

from pathlib import Path

import numpy as np
import pytest

from sami.core.order import Layout, Leg, Order, apportion, sample_rng, shuffled
from sami.core.shards import PICTURE, Shard, Source
from tests import reference
from tests.runs import opened, write_shards


def layouts():
    rng = np.random.default_rng(0)
    for _ in range(60):
        processes, workers, micro = (int(rng.integers(1, high)) for high in (4, 6, 4))
        batch = processes * micro * int(rng.integers(1, 4))
        yield Layout(batch, micro, processes, workers), int(rng.integers(1, 9))


def test_steps_are_dealt_out_without_gap_or_overlap_and_evenly():
    for layout, steps in layouts():
        shares = [
            layout.share(steps, rank, worker)
            for rank in range(layout.processes)
            for worker in range(layout.workers)
        ]
        places = [place for share in shares for place in share]
        assert places == list(range(steps * layout.batch_size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_handed_out_by_a_step_against_a_literal_count():
    """Micro-batches go round the workers; the last few are made of equal parts of all."""
    for layout, steps in layouts():
        size, count = layout.micro_batch_size, steps * layout.micro_batches_per_step
        alone = count // layout.workers * layout.workers
        owners = [n % layout.workers for n in range(alone) for _ in range(size)]
        for worker in range(layout.workers):
            owners += [worker] * len(layout.part(steps, worker))
        assert len(owners) == count * size
        for done in range(steps + 1):
            out = owners[: done * layout.micro_batches_per_step * size]
            for worker in range(layout.workers):
                assert layout.handed_out(steps, done, worker) == out.count(worker)


def test_shuffle_buffer_against_a_plain_list():
    sizes = np.random.default_rng(1).integers(1, 100, 300)
    for limit in (1, 150, 1000, 10**6):
        order = shuffled(sizes, limit, np.random.default_rng(2))
        draws = np.random.default_rng(2).random(len(sizes))
        assert order.tolist() == reference.shuffle_buffer(sizes.tolist(), limit, draws)
        assert sorted(order) == list(range(300))
        held, entered = 0, -1
        for item in order:  # what was read and not yet handed out stays within the bound
            if item > entered:
                held += sizes[entered + 1 : item + 1].sum()
                entered = item
            assert held <= max(limit, sizes.max())
            held -= sizes[item]
    assert shuffled(sizes, 1, np.random.default_rng(2)).tolist() == list(range(300))


def bare(counts, weight=None):
    """A source of shards that are not there."""
    shards = [Shard(f"{n}.tar", str(n), Path("none"), count, "") for n, count in enumerate(counts)]
    return Source(shards, weight)


def order_of(sources, batch=4, **more):
    options = {"fields": (PICTURE,), "batch_size": batch, "seed": 0, "buffer_bytes": 5000} | more
    return Order(sources, **options)


def test_an_epoch_holds_each_place_once_and_leaves_out_less_than_a_batch():
    counts = (7, 1, 12, 0, 5)
    order, seen = order_of([bare(counts)]), []
    assert order.samples == 25 and order.epoch_places == 24
    for epoch in range(20):
        places = order.places(epoch, np.arange(24))
        pairs = set(zip(places.shard.tolist(), places.row.tolist(), strict=True))
        assert len(pairs) == 24 and all(row < counts[shard] for shard, row in pairs)
        breaks = np.flatnonzero(np.diff(places.visit))  # within a visit rows go up one by one
        assert all(
            (np.diff(run) == 1).all() for run in np.split(places.row, breaks + 1) if len(run)
        )
        assert len(breaks) <= len(counts)
        seen.append((places.shard.tolist(), places.row.tolist()))
    left_out = {
        frozenset(zip(*part, strict=True))
        ^ {(s, r) for s, n in enumerate(counts) for r in range(n)}
        for part in seen
    }
    assert len(left_out) > 5
    again = order.places(3, np.arange(24))
    assert (again.shard.tolist(), again.row.tolist()) == seen[3]
    other = order_of([bare(counts)], seed=1).places(3, np.arange(24))
    assert (other.shard.tolist(), other.row.tolist()) != seen[3]
    part = order.places(3, np.arange(5, 9))
    assert part.row.tolist() == seen[3][1][5:9]


def test_weights_are_shares_of_the_samples_evenly_mixed():
    order = order_of([bare((40, 20), 0.75), bare((9, 30), 0.25)])
    assert order.samples == 80  # all of the first; then 20 of the second's 39
    places = order.places(0, np.arange(80))
    second = places.shard >= 2
    assert second.sum() == 20
    assert len(set(zip(places.shard.tolist(), places.row.tolist(), strict=True))) == 80
    for start in range(0, 80, 8):  # every stretch has its share
        assert second[start : start + 8].sum() == 2
    rows = [order.places(epoch, np.arange(80)).row[second].tolist() for epoch in range(3)]
    assert rows[0] != rows[1]
    assert order.places(0, np.arange(30, 50)).row.tolist() == places.row[30:50].tolist()


def test_apportion():
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportion([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = rng.dirichlet(np.ones(4))
        parts = apportion(weights.tolist(), 37)
        assert sum(parts) == 37 and np.abs(np.array(parts) - weights * 37).max() < 1


def test_legs():
    order = order_of([bare((40,))])  # ten steps an epoch
    a, b, c = (Layout(4, 1, 1, workers) for workers in (1, 2, 3))
    assert order.legs(0, [], a) == [Leg(0, a)]
    assert order.legs(3, [Leg(0, a)], a) == [Leg(0, a)]
    assert order.legs(3, [Leg(0, a)], b) == [Leg(0, a), Leg(3, b)]
    assert order.legs(7, [Leg(0, a), Leg(3, b)], c) == [Leg(0, a), Leg(3, b), Leg(7, c)]
    assert order.legs(10, [Leg(0, a), Leg(3, b)], c) == [Leg(10, c)]
    assert order.legs(13, [Leg(0, a), Leg(3, b)], b) == [Leg(10, b)]
    assert order.legs(13, [Leg(0, a), Leg(3, b)], c) == [Leg(10, b), Leg(13, c)]
    assert Leg.from_dict(Leg(3, b).to_dict()) == Leg(3, b)


def handed_out(order, epoch, leg, left, steps, done, first=0):
    """What all readers hand out in steps ``first`` to ``done`` of a leg, one by one."""
    found = []
    for rank in range(leg.layout.processes):
        for worker in range(leg.layout.workers):
            share = leg.layout.share(steps, rank, worker)
            read, out = order.reading(epoch, left[share.start : share.stop], rank, worker)
            begin, end = (leg.layout.handed_out(steps, k, worker) for k in (first, done))
            mine = read[out[begin:end]]
            found += zip(mine.shard.tolist(), mine.row.tolist(), strict=True)
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_another_layout_goes_on_with_what_is_left(tmp_path, weighted):
    patterns = [
        write_shards(tmp_path / name, counts) for name, counts in (("a", (9, 6)), ("b", (11,)))
    ]
    sources = opened({patterns[0]: 1, patterns[1]: 1} if weighted else patterns, tmp_path)
    order = order_of(sources, 4)
    changes = [(0, Layout(4, 2, 1, 1)), (2, Layout(4, 1, 2, 2)), (3, Layout(4, 4, 1, 3))]
    for epoch in (0, 2):
        legs = [Leg(epoch * order.steps_per_epoch + step, layout) for step, layout in changes]
        seen = []
        for number, leg in enumerate(legs):
            left = order.remaining(legs[: number + 1])
            steps = (epoch + 1) * order.steps_per_epoch - leg.first_step
            assert len(left) == steps * 4
            until = legs[number + 1].first_step - leg.first_step if number < 2 else steps
            seen += handed_out(order, epoch, leg, left, steps, until)
        assert len(seen) == len(set(seen)) == order.epoch_places
        everything = order.places(epoch, np.arange(order.epoch_places))
        assert set(seen) == set(
            zip(everything.shard.tolist(), everything.row.tolist(), strict=True)
        )


def test_streams_of_random_numbers_differ():
    draws = {
        tuple(sample_rng(*what).integers(0, 2**32, 4))
        for what in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    assert len(draws) == 4
    assert sample_rng(0, 0, "a").random() == sample_rng(0, 0, "a").random()
