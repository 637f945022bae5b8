"""A progress bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}, {rate_noinv_fmt}, {remaining} left]"
_LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"


class Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic in its stubs only
    """tqdm that counts `total` units of work and, where there is no terminal, prints lines instead of redrawing one."""

    monitor_interval = 0  # no thread of its own: workers are started while a bar is shown

    def __init__(self, total: int | None, what: str, unit: str, in_bytes: bool = False):
        terminal = sys.stderr.isatty()
        super().__init__(
            total=total,
            desc=what,
            unit=unit if in_bytes else f" {unit}",
            unit_scale=in_bytes,
            file=sys.stderr,
            dynamic_ncols=terminal,
            mininterval=0.2 if terminal else 10.0,
            miniters=1,
            delay=0 if terminal else 10,
            leave=terminal,
            bar_format=_BAR if terminal else _LINE,
        )

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What tqdm calls to show its text."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text, file=file, flush=True) if text else None
