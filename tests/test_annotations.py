"""One broken annotation among good ones costs itself and nothing else."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation import EvalDataset, EvalSample
from finetune.rle import FOREIGN, MISFIT, parse_annotations
from sami.core.errors import BadSample
from sami.core.reading import RawSample
from sami.core.scanning import IMAGE
from tests.test_data_stage2 import HEIGHT, WIDTH, discs, maker, raw
from tests.test_evaluation import SHAPE, Given, paint
from tests.test_rle import JSON

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, NumPy 2
MASKS = list(discs(4))
GOOD = raw(MASKS)
TOLD = json.loads(GOOD.parts["json"])
for entry in TOLD["annotations"]:
    entry |= {"predicted_iou": 0.9, "stability_score": 0.95, "bbox": [0.0, 0.0, 9.0, 9.0], "id": 3}
HUGE = "9" * 400  # no float holds it
LONGER = "9" * 5000  # and this one Python does not read
OTHER_SIZE = "mask size differs from the image's"


def document(text, at=2):
    """The JSON with that text for one annotation."""
    marked = copy.deepcopy(TOLD)
    marked["annotations"][at] = "HERE"
    return json.dumps(marked).replace('"HERE"', text).encode()


def entry_with(**changes):
    """An annotation's JSON; values are JSON's own text."""
    told = copy.deepcopy(TOLD["annotations"][2])
    marked = told | {key: f"HERE {key}" for key in changes}
    text = json.dumps(marked)
    for key, value in changes.items():
        text = text.replace(f'"HERE {key}"', value)
    return text


def used_by(data):
    """Which masks training and evaluation find, and what is noted of the others."""
    sample = RawSample("a/b", GOOD.parts | {"json": data})
    rows, columns = (np.arange(16) * 4 + 2) * HEIGHT // 64, (np.arange(16) * 4 + 2) * WIDTH // 64
    _, _, _, masks, *_, unsure, left_out = maker(max_area=1.0).decode(sample, 0, False)
    noted = [f"object left out: {reason}" for reason, _ in left_out]
    assert not unsure and all(key == "a/b" for _, key in left_out)
    small = [mask[np.ix_(rows, columns)] for mask in MASKS]
    trained = {n for n, one in enumerate(small) if any((one == mask).all() for mask in masks)}
    (judged,) = EvalDataset(Given([sample]), SHAPE)
    assert isinstance(judged, EvalSample)
    found = [paint(ends, HEIGHT, WIDTH) for ends in judged.ends]
    judged_on = {n for n, one in enumerate(MASKS) if any((one == mask).all() for mask in found)}
    assert sorted(judged.notes) == sorted(noted)
    return trained, judged_on, noted


COUNTS = json.dumps(TOLD["annotations"][2]["segmentation"]["counts"])


def mask(size=f"[{HEIGHT}, {WIDTH}]", counts=COUNTS):
    return entry_with(segmentation=f'{{"size": {size}, "counts": {counts}}}')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("null", FOREIGN),
        ("[]", FOREIGN),
        ("7", FOREIGN),
        ('"text"', FOREIGN),
        ("{}", FOREIGN),
        (HUGE, FOREIGN),
        (LONGER, FOREIGN),
        ("-" + LONGER, FOREIGN),
        (entry_with(bbox="[1, 2]"), FOREIGN),
        (entry_with(bbox='"everywhere"'), FOREIGN),
        (entry_with(bbox=f"[0, 0, {HUGE}, 1]"), FOREIGN),
        (entry_with(bbox=f"[0, 0, {LONGER}, 1]"), FOREIGN),
        (entry_with(area=HUGE), FOREIGN),
        (entry_with(area=LONGER), FOREIGN),
        (entry_with(area="NaN"), FOREIGN),
        (entry_with(area="1e999"), FOREIGN),
        (entry_with(predicted_iou="null"), FOREIGN),
        (entry_with(stability_score="null"), FOREIGN),
        (entry_with(predicted_iou="Infinity"), FOREIGN),
        (entry_with(predicted_iou=f"-{HUGE}"), FOREIGN),
        (entry_with(stability_score=LONGER), FOREIGN),
        (entry_with(stability_score='"0.9"'), FOREIGN),
        (entry_with(segmentation="[[0, 0, 1, 1, 2, 2]]"), FOREIGN),
        (entry_with(segmentation="null"), FOREIGN),
        (mask(size=f"[{HUGE}, {LONGER}]"), FOREIGN),
        (mask(size=f"[{HUGE}, 3]"), OTHER_SIZE),
        (mask(size=f"[{WIDTH}, {HEIGHT}]"), OTHER_SIZE),
        (mask(counts="null"), FOREIGN),
        (mask(counts=f"[{HUGE}]"), MISFIT),
        (mask(counts=f"[3, {LONGER}]"), MISFIT),
        (mask(counts="[0, -1]"), MISFIT),
        (mask(counts='"' + "o" * 100_000 + '"'), MISFIT),
        (mask(counts='"' + "0" * 100_000 + '"'), MISFIT),
        (mask(counts='""'), MISFIT),
        (mask(counts='"\\u00e9"'), MISFIT),
    ],
)
def test_it_is_left_out_and_counted(text, reason):
    trained, judged_on, noted = used_by(document(text))
    assert trained == judged_on == {0, 1, 3}
    assert noted == [f"object left out: {reason}"]


@pytest.mark.parametrize("key", ["area", "bbox", "id"])
def test_null_is_as_missing(key):
    """Not so for the scores, which the file may leave out but not leave open."""
    told = parse_annotations(document(entry_with(**{key: "null"})))
    assert len(told.masks) == 4 and not told.left_out
    assert (told.masks[2].predicted_iou, told.masks[2].stability_score) == (0.9, 0.95)
    assert used_by(document(entry_with(**{key: "null"}))) == ({0, 1, 2, 3}, {0, 1, 2, 3}, [])


def test_where_none_is_left_the_sample_is_bad_by_their_reason():
    for text, reason in ((entry_with(bbox="[]"), FOREIGN), (mask(counts="[1]"), MISFIT)):
        data = json.dumps(TOLD | {"annotations": ["HERE", "HERE"]}).replace('"HERE"', text).encode()
        sample = RawSample("a/b", GOOD.parts | {"json": data})
        with pytest.raises(BadSample, match=f"^{reason}$"):
            maker().decode(sample, 0, False)
        assert list(EvalDataset(Given([sample]), SHAPE)) == [RawSample("a/b", reason=reason)]


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_whatever_one_holds_the_others_are_found(data):
    """Any value at any place of one annotation of four, at any place among them."""
    told, number = copy.deepcopy(TOLD), data.draw(st.integers(0, 3))
    holder, key = told["annotations"], number
    while data.draw(st.booleans()):
        inner = holder[key]
        if not isinstance(inner, dict | list) or not len(inner):
            break
        holder = inner
        key = data.draw(
            st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner)))
        )
    if isinstance(holder, dict) and data.draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = data.draw(JSON)
    text = json.dumps(told).encode()
    rest = {0, 1, 2, 3} - {number}
    if number and data.draw(st.booleans()):
        text = text.replace(b"0.95", LONGER.encode(), 1)  # of the first
        rest -= {0}
    trained, judged_on, noted = used_by(text)
    assert rest <= trained and rest <= judged_on and len(noted) <= 4 - len(rest)


def test_what_is_wrong_with_the_image_itself_stays_bad():
    for change in ({"image": {"height": HEIGHT}}, {"annotations": {}}, {"image": None}):
        sample = RawSample("a", {IMAGE: b"", "json": json.dumps(TOLD | change).encode()})
        with pytest.raises(BadSample, match=f"^{FOREIGN}$"):
            parse_annotations(sample.part("json"))
    told = copy.deepcopy(TOLD)
    told["image"]["drawn_on"] = "sideways"
    with pytest.raises(BadSample, match=f"^{FOREIGN}$"):
        parse_annotations(json.dumps(told).encode())
