"""Scores real images as if a generator had made them: a check of the whole path against published numbers."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pipeline import comparison, reference, results, scores
from pipeline.config import Config
from pipeline.feature_pass import on_rank_0, see, spread
from pipeline.features import EvaluationError
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.provenance import compute_exactly, provenance_of
from pipeline.report import tell
from pipeline.world import World


def score_real(run_dir: Path, config: Config) -> None:
    """Scores the validation split against the training set, writes RUN/evaluations/real/ and tells MLflow at step 0.

    Of a larger set `evaluation.num_images` evenly spread images are taken. Called on every rank.

    Raises:
        EvaluationError: no validation split is named, or what `evaluation.evaluate` raises.
    """
    if config.evaluation.validation_shards is None:
        raise EvaluationError(
            "--real scores the validation split: say where it is with evaluation.validation_shards=DIR (for "
            "ImageNet, `python launch/shards.py build` makes it of ILSVRC2012_img_val.tar)"
        )
    world = World(config.run.device, config.run.expected_world_size)
    compute_exactly(world.device)
    training_set = open_shard_set(config.data.shards)
    comparison.check_reference_set(config, training_set)
    shard_set = comparison.open_validation_set(config, training_set)
    n = min(shard_set.index.num_samples, config.evaluation.num_images)
    scores.check_counts(config.evaluation, n, training_set.index.num_samples)
    extractor = comparison.open_extractor(config, world)
    protocol = comparison.protocol_of(config, training_set, extractor) | {"weights": "none", "num_images": n}
    path = results.path_of(run_dir, "real", shard_set.dataset_id, protocol)
    if not world.broadcast(path.exists()):
        real, _ = reference.obtain(training_set, extractor, config, world)
        seen = see(_blocks(shard_set, n, config, world), spread(n), extractor, world, "real images")
        if world.is_main:
            ending, inception_ending, reasons = scores.score_names(
                extractor, config.evaluation, n, training_set.manifest.complete and shard_set.manifest.complete
            )
            found = scores.compare(seen, real, config.evaluation, (ending, inception_ending))
            result = {
                "step": 0,
                "scores": {f"real_{name}": score for name, score in found.items()},
                "not_official_because": reasons,
                "remarks": scores.remarks(seen, real.n),
                "protocol": protocol,
                "provenance": provenance_of(world) | {"weights_sha256": shard_set.dataset_id},
            }
            results.write(path, result)
    on_rank_0(world, lambda: tell(run_dir, config, path))
    world.shutdown()


def _blocks(shard_set: ShardSet, n: int, config: Config, world: World) -> Iterator[tuple[int, Tensor]]:
    """Yields this rank's share of n images of a set, numbered from 0 to n - 1; block b on rank b mod W."""
    size, num_blocks = config.evaluation.batch_size, -(-n // config.evaluation.batch_size)
    gap = shard_set.index.num_samples - n  # images that are left out, a few before each block
    mine = range(world.rank, num_blocks, world.size)
    batches = [_batch(block, size, n, block * gap // num_blocks) for block in mine]
    for block, (_, pixels) in zip(mine, reference.read_blocks(shard_set, batches, config), strict=True):
        yield block * size, pixels


def _batch(block: int, size: int, n: int, shift: int) -> range:
    return range(block * size + shift, min((block + 1) * size, n) + shift)
