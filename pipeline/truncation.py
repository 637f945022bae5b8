"""The truncation curve: FID against Inception Score as noise is kept nearer to zero (arXiv 1809.11096, section 3.1)."""

import importlib.util
import io
from pathlib import Path

from torch import nn

from pipeline.config import Config
from pipeline.feature_pass import Statistics
from pipeline.features import IS_SPLITS, EvaluationError, Extractor, frechet_distance, inception_score
from pipeline.generated import make_samples
from pipeline.shard_file import write_file
from pipeline.world import World

Point = dict[str, float | None]


def check_can_plot() -> None:
    """Finds out before hours of work whether the curve can be drawn.

    Raises:
        EvaluationError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError(
            "evaluation.truncations draws a curve, which needs matplotlib: `pip install matplotlib`, or leave it out"
        )


def score_truncations(
    generator: nn.Module, config: Config, extractor: Extractor, real: Statistics, world: World
) -> list[Point]:
    """Scores `evaluation.num_images` samples at each threshold; called on every rank.

    Raises:
        UnusableSamplesError: the generator collapses at a threshold.
    """
    points: list[Point] = []
    for threshold in config.evaluation.truncations:
        seen = make_samples(generator, config, extractor, world, threshold)
        fakes = seen.statistics
        fid = frechet_distance(fakes.mu, fakes.sigma, real.mu, real.sigma) if world.is_main else 0.0
        score = inception_score(seen.logits, IS_SPLITS)[0] if seen.logits is not None and world.is_main else None
        points.append({"truncation": threshold, "fid": fid, "inception_score_mean": score})
    return points


def plot(path: Path, points: list[Point], step: int, fid_name: str) -> None:
    """Draws FID against the Inception Score, each point with its threshold, as PNG; FID by threshold without scores."""
    from matplotlib.figure import Figure  # 0.5 s, and only this needs it

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    has_scores = all(point["inception_score_mean"] is not None for point in points)
    key = "inception_score_mean" if has_scores else "truncation"
    rows = sorted(points, key=lambda point: point["truncation"] or 0)
    xs, ys = [float(row[key] or 0) for row in rows], [float(row["fid"] or 0) for row in rows]
    axes.plot(xs, ys, marker="o")
    for x, y, row in zip(xs, ys, rows, strict=True):
        axes.annotate(f"{row['truncation']:g}", (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=key.replace("_", " "), ylabel=fid_name, title=f"step {step:,}, thresholds of |z|")
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    write_file(path, file.getvalue())
