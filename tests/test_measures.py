"""Tables of mIoU: means by size and choice, bootstrap intervals, and the tool that prints them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.coco import CocoSource, read_coco
from finetune.measures import DATA_SETS, PAPER, Measured, data_set, mean, resample
from finetune.model import MaskDecoderConfig, build_model, model_header
from finetune.prompting import PromptSpec
from finetune.trivial import RADII
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.core.scanning import IMAGE
from sami.encoder import EncoderConfig
from tests.runs import ROOT, run
from tests.test_toy_shards import draw
from tools.evaluate import main


def test_means_by_size_and_draw():
    promptings = (*PromptSpec.parse("box", 2), *PromptSpec.parse("1", 2))
    measured, rng = Measured(promptings), np.random.default_rng(0)
    told = [(rng.random((3, 2, k)), rng.integers(1, 20000, k)) for k in (3, 7, 1)]
    count = len(RADII)
    trivial = [[rng.random((n, k)) for n in (1, count, count)] for k in (3, 7, 1)]
    for (iou, areas), answers in zip(told, trivial, strict=True):
        measured.add(iou, areas, answers)
    everything = measured.rows()
    names = [(row["prompt"], row["choice"]) for row in everything]
    assert names == [
        (prompt, choice)
        for prompt, needs_none in (("box", "filled box"), ("1 click", "constant disc"))
        for choice in ("predicted", "oracle", needs_none)
    ]
    box, disc = everything.pop(2), everything.pop(4)
    filled = np.concatenate([one[0][0] for one in trivial])
    assert box["miou"]["all"]["mean"] == pytest.approx(filled.mean()) and "radius" not in box
    # One radius for all objects and draws, the best.
    means = [
        np.mean([one[d][r].mean() * one[d].shape[1] for one in trivial for d in (1, 2)]) * 3 / 11
        for r in range(count)
    ]
    assert disc["miou"]["all"]["mean"] == pytest.approx(max(means))
    assert disc["radius"] == RADII[np.argmax(means)]
    rows = everything
    values = [told[p][0][:, 0, k] for p, count in enumerate((3, 7, 1)) for k in range(count)]
    areas = np.concatenate([one[1] for one in told])
    assert rows[0]["miou"]["all"]["mean"] == pytest.approx(np.mean([v[0] for v in values]))
    assert rows[2]["miou"]["all"]["mean"] == pytest.approx(np.mean([v[1:] for v in values]))
    assert rows[2]["draws"] == pytest.approx([np.mean([v[d] for v in values]) for d in (1, 2)])
    limits = {"S": (0, 1024), "M": (1024, 9216), "L": (9216, 1e9)}
    for size, (least, most) in limits.items():
        within = [v[0] for v, a in zip(values, areas, strict=True) if least <= a < most]
        assert rows[0]["miou"][size]["objects"] == len(within)
        if within:
            assert rows[0]["miou"][size]["mean"] == pytest.approx(np.mean(within))


def test_the_interval_is_the_bootstraps():
    """Against a loop that draws images and averages their objects."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 6, 30)
    images = np.repeat(np.arange(30), counts)
    values = rng.random(len(images)) * 0.2 + rng.random(30)[images] * 0.8
    told = mean(values, images, resample(30, 0))
    slow = []
    for _ in range(3000):
        drawn = rng.integers(0, 30, 30)
        slow.append(np.concatenate([values[images == p] for p in drawn]).mean())
    low, high = np.quantile(slow, (0.025, 0.975))
    assert told["low"] == pytest.approx(low, abs=0.02)
    assert told["high"] == pytest.approx(high, abs=0.02)
    assert told["low"] < told["mean"] < told["high"]
    assert told["mean"] == pytest.approx(values.mean())
    nothing = mean(values[:0], images[:0], resample(30, 0))
    assert nothing == {"mean": None, "low": None, "high": None, "objects": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    encoder = EncoderConfig("custom", width=32, patch_size=8)
    model = build_model(encoder, MaskDecoderConfig(width=32), 64, "square", False)
    write_weights(folder / "model.safetensors", model.state_dict(), model_header(model))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Drawn images in a folder, with COCO's JSON."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    told = {"images": [], "annotations": []}
    for number in range(4):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        address = f"http://images.cocodataset.org/val2017/{number}.png"
        name = {"coco_url": address} if number % 2 else {"file_name": f"{number}.png"}
        told["images"].append({"id": number, "width": 80, "height": 60, **name})
        for item in range(3):
            x, y, side = *rng.integers(0, 40, 2).tolist(), int(rng.integers(5, 40))
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
            told["annotations"].append(
                {"id": 3 * number + item, "image_id": number, "segmentation": [polygon]}
                | {"iscrowd": int(item == 0), "category_id": 1}
            )
    (folder / "annotations.json").write_text(json.dumps(told))
    return folder


def evaluate(*words):
    return run([sys.executable, str(ROOT / "tools/evaluate.py"), *map(str, words), "--workers=0"])


def test_on_shards(model, tmp_path):
    done = draw(tmp_path, "--shards", "2")
    shards = done.stdout.split(": ")[-1].strip()
    words = (model, "--shards", shards, "--samples=3", "--masks=2", "--overlays=2")
    done = evaluate(*words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for text in ("box", "oracle", "filled box", "constant disc", "3 images, 6 objects"):
        assert text in done.stdout
    table = done.stdout.split("mIoU in %")[1].split(str(model))[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "paper" not in done.stdout  # its numbers are not of these images
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["pictures"] == 3 and told["objects"] == 6 and len(told["results"]) == 15
    rows = {(row["prompt"], row["choice"]): row for row in told["results"]}
    assert len(rows["1 click", "oracle"]["draws"]) == 3
    whole = rows["box", "predicted"]["miou"]["all"]
    assert 0 <= whole["low"] <= whole["mean"] <= rows["box", "oracle"]["miou"]["all"]["mean"] <= 1
    assert told["model"]["decoder"] == "efficientsam"
    assert told["data"] is None and told["paper"] is None
    assert 0.3 < rows["box", "filled box"]["miou"]["all"]["mean"] <= 1
    assert (tmp_path / "out" / "masks.png").stat().st_size > 10_000
    again = evaluate(*words, "--out", tmp_path / "out")
    assert again.returncode == 2 and "holds an evaluation already" in again.stderr


def test_coco_and_its_shards_give_the_same(model, coco, tmp_path):
    prompts = ("--prompts", "box", "centre-2")
    direct = evaluate(
        model,
        "--coco",
        coco / "annotations.json",
        "--images",
        coco,
        *prompts,
        "--out",
        coco / "a",
    )
    assert direct.returncode == 0, direct.stderr
    assert "4 images, 8 objects" in direct.stdout  # no crowds
    told = json.loads((coco / "annotations.json").read_text())
    for image in told["images"]:
        image["file_name"] = f"{image['id']}.png"
    (tmp_path / "named.json").write_text(json.dumps(told))
    words = [ROOT / "tools/make_shards.py", coco, tmp_path / "shards", "--workers=1"]
    made = run([sys.executable, *map(str, words), "--coco", str(tmp_path / "named.json")])
    assert made.returncode == 0, made.stderr
    shards = str(tmp_path / "shards" / "*.tar")
    there = evaluate(model, "--shards", shards, *prompts, "--out", tmp_path / "b")
    assert there.returncode == 0, there.stderr
    results = [
        json.loads((p / "evaluation.json").read_text()) for p in (coco / "a", tmp_path / "b")
    ]
    a, b = ([row["miou"]["all"]["mean"] for row in one["results"]] for one in results)
    assert a == pytest.approx(b, abs=1e-6) and max(a) > 0


@pytest.mark.slow
def test_the_papers_figures_stand_on_its_own_data(model, coco, tmp_path, monkeypatch, capsys):
    """COCO's and LVIS's validation sets, whole, are known by their counts; no part of them is."""
    assert data_set(5000, 36781) == "COCO val2017" and data_set(19809, 244707) == "LVIS v1 val"
    assert data_set(5000, 36780) is data_set(4, 12) is None
    assert PAPER["COCO val2017"]["EfficientSAM-Ti"]["box"] == 75.7
    assert PAPER["LVIS v1 val"]["SAM"]["3 clicks"] == 75.2
    monkeypatch.setitem(DATA_SETS, "LVIS v1 val", (4, 12))
    words = [str(model), "--coco", str(coco / "annotations.json"), "--images", str(coco)]
    words += ["--prompts", "box", "centre-1", "--workers=0", "--device=cpu"]
    for number, (more, shown) in enumerate(
        (([], True), (["--samples=3"], False), (["--masks=1"], False))
    ):
        out = tmp_path / str(number)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, *more, "--out", str(out)])
        assert main() == 0
        said = capsys.readouterr().out
        table = said.split("mIoU in %")[1].split(str(model))[0]
        assert max(map(len, table.splitlines())) <= 80
        told = json.loads((out / "evaluation.json").read_text())
        assert ("on LVIS v1 val), not ours" in " ".join(said.split())) == shown
        found = [line.split() for line in said.splitlines() if "SAM" in line]
        if shown:  # for the box alone: the paper has no centre first
            figures = {"EfficientSAM-Ti": "74.3", "EfficientSAM-S": "75.4", "SAM": "78.9"}
            assert [one[0] for one in found if one[0] in figures] == list(figures)
            for one in figures.values():
                assert table.count(f" {one} ") == 1
            assert told["data"] == told["paper"]["data"] == "LVIS v1 val"
        else:
            assert "*" not in table and told["data"] is None and told["paper"] is None


def test_what_is_not_there_is_counted(model, coco, tmp_path):
    told = read_coco(coco / "annotations.json")
    (tmp_path / "2.png").write_bytes((coco / "2.png").read_bytes())
    source = CocoSource.of(told, tmp_path)
    assert len(source) == 1 and source.counts == {
        "pictures": 4,
        "found": 1,
        "annotated": 4,
        "annotated_and_found": 1,
    }
    assert [sample.key for sample in source.read(range(len(source)))] == ["2.png"]
    (tmp_path / "1.png").write_bytes(b"x")
    words = ("--coco", coco / "annotations.json", "--images", tmp_path, "--prompts", "box")
    done = evaluate(model, *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for words in (
        "4 images in the JSON: 2 found in ",
        "1 used with their masks, 0 without annotations, 1 left out {'not an image': 1}; 2 of",
    ):
        assert words in done.stdout
    told_there = json.loads((tmp_path / "out" / "evaluation.json").read_text())["in_the_json"]
    assert told_there["found"] == told_there["annotated_and_found"] == 2
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    (sample,) = source.read(range(len(source)))
    assert IMAGE not in sample.parts and "unreadable" in sample.reason
    with pytest.raises(UserError, match="holds none of the annotated images"):
        CocoSource.of(told, tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompts", "7"], "--prompts 7: this model takes 6 points at most"),
        (["--prompts", "clicks"], "--prompts clicks is none of box, a number of clicks"),
        (["--samples=0"], "--samples 0 must be positive"),
        (["--device=cuda:7"], "--device"),
        (["--images=nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input(words, says, model, coco):
    if torch.cuda.is_available() and "cuda" in words[0]:
        pytest.skip("there is a GPU")
    given = ("--coco", coco / "annotations.json", "--images", coco)
    done = evaluate(model, *given, *words)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_no_model(coco):
    done = evaluate("nowhere", "--coco", coco / "annotations.json", "--images", coco)
    assert done.returncode == 2 and "nowhere does not exist" in done.stderr
