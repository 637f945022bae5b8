"""Scores runs: from a run directory to result files that say how each number came about.

All that is cheap and may fail comes before the first sample. A result that is there already is shown, not made again.
"""

import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import comparison, generated, intra_class, reference, results, scores, subject, truncation
from pipeline.comparison import References
from pipeline.config import Config, ConfigError
from pipeline.feature_pass import Seen, on_rank_0
from pipeline.features import EvaluationError, Extractor, frechet_distance
from pipeline.manifest import open_shard_set
from pipeline.provenance import compute_exactly, provenance_of
from pipeline.report import tell
from pipeline.results import Result
from pipeline.subject import Subject, UnreadableSubjectError
from pipeline.world import World


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
        comparison.check_reference_set(config, self.shard_set)
        if config.evaluation.intra_class_images:
            intra_class.check_classes(config, self.shard_set)
        scores.check_counts(config.evaluation, config.evaluation.num_images, self.shard_set.index.num_samples)

    @cached_property
    def extractor(self) -> Extractor:
        """The feature extractor; weights are read by rank 0."""
        return comparison.open_extractor(self.config, self.world)

    @cached_property
    def references(self) -> References:
        """What samples are compared with; made if it is not there yet."""
        return comparison.obtain_references(self.config, self.shard_set, self.extractor, self.world)

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
        except (EvaluationError, ConfigError) as error:
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
        protocol = comparison.protocol_of(config, self.shard_set, self.extractor)
        target = results.path_of(self.run_dir, f"step-{chosen.step:08d}", chosen.weights_sha256, protocol)
        if on_rank_0(world, lambda: _is_there(target)):
            self._say(f"{target} is there already: the same weights, scored by the same protocol")
        else:
            self._make(chosen, protocol, target)
        if on_rank_0(world, lambda: subject.is_given_up(self.run_dir, chosen)):
            self._say(f"the run went back and gave up the weights of {target}: they are not told to MLflow")
            return
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
        except generated.UnusableSamplesError as error:
            # The same weights fail in the same way next time: this is their result.
            result |= {"error": str(error)}
            seconds = time.perf_counter() - started
        else:
            seconds = time.perf_counter() - started
            result |= on_rank_0(self.world, lambda: self._scores(seen, protocol))
            result["not_scored"] = self._add_extras(generator, result, target)
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
        """Returns scores by name and what is to be said of them."""
        evaluation, references = self.config.evaluation, self.references
        n, complete = seen.statistics.n, protocol["reference"]["complete"]
        ending, inception_ending, reasons = scores.score_names(self.extractor, evaluation, n, complete)
        found = scores.compare(seen, references.real, evaluation, (ending, inception_ending))
        for name, other in references.others.items() if "fid" in evaluation.metrics else ():
            of_split = protocol[name]["complete"] if name == "validation" else complete
            ending = scores.score_names(self.extractor, evaluation, n, of_split)[0]
            found[f"fid_{name}{ending}"] = frechet_distance(
                seen.statistics.mu, seen.statistics.sigma, other.mu, other.sigma
            )
        remarks = scores.remarks(seen, references.real.n) + references.warnings
        return {"scores": found, "not_official_because": reasons, "remarks": remarks}

    def _add_extras(self, generator: nn.Module, result: Result, target: Path) -> list[str]:
        """Adds what is asked for beside the scores, files beside the result; returns what could not be scored."""
        config, world, failures = self.config, self.world, []
        if config.evaluation.truncations:
            complete = result["protocol"]["reference"]["complete"]
            names = truncation.names(self.extractor, config.evaluation, complete)
            points = truncation.score_truncations(generator, config, self.extractor, self.references.real, names, world)
            good = [point for point in points if "error" not in point]
            failures += [
                f"truncation {point['truncation']:g}: {point['error']}" for point in points if "error" in point
            ]
            path = target.with_name(f"{target.stem}-truncation.png")
            if good:
                on_rank_0(world, lambda: truncation.plot(path, good, result["step"]))
            result["truncation_curve"] = points
        if config.evaluation.intra_class_images:
            rows = reference.obtain_features(self.shard_set, self.extractor, config, world)
            classes = intra_class.score_classes(generator, config, self.shard_set, rows, self.extractor, world)
            class_names = self.shard_set.manifest.class_names
            table = target.with_name(f"{target.stem}-classes.csv")
            on_rank_0(world, lambda: intra_class.write_table(table, classes, class_names))
            if errors := [score.error for score in classes if score.error]:
                failures.append(f"intra-class FID: {len(errors)} of {len(classes)} classes, the first: {errors[0]}")
            else:
                result["scores"][f"intra_fid{self._intra_ending(result)}"] = intra_class.mean(classes)
        return failures

    def _intra_ending(self, result: Result) -> str:
        """Returns the ending of intra-class FID's name; it counts images per class, not in all."""
        n, complete = self.config.evaluation.intra_class_images, result["protocol"]["reference"]["complete"]
        ending = scores.score_names(self.extractor, self.config.evaluation, scores.OFFICIAL_NUM_IMAGES, complete)[0]
        return ending + ("" if n == intra_class.USUAL_NUM_IMAGES else f"_{n}")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=sys.stderr, flush=True)


def _is_there(path: Path) -> bool:
    """Looks for a result; finds out before the work whether there is a place for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.exists()
