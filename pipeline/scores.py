"""From what was seen of samples and of a reference to scores under the names they may bear."""

from pipeline.bar import Bar
from pipeline.config import EvaluationConfig
from pipeline.feature_pass import Seen, Statistics
from pipeline.features import (
    IS_SPLITS,
    EvaluationError,
    Extractor,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

OFFICIAL_NUM_IMAGES = 50_000


def score_names(
    extractor: Extractor, evaluation: EvaluationConfig, num_images: int, reference_is_complete: bool
) -> tuple[str, str, list[str]]:
    """Returns what the scores may be called: only those of the official protocol go by their plain names.

    Args:
        extractor: that makes the features.
        evaluation: the protocol.
        num_images: samples.
        reference_is_complete: whether the reference holds every image of its split.

    Returns:
        The ending of the names of what is compared with the reference, the ending of the names of the Inception
        Scores, and the reasons for what is not plain.
    """
    kind = extractor.kind
    choices = {
        "raw": ("the trained weights were scored, not their average", evaluation.weights == "raw"),
        "standing": ("batch norm used standing statistics", evaluation.batch_norm == "standing"),
        "batch_statistics": ("batch norm used the statistics of each block", evaluation.batch_norm == "batch"),
        "balanced": ("every class was sampled equally often", evaluation.labels == "balanced"),
    }
    reasons = {
        "the features are those of a small random network, the scores compare with nothing": kind == "random",
        "the Inception weights are not the published ones": kind == "unofficial",
        f"the features are those of {extractor.name}, not Inception's": kind == "own",
        **dict(choices.values()),
        f"{num_images:,} images were generated, not {OFFICIAL_NUM_IMAGES:,}": num_images != OFFICIAL_NUM_IMAGES,
        "the reference is not a complete split: images were left out when the set was built": not reference_is_complete,
    }
    chosen = "".join(f"_{name}" for name, (_, holds) in choices.items() if holds)
    if kind == "official":
        count = f"{num_images // 1000}k" if num_images % 1000 == 0 else str(num_images)
        ending = chosen + ("" if num_images == OFFICIAL_NUM_IMAGES else f"_{count}")
        reference_ending = ending if reference_is_complete else f"{ending}_partial_reference"
    else:
        ending = {"random": "_random_features", "unofficial": "_unofficial", "own": f"_{extractor.name}"}[kind] + chosen
        reference_ending = ending
    return reference_ending, ending, [reason for reason, holds in reasons.items() if holds]


def check_counts(evaluation: EvaluationConfig, num_samples: int, num_reference: int) -> None:
    """Finds out before the first sample whether there will be enough images.

    Raises:
        EvaluationError: too few for KID, or for precision and recall.
    """
    fewest = min(num_samples, num_reference)
    counts = f"{num_samples:,} samples (evaluation.num_images) and {num_reference:,} reference images"
    if "kid" in evaluation.metrics and fewest < evaluation.kid_subset_size:
        raise EvaluationError(
            f"KID draws subsets of evaluation.kid_subset_size={evaluation.kid_subset_size} images, but there are only "
            f"{counts}; make more samples, lower kid_subset_size, or leave kid out of evaluation.metrics"
        )
    if "precision_recall" in evaluation.metrics and fewest < 5:
        raise EvaluationError(
            f"precision and recall look at the 3 nearest neighbours, but there are only {counts}; leave "
            "precision_recall out of evaluation.metrics"
        )


def compare(seen: Seen, real: Statistics, evaluation: EvaluationConfig, endings: tuple[str, str]) -> dict[str, float]:
    """Returns the scores of `evaluation.metrics` by name.

    Args:
        seen: of the samples.
        real: of the reference.
        evaluation: which metrics, and how.
        endings: of the names, see `score_names`.
    """
    fakes, (ending, inception_ending) = seen.statistics, endings
    assert fakes.kept is not None
    assert real.kept is not None
    scores: dict[str, float] = {}
    with Bar(len(evaluation.metrics), "scores", "metrics") as bar:
        for metric in evaluation.metrics:
            match metric:
                case "fid":
                    scores[f"fid{ending}"] = frechet_distance(fakes.mu, fakes.sigma, real.mu, real.sigma)
                case "inception_score" if seen.logits is not None:
                    mean, std = inception_score(seen.logits, IS_SPLITS)
                    scores[f"inception_score_mean{inception_ending}"] = mean
                    scores[f"inception_score_std{inception_ending}"] = std
                    scores[f"inception_score_single_split{inception_ending}"] = inception_score(seen.logits, 1)[0]
                case "kid":
                    mean, std = kernel_distance(fakes.kept, real.kept, evaluation.kid_subset_size)
                    scores[f"kid_mean{ending}"], scores[f"kid_std{ending}"] = mean, std
                case "precision_recall":
                    precision, recall = precision_recall(fakes.kept, real.kept)
                    scores[f"precision{ending}"], scores[f"recall{ending}"] = precision, recall
            bar.update()
    return scores


def remarks(seen: Seen, num_reference: int) -> list[str]:
    """Returns what a reader of the scores should know."""
    found, (n, size) = [], (seen.statistics.n, len(seen.statistics.mu))
    if (fewest := min(n, num_reference)) <= size:
        found.append(f"a covariance of {size} features needs more than {fewest:,} images: FID means little")
    if seen.num_constant:
        found.append(f"{seen.num_constant:,} of {n:,} samples are of a single colour")
    if seen.logits is None:
        found.append("the extractor has no class logits: no Inception Score")
    return found
