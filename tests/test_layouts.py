"""One run on any number of processes and workers: the same batches, so the same losses."""

import shutil
from functools import partial

import pytest

from finetune.distill import main as distill
from finetune.train import main as finetune
from sami.pretrain import main as pretrain
from tests.runs import arguments, numbers, run, summary, write_shards
from tests.test_distill import arguments as arguments3
from tests.test_processes import launch
from tests.test_toy_shards import draw
from tests.test_train import arguments as arguments2

STEPS, MOVED = 50, 20  # the latter in the middle of an epoch, and between two lines of metrics


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """64 images, eight steps an epoch; two are damaged."""
    return write_shards(tmp_path_factory.mktemp("pictures"), (31, 9, 24), corrupt=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    done = draw(tmp_path_factory.mktemp("scenes"), "--shards", "3", "--images", "34")
    assert done.returncode == 0, done.stderr
    return done.stdout.split(": ")[-1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, "distill"])
def test_the_same_losses_on_any_layout(tmp_path, request, in_process, stage):
    options = {"train.steps": STEPS, "run.save_every": MOVED, "run.keep": 9, "run.log_every": 3}
    options |= {"data.window": 2, "optim.clip": 1}
    if stage == 1:
        entry, main, make = "sami/pretrain.py", pretrain, arguments
        shards, rate = request.getfixturevalue("images"), {"optim.lr": 0.5}
    elif stage == "distill":
        entry, main, make = "finetune/distill.py", distill, partial(arguments3, sam="random")
        shards, rate = request.getfixturevalue("scenes"), {"optim.lr": 1e-3}
        options |= {"encoder.name": "custom", "encoder.width": 32, "decoder.width": 256}
        options |= {"data.image_size": 64, "teacher.image_size": 64, "data.hflip": "true"}
        options |= {"train.epochs": 9}
    else:
        entry, main, make = "finetune/train.py", finetune, arguments2
        shards, rate = request.getfixturevalue("scenes"), {"optim.lr": 1e-2}
        options |= {"prompt.corrections": 1, "data.hflip": "true", "train.epochs": 9}
    options |= rate

    def train(name, processes, workers, micro):
        more = {"data.workers": workers, "train.micro_batch_size": micro}
        words = make(tmp_path / name, shards, **options, **more)
        if processes == 1:
            code, said = in_process(main, words)
            assert code == 0, said
        else:
            done = run(launch("cpu_2.yaml", entry, *words))
            assert done.returncode == 0, done.stderr
        assert summary(tmp_path / name)["hardware"]["processes"] == processes
        return numbers(tmp_path / name)

    def move(name, to):
        """A copy of a run as it stood in the middle of an epoch."""
        shutil.copytree(tmp_path / name, tmp_path / to)
        (tmp_path / to / "summary.json").unlink()
        for checkpoint in (tmp_path / to / "checkpoints").iterdir():
            if checkpoint.name != f"step-{MOVED}":
                shutil.rmtree(checkpoint)
        return to

    curves = {
        "1 x 1": train("1x1", 1, 1, 4),
        "1 x 3": train("1x3", 1, 3, 2),
        "2 x 1": train("2x1", 2, 1, 2),
        "2 x 2": train("2x2", 2, 2, 1),
        "2 x 2, then 1 x 3": train(move("2x2", "a"), 1, 3, 4),
        "1 x 1, then 1 x 0": train(move("1x1", "b"), 1, 0, 1),
    }
    first = curves["1 x 1"]
    assert [line["step"] for line in first] == [*range(3, STEPS, 3), STEPS]
    assert abs(first[-1]["loss"] / first[0]["loss"] - 1) > 0.1  # something was learnt
    for name, lines in curves.items():
        for ours, other in zip(lines, first, strict=True):
            for key in ("loss", "grad_norm") if ours["step"] < MOVED // 2 else ("loss",):
                assert ours[key] == pytest.approx(other[key], rel=1e-5), (name, ours["step"], key)
    bad = [
        summary(tmp_path / name)["bad_samples"] for name in ("1x1", "1x3", "2x1", "2x2", "a", "b")
    ]
    assert all(one == bad[0] for one in bad) and (stage != 1 or bad[0]["damaged image"] >= 12)
