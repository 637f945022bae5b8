"""What samples are compared with, by which extractor and rules: all that a score depends on beside the weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import feature_pass, reference
from pipeline.config import Config, ConfigError
from pipeline.feature_pass import Statistics, on_rank_0
from pipeline.features import (
    IS_SHUFFLE_SEED,
    IS_SPLITS,
    KID_SEED,
    KID_SUBSETS,
    NEIGHBOURS,
    Extractor,
    Weights,
    inception,
    random_features,
    read_weights,
)
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.own_extractor import open_own
from pipeline.world import World

FORMAT = 2


@dataclass(frozen=True)
class References:
    """What samples are compared with."""

    real: Statistics  # of the training set
    path: Path  # the file it is kept in
    sha256: str
    others: dict[str, Statistics]  # for one more FID each, by the name that follows `fid_`
    warnings: list[str]


def obtain_references(config: Config, shard_set: ShardSet, extractor: Extractor, world: World) -> References:
    """Returns the statistics of the training set and of what else is asked for; called on every rank.

    Raises:
        EvaluationError: see `reference.obtain` and `reference.read_foreign`.
        ShardSetError: a set is missing or damaged.
    """
    evaluation, others, warnings = config.evaluation, {}, []
    expected = reference.protocol_of(shard_set, extractor, config.model.resolution)
    if evaluation.reference_file is not None:
        foreign_path = Path(evaluation.reference_file)
        foreign = on_rank_0(world, lambda: reference.read_foreign(foreign_path, extractor, expected))
        others["foreign_reference"] = foreign.statistics
        warnings += [foreign.warning] if foreign.warning else []
    validation = open_validation_set(config, shard_set) if evaluation.validation_shards else None
    real, path = reference.obtain(shard_set, extractor, config, world)
    if validation is not None:
        others["validation"] = reference.obtain(validation, extractor, config, world)[0]
    sha256 = on_rank_0(world, lambda: hashlib.sha256(path.read_bytes()).hexdigest())
    return References(real, path, sha256, others, warnings)


def open_extractor(config: Config, world: World) -> Extractor:
    """Returns the extractor of `evaluation.features`; called on every rank, weights are read by rank 0.

    Raises:
        EvaluationError: no weights, or wrong ones.
    """
    is_inception = config.evaluation.features == "inception"
    weights = on_rank_0(world, lambda: read_weights(config.evaluation)) if is_inception else None
    return build_extractor(config, weights, world.device)


def build_extractor(config: Config, weights: Weights | None, device: torch.device) -> Extractor:
    """Returns the extractor of `evaluation.features`.

    Args:
        config: of the run.
        weights: for `inception`.
        device: where it will run.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    if weights is not None:
        return inception(weights, device)
    if config.evaluation.features == "random":
        return random_features(device)
    return open_own(config.evaluation.features, config.model.resolution, device)


def check_reference_set(config: Config, shard_set: ShardSet, key: str = "data.shards") -> None:
    """Finds a reference that the samples cannot be compared with.

    Raises:
        ConfigError: its images are of another size.
    """
    size = config.model.resolution
    if shard_set.manifest.image_size not in (None, size):
        raise ConfigError(
            f"{key}={shard_set.location} holds images of {shard_set.manifest.image_size} px, but the generator makes "
            f"{size} px; the reference of FID is the training set: say where it is with {key}=DIR"
        )


def open_validation_set(config: Config, training_set: ShardSet) -> ShardSet:
    """Opens `evaluation.validation_shards`.

    Raises:
        ConfigError: its images were made by another protocol than the training set's.
        ShardSetError: missing or damaged.
    """
    assert config.evaluation.validation_shards is not None
    found = open_shard_set(config.evaluation.validation_shards)
    check_reference_set(config, found, "evaluation.validation_shards")
    for name in ("crop", "interpolation"):
        ours, theirs = getattr(training_set.manifest, name), getattr(found.manifest, name)
        if ours != theirs:
            raise ConfigError(
                f"evaluation.validation_shards={found.location} has {name} {theirs!r}, the training set {ours!r}: "
                "numbers of different protocols must not be compared; build both sets alike"
            )
    return found


def protocol_of(config: Config, shard_set: ShardSet, extractor: Extractor) -> dict[str, Any]:
    """Returns all that determines the scores of given weights, as plain values."""
    evaluation, foreign = config.evaluation, config.evaluation.reference_file
    validation = open_validation_set(config, shard_set) if evaluation.validation_shards else None
    return {
        "format": FORMAT,
        "weights": evaluation.weights,
        "batch_norm": evaluation.batch_norm,
        "standing_batches": evaluation.standing_batches if evaluation.batch_norm == "standing" else None,
        "precision": "float32",
        "num_images": evaluation.num_images,
        "batch_size": evaluation.batch_size,
        "seed": evaluation.seed,
        "labels": evaluation.labels if config.model.num_classes else "none",
        "quantisation": "rounded to uint8",
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "extractor_kind": extractor.kind,
        "metrics": sorted(evaluation.metrics),
        "inception_score_splits": [IS_SPLITS, 1],
        "inception_score_shuffle_seed": IS_SHUFFLE_SEED,
        "kid": {"subsets": KID_SUBSETS, "subset_size": evaluation.kid_subset_size, "seed": KID_SEED},
        "precision_recall_neighbours": NEIGHBOURS,
        "features_compared": feature_pass.MAX_KEPT,
        "truncations": list(evaluation.truncations),
        "intra_class_images": evaluation.intra_class_images,
        "reference": reference.protocol_of(shard_set, extractor, config.model.resolution),
        "validation": validation and reference.protocol_of(validation, extractor, config.model.resolution),
        "reference_file_sha256": foreign and hashlib.sha256(Path(foreign).read_bytes()).hexdigest(),
    }
