"""One self-contained page about runs: curves over each other, pictures, evaluations, differences.

python tools/report.py RUN [RUN ...] [--comparison FILE] [--pictures N] [--out report.html]

RUN is a run folder of either stage or of classification; what tools/evaluate.py found below it
(evaluation/) comes along, or RUN is itself a folder of tools/evaluate.py's. Of a sweep's runs:
runs/sweeps/NAME/*/pretrain, for example. --comparison takes its table (OUT/comparison.json). The
page needs no network. Runs that differ in their seed alone are drawn as one, mean and deviation.
"""

import base64
import html
import io
import json
import os
import statistics
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from PIL import Image

from finetune.measures import TRIVIAL
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.errors import UserError, raise_if_machine
from sami.core.exits import run_entry
from sami.core.metrics import MetricsFile
from sami.core.options import Options
from sami.core.paths import exists, is_file, local_path
from sami.core.plots import integer_steps, legend_below, line_style, logarithmic, new_figure, widen
from sami.core.tables import Results

# The group of fields that only one entry has.
GROUPS = {"pretrain": "mask", "finetune": "prompt", "classify": "augment"}
QUALITY = 90  # of the page's JPEG: a tenth of the PNG that lies in the run's folder
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
  background: #fff; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
caption { text-align: left; color: #444 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } td, th { white-space: nowrap }
img { max-width: 100%; height: auto; cursor: zoom-in }
figure { margin: 1rem 0 } figcaption { color: #444 }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)) }
.plots figure { margin: 0 }
nav ul { columns: 16rem } code { background: #f3f3f3; padding: 0 .2rem; overflow-wrap: anywhere }
dialog { max-width: 100vw; max-height: 100vh; border: 0; padding: 0; overflow: auto }
dialog img { max-width: none; cursor: zoom-out } pre { overflow-x: auto }
"""
# A picture that is clicked is shown in its own size; another click, or Esc, closes it.
ZOOM = """
const large = document.querySelector("dialog");
document.addEventListener("click", (event) => {
  if (large.open) large.close();
  else if (event.target.tagName == "IMG") {
    large.replaceChildren(event.target.cloneNode());
    large.showModal();
  }
});
"""


class RunFolder:
    """What a run, or an evaluation, left behind.

    Attributes:
        name: what tells it from the others; set by :func:`name_apart`.
        kind: pretrain, finetune, classify, evaluate for the folder of an evaluation, or failed for
            a start that never became a run.
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
            if self.summary.get("status") == "failed" and not exists(path / "config.yaml"):
                self.kind = "failed"
            elif not exists(own):
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
                f"{path} is not the folder of a run that has begun ({why}); name one with "
                "summary.json, config.yaml and metrics.jsonl, or one of tools/evaluate.py; of a "
                "sweep, NAME/*/STAGE"
            ) from error

    @property
    def failure(self) -> str:
        """What became of a start that failed, as a sentence."""
        entry, why = self.summary.get("entry"), self.summary.get("error")
        return f"{self.path} is a start of {entry} that failed and left no run: {why}"

    @property
    def step(self) -> int:
        """Where the run stands: at its end, or in its last recorded line."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return self.summary.get("steps", last)

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


def picture(data: bytes, text: str, caption: str = "") -> str:
    """A PNG within the page; a drawn photograph, which is large as a PNG, as JPEG."""
    kind = "png"
    with Image.open(io.BytesIO(data)) as image:
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, "JPEG", quality=QUALITY, subsampling=0)
    if len(data) > 10**6 and smaller.tell() < len(data):
        data, kind = smaller.getvalue(), "jpeg"
    code = base64.b64encode(data).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    tag = f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{code}">'
    return f"<figure>{tag}{below}</figure>"


def settings_of(runs: list[RunFolder]) -> dict[str, list[RunFolder]]:
    """The runs that differ in nothing but their seed, together, by what their names share."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        seed = run.config.get("run.seed")
        told = {k: v for k, v in run.config.items() if k not in ("run.dir", "run.seed")}
        # What they start from lies in folders named by the seed, as a sweep has it.
        key = json.dumps(told).replace(f"seed-{seed}", "seed")
        twice = seed in [other.config.get("run.seed") for other in groups.get(key, [])]
        groups.setdefault(f"{key} {run.name}" if twice else key, []).append(run)
    named = {}
    for group in groups.values():
        names = [run.name for run in group]
        start = os.path.commonprefix(names)
        end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]
        shared = start.rstrip("-_").removesuffix("seed").rstrip("-_/") + end
        named[names[0] if len(names) == 1 or shared in named or not shared else shared] = group
    return named


def mean_and_std(group: list[RunFolder], name: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean over seeds and standard deviation (0 of one seed) where all recorded a number."""
    told = [dict(zip(*run.column(name), strict=True)) for run in group]
    told = [one for one in told if one]
    steps = sorted(set.intersection(*map(set, told))) if told else []
    values = [[one[step] for one in told] for step in steps]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return steps, [statistics.mean(v) for v in values], spread


def curve(groups: dict[str, list[RunFolder]], name: str, titled: str, marks: bool) -> str:
    """A plot of one number, all settings over each other, with a legend under it."""
    figure = new_figure(6.4, 4.2 + 0.22 * len(groups) / 2)
    axis = figure.add_subplot()
    scale = 100 if name in SHARES else 1
    handles, names, several = [], [], False
    for number, (label, group) in enumerate(groups.items()):
        steps, values, spread = mean_and_std(group, name)
        if not steps:
            continue
        values, spread = ([scale * value for value in told] for told in (values, spread))
        style = line_style(number) | {"marker": line_style(number)["marker"] if marks else ""}
        every = max(1, len(steps) // 12)
        (line,) = axis.plot(steps, values, linewidth=1.5, markersize=5, markevery=every, **style)
        if len(group) > 1:
            low = [value - one for value, one in zip(values, spread, strict=True)]
            high = [value + one for value, one in zip(values, spread, strict=True)]
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
            several, label = True, f"{label} ({len(group)} seeds)"
        handles.append(line)
        names.append(label if len(label) <= 48 else f"…{label[-47:]}")
    needs_none = needs_no_model(groups, name)
    if needs_none is not None:
        text, values = needs_none
        for value in values:
            line = axis.axhline(scale * value, color="#666666", linestyle=(0, (1, 1)))
        handles.append(line)
        names.append(f"without a model: {text}")
    unit = " (%)" if scale == 100 or name in PERCENT else ""
    axis.set(xlabel="step", ylabel=f"{titled}{unit}", title=titled)
    bound(axis, name, unit)
    integer_steps(axis)
    axis.grid(alpha=0.3)
    legend_below(figure, handles, names, 1 if max(map(len, names)) > 34 else 2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    band = "Line and band: mean over seeds, one standard deviation on either side." * several
    return picture(buffer.getvalue(), titled, band)


def needs_no_model(groups: dict[str, list[RunFolder]], name: str) -> tuple[str, list[float]] | None:
    """What a score is to be compared with: its name, and its value for each set of pictures."""
    if name == "val_r2":
        return "the best constant map", [0.0]
    if not name.startswith("val_miou"):
        return None
    runs = [run for group in groups.values() for run in group]
    told = [run.column(name.replace("miou", "trivial"))[1][-1:] for run in runs]
    values = sorted({round(value, 6) for one in told for value in one})
    return (TRIVIAL[not name.endswith("box")], values) if values else None


def bound(axis: Axes, name: str, unit: str) -> None:
    """An axis that does not magnify noise."""
    if name == "loss":
        logarithmic(axis)
    elif name == "data_wait":
        axis.set_ylim(0, max(10, axis.get_ylim()[1]))
    elif unit:
        widen(axis, 5, 0, 100)
    elif name == "val_r2":
        widen(axis, 0.1, None, 1)
    else:  # rates: from 0 on
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))


def curves(runs: list[RunFolder], columns: dict[str, str]) -> str:
    """A plot of each number that anyone recorded."""
    groups = settings_of(runs)
    names = [name for name in columns if any(run.column(name)[0] for run in runs)]
    drawn = "".join(curve(groups, name, columns[name], len(groups) > 1) for name in names)
    return f'<div class="plots">{drawn}</div>'


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
        for choice, chosen in CHOICES.items():
            there = {
                r["prompt"]: r["miou"]["all"] for r in found["results"] if r["choice"] in chosen
            }
            if not there:
                continue
            cells = [
                f"{percent(m['mean'])} ({percent(m['low'])}-{percent(m['high'])})" if m else "-"
                for m in (there.get(prompt) for prompt in prompts)
            ]
            size = f"{found['pictures']} / {found['objects']}"
            rows.append([name, choice, size, *cells])
    caption = (
        "mIoU in %; in brackets 95 % bootstrap intervals over pictures, which do not tell how "
        "another seed would end. predicted: the mask that the model thinks best; oracle: the best "
        "of three; without a model: the box filled, or a disc of one size at the clicks."
    )
    head = ["run", "mask", "pictures / objects", *prompts]
    return table(head, rows, caption)


def held_out(runs: list[RunFolder]) -> str:
    """What the runs measured themselves when they were finished."""
    told = {run.name: run.summary["evaluation"] for run in runs if run.summary.get("evaluation")}
    if not told:
        return ""
    names = list(dict.fromkeys(name for one in told.values() for name in one))
    rows = [
        [
            run,
            *(
                percent(one[n]) if f"val_{n}" in SHARES and n in one else short(one.get(n))
                for n in names
            ),
        ]
        for run, one in told.items()
    ]
    head = [f"{name}, %" if f"val_{name}" in SHARES | PERCENT else name for name in names]
    return "<h3>Held out, at the end</h3>" + table(["run", *head], rows)


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
    return "".join(parts)


def comparison(found: Results) -> str:
    """A sweep's table, paired differences, and what they allow to say."""
    text = table(*found.table(), found.title)
    if not found.differences():
        return text
    rows = []
    for one in found.differences():
        low, high = ("-" if one[end] is None else f"{one[end]:+.1f}" for end in ("low", "high"))
        told = [f"{one['first']} - {one['other']}", one["measure"], f"{one['mean']:+.1f}"]
        rows.append([*told, f"{low} to {high}", f"{one['ahead']} of {len(one['by_seed'])}"])
    head = ["paired by seed", "measure", "mean", "95 % interval", "ahead in seeds"]
    caption = "Differences in points, with the interval of their mean over seeds (t)"
    return text + table(head, rows, caption) + conclusions(found)


def conclusions(found: Results) -> str:
    """A sentence for each difference."""
    said = "".join(f"<li>{html.escape(line)}</li>" for line in found.conclusions())
    return f"<p>Compared, seed by seed:</p><ul>{said}</ul>" * bool(said)


def summary(runs: list[RunFolder], found: Results | None) -> str:
    """What there is and how it ended, first; of several seeds, together."""
    lines, alone, settings = [], 0, 0
    for kind, (title, _) in TITLES.items():
        groups = settings_of([run for run in runs if run.kind == kind])
        settings += len(groups)
        alone += sum(len(group) == 1 for group in groups.values())
        for name, group in groups.items():
            states = {f"{run.summary['status']} at step {run.step}" for run in group if run.summary}
            seeds = [f"{len(group)} seeds"] * (len(group) > 1)
            about = "; ".join([title, *seeds, *sorted(states)])
            lines.append(f"<li><b>{html.escape(name)}</b> ({about}): {results(group)}</li>")
    failures = [html.escape(run.failure) for run in runs if run.kind == "failed"]
    text = f"<ul>{''.join(lines)}</ul>" * bool(lines)
    text += "".join(f"<p>{sentence}</p>" for sentence in failures)
    if found is not None and found.conclusions():
        return text + conclusions(found)
    if settings > 1:
        text += "<p>Whether one setting is better than another is not concluded here."
        if alone:
            text += (
                f" {alone} of the {settings} settings have one seed: a difference between them may "
                "be chance; run more seeds (--run.seed)."
            )
        text += "</p>"
    return text


def results(group: list[RunFolder]) -> str:
    """The main numbers of a setting's runs, with what they are uncertain by and compared with."""
    told = [numbers(run) for run in group]
    names = list(dict.fromkeys(name for one in told for name in one))
    parts = []
    for name in names:
        there = [one[name] for one in told if name in one]
        digits = 1 if "%" in name else 3
        value = f"{statistics.mean(value for value, _, _ in there):.{digits}f}"
        if len(there) > 1:
            value += f" ± {statistics.stdev(value for value, _, _ in there):.{digits}f} over seeds"
        span, needs_none = there[0][1] if len(group) == 1 else "", there[0][2]
        behind = ", ".join(filter(None, [span, needs_none]))
        parts.append(f"{name} {value}" + f" ({behind})" * bool(behind))
    return html.escape("; ".join(parts)) or "not measured"


def numbers(run: RunFolder) -> dict[str, tuple[float, str, str]]:
    """A run's main numbers: value, interval over pictures, and what needs no model."""
    found: dict[str, tuple[float, str, str]] = {}
    if run.evaluation:
        told = {(r["prompt"], r["choice"]): r["miou"]["all"] for r in run.evaluation["results"]}
        for (prompt, choice), one in told.items():
            needs_none = next((told[prompt, c] for c in TRIVIAL if (prompt, c) in told), None)
            if choice == "predicted" and one["mean"] is not None:
                span = f"95 % of pictures' resamples {percent(one['low'])}-{percent(one['high'])}"
                without = f"without a model {percent(needs_none['mean'])}" if needs_none else ""
                found[f"mIoU in % by {prompt}"] = (100 * one["mean"], span, without)
        return found
    told = run.summary.get("evaluation") or {}
    if told.get("r2") is not None:
        found["r2"] = (told["r2"], "", "the best constant map 0")
    for name in PROMPTS:
        if told.get(f"miou_{name}") is not None:
            needs_none = told.get(f"trivial_{name}")
            without = "" if needs_none is None else f"without a model {percent(needs_none)}"
            value = 100 * told[f"miou_{name}"]
            found[f"mIoU in % by {name.replace('_', ' ')}"] = (value, "", without)
    if told.get("top1") is not None:
        share, count = told["top1"] / 100, told["pictures"]
        half = 196 * (share * (1 - share) / count) ** 0.5
        span = f"± {half:.1f}, the 95 % interval of {count:.0f} pictures"
        found["top-1 in %"] = (told["top1"], span, "")
    return found


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
                f"{told.get('status')}, {run.step} steps",
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
    return table(head, rows) if rows else ""


SPEED = {"lr": "learning rate", "images_per_second": "images/s", "data_wait": "data wait"}
COLUMNS = {
    "pretrain": {
        "loss": "loss",
        "val_r2": "r2, held out",
        "val_knn": "k-NN, held out",
        "val_linear": "linear probe, held out",
    },
    "finetune": {
        "loss": "loss",
        "val_miou_box": "mIoU by box, held out",
        "val_miou_1_click": "mIoU by 1 click, held out",
        "val_miou_3_clicks": "mIoU by 3 clicks, held out",
    },
    "classify": {"loss": "loss", "val_top1": "top-1, held out"},
}
PROMPTS = ("box", "1_click", "3_clicks")
SHARES = {"data_wait"} | {f"val_{k}_{p}" for k in ("miou", "trivial") for p in PROMPTS}  # 0 to 1
PERCENT = {"val_knn", "val_linear", "val_top1", "val_top5"}
CHOICES = {"predicted": ("predicted",), "oracle": ("oracle",), "without a model": TRIVIAL}
TITLES = {
    "pretrain": ("Stage 1: pretraining", "masked input, target, result"),
    "finetune": ("Stage 2: finetuning", "true masks, by box, by click"),
    "classify": ("Classification", ""),
    "evaluate": ("Masks", "true masks, by box, by click"),
}


def of_kind(runs: list[RunFolder], kind: str, most: int) -> str:
    """Curves, tables and pictures of the runs of one entry."""
    text, drawn = "", TITLES[kind][1]
    if kind in COLUMNS and runs:
        text = curves(runs, COLUMNS[kind] | SPEED) + held_out(runs) + differences(runs)
    for run in runs:
        files = run.pictures(most)
        text += f"<h3>{html.escape(run.name)}: {drawn}</h3>" if files else ""
        for when, file in files:
            text += picture(file.read_bytes(), f"{run.name}, {when}", when)
    return text


def page(runs: list[RunFolder], found: Results | None, most: int) -> str:
    """The whole of it."""
    name_apart(runs)
    trained = [run for run in runs if run.kind in COLUMNS]
    sections = {"Summary": summary(runs, found)}
    if found is not None:
        command = f"<p><code>{html.escape(found.command)}</code></p>"
        sections["Comparison"] = comparison(found) + command
    for kind, (title, _) in TITLES.items():
        sections[title] = of_kind([run for run in runs if run.kind == kind], kind, most)
    sections["Evaluation"] = evaluations(runs)
    sections["Environment"] = about(trained)
    sections["Configurations"] = whole_configs(trained)
    sections = {title: text for title, text in sections.items() if text}
    anchors = {title: f"section-{number}" for number, title in enumerate(sections)}
    contents = "".join(f'<li><a href="#{a}">{html.escape(t)}</a></li>' for t, a in anchors.items())
    body = "".join(
        f'<h2 id="{anchors[title]}">{html.escape(title)}</h2>{text}'
        for title, text in sections.items()
    )
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = (
        f"<h1>sami: report</h1><p>Made {now}, of {len(runs)} run(s). A picture that is clicked is "
        f"shown in full size.</p><nav><ul>{contents}</ul></nav>{body}<dialog></dialog>"
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sami: report of {now}</title><style>{STYLE}</style>"
    )
    script = f"<script>{ZOOM}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}{script}</body></html>\n'


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN")
    parser.add_argument(
        "--comparison", type=local_path, help="comparison.json of tools/sweep.py table"
    )
    parser.add_argument(
        "--pictures", type=int, default=6, help="of a run's training, first to last; default: 6"
    )
    parser.add_argument("--out", type=local_path, default=Path("report.html"))
    args = parser.parse_args()
    require(args.pictures >= 0, f"--pictures {args.pictures} must be 0 or more")
    found = None
    if args.comparison is not None:
        require(is_file(args.comparison), f"--comparison {args.comparison} does not exist")
        try:
            found = Results(**json.loads(args.comparison.read_bytes()))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"--comparison {args.comparison} is not what tools/sweep.py table writes "
                "(OUT/comparison.json); write it anew with the same command"
            ) from error
    runs = [RunFolder(path) for path in args.runs]
    for run in runs:
        if run.kind == "failed":
            print(run.failure)
    write_text(args.out, page(runs, found, args.pictures))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
