"""A sweep: numbered runs, each once, their states, and a table; nothing of two sweeps mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from finetune.results import ResultsReader
from sami.core.errors import UserError
from sami.core.plots import results_figure
from sami.sweeps import Sweep
from tests.preloaded import Popen
from tests.runs import LIMIT, ROOT, arguments, start, wait_for, write_shards
from tools.sweep import main, make_plot, make_table


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A sweep's programs without their start."""
    monkeypatch.setattr(subprocess, "Popen", Popen)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), counts=(24,))


def sweep(folder, shards, **changes):
    """A sweep file of small pretrainings, two ratios by two seeds."""
    held_out = {"data.val_shards": shards, "data.allow_val_in_train": "true"}
    options = arguments(folder, shards, **{"train.steps": 3, **held_out})
    small = dict(word.removeprefix("--").split("=", 1) for word in options)
    del small["run.dir"]
    (folder / "small.yaml").write_text("encoder: {name: custom}\n")
    content = {
        "out": str(folder / "out"),
        "seeds": [0, 1],
        "stages": {
            "pretrain": {
                "entry": "sami/pretrain.py",
                "config": str(folder / "small.yaml"),
                "set": {name: yaml.safe_load(value) for name, value in small.items()},
            }
        },
        "vary": {"pretrain.mask.ratio": [0.5, 0.75]},
        "measures": {"r2": "pretrain.evaluation.r2", "loss": "pretrain.loss"},
        "paper": {"r2": {"mask.ratio 0.75": 0.9}},
        "paper_on": "ImageNet",
    }
    content.update(changes)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_from_the_file_to_the_table(shards, tmp_path, capsys):
    path = sweep(tmp_path, shards)
    assert main(["list", path]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and "mask.ratio-0.75_seed-1" in listed[3]
    assert "pretrain.mask.ratio=0.5 seed=0" in listed[0]
    assert main(["folder", path, "3"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "mask.ratio-0.75_seed-1")
    for number in (0, 1, 2):
        assert main(["run", path, str(number)]) == 0
    summary = tmp_path / "out" / "mask.ratio-0.5_seed-0" / "pretrain" / "summary.json"
    before = summary.stat().st_mtime_ns
    assert main(["run", path, "0"]) == 0
    assert (
        summary.stat().st_mtime_ns == before and "pretrain is finished" in capsys.readouterr().out
    )
    config = yaml.safe_load((summary.parent / "config.yaml").read_text())
    assert (config["mask"]["ratio"], config["run"]["seed"]) == (0.5, 0)

    assert main(["status", path]) == 0
    said = capsys.readouterr().out
    assert "3 finished, 1 missing" in said and "pretrain has not run" in said
    assert main(["table", path]) == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    r2 = rows[0]["measures"]["r2"]
    told = [
        json.loads(
            (summary.parents[2] / f"mask.ratio-0.5_seed-{seed}/pretrain/summary.json").read_text()
        )["evaluation"]["r2"]
        for seed in (0, 1)
    ]
    assert r2["mean"] == pytest.approx(sum(told) / 2)
    assert r2["std"] == pytest.approx(abs(told[0] - told[1]) / 2**0.5)
    assert rows[1]["measures"]["r2"]["by_seed"] == {
        "0": pytest.approx(rows[1]["measures"]["r2"]["mean"]),
        "1": None,
    }
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| setting | r2 | loss |" in text and "(1 of 2)" in text
    # The paper's number is not that of 24 drawn images.
    said = capsys.readouterr().out
    assert "The paper's numbers are of ImageNet, whole, and these runs were not" in said
    assert rows[1]["measures"]["r2"]["paper"] is None and "paper" not in text
    assert main(["plot", path]) == 0
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_random_start_has_its_rivals_positions(tmp_path):
    """Whatever stage 1's images and patches; told only where it is not the default's 14."""

    def grids(*more, **changes):
        content = yaml.safe_load((ROOT / "configs/sweeps/init.yaml").read_text()) | changes
        content.pop("compare")  # it names one of the settings
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        runs = Sweep(path, tmp_path / "out", list(more))
        return {
            run.setting: [word for word in runs.command(run, "finetune") if "encoder.grid" in word]
            for run in runs.runs
        }

    assert grids() == {"SAMI": [], "MAE": [], "random": []}
    ten = {"SAMI": [], "MAE": [], "random": ["--encoder.grid=10"]}
    assert grids("pretrain.data.image_size=160") == ten
    assert grids("pretrain.encoder.patch_size=8")["random"] == ["--encoder.grid=28"]
    told = grids("pretrain.data.image_size=160", "finetune.encoder.grid=12")
    assert told["random"] == ["--encoder.grid=12"]
    both = grids(vary={"pretrain.data.image_size": [160, 96]})
    assert both["random, data.image_size 96"] == ["--encoder.grid=6"]
    assert both["random, data.image_size 160"] == ["--encoder.grid=10"]
    starts = {"finetune.encoder.checkpoint": ["{pretrain}", None]}
    varied = grids("pretrain.data.image_size=160", vary=starts, settings={})
    assert varied["encoder.checkpoint None"] == ["--encoder.grid=10"]
    alone = {"random": {"pretrain": "skip", "finetune.encoder.checkpoint": None}}
    assert grids("pretrain.data.image_size=160", settings=alone) == {"random": ten["random"]}
    other = {"SAMI": {}, "SAMI, small": {"pretrain.data.image_size": 96}}
    with pytest.raises(UserError, match="finetune.encoder.grid"):
        grids(settings=other | alone)


def evaluated(folder, shards, monkeypatch, data, images, paper_on, seeds=(0, 1, 2)):
    """A sweep of made-up results: an mIoU and a top-1 of two settings with very long names."""
    changes = {"seeds": list(seeds), "vary": {}, "paper_on": paper_on}
    path = Path(sweep(folder, shards, **changes))
    content = yaml.safe_load(path.read_text())
    content["stages"]["evaluate"] = {"entry": "tools/evaluate.py", "words": ["{pretrain}"]}
    settings = [f"{word} with a name that goes on {'and on ' * 9}" for word in ("SAMI", "MAE")]
    content["settings"] = {settings[0]: {}, settings[1]: {"pretrain.mask.ratio": 0.5}}
    content["measures"] = {
        "box": "evaluate.box",
        "1 click": "evaluate.1 click",
        "top-1": "pretrain.evaluation.top1",
        "r2": "pretrain.evaluation.r2",
    }
    content["paper"] = {"box": {settings[0]: 75.7}, "top-1": {settings[0]: 76.8}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    one = Sweep(path, None, [])
    for number, run in enumerate(one.runs):
        one.claim(run)
        for stage in one.stages:
            one.folder(run, stage).mkdir()
        results = [
            {"prompt": prompt, "choice": choice, "miou": {"all": {"mean": value}}}
            for prompt in ("box", "1 click")
            for choice, value in (("predicted", 0.6 + number / 1000), (trivial(prompt), 0.55))
        ]
        told = {"data": data, "results": results}
        (one.folder(run, "evaluate") / "evaluation.json").write_text(json.dumps(told))
        told = {"top1": 70.0 + number, "pictures": images, "r2": 0.5}
        told = {"status": "finished", "evaluation": told}
        (one.folder(run, "pretrain") / "summary.json").write_text(json.dumps(told))
        (one.folder(run, "pretrain") / "config.yaml").write_text("data: {classes: 1000}\n")
    return one, settings


def trivial(prompt):
    return "filled box" if prompt == "box" else "constant disc"


@pytest.mark.parametrize(
    ("data", "images", "paper_on", "shown"),
    [
        ("COCO val2017", 50_000, "COCO val2017", ["box"]),
        ("COCO val2017", 50_000, "ImageNet", ["top-1"]),
        (None, 49_999, "COCO val2017", []),
        (None, 49_999, "ImageNet", []),
        ("COCO val2017", 50_000, None, []),
    ],
)
def test_the_papers_numbers_stand_on_its_own_data(
    shards, tmp_path, monkeypatch, capsys, data, images, paper_on, shown
):
    one, settings = evaluated(tmp_path, shards, monkeypatch, data, images, paper_on)
    monkeypatch.setenv("COLUMNS", "80")
    assert make_table(one) == 0
    said = capsys.readouterr().out
    table = said.split("The paper's")[0].split(str(one.out))[0]
    assert max(map(len, table.splitlines())) <= 80
    text = (one.out / "table.md").read_text()
    for name in ("box", "top-1"):
        assert (f"| {name}, paper, {paper_on} |" in text) == (name in shown)
    assert ("75.7 |" in text) == ("box" in shown) and ("76.8 |" in text) == ("top-1" in shown)
    assert ("left out" in said) == (not shown)
    for whole in ("60.1 ± 0.1", "60.4 ± 0.1", "71 ± 1", "74 ± 1"):
        assert table.count(whole) == text.count(whole) > 0
    # mIoU stands over what scores without a model.
    (row,) = [line for line in text.splitlines() if line.startswith("| without a model |")]
    assert row.count(" 55 |") == 2 and "| box, mIoU in % |" in text and "| top-1, % |" in text
    rows = json.loads((one.out / "table.json").read_text())
    assert rows[0]["measures"]["box"]["trivial"] == pytest.approx(55)
    assert rows[0]["measures"]["r2"]["trivial"] is None


@pytest.mark.slow
def test_the_plot(shards, tmp_path, monkeypatch, capsys):
    """Titles, percent, error bars, what to compare with, a legend, and no magnified noise."""
    one, settings = evaluated(tmp_path, shards, monkeypatch, "COCO val2017", 1, "COCO val2017")
    figure = results_figure(ResultsReader(one).results())
    figure.draw_without_rendering()
    box, click, top, r2 = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        "box, mIoU in %",
        "1 click, mIoU in %",
        "top-1, %",
        "r2",
    ]
    assert "3 seeds" in figure.get_suptitle()
    bars = box.containers[0].lines[2][0].get_segments()
    assert np.allclose(bars[0][:, 1], [60.1 - 0.1, 60.1 + 0.1])  # 60.0, 60.1, 60.2
    for axes in (box, click, top):
        low, high = axes.get_ylim()
        assert high - low >= 5
    assert np.ptp(r2.get_ylim()) >= 0.05
    assert any(line.get_ydata()[0] == pytest.approx(55) for line in click.lines)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert "mean, bars: one standard deviation over seeds" in names
    assert "the paper's, on COCO val2017" in names and "without a model" in names
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert make_plot(one) == 0
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_along_whole_numbers(shards, tmp_path):
    path = sweep(tmp_path, shards, vary={"pretrain.decoder.depth": [1, 2, 4]}, paper={})
    one = Sweep(Path(path), None, [])
    found = ResultsReader(one).results()
    for number, row in enumerate(found.rows):
        row["measures"]["r2"] |= {"by_seed": {0: number, 1: number}, "mean": number, "std": 0.0}
    axes = results_figure(found, "decoder.depth", [1, 2, 4]).axes[0]
    assert axes.get_xlabel() == "decoder.depth"
    assert all(tick % 1 == 0 for tick in axes.xaxis.get_major_locator()())


def test_a_chain_of_stages_and_one_that_is_skipped(shards, tmp_path, capsys):
    """The second stage starts from the folder of the first, where there is one."""
    path = sweep(tmp_path, shards, seeds=[0])
    content = yaml.safe_load(Path(path).read_text())
    second = {"entry": "sami/pretrain.py", "config": content["stages"]["pretrain"]["config"]}
    options = {**content["stages"]["pretrain"]["set"], "encoder.checkpoint": "{pretrain}"}
    content["stages"]["again"] = {**second, "set": options}
    content["stages"]["report"] = {
        "entry": "tools/report.py",
        "words": ["{again}"],
        "set": {"out": "{report}.html"},
    }
    content["vary"] = {}
    content["settings"] = {
        "after": {},
        "random": {"pretrain": "skip", "again.encoder.checkpoint": None},
    }
    content["measures"] = {"loss": "again.loss"}
    content["paper"] = {}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    for number in (0, 1):
        assert main(["run", path, str(number)]) == 0
    after, random = (tmp_path / "out" / f"{name}_seed-0" for name in ("after", "random"))
    told = yaml.safe_load((after / "again" / "config.yaml").read_text())
    assert told["encoder"]["checkpoint"] == str(after / "pretrain")
    assert not (random / "pretrain").exists() and (random / "report.html").exists()
    assert (
        yaml.safe_load((random / "again" / "config.yaml").read_text())["encoder"]["checkpoint"]
        is None
    )
    assert main(["status", path]) == 0
    assert "2 finished" in capsys.readouterr().out


def test_asked_to_stop_it_says_75_and_goes_on(shards, tmp_path, capsys):
    path = sweep(tmp_path, shards)
    words = [sys.executable, str(ROOT / "tools/sweep.py"), "run", path, "0"]
    words += ["--set", "pretrain.train.steps=100000", "--out", str(tmp_path / "long")]
    process = start(words)
    folder = tmp_path / "long" / "mask.ratio-0.5_seed-0" / "pretrain"
    wait_for(lambda: list((folder / "checkpoints").glob("step-*")), process)
    assert main(["status", path, "--out", str(tmp_path / "long")]) == 0
    assert "running" in capsys.readouterr().out
    os.kill(process.pid, signal.SIGUSR1)
    assert process.wait(LIMIT) == 75
    assert main(["status", path, "--out", str(tmp_path / "long")]) == 0
    assert "asked to stop at step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        ({}, ["run", "4"], "has runs 0 to 3, and no 4"),
        ({}, ["run", "-1"], "has runs 0 to 3, and no -1"),
        ({}, ["run"], "run needs the number of a run"),
        ({"vary": {"pretrain.mask.ratioo": [1]}}, ["list"], "pretrain.mask.ratioo is no field of"),
        ({"vary": {"mask.ratio": [1]}}, ["list"], "mask.ratio does not begin with a stage"),
        ({"seeds": [0, 0]}, ["list"], "two runs have the name mask.ratio-0.5_seed-0"),
        ({"vary": {"pretrain.mask.ratio": [0.5, 0.5]}}, ["list"], "two settings have the name"),
        ({"stagess": {}}, ["list"], "stagess is none of"),
        ({"measures": {"r2": "evaluation.r2"}}, ["list"], "measures: evaluation.r2 does not begin"),
        ({}, ["table"], "holds no results yet"),
        ({"seeds": []}, ["list"], "has no seeds"),
        ({"stages": {"pretrain": {"entry": "sami/no.py"}}}, ["list"], "there is no sami/no.py"),
        ({"vary": {"pretrain.mask.ratio": 0.5}}, ["list"], "vary is not what it should be"),
        ({"settings": {"a": 1}}, ["list"], "settings is not what it should be"),
        ({"settings": {"a": {"pretrain": "Skip"}}}, ["list"], "pretrain can only be skip"),
        ({"paper": ["r2"]}, ["table"], "paper is not what it should be"),
        ({"paper_on": "COCO"}, ["table"], "paper_on COCO is none of ImageNet, COCO val2017, LVIS"),
        ({}, ["list", "--set", "pretrain.mask.ratio=0.3"], "is what the sweep varies"),
        ({"settings": {"a": {"pretrain.mask.ratio": 1}}}, ["list"], "mask.ratio is varied too"),
        ({}, ["run", "0", "--set", "pretrain.train.steps=abc"], "train.steps must be an integer"),
        ({}, ["run", "0", "--set", "pretrain.mask.ratio_=1"], "is not a known option"),
        ({"out": 3}, ["list"], "out is not what it should be"),
        ({"seeds": [[0]]}, ["table"], "seeds is not what it should be"),
        ({"stages": {"pretrain": {"entry": ["a"]}}}, ["list"], "stages.pretrain is not what"),
        ({"stages": {"pretrain": {"entri": "a"}}}, ["list"], "entri"),
        ({}, ["list", "--set", "pretrain=skip"], "must be STAGE.GROUP.FIELD=VALUE"),
        ({}, ["list", "--set", "nonsense"], "--set nonsense must be"),
    ],
)
def test_bad_sweeps(shards, tmp_path, in_process, changes, words, says):
    path = sweep(tmp_path, shards, **changes)
    code, said = in_process(main, [words[0], path, *words[1:]])
    assert code == 2 and says in said and said.count("\n") == 1


def test_what_failed_says_why(shards, tmp_path, capsys, in_process):
    """A run before it has a folder, and a program that has none of its own."""
    path = sweep(tmp_path, shards, vary={"pretrain.mask.ratio": [2, 0.5]}, seeds=[0])
    content = yaml.safe_load(Path(path).read_text())
    content["stages"]["judge"] = {"entry": "tools/evaluate.py", "words": ["{pretrain}/{0..1}"]}
    content["stages"]["judge"]["set"] = {"shards": "*.tar"}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "out" / "mask.ratio-0.5_seed-0" / "slurm").mkdir(parents=True)
    assert main(["status", path]) == 0 and "2 missing" in capsys.readouterr().out
    assert [in_process(main, ["run", path, number])[0] for number in "01"] == [2, 2]
    capsys.readouterr()
    assert main(["status", path]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert "missing" in first  # refused before anything was begun
    assert "failed" in second and "judge: " in second and "pretrain/{0..1} does not" in second
    assert last == "1 missing, 1 failed"


def test_a_first_attempt_that_trained_nothing_binds_nobody(shards, tmp_path, in_process):
    path = sweep(tmp_path, shards, seeds=[0])
    words = ["run", path, "0", "--set"]
    code, said = in_process(main, [*words, "pretrain.data.shards=nowhere/*.tar"])
    assert code == 2 and "nowhere" in said
    # Another attempt is checked as the first one was, and looking changes nothing.
    code, said = in_process(main, [*words, "pretrain.train.steps=abc"])
    assert code == 2 and "train.steps must be an integer" in said
    stored = (tmp_path / "out" / "sweep.json").read_text()
    assert in_process(main, ["table", path, "--set", "pretrain.train.steps=2"])[0] == 2
    assert (tmp_path / "out" / "sweep.json").read_text() == stored
    assert in_process(main, [*words, "pretrain.train.steps=2"])[0] == 0
    # What is finished binds, also when its checkpoints were thrown away.
    shutil.rmtree(next((tmp_path / "out").glob("*/pretrain/checkpoints")))
    code, said = in_process(main, [*words, "pretrain.train.steps=3"])
    assert code == 2 and "pretrain.set.train.steps 2 there, pretrain.set.train.steps 3" in said


def test_two_settings_of_one_name(shards, tmp_path, in_process):
    path = sweep(tmp_path, shards, vary={})
    text = "settings:\n  a: {pretrain.mask.ratio: 0.5}\n  a: {pretrain.mask.ratio: 0.7}\n"
    Path(path).write_text(Path(path).read_text() + text)
    code, said = in_process(main, ["list", path])
    assert code == 2 and "'a' stands twice in the map" in said and said.count("\n") == 1


def test_measures_that_nothing_has_and_folders_that_are_none(shards, tmp_path, in_process):
    path = sweep(tmp_path, shards, seeds=[0], measures={"r2": "pretrain.evaluation.r22"})
    assert in_process(main, ["run", path, "0"])[0] == 0
    code, said = in_process(main, ["table", path])
    assert code == 0 and "is finished and has no evaluation.r22" in said
    (tmp_path / "else" / "checkpoints").mkdir(parents=True)
    code, said = in_process(main, ["status", path, "--out", str(tmp_path / "else")])
    assert code == 2 and "holds no results yet" in said


def test_many_begin_at_once(shards, tmp_path):
    """One of them writes what identifies the folder, and no other trips over it."""
    one = Sweep(Path(sweep(tmp_path, shards)), None, [])
    for _ in range(20):
        shutil.rmtree(one.out, ignore_errors=True)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one.claim, one.runs))
        assert len(list(one.out.iterdir())) == 5


def test_results_are_not_mixed(shards, tmp_path, in_process):
    path = sweep(tmp_path, shards, seeds=[0])
    assert main(["run", path, "0"]) == 0
    code, said = in_process(main, ["run", path, "0", "--set", "pretrain.train.steps=4"])
    assert code == 2 and "pretrain.set.train.steps 3 there, pretrain.set.train.steps 4 here" in said
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "sweep.yaml").read_text())
    for words in (["table"], ["status"], ["list"], ["run", "0"]):
        code, said = in_process(main, [words[0], str(other), *words[1:]])
        assert code == 2 and "holds the results of another sweep, 'sweep', not of 'other'" in said
    # More of the same is no other sweep.
    assert main(["status", sweep(tmp_path, shards, seeds=[0, 1])]) == 0
    # A file, or a config, that was changed is: its old results are in no table.
    for words in (["table"], ["status"], ["plot"], ["run", "1"]):
        content = yaml.safe_load(Path(sweep(tmp_path, shards, seeds=[0, 1])).read_text())
        content["stages"]["pretrain"]["set"]["train.steps"] = 5
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        code, said = in_process(main, [words[0], path, *words[1:]])
        assert code == 2 and "train.steps 3 there, pretrain.set.train.steps 5 here" in said
    path = sweep(tmp_path, shards)
    (tmp_path / "small.yaml").write_text("# a comment\nencoder: {name: custom}\n")
    assert main(["table", path]) == 0
    (tmp_path / "small.yaml").write_text("encoder: {name: custom, heads: 1}\n")
    for words in (["table"], ["run", "1"]):
        code, said = in_process(main, [words[0], path, *words[1:]])
        assert code == 2 and "small.yaml, which sets " in said
    (tmp_path / "small.yaml").write_text("encoder: {name: custom}\n")
    path = sweep(tmp_path, shards, vary={}, settings={"mask.ratio 0.5": {}})
    code, said = in_process(main, ["table", path])
    assert code == 2 and "a run with other settings: pretrain --mask.ratio=0.5 there" in said


def test_overrides_are_remembered(shards, tmp_path, capsys):
    path = sweep(tmp_path, shards, seeds=[0])
    assert main(["run", path, "0", "--set", "pretrain.train.steps=2"]) == 0
    assert main(["run", path, "1"]) == 0
    assert main(["status", path]) == 0
    assert "2 finished" in capsys.readouterr().out
    runs = tmp_path / "out"
    assert [
        json.loads(file.read_text())["steps"] for file in sorted(runs.glob("*/*/summary.json"))
    ] == [2, 2]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_sweeps(path, tmp_path):
    assert main(["list", str(path), "--out", str(tmp_path)]) == 0


def shared(folder, shards, **changes):
    """A sweep of two seeds whose first stage is trained once, and goes on in a second one."""
    path = sweep(folder, shards, vary={}, measures={"loss": "again.loss"}, paper={}, **changes)
    content = yaml.safe_load(Path(path).read_text())
    first = content["stages"].pop("pretrain")
    again = {"set": first["set"] | {"encoder.checkpoint": "{first}"}}
    content["stages"] = {"first": first | {"seed": 5}, "again": first | again}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_what_runs_share_is_run_once(shards, tmp_path, capsys):
    """By one of two processes that begin together; the other waits, and both go on from it."""
    path = shared(tmp_path, shards)
    words = [sys.executable, str(ROOT / "tools/sweep.py"), "run", path]
    both = [start([*words, number]) for number in "01"]
    assert [process.wait(LIMIT) for process in both] == [0, 0]
    out = tmp_path / "out"
    assert not list(out.glob("run_seed-*/first"))
    told = json.loads((out / "first" / "summary.json").read_text())
    assert told["status"] == "finished"
    seeds = [out / "first", out / "run_seed-0" / "again", out / "run_seed-1" / "again"]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in seeds]
    assert [config["run"]["seed"] for config in configs] == [5, 0, 1]
    starts = [config["encoder"]["checkpoint"] for config in configs]
    assert starts == [None, str(out / "first"), str(out / "first")]
    assert main(["status", path]) == 0 and "2 finished" in capsys.readouterr().out
    # Results bind what is shared, too.
    content = yaml.safe_load(Path(path).read_text())
    content["stages"]["first"]["seed"] = 6
    Path(path).write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="first.seed 5 there, first.seed 6 here"):
        main(["table", path])


def test_all_at_once_asked_to_stop(shards, tmp_path, capsys):
    path = sweep(tmp_path, shards, seeds=[0])
    words = [sys.executable, str(ROOT / "tools/sweep.py"), "run", path, "all", "--jobs", "2"]
    process = start([*words, "--set", "pretrain.train.steps=100000"])
    wait_for(lambda: len(list((tmp_path / "out").glob("*/*/checkpoints/step-*"))) > 1, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(LIMIT) == 75
    assert main(["status", path]) == 0
    said = capsys.readouterr().out
    assert said.count("asked to stop at step") == 2 and "2 interrupted" in said
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 2
    with pytest.raises(UserError, match="--jobs 0 must be positive"):
        main(["run", path, "all", "--jobs", "0"])


def test_a_setting_with_a_config_of_its_own(shards, tmp_path, in_process):
    """It counts by what it sets, with what it begins from."""
    settings = {"a": {}, "b": {"pretrain.config": str(tmp_path / "own.yaml")}}
    (tmp_path / "own.yaml").write_text("base: base.yaml\nencoder: {depth: 2}\n")
    (tmp_path / "base.yaml").write_text("encoder: {name: custom, heads: 1}\n")
    path = sweep(tmp_path, shards, vary={}, settings=settings, seeds=[0])
    assert in_process(main, ["run", path, "1"])[0] == 0
    config = yaml.safe_load((tmp_path / "out/b_seed-0/pretrain/config.yaml").read_text())
    assert (config["encoder"]["heads"], config["encoder"]["depth"]) == (1, 2)
    assert in_process(main, ["table", path])[0] == 0
    (tmp_path / "base.yaml").write_text("encoder: {name: custom, heads: 2}\n")
    code, said = in_process(main, ["table", path])
    assert code == 2 and "a run with other settings: pretrain which sets" in said
    settings["b"] = {"pretrain.config": "no.yaml"}
    path = sweep(tmp_path, shards, vary={}, settings=settings)
    code, said = in_process(main, ["list", path])
    assert code == 2 and "settings.b: pretrain.config: there is no no.yaml" in said


def test_some_of_a_sweep(shards, tmp_path, capsys):
    path = sweep(tmp_path, shards, settings={"a": {}, "b": {"seeds": [7, 8]}}, vary={})
    assert main(["list", path, "--settings", "b"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "b_seed-7",
        "b_seed-8",
    ]
    assert main(["list", path, "--seeds", "1", "--settings", "a"]) == 0
    assert capsys.readouterr().out.split()[1] == "a_seed-0"
    with pytest.raises(UserError, match="--settings: c is none of a, b"):
        main(["list", path, "--settings", "c"])
    with pytest.raises(UserError, match="compare: c is none of a, b"):
        main(["list", sweep(tmp_path, shards, settings={"a": {}, "b": {}}, vary={}, compare="c")])


def test_the_file_in_the_docs(tmp_path, capsys):
    page = (ROOT / "docs/sweeps_and_slurm.md").read_text()
    (tmp_path / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert main(["list", str(tmp_path / "mine.yaml"), "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * (4 * 3 + 1)
    one = Sweep(tmp_path / "mine.yaml", tmp_path)
    longer = next(run for run in one.runs if run.setting == "longer, loss.mask bce")
    assert one.takes_time_of(longer, "finetune") == "SAMI, loss.mask bce"
    told = next(run for run in one.runs if run.setting == "MAE, loss.mask focal")
    assert str(ROOT / "configs/pretrain/mae_ti.yaml") in one.command(told, "pretrain")
    assert one.folder(told, "teacher") == tmp_path / "teacher"
    assert not one.is_shared(told, "pretrain")
    assert one.against == {
        f"{name}, loss.mask {loss}": f"SAMI, loss.mask {loss}"
        for name in ("MAE", "random", "longer")
        for loss in ("focal", "bce")
    }


def test_equal_time_counts_the_settings_own_steps(tmp_path, shards, in_process):
    """Of a setting that costs more a step as many as fit into the time, by its own pace."""
    settings = {
        "cheap": {},
        "dear": {"pretrain.loss.kind": "cosine"},
        "dear, as long": {
            "pretrain.loss.kind": "cosine",
            "pretrain.train.steps": "{time of cheap}",
        },
        "other, as long": {"pretrain.optim.lr": 0.1, "pretrain.train.steps": "{time of cheap}"},
    }
    path = sweep(tmp_path, shards, settings=settings, vary={})
    one = Sweep(Path(path), tmp_path / "out")
    runs = {run.name: run for run in one.runs}

    def finish(name, seconds, steps):
        folder = one.folder(runs[name], "pretrain")
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "steps": steps}))
        line = {"step": steps, "seconds_per_step": seconds / steps}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    finish("cheap_seed-0", 10.0, 100)
    finish("cheap_seed-1", 14.0, 100)
    longer = runs["dear-as-long_seed-1"]
    with pytest.raises(UserError, match="takes as long as cheap: first run 2, 3$"):
        one.steps_of(longer, "pretrain")
    finish("dear_seed-0", 40.0, 100)
    finish("dear_seed-1", 20.0, 50)
    assert one.steps_of(longer, "pretrain") == 30  # 12 s at 0.4 s a step
    assert one.steps_of(runs["other-as-long_seed-0"], "pretrain") == 100  # nobody knows better
    assert one.steps_of(runs["dear_seed-0"], "pretrain") is None
