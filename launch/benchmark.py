"""Measures the parts of a training run: `python launch/benchmark.py data SET`."""

import argparse
import json
import sys
from pathlib import Path

from launch.arguments import at_least
from launch.errors import report

_EPILOG = """\
examples:
  a local set         python launch/benchmark.py data shards/imagenet128
  from object storage python launch/benchmark.py data s3://bucket/imagenet128 --workers 8 --json data.json
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, measures, prints a table, and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py",
        description="Measures the parts of a training run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = commands.add_parser(
        "data",
        help="how fast a set is read and decoded",
        description="Reads a set by the training's loader and by stock webdataset in turn, on the same shards with the "
        "same decoder: images/s, images per CPU-second over all processes, memory per worker; and how long a resume "
        "plans and a consumer of 500 images/s waits. Rates per CPU-second are worth more than images/s on a machine "
        "that does other work.",
    )
    data.add_argument("set", metavar="SET", help="directory or s3://bucket/prefix")
    data.add_argument("--size", type=at_least(1), metavar="PIXELS", help="of sets of original sizes; default 128")
    data.add_argument("--batch-size", type=at_least(1), default=256, metavar="N", help="default 256")
    data.add_argument("--workers", type=at_least(0), default=2, metavar="N", help="decoding processes; default 2")
    data.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement; default 5")
    data.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="measurements of each; default 5")
    data.add_argument("--cache-dir", metavar="DIR", help="for blocks of a remote set, as data.cache_dir of a run")
    data.add_argument("--no-webdataset", action="store_true", help="measure the loader alone")
    data.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file, too")
    data.set_defaults(run=_data)
    options = parser.parse_args(arguments)
    return int(options.run(options))


def _data(options: argparse.Namespace) -> int:
    from pipeline.block_cache import BlockCache
    from pipeline.data_benchmark import measure, table
    from pipeline.manifest import ShardSetError, open_shard_set

    try:
        shard_set = open_shard_set(options.set)
        found = measure(
            shard_set,
            image_size=options.size or shard_set.manifest.image_size or 128,
            batch_size=options.batch_size,
            num_workers=options.workers,
            seconds=options.seconds,
            repeats=options.repeats,
            against_webdataset=not options.no_webdataset,
            cache=BlockCache(options.cache_dir),
        )
    except (ShardSetError, ValueError, OSError) as error:
        return report(error)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
