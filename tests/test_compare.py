"""Models side by side: the same numbers as evaluate's, kept rows, and bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import finetune.comparison as comparison
import tools.compare
from finetune.evaluation import EvalDataset, masks_of
from finetune.losses import mask_iou
from finetune.measuring import open_source, promptings_of
from finetune.model import MaskDecoderConfig, build_model, load_model, model_header
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.encoder import EncoderConfig
from tests.test_toy_shards import draw
from tools.evaluate import main as evaluate

QUICK = {"rounds": 1, "samples": 3, "masks": 3, "prompts": ["box", 1], "seeds": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Shards, and two models by name."""
    folder = tmp_path_factory.mktemp("compare")
    done = draw(folder / "scenes", "--shards", "1", "--images", "4")
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


def compare(folder, out, content, monkeypatch, *words):
    path = out / "small.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(QUICK | content))
    argv = ["tools/compare.py", str(path), "--out", str(out), "--workers", "0", "--device", "cpu"]
    shards = ["--shards", str(folder / "scenes" / "*.tar")]
    monkeypatch.setattr(sys, "argv", [*argv, *shards, *words])
    return tools.compare.main()


def test_a_table_with_rows_that_are_kept(scenes, tmp_path, monkeypatch, capsys):
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
    computed = []
    real = tools.compare.compute_row
    monkeypatch.setattr(
        tools.compare, "compute_row", lambda *a: computed.append(a[4].seed) or real(*a)
    )
    assert compare(scenes, tmp_path / "out", content, monkeypatch) == 0 and computed == []
    content["everything"] = []
    assert compare(scenes, tmp_path / "out", content, monkeypatch, "--seed", "7") == 0
    assert computed == [7, 7]
    torn = next((tmp_path / "out/rows").iterdir())
    torn.write_text(torn.read_text()[:50])
    changed = load_model(rows[1]["checkpoint"])
    with torch.no_grad():
        changed.mask_decoder.iou_token.weight.add_(1)
    other = tmp_path / "other.safetensors"
    write_weights(Path(other), changed.state_dict(), model_header(changed))
    content["rows"][1]["checkpoint"] = str(other)
    before = len(computed)
    assert compare(scenes, tmp_path / "out", content, monkeypatch, "--seed", "7") == 0
    assert 1 <= len(computed) - before <= 2


def test_the_costs_are_counted(scenes):
    """Of a ViT without attention's products against its layers' sizes."""
    model = load_model(scenes / "vit.safetensors")
    costs = comparison.count_costs(model)
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
        assert ("↓" in tools.compare.cell(one, "box")) == marked
    assert tools.compare.cell({"miou": []}, "box") == "–"


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
    ],
)
def test_bad_input(content, says, scenes, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=says):
        compare(scenes, tmp_path / "out", content, monkeypatch)
    assert not (tmp_path / "out/comparison.json").exists()


def test_the_shipped_file_is_one():
    path = Path(tools.compare.__file__).parents[1] / "configs/compare/paper.yaml"
    argv = dict.fromkeys(("coco", "images", "samples", "masks", "seeds", "seed", "rounds"))
    args = tools.compare.argparse.Namespace(config=path, shards=["a.tar"], **argv)
    file, rows = tools.compare.read_file(args)
    assert len(rows) == 8 and file.everything == [16, 32, 64]
    assert {row.name: row.paper.get("box") for row in rows}["EfficientSAM-Ti"] == 75.7
