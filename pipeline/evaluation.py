"""Scores a run's newest checkpoint: from a run directory to a result file that says how each number came about.

Samples are made in fixed blocks, block b on rank b mod W, from noise keyed by the block, so that they are bit-equal for
every number of processes W. All that is cheap and may fail comes before the first sample.
"""

import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import checkpoint, reference, tracking
from pipeline.config import Config, ConfigError, changed_hyperparameters
from pipeline.features import (
    IS_SHUFFLE_SEED,
    IS_SPLITS,
    EvaluationError,
    Extractor,
    Kind,
    Weights,
    frechet_distance,
    inception,
    inception_score,
    random_features,
    read_weights,
)
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.networks import build_generator
from pipeline.noise import draw_labels, draw_z
from pipeline.reference import Moments, Statistics, on_rank_0, progress
from pipeline.sampling import to_uint8
from pipeline.shard_file import write_file
from pipeline.world import World, configure_determinism

FORMAT = 1
OFFICIAL_NUM_IMAGES = 50_000


@dataclass(frozen=True)
class Subject:
    """What is scored: the averaged generator of a checkpoint, on the CPU."""

    checkpoint: Path
    step: int
    dataset_id: str  # that it was trained on
    checkpoint_sha256: str  # of its manifest, which holds the hashes of all its files
    ema_sha256: str  # of ema.safetensors
    ema: dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """What the scores need to know of the samples of all ranks."""

    statistics: Statistics
    logits: Tensor  # (n, classes) on the CPU, in the order of the samples
    num_constant: int  # images of a single colour


def evaluate(run_dir: Path, config: Config) -> None:
    """Scores the newest whole checkpoint of a run, writes the result file and tells MLflow; called on every rank.

    A result that is there already is shown, not made again.

    Args:
        run_dir: the run; nothing but RUN/evaluations is written.
        config: of the run, with the overrides of this evaluation.

    Raises:
        ConfigError: the configuration does not fit the checkpoint or the data.
        EvaluationError: no checkpoint, no weights, no place for the reference, samples that cannot be scored.
        ShardSetError: the reference set is missing or damaged.
    """
    started = time.perf_counter()
    world = World(config.run.device, config.run.expected_world_size)
    _compute_exactly(world.device)
    shard_set = open_shard_set(config.data.shards)
    subject, weights = on_rank_0(world, lambda: _preflight(run_dir, config, shard_set))
    extractor = inception(weights, world.device) if weights else random_features(world.device)
    protocol = protocol_of(config, shard_set, extractor)
    path = _result_path(run_dir, subject, protocol)
    if world.broadcast(path.exists()):
        if world.is_main:
            print(f"{path} is there already: the same weights, scored by the same protocol", file=sys.stderr)
    else:
        real, real_path = reference.obtain(shard_set, extractor, config, world)
        samples = make_samples(_generator(subject, config, world.device), config, extractor, world)
        if world.is_main:
            result = _result(subject, samples, real, protocol)
            result["provenance"] = _provenance(subject, real_path, world, time.perf_counter() - started)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    if world.is_main:
        _tell(config, run_dir, path)
    world.shutdown()


def _tell(config: Config, run_dir: Path, path: Path) -> None:
    """Prints a result and hands it to MLflow, which records it once however often it is told."""
    result = json.loads(path.read_text())
    print(describe(result, path), flush=True)
    metrics = {f"eval/{name}": score for name, score in result["scores"].items()}
    tracking.log_evaluation(config, run_dir, result["step"], metrics, [path])


def _preflight(run_dir: Path, config: Config, shard_set: ShardSet) -> tuple[Subject, Weights | None]:
    subject = find_subject(run_dir, config)
    _check_reference_set(subject, config, shard_set)
    return subject, read_weights(config.evaluation) if config.evaluation.features == "inception" else None


def find_subject(run_dir: Path, config: Config) -> Subject:
    """Reads the averaged generator of the newest whole checkpoint; changes nothing in the run directory.

    Raises:
        EvaluationError: there is none.
        ConfigError: it was made with another configuration than the one given.
    """
    damaged = []
    for path in reversed(checkpoint.published(run_dir)):
        if (fault := checkpoint.find_fault(path)) is None:
            break
        damaged.append(f"checkpoint {path} is damaged ({fault})")
        print(f"{damaged[-1]}; the one before it is evaluated", file=sys.stderr)
    else:
        reason = "; ".join(damaged) or f"{checkpoint.checkpoints_dir(run_dir)} holds no checkpoint yet"
        raise EvaluationError(
            f"{reason}. Training saves one every {config.train.checkpoint_every_steps} steps "
            "(train.checkpoint_every_steps), at its end, and when it is stopped by SIGTERM"
        )
    state = json.loads((path / "trainer.json").read_text())
    if changed := changed_hyperparameters(state["config"], config):
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(f"{path} was made with another configuration than {run_dir / 'config.yaml'} says:\n{lines}")
    manifest, ema = (path / "manifest.json").read_bytes(), (path / "ema.safetensors").read_bytes()
    hashes = hashlib.sha256(manifest).hexdigest(), hashlib.sha256(ema).hexdigest()
    return Subject(path, state["step"], state["dataset_id"], *hashes, safetensors.torch.load(ema))


def _check_reference_set(subject: Subject, config: Config, shard_set: ShardSet) -> None:
    where, size = f"data.shards={config.data.shards}", config.model.resolution
    if shard_set.manifest.image_size not in (None, size):
        raise ConfigError(
            f"{where} holds images of {shard_set.manifest.image_size} px, but the generator makes {size} px; "
            "the reference of FID is the training set: say where it is with data.shards=DIR"
        )
    if shard_set.dataset_id != subject.dataset_id:
        raise ConfigError(
            f"{where} is data set {shard_set.dataset_id[:12]}, but {subject.checkpoint} was trained on "
            f"{subject.dataset_id[:12]}; the reference of FID is the training set: say where it is with data.shards=DIR"
        )


def protocol_of(config: Config, shard_set: ShardSet, extractor: Extractor) -> dict[str, Any]:
    """Returns all that determines the scores of given weights, as plain values."""
    evaluation = config.evaluation
    return {
        "format": FORMAT,
        "weights": "ema",
        "batch_norm": "running",
        "precision": "float32",
        "num_images": evaluation.num_images,
        "batch_size": evaluation.batch_size,
        "seed": evaluation.seed,
        "labels": "uniform" if config.model.num_classes else "none",
        "quantisation": "rounded to uint8",
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "extractor_kind": extractor.kind,
        "inception_score_splits": [IS_SPLITS, 1],
        "inception_score_shuffle_seed": IS_SHUFFLE_SEED,
        "reference": reference.protocol_of(shard_set, extractor, config.model.resolution),
    }


def _result_path(run_dir: Path, subject: Subject, protocol: dict[str, Any]) -> Path:
    """Returns the one place of the result of these weights by this protocol."""
    key = hashlib.sha256(json.dumps([subject.ema_sha256, protocol], sort_keys=True).encode()).hexdigest()
    return run_dir / "evaluations" / f"step-{subject.step:08d}" / f"{key[:16]}.json"


def _generator(subject: Subject, config: Config, device: torch.device) -> nn.Module:
    generator = build_generator(config)
    generator.load_state_dict(subject.ema)
    return generator.to(device, torch.float32).eval().requires_grad_(False)


def make_samples(generator: nn.Module, config: Config, extractor: Extractor, world: World) -> Samples:
    """Makes `evaluation.num_images` samples, each once over all ranks, and passes them through the extractor.

    Raises:
        EvaluationError: see `sample_block`.
    """
    evaluation = config.evaluation
    num_blocks = -(-evaluation.num_images // evaluation.batch_size)
    moments = Moments(extractor.num_features, world.device)
    logits, num_constant = [], 0
    with progress(world, evaluation.num_images, "samples") as advance:
        for block in range(world.rank, num_blocks, world.size):
            images = sample_block(generator, config, block, world.device)
            num_constant += int(_constant(images).sum())
            features, block_logits = extractor(images)
            moments.add(features)
            logits.append(block_logits.cpu())
            advance(len(images))
    by_rank = world.gather(logits)
    in_order = torch.cat([by_rank[block % world.size][block // world.size] for block in range(num_blocks)])
    statistics = moments.reduce(world)
    assert statistics.n == len(in_order) == evaluation.num_images, (statistics.n, len(in_order))
    return Samples(statistics, in_order, sum(world.gather(num_constant)))


@torch.no_grad()
def sample_block(generator: nn.Module, config: Config, block: int, device: torch.device) -> Tensor:
    """Makes the samples of one block, (n, 3, R, R) uint8 on the device: all of them a function of seed and block.

    Raises:
        EvaluationError: non-finite values, or nothing but constant or equal images.
    """
    evaluation, model = config.evaluation, config.model
    seed, size = evaluation.seed, evaluation.batch_size
    n = min(size, evaluation.num_images - block * size)
    z = draw_z(seed, "eval_z", 0, block, size, model.z_dim)[:n].to(device)
    labels = draw_labels(seed, "eval_labels", 0, block, size, model.num_classes)
    images: Tensor = generator(z, None if labels is None else labels[:n].to(device))
    where = f"block {block} of the samples (images {block * size} to {block * size + n - 1})"
    if num_broken := int((~images.isfinite().flatten(1).all(1)).sum()):
        raise EvaluationError(
            f"{where}: {num_broken} of {n} hold non-finite values: the weights of this step are broken"
        )
    pixels = to_uint8(images)
    num_constant, num_equal = int(_constant(pixels).sum()), int((pixels == pixels[:1]).flatten(1).all(1).sum())
    if num_constant == n or num_equal == n > 1:
        what = "are of a single colour" if num_constant == n else "are the same picture"
        raise EvaluationError(f"{where}: {n} of {n} {what}: the generator has collapsed, there is nothing to score")
    return pixels


def _constant(images: Tensor) -> Tensor:
    """Returns which of the images (N, 3, H, W) are of a single colour, (N,) bool."""
    pixels = images.flatten(2)
    return (pixels == pixels[:, :, :1]).flatten(1).all(1)


def score_names(kind: Kind, num_images: int, reference_is_complete: bool) -> tuple[str, str, list[str]]:
    """Returns what the scores may be called: only those of the official protocol go by their plain names.

    Args:
        kind: of the extractor.
        num_images: generated.
        reference_is_complete: whether the reference holds every image of its split.

    Returns:
        The name of FID, the ending of the names of the Inception Scores, and the reasons for what is not plain.
    """
    reasons = {
        "the features are those of a small random network, the scores compare with nothing": kind == "random",
        "the Inception weights are not the published ones": kind == "unofficial",
        f"{num_images:,} images were generated, not {OFFICIAL_NUM_IMAGES:,}": num_images != OFFICIAL_NUM_IMAGES,
        "the reference is not a complete split: images were left out when the set was built": not reference_is_complete,
    }
    if kind == "random":
        fid_ending = ending = "_random_features"
    elif kind == "unofficial":
        fid_ending = ending = "_unofficial"
    else:
        count = f"{num_images // 1000}k" if num_images % 1000 == 0 else str(num_images)
        ending = "" if num_images == OFFICIAL_NUM_IMAGES else f"_{count}"
        fid_ending = ending if reference_is_complete else f"{ending}_partial_reference"
    return f"fid{fid_ending}", ending, [reason for reason, holds in reasons.items() if holds]


def _result(subject: Subject, samples: Samples, real: Statistics, protocol: dict[str, Any]) -> dict[str, Any]:
    fakes = samples.statistics
    fid, ending, reasons = score_names(protocol["extractor_kind"], fakes.n, protocol["reference"]["complete"])
    mean, std = inception_score(samples.logits, IS_SPLITS)
    scores = {
        fid: frechet_distance(fakes.mu, fakes.sigma, real.mu, real.sigma),
        f"inception_score_mean{ending}": mean,
        f"inception_score_std{ending}": std,
        f"inception_score_single_split{ending}": inception_score(samples.logits, 1)[0],
    }
    remarks = []
    if (fewest := min(fakes.n, real.n)) <= len(fakes.mu):
        remarks.append(f"a covariance of {len(fakes.mu)} features needs more than {fewest:,} images: FID means little")
    if samples.num_constant:
        remarks.append(f"{samples.num_constant:,} of {fakes.n:,} samples are of a single colour")
    return {
        "step": subject.step,
        "scores": scores,
        "not_official_because": reasons,
        "remarks": remarks,
        "protocol": protocol,
    }


def _provenance(subject: Subject, reference_path: Path, world: World, seconds: float) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    commit, dirty = tracking.git_state()
    return {
        "checkpoint": str(subject.checkpoint),
        "checkpoint_sha256": subject.checkpoint_sha256,
        "ema_sha256": subject.ema_sha256,
        "reference_file": str(reference_path),
        "reference_sha256": hashlib.sha256(reference_path.read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity", "numpy")},
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]  # torch leaves it untyped
        },
        "world_size": world.size,
        "git_commit": commit,
        "git_dirty": dirty,
        "wall_seconds": round(seconds, 1),
    }


def describe(result: dict[str, Any], path: Path) -> str:
    """Returns a result in words: the scores, why they are not the official ones, where the file is."""
    protocol, real = result["protocol"], result["protocol"]["reference"]
    lines = [
        f"step {result['step']:,}: {protocol['num_images']:,} samples of the EMA generator against the "
        f"{real['num_images']:,} images of {real['dataset']} ({real['split']}), {protocol['extractor']} features"
    ]
    width = max(len(name) for name in result["scores"])
    lines += [f"  {name:<{width}}  {score:.4f}" for name, score in result["scores"].items()]
    lines += [f"not official: {reason}" for reason in result["not_official_because"]]
    lines += [f"note: {remark}" for remark in result["remarks"]]
    return "\n".join([*lines, f"result: {path}"])


def _compute_exactly(device: torch.device) -> None:
    """Turns off what trades digits or repeatability for speed: TF32, and the search for the fastest convolution."""
    configure_determinism(True, device)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # a property torch adds late
