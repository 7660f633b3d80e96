"""One self-contained page about runs: curves over each other, images, evaluations, differences.

python tools/report.py RUN [RUN ...] [--comparison FILE] [--images N] [--out report.html]

RUN is a run folder of either stage or of classification; what tools/evaluate.py found below it
(evaluation/) comes along, or RUN is itself a folder of tools/evaluate.py's. Of a sweep's runs:
runs/sweeps/NAME/*/pretrain, for example. --comparison takes its table (OUT/comparison.json). The
page needs no network. Runs that differ in their seed alone are drawn as one, mean and deviation.
"""

import base64
import html
import io
import json
import statistics
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from finetune.measures import TRIVIAL
from finetune.runfolder import (
    PROMPT_NAMES,
    TO_TEACHER,
    RunFolder,
    mean_and_std,
    name_apart,
    settings_of,
)
from sami.core.checkpoint import write_text
from sami.core.config import require
from sami.core.entries import ENTRIES
from sami.core.errors import UserError
from sami.core.exits import run_entry
from sami.core.options import Options, require_least
from sami.core.paths import is_file, local_path
from sami.core.plots import integer_steps, legend_below, line_style, logarithmic, new_figure, widen
from sami.core.tables import Results, interval, percent

QUALITY = 90  # of the page's JPEG: a tenth of the PNG that lies in the run's folder


def table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """An HTML table of plain texts."""

    def line(cells: Iterable[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    above = f"<caption>{html.escape(caption)}</caption>" * bool(caption)
    return f"<table>{above}{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def image(data: bytes, text: str, caption: str = "") -> str:
    """A PNG within the page; a drawn photograph, which is large as a PNG, as JPEG."""
    kind = "png"
    with Image.open(io.BytesIO(data)) as image:
        smaller = io.BytesIO()
        image.convert("RGB").save(smaller, "JPEG", quality=QUALITY, subsampling=0)
    if len(data) > 10**6 and smaller.tell() < len(data):
        data, kind = smaller.getvalue(), "jpeg"
    code = base64.b64encode(data).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" * bool(caption)
    tag = f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{code}">'
    return f"<figure>{tag}{below}</figure>"


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
        values, spread = scale * np.array(values), scale * np.array(spread)
        style = line_style(number) | {"marker": line_style(number)["marker"] if marks else ""}
        every = max(1, len(steps) // 12)
        (line,) = axis.plot(steps, values, linewidth=1.5, markersize=5, markevery=every, **style)
        if len(group) > 1:
            band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
            axis.fill_between(steps, values - spread, values + spread, **band)
            several, label = True, f"{label} ({len(group)} seeds)"
        handles.append(line)
        names.append(label if len(label) <= 48 else f"…{label[-47:]}")
    text, trivial = needs_no_model(groups, name)
    for value in trivial:
        line = axis.axhline(scale * value, color="#666666", linestyle=(0, (1, 1)))
    if trivial:
        handles.append(line)
        names.append(f"without a model: {text}")
    unit = " (%)" if scale == 100 or name in IN_PERCENT else ""
    axis.set(xlabel="step", ylabel=f"{titled}{unit}", title=titled)
    bound(axis, name, unit)
    integer_steps(axis)
    axis.grid(alpha=0.3)
    legend_below(figure, handles, names, 1 if max(map(len, names)) > 34 else 2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    caption = "Line and band: mean over seeds, one standard deviation on either side." * several
    return image(buffer.getvalue(), titled, caption)


def needs_no_model(groups: dict[str, list[RunFolder]], name: str) -> tuple[str, list[float]]:
    """What a score is to be compared with: its name, and its value for each set of images."""
    if name == "val_r2":
        return "the best constant map", [0.0]
    if not name.startswith("val_miou"):
        return "", []
    runs = [run for group in groups.values() for run in group]
    info = [run.column(name.replace("miou", "trivial"))[1][-1:] for run in runs]
    values = sorted({round(value, 6) for one in info for value in one})
    return TRIVIAL[not name.endswith("box")], values


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


def short(value: Any) -> str:
    """A number as tables have it."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return "-" if value is None else str(value)


def evaluations(runs: list[RunFolder]) -> str:
    """mIoU of what was evaluated, with intervals over images."""
    info = {run.name: run.evaluation for run in runs if run.evaluation}
    if not info:
        return ""
    prompts = list(dict.fromkeys(r["prompt"] for one in info.values() for r in one["results"]))
    rows = []
    for name, found in info.items():
        for choice, chosen in ROWS.items():
            results = [result for result in found["results"] if result["choice"] in chosen]
            there = {result["prompt"]: result["miou"]["all"] for result in results}
            if not there:
                continue
            cells = [interval(there[prompt]) if prompt in there else "-" for prompt in prompts]
            size = f"{found['pictures']} / {found['objects']}"
            rows.append([name, choice, size, *cells])
    caption = (
        "mIoU in %; in brackets 95 % bootstrap intervals over images, which do not tell how "
        "another seed would end. predicted: the mask that the model thinks best; oracle: the best "
        "of three; without a model: the box filled, or a disc of one size at the clicks."
    )
    head = ["run", "mask", "images / objects", *prompts]
    return table(head, rows, caption)


def held_out(runs: list[RunFolder]) -> str:
    """What the runs measured themselves when they were finished."""
    info = {run.name: run.summary["evaluation"] for run in runs if run.summary.get("evaluation")}
    if not info:
        return ""
    names = list(dict.fromkeys(name for one in info.values() for name in one))

    def cell(one: dict[str, Any], name: str) -> str:
        known = f"val_{name}" in SHARES and name in one
        return percent(one[name]) if known else short(one.get(name))

    rows = [[run, *(cell(one, name) for name in names)] for run, one in info.items()]
    head = [f"{name}, %" if f"val_{name}" in SHARES | IN_PERCENT else name for name in names]
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
    text = ""
    for run in runs:
        fields = "".join(f"{name}: {json.dumps(value)}\n" for name, value in run.config.items())
        text += f"<details><summary>{html.escape(run.name)}</summary>"
        text += f"<pre>{html.escape(fields)}</pre></details>"
    return text


def comparison(found: Results) -> str:
    """A sweep's table, paired differences, and what they allow to say."""
    text = table(*found.table(), found.title)
    if not found.differences():
        return text
    rows = []
    for one in found.differences():
        low, high = ("-" if one[end] is None else f"{one[end]:+.1f}" for end in ("low", "high"))
        info = [f"{one['first']} - {one['other']}", one["measure"], f"{one['mean']:+.1f}"]
        rows.append([*info, f"{low} to {high}", f"{one['ahead']} of {len(one['by_seed'])}"])
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
    failures = [run.failure for run in runs if run.kind == "failed"]
    text = f"<ul>{''.join(lines)}</ul>" * bool(lines)
    text += "".join(f"<p>{html.escape(sentence)}</p>" for sentence in failures)
    if found is not None and found.conclusions():
        return text + conclusions(found)
    if settings > 1:
        chance = (
            f" {alone} of the {settings} settings have one seed: a difference between them may be "
            "chance; run more seeds (--run.seed)."
        ) * bool(alone)
        text += f"<p>Whether one setting is better than another is not concluded here.{chance}</p>"
    return text


def results(group: list[RunFolder]) -> str:
    """The main numbers of a setting's runs, with what they are uncertain by and compared with."""
    info = [run.numbers for run in group]
    names = list(dict.fromkeys(name for one in info for name in one))
    parts = []
    for name in names:
        there = [one[name] for one in info if name in one]
        digits = 1 if "%" in name else 3
        value = f"{statistics.mean(value for value, _, _ in there):.{digits}f}"
        if len(there) > 1:
            value += f" ± {statistics.stdev(value for value, _, _ in there):.{digits}f} over seeds"
        span, needs_none = there[0][1] if len(group) == 1 else "", there[0][2]
        behind = ", ".join(filter(None, [span, needs_none]))
        parts.append(f"{name} {value}" + f" ({behind})" * bool(behind))
    return html.escape("; ".join(parts)) or "not measured"


def about(runs: list[RunFolder]) -> str:
    """Where the runs were made, and from what."""
    rows = []
    for run in runs:
        info, hardware = run.summary, run.summary.get("hardware") or {}
        machine = f"{hardware.get('processes')} x {hardware.get('gpu') or 'CPU'}"
        threads = f"{machine}, {hardware.get('threads')} thread(s), {hardware.get('precision')}"
        teacher = info.get("teacher") or {}
        learnt = f"{teacher.get('name')} {str(teacher.get('sha256') or '')[:12]}".strip()
        data, bad = info.get("data") or {}, info.get("bad_samples") or {}
        rows.append(
            [
                run.name,
                f"{info.get('status')}, {run.step} steps",
                threads,
                f"{data.get('pictures')} ({data.get('fingerprint')})",
                learnt if teacher else "-",
                ", ".join(f"{count} {why}" for why, count in bad.items()) or "0",
                ", ".join(f"{name} {v}" for name, v in (info.get("versions") or {}).items()),
                str(info.get("commit"))[:60],
            ]
        )
    head = ["run", "state", "machine", "images", "teacher", "bad samples", "versions", "commit"]
    return table(head, rows) if rows else ""


SPEED = {"lr": "learning rate", "images_per_second": "images/s", "data_wait": "data wait"}
COLUMNS = {entry.name: {"loss": "loss"} | entry.measures for entry in ENTRIES.values()}
SHARES = {"data_wait"} | {
    f"val_{k}_{p}" for k in ("miou", "trivial") for p in (*PROMPT_NAMES, *TO_TEACHER)
}  # 0 to 1
IN_PERCENT = {"val_knn", "val_linear", "val_top1", "val_top5"}
ROWS = {"predicted": ("predicted",), "oracle": ("oracle",), "without a model": TRIVIAL}
TITLES = {entry.name: (entry.title, entry.images) for entry in ENTRIES.values()}
TITLES["evaluate"] = ("Masks", "true masks, by box, by click")


def of_kind(runs: list[RunFolder], kind: str, most: int) -> str:
    """Curves, tables and images of the runs of one entry."""
    text, drawn = "", TITLES[kind][1]
    if kind in COLUMNS and runs:
        text = curves(runs, COLUMNS[kind] | SPEED) + held_out(runs) + differences(runs)
    for run in runs:
        files = run.images(most)
        text += f"<h3>{html.escape(run.name)}: {drawn}</h3>" if files else ""
        for when, file in files:
            text += image(file.read_bytes(), f"{run.name}, {when}", when)
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
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(now=now, count=len(runs), contents=contents, body=body)


def main() -> int:
    parser = Options(description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, metavar="RUN")
    parser.add_argument(
        "--comparison", type=local_path, help="comparison.json of tools/sweep.py table"
    )
    parser.add_argument(
        "--images", type=int, default=6, help="of a run's training, first to last; default: 6"
    )
    parser.add_argument("--out", type=local_path, default=Path("report.html"))
    args = parser.parse_args()
    require_least(0, args, "images")
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
    write_text(args.out, page(runs, found, args.images))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_entry(main))
