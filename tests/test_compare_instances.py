"""AP and AR side by side: evaluate's own numbers, kept with the row; FastSAM by its own rules."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from pycocotools import mask as coco_mask

import finetune.comparison as comparison
import tools.compare
import tools.evaluate
from finetune.candidates import FastSamCandidate
from finetune.comparison_table import columns_of
from finetune.fastsam import FastSam
from finetune.selection import select_by_box
from sami.core.errors import UserError
from tests.test_candidates import Bands
from tests.test_instances import write_model, write_scene

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
QUICK = {"rounds": 1, "masks": 2, "prompts": ["box"], "seeds": 1, "choose": "box", "proposals": 3}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = write_scene(tmp_path_factory.mktemp("scene"))
    for number in (0, 1):
        write_model(folder / f"{number}.safetensors", number)
    return folder


def call(main, monkeypatch, *words):
    argv = ["tool", *map(str, words), "--workers=0", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    return main()


def compare(scene, out, monkeypatch, *words, **changes):
    rows = [{"name": f"model {n}", "checkpoint": str(scene / f"{n}.safetensors")} for n in (0, 1)]
    content = QUICK | {"rows": rows, "boxes": str(scene / "boxes.json")} | changes
    out.mkdir(exist_ok=True)
    (out / "small.yaml").write_text(yaml.safe_dump(content))
    words = ("--coco", scene / "annotations.json", "--images", scene, "--out", out, *words)
    monkeypatch.setattr(comparison, "peak_memory", lambda *given: 0.125)
    return call(tools.compare.main, monkeypatch, out / "small.yaml", *words)


@pytest.mark.slow
def test_rows_have_evaluates_numbers_and_are_kept(scene, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert compare(scene, out, monkeypatch) == 0
    told = json.loads((out / "comparison.json").read_text())
    for number, row in enumerate(told["rows"]):
        words = (scene / f"{number}.safetensors", "--coco", scene / "annotations.json")
        words += ("--images", scene, "--boxes", scene / "boxes.json", "--choose=box")
        words += ("--proposals=3", "--out", tmp_path / str(number))
        assert call(tools.evaluate.main, monkeypatch, *words) == 0
        theirs = json.loads((tmp_path / str(number) / "evaluation.json").read_text())
        assert row["measured"]["instances"] == theirs["instances"]
        assert row["measured"]["proposals"] == theirs["proposals"]
    head, _, *lines = (out / "comparison.md").read_text().splitlines()
    for words in ("| AP by boxes, % |", "| boundary AP by boxes, % |", "| AR@1000 of boxes, % |"):
        assert words in head
    assert lines[2].startswith("| without a model |") and lines[2].count("–") == 6

    # The same again computes nothing; other boxes, another choice or other proposals do.
    computed, real = [], tools.compare.compute_row
    monkeypatch.setattr(
        tools.compare, "compute_row", lambda *given: computed.append(given[0].name) or real(*given)
    )
    assert compare(scene, out, monkeypatch) == 0 and computed == []
    assert compare(scene, out, monkeypatch, "--choose=predicted") == 0 and len(computed) == 2
    assert compare(scene, out, monkeypatch, "--proposals=2") == 0 and len(computed) == 4
    fewer = json.loads((scene / "boxes.json").read_text())[2:]
    (tmp_path / "boxes.json").write_text(json.dumps(fewer))
    words = ("--boxes", tmp_path / "boxes.json")
    assert compare(scene, out, monkeypatch, *words) == 0 and len(computed) == 6
    told = json.loads((out / "comparison.json").read_text())
    assert told["rows"][0]["measured"]["instances"]["boxes"] == len(fewer)

    # Wrong boxes are found out before anything is measured.
    (tmp_path / "boxes.json").write_text("[]")
    with pytest.raises(UserError, match="boxes.json is empty"):
        compare(scene, out, monkeypatch, *words, "--seed=5")
    assert len(computed) == 6
    # Without either, neither is measured nor shown.
    assert compare(scene, out, monkeypatch, boxes=None, proposals=None) == 0
    assert "AP by boxes" not in (out / "comparison.md").read_text()


@pytest.mark.parametrize(("ours", "marked"), [(0.2, True), (0.3, True), (0.4, False)])
def test_what_says_nothing_of_a_model_is_marked(ours, marked):
    def rows(value):
        info = {"mean": value, "low": value - 0.01, "high": value + 0.01}
        ar = {name: info for name in ("AR@10", "AR@100", "AR@1000")}
        ap = {"segm": {"AP": value}, "boundary": {"AP": value}}
        return ap, {"segm": ar, "bbox": ar}

    pairs = list(zip(rows(ours), rows(0.3), strict=True))
    one = {"miou": [], "everything": {}}
    one |= {
        name: {"rows": list(p)} for name, p in zip(("instances", "proposals"), pairs, strict=True)
    }
    columns = [column for column in columns_of([one], None) if "A" in column.head[:10]]
    assert len(columns) == 8
    for column in columns:
        assert ("↓" in column.cell(one)) == marked and f"{100 * ours:.1f}" in column.cell(one)
        assert column.trivial(one).startswith("30.0")


def test_fastsam_by_its_own_rules():
    """A box's mask is one of its instances, whatever ``choose`` says; its proposals are all."""
    bands = Bands()
    bands.args = types.SimpleNamespace(conf=0.4, max_det=100)
    model = FastSamCandidate(FastSam(bands))
    image = np.zeros((40, 60, 3), np.uint8)
    image[5:20, 10:30, 2], image[22:40, 30:50, 2] = 255, 100
    boxes = np.array([[10, 5, 30, 20], [3, 3, 3, 9], [10, 5, 50, 40]], float)
    given = torch.from_numpy(image).permute(2, 0, 1)
    found = [model.segment_boxes(given, (40, 60), boxes, choose) for choose in ("predicted", "box")]
    assert found[0] == found[1]
    masks = [coco_mask.decode(one).astype(bool) for one in found[0]]
    assert not masks[1].any()
    instances = model.model.instances.masks
    for number in (0, 2):
        assert (masks[number] == instances[select_by_box(instances, boxes[number])].numpy()).all()
    assert (masks[0] == (image[..., 2] > 200)).all() and (masks[2] == (image[..., 2] > 60)).all()

    limits = []
    real = bands.__class__.__call__

    class Watched(Bands):
        def __call__(self, images):
            limits.append((self.args.conf, self.args.max_det))
            return real(self, images)

    bands.__class__ = Watched
    found = model.propose(5)(image)
    assert len(found) == 4 and limits == [(0.001, 1000)]
    with contextlib.suppress(UserError):
        model.propose(5)(image.astype(float))
    assert (bands.args.conf, bands.args.max_det) == (0.4, 100)
