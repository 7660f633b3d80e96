"""Cached features: stored, read, and cut out for a crop."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sami.core.errors import BadSample
from sami.features import (
    Cache,
    FeatureBatch,
    QuantizedFeatures,
    axis_weights,
    from_bytes,
    pack,
    quantise,
    region_weights,
    to_bytes,
)
from sami.targets import to_grid

CACHE = Cache("custom", "0" * 64, True, "neck", 256, 16, 8, 16, "fp16")


def features(channels=8, side=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, side, side, generator=generator)


def cut(stored, cache, size, box, flip=False, out=7, pool="area"):
    rows, columns = region_weights(cache, size, box, flip, out, pool)
    return FeatureBatch.of([(stored, rows, columns)], cache.grid).tokens()


@pytest.mark.parametrize("pool", ["area", "bilinear"])
@pytest.mark.parametrize("out", [4, 7, 14, 16, 20])
def test_the_whole_image_is_plain_pooling(pool, out):
    """What to_grid makes of the same map, also where the grids do not divide each other."""
    given = features().half().float()
    stored = pack(quantise(given, CACHE, (300, 300)))
    found = cut(stored, CACHE, (300, 300), (0, 0, 300, 300), out=out, pool=pool)
    expected = to_grid(given[None], out, pool)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["area", "bilinear"])
def test_a_crop_on_the_cells_borders_is_that_part_of_the_map(pool):
    """With area; bilinear also looks a little beyond the region, where something is."""
    given = features().half().float()
    stored = pack(quantise(given, CACHE, (256, 256)))
    found = cut(stored, CACHE, (256, 256), (32, 64, 160, 192), out=4, pool=pool)
    expected = to_grid(given[None, :, 4:12, 2:10], 4, pool)
    if pool == "area":
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    else:
        inner = expected.view(4, 4, -1)[1:3, 1:3]
        torch.testing.assert_close(found.view(4, 4, -1)[1:3, 1:3], inner, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", ["area", "bilinear"])
def test_mirrored(pool):
    given = features().half().float()
    stored = pack(quantise(given, CACHE, (256, 256)))
    box, other = (10, 20, 150, 200), (256 - 150, 20, 256 - 10, 200)
    found = cut(stored, CACHE, (256, 256), box, flip=True, pool=pool)
    mirrored = pack(quantise(given.flip(2), CACHE, (256, 256)))
    expected = cut(mirrored, CACHE, (256, 256), other, pool=pool)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_linear_ramp_stays_one():
    """Each output cell of a crop is the ramp at its centre: nothing is moved."""
    y, x = torch.meshgrid(torch.arange(16.0) + 0.5, torch.arange(16.0) + 0.5, indexing="ij")
    cache = dataclasses.replace(CACHE, channels=2)
    stored = QuantizedFeatures(torch.stack([y, x]).half().numpy(), np.ones(2, np.float32))
    box = (70, 61, 215, 187)  # of 256 px: 16 px a cell, well inside
    for pool, within in (("bilinear", 0.1), ("area", 0.1)):
        found = cut(stored, cache, (256, 256), box, out=5, pool=pool).view(5, 5, 2)
        for row in range(5):
            for column in range(5):
                at_y = (61 + (row + 0.5) * 126 / 5) / 16
                at_x = (70 + (column + 0.5) * 145 / 5) / 16
                assert abs(found[row, column, 0] - at_y) < within
                assert abs(found[row, column, 1] - at_x) < within


def test_weights_of_a_line_against_torch():
    for cells in (5, 13, 64):
        line = torch.randn(1, 1, cells, 2).double()  # torch 2.15 errs at a width of 1
        for out in (3, 14, 20):
            ours = torch.from_numpy(axis_weights(0, cells, cells, out, "bilinear")).double()
            theirs = F.interpolate(line, (out, 2), mode="bilinear", antialias=True)
            torch.testing.assert_close(ours @ line[0, 0], theirs[0, 0], atol=1e-6, rtol=1e-6)
            adaptive = F.adaptive_avg_pool2d(line, (out, 2))
            ours = torch.from_numpy(axis_weights(0, cells, cells, out, "area")).double()
            torch.testing.assert_close(ours @ line[0, 0], adaptive[0, 0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pool", ["area", "bilinear"])
def test_every_region_has_weights(pool):
    """Whatever is cropped: rows that sum to 1, nothing outside of what is stored."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(rng.integers(1, 400, 2).tolist())
        left, right = np.sort(rng.integers(0, size[0] + 1, 2))
        top, bottom = np.sort(rng.integers(0, size[1] + 1, 2))
        if left == right or top == bottom:
            continue
        box = (left, top, right, bottom)
        for weights, cells in zip(
            region_weights(CACHE, size, box, False, 14, pool), CACHE.cells(*size), strict=True
        ):
            assert np.allclose(weights.sum(1), 1, atol=1e-5) and (weights >= 0).all()
            assert not weights[:, cells:].any()


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (64, 64), (1000, 3)])
@pytest.mark.parametrize("grid", [16, 8])
def test_stored_and_read_again(dtype, size, grid):
    cache = dataclasses.replace(CACHE, dtype=dtype, grid=grid)
    given = 10 * features()
    stored = pack(quantise(given, cache, size))
    rows, columns = cache.cells(*size)
    assert stored.values.shape == (8, rows, columns)  # without the padding
    again = from_bytes(to_bytes(stored), cache, size)
    assert np.array_equal(again.values, stored.values) and again.values.dtype == stored.values.dtype
    height, width = cache.input_size(*size)
    kept = given[:, : -(-height // 16), : -(-width // 16)]
    if grid == 8:
        kept = F.avg_pool2d(kept[None], 2, ceil_mode=True, count_include_pad=False)[0]
    values = torch.from_numpy(again.values).float() * torch.from_numpy(again.scale)[:, None, None]
    largest = kept.abs().amax((1, 2), keepdim=True)
    assert ((values - kept).abs() <= largest * (0.5 / 127 if dtype == "int8" else 1e-3)).all()


def test_bad_features():
    stored = pack(quantise(features(), CACHE, (256, 256)))
    data = to_bytes(stored)

    def reason(data, cache=CACHE, size=(256, 256)):
        with pytest.raises(BadSample) as caught:
            from_bytes(data, cache, size)
        return str(caught.value)

    for cut_at in (0, 10, len(data) // 2, len(data) - 5):
        assert reason(data[:cut_at]) == "damaged features"
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 1
    assert reason(bytes(flipped)) == "damaged features"  # npz has checksums
    assert reason(data, size=(256, 128)) == "features of another shape"
    assert reason(data, dataclasses.replace(CACHE, dtype="int8")) == "features of another shape"
    holed = stored.values.copy()
    holed[3, 4, 5] = np.nan
    assert reason(to_bytes(QuantizedFeatures(holed, stored.scale))) == "features are not finite"
    scale = np.full(8, np.inf, np.float32)
    assert reason(to_bytes(QuantizedFeatures(stored.values, scale))) == "features are not finite"
    buffer = io.BytesIO()
    np.savez(buffer, values=np.array([{}], object), scale=scale)
    assert reason(buffer.getvalue()) == "damaged features"
    given = features()
    given[0, 0, 0] = torch.nan
    with pytest.raises(BadSample, match="not finite"):
        pack(quantise(given, CACHE, (256, 256)))
    with pytest.raises(BadSample, match="not finite in fp16"):
        pack(quantise(features() * 1e6, CACHE, (256, 256)))


@pytest.mark.parametrize("dtype", ["int8", "fp16"])
@pytest.mark.parametrize("size", [(256, 256), (300, 200), (17, 256)])
def test_bytes_are_those_of_what_is_stored(dtype, size):
    cache = dataclasses.replace(CACHE, dtype=dtype, grid=8)
    stored = pack(quantise(features(), cache, size))
    assert cache.bytes_of(*size) == stored.values.nbytes + stored.scale.nbytes


def test_int8_keeps_each_channels_own_scale():
    """Channels a thousand times apart: each within half a step of its own 127th."""
    given = features() * torch.logspace(-3, 0, 8)[:, None, None]
    cache = dataclasses.replace(CACHE, dtype="int8")
    stored = pack(quantise(given, cache, (256, 256)))
    found = cut(stored, cache, (256, 256), (0, 0, 256, 256), out=16).view(16, 16, 8)
    error = (found.permute(2, 0, 1) - given).abs().amax((1, 2))
    assert (error <= 0.51 * given.abs().amax((1, 2)) / 127).all()
    assert (error > 0).all()
