"""Two processes over gloo, started by accelerate launch."""

import socket
import sys
import time

import pytest
import torch

from tests.runs import ROOT, arguments, numbers, run, start, summary, write_shards


def launch(config: str, script: str, *words: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--main_process_port",
        str(port),
    ]
    return [
        *launcher,
        "--config_file",
        str(ROOT / "configs/accelerate" / config),
        str(ROOT / script),
        *words,
    ]


def test_two_processes_give_the_gradients_of_one(tmp_path):
    pattern = write_shards(tmp_path / "shards", (5, 3))
    results = []
    for config in ("cpu.yaml", "cpu_2.yaml"):
        out = tmp_path / config
        done = run(launch(config, "tests/gradients.py", str(out), pattern), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert one["processes"] == 1 and two["processes"] == 2
    flat = [
        torch.cat([g.double().flatten() for g in result["gradients"].values()])
        for result in results
    ]
    assert all(gradient.norm() > 0 for gradient in one["gradients"].values())
    assert (flat[0] - flat[1]).norm() / flat[0].norm() <= 1e-6


def test_one_ranks_bad_loss_leaves_the_update_out_on_both(tmp_path):
    pattern = write_shards(tmp_path / "shards", (8,))
    words = launch("cpu_2.yaml", "tests/gradients.py", str(tmp_path / "out"), pattern, "spoilt")
    done = run(words, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "out").tolist() == [[1.0, 1.0], [1.0, 1.0]]  # skipped, kept


@pytest.mark.timeout(400)
def test_two_processes_train_stop_and_resume(tmp_path):
    """A stop file stops both ranks at one step; resumed, the run equals an uninterrupted one."""
    pattern = write_shards(tmp_path / "shards", (13, 9, 17), corrupt=1)
    held_out = write_shards(tmp_path / "val", (5,), seed=1)
    options = {"data.workers": 1, "train.steps": 150, "run.save_every": 50, "run.log_every": 5}
    options |= {"data.val_shards": held_out, "eval.every": 0, "optim.ema": 0.9}
    words = [
        launch("cpu_2.yaml", "sami/pretrain.py", *arguments(tmp_path / name, pattern, **options))
        for name in "ab"
    ]
    done = run(words[0])
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "a")["hardware"]["processes"] == 2
    assert summary(tmp_path / "a")["evaluation"]["pictures"] == 5

    process = start(words[1])
    while not (tmp_path / "b" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    (tmp_path / "b" / "stop").touch()
    process.wait(60)
    told = summary(tmp_path / "b")
    assert told["status"] == "interrupted" and told["exit_code"] == 75 and told["steps"] < 150
    done = run(words[1])
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert summary(tmp_path / "a")["bad_samples"] == summary(tmp_path / "b")["bad_samples"]
