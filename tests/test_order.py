"""Which sample comes when: windows, mixing, and the same batches for any number of readers."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sami.core.dataset import MicroBatches
from sami.core.index import Shard, Source
from sami.core.order import Order, apportion, interleaved, passed, sample_rng
from tests import reference


def bare(counts, weight=None):
    """A source of shards that are not there."""
    shards = [Shard(f"{n}.tar", str(n), Path("none"), count, "") for n, count in enumerate(counts)]
    return Source(shards, weight)


def order_of(sources, batch=4, **more):
    return Order(sources, **{"batch_size": batch, "seed": 0, "window": 2} | more)


def pairs(order, epoch, positions):
    """(shard, row) at each of some positions."""
    shard, row = order.rows(epoch, np.array(positions))
    return list(zip(shard.tolist(), row.tolist(), strict=True))


@st.composite
def orders(draw):
    """An order over one or several sources, and a batch size that it fills."""
    counts = st.lists(st.integers(0, 12), min_size=1, max_size=7)
    sources = draw(st.lists(counts.filter(lambda c: sum(c) >= 3), min_size=1, max_size=3))
    weights = draw(st.lists(st.integers(1, 5), min_size=len(sources), max_size=len(sources)))
    shares = [None] if len(sources) == 1 else [w / sum(weights) for w in weights]
    made = [bare(c, share) for c, share in zip(sources, shares, strict=True)]
    samples = min(int(source.count / (source.weight or 1)) for source in made)
    batch = draw(st.integers(1, max(1, samples // 2)))
    return Order(
        made, batch_size=batch, seed=draw(st.integers(0, 9)), window=draw(st.integers(1, 4))
    )


@given(orders(), st.integers(0, 3))
def test_an_epoch_holds_each_sample_once_and_leaves_out_less_than_a_batch(order, epoch):
    found = pairs(order, epoch, range(order.epoch_positions))
    assert len(set(found)) == len(found) == order.epoch_positions
    assert order.samples - order.epoch_positions < order.batch_size
    for shard, row in found:
        assert 0 <= row < order.shards[shard].count
    weights = [source.weight or 1.0 for source in order.sources]
    of = np.repeat(np.arange(len(order.sources)), [len(s.shards) for s in order.sources])
    drawn = np.bincount(of[[shard for shard, _ in found]], minlength=len(order.sources))
    assert drawn.tolist() == apportion(weights, order.epoch_positions)


@given(orders(), st.data())
def test_any_part_of_an_epoch_is_the_same_part(order, data):
    """Asked for in any order, alone, or of an order that was sent to another process."""
    whole = pairs(order, 1, range(order.epoch_positions))
    some = data.draw(st.lists(st.integers(0, order.epoch_positions - 1), min_size=1, max_size=9))
    again = pickle.loads(pickle.dumps(order))
    for one in (order, again):
        assert pairs(one, 1, some) == [whole[position] for position in some]
        assert pairs(one, 1, some[:1]) == [whole[some[0]]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum), st.data())
def test_what_has_passed_is_what_stands_before(parts, data):
    position = data.draw(st.integers(0, sum(parts) - 1))
    source, _ = interleaved(parts, np.arange(sum(parts)))
    expected = np.bincount(source[:position], minlength=len(parts))
    assert passed(parts, position) == expected.tolist()


@pytest.mark.slow
@settings(max_examples=400)
@given(orders(), st.data())
def test_what_is_wanted_next_is_known(order, data):
    """At each index the windows that it lies in come first, then those that follow them."""
    index = data.draw(st.integers(0, 3 * order.epoch_positions - 1))
    ahead = order.shards_ahead(index)
    assert len(ahead) == len(set(ahead)) <= 2 * order.window * len(order.sources)
    epoch, position = divmod(index, order.epoch_positions)
    shard, _ = order.rows(epoch, np.array([position]))
    assert shard[0] in ahead
    if len(order.sources) == 1:
        # what is read, window after window: an epoch may end before all of them
        last, read = order.epoch_positions - 1, []
        for now in range(epoch, epoch + 2):
            made = order._windows(now, 0)
            read += [
                made.shards[first:end].tolist()
                for first, end, start, stop in zip(
                    made.cuts, made.cuts[1:], made.starts, made.starts[1:], strict=False
                )
                if start < stop and start <= last and (now > epoch or stop > position)
            ]
        assert ahead == list(dict.fromkeys(read[0] + read[1]))


@pytest.mark.parametrize("weights", [(None,), (0.5, 0.5)])
def test_what_a_short_epoch_leaves_out_is_not_wanted(weights):
    """Of shards that are fetched whole, that would be for nothing, in each epoch."""
    sources = [bare((10,) * 20, weight) for weight in weights]
    order = order_of(sources, epoch_samples=24 * len(weights))
    length = order.epoch_positions
    for index in range(3 * length):
        read = {
            shard
            for epoch in range(4)
            for shard, _ in pairs(order, epoch, range(length))
            if epoch in (index // length, index // length + 1)
        }
        assert set(order.shards_ahead(index)) <= read
    begins = {shard for shard, _ in pairs(order, 1, range(length // 3))}
    assert begins <= set(order.shards_ahead(length - 1))


@given(orders(), st.integers(0, 2))
def test_windows_against_a_literal_rule(order, epoch):
    """The shards permuted and divided evenly; what a source gives comes window after window."""
    found = pairs(order, epoch, range(order.epoch_positions))
    first = 0
    for number, source in enumerate(order.sources):
        shards = range(first, first + len(source.shards))
        first += len(source.shards)
        mine = [pair for pair in found if pair[0] in shards]
        rng = sample_rng(order.seed, epoch, f"shards/{number}")
        permuted = rng.permutation(len(shards)) + shards.start
        of = -(-len(shards) // order.window)
        parts = [permuted[len(shards) * k // of : len(shards) * (k + 1) // of] for k in range(of)]
        assert all(len(part) <= order.window for part in parts)
        for k, part in enumerate(parts):
            samples = [(s, row) for s in part.tolist() for row in range(order.shards[s].count)]
            rng = sample_rng(order.seed, epoch, f"window/{number}/{k}")
            expected = [samples[i] for i in rng.permutation(len(samples))]
            assert mine[: len(expected)] == expected[: len(mine)]
            mine = mine[len(expected) :]
        assert not mine


@settings(max_examples=200)
@given(
    orders(),
    st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (4, 1), (3, 2)]),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_each_step_has_the_same_samples_for_any_number_of_processes(order, layout, parts, first):
    """And of micro-batches, and wherever it starts."""
    processes, micro = layout
    batch = processes * micro * parts
    order = Order(order.sources, batch_size=batch, seed=0, window=2)
    if not order.steps_per_epoch:
        return
    ranks = [iter(MicroBatches(batch, micro, rank, processes, first)) for rank in range(processes)]
    for step in range(first, first + 3):
        indices = [next(rank) for rank in ranks for _ in range(parts)]
        assert all(len(part) == micro for part in indices)
        assert sorted(i for part in indices for i in part) == list(
            range(step * batch, (step + 1) * batch)
        )
        # a batch is of one epoch: index i is position i % P of epoch i // P
        assert len({i // order.epoch_positions for part in indices for i in part}) == 1


def test_epochs_and_seeds_differ_and_leave_out_other_samples():
    counts = (7, 1, 12, 0, 5)
    order = order_of([bare(counts)])
    assert order.samples == 25 and order.epoch_positions == 24
    seen = [pairs(order, epoch, range(24)) for epoch in range(20)]
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    assert len({frozenset(everything - set(part)) for part in seen}) > 5
    assert len({tuple(part) for part in seen}) == 20
    assert pairs(order_of([bare(counts)], seed=1), 3, range(24)) != seen[3]
    short = order_of([bare(counts)], epoch_samples=10)
    assert short.samples == 10 and short.steps_per_epoch == 2
    assert len({frozenset(pairs(short, epoch, range(8))) for epoch in range(9)}) == 9


def test_an_epoch_of_weights_is_as_long_as_can_be():
    for weights, counts, samples in (((7, 5), (35, 99), 60), ((9, 5), (9, 99), 14)):
        shares = [weight / sum(weights) for weight in weights]
        sources = [bare((count,), share) for count, share in zip(counts, shares, strict=True)]
        assert order_of(sources, batch=1).samples == samples
        parts = apportion(shares, samples)
        assert all(part <= count for part, count in zip(parts, counts, strict=True))


def test_weights_are_shares_of_the_samples_evenly_mixed():
    order = order_of([bare((40, 20), 0.75), bare((9, 30), 0.25)])
    assert order.samples == 80  # all of the first; then 20 of the second's 39
    shard, row = order.rows(0, np.arange(80))
    second = shard >= 2
    assert second.sum() == 20
    for start in range(0, 80, 8):  # every stretch has its share
        assert second[start : start + 8].sum() == 2
    assert row[second].tolist() != order.rows(1, np.arange(80))[1][second].tolist()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.data())
def test_interleaving_against_a_literal_sort(parts, data):
    expected = reference.interleaved(parts)
    picked = st.lists(st.integers(0, sum(parts) - 1), min_size=1, max_size=5)
    for positions in (range(sum(parts)), data.draw(picked)):
        source, which = interleaved(parts, np.array(positions))
        assert list(zip(source.tolist(), which.tolist(), strict=True)) == [
            expected[position] for position in positions
        ]


def test_apportion():
    assert apportion([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportion([1 / 3, 1 / 3, 1 / 3], 10) == [4, 3, 3]
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = rng.dirichlet(np.ones(4))
        parts = apportion(weights.tolist(), 37)
        assert sum(parts) == 37 and np.abs(np.array(parts) - weights * 37).max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(None,), (0.5, 0.5)])
def test_replacements_are_near_at_first(weights):
    """A function of the position alone: of its window, then of the whole epoch."""
    sources = [bare((6, 5, 9, 4), weight) for weight in weights]
    order = order_of(sources)
    for position in range(order.epoch_positions):
        drawn = order.candidates(2, position, 16)
        found = [next(drawn) for _ in range(200)]
        again = order_of(sources).candidates(2, position, 16)
        assert found == [next(again) for _ in range(200)]
        ((own, _),) = pairs(order, 2, [position])
        near, far = ({shard for shard, _ in part} for part in (found[:16], found[16:]))
        assert len(near | {own}) <= 2 and (own < 4) == (min(near) < 4) == (max(near) < 4)
        assert len(far) == len(order.shards)
        assert all(row < order.shards[shard].count for shard, row in found)
    others = [next(order.candidates(2, position, 16)) for position in range(8)]
    assert len(set(others)) > 1


def test_eleven_million_samples_are_never_all_laid_out():
    """SA-1B: what is held is a permutation of the shards and a few of windows."""
    order = order_of([bare((11_000,) * 1000)], batch=128, window=8)
    assert order.steps_per_epoch == 11_000_000 // 128
    for step in (0, 40_000, order.steps_per_epoch - 1):
        shard, row = order.rows(0, np.arange(128 * step, 128 * (step + 1)))
        assert len(set(zip(shard.tolist(), row.tolist(), strict=True))) == 128
        assert 4 <= len(set(shard.tolist())) <= 16
    held = [order._permuted.cache_info(), order._windows.cache_info()]
    assert all(told.currsize <= told.maxsize <= 16 for told in held)


def test_streams_of_random_numbers_differ():
    draws = {
        tuple(sample_rng(*what).integers(0, 2**32, 4))
        for what in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))
    }
    assert len(draws) == 4
    assert sample_rng(0, 0, "a").random() == sample_rng(0, 0, "a").random()
