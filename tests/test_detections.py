"""Files of a detector's boxes that are none; where boxes lie."""

import json

import numpy as np
import pytest

from finetune.average_precision import Truth
from finetune.coco import read_coco
from finetune.detections import read_detections
from sami.core.errors import UserError
from tests.test_instances import write_scene

# pycocotools under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return write_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is not JSON"),
        ({"annotations": []}, "is no list; COCO's results are a list"),
        ([], "is empty"),
        ([3], "box 1 is no object"),
        ({"bbox": None}, "box 2 has a bbox that is not x, y, width, height"),
        ({"bbox": [1, 2, 3]}, "box 2 has a bbox that is not x, y, width, height"),
        ({"bbox": [1, 2, 3, "4"]}, "box 2 has the bbox '4', which is no finite number"),
        ({"bbox": [1, 2, float("nan"), 4]}, "box 2 has the bbox nan, which is no finite number"),
        ({"bbox": [1, 2, -3, 4]}, "box 2 has a negative width or height"),
        ({"score": float("inf")}, "box 2 has the score inf, which is no finite number"),
        ({"score": None}, "box 2 has the score None, which is no finite number"),
        ({"score": True}, "box 2 has the score True, which is no finite number"),
        ({"image_id": 12345}, "1 of 3 boxes have an unknown image_id, such as"),
        ({"image_id": None}, "have an unknown image_id, such as None"),
        ({"category_id": 4}, "have an unknown category_id, such as 4"),
        ({"category_id": [4]}, "have an unknown category_id"),
        *[(key, f"box 2 has no {key}") for key in ("image_id", "category_id", "bbox", "score")],
    ],
)
def test_boxes_that_are_none(content, says, scene, tmp_path):
    known = json.loads((scene / "boxes.json").read_text())[:3]
    if isinstance(content, dict) and "annotations" not in content:
        known[1] |= content
        content = known
    elif isinstance(content, str) and content != "[":
        known[1].pop(content)
        content = known
    path = tmp_path / "boxes.json"
    path.write_text(content if content == "[" else json.dumps(content))
    truth = Truth.of(read_coco(scene / "annotations.json"))
    with pytest.raises(UserError) as error:
        read_detections(path, truth)
    assert says in str(error.value) and str(path) in str(error.value)


def test_boxes_in_0_to_1(scene, tmp_path):
    known = json.loads((scene / "boxes.json").read_text())
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([one | {"bbox": [0.25, 0.5, 0.75, 0.25]} for one in known]))
    with pytest.raises(UserError, match="all boxes lie in 0..1"):
        read_detections(path, Truth.of(read_coco(scene / "annotations.json")))


def test_boxes_are_cut_to_their_image(scene, tmp_path):
    truth = Truth.of(read_coco(scene / "annotations.json"))
    name, image = next(iter(truth.images.items()))
    height, width = image["height"], image["width"]
    given = [
        ([3.5, 4, 10, 20], [3.5, 4, 13.5, 24]),
        ([-5, 4, 10, 20], [0, 4, 5, 24]),
        ([0, 0, width, height], [0, 0, width, height]),
        ([width - 4, height - 6, 9, 9], [width - 4, height - 6, width, height]),
        ([width + 1, 4, 9, 9], None),
        ([-20, 4, 20, 9], None),
        ([5, 5, 0, 9], None),
    ]
    boxes = [{"image_id": str(image["id"]), "category_id": 3.0, "score": 0.5} for _ in given]
    boxes = [one | {"bbox": bbox, "more": 1} for one, (bbox, _) in zip(boxes, given, strict=True)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    found = read_detections(tmp_path / "boxes.json", truth)
    assert (found.clipped, found.outside, len(found)) == (2, 3, 7)
    for box, (_, expected) in zip(found.boxes[name], given, strict=True):
        if expected is None:
            assert (box[2:] <= box[:2]).any()
        else:
            assert np.array_equal(box, expected)
    assert found.found[name] == [{k: v for k, v in one.items() if k != "more"} for one in boxes]
    assert all(not own for other, own in found.found.items() if other != name)
