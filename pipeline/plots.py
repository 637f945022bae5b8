"""Plots as PNG files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.shard_file import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of so many inches, without the state of pyplot."""
    from matplotlib.figure import Figure  # 0.5 s, and only plots need it

    return Figure(figsize=(width, height), layout="constrained")


def write_png(path: Path, figure: "Figure") -> None:
    """Writes a figure whole or not at all; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_file(path, file.getvalue())
