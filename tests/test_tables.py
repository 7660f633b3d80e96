"""Tables for a terminal: 80 columns, whole numbers, and no word lost."""

import contextlib
import io
import os
import re
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sami.core.tables import paired, show_table, verdict

NAMES = st.text("abc/-_ [.]", min_size=1, max_size=90).map(lambda text: f"<{text}>")
NUMBERS = ("-", "75.76 ± 0.45", "75.8 (74.2-77.0)", "1,281,167 ± 3 (2 of 3)")


def shown(width, *words, **more):
    with (
        mock.patch.dict(os.environ, COLUMNS=str(width)),
        contextlib.redirect_stdout(io.StringIO()) as text,
    ):
        show_table(*words, **more)
    return text.getvalue()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 12), st.integers(0, 4), st.sampled_from([80, 100, 200]))
def test_a_table_fits_and_its_numbers_are_whole(data, columns, rows, width):
    several = st.lists(st.sampled_from(NUMBERS), min_size=columns, max_size=columns)
    head = ["setting", *data.draw(st.lists(NAMES, min_size=columns, max_size=columns))]
    body = [[data.draw(NAMES), *data.draw(several)] for _ in range(rows)]
    text = shown(width, "a title", head, body, "a caption")
    assert max(map(len, text.splitlines())) <= width
    cells = [cell for row in body for cell in row[1:]]
    for number in NUMBERS[1:]:
        assert text.count(number) == cells.count(number)
    every = re.sub(r"\s", "", text)
    assert "atitle" in every and "acaption" in every
    for row in body:  # folded among other cells, but there
        assert all(text.count(sign) >= row[0].count(sign) for sign in "abc[]")


def test_words_are_folded_and_columns_go_below():
    rows = [["a/name/of/a/run/" * 4, "75.76 ± 0.45"] + ["1.0"] * 3]
    text = shown(80, "t", ["run", *("a measure with a long name",) * 4], rows)
    assert text.count("75.76 ± 0.45") == 1 and text.count(" run") == 1
    text = shown(50, "t", ["run", *("a measure with a long name",) * 4], rows)
    assert text.count(" run ") == 2 and max(map(len, text.splitlines())) <= 50


def test_what_a_difference_allows_to_say():
    """The interval is Student's; nothing is concluded from one seed, or where it holds 0."""
    told = paired([0.02, 0.03, 0.04])
    assert told["mean"] == pytest.approx(0.03) and told["ahead"] == 3
    assert told["low"] == pytest.approx(0.03 - 4.302653 * 0.01 / 3**0.5, abs=1e-6)
    assert told["high"] == pytest.approx(0.03 + 4.302653 * 0.01 / 3**0.5, abs=1e-6)
    assert verdict(told, "SAMI", 0.5, 0.47, 0.4) == "SAMI is ahead"
    assert verdict(paired([-0.02, -0.03, -0.04]), "SAMI", 0.47, 0.5, 0.4) == "SAMI is behind"
    assert "the interval holds 0" in verdict(paired([0.02, -0.01, 0.04]), "SAMI", 0.5, 0.49, 0.4)
    assert "the interval holds 0" in verdict(paired([0.01, 0.05]), "SAMI", 0.5, 0.49, None)
    alone = paired([0.3])
    assert alone["low"] is alone["high"] is None
    assert verdict(alone, "SAMI", 0.8, 0.5, 0.4) == "no conclusion from one seed"
    assert "below the answer that needs no model" in verdict(told, "SAMI", 0.3, 0.27, 0.4)
