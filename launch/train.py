"""Trains a SAGAN: `accelerate launch --config_file configs/accelerate/one_machine.yaml launch/train.py CONFIG.yaml`."""

import argparse
import signal
import sys

from launch.errors import report, run
from pipeline.config import ConfigError, load_config

_EPILOG = """\
examples:
  one process         python launch/train.py configs/cifar10.yaml data.shards=DIR
  all GPUs            accelerate launch --config_file configs/accelerate/one_machine.yaml \\
                          launch/train.py configs/imagenet128.yaml data.shards=DIR
  two CPU processes   accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml \\
                          launch/train.py configs/cifar10.yaml data.shards=DIR train.steps=200
  DeepSpeed           the same with configs/accelerate/deepspeed_zero1.yaml or deepspeed_zero2.yaml
  look before         python launch/train.py configs/imagenet128.yaml data.shards=DIR --dry-run \\
                          --assume-world-size 512

The run lives in run.dir/run.name: checkpoints, samples, journal.jsonl, config.yaml. The same command again resumes
from its newest checkpoint; a second training there is refused while the first is alive. Ctrl-C, and SIGTERM or SIGUSR1
to any rank, save a checkpoint and end the run with exit status 0; a second Ctrl-C ends it at once. The launcher passes
SIGTERM on and kills what is left after TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (30); SIGUSR1 ends the launcher itself at
once, unless it was started with `trap "" USR1`. Ranks without their launcher save and end.
"""


def main() -> int:
    """Parses the command line, trains, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description="Trains a class-conditional SAGAN from a set of shards, or resumes the run that is there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, such as configs/imagenet128.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="replaces a value of the file; YAML syntax"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, what would be trained and what that needs (memory, traffic, disk, "
        "hours), and end",
    )
    parser.add_argument(
        "--assume-world-size", type=int, metavar="N", help="with --dry-run: reckon with N processes, such as 512"
    )
    arguments = parser.parse_args()
    if arguments.assume_world_size is not None and (not arguments.dry_run or arguments.assume_world_size < 1):
        parser.error("--assume-world-size N goes with --dry-run, and N is at least 1")
    try:
        config = load_config(arguments.config, arguments.overrides)
        # Imported late, so that --help and a mistyped key answer at once.
        from pipeline import trainer

        if arguments.dry_run:
            trainer.dry_run(config, arguments.assume_world_size)
        else:
            trainer.train(config)
    except _user_errors() as error:
        return report(error)
    # All is saved: a scheduler that asks once more must not turn success into failure while Python winds down.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    if "torch" not in sys.modules:
        return (ConfigError,)
    from pipeline.checkpoint import CheckpointError
    from pipeline.health import NonFiniteError
    from pipeline.journal import JournalError
    from pipeline.locks import RunTakenError
    from pipeline.manifest import ShardSetError
    from pipeline.trainer import ReplicaError
    from pipeline.world import RanksDifferError, WorldSizeError

    return (
        ConfigError, WorldSizeError, RanksDifferError, CheckpointError, JournalError, NonFiniteError, ShardSetError,
        ReplicaError, RunTakenError,
    )  # fmt: skip


if __name__ == "__main__":
    run(main)
