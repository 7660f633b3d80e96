"""Checkpoints are whole or not there; metrics stand once."""

import errno
from collections import namedtuple

import pytest
import torch

from sami.core import checkpoint as module
from sami.core.checkpoint import (
    Damaged,
    list_checkpoints,
    read_meta,
    read_state,
    save_checkpoint,
    write_weights,
)
from sami.core.exits import user_error
from sami.core.metrics import MetricsFile

CPU = torch.device("cpu")


def state(value):
    return {"model": {"weight": torch.full((50, 50), float(value))}, "counts": [1, 2]}


def test_round_trip_and_the_last_few(tmp_path):
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, state(step), {"config": {"a": 1}}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4", "step-10"]
    last = list_checkpoints(tmp_path)[-1]
    assert read_meta(last)["step"] == 10 and read_meta(last)["config"] == {"a": 1}
    assert torch.equal(read_state(last, CPU)["model"]["weight"], torch.full((50, 50), 10.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-4"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "meta"])
def test_damage_is_noticed(tmp_path, damage):
    place = save_checkpoint(tmp_path, 1, state(1), {}, keep=2)
    data = (place / "state.pt").read_bytes()
    if damage == "changed":
        (place / "state.pt").write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    elif damage == "cut":
        (place / "state.pt").write_bytes(data[:-10])
    elif damage == "gone":
        (place / "state.pt").unlink()
    else:
        (place / "meta.json").write_text("{")
    with pytest.raises(Damaged, match="step-1"):
        read_state(place, CPU)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, state(1), {}, keep=1)

    def write_some(content, path):
        path.write_bytes(b"some")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1 vs 0")

    monkeypatch.setattr(module.torch, "save", write_some)
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError) as caught:
        save_checkpoint(tmp_path, 2, state(2), {}, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert "disk is full" in str(user_error(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert read_state(tmp_path / "step-1", CPU)["model"]["weight"][0, 0] == 1


def test_equal_weights_give_equal_files(tmp_path):
    for name in ("a", "b"):
        write_weights(tmp_path / name, {"x": torch.ones(3), "y": torch.zeros(2)}, {"encoder": "{}"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.cut_back(0)
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": step / 3})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    assert [line["step"] for line in metrics.read()] == [1, 2, 3]
    metrics.cut_back(2)
    metrics.append({"step": 3, "loss": 1.0})
    assert metrics.read() == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]
