"""Samples to be scored: fixed blocks, each a function of seed and block, and the batch norm they are made with.

Block b is made by rank b mod W, in the same batch for every number of processes W, so that images are bit-equal.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.feature_pass import Seen, constant, first, see
from pipeline.features import EvaluationError, Extractor
from pipeline.networks import build_generator
from pipeline.noise import Purpose, draw_labels, draw_truncated_z, draw_z
from pipeline.sampling import to_uint8
from pipeline.world import World
from sagan.layers import CrossReplicaBatchNorm2d


class UnusableSamplesError(EvaluationError):
    """Samples that cannot be scored, whoever tries: the weights are broken or the generator has collapsed."""


def load(tensors: dict[str, Tensor], config: Config, device: torch.device) -> nn.Module:
    """Returns a generator in float32 and eval mode, with these weights."""
    generator = build_generator(config)
    generator.load_state_dict(tensors)
    return generator.to(device, torch.float32).eval().requires_grad_(False)


def with_batch_norm(generator: nn.Module, config: Config, world: World, truncation: float | None = None) -> nn.Module:
    """Returns the generator with the batch norm of `evaluation.batch_norm`; called on every rank.

    Standing statistics (BigGAN, arXiv 1809.11096, appendix B) are averages over `standing_batches` batches of
    `batch_size` fresh samples. They depend on the truncation, and are taken anew for each.

    Args:
        generator: in eval mode; it is not changed.
        config: of the run.
        world: the ranks; each makes some of the batches.
        truncation: threshold of |z| of the samples to come; None: none.
    """
    if config.evaluation.batch_norm == "running":
        return generator
    generator = copy.deepcopy(generator)
    norms = [module for module in generator.modules() if isinstance(module, CrossReplicaBatchNorm2d)]
    for norm in norms:
        norm.sync = False  # ranks make different batches
        norm.momentum = 0.0 if config.evaluation.batch_norm == "batch" else 1.0  # keep what was; or take the batch's
        norm.train()
    if config.evaluation.batch_norm == "batch":
        return generator
    mine = {}
    for batch in range(world.rank, config.evaluation.standing_batches, world.size):
        _generate(generator, config, "eval_standing_z", "eval_standing_labels", batch, world.device, truncation)
        mine[batch] = [(norm.running_mean.double().cpu(), norm.running_var.double().cpu()) for norm in norms]
    by_batch = {batch: statistics for of_rank in world.gather(mine) for batch, statistics in of_rank.items()}
    for index, norm in enumerate(norms):
        means, variances = zip(*(by_batch[batch][index] for batch in sorted(by_batch)), strict=True)
        norm.running_mean.copy_(torch.stack(means).mean(0))
        norm.running_var.copy_(torch.stack(variances).mean(0))
        norm.eval()
    return generator


def make_samples(
    generator: nn.Module, config: Config, extractor: Extractor, world: World, truncation: float | None = None
) -> Seen:
    """Makes `evaluation.num_images` samples, each once over all ranks, and passes them through the extractor.

    Raises:
        UnusableSamplesError: see `sample_block`; on every rank.
    """
    evaluation = config.evaluation
    generator = with_batch_norm(generator, config, world, truncation)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for block in range(world.rank, -(-evaluation.num_images // evaluation.batch_size), world.size):
            yield block * evaluation.batch_size, sample_block(generator, config, block, world.device, truncation)

    what = "samples" if truncation is None else f"samples, |z| < {truncation:g}"
    return see(blocks(), first(evaluation.num_images), extractor, world, what)


def sample_block(
    generator: nn.Module, config: Config, block: int, device: torch.device, truncation: float | None = None
) -> Tensor:
    """Makes the samples of one block, (n, 3, R, R) uint8 on the device: all of them a function of seed and block.

    Raises:
        UnusableSamplesError: non-finite values, or nothing but constant or equal images.
    """
    evaluation = config.evaluation
    start, n = block * evaluation.batch_size, evaluation.batch_size
    n = min(n, evaluation.num_images - start)
    images = _generate(generator, config, "eval_z", "eval_labels", block, device, truncation)[:n]
    return usable(images, f"block {block} of the samples (images {start} to {start + n - 1})")


@torch.no_grad()
def _generate(
    generator: nn.Module,
    config: Config,
    z_purpose: Purpose,
    labels_purpose: Purpose,
    block: int,
    device: torch.device,
    truncation: float | None,
) -> Tensor:
    """Makes a whole block, though not all of the last may be wanted: batch statistics are those of a whole one."""
    evaluation, model = config.evaluation, config.model
    seed, size = evaluation.seed, evaluation.batch_size
    if truncation is None:
        z = draw_z(seed, z_purpose, 0, block, size, model.z_dim)
    else:
        z = draw_truncated_z(seed, z_purpose, 0, block, size, model.z_dim, truncation)
    labels = draw_labels(seed, labels_purpose, 0, block, size, model.num_classes)
    if evaluation.labels == "balanced" and model.num_classes:
        labels = torch.arange(block * size, (block + 1) * size) % model.num_classes
    images: Tensor = generator(z.to(device), None if labels is None else labels.to(device))
    return images


def usable(images: Tensor, where: str) -> Tensor:
    """Returns images (n, 3, R, R) in [-1, 1] as uint8.

    Raises:
        UnusableSamplesError: non-finite values, or nothing but constant or equal images.
    """
    n = len(images)
    if num_broken := int((~images.isfinite().flatten(1).all(1)).sum()):
        raise UnusableSamplesError(
            f"{where}: {num_broken} of {n} hold non-finite values: the weights of this step are broken"
        )
    pixels = to_uint8(images)
    num_constant, num_equal = int(constant(pixels).sum()), int((pixels == pixels[:1]).flatten(1).all(1).sum())
    if num_constant == n or num_equal == n > 1:
        what = "are of a single colour" if num_constant == n else "are the same picture"
        raise UnusableSamplesError(
            f"{where}: {n} of {n} {what}: the generator has collapsed, there is nothing to score"
        )
    return pixels
