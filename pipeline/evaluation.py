"""Scores runs: from a run directory to result files that say how each number came about.

All that is cheap and may fail comes before the first sample. A result that is there already is shown, not made again.
"""

import hashlib
import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import (
    checkpoint,
    feature_pass,
    generated,
    intra_class,
    reference,
    results,
    scores,
    snapshots,
    subject,
    tracking,
    truncation,
)
from pipeline.config import Config, ConfigError, load_config
from pipeline.feature_pass import Seen, Statistics, on_rank_0
from pipeline.features import (
    IS_SHUFFLE_SEED,
    IS_SPLITS,
    KID_SEED,
    KID_SUBSETS,
    NEIGHBOURS,
    EvaluationError,
    Extractor,
    Weights,
    frechet_distance,
    inception,
    random_features,
    read_weights,
)
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.mlflow_sender import count_unsent
from pipeline.own_extractor import open_own
from pipeline.results import Result
from pipeline.subject import Subject, UnreadableSubjectError
from pipeline.world import World, configure_determinism

FORMAT = 2
POLL_SECONDS = 10.0  # between looks for a new snapshot


def evaluate(run_dir: Path, config: Config, which: str = "newest") -> int:
    """Scores what `--checkpoint` asks for, writes result files and tells MLflow; called on every rank.

    Args:
        run_dir: the run; nothing but RUN/evaluations is written.
        config: of the run, with the overrides of this evaluation.
        which: `newest`, `best`, `all` or a step.

    Returns:
        Exit status: 1 if some of `all` could not be scored.

    Raises:
        ConfigError: the configuration does not fit the checkpoint or the data.
        EvaluationError: no checkpoint, no weights, no place for the reference, samples that cannot be scored.
        ShardSetError: the reference set is missing or damaged.
    """
    evaluator = Evaluator(run_dir, config)
    paths = on_rank_0(evaluator.world, lambda: subject.choose(run_dir, which, config))
    if which == "all":
        num_failed = sum(not evaluator.try_to_score(path) for path in paths)
    else:
        evaluator.score(paths[0])
        num_failed = 0
    evaluator.world.shutdown()
    return int(num_failed > 0)


def watch(run_dir: Path, config: Config, until_step: int | None = None) -> int:
    """Scores each snapshot as training leaves it, oldest first; called on every rank.

    Ends when the training is done and all its snapshots are scored, or after one of `until_step` or later.

    Returns:
        Exit status: 1 if some could not be scored.
    """
    evaluator = Evaluator(run_dir, config)
    evaluator.prepare()
    seen: set[str] = set()
    num_failed = 0
    while True:
        path, is_over = on_rank_0(evaluator.world, lambda: _next_snapshot(run_dir, seen, until_step))
        if path is not None:
            num_failed += not evaluator.try_to_score(path)
        elif is_over:
            break
        else:
            time.sleep(POLL_SECONDS)
    evaluator.world.shutdown()
    return int(num_failed > 0)


def _next_snapshot(run_dir: Path, seen: set[str], until_step: int | None) -> tuple[Path | None, bool]:
    """Returns the oldest snapshot that was not seen yet, and whether no more will come or is wanted."""
    is_over = _is_done(run_dir)  # asked first: a snapshot that comes in between is found below
    found = [
        path for path in snapshots.published(run_dir) if until_step is None or checkpoint.step_of(path) <= until_step
    ]
    for path in found:
        try:
            # By content: after a rollback other weights may take a step's place.
            key = hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        except FileNotFoundError:
            continue  # being replaced just now
        if key not in seen:
            seen.add(key)
            return path, False
    last = max((checkpoint.step_of(path) for path in snapshots.published(run_dir)), default=-1)
    return None, is_over or (until_step is not None and last >= until_step)


def _is_done(run_dir: Path) -> bool:
    """Returns whether training has done all the steps of its configuration, which may have been raised since."""
    try:
        done = int((run_dir / "DONE").read_text())
        return done >= load_config(run_dir / "config.yaml").train.steps
    except (FileNotFoundError, ValueError, ConfigError):  # one of them is being written
        return False


def sync(run_dir: Path, config: Config) -> None:
    """Tells MLflow of every result it has not been told of; called on every rank."""
    world = World(config.run.device, config.run.expected_world_size)
    if world.is_main:
        found = sorted(results.directory(run_dir).glob("*/*.json"))
        for path in found:
            tracking.record_evaluation(run_dir, *_for_tracking(results.read(path), path))
        tracking.send_unsent(config, run_dir)
        points, files = count_unsent(run_dir)
        print(f"{len(found)} results of {run_dir}; {points} points and {files} files are not sent yet")
    world.shutdown()


class Evaluator:
    """Scores steps of a run by one protocol; made on every rank, and each method is called on every rank.

    Args:
        run_dir: the run.
        config: of the run, with the overrides of this evaluation.
    """

    def __init__(self, run_dir: Path, config: Config):
        self.run_dir, self.config = run_dir, config
        self.world = World(config.run.device, config.run.expected_world_size)
        compute_exactly(self.world.device)
        self.shard_set = open_shard_set(config.data.shards)
        check_reference_set(config, self.shard_set)
        if config.evaluation.intra_class_images and not config.model.num_classes:
            raise ConfigError("evaluation.intra_class_images needs classes, but this model has none; leave it out")
        if config.evaluation.truncations:
            truncation.check_can_plot()
        scores.check_counts(config.evaluation, config.evaluation.num_images, self.shard_set.index.num_samples)

    @cached_property
    def extractor(self) -> Extractor:
        """The feature extractor; weights are read by rank 0."""
        return open_extractor(self.config, self.world)

    @cached_property
    def references(self) -> "References":
        """What samples are compared with; made if it is not there yet."""
        return obtain_references(self.config, self.shard_set, self.extractor, self.world)

    def prepare(self) -> None:
        """Gets ready what all steps share."""
        assert self.references

    def try_to_score(self, path: Path) -> bool:
        """Scores a step, or says on stderr why not; what was pruned meanwhile is no failure."""
        try:
            self.score(path)
        except UnreadableSubjectError as error:
            self._say(f"passed over: {error}")
            return "was removed" in str(error)
        except EvaluationError as error:
            self._say(f"error: {error}")
            return False
        return True

    def score(self, path: Path) -> None:
        """Scores a snapshot or checkpoint, writes its result and tells MLflow.

        Raises:
            ConfigError: it does not fit the run or the data.
            EvaluationError: it cannot be read, or its samples cannot be scored.
        """
        world, config = self.world, self.config
        chosen = on_rank_0(world, lambda: subject.read(path, config, self.shard_set))
        protocol = protocol_of(config, self.shard_set, self.extractor)
        target = results.path_of(self.run_dir, f"step-{chosen.step:08d}", chosen.weights_sha256, protocol)
        if world.broadcast(target.exists()):
            self._say(f"{target} is there already: the same weights, scored by the same protocol")
        else:
            self._make(chosen, protocol, target)
        if error := on_rank_0(world, lambda: tell(self.run_dir, config, target)):
            raise EvaluationError(f"{error} (on record in {target})")

    def _make(self, chosen: Subject, protocol: dict[str, Any], target: Path) -> None:
        """Makes the samples and from them the result file, last."""
        started = time.perf_counter()
        references = self.references
        generator = generated.load(chosen.tensors, self.config, self.world.device)
        result: Result = {"step": chosen.step, "protocol": protocol}
        try:
            seen = generated.make_samples(generator, self.config, self.extractor, self.world)
            seconds = time.perf_counter() - started
            result |= self._scores(seen, protocol)
            result |= self._extras(generator, chosen.step, result, target)
        except generated.UnusableSamplesError as error:
            # The same weights fail in the same way next time: this is their result.
            result |= {"error": str(error)}
            seconds = time.perf_counter() - started
        if self.world.is_main:
            result["provenance"] = provenance_of(self.world) | {
                "checkpoint": str(chosen.path),
                "checkpoint_sha256": chosen.manifest_sha256,
                "weights_sha256": chosen.weights_sha256,
                "reference_file": str(references.path),
                "reference_sha256": references.sha256,
                "images_per_second": round(self.config.evaluation.num_images / seconds, 2),
                "wall_seconds": round(time.perf_counter() - started, 1),
            }
            results.write(target, result)

    def _scores(self, seen: Seen, protocol: dict[str, Any]) -> Result:
        """Returns scores by name and what is to be said of them; on rank 0, others only wait for them."""
        if not self.world.is_main:
            return {}
        evaluation, references = self.config.evaluation, self.references
        n, complete = seen.statistics.n, protocol["reference"]["complete"]
        ending, inception_ending, reasons = scores.score_names(self.extractor, evaluation, n, complete)
        found = scores.compare(seen, references.real, evaluation, (ending, inception_ending))
        for name, other in references.others.items() if "fid" in evaluation.metrics else ():
            found[f"fid_{name}{ending}"] = frechet_distance(
                seen.statistics.mu, seen.statistics.sigma, other.mu, other.sigma
            )
        remarks = scores.remarks(seen, references.real.n) + references.warnings
        return {"scores": found, "not_official_because": reasons, "remarks": remarks}

    def _extras(self, generator: nn.Module, step: int, result: Result, target: Path) -> Result:
        """Makes what is asked for beside the scores, and writes its files beside the result."""
        evaluation, found = self.config.evaluation, {}
        if self.world.is_main:
            target.parent.mkdir(parents=True, exist_ok=True)
        if evaluation.truncations:
            points = truncation.score_truncations(
                generator, self.config, self.extractor, self.references.real, self.world
            )
            if self.world.is_main:
                ending = scores.score_names(self.extractor, evaluation, evaluation.num_images, True)[0]
                truncation.plot(target.with_name(f"{target.stem}-truncation.png"), points, step, f"fid{ending}")
                found["truncation_curve"] = points
        if evaluation.intra_class_images:
            rows = reference.obtain_features(self.shard_set, self.extractor, self.config, self.world)
            classes = intra_class.score_classes(
                generator, self.config, self.shard_set, rows, self.extractor, self.world
            )
            if self.world.is_main:
                names = self.shard_set.manifest.class_names
                intra_class.write_table(target.with_name(f"{target.stem}-classes.csv"), classes, names)
                name = f"intra_fid{self._intra_ending(result)}"
                result["scores"][name] = sum(score.fid for score in classes) / len(classes)
        return found

    def _intra_ending(self, result: Result) -> str:
        """Returns the ending of intra-class FID's name; it counts images per class, not in all."""
        n, complete = self.config.evaluation.intra_class_images, result["protocol"]["reference"]["complete"]
        ending = scores.score_names(self.extractor, self.config.evaluation, scores.OFFICIAL_NUM_IMAGES, complete)[0]
        return ending + ("" if n == intra_class.USUAL_NUM_IMAGES else f"_{n}")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=sys.stderr, flush=True)


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


def tell(run_dir: Path, config: Config, path: Path) -> str | None:
    """Prints a result and hands it to MLflow, which records it once however often it is told; returns its error."""
    result = results.read(path)
    print(describe(result, path), flush=True)
    tracking.log_evaluation(config, run_dir, *_for_tracking(result, path))
    error: str | None = result.get("error")
    return error


def _for_tracking(result: Result, path: Path) -> tuple[int, dict[str, float], list[Path]]:
    metrics = {f"eval/{name}": score for name, score in result.get("scores", {}).items()}
    return result["step"], metrics, [path, *sorted(path.parent.glob(f"{path.stem}-*"))]


def provenance_of(world: World) -> dict[str, Any]:
    """Returns what made a result: versions, device, precision, processes, commit."""
    cuda = world.device.type == "cuda"
    commit, dirty = tracking.git_state()
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity", "numpy")},
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.fp32_precision == "tf32",
            "convolution": torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]  # torch leaves it untyped
        },
        "world_size": world.size,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def describe(result: Result, path: Path) -> str:
    """Returns a result in words: the scores, why they are not the official ones, where the file is."""
    protocol, real = result["protocol"], result["protocol"]["reference"]
    what = {"ema": "samples of the EMA generator", "raw": "samples of the raw generator", "none": "real images"}
    lines = [
        f"step {result['step']:,}: {protocol['num_images']:,} {what[protocol['weights']]} against the "
        f"{real['num_images']:,} images of {real['dataset']} ({real['split']}), {protocol['extractor']} features"
    ]
    if "error" in result:
        return "\n".join([*lines, f"  no scores: {result['error']}", f"result: {path}"])
    width = max(len(name) for name in result["scores"])
    lines += [f"  {name:<{width}}  {score:.4f}" for name, score in result["scores"].items()]
    for point in result.get("truncation_curve", ()):
        lines += ["  truncation " + ", ".join(f"{name} {value:.4g}" for name, value in point.items() if value)]
    lines += [f"not official: {reason}" for reason in result["not_official_because"]]
    lines += [f"note: {remark}" for remark in result["remarks"]]
    return "\n".join([*lines, f"result: {path}"])


def compute_exactly(device: torch.device) -> None:
    """Turns off what trades digits or repeatability for speed: TF32, and the search for the fastest convolution."""
    configure_determinism(True, device)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # a property torch adds late
