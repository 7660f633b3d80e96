"""Models side by side: the same numbers as evaluate's, kept rows, and bad input."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
import yaml

import finetune.comparison as comparison
import tools.compare
from finetune.candidates import SamCandidate
from finetune.comparison import Row
from finetune.comparison_table import Column, draw, miou_cell, table
from finetune.evaluation import EvalDataset, masks_of
from finetune.fastsam import FastSam
from finetune.losses import mask_iou
from finetune.measuring import open_source, promptings_of
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.memory import is_counted
from sami.encoder import EncoderConfig
from sami.sweepfile import slug
from tests.runs import ROOT
from tests.test_candidates import Bands
from tests.test_toy_shards import draw as draw_scenes
from tools.evaluate import main as evaluate

QUICK = {"rounds": 1, "samples": 3, "masks": 3, "prompts": ["box", 1], "seeds": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Shards, and two models by name."""
    folder = tmp_path_factory.mktemp("compare")
    done = draw_scenes(folder / "scenes", "--shards", "1", "--images", "4")
    assert done.returncode == 0, done.stderr
    for name, encoder, kind in (
        ("vit", "custom", "efficientsam"),
        ("tiny", "tiny_vit_test", "sam"),
    ):
        torch.manual_seed(0)
        decoder = MaskDecoderConfig(kind, width=32)
        model = build_model(EncoderConfig(encoder), decoder, 128, "longest", False)
        write_weights(folder / f"{name}.safetensors", model.state_dict(), model_header(model))
    return folder


def rows_of(folder):
    return [
        {"name": "ViT", "checkpoint": str(folder / "vit.safetensors")},
        {"name": "TinyViT", "checkpoint": str(folder / "tiny.safetensors")},
    ]


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Memory is measured in a process of its own, which takes seconds; one test does."""
    monkeypatch.setattr(comparison, "peak_memory", lambda *given: 0.125)


@pytest.fixture
def computed(monkeypatch):
    """The files whose rows are computed, in order, and the seeds."""
    found, real = [], tools.compare.compute_row
    monkeypatch.setattr(
        tools.compare,
        "compute_row",
        lambda *given: found.append((given[0].name, given[5].seed)) or real(*given),
    )
    return found


def compare(folder, out, content, monkeypatch, *words):
    path = out / "small.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(QUICK | content))
    argv = ["tools/compare.py", str(path), "--out", str(out), "--workers", "0", "--device", "cpu"]
    shards = ["--shards", str(folder / "scenes" / "*.tar")]
    monkeypatch.setattr(sys, "argv", [*argv, *shards, *words])
    return tools.compare.main()


def test_a_table_with_rows_that_are_kept(scenes, tmp_path, monkeypatch, capsys, computed):
    paper = {"source": "a paper", "box": 70, "1 click": 40.5, "latency": 5}
    gone = {"name": "Gone", "checkpoint": str(tmp_path / "gone.pt"), "paper": paper}
    rows = [*rows_of(scenes), gone, {"name": "Unpublished"}]
    content = {"rows": rows, "reference": "ViT", "everything": [2]}
    assert compare(scenes, tmp_path / "out", content, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "gone.pt does not exist: listed without weights" in said
    told = json.loads((tmp_path / "out/comparison.json").read_text())
    measured = [row["measured"] for row in told["rows"]]
    assert measured[2] is measured[3] is None
    # evaluate's own numbers
    words = ["--samples", "3", "--masks", "3", "--prompts", "box", "1", "--seeds", "2"]
    for row, one in zip(rows[:2], measured, strict=False):
        out = tmp_path / row["name"]
        argv = ["tools/evaluate.py", row["checkpoint"], "--shards", str(scenes / "scenes/*.tar")]
        rest = ["--out", str(out), "--workers", "0", "--device", "cpu", "--overlays", "0"]
        monkeypatch.setattr(sys, "argv", [*argv, *words, *rest])
        assert evaluate() == 0
        assert one["miou"] == json.loads((out / "evaluation.json").read_text())["results"]
        model = load_model(row["checkpoint"])
        assert one["parameters"] == sum(p.numel() for p in model.parameters())
        assert one["everything"].keys() == {"2"} and one["encoder_ms"] > 0
        assert one["peak_memory_gb"] == 0.125
    # the agreement, against a loop
    assert measured[0]["agreement"]["box"]["mean"] == 1
    models = [load_model(row["checkpoint"]) for row in rows[:2]]
    asked = tools.compare.argparse.Namespace(
        coco=None, keep_crowd=False, shards=[str(scenes / "scenes/*.tar")], samples=3
    )
    source, _ = open_source(asked, tmp_path)
    (spec,) = promptings_of(["box"], 1, models[0])
    found = []
    for number in range(3):
        pair = [EvalDataset(source, m.shape, (spec,), 3, 0)[number] for m in models]
        masks = [
            masks_of(m, sample, torch.device("cpu"), spec)[0]
            for m, sample in zip(models, pair, strict=True)
        ]
        found += mask_iou(*masks).tolist()
    assert measured[1]["agreement"]["box"]["mean"] == pytest.approx(sum(found) / len(found))

    text = (tmp_path / "out/comparison.md").read_text()
    assert "| Gone (no weights) | –" in text and "theirs: a paper | – | – | 5 |" in text
    assert "| Unpublished (no weights) |" in text and "| without a model |" in text
    assert (tmp_path / "out/comparison.png").read_bytes().startswith(b"\x89PNG")

    # The same again computes nothing; another protocol, or a file that changed, does.
    computed.clear()
    assert compare(scenes, tmp_path / "out", content, monkeypatch) == 0 and computed == []
    content["everything"] = []
    assert compare(scenes, tmp_path / "out", content, monkeypatch, "--seed", "7") == 0
    assert [seed for _, seed in computed] == [7, 7]
    torn = next((tmp_path / "out/rows").iterdir())
    torn.write_text(torn.read_text()[:50])
    changed = load_model(rows[1]["checkpoint"])
    with torch.no_grad():
        changed.mask_decoder.iou_token.weight.add_(1)
    other = tmp_path / "other.safetensors"
    write_weights(other, changed.state_dict(), model_header(changed))
    content["rows"][1]["checkpoint"] = str(other)
    before = len(computed)
    assert compare(scenes, tmp_path / "out", content, monkeypatch, "--seed", "7") == 0
    assert 1 <= len(computed) - before <= 2


def test_the_costs_are_counted(scenes):
    """Of a ViT without attention's products against its layers' sizes."""
    model = load_model(scenes / "vit.safetensors")
    costs = SamCandidate(model).count()
    width, depth, tokens = 64, 2, 64
    layers = tokens * width * (3 * width + width + 8 * width) + 2 * tokens**2 * width
    patches, neck = tokens * 3 * 16**2 * width, tokens * (width * 32 + 9 * 32 * 32)
    assert costs["encoder_macs"] == depth * layers + patches + neck
    assert costs["decoder_macs"] > 0


def test_what_says_nothing_of_a_model_is_marked():
    def row(choice, mean):
        info = {"mean": mean, "low": mean, "high": mean}
        return {"prompt": "box", "choice": choice, "miou": {"all": info}}

    for ours, marked in ((0.5, True), (0.57, True), (0.6, False)):
        one = {"miou": [row("predicted", ours), row("oracle", 0.9), row("filled box", 0.57)]}
        assert ("↓" in miou_cell(one, "box")) == marked
    assert miou_cell({"miou": []}, "box") == "–"


def test_the_columns_of_a_table():
    """By hand: a row with numbers and a paper's, one without weights, and what needs no model."""

    def info(prompt, choice, mean):
        by_size = {"all": {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}}
        return {"prompt": prompt, "choice": choice, "miou": by_size}

    one = {"parameters": 9_660_000, "encoder_macs": 3.85e10, "encoder_ms": 12.34}
    one |= {"decoder_ms": 1.0, "images_per_second": 81.04, "batch": 2, "peak_memory_gb": 0.516}
    one |= {"miou": [info("1 click", "predicted", 0.5), info("1 click", "constant disc", 0.25)]}
    one |= {"agreement": {"1 click": {"mean": 0.75, "low": 0.7, "high": 0.8}}}
    one |= {"everything": {"8": {"ms": 123.4, "masks": 5}}}
    rows = [Row("A", "a.pt", {"source": "P", "parameters": 9.7, "latency": 8, "1 click": 43.7})]
    rows += [Row("B")]
    head, lines = table(rows, [one, None], "A")
    assert all(len(line) == len(head) == 10 for line in lines)
    assert head[6:] == [
        "peak memory, GB",
        "mIoU by 1 click, %",
        "agreement with A, %",
        "everything 8², ms",
    ]
    assert lines[0][1:7] == ["9.66", "38.5", "12.3", "1.0", "81.0 (batch 2)", "0.52"]
    assert lines[0][7:] == ["50.0 (49.0-51.0)", "75.0 (70.0-80.0)", "123"]
    assert lines[1] == ["  theirs: P", "9.7", "–", "8", *["–"] * 3, "43.7", "–", "–"]
    assert lines[2] == ["B (no weights)", *["–"] * 9]
    assert lines[3] == ["without a model", *["–"] * 6, "25.0 (24.0-26.0)", "–", "–"]
    one["peak_memory_gb"] = None
    assert table(rows, [one, None], None)[1][0][6] == "–"
    head, lines = table(rows, [None, None], None)  # papers alone
    assert head[7:] == ["mIoU by box, %", "mIoU by 1 click, %", "mIoU by 3 clicks, %"]
    assert [line[0] for line in lines] == ["A (no weights)", "  theirs: P", "B (no weights)"]
    assert Column("x", str, "box").theirs(Row("C", paper={"box": 70.25})) == "70.25"


def test_the_plot_has_room_for_its_labels():
    def row(ms, mean):
        by_size = {"all": {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}}
        info = {"prompt": "1 click", "choice": "predicted", "miou": by_size}
        return {"encoder_ms": ms, "decoder_ms": 1.0, "miou": [info]}

    paper = {"latency": 450, "1 click": 55.6}
    name = "EfficientSAM-Ti, from random weights"
    rows = [Row(f"{name} {number}") for number in range(4)] + [Row("SAM $x$", paper=paper)]
    found = [row(ms, 0.3 + ms / 5000) for ms in (5, 30, 400, 1000)] + [None]
    figure = draw(rows, found, "CPU")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    words = {label.get_text().replace("\n", " "): label for label in axis.texts}
    assert words.keys() == {*(one.name for one in rows[:4]), r"SAM \$x\$, theirs"}
    box = axis.get_window_extent()
    for label in words.values():
        extent = label.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1
        assert box.y0 <= extent.y0 and extent.y1 <= box.y1
    grey = [line for line in axis.lines if line.get_color() == "0.6"]
    assert [one.get_xydata().tolist() for one in grey] == [[[450, 55.6]]]
    low, high = draw(rows[:1], [row(30, 0)], "CPU").axes[0].get_xlim()
    assert high / low >= 1.99 and low < 31 < high
    assert not list(draw(rows[:1], [None], "CPU").axes[0].texts)


def test_fastsam_is_a_row(scenes, tmp_path, monkeypatch, capsys):
    """With a stand-in for ultralytics' predictor; the package itself below."""
    fastsam = tmp_path / "FastSAM.pt"
    torch.save({"model": torch.nn.Linear(2, 2)}, fastsam)
    monkeypatch.setattr("finetune.candidates.is_yolo", lambda path: path == fastsam)
    monkeypatch.setattr("finetune.candidates.import_predictor", lambda: None)
    monkeypatch.setattr(FastSam, "load", lambda path, device: FastSam(Bands(), 128, 772))
    rows = [rows_of(scenes)[0], {"name": "FastSAM", "checkpoint": str(fastsam)}]
    content = {"rows": rows, "reference": "ViT", "everything": [2, 4]}
    content["prompts"] = ["box", 1, 3, "centre-2"]
    assert compare(scenes, tmp_path / "out", content, monkeypatch) == 0
    told = json.loads((tmp_path / "out/comparison.json").read_text())
    one = told["rows"][1]["measured"]
    choices = [(info["prompt"], info["choice"]) for info in one["miou"]]
    prompts = ("box", "1 click", "3 clicks", "2 clicks, centre first")
    trivial = ("filled box", *["constant disc"] * 3)
    expected = [
        pair for p, t in zip(prompts, trivial, strict=True) for pair in ((p, "predicted"), (p, t))
    ]
    assert choices == expected
    assert one["everything"]["2"] == one["everything"]["4"]
    assert one["agreement"].keys() == set(prompts) and one["parameters"] == 772
    assert one["encoder_macs"] == 16 * 16 * 4 * 192 and one["shape"]["image_size"] == 128
    (line,) = [
        line
        for line in (tmp_path / "out/comparison.md").read_text().splitlines()
        if line.startswith("| FastSAM |")
    ]
    assert "–" not in line
    other = told["rows"][0]["measured"]["miou"]  # what needs no model is the same for both
    assert compare(scenes, tmp_path / "bf16", content, monkeypatch, "--precision", "bf16") == 0
    told = json.loads((tmp_path / "bf16/comparison.json").read_text())
    assert [row["measured"]["precision"] for row in told["rows"]] == ["bf16", "fp32"]
    assert "In fp32: FastSAM." in (tmp_path / "bf16/comparison.md").read_text()
    assert "In fp32" not in (tmp_path / "out/comparison.md").read_text()
    for name in {"filled box", "constant disc"}:
        ours, theirs = ([o for o in rows if o["choice"] == name] for rows in (one["miou"], other))
        assert ours == theirs


def test_a_row_that_fails_keeps_those_before(scenes, tmp_path, monkeypatch, capsys, computed):
    spoilt = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), spoilt)
    rows = [rows_of(scenes)[0], {"name": "Other", "checkpoint": str(spoilt)}, rows_of(scenes)[1]]
    content = {"rows": rows}
    assert run_entry(lambda: compare(scenes, tmp_path / "out", content, monkeypatch)) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"error: row 'Other': {spoilt} ")
    assert [name for name, _ in computed] == ["vit.safetensors", "other.pt"]
    assert len(list((tmp_path / "out/rows").iterdir())) == 1
    torch.save(load_model(scenes / "tiny.safetensors").state_dict(), spoilt)
    spoilt.write_bytes(spoilt.read_bytes()[:-5000])  # cut short: before anything is measured
    computed.clear()
    assert run_entry(lambda: compare(scenes, tmp_path / "out", content, monkeypatch)) == 2
    assert "row 'Other'" in capsys.readouterr().err
    assert "vit.safetensors" not in [name for name, _ in computed]
    del rows[1]
    computed.clear()
    assert compare(scenes, tmp_path / "out", content, monkeypatch) == 0
    assert [name for name, _ in computed] == ["tiny.safetensors"]


def test_images_without_a_usable_mask_are_refused_with_a_reference_too(
    scenes, tmp_path, monkeypatch, capsys
):
    (tar,) = (scenes / "scenes").glob("*.tar")
    with tarfile.open(tar) as old, tarfile.open(tmp_path / "none.tar", "w") as new:
        for member in old:
            content = old.extractfile(member).read()
            if member.name.endswith(".json"):
                content = json.dumps(json.loads(content) | {"annotations": []}).encode()
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    content = QUICK | {"rows": rows_of(scenes), "reference": "ViT"}
    words = ["compare", str(tmp_path / "own.yaml"), "--shards", str(tmp_path / "none.tar")]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert run_entry(tools.compare.main) == 2
    assert "none of the images could be used" in capsys.readouterr().err


def test_a_reference_without_weights_is_told(scenes, tmp_path, monkeypatch, capsys):
    rows = [*rows_of(scenes)[:1], {"name": "gone", "checkpoint": str(tmp_path / "gone.pth")}]
    code = compare(scenes, tmp_path, {"rows": rows, "reference": "gone"}, monkeypatch)
    assert code == 0
    said = capsys.readouterr().out
    assert "the reference 'gone' has no weights here: no agreement is measured" in said
    assert "agreement" not in (tmp_path / "comparison.md").read_text()


@pytest.mark.skipif(not is_counted(torch.device("cpu")), reason="only Linux counts it")
@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(scenes, tmp_path, monkeypatch):
    """What the weights take, some MB of activations, and nothing of the libraries."""
    from finetune.speed import peak_memory

    torch.manual_seed(0)
    encoder = EncoderConfig("custom", width=512, depth=8, heads=8)
    model = build_model(encoder, MaskDecoderConfig(width=32), 128, "longest", False)
    write_weights(tmp_path / "a.safetensors", model.state_dict(), model_header(model))
    image = np.zeros((64, 80, 3), np.uint8)
    found = peak_memory(tmp_path / "a.safetensors", "", image, torch.device("cpu"), False)
    weights = sum(4 * p.numel() for p in model.parameters()) / 1e9
    assert weights > 0.1 and weights < found < weights + 0.03
    (tmp_path / "page.pt").write_text("<!doctype html>")
    with pytest.raises(UserError, match="row 'a': .*page.pt is a web page"):
        peak_memory(tmp_path / "page.pt", "row 'a':", image, torch.device("cpu"), False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "names no rows"),
        ({"rows": []}, "names no rows"),
        ({"rows": {"a": 1}}, "rows is no list"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "names the row 'a' twice"),
        ({"rows": [{"nam": "a"}]}, "row 1: nam is none of name, checkpoint, paper"),
        ({"rows": [{"name": "a"}], "reference": "b"}, "reference 'b' is none of the rows"),
        ({"rows": [{"name": "a"}]}, "none of the rows has weights here"),
        ({"rows": [{"name": "a"}], "row": 1}, "row is none of rows, out"),
        ({"rows": [{"name": "a", "checkpoint": __file__}]}, "row 'a'"),
        ({"rows": [{"name": "a"}], "boxes": "b.json"}, "boxes go with coco, annotations"),
        ({"rows": [{"name": "a"}], "proposals": 3}, "proposals go with coco, annotations"),
        ({"rows": [{"name": "a"}], "choose": "best"}, "choose is not .* see docs/compare.md"),
        ({"rows": [{"name": "a"}, {"name": "a "}]}, "names the row 'a' twice"),
        ({"rows": [{"name": " "}]}, "has a row without a name"),
        ({"rows": [{"checkpoint": "a.pt"}]}, "row 1 has no name; see docs/compare.md"),
        ({"rows": [{"name": "a", "checkpoint": 5}]}, "row 1: checkpoint is not"),
        ({"rows": [{"name": "a", "paper": {"bx": 5}}]}, "paper: bx is none of source, box"),
        ({"rows": [{"name": "a", "paper": {"box": "x"}}]}, "paper: box is 'x', which is no"),
        ({"rows": [{"name": "a", "paper": {"latency": 0}}]}, "paper: latency is 0.0, which is no"),
        ({"rows": [{"name": "a"}], "prompts": []}, "prompts is empty"),
        ({"rows": [{"name": "a"}], "everything": [4, 0]}, "everything 0 must be positive"),
        ({"rows": [{"name": "a"}], "seed": -1}, "seed -1 must be 0 or more"),
        *[
            ({"rows": [{"name": "a"}], name: 0}, f"{name} 0 must be positive")
            for name in ("samples", "masks", "seeds", "rounds")
        ],
    ],
)
def test_bad_input(content, says, scenes, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=says):
        compare(scenes, tmp_path / "out", content, monkeypatch)
    assert not (tmp_path / "out/comparison.json").exists()


def test_images_of_the_command_line_replace_the_files(tmp_path):
    path = tmp_path / "a.yaml"
    argv = dict.fromkeys(tools.compare.OPTIONS) | {"config": path}

    def read(content, **words):
        path.write_text(yaml.safe_dump({"rows": [{"name": "a"}]} | content))
        return tools.compare.read_file(tools.compare.argparse.Namespace(**argv | words))[0]

    coco, shards = {"coco": "a.json", "images": "b"}, {"shards": ["a.tar"]}
    assert (read(coco, shards=["c.tar"]).coco, read(coco).coco) == (None, "a.json")
    assert read(shards, coco=tmp_path).shards == []
    with pytest.raises(UserError, match="names shards and coco"):
        read(coco | shards)
    with pytest.raises(UserError, match="--shards and --coco exclude each other"):
        read({}, coco=tmp_path, shards=["c.tar"])


def shipped(name, shards=None):
    argv = dict.fromkeys(tools.compare.OPTIONS) | {"shards": shards}
    args = tools.compare.argparse.Namespace(config=ROOT / "configs/compare" / name, **argv)
    return tools.compare.read_file(args)


def test_the_shipped_files_are_such():
    file, rows = shipped("paper.yaml", ["a.tar"])
    assert len(rows) == 8 and file.everything == [16, 32, 64]
    assert {row.name: row.paper.get("box") for row in rows}["EfficientSAM-Ti"] == 75.7
    with pytest.raises(UserError, match="paper.yaml names no images"):
        shipped("paper.yaml")


def test_the_toy_file_is_of_what_the_demo_leaves():
    file, rows = shipped("toy.yaml")
    assert file.shards == ["data/toy/val/sa_*.tar"]
    demo = (ROOT / "tools/demo.sh").read_text()
    assert "${RUN:-runs/demo}" in demo and "${DATA:-data/toy}" in demo
    sweep = yaml.safe_load((ROOT / "configs/sweeps/init_toy.yaml").read_text())
    made = {f"runs/demo/{slug(name)}_seed-0/finetune" for name in sweep["settings"]}
    assert {row.checkpoint for row in rows} <= made | {"runs/demo/teacher"}
    assert all(f'"{row.name}"' in demo or f" {row.name} " in demo for row in rows)
