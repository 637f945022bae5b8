"""Scores a run: `accelerate launch --config_file configs/accelerate/one_machine.yaml launch/evaluate.py RUN_DIR`."""

import argparse
import sys
from pathlib import Path

from launch.errors import report
from pipeline.config import Config, ConfigError, load_config

_EPILOG = """\
examples:
  official protocol   accelerate launch --config_file configs/accelerate/one_machine.yaml \\
                          launch/evaluate.py runs/imagenet128
  fewer samples       python launch/evaluate.py runs/imagenet128 evaluation.num_images=10000
  smoke run on a CPU  python launch/evaluate.py runs/demo evaluation.features=random evaluation.num_images=1000

Computes FID against the training shards and the Inception Score of the averaged generator, and writes them with their
provenance to RUN_DIR/evaluations/ and to the run's MLflow record. The numbers do not depend on the number of processes.
Only 50,000 samples, the published Inception weights and a complete training set make a number that is called `fid`;
every other has another name. The same command again shows the result that is there.
"""

_MAY_DIFFER = ("run.", "evaluation.", "tracking.", "data.shards=", "data.num_workers=", "data.prefetch_batches=")


def main() -> int:
    """Parses the command line, evaluates, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description="Computes FID and Inception Score of a run's newest checkpoint.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of a run, such as runs/imagenet128")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value",
        help="replaces a value of RUN_DIR/config.yaml: evaluation.*, data.shards, data.num_workers, run.*, tracking.*",
    )  # fmt: skip
    arguments = parser.parse_args()
    try:
        config = _read_config(arguments.run_dir, arguments.overrides)
    except ConfigError as error:
        return report(error)
    # Imported late, so that --help and a mistyped key answer at once.
    from pipeline import evaluation
    from pipeline.features import EvaluationError
    from pipeline.journal import JournalError
    from pipeline.manifest import ShardSetError
    from pipeline.world import WorldSizeError

    try:
        evaluation.evaluate(arguments.run_dir, config)
    except (ConfigError, EvaluationError, ShardSetError, WorldSizeError, JournalError) as error:
        return report(error)
    return 0


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
                "evaluation.*, data.shards, data.num_workers, run.* and tracking.* can be given"
            )
    # The training's number of processes is not the evaluation's.
    return load_config(path, ["run.expected_world_size=null", *overrides])


if __name__ == "__main__":
    sys.exit(main())
