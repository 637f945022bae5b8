"""Losses summed on the device, times on the host, and the line or bar that shows them."""

import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.read_counts import ReadCounts
from pipeline.world import World


class Meter:
    """Sums what happens between two log lines, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._data_seconds, self._started = 0, 0.0, time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds one step's detached device scalars."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def add_data_wait(self, seconds: float) -> None:
        """Adds time spent waiting for batches."""
        self._data_seconds += seconds

    def means(self, world: World) -> dict[str, float]:
        """Returns means over the interval's steps and all ranks; the host waits for the device here, once."""
        means = world.mean(torch.stack(list(self._sums.values())) / self._steps)
        return dict(zip(self._sums, means.tolist(), strict=True))

    def times(self) -> tuple[float, float, int]:
        """Returns (seconds, seconds waited for data, steps) of the interval and begins the next."""
        now = time.perf_counter()
        result = now - self._started, self._data_seconds, self._steps
        self._sums, self._steps, self._data_seconds, self._started = {}, 0, 0.0, now
        return result


def data_metrics(counts: ReadCounts, seconds: float) -> dict[str, float]:
    """What reading cost all ranks in an interval: MB/s, and for a remote set cache hits, retries and damaged blocks."""
    metrics = {"throughput/read_megabytes_per_second": counts.bytes_read / 1e6 / seconds}
    if uses := counts.cache_hits + counts.cache_misses:
        metrics |= {
            "throughput/fetched_megabytes_per_second": counts.bytes_fetched / 1e6 / seconds,
            "data/cache_hit_percent": 100 * counts.cache_hits / uses,
            "data/requests": counts.requests,
            "data/retries": counts.retries,
            "data/resumed_reads": counts.resumed_reads,
            "data/bad_blocks": counts.bad_blocks,
        }
    return metrics


class Progress:
    """A bar on a terminal, a plain line per interval elsewhere, nothing on ranks other than 0.

    Args:
        step: updates done already.
        steps: updates in all.
        is_main: whether this rank shows anything.
    """

    def __init__(self, step: int, steps: int, is_main: bool):
        self._is_main, self._steps = is_main, steps
        terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(initial=step, total=steps, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Shows an interval's losses, speed, data wait, what a store gave, and the time left where no bar tells it."""
        text = (
            f"D {metrics['train/d_loss']:.3f} G {metrics['train/g_loss']:.3f} "
            f"real {metrics['train/real_logits']:+.2f} fake {metrics['train/fake_logits']:+.2f} | "
            f"{metrics['throughput/images_per_second']:.1f} images/s, "
            f"data wait {metrics['time/data_wait_percent']:.1f} %"
        )
        if "throughput/fetched_megabytes_per_second" in metrics:
            text += (
                f" | {metrics['throughput/fetched_megabytes_per_second']:.1f} MB/s fetched, "
                f"cache {metrics['data/cache_hit_percent']:.1f} %, {metrics['data/retries']:.0f} retries"
            )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._is_main:
            left = _duration((self._steps - step) * metrics["time/step_seconds"])
            print(f"step {step}/{self._steps} | {text} | {left} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
