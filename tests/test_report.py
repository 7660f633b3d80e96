"""The page of runs: what is on it, which runs it tells apart, and that it needs no network."""

import base64
import html
import io
import json
import re
import statistics
import struct
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from finetune.agreement import DISTANCES
from finetune.runfolder import TO_TEACHER, RunFolder, mean_and_std, name_apart, settings_of
from sami.core.tables import Results
from tools import report as report_module
from tools.report import main

# The smallest PNG there is.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def write_run(folder, group="mask", seed=0, evaluation=None, **fields):
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
        "bad_samples": {"damaged image": 3},
        "evaluation": evaluation or {"r2": 0.123456},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    names = ("loss", "lr", "images_per_second", "data_wait", "val_r2", "loss_dice")
    lines = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_evaluation(folder):
    mean = {"mean": 0.4321, "low": 0.4, "high": 0.5}
    best = {"mean": 0.654, "low": 0.6, "high": 0.7}
    needs_none = {"mean": 0.31, "low": 0.3, "high": 0.32}
    rows = [
        {"prompt": "box", "choice": choice, "miou": {"all": told}}
        for choice, told in (("predicted", mean), ("oracle", best), ("filled box", needs_none))
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


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, at their end."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    return drawn


def test_distillation_has_its_own_figures(tmp_path, report):
    """Those to the teacher's masks, each with what needs no model; of 0 to 1, shown in percent."""
    assert list(TO_TEACHER) == list(DISTANCES)
    told = {"mse": 0.01, "r2": 0.5, "pictures": 7.0}
    told |= {"miou_teacher_pair_300": 0.731, "trivial_teacher_pair_300": 0.204}
    write_run(tmp_path / "student", "distill", evaluation=told)
    code, said = report(tmp_path / "student")
    assert code == 0
    assert "masks by two points 300 px apart" in said and "73.1" in said and "20.4" in said
    assert "Distillation of SAM" in said and "miou_teacher_pair_300, %" in said


@pytest.mark.slow
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
    # A plot of each number, all runs of a kind over each other.
    for words in ("loss", "r2, held out", "learning rate", "images/s", "data wait"):
        drawn = page.split(f'alt="{words}" src="data:image/png;base64,')[1].split('"')[0]
        width, height = struct.unpack(">II", base64.b64decode(drawn)[16:24])
        assert width > 700 and height > 400
    # The images by epoch, six of the ten, the first and the last among them.
    found = re.findall(r'alt="r0.75/pretrain, ([^"]+)"', page)
    assert len(found) == 6
    assert (found[0], found[-1]) == ("step 100, epoch 5", "step 1000, epoch 50")
    # Differences of the configurations, and only these.
    table = page.split("the fields that differ")[1].split("</table>")[0]
    assert "<td>mask.ratio</td><td>0.5</td><td>0.75</td>" in table
    assert "<td>run.seed</td><td>0</td><td>1</td>" in table and "run.dir" not in table
    assert table.count("<tr>") == 3
    # Evaluations, of a run and by themselves.
    assert page.count("<td>43.2 (40.0-50.0)</td>") == page.count("<td>65.4 (60.0-70.0)</td>") == 2
    assert page.count("7 / 70") == 6 and page.count("mIoU in % by box 43.2 (95 %") == 2
    assert page.count("<td>31.0 (30.0-32.0)</td>") == 2 and "without a model 31.0" in page
    assert page.count(", evaluated") == 2 and "0.1235" in page
    for words in ("abc123", "torch 9.9", "sam_vit_h 5ec5ec5ec5ec", "3 damaged image", "f00"):
        assert words in page
    assert not re.search(r'(src|href)="(?!data:|#)', html.unescape(page))
    # without the images, whose letters may happen to spell it
    assert "http" not in re.sub(r'"data:image/[^"]*"', "", page)
    # What it is, from when, in which order, and for which screens.
    now = datetime.now(UTC)
    dates = [f"Made {day:%Y-%m-%d} " for day in (now, now - timedelta(minutes=5))]
    assert any(date in page for date in dates)
    assert '<html lang="en">' in page and '<meta charset="utf-8">' in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    anchors = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', page)
    assert anchors == re.findall(r'<h2 id="([^"]+)">([^<]+)</h2>', page)
    assert [title for _, title in anchors][:2] == ["Summary", "Stage 1: pretraining"]
    assert page.index("<h2") < page.index("<img") and "showModal" in page
    assert page.count("<img ") == len(re.findall(r'<img alt="[^"]+"', page))
    # It does not say which run is better.
    assert "one setting is better than another is not concluded here" in page
    assert "5 of the 5 settings have one seed" in page


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path, report, figures):
    """Mean and standard deviation, where all of them have measured."""
    for ratio in (0.5, 0.75):
        for seed in (0, 1, 2):
            folder = tmp_path / f"ratio-{ratio}_seed-{seed}" / "finetune"
            start = f"runs/ratio-{ratio}_seed-{seed}/pretrain"
            write_run(folder, "prompt", seed, ratio=ratio, checkpoint=start)
            lines = [{"step": s, "val_miou_box": 0.1 * s + 0.01 * seed} for s in (1, 2, 3)]
            lines = lines[: 2 if seed == 2 else 3]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    runs = [RunFolder(path) for path in sorted(tmp_path.glob("*/finetune"))]
    name_apart(runs)
    groups = settings_of(runs)
    assert {name: len(group) for name, group in groups.items()} == {
        "ratio-0.5/finetune": 3,
        "ratio-0.75/finetune": 3,
    }
    steps, means, spread = mean_and_std(groups["ratio-0.5/finetune"], "val_miou_box")
    assert steps == [1, 2] and means == pytest.approx([0.11, 0.21])
    assert spread == pytest.approx([0.01, 0.01])
    code, page = report(*sorted(tmp_path.glob("*/finetune")))
    assert code == 0 and "one standard deviation on either side" in page
    (axis,) = (figure.axes[0] for figure in figures)
    assert len(axis.lines) == len(axis.collections) == 2  # a band for each
    low, high = axis.collections[0].get_paths()[0].get_extents().get_points()
    assert low == pytest.approx([1, 10]) and high == pytest.approx([2, 22])
    assert "3 seeds" in page and "have one seed" not in page
    assert "not concluded here" in page


@pytest.mark.slow
def test_numbers_of_runs_and_what_they_are_compared_with(tmp_path, report):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"a_seed-{seed}", seed=seed, evaluation={"r2": 0.1 * seed})
    masks = {"miou_box": 0.5, "trivial_box": 0.25, "miou_1_click": 0.125}
    write_run(tmp_path / "<i>b", "prompt", evaluation=masks)
    write_run(tmp_path / "c", "augment", evaluation={"top1": 50.0, "pictures": 100})
    _, page = report(*tmp_path.iterdir())
    assert "r2 0.100 ± 0.100 over seeds (the best constant map 0)" in page
    assert "mIoU in % by box 50.0 (without a model 25.0)" in page
    assert "mIoU in % by 1 click 12.5</li>" in page
    assert "top-1 in % 50.0 (± 9.8, the 95 % interval of 100 images)" in page
    assert "<tr><td>&lt;i&gt;b</td><td>50.0</td><td>25.0</td><td>12.5</td></tr>" in page
    assert "<i>b" not in page


def test_a_seed_that_was_run_twice_is_two_settings(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    runs = [RunFolder(tmp_path / name) for name in ("a", "b")]
    assert settings_of(runs) == {"a": [runs[0]], "b": [runs[1]]}


def test_where_a_run_stands_that_has_not_ended(tmp_path, report):
    write_run(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    del told["steps"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(told | {"status": "running"}))
    _, page = report(tmp_path / "run")
    assert "running at step 3" in page and "running, 3 steps" in page
    (tmp_path / "run" / "metrics.jsonl").unlink()
    _, page = report(tmp_path / "run")
    assert "running at step 0" in page


def test_a_start_that_failed_is_said_to_be_one(tmp_path, report, capsys):
    failed = tmp_path / "failed"
    failed.mkdir()
    told = {"entry": "sami/pretrain.py", "status": "failed", "exit_code": 2, "error": "no <shards>"}
    (failed / "summary.json").write_text(json.dumps(told))
    sentence = f"{failed} is a start of sami/pretrain.py that failed and left no run: no <shards>"
    code, page = report(failed)
    assert code == 0 and f"<p>{html.escape(sentence)}</p>" in page and "<ul></ul>" not in page
    write_run(tmp_path / "run")
    code, page = report(tmp_path / "run", failed)
    assert code == 0 and html.escape(sentence) in page and "finished at step 1000" in page


@pytest.mark.slow
def test_plots_say_what_they_show_and_do_not_magnify_noise(tmp_path, report, figures):
    folders = [tmp_path / f"a-$\\run$-with-a-long-name-{n}" for n in range(9)]
    rng = np.random.default_rng(0)
    for number, folder in enumerate(folders):
        write_run(folder, "prompt", 0, number=number)
        told = {"val_miou_box": 0.5, "val_trivial_box": 0.55, "data_wait": 0.01, "loss": 1.0}
        told |= {"images_per_second": 100.0, "lr": 1e-4}
        lines = [
            {"step": step, **{n: v * rng.uniform(0.998, 1.002) for n, v in told.items()}}
            for step in (1, 2, 3)
        ]
        for line in lines:
            line["val_trivial_box"] = 0.55
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_run(tmp_path / "pretrained")
    code, _ = report(*folders, tmp_path / "pretrained")
    assert code == 0
    (r2,) = (one.axes[0] for one in figures[:5] if one.axes[0].get_title() == "r2, held out")
    assert r2.lines[-1].get_ydata() == [0, 0] and r2.get_ylim()[1] <= 1
    assert r2.figure.legends[0].get_texts()[-1].get_text() == (
        "without a model: the best constant map"
    )
    axes = {figure.axes[0].get_title(): figure.axes[0] for figure in figures[5:]}
    assert set(axes) == {
        "loss",
        "mIoU by box, held out",
        "learning rate",
        "images/s",
        "data wait",
    }
    for axis in axes.values():
        assert axis.get_xlabel() == "step" and axis.get_ylabel()
        locator = axis.xaxis.get_major_locator()
        assert isinstance(locator, MaxNLocator) and all(tick % 1 == 0 for tick in locator())
        (legend,) = axis.figure.legends
        assert not legend.get_window_extent().overlaps(axis.get_window_extent())
        names = [text.get_text() for text in legend.get_texts()]
        assert len(set(names)) == len(names) >= 9
        styles = {(one.get_color(), one.get_linestyle(), one.get_marker()) for one in axis.lines}
        assert len(styles) == len(names)
    miou = axes["mIoU by box, held out"]
    assert "%" in miou.get_ylabel() and "%" in axes["data wait"].get_ylabel()
    assert miou.lines[0].get_ydata() == pytest.approx([50] * 3, abs=0.2)
    low, high = miou.get_ylim()
    assert high - low >= 5 and low < 50 < 55 < high  # the filled box is on it
    assert miou.lines[-1].get_ydata() == pytest.approx([55, 55])
    assert miou.figure.legends[0].get_texts()[-1].get_text() == "without a model: filled box"
    assert axes["data wait"].get_ylim() == (0, 10) and axes["images/s"].get_ylim()[0] == 0
    low, high = axes["loss"].get_ylim()
    assert axes["loss"].get_yscale() == "log" and high / low == pytest.approx(2)


def compared(differences):
    """What tools/sweep.py table writes, of SAMI's differences from a random start by seed."""
    scores = {"SAMI": [60 + 100 * d for d in differences], "random": [60.0] * len(differences)}
    scores["teacher"] = [70.0]
    rows = []
    for setting, values in scores.items():
        box = {"by_seed": dict(enumerate(values)), "mean": statistics.mean(values)}
        box |= {"std": None, "paper": None, "trivial": 50.0}
        against = "SAMI" if setting == "random" else None
        rows.append({"setting": setting, "against": against, "measures": {"box": box}})
    units = {"box": "box, mIoU in %"}
    return Results("x", len(differences), units, rows).to_json("the command")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([0.2], "+20.0 points, ahead in 1 of 1 seed: no conclusion from one seed"),
        ([0.2, 0.21, 0.22], "interval +18.5 to +23.5, ahead in 3 of 3 seeds: SAMI is ahead"),
        ([-0.02, -0.021, -0.022], "ahead in 0 of 3 seeds: SAMI is behind"),
        ([0.2, -0.1, 0.3], "ahead in 2 of 3 seeds: no conclusion from 3 seeds"),
        ([0.1, 0.4], "ahead in 2 of 2 seeds: no conclusion from 2 seeds"),
    ],
)
def test_what_is_concluded(report, tmp_path, differences, says):
    write_run(tmp_path / "run")
    (tmp_path / "c.json").write_text(compared(differences))
    code, page = report(tmp_path / "run", "--comparison", tmp_path / "c.json")
    page = html.unescape(page)
    assert code == 0 and page.count(says) == 2  # at the top, and under the tables
    assert ("SAMI is" in page) == ("SAMI is" in says)
    if "interval" in says:
        assert "<td>+18.5 to +23.5</td><td>3 of 3</td>" in page
    assert "<td>without a model</td><td>50</td>" in page and "the command" in page
    assert page.index(says) < page.index("<h2", page.index("Summary</h2>"))
    assert ("one seed, so that differences may be chance" in page) == (len(differences) == 1)


def test_large_images_become_smaller():
    """A photograph's PNG goes in as JPEG of the same size."""
    noise = np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    text = report_module.image(data.getvalue(), "a < b")
    kind, code = re.search(r'alt="a &lt; b" src="data:image/(\w+);base64,([^"]+)"', text).groups()
    smaller = base64.b64decode(code)
    assert kind == "jpeg" and len(smaller) < 0.8 * len(data.getvalue())
    with Image.open(io.BytesIO(smaller)) as image:
        assert image.size == (700, 600)
    assert "image/png" in report_module.image(PNG, "small")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{}/no"], "no is not the folder of a run"),
        (["{}/run", "{}/run"], "run is named twice"),
        (["{}/run", "--images", "-1"], "--images -1 must be 0 or more"),
        (["{}/run", "--comparison", "{}/no.json"], "no.json does not exist"),
        (
            ["{}/run", "--comparison", "{}/run/summary.json"],
            "is not what tools/sweep.py table writes",
        ),
    ],
)
def test_bad_words(report, tmp_path, words, says):
    write_run(tmp_path / "run")
    code, said = report(*(word.format(tmp_path) for word in words))
    assert code == 2 and says in said and said.count("\n") == 1
