"""What training costs as one thing grows: the figures of `launch/benchmark.py train` side by side, and drawn."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import plots


@dataclass(frozen=True)
class Point:
    """One value of what grows.

    Attributes:
        value: of it.
        found: the JSON of `train_benchmark.Found`; None where the memory did not suffice.
    """

    value: int
    found: dict[str, Any] | None


def table(name: str, points: Sequence[Point]) -> str:
    """Returns a Markdown table, a row for each value.

    Args:
        name: of what grows.
        points: its values, in order.
    """
    heads = (
        name, "images/s (least to most)", "images per CPU-second", "update, s", "outside the models",
        "all-reduce, s", "memory, GB", "TFLOP/s", "of a matrix product",
    )  # fmt: skip
    rows = [heads, ("---",) * len(heads)]
    for point in points:
        if point.found is None:
            rows.append((f"{point.value}", "out of memory", *("",) * (len(heads) - 2)))
            continue
        one = point.found["settings"][0]
        rates = one["images_per_second"]
        all_reduce = one["parts_seconds"]["all-reduce"]
        rows.append(
            (
                f"{point.value}",
                f"{statistics.median(rates):.4g} ({min(rates):.4g} - {max(rates):.4g})",
                f"{statistics.median(one['images_per_cpu_second']):.4g}",
                f"{point.found['images_per_update'] / statistics.median(rates):.4g}",
                f"{100 * one['outside_share']:.1f} %",
                f"{all_reduce:.3f}" if all_reduce else "-",
                f"{one['memory_peak_bytes'] / 1e9:.2f}",
                f"{one['flops_per_second'] / 1e12:.4g}",
                f"{100 * one['utilisation']:.1f} %",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(path: Path, name: str, title: str, points: Sequence[Point]) -> None:
    """Draws images/s with their spread, and memory, over what grows, as PNG.

    Args:
        path: of the picture.
        name: of what grows.
        title: of the picture.
        points: its values; those without figures are left out.
    """
    measured = [(point.value, point.found["settings"][0]) for point in points if point.found is not None]
    values = [value for value, _ in measured]
    rates = [one["images_per_second"] for _, one in measured]
    medians = [statistics.median(some) for some in rates]
    spread = [
        [median - min(some) for median, some in zip(medians, rates, strict=True)],
        [max(some) - median for median, some in zip(medians, rates, strict=True)],
    ]
    figure = plots.new_figure(9, 3.6)
    speed, memory = figure.subplots(1, 2)
    speed.errorbar(values, medians, yerr=spread, marker="o", capsize=3)
    memory.plot(values, [one["memory_peak_bytes"] / 1e9 for _, one in measured], marker="o")
    for axes, label in ((speed, "images/s"), (memory, "memory peak of rank 0, GB")):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value}" for value in values])
        axes.set(xlabel=name, ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    plots.write_png(path, figure)
