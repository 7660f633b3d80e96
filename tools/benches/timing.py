"""Timing interleaved steps, and the tables of it."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from sami.core.optim import guarded_step, propagate_nonfinite
from sami.core.processes import seconds_of
from sami.core.tables import show_table

Step = Callable[[], None]


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, ``rounds`` times in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            passed = seconds_of(step, device)
            if turn:
                seconds[name].append(passed)
    return seconds


def report(
    title: str, seconds: dict[str, list[float]], images: int, flops: dict[str, float], peak: float
) -> None:
    """A table: median, images a second, and the ratio to the first row, paired by round."""
    first = next(iter(seconds))
    head = ["", "median s", "images/s", "ratio to the first (range)", *["share"] * bool(peak)]
    rows = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[first], strict=True)]
        median = statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        share = [f"{flops[name] / median / peak:.1%}"] if peak else []
        rows.append([name, f"{median:.3f}", f"{images / median:.1f}", spread, *share])
    show_table(title, head, rows)


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    numbers = (statistics.median(values), min(values), max(values))
    return "{} ({}..{})".format(*(f"{number:.{digits}f}" for number in numbers))


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """An optimizer step as training makes it."""
    propagate_nonfinite(loss).backward()
    guarded_step(optimizer, 0.0)
    optimizer.zero_grad(set_to_none=True)


def count_flops(steps: dict[str, Step]) -> dict[str, float]:
    """Floating-point operations of one call of each (two per multiply-add)."""
    counts = {}
    for name, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            step()
        counts[name] = float(counter.get_total_flops())
    return counts


def matrix_rate(device: torch.device) -> float:
    """What the card reaches on a large bf16 matrix product, in FLOP/s."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = measure({"product": lambda: torch.mm(a, b)}, 20, device)["product"]
    return 2 * 8192**3 / statistics.median(seconds)


def introduce(args: argparse.Namespace, device: torch.device) -> float:
    """Say what it runs on; the card's matrix rate in FLOP/s, 0 for a CPU."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}{threads}, torch {torch.__version__}, {args.rounds} interleaved rounds")
    peak = matrix_rate(device) if device.type == "cuda" else 0.0
    if peak:
        print(f"matrix rate: {peak / 1e12:.0f} TFLOP/s (bf16, 8192 x 8192 x 8192)")
    return peak


def kinds_of(device: torch.device) -> list[tuple[bool, bool]]:
    """Whether in bf16, and whether compiled: what is measured on a device."""
    on_cpu = [(False, False)]
    return on_cpu if device.type == "cpu" else [(False, False), (True, False), (True, True)]
