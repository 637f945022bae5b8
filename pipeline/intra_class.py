"""Intra-class FID: FID within each class, and its mean over classes (Miyato & Koyama 2018, arXiv 1802.05637)."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.config import Config, ConfigError
from pipeline.feature_pass import progress
from pipeline.features import Extractor
from pipeline.generated import UnusableSamplesError, usable, with_batch_norm
from pipeline.manifest import ShardSet
from pipeline.noise import draw_z
from pipeline.shard_file import write_file
from pipeline.world import World

USUAL_NUM_IMAGES = 5000  # samples of each class, as in Miyato's calc_intra_FID.py


@dataclass(frozen=True)
class ClassScore:
    """FID of one class, or why it has none."""

    label: int
    num_real: int
    fid: float | None
    error: str | None = None


def check_classes(config: Config, shard_set: ShardSet) -> None:
    """Finds out before hours of work whether every class can be scored.

    Raises:
        ConfigError: no classes, or one of fewer than 2 real images.
    """
    if not config.model.num_classes:
        raise ConfigError("evaluation.intra_class_images needs classes, but this model has none; leave it out")
    manifest = shard_set.manifest
    pairs = zip(manifest.class_names, manifest.class_counts, strict=True)
    if small := [name for name, count in pairs if count < 2]:
        raise ConfigError(
            f"evaluation.intra_class_images: a covariance needs 2 real images, but {len(small)} class(es) have fewer, "
            f"the first {small[0]}; leave it out"
        )


def score_classes(
    generator: nn.Module,
    config: Config,
    shard_set: ShardSet,
    features: npt.NDArray[np.float32],
    extractor: Extractor,
    world: World,
) -> list[ClassScore]:
    """Scores each class against the real images of that class; class c on rank c mod W. Called on every rank.

    Args:
        generator: in eval mode.
        config: of the run; `evaluation.intra_class_images` samples are made of each class.
        shard_set: the training set.
        features: of all its samples, (N, D).
        extractor: that made them.
        world: the ranks.
    """
    labels, num_classes = shard_set.index.sample_label, config.model.num_classes
    generator = with_batch_norm(generator, config, world)
    mine = []
    with progress(world, num_classes * config.evaluation.intra_class_images, "samples of each class") as advance:
        for label in range(world.rank, num_classes, world.size):
            rows = np.flatnonzero(labels == label)
            try:
                fakes = _features_of_class(generator, config, label, extractor, world.device)
                fid = low_rank_fid(fakes, torch.from_numpy(features[rows]).to(world.device))
                mine.append(ClassScore(label, len(rows), fid))
            except UnusableSamplesError as error:  # the other classes may be sound
                mine.append(ClassScore(label, len(rows), None, str(error)))
            advance(config.evaluation.intra_class_images)
    return sorted((score for of_rank in world.gather(mine) for score in of_rank), key=lambda score: score.label)


def mean(scores: list[ClassScore]) -> float:
    """Returns intra-class FID, the mean over all classes."""
    return sum(score.fid or 0.0 for score in scores) / len(scores)


@torch.no_grad()
def _features_of_class(
    generator: nn.Module, config: Config, label: int, extractor: Extractor, device: torch.device
) -> Tensor:
    evaluation, rows = config.evaluation, []
    for index, start in enumerate(range(0, evaluation.intra_class_images, evaluation.batch_size)):
        z = draw_z(evaluation.seed, "eval_class_z", label, index, evaluation.batch_size, config.model.z_dim).to(device)
        n = min(evaluation.batch_size, evaluation.intra_class_images - start)
        images = generator(z, torch.full((len(z),), label, device=device))[:n]
        rows.append(extractor(usable(images, f"samples {start} to {start + n - 1} of class {label}"))[0])
    return torch.cat(rows)


def low_rank_fid(fakes: Tensor, reals: Tensor) -> float:
    """Returns FID from features themselves, exact and fast where there are fewer images than features.

    With A the centred features over sqrt(n - 1), sigma = A^T A, and the trace of (sigma_1 sigma_2)^(1/2) is the sum of
    the singular values of A_1 A_2^T, of n_1 rows and n_2 columns. Where n is larger than D, A's triangular factor R
    (R^T R = A^T A) stands in, of D rows.

    Args:
        fakes: (N, D).
        reals: (M, D).
    """
    mu_1, roots_1 = _centre(fakes)
    mu_2, roots_2 = _centre(reals)
    trace = torch.linalg.svdvals(roots_1 @ roots_2.T).sum()
    distance = (mu_1 - mu_2).square().sum() + roots_1.square().sum() + roots_2.square().sum() - 2 * trace
    return float(distance)


def _centre(features: Tensor) -> tuple[Tensor, Tensor]:
    rows = features.double()
    mu = rows.mean(0)
    roots = (rows - mu) / (len(rows) - 1) ** 0.5
    return mu, torch.linalg.qr(roots, mode="r").R if len(rows) > rows.shape[1] else roots


def write_table(path: Path, scores: list[ClassScore], names: tuple[str, ...]) -> None:
    """Writes a line per class: label, name, real images, FID or why there is none; those without first, best last."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["label", "name", "num_real", "fid", "error"])
    for score in sorted(scores, key=lambda score: -math.inf if score.fid is None else -score.fid):
        fid = "" if score.fid is None else f"{score.fid:.6f}"
        writer.writerow([score.label, names[score.label], score.num_real, fid, score.error or ""])
    write_file(path, text.getvalue().encode())
