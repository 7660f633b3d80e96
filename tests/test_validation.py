"""The held-out measure against plain arrays."""

import numpy as np
import pytest
import torch
from PIL import Image

from sami.core.images import MEAN, STD
from sami.core.plots import save_png
from sami.pictures import (
    explained,
    figure_of,
    hide,
    pca_basis,
    pca_colours,
    pixels_back,
)
from sami.pretrain import main
from sami.targets import pixel_target
from sami.validation import Sums, tell_unusable
from tests import reference
from tests.runs import arguments, summary, write_shards

CPU = torch.device("cpu")
B, N, C = 7, 9, 5


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(B, N, C, generator=generator) + torch.randn(N, C, generator=generator)
    prediction = target + 0.3 * torch.randn(B, N, C, generator=generator)
    masked = torch.rand(B, N, generator=generator).argsort(1)[:, :6]
    return prediction, target, masked


def sums(prediction, target, masked, kind="mse", pieces=1):
    result = Sums(N, C, CPU)
    for part in zip(*(x.tensor_split(pieces) for x in (prediction, target, masked)), strict=True):
        result.add(*part, kind)
    return result


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_against_arrays(kind):
    prediction, target, masked = example()
    p, t = prediction.double().numpy(), target.double().numpy()
    hidden = np.zeros((B, N), bool)
    for b in range(B):
        hidden[b, masked[b]] = True
    loss = np.array(
        [[reference.token_error(p[b, n], t[b, n], kind) for n in range(N)] for b in range(B)]
    )
    square = ((p - t) ** 2).mean(-1)
    constant = ((t - t.mean(0)) ** 2).mean(-1)  # the best map that is the same for all images
    for pieces in (1, 3):
        found = sums(prediction, target, masked, kind, pieces)
        for tokens, expected in (("all", loss.mean()), ("masked", loss[hidden].mean())):
            assert found.measures(tokens)["loss"] == pytest.approx(expected, rel=1e-5)
        measures = found.measures()
        assert measures["loss_masked"] == pytest.approx(loss[hidden].mean(), rel=1e-5)
        assert measures["loss_visible"] == pytest.approx(loss[~hidden].mean(), rel=1e-5)
        assert measures["r2"] == pytest.approx(1 - square.sum() / constant.sum())
        r2_masked = 1 - square[hidden].sum() / constant[hidden].sum()
        assert measures["r2_masked"] == pytest.approx(r2_masked)
        cosine = [
            [1 - reference.token_error(p[b, n], t[b, n], "cosine") for n in range(N)]
            for b in range(B)
        ]
        assert measures["cosine"] == pytest.approx(np.mean(cosine))
        assert measures["pictures"] == B


def test_the_mean_scores_zero_and_the_truth_one():
    _, target, masked = example()
    mean = target.mean(0, keepdim=True).expand(B, -1, -1)
    assert sums(mean, target, masked).measures()["r2"] == pytest.approx(0, abs=1e-6)
    assert sums(target, target, masked).measures()["r2"] == 1
    overall = target.mean((0, 1)).expand(B, N, -1)  # a coarser constant is worse than the best
    assert sums(overall, target, masked).measures()["r2"] < -0.1


def test_without_a_mask():
    prediction, target, _ = example()
    measures = sums(prediction, target, torch.empty(B, 0, dtype=torch.int64)).measures()
    assert "loss_masked" not in measures and "r2_masked" not in measures


def test_pca_colours_have_one_basis_fitted_on_the_teacher():
    """Along the known axes of a distribution, the colours are its coordinates, rescaled."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(400, 3, generator=generator).double() * torch.tensor([9.0, 4.0, 2.0])
    axes = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0][:, :3]
    features = coordinates @ axes.T + torch.randn(8, generator=generator)
    basis = pca_basis(features)
    assert (basis[1].sum(0) > 0).all()  # of two signs one: the same image is drawn again
    colours = pca_colours(features.view(4, 100, 8), basis).reshape(400, 3)
    for channel in range(3):
        inner = (colours[:, channel] > 0) & (colours[:, channel] < 1)
        assert inner.float().mean() > 0.9
        both = torch.stack([colours[inner, channel].double(), coordinates[inner, channel]])
        assert torch.corrcoef(both)[0, 1].abs() > 0.98
    moved = pca_colours((features + 3 * axes[:, 0]).view(4, 100, 8), basis)
    assert (moved.reshape(400, 3) - colours).abs().max() > 0.05  # a shift shows: no refitting


@pytest.mark.slow
def test_images(tmp_path):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    masked = torch.tensor([[0, 5], [1, 2]])
    hidden = hide(images.float() / 255, masked, 16)
    assert (hidden[0, :, 16:32, 16:32] == 0.5).all()
    assert torch.equal(hidden[0, :, :16, 16:], images[0, :, :16, 16:] / 255)
    scaled = (images / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(
        1, 3, 1, 1
    )
    back = pixels_back(pixel_target(scaled, 16), images / 255, 16)
    torch.testing.assert_close(back, images / 255, rtol=1e-3, atol=1e-3)
    for kind, channels in (("teacher", 256), ("pixels", 768), ("teacher", 2)):
        target = torch.randn(2, 16, channels)
        path = tmp_path / f"{kind}.png"
        told = (images, masked, target, target * 0.5, 16, kind, "runs/x, step 3")
        save_png(figure_of(*told), path)
        with Image.open(path) as drawn:
            assert drawn.format == "PNG" and drawn.width >= 4 * 400 and drawn.height >= 2 * 400
        figure = figure_of(*told)
        plain = images.float() / 255
        if kind == "pixels":
            maps = [pixels_back(x, plain, 16).permute(0, 2, 3, 1) for x in told[2:4]]
        else:
            basis = pca_basis(target.flatten(0, 1))  # the target's own, in both columns
            maps = [pca_colours(tokens, basis) for tokens in told[2:4]]
        columns = [x.permute(0, 2, 3, 1) for x in (plain, hide(plain, masked, 16))] + maps
        for row, image in enumerate(target.double().numpy()):
            true = image[masked[row].numpy()]
            share = 1 - ((true / 2) ** 2).sum() / ((true - true.mean(0)) ** 2).sum()
            titles = [axes.get_title() for axes in figure.axes[4 * row : 4 * row + 4]]
            assert titles[0] == "image" and titles[1] == "what the student sees: 88 %"
            assert titles[2].startswith("target: ")
            assert titles[3].endswith(f": {100 * share:.0f} %") and "reconstruction" in titles[3]
            shown = [axes.get_images()[0].get_array() for axes in figure.axes[4 * row :][:4]]
            for found, expected in zip(shown, columns, strict=True):
                assert np.array_equal(found, expected[row].numpy())
        title, key, below = figure.get_suptitle().split("\n")
        assert title == "runs/x, step 3" and below.endswith("0 is their mean.")
        assert ("Features as colours" in key) == (kind == "teacher")


def test_what_is_explained_of_a_image():
    """1 of the target itself, 0 of the masked tokens' mean; what was visible does not count."""
    target = torch.randn(3, 16, 8)
    masked = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 8, 15]])
    places = masked.unsqueeze(-1).expand(-1, -1, 8)
    constant = target.gather(1, places).mean(1, keepdim=True).expand(-1, 16, -1)
    assert explained(target, constant, masked) == pytest.approx([0] * 3, abs=1e-6)
    right = torch.zeros_like(target).scatter(1, places, target.gather(1, places))
    assert explained(target, right, masked) == pytest.approx([1] * 3)


def test_unusable_images_are_told_with_their_reasons(tmp_path, in_process):
    """Once, and the first of them; the others are measured."""
    shards = write_shards(tmp_path / "train", (9,))
    held_out = write_shards(tmp_path / "val", (7, 4), seed=1, corrupt=1)
    options = {"data.val_shards": held_out, "train.steps": 2, "eval.every": 1}
    code, said = in_process(main, arguments(tmp_path / "run", shards, **options))
    assert code == 0, said
    log = (tmp_path / "run/log.txt").read_text()
    why = "{'damaged image': 1}, the first is s-000/p0000"
    assert log.count(f"1 of 11 held-out images unusable: {why}") == 1
    assert summary(tmp_path / "run")["evaluation"]["pictures"] == 10


def test_unusable_images_of_all_ranks_are_counted(capsys):
    class Ranks:
        gather = staticmethod(lambda mine: [[("b", "s/9")], mine])
        say_once = staticmethod(print)

    tell_unusable(Ranks, [("a", "s/1"), ("b", "s/2")], 5)
    assert capsys.readouterr().out == (
        "3 of 5 held-out images unusable: {'b': 2, 'a': 1}, the first is s/9\n"
    )
