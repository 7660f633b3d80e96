"""The demo's sweep, tiny: a teacher, pretrainings, finetunings, a comparison and its page."""

import json
import re
import subprocess
import sys

import pytest

from finetune.model import load_model
from sami.sweeps import seconds_of
from tests.preloaded import Popen
from tests.runs import ROOT, summary
from tests.test_toy_shards import draw
from tools import report, sweep

STARTS = ["SAMI", "MAE", "random", "random, SAMI's time"]


@pytest.fixture
def chain(monkeypatch, in_process):
    """Run a sweep in this process, and its programs without their start; exit code and stderr."""
    monkeypatch.setattr(subprocess, "Popen", Popen)

    def called(what, out, shards, *more, file="configs/sweeps/init_toy.yaml"):
        small = ["encoder.width=32", "encoder.depth=1", "encoder.heads=1", "data.workers=0"]
        small += ["data.allow_val_in_train=true"]  # one shard is both
        small += ["data.image_size=32", "decoder.width=32", "run.log_every=1"]
        small += [f"data.shards={shards}", f"data.val_shards={shards}"]
        tuned = [*small, "eval.samples=2", "train.steps=3"]
        pretrained = [*small, "decoder.depth=1", "decoder.heads=1", "teacher.image_size=32"]
        pretrained += ["train.steps=10", "train.batch_size=4", "eval.samples=4"]
        told = {"teacher": tuned, "finetune": tuned, "pretrain": pretrained}
        told["evaluate"] = [f"shards={shards}", "masks=2"]
        overrides = [f"{stage}.{word}" for stage, words in told.items() for word in words]
        words = [*what, "--out", str(out), "--seeds", "1", "--set", *overrides, *more]
        return in_process(sweep.main, [words[0], str(ROOT / file), *words[1:]])

    return called


def test_the_chain(chain, tmp_path, monkeypatch, in_process):
    drawn = draw(tmp_path / "scenes", "--shards", "1", "--images", "8")
    shards = drawn.stdout.split(": ")[-1].strip()
    out = tmp_path / "out"
    code, error = chain(["run", "all"], out, shards, "--jobs", "2")
    assert code == 0, error
    code, error = chain(["table"], out, shards)
    assert code == 0, error
    found = json.loads((out / "comparison.json").read_text())
    rows = {row["setting"]: row["measures"] for row in found["rows"]}
    assert list(rows) == ["teacher", *STARTS]
    assert all(
        rows[start][name]["mean"] is not None for start in rows for name in ("box", "3 clicks")
    )
    long, short = rows["random, SAMI's time"], rows["random"]
    assert long["steps"]["mean"] > short["steps"]["mean"] == 3
    pretraining = seconds_of(out / "pretrain")
    finetuning = seconds_of(out / "SAMI_seed-0" / "finetune")
    assert rows["SAMI"]["pretraining, s"]["mean"] == pretraining > 0
    assert rows["SAMI"]["finetuning, s"]["mean"] == finetuning > 0
    assert short["pretraining, s"]["mean"] is None
    pace = seconds_of(out / "random_seed-0" / "finetune") / 3  # of a step of its own kind
    assert long["steps"]["mean"] == round((pretraining + finetuning) / pace)
    runs = ["SAMI_seed-0", "MAE_seed-0", "random_seed-0", "random-SAMI-s-time_seed-0"]
    for run in runs:
        model = load_model(out / run / "finetune")
        assert model.shape.encoder.grid == 4, run  # positions: 32 px in patches of 8
    text = (out / "table.md").read_text()
    differences = re.findall(r"^- (.*), SAMI against (.*): (.*) points, ahead in", text, re.M)
    assert len(differences) == 9  # one seed has no interval
    for measure, other, said in differences:
        difference = rows["SAMI"][measure]["mean"] - rows[other][measure]["mean"]
        assert said == f"{difference:+.1f}"
    assert summary(out / "pretrain")["teacher"]["random"] is False
    assert summary(out / "pretrain_MAE")["teacher"] is None
    assert {path.name for path in out.glob("*/finetune")} == {"finetune"}
    assert len(list(out.glob("teacher*/checkpoints"))) == 1  # once for all

    trained = [out / "teacher", out / "pretrain", out / "pretrain_MAE"]
    trained += [out / run / stage for run in runs for stage in ("finetune", "evaluate")]
    trained += [out / "evaluate_teacher"]
    words = [*trained, "--comparison", out / "comparison.json", "--out", out / "report.html"]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    code, error = in_process(lambda _: report.main(), [])
    assert code == 0, error
    page = (out / "report.html").read_text()
    # 5 curves of stage 1 and 7 of stage 2; drawn by 2 pretrained runs and 5 evaluations
    assert page.count('src="data:image/') == 5 + 7 + 7
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)  # where any four letters turn up
    for text in ("Compared, seed by seed", "Stage 1", "Evaluation", "without a model"):
        assert text in page
    said = re.findall(r"<li>(box, SAMI against random: [^<]*)</li>", page)  # at the top, in full
    assert len(said) == 2 and "no conclusion" in said[0] and "SAMI is" not in page
    # the same command again: nothing is done twice
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(times) > 7
    code, error = chain(["run", "all"], out, shards)
    assert code == 0, error
    assert times == {p: p.stat().st_mtime_ns for p in times}


def test_what_fails_is_said(chain, tmp_path):
    code, error = chain(["run", "all"], tmp_path / "out", str(tmp_path / "nothing-*.tar"))
    assert code == 2 and error.count("\n") == 1
    assert "teacher left with 2" in error
    assert "nothing-*.tar" in error and "logs/teacher.log" in error
    code, error = chain(["run", "all"], tmp_path / "out", "x", file="configs/sweeps/none.yaml")
    assert code == 2 and "none.yaml does not exist" in error
    code, error = chain(["run", "0"], tmp_path / "out", "x", "--settings", "random, SAMI's time")
    assert code == 2 and "there is no setting SAMI with steps of finetune" in error
    code, error = chain(["run", "4"], tmp_path / "out", "x")
    assert code == 2 and "random-SAMI-s-time_seed-0 takes as long as SAMI: first run 1" in error
