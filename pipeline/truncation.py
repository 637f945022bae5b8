"""The truncation curve: FID against Inception Score as noise is kept nearer to zero (arXiv 1809.11096, section 3.1)."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import plots
from pipeline.config import Config, EvaluationConfig
from pipeline.feature_pass import Seen, Statistics, on_rank_0
from pipeline.features import IS_SPLITS, Extractor, frechet_distance, inception_score
from pipeline.generated import UnusableSamplesError, make_samples
from pipeline.scores import score_names
from pipeline.world import World

Point = dict[str, Any]  # truncation with FID and Inception Score by `names` (None without logits), or with error


def names(extractor: Extractor, evaluation: EvaluationConfig, reference_is_complete: bool) -> tuple[str, str]:
    """Returns what FID and Inception Score of a point may be called, see `scores.score_names`."""
    found = score_names(extractor, evaluation, evaluation.num_images, reference_is_complete)
    return f"fid{found[0]}", f"inception_score_mean{found[1]}"


def score_truncations(
    generator: nn.Module,
    config: Config,
    extractor: Extractor,
    real: Statistics,
    names: tuple[str, str],
    world: World,
) -> list[Point]:
    """Scores `evaluation.num_images` samples at each threshold, or says why not; called on every rank."""

    def point(seen: Seen) -> Point:
        fid = frechet_distance(seen.statistics.mu, seen.statistics.sigma, real.mu, real.sigma)
        score = None if seen.logits is None else inception_score(seen.logits, IS_SPLITS)[0]
        return dict(zip(names, (fid, score), strict=True))

    points: list[Point] = []
    for threshold in config.evaluation.truncations:
        try:
            seen = make_samples(generator, config, extractor, world, threshold)
        except UnusableSamplesError as error:  # the generator collapses here; elsewhere it may be sound
            points.append({"truncation": threshold, "error": str(error)})
        else:
            points.append({"truncation": threshold} | on_rank_0(world, partial(point, seen)))
    return points


def plot(path: Path, points: list[Point], step: int) -> None:
    """Draws FID against the Inception Score, each point with its threshold, as PNG; FID by threshold without scores."""
    figure = plots.new_figure(6, 4.5)
    axes = figure.subplots()
    _, fid_name, score_name = points[0]
    has_scores = all(point[score_name] is not None for point in points)
    key = score_name if has_scores else "truncation"
    rows = sorted(points, key=lambda point: float(point["truncation"]))
    xs, ys = [row[key] for row in rows], [row[fid_name] for row in rows]
    axes.plot(xs, ys, marker="o")
    for x, y, row in zip(xs, ys, rows, strict=True):
        axes.annotate(f"{row['truncation']:g}", (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel=key.replace("_", " "), ylabel=fid_name, title=f"step {step:,}, thresholds of |z|")
    axes.grid(alpha=0.3)
    plots.write_png(path, figure)
