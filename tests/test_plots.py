"""How figures look, whatever they show."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sami.core.plots import (
    OBJECTS,
    ink_on,
    integer_steps,
    line_style,
    new_figure,
    plain,
    save_png,
    widen,
)


@pytest.mark.parametrize(
    ("values", "low", "high", "expected"),
    [
        ((50, 50.1), 0, 100, (47.55, 52.55)),
        ((0.5, 0.6), 0, 100, (0, 5)),  # not below what a value can be
        ((99.5, 99.6), 0, 100, (95, 100)),  # nor above
        ((0.5, 0.6), None, None, (-1.95, 3.05)),
        ((10, 60), 0, 100, (10, 60)),  # wide enough
    ],
)
def test_an_axis_does_not_magnify_noise(values, low, high, expected):
    axis = new_figure(4, 3).add_subplot()
    axis.set_ylim(*values)
    widen(axis, 5, low, high)
    assert axis.get_ylim() == pytest.approx(expected)


def test_lines_differ_and_neighbours_in_more_than_colour():
    styles = [line_style(number) for number in range(7 * 7 * 4)]
    assert len({tuple(style.values()) for style in styles}) == len(styles)
    for one, other in zip(styles, styles[1:], strict=False):
        assert one["color"] != other["color"] and one["marker"] != other["marker"]


def test_steps_are_whole_numbers_in_full():
    axis = new_figure(4, 3).add_subplot()
    integer_steps(axis)
    axis.set_xlim(0, 3)
    assert list(axis.xaxis.get_major_locator()()) == [0, 1, 2, 3]
    assert axis.xaxis.get_major_formatter()(20_000) == "20,000"


def test_ink_is_read_on_every_colour():
    """The one with the higher contrast, by the luminance of WCAG 2, or nearly so."""

    def luminance(colour):
        parts = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for colour in OBJECTS:
        assert contrast(colour, ink_on(colour)) > 2.8
    assert ink_on("#ffd500") == "black" and ink_on("#0038d0") == "white"


def test_a_name_is_no_formula():
    assert plain("a$x$ \udcff") == r"a\$x\$ ?"


def test_a_image_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"as it was")

    def breaks_off(figure, file, **more):
        file.write_bytes(b"half")
        raise OSError("full")

    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", breaks_off)
        with pytest.raises(OSError, match="full"):
            save_png(new_figure(1, 1), path)
    assert path.read_bytes() == b"as it was"
    save_png(new_figure(1, 1), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
