"""Tables of mIoU: means by size and choice, bootstrap intervals, and the tool that prints them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.coco import CocoSource, read_coco
from finetune.evaluation import Prompting
from finetune.measures import Measured, mean, resample
from finetune.model import DecoderConfig, build_model, export_header
from sami.core.checkpoint import write_weights
from sami.core.errors import UserError
from sami.core.shards import PICTURE
from sami.encoder import EncoderConfig
from tests.runs import ROOT, run
from tests.test_toy_shards import draw


def test_means_by_size_and_draw():
    promptings = (*Prompting.parse("box", 2), *Prompting.parse("1", 2))
    measured, rng = Measured(promptings), np.random.default_rng(0)
    told = [(rng.random((3, 2, k)), rng.integers(1, 20000, k)) for k in (3, 7, 1)]
    for iou, areas in told:
        measured.add(iou, areas)
    rows = measured.rows()
    names = [(row["prompt"], row["choice"]) for row in rows]
    assert names == [(p, c) for p in ("box", "1 click") for c in ("predicted", "oracle")]
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
    """Against a loop that draws pictures and averages their objects."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 6, 30)
    pictures = np.repeat(np.arange(30), counts)
    values = rng.random(len(pictures)) * 0.2 + rng.random(30)[pictures] * 0.8
    told = mean(values, pictures, resample(30, 0))
    slow = []
    for _ in range(3000):
        drawn = rng.integers(0, 30, 30)
        slow.append(np.concatenate([values[pictures == p] for p in drawn]).mean())
    low, high = np.quantile(slow, (0.025, 0.975))
    assert told["low"] == pytest.approx(low, abs=0.02)
    assert told["high"] == pytest.approx(high, abs=0.02)
    assert told["low"] < told["mean"] < told["high"]
    assert told["mean"] == pytest.approx(values.mean())
    nothing = mean(values[:0], pictures[:0], resample(30, 0))
    assert nothing == {"mean": None, "low": None, "high": None, "objects": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    encoder = EncoderConfig("custom", width=32, patch_size=8)
    model = build_model(encoder, DecoderConfig(width=32), 64, "square", False)
    write_weights(folder / "model.safetensors", model.state_dict(), export_header(model))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Drawn pictures in a folder, with COCO's JSON."""
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
    for text in ("box", "3 clicks, centre first", "oracle", "75.7 / 74.3", "3 pictures, 6 objects"):
        assert text in done.stdout
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["pictures"] == 3 and told["objects"] == 6 and len(told["results"]) == 10
    rows = {(row["prompt"], row["choice"]): row for row in told["results"]}
    assert len(rows["1 click", "oracle"]["draws"]) == 3
    whole = rows["box", "predicted"]["miou"]["all"]
    assert 0 <= whole["low"] <= whole["mean"] <= rows["box", "oracle"]["miou"]["all"]["mean"] <= 1
    assert told["model"]["decoder"] == "efficientsam" and told["paper"]["figures"]["SAM"]
    assert (tmp_path / "out" / "masks.png").stat().st_size > 10_000
    again = evaluate(*words, "--out", tmp_path / "out")
    assert again.returncode == 2 and "holds an evaluation already" in again.stderr


def test_coco_and_its_shards_give_the_same(model, coco, tmp_path):
    prompts = ("--prompts", "box", "centre-2")
    direct = evaluate(
        model,
        "--coco",
        coco / "annotations.json",
        "--pictures",
        coco,
        *prompts,
        "--out",
        coco / "a",
    )
    assert direct.returncode == 0, direct.stderr
    assert "4 pictures, 8 objects" in direct.stdout  # no crowds
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


def test_what_is_not_there_is_counted(coco, tmp_path, capsys):
    told = read_coco(coco / "annotations.json")
    (tmp_path / "2.png").write_bytes((coco / "2.png").read_bytes())
    source = CocoSource.of(told, coco / "annotations.json", tmp_path)
    assert len(source) == 1 and "3 of 4 annotated pictures are not in" in capsys.readouterr().out
    assert [sample.key for sample in source.read(0, 1)] == ["2.png"]
    (tmp_path / "2.png").unlink()
    (sample,) = source.read(0, 1)
    assert PICTURE not in sample.parts and "unreadable" in sample.reason
    with pytest.raises(UserError, match="holds none of the annotated pictures"):
        CocoSource.of(told, coco / "annotations.json", tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompts", "7"], "--prompts 7: this model takes 6 points at most"),
        (["--prompts", "clicks"], "--prompts clicks is none of box, a number of clicks"),
        (["--samples=0"], "--samples 0 must be positive"),
        (["--device=cuda:7"], "--device"),
        (["--pictures=nowhere"], "nowhere holds none of the annotated pictures"),
    ],
)
def test_bad_input(words, says, model, coco):
    if torch.cuda.is_available() and "cuda" in words[0]:
        pytest.skip("there is a GPU")
    given = ("--coco", coco / "annotations.json", "--pictures", coco)
    done = evaluate(model, *given, *words)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_no_model(coco):
    done = evaluate("nowhere", "--coco", coco / "annotations.json", "--pictures", coco)
    assert done.returncode == 2 and "nowhere does not exist" in done.stderr
