"""Class numbers are looked at before the first step; neighbours of one class are noticed."""

import json
import tarfile

import numpy as np
import pytest

from finetune.classify import main as classify
from sami.core.errors import UserError
from sami.core.labels import check_labels, classes_in_a_batch, labels_of, tell_neighbours
from sami.core.order import Order
from sami.core.scanning import BAD_LABEL, NO_LABEL, Members
from tests.runs import opened
from tests.test_classify import words
from tests.test_probe import labelled
from tests.test_shards import write_tar


def shard_of(path, labels):
    """A shard of nothing but names and labels."""
    members = []
    for number, label in enumerate(labels):
        members.append((f"{number:05d}.jpg", b"x" * (100 + number % 7)))
        if label is not None:
            members.append(
                (f"{number:05d}.cls", label if isinstance(label, bytes) else b"%d" % label)
            )
    return str(write_tar(path, members))


def shards(pattern, folder):
    return [shard for source in opened(pattern, folder) for shard in source.shards]


@pytest.mark.parametrize(
    ("stored", "label"),
    [
        (b"7", 7),
        (b" 12\n", 12),
        (b"0", 0),
        (None, NO_LABEL),
        (b"-1", BAD_LABEL),
        (b"cat", BAD_LABEL),
        (b"", BAD_LABEL),
        (b"1.0", BAD_LABEL),
        (b"9" * 30, BAD_LABEL),
        (b"9" * 400, BAD_LABEL),
        (b"\xff\xfe1\0", BAD_LABEL),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_index_knows_the_labels(tmp_path, stored, label, compressed):
    members = [("a.jpg", b"1"), ("b.cls", b"5"), ("b.jpg", b"2"), ("c.cls", b"6")]
    members += [] if stored is None else [("a.cls", stored)]
    path = write_tar(tmp_path / "s.tar", members, "w:gz" if compressed else "w")
    assert labels_of(shards(str(path), tmp_path)).tolist() == [label, 5]
    assert labels_of(shards(str(path), tmp_path)).tolist() == [label, 5]  # as it was stored


def test_an_index_of_before_is_made_anew_where_there_are_labels(tmp_path):
    for name, labels in (("with", [3, 4]), ("without", [None, None])):
        path = shard_of(tmp_path / f"{name}.tar", labels)
        (source,) = opened(path, tmp_path)
        old = vars(Members.load(source.shards[0].index))
        del old["labels"]
        np.savez(source.shards[0].index, **old)
        time = source.shards[0].index.stat().st_mtime_ns
        (again,) = opened(path, tmp_path)
        assert labels_of(again.shards).tolist() == [
            NO_LABEL if label is None else label for label in labels
        ]
        assert again.shards[0].digest == source.shards[0].digest
        assert (again.shards[0].index.stat().st_mtime_ns == time) == (name == "without")


@pytest.mark.parametrize(
    ("labels", "bad", "says"),
    [
        ([0, 1, 2], 0.0, None),
        ([0, 1, 3], 1.0, "s/00002 is of class 3, and data.classes 3 has 0 to 2 (1 of 3"),
        ([1, 2, 3, 3], 1.0, "set --data.classes 4"),
        ([None, None], 1.0, "hold no labelled image"),
        ([0, None, b"-1", 1], 0.5, None),
        ([0, None, b"-1", 1], 0.4, "1 of 4 images have no label (.cls), 1 one that is not"),
        ([0, b"cat", 1, 1], 0.1, "such as s/00001"),
    ],
)
def test_what_is_found_at_the_start(tmp_path, labels, bad, says):
    found = shards(shard_of(tmp_path / "s.tar", labels), tmp_path)
    if says is None:
        check_labels(found, "k", 3, bad)
    else:
        with pytest.raises(UserError) as error:
            check_labels(found, "k", 3, bad)
        assert says in str(error.value)


@pytest.mark.parametrize("which", ["data.shards", "data.val_shards"])
def test_classification_finds_them_before_a_step(tmp_path, in_process, which):
    train = labelled(tmp_path / "train.tar", counts=2 + (which == "data.shards"))
    val = labelled(tmp_path / "val.tar", counts=2 + (which != "data.shards"), seed=1)
    more = {"data.shards": train, "data.val_shards": val, "data.classes": 2}
    code, said = in_process(classify, words(tmp_path / "run", tmp_path, **more))
    assert code == 2 and said.count("\n") == 1
    name = "train" if which == "data.shards" else "val"
    assert f"{which}: {name}/0002 is of class 2, and data.classes 2 has 0 to 1" in said
    assert "set --data.classes 3" in said and not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.parametrize("window", [2, 4, 8])
@pytest.mark.parametrize("sort", [False, True])
def test_neighbours_of_one_class(tmp_path, window, sort):
    """What is said is what the first step has; sorted shards are told from mixed ones."""
    classes = np.arange(4000) // 40  # 100 classes
    if not sort:
        classes = np.random.default_rng(0).permutation(classes)
    for number in range(8):
        shard_of(tmp_path / f"s-{number}.tar", classes[500 * number : 500 * number + 500].tolist())
    sources = opened(str(tmp_path / "s-*.tar"), tmp_path)
    order = Order(sources, batch_size=256, seed=0, window=window)
    found, mixed, samples = classes_in_a_batch(order)
    assert samples == 256 and mixed == pytest.approx(100 * (1 - 0.99**256), rel=0.01)
    labels = [shard.members().labels for shard in order.shards]
    first = [labels[shard][row] for shard, row in zip(*order.rows(0, np.arange(256)), strict=True)]
    assert found == len(set(first))
    most = 12.5 * window  # classes of a window, if it holds whole shards of sorted ones
    assert min(most, mixed) * 0.8 < found <= most + 2 if sort else found > 85
    said = []
    tell_neighbours(order, said.append)
    assert bool(said) == (sort and window < 8)
    assert not said or f"raise --data.window from {window} towards 8" in said[0]


@pytest.mark.parametrize("sort", [False, True])
def test_it_is_said(tmp_path, in_process, sort):
    """Sorted training shards, and sorted held-out ones of which only the first are measured on."""
    for name, seed in (("train", 0), ("val", 1)):
        made = labelled(tmp_path / "mixed.tar", per_class=16, seed=seed)
        with tarfile.open(made) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        if sort:
            members.sort(key=lambda m: (int(m[0][:4]) % 3, m[0]) if m[0][0] == "0" else (3, m[0]))
        write_tar(tmp_path / f"{name}.tar", members)
    run = words(tmp_path / "run", tmp_path, **{"train.steps": 1, "eval.samples": 10})
    assert in_process(classify, run)[0] == 0
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "neighbours in data.shards" not in told  # one window holds all of them
    assert ("eval.samples 10 are the first images" in told) == sort
    assert ("1 classes, of 3 in all" in told) == sort


def test_other_numbers_in_the_two_lists(tmp_path, in_process):
    for name, seed, classes in (("train", 0, ["a", "b", "c"]), ("val", 1, ["b", "c"])):
        (tmp_path / name).mkdir()
        labelled(tmp_path / name / "s.tar", seed=seed)
        (tmp_path / name / "classes.json").write_text(json.dumps(classes))
    more = {"data.shards": tmp_path / "train/s.tar", "data.val_shards": tmp_path / "val/s.tar"}
    code, said = in_process(classify, words(tmp_path / "run", tmp_path, **more))
    assert code == 2 and said.count("\n") == 1
    assert "class 0 is 'b' in data.val_shards" in said and "'a' in data.shards" in said
    assert f"--classes {tmp_path}/train/classes.json" in said
    for names in (["a", "B", "c"], ["a", "b", "c", "d"], ["a", "c", "b"]):
        (tmp_path / "val" / "classes.json").write_text(json.dumps(names))
        code, said = in_process(classify, words(tmp_path / "run", tmp_path, **more))
        assert code == 2 and "in data.val_shards" in said
    (tmp_path / "val" / "classes.json").write_text(json.dumps(["a", "b"]))
    code, said = in_process(
        classify, words(tmp_path / "run", tmp_path, **more, **{"train.steps": 1})
    )
    assert code == 0, said
