"""k-NN and linear probe: right where features tell the classes apart, chance where they do not."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from sami.core.errors import BadSample
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE
from sami.pretrain import main
from sami.probe import knn_accuracy, labelled_squares, linear_accuracy, read_label
from tests.runs import arguments, numbers, opened
from tools.probe import main as probe_tool


def clouds(count, distance, classes=3, width=16, seed=0):
    """Features around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9)) * distance
    return centres[labels] + torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_accuracy])
def test_what_features_tell(accuracy):
    assert accuracy(*clouds(300, 5), *clouds(90, 5, seed=1)) == 100
    assert accuracy(*clouds(300, 0), *clouds(600, 0, seed=1)) == pytest.approx(33, abs=8)


def test_neighbours_against_the_obvious_way():
    (bank, labels), (queries, truth) = clouds(100, 0.5), clouds(50, 0.5, seed=1)
    right = 0
    for query, wanted in zip(queries.numpy(), truth.tolist(), strict=True):
        cosine = bank.numpy() @ query / (np.linalg.norm(bank, axis=1) * np.linalg.norm(query))
        votes = np.zeros(3)
        for at in np.argsort(-cosine)[:20]:
            votes[labels[at]] += np.exp(cosine[at] / 0.07)
        right += votes.argmax() == wanted
    assert knn_accuracy(bank, labels, queries, truth) == 2 * right


def test_the_linear_probe_is_at_its_optimum():
    """A hundred more steps of plain gradient descent do not find a better layer."""
    (bank, labels), (queries, truth) = clouds(200, 0.3), clouds(200, 0.3, seed=1)
    found = linear_accuracy(bank, labels, queries, truth)
    mean, std = bank.mean(0), bank.std(0)
    layer = torch.nn.Linear(16, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0)
    for _ in range(1000):
        loss = torch.nn.functional.cross_entropy(layer((bank - mean) / std), labels)
        loss = loss + 1e-4 * layer.weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    other = (layer((queries - mean) / std).argmax(1) == truth).float().mean().item()
    assert found == pytest.approx(100 * other, abs=1.1)


def labelled(path, counts=3, per_class=8, seed=0):
    """A shard of images whose colour is their class, one without a label, one damaged."""
    rng = np.random.default_rng(seed)
    with wds.TarWriter(str(path)) as writer:
        for number in range(counts * per_class):
            label = number % counts
            pixels = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., label] += 180
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            writer.write({"__key__": f"{number:04d}", "png": stream.getvalue(), "cls": label})
        writer.write({"__key__": "x", "png": stream.getvalue()})
        writer.write({"__key__": "y", "png": b"nothing", "cls": 1})
    return str(path)


def test_labelled_samples(tmp_path):
    (source,) = opened(labelled(tmp_path / "a.tar"), tmp_path)
    batch, _ = labelled_squares(source.shards, np.arange(26), 32).__getitems__(range(26))
    assert batch.images.shape == (24, 3, 32, 32) and batch.labels.tolist() == [0, 1, 2] * 8
    few, _ = labelled_squares(source.shards, np.array([1, 5, 24, 25]), 32).__getitems__(range(4))
    assert few.labels.tolist() == [1, 2]
    for data in (b"cat", b"-1", b""):
        with pytest.raises(BadSample, match="not a class number"):
            read_label(RawSample("k", {IMAGE: b"", "cls": data}))


@pytest.mark.slow
def test_probes_while_pretraining(tmp_path, in_process):
    options = {
        "data.shards": labelled(tmp_path / "train.tar"),
        "data.val_shards": labelled(tmp_path / "val.tar", seed=1),
        "eval.probe": 100,
        "eval.every": 2,
        "train.steps": 4,
    }
    words = [
        *arguments(tmp_path / "run", "", **options),
        "--data.max_bad_fraction=0.5",
    ]
    code, said = in_process(main, words)
    assert code == 0, said
    told = [line for line in numbers(tmp_path / "run") if "val_knn" in line]
    assert [line["step"] for line in told] == [2, 4]
    assert told[-1]["val_knn"] == 100 and told[-1]["val_linear"] > 90  # colour is easy

    # The tool finds the same in the finished encoder.
    words = [tmp_path / "run", "--shards", options["data.shards"], "--val-shards"]
    words += [options["data.val_shards"], "--samples", "100", "--out", tmp_path / "probe.json"]
    assert in_process(probe_tool, list(map(str, words)))[0] == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["knn"], found["linear"]) == (told[-1]["val_knn"], told[-1]["val_linear"])
    assert in_process(probe_tool, [*map(str, words)])[1].count("holds a result already") == 1
    same = [tmp_path / "run", "--shards", options["data.shards"], "--val-shards"]
    same = [*map(str, same), options["data.shards"]]
    code, said = in_process(probe_tool, same)
    assert code == 2 and "1 of the 1 shards of --val-shards are shards of --shards too" in said
    assert in_process(probe_tool, [*same, "--allow-val-in-train"])[0] == 0

    bare = tmp_path / "bare.tar"
    stream = io.BytesIO()
    Image.new("RGB", (40, 40)).save(stream, "PNG")
    with wds.TarWriter(str(bare)) as writer:
        for number in range(16):
            writer.write({"__key__": str(number), "png": stream.getvalue()})
    code, said = in_process(
        main, arguments(tmp_path / "other", "", **options | {"data.shards": bare})
    )
    assert code == 2 and "data.shards hold no labelled image (.cls)" in said
    assert not list(tmp_path.glob("other/checkpoints/*"))  # said at once
    one = arguments(tmp_path / "one", "", **options | {"eval.probe": 1, "train.steps": 2})
    assert in_process(main, one)[0] == 0  # one neighbour, one class
    words = arguments(tmp_path / "run", "", **options)
    code, said = in_process(main, [*words, "--data.val_shards="])
    assert code == 2 and "eval.probe 100 needs data.val_shards" in said
