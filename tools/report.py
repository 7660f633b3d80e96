"""One self-contained page about runs: curves, pictures, evaluations.

python tools/report.py RUN [RUN ...] [--comparison FILE] [--out report.html]

RUN is a run folder of either stage; an evaluation below it (evaluation/evaluation.json, of
tools/evaluate.py) comes along. --comparison takes what tools/chain.py wrote. The page needs no
network.
"""

import argparse
import base64
import html
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import UserError
from sami.core.exits import run_entry

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #555 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100% }
code { background: #f3f3f3; padding: 0 .2rem }
"""


class RunFolder:
    """What a run left behind."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: no run folder.
        """
        self.path, self.name = path, path.name
        try:
            self.summary = json.loads((path / "summary.json").read_text())
            lines = (path / "metrics.jsonl").read_text().splitlines()
            self.metrics = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is not the folder of a run ({error}); name one with summary.json and "
                "metrics.jsonl"
            ) from error

    @property
    def stage(self) -> int:
        """1 or 2."""
        return 2 if any("loss_dice" in line for line in self.metrics) else 1

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, where it was recorded."""
        told = [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]
        return [step for step, _ in told], [value for _, value in told]

    def last_picture(self) -> Path | None:
        """The evaluation's picture, or the newest that was drawn while training."""
        evaluated = self.path / "evaluation" / "masks.png"
        if evaluated.exists():
            return evaluated
        return max(self.path.glob("pictures/*.png"), default=None)

    def evaluation(self) -> dict[str, Any] | None:
        """What tools/evaluate.py found, if it was asked."""
        file = self.path / "evaluation" / "evaluation.json"
        return json.loads(file.read_text()) if file.exists() else None


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """An HTML table of plain texts."""

    def line(cells: Iterable[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = line(head, "th") + "".join(line(row, "td") for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{body}</table>"


def picture(data: bytes, text: str) -> str:
    """A PNG within the page."""
    code = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{code}">'


def curves(runs: list[RunFolder], columns: dict[str, str]) -> str:
    """One plot for each number, all runs over each other; of those that anyone recorded."""
    names = [name for name in columns if any(run.column(name)[0] for run in runs)]
    if not names:
        return ""
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for run in runs:
            steps, values = run.column(name)
            if steps:
                axis.plot(steps, values, label=run.name, linewidth=1, marker="." * (len(steps) < 9))
        axis.set(xlabel="step", title=columns[name])
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
    axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return picture(buffer.getvalue(), ", ".join(columns[name] for name in names))


def percent(value: float | None) -> str:
    """An mIoU as tables have it."""
    return "-" if value is None else f"{100 * value:.1f}"


def evaluations(runs: list[RunFolder]) -> str:
    """mIoU of the runs that were evaluated, with intervals over pictures."""
    told = {run.name: found for run in runs if (found := run.evaluation())}
    if not told:
        return ""
    prompts = [r["prompt"] for r in next(iter(told.values()))["results"] if r["choice"] == "oracle"]
    rows = []
    for name, found in told.items():
        for choice in ("predicted", "oracle"):
            by_prompt = {
                r["prompt"]: r["miou"]["all"] for r in found["results"] if r["choice"] == choice
            }
            cells = [
                f"{percent(m['mean'])} ({percent(m['low'])}-{percent(m['high'])})"
                for m in (by_prompt[p] for p in prompts if p in by_prompt)
            ]
            rows.append([name, choice, *cells])
    count = next(iter(told.values()))
    caption = (
        f"mIoU in % on {count['pictures']} pictures with {count['objects']} objects; 95 % "
        "bootstrap intervals over pictures. predicted: the mask that the model thinks best; "
        "oracle: the best of three."
    )
    return "<h2>Evaluation</h2>" + table(["run", "mask", *prompts], rows, caption)


def comparison(found: dict[str, Any]) -> str:
    """What tools/chain.py found: starts, seeds, paired differences, and what it amounts to."""
    measures = list(found["teacher"])

    def cell(values: list[float]) -> str:
        low, high = percent(min(values)), percent(max(values))
        return f"{percent(statistics.mean(values))} ({low}-{high})"

    rows = [["teacher", "-", "-", *(percent(found["teacher"][m]) for m in measures)]]
    for row in found["rows"]:
        rows.append(
            [
                row["start"],
                f"{row['pretraining_seconds']:.0f} s",
                f"{row['steps']} steps, {row['finetuning_seconds']:.0f} s",
                *(cell(row[m]) for m in measures),
            ]
        )
    head = ["start of the student", "pretraining", "finetuning", *measures]
    text = table(head, rows, "mIoU in %: mean over seeds (lowest-highest)")
    rows, verdicts = [], []
    for one in found["differences"]:
        sign = "{:+.1f}".format
        seeds = len(one["by_seed"])
        rows.append(
            [
                f"sami - {one['other']}",
                one["measure"],
                sign(100 * one["mean"]),
                f"{sign(100 * one['low'])} to {sign(100 * one['high'])}",
                f"{one['ahead']} of {seeds}",
            ]
        )
        word = "ahead of" if one["ahead"] == seeds else "not ahead of"
        if one["ahead"] not in (0, seeds):
            word = f"ahead only in {one['ahead']} of {seeds} seeds of"
        verdicts.append(f"{one['measure']}: {word} {one['other']}")
    if not rows:
        return f"<h2>Comparison</h2>{text}"
    head = ["paired by seed", "prompt", "mean", "range", "ahead in seeds"]
    said = "The SAMI-pretrained student is, by " + "; by ".join(verdicts) + "."
    text += table(head, rows, "Differences of mIoU, in points") + f"<p>{html.escape(said)}</p>"
    return f"<h2>Comparison</h2>{text}"


def about(runs: list[RunFolder]) -> str:
    """Where the runs were made."""
    rows = []
    for run in runs:
        told, hardware = run.summary, run.summary.get("hardware", {})
        machine = f"{hardware.get('processes')} x {hardware.get('gpu') or 'CPU'}"
        threads = f"{machine}, {hardware.get('threads')} thread(s)"
        steps = f"{told['status']}, {told.get('steps', '-')} steps"
        rows.append([run.name, steps, threads, str(told.get("commit"))[:60]])
    return "<h2>Runs</h2>" + table(["run", "state", "machine", "commit"], rows)


STAGE_1 = {"loss": "loss", "val_r2": "r2 on held-out pictures", "lr": "learning rate"}
STAGE_2 = {
    "loss": "loss",
    "val_miou_box": "mIoU by box, held-out",
    "val_miou_1_click": "mIoU by 1 click, held-out",
}


def page(runs: list[RunFolder], found: dict[str, Any] | None) -> str:
    """The whole of it."""
    parts = ["<h1>sami: report</h1>"]
    if found is not None:
        parts += [comparison(found), f"<p><code>{html.escape(found['command'])}</code></p>"]
    of_stage: dict[int, list[RunFolder]] = {1: [], 2: []}
    for run in runs:
        of_stage[run.stage].append(run)
    sections: list[tuple[int, str, dict[str, str], Callable[[RunFolder], str]]] = [
        (1, "Stage 1: pretraining", STAGE_1, lambda r: f"{r.name}: masked input, target, result"),
        (2, "Stage 2: finetuning", STAGE_2, lambda r: f"{r.name}: true masks, by box, by click"),
    ]
    for stage, title, columns, caption in sections:
        if of_stage[stage]:
            parts += [f"<h2>{title}</h2>", curves(of_stage[stage], columns)]
        for run in of_stage[stage]:
            file = run.last_picture()
            if file is not None:
                text = caption(run)
                parts += [f"<h3>{html.escape(text)}</h3>", picture(file.read_bytes(), text)]
    parts += [evaluations(runs), about(runs)]
    head = f'<meta charset="utf-8"><title>sami: report</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--comparison", type=Path, help="comparison.json of tools/chain.py")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    args = parser.parse_args()
    found = None
    if args.comparison is not None:
        require(args.comparison.is_file(), f"--comparison {args.comparison} does not exist")
        found = json.loads(args.comparison.read_text())
    write_text(args.out, page([RunFolder(path) for path in args.runs], found))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
