"""Scores a run: `accelerate launch --config_file configs/accelerate/one_machine.yaml launch/evaluate.py RUN_DIR`."""

import argparse
from pathlib import Path

from launch.errors import report, run
from pipeline.config import Config, ConfigError, load_config

_EPILOG = """\
examples (L is `accelerate launch --config_file configs/accelerate/one_machine.yaml`):
  official protocol     L launch/evaluate.py runs/imagenet128
  will it work?         python launch/evaluate.py runs/imagenet128 --check
  beside a training     L launch/evaluate.py runs/imagenet128 --watch evaluation.num_images=10000
  the best so far       L launch/evaluate.py runs/imagenet128 --checkpoint best
  raw weights           L launch/evaluate.py runs/imagenet128 evaluation.weights=raw
  truncation curve      L launch/evaluate.py runs/imagenet128 evaluation.truncations=[0.5,1.0,1.5,2.0]
  each class by itself  L launch/evaluate.py runs/imagenet128 evaluation.intra_class_images=50
  smoke run on a CPU    python launch/evaluate.py runs/demo evaluation.features=random evaluation.num_images=1000

Scores the averaged generator against the training shards: FID, Inception Score, KID, precision and recall. Results go
with their provenance to RUN_DIR/evaluations/ and to the run's MLflow record. Images do not depend on the number of
processes. Only 50,000 samples, the published Inception weights and a complete training set make a number that is called
`fid`; every other has another name and says why. The same command again shows the result that is there. Training leaves
a snapshot every evaluation.every_steps; checkpoints can be scored too. docs/evaluation.md explains each number.
"""

_MAY_DIFFER = (
    "run.", "evaluation.", "tracking.", "data.shards=", "data.num_workers=", "data.prefetch_batches=",
    "data.cache_dir=", "data.cache_bytes=",
)  # fmt: skip


def main() -> int:
    """Parses the command line, evaluates, and returns the exit status."""
    arguments = _parse()
    try:
        config = _read_config(arguments.run_dir, arguments.overrides)
    except ConfigError as error:
        return report(error)
    # Imported late, so that --help and a mistyped key answer at once.
    from pipeline import evaluation, preflight, real, watch
    from pipeline.features import EvaluationError
    from pipeline.journal import JournalError
    from pipeline.manifest import ShardSetError
    from pipeline.report import sync
    from pipeline.results import ResultError
    from pipeline.world import WorldSizeError

    run_dir = arguments.run_dir
    try:
        if arguments.check:
            return preflight.check(run_dir, config, arguments.checkpoint)
        if arguments.watch:
            return watch.watch(run_dir, config, arguments.until_step)
        if arguments.real:
            real.score_real(run_dir, config)
        elif arguments.sync:
            return sync(run_dir, config)
        else:
            return evaluation.evaluate(run_dir, config, arguments.checkpoint)
    except (ConfigError, EvaluationError, ShardSetError, WorldSizeError, JournalError, ResultError) as error:
        return report(error)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description="Computes FID, Inception Score, KID, precision and recall of a run's snapshots and checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, such as runs/imagenet128")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value",
        help="replaces a value of RUN_DIR/config.yaml: evaluation.*, data.shards, data.num_workers, data.cache_*, "
        "run.*, tracking.*",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", default="newest", type=_checkpoint, metavar="newest|best|all|STEP",
        help="what is scored: the newest (default), the best by FID so far, all there are, or that of a step",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--watch", action="store_true",
        help="scores each snapshot as training leaves it, once; ends when the training is done",
    )  # fmt: skip
    what.add_argument("--check", action="store_true", help="tries all that is cheap and may fail, and scores nothing")
    what.add_argument(
        "--real", action="store_true",
        help="scores evaluation.validation_shards as if they were samples: what real images reach",
    )  # fmt: skip
    what.add_argument("--sync", action="store_true", help="sends results to MLflow that it has not got yet")
    parser.add_argument(
        "--until-step", type=int, metavar="N", help="with --watch: ends after the last snapshot up to step N"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.until_step is not None and not arguments.watch:
        parser.error("--until-step goes with --watch")
    if arguments.checkpoint != "newest" and (arguments.watch or arguments.real or arguments.sync):
        parser.error("--checkpoint does not go with --watch, --real or --sync")
    return arguments


def _checkpoint(text: str) -> str:
    if text not in ("newest", "best", "all") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be newest, best, all or a step, got {text!r}")
    return text


def _read_config(run_dir: Path, overrides: list[str]) -> Config:
    """Reads what the run was trained with, and what this evaluation has of its own."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} is no run: it holds no config.yaml. A run is the directory run.dir/run.name that "
            "launch/train.py makes"
        )
    for override in overrides:
        if not override.startswith(_MAY_DIFFER):
            raise ConfigError(
                f"override {override!r}: an evaluation takes the run as it was trained; only "
                "evaluation.*, data.shards, data.num_workers, data.cache_*, run.* and tracking.* can be given"
            )
    # The training's number of processes is not the evaluation's.
    return load_config(path, ["run.expected_world_size=null", *overrides])


if __name__ == "__main__":
    run(main)
