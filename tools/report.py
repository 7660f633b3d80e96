"""One self-contained page about runs: curves over each other, pictures, evaluations, differences.

python tools/report.py RUN [RUN ...] [--comparison FILE] [--pictures N] [--out report.html]

RUN is a run folder of either stage or of classification; what tools/evaluate.py found below it
(evaluation/) comes along, or RUN is itself a folder of tools/evaluate.py's. Of a sweep's runs:
runs/sweeps/NAME/*/pretrain, for example. --comparison takes what tools/chain.py wrote. The page
needs no network.
"""

import base64
import html
import io
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import UserError, raise_if_machine
from sami.core.exits import run_entry
from sami.core.metrics import MetricsFile
from sami.core.options import Options
from sami.core.paths import exists, is_file, local_path

# The group of fields that only one entry has.
GROUPS = {"pretrain": "mask", "finetune": "prompt", "classify": "augment"}
COLORS, LINES = colormaps["tab10"], ("-", "--", ":", "-.")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
caption { text-align: left; color: #555 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100% }
code { background: #f3f3f3; padding: 0 .2rem }
"""


class RunFolder:
    """What a run, or an evaluation, left behind.

    Attributes:
        name: what tells it from the others; set by :func:`name_apart`.
        kind: pretrain, finetune, classify, or evaluate for the folder of an evaluation.
        config: every field, as group.field.
        evaluation: what tools/evaluate.py found, if it was asked.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: neither.
        """
        self.path, self.name = path.resolve(), path.name
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.kind = "evaluate"
        own = path / "evaluation.json"
        self.drawn = path if exists(own) else path / "evaluation"
        try:
            if not exists(own):
                self.summary = json.loads((path / "summary.json").read_bytes())
                groups = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
                self.config = {f"{g}.{f}": v for g, told in groups.items() for f, v in told.items()}
                self.metrics = MetricsFile(path / "metrics.jsonl").read()
                named = [kind for kind, group in GROUPS.items() if group in groups]
                self.kind = named[0]
            self.evaluation = None
            if exists(self.drawn / "evaluation.json"):
                self.evaluation = json.loads(
                    (self.drawn / "evaluation.json").read_text(encoding="utf-8")
                )
        except (OSError, ValueError, AttributeError, IndexError, yaml.YAMLError) as error:
            raise_if_machine(error, path)
            why = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise UserError(
                f"{path} is not the folder of a run ({why}); name one with summary.json, "
                "config.yaml and metrics.jsonl, or one of tools/evaluate.py; of a sweep, "
                "NAME/*/STAGE"
            ) from error

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, where it was recorded."""
        told = [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]
        return [step for step, _ in told], [value for _, value in told]

    def pictures(self, most: int) -> list[tuple[str, Path]]:
        """What was drawn while training, first to last, ``most`` of them, evenly; and after it."""
        drawn = sorted(self.path.glob("pictures/*.png"))
        count = min(most, len(drawn))
        places = [round(i * (len(drawn) - 1) / max(count - 1, 1)) for i in range(count)]
        found = [(self._when(drawn[place]), drawn[place]) for place in places or ()]
        masks = self.drawn / "masks.png"
        return found + [("evaluated", masks)] * exists(masks)

    def _when(self, picture: Path) -> str:
        """The step, and the epoch where the run knows its epochs, of a picture's name."""
        step = int(picture.stem.rpartition("-")[2])
        pictures = (self.summary.get("data") or {}).get("pictures")
        batch = self.config.get("train.batch_size")
        epoch = f", epoch {step * batch / pictures:.3g}" if pictures and batch else ""
        return f"step {step}{epoch}"


def name_apart(runs: list[RunFolder]) -> None:
    """Name each by as much of its path as tells it from the others."""
    for parts in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-parts:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"{twice} is named twice; name each run once")
    for run, name in zip(runs, names, strict=True):
        run.name = name


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """An HTML table of plain texts."""

    def line(cells: Iterable[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = line(head, "th") + "".join(line(row, "td") for row in rows)
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{above}{body}</table>"


def picture(data: bytes, text: str) -> str:
    """A PNG within the page."""
    code = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{code}">'


def curves(runs: list[RunFolder], columns: dict[str, str]) -> str:
    """One plot for each number, all runs over each other; of those that anyone recorded."""
    names = [name for name in columns if any(run.column(name)[0] for run in runs)]
    if not names:
        return ""
    lines = -(-len(names) // 3)
    figure = Figure(figsize=(15, 3.6 * lines + 0.25 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 3, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=False):
        for number, run in enumerate(runs):
            steps, values = run.column(name)
            style = {"color": COLORS(number % 10), "linestyle": LINES[number // 10 % len(LINES)]}
            if steps:
                marker = "." * (len(steps) < 9)
                (line,) = axis.plot(steps, values, linewidth=1, marker=marker, **style)
                handles.setdefault(run.name, line)
        axis.set(xlabel="step", title=columns[name])
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
    columns_of_legend = max(1, 150 // max(map(len, handles)))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower left",
        fontsize=8,
        ncols=min(columns_of_legend, 6),
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return picture(buffer.getvalue(), ", ".join(columns[name] for name in names))


def percent(value: float | None) -> str:
    """An mIoU as tables have it."""
    return "-" if value is None else f"{100 * value:.1f}"


def short(value: Any) -> str:
    """A number as tables have it."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return "-" if value is None else str(value)


def evaluations(runs: list[RunFolder]) -> str:
    """mIoU of what was evaluated, with intervals over pictures."""
    told = {run.name: run.evaluation for run in runs if run.evaluation}
    if not told:
        return ""
    prompts = list(dict.fromkeys(r["prompt"] for one in told.values() for r in one["results"]))
    rows = []
    for name, found in told.items():
        for choice in ("predicted", "oracle"):
            there = {
                r["prompt"]: r["miou"]["all"] for r in found["results"] if r["choice"] == choice
            }
            cells = [
                f"{percent(m['mean'])} ({percent(m['low'])}-{percent(m['high'])})" if m else "-"
                for m in (there.get(prompt) for prompt in prompts)
            ]
            size = f"{found['pictures']} / {found['objects']}"
            rows.append([name, choice, size, *cells])
    caption = (
        "mIoU in %; 95 % bootstrap intervals over pictures. predicted: the mask that the model "
        "thinks best; oracle: the best of three."
    )
    head = ["run", "mask", "pictures / objects", *prompts]
    return "<h2>Evaluation</h2>" + table(head, rows, caption)


def held_out(runs: list[RunFolder]) -> str:
    """What the runs measured themselves when they were finished."""
    told = {run.name: run.summary["evaluation"] for run in runs if run.summary.get("evaluation")}
    if not told:
        return ""
    names = list(dict.fromkeys(name for one in told.values() for name in one))
    rows = [[run, *(short(one.get(name)) for name in names)] for run, one in told.items()]
    return "<h3>Held out, at the end</h3>" + table(["run", *names], rows)


def differences(runs: list[RunFolder]) -> str:
    """The fields in which runs of a kind differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = []
    for name in names:
        values = [json.dumps(run.config.get(name)) for run in runs]
        if len(set(values)) > 1 and name != "run.dir":
            rows.append([name, *values])
    if len(runs) < 2:
        return ""
    if not rows:
        return "<h3>Configurations</h3><p>The same but for the folder.</p>"
    caption = "the fields that differ; all others are the same"
    return "<h3>Configurations</h3>" + table(["field", *(r.name for r in runs)], rows, caption)


def whole_configs(runs: list[RunFolder]) -> str:
    """Every field of every run, folded away."""
    parts = []
    for run in runs:
        text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in run.config.items())
        parts.append(
            f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(text)}</pre>"
            "</details>"
        )
    return "<h2>Configurations</h2>" + "".join(parts) if parts else ""


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
    """Where the runs were made, and from what."""
    rows = []
    for run in runs:
        told, hardware = run.summary, run.summary.get("hardware") or {}
        machine = f"{hardware.get('processes')} x {hardware.get('gpu') or 'CPU'}"
        threads = f"{machine}, {hardware.get('threads')} thread(s), {hardware.get('precision')}"
        teacher = told.get("teacher") or {}
        learnt = f"{teacher.get('name')} {str(teacher.get('sha256') or '')[:12]}".strip()
        data = told.get("data") or {}
        rows.append(
            [
                run.name,
                f"{told.get('status')}, {told.get('steps', '-')} steps",
                threads,
                f"{data.get('pictures')} ({data.get('fingerprint')})",
                learnt if teacher else "-",
                ", ".join(f"{c} {why}" for why, c in (told.get("bad_samples") or {}).items())
                or "0",
                ", ".join(f"{name} {v}" for name, v in (told.get("versions") or {}).items()),
                str(told.get("commit"))[:60],
            ]
        )
    head = ["run", "state", "machine", "pictures", "teacher", "bad samples", "versions", "commit"]
    return "<h2>Environment</h2>" + table(head, rows) if rows else ""


SPEED = {"lr": "learning rate", "images_per_second": "images/s", "data_wait": "data wait"}
COLUMNS = {
    "pretrain": {
        "loss": "loss",
        "val_r2": "r2 on held-out pictures",
        "val_knn": "k-NN, held-out, %",
        "val_linear": "linear probe, held-out, %",
    },
    "finetune": {
        "loss": "loss",
        "val_miou_box": "mIoU by box, held-out",
        "val_miou_1_click": "mIoU by 1 click, held-out",
        "val_miou_3_clicks": "mIoU by 3 clicks, held-out",
    },
    "classify": {"loss": "loss", "val_top1": "top-1, held-out, %"},
}
TITLES = {
    "pretrain": ("Stage 1: pretraining", "masked input, target, result"),
    "finetune": ("Stage 2: finetuning", "true masks, by box, by click"),
    "classify": ("Classification", ""),
    "evaluate": ("Masks", "true masks, by box, by click"),
}


def page(runs: list[RunFolder], found: dict[str, Any] | None, most: int) -> str:
    """The whole of it."""
    name_apart(runs)
    parts = ["<h1>sami: report</h1>"]
    if found is not None:
        parts += [comparison(found), f"<p><code>{html.escape(found['command'])}</code></p>"]
    trained = [run for run in runs if run.kind != "evaluate"]
    for kind, (title, drawn) in TITLES.items():
        of_kind = [run for run in runs if run.kind == kind]
        pictures = [(run, run.pictures(most)) for run in of_kind]
        if kind in COLUMNS and of_kind:
            parts += [f"<h2>{title}</h2>", curves(of_kind, COLUMNS[kind] | SPEED)]
            parts += [held_out(of_kind), differences(of_kind)]
        for run, files in pictures:
            if files:
                parts.append(f"<h3>{html.escape(run.name)}: {drawn}</h3>")
            for when, file in files:
                parts.append(f"<p>{html.escape(when)}</p>")
                parts.append(picture(file.read_bytes(), f"{run.name}, {when}"))
    parts += [evaluations(runs), about(trained), whole_configs(trained)]
    head = f'<meta charset="utf-8"><title>sami: report</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN")
    parser.add_argument("--comparison", type=local_path, help="comparison.json of tools/chain.py")
    parser.add_argument(
        "--pictures", type=int, default=6, help="of a run's training, first to last; default: 6"
    )
    parser.add_argument("--out", type=local_path, default=Path("report.html"))
    args = parser.parse_args()
    require(args.pictures >= 0, f"--pictures {args.pictures} must be 0 or more")
    found = None
    if args.comparison is not None:
        require(is_file(args.comparison), f"--comparison {args.comparison} does not exist")
        found = json.loads(args.comparison.read_bytes())
    runs = [RunFolder(path) for path in args.runs]
    write_text(args.out, page(runs, found, args.pictures))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
