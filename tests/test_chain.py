"""The whole chain, tiny, and the page that it ends with."""

import json
import re
import subprocess

import pytest

from finetune.model import load_model
from tests.preloaded import Popen
from tests.test_toy_shards import draw
from tools.chain import main


@pytest.fixture
def chain(monkeypatch, in_process):
    """Run the tool in this process, and its programs without their start; exit code and stderr."""
    monkeypatch.setattr(subprocess, "Popen", Popen)

    def called(out, shards, *more):
        small = ["encoder.width=32", "encoder.depth=1", "encoder.heads=1", "data.workers=0"]
        small += ["data.allow_val_in_train=true"]  # one shard is both
        small += ["data.image_size=32", "decoder.width=32", "run.log_every=1"]
        tuned = [*small, "eval.samples=2", "train.steps=3"]
        pretrained = [*small, "decoder.depth=1", "decoder.heads=1", "teacher.image_size=32"]
        pretrained += ["train.steps=10", "train.batch_size=4", "eval.samples=4"]
        words = [str(out), "--train", shards, "--val", shards, "--seeds", "1", "--jobs", "1"]
        words += ["--inits", "random", "mae", "sami", "--val-masks", "2"]
        words += ["--set-teacher", *tuned, "--set-finetune", *tuned, "--set-pretrain", *pretrained]
        return in_process(main, [*words, *more])

    return called


def test_the_chain(chain, tmp_path):
    drawn = draw(tmp_path / "scenes", "--shards", "1", "--pictures", "8")
    shards = drawn.stdout.split(": ")[-1].strip()
    code, error = chain(tmp_path / "out", shards)
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["start"]: row for row in found["rows"]}
    assert list(rows) == ["sami", "mae", "random", "random, SAMI's time"]
    long, short = rows["random, SAMI's time"], rows["random"]
    assert long["steps"] > short["steps"] == 3
    expected = (rows["sami"]["pretraining_seconds"] / short["finetuning_seconds"] + 1) * 3
    assert long["steps"] == round(expected)
    for start in ("sami-0", "mae-0", "random-0", "random_long-0"):
        model = load_model(tmp_path / "out" / start)
        assert model.shape.encoder.grid == 4, start  # positions: 32 px in patches of 8
    for one in found["differences"]:
        a, b = rows["sami"][one["measure"]], rows[one["other"]][one["measure"]]
        assert one["by_seed"] == [a[0] - b[0]] == [one["mean"]]
        assert one["low"] is one["high"] is None  # one seed has no interval
    assert len(found["differences"]) == 9
    summaries = {
        name: json.loads((tmp_path / "out" / name / "summary.json").read_text())
        for name in ("sami", "mae")
    }
    assert summaries["sami"]["teacher"]["random"] is False and summaries["mae"]["teacher"] is None
    page = (tmp_path / "out" / "report.html").read_text()
    # 5 curves of stage 1 and 7 of stage 2; drawn by 2 pretrained and 5 tuned runs
    assert page.count('src="data:image/') == 5 + 7 + 7
    # without the pictures, whose letters may happen to spell it
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r'"data:image/[^"]*"', "", page)
    for text in ("The SAMI-pretrained student", "Stage 1", "Evaluation", "without a model"):
        assert text in page
    said = re.findall(r"<li>(box, against random: [^<]*)</li>", page)  # at the top, and in full
    assert len(said) == 2 and "no conclusion" in said[0] and "SAMI is" not in page
    # the same command again: nothing is done twice
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/model.safetensors")}
    code, error = chain(tmp_path / "out", shards)
    assert code == 0, error
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_what_fails_is_said(chain, tmp_path):
    code, error = chain(tmp_path / "out", str(tmp_path / "nothing-*.tar"))
    assert code == 2 and error.count("\n") == 1
    assert "finetune/train.py for teacher left with 2" in error
    assert "nothing-*.tar" in error and "logs/teacher.log" in error
    code, error = chain(tmp_path / "out", "x", "--config", "none")
    assert code == 2 and "--config none: there is no" in error
