"""The page of runs: what is on it, which runs it tells apart, and that it needs no network."""

import base64
import html
import json
import re
import struct
import sys

import pytest
import yaml

from tools.report import main

# The smallest PNG there is.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_run(folder, group="mask", seed=0, **fields):
    """What the report reads of a run."""
    (folder / "pictures").mkdir(parents=True)
    for step in range(100, 1001, 100):
        (folder / "pictures" / f"reconstruction-{step:07}.png").write_bytes(PNG)
    config = {"run": {"dir": str(folder), "seed": seed}, group: fields, "train": {"batch_size": 50}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "status": "finished",
        "steps": 1000,
        "commit": "abc123",
        "data": {"pictures": 1000, "fingerprint": "f00"},
        "hardware": {"processes": 1, "gpu": None, "threads": 2, "precision": "fp32"},
        "versions": {"torch": "9.9"},
        "teacher": {"name": "sam_vit_h", "sha256": "5ec" * 20},
        "bad_samples": {"damaged picture": 3},
        "evaluation": {"r2": 0.123456},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    names = ("loss", "lr", "images_per_second", "data_wait", "val_r2", "loss_dice")
    lines = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_evaluation(folder):
    mean = {"mean": 0.4321, "low": 0.4, "high": 0.5}
    rows = [
        {"prompt": "box", "choice": choice, "miou": {"all": mean}}
        for choice in ("predicted", "oracle")
    ]
    folder.mkdir(parents=True)
    told = {"pictures": 7, "objects": 70, "results": rows}
    (folder / "evaluation.json").write_text(json.dumps(told))
    (folder / "masks.png").write_bytes(PNG)


@pytest.fixture
def report(tmp_path, monkeypatch, in_process):
    def call(*words):
        out = tmp_path / "report.html"
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words), "--out", str(out)])
        code, said = in_process(lambda _: main(), [])
        return code, out.read_text() if code == 0 else said

    return call


def test_several_runs_of_every_kind(report, tmp_path):
    for seed, ratio in ((0, 0.5), (1, 0.75)):
        write_run(tmp_path / f"r{ratio}" / "pretrain", "mask", seed, ratio=ratio)
    write_run(tmp_path / "r0.5" / "finetune", "prompt")
    write_evaluation(tmp_path / "r0.5" / "finetune" / "evaluation")
    write_run(tmp_path / "r0.5" / "classify", "augment")
    write_evaluation(tmp_path / "r0.5" / "evaluate")
    code, page = report(*sorted(tmp_path.glob("r*/*")))
    assert code == 0
    for name in ("r0.5/pretrain", "r0.75/pretrain", "r0.5/finetune", "r0.5/classify"):
        assert f"<summary>{name}</summary>" in page
    # Curves: one picture for each kind, all runs of it over each other.
    words = "loss, r2 on held-out pictures, learning rate, images/s, data wait"
    drawn = page.split(f'alt="{words}" src="data:image/png;base64,')[1].split('"')[0]
    width, height = struct.unpack(">II", base64.b64decode(drawn)[16:24])
    assert width > 1000 and height > 300
    # The pictures by epoch, six of the ten, the first and the last among them.
    found = re.findall(r'alt="r0.75/pretrain, ([^"]+)"', page)
    assert len(found) == 6
    assert (found[0], found[-1]) == ("step 100, epoch 5", "step 1000, epoch 50")
    # Differences of the configurations, and only these.
    table = page.split("the fields that differ")[1].split("</table>")[0]
    assert "<td>mask.ratio</td><td>0.5</td><td>0.75</td>" in table
    assert "<td>run.seed</td><td>0</td><td>1</td>" in table and "run.dir" not in table
    # Evaluations, of a run and by themselves.
    assert page.count("43.2 (40.0-50.0)") == 4 and page.count("7 / 70") == 4
    assert page.count(", evaluated") == 2 and "0.1235" in page
    for words in ("abc123", "torch 9.9", "sam_vit_h 5ec5ec5ec5ec", "3 damaged picture", "f00"):
        assert words in page
    assert not re.search(r'(src|href)="(?!data:)', html.unescape(page)) and "http" not in page


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{}/no"], "no is not the folder of a run"),
        (["{}/run", "{}/run"], "run is named twice"),
        (["{}/run", "--pictures", "-1"], "--pictures -1 must be 0 or more"),
        (["{}/run", "--comparison", "{}/no.json"], "no.json does not exist"),
    ],
)
def test_bad_words(report, tmp_path, words, says):
    write_run(tmp_path / "run")
    code, said = report(*(word.format(tmp_path) for word in words))
    assert code == 2 and says in said and said.count("\n") == 1
