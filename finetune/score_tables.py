"""What tools/evaluate.py shows: mIoU by prompt, AP of instances, AR of proposals."""

from typing import Any

from finetune.evaluation import CHOICES
from finetune.instances import FILLED
from finetune.measures import PAPER, SIZES, SOURCE, TRIVIAL
from sami.core.tables import NONE, interval, percent, show_table

# How a box's mask was chosen, and what needs no model, as tables call them.
MASKS = {"predicted": "by predicted IoU", "box": "by IoU with box", FILLED: FILLED}


def show_miou(rows: list[dict[str, Any]], data: str | None) -> None:
    """Ours, under it what needs no model and, on the paper's own data set, the paper's figures."""
    table = []
    for row in rows:
        whole, *sizes = row["miou"].values()
        name = row["prompt"] if row["choice"] == CHOICES[0] else ""
        cells = [interval(whole), *(percent(info["mean"]) for info in sizes)]
        table.append([name, row["choice"], *cells])
        if row["choice"] in TRIVIAL and data is not None:
            for model, info in PAPER[data].items():
                if row["prompt"] in info:
                    figure = f"{info[row['prompt']]:.1f}"
                    table.append(["", f"{model} *", figure, *["-"] * len(sizes)])
    caption = (
        "In brackets: 95 % intervals. predicted: the mask that the model thinks best; oracle: the "
        "best of three. Without a model: the box filled; a disc at the clicks, of the one size "
        "that is best for these objects."
    )
    if data is not None:
        caption += f" *: the paper's ({SOURCE}, on {data}), not ours."
    show_table("mIoU in %", ["prompt", "mask", *SIZES], table, caption, words=2)


def show_instances(report: dict[str, Any]) -> None:
    """AP of masks and of their outlines, under it the filled box's and the boxes' own."""
    table = []
    for row in report["rows"]:
        cells = [percent(value) for value in row["segm"].values()]
        table.append([MASKS[row["mask"]], *cells, percent(row["boundary"]["AP"])])
    table.append(["the box, as box", *(percent(value) for value in report["box"].values()), NONE])
    caption = (
        f"{report['rules']}'s rules, {report['boxes']} boxes on {report['images']} images "
        f"({report['clipped']} cut off at the border, {report['outside']} outside: empty masks)."
    )
    show_table("AP in %", ["mask", *report["box"], "boundary AP"], table, caption)


def show_proposals(report: dict[str, Any], side: int) -> None:
    """AR of masks and of boxes, each with what needs no model."""
    table = []
    for key, kind in (("segm", "masks"), ("bbox", "boxes")):
        for row in report["rows"]:
            cells = [
                interval(info) if "@" in name else percent(info["mean"])
                for name, info in row[key].items()
            ]
            table.append([kind, row["proposals"], *cells])
    caption = (
        f"All masks of {side} x {side} clicks, {report['mean']:.0f} for each of {report['images']} "
        "images; the grid has as many. s, m, l: of 1,000. In brackets: 95 % intervals."
    )
    names = list(report["rows"][0]["segm"])
    show_table("AR in %", ["", "proposals", *names], table, caption, words=2)
