"""Measures a training run: reading (`data SET`), updating (`train CONFIG`), updating as it grows (`scaling CONFIG`)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.arguments import at_least
from launch.errors import report, run

if TYPE_CHECKING:
    from pipeline.batch import Batch
    from pipeline.config import Config
    from pipeline.world import World

_EPILOG = """\
examples:
  a local set         python launch/benchmark.py data shards/imagenet128
  from object storage python launch/benchmark.py data s3://bucket/imagenet128 --workers 8 --json data.json
  one update          python launch/benchmark.py train configs/imagenet128.yaml --batch-size 64
  against a textbook  python launch/benchmark.py train configs/imagenet128.yaml train.precision=bf16 --baseline
  does it pay         python launch/benchmark.py train configs/imagenet128.yaml --compare train.precision=bf16
  several processes   accelerate launch --config_file configs/accelerate/one_machine.yaml launch/benchmark.py train ...
  as batches grow     python launch/benchmark.py scaling configs/imagenet128.yaml --vary batch-size=16,32,64,128 \\
                          train.precision=bf16 --plot batch_size.png
  as processes grow   python launch/benchmark.py scaling configs/imagenet128.yaml --vary processes=1,2,4,8
"""

_ROOT = Path(__file__).resolve().parent.parent


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
    shared = argparse.ArgumentParser(add_help=False)  # by `train` and `scaling`
    shared.add_argument("config", type=Path, metavar="CONFIG")
    shared.add_argument("overrides", nargs="*", metavar="section.name=value")
    shared.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: run.device of the configuration")
    shared.add_argument("--updates", type=at_least(1), default=3, metavar="N", help="of a measurement; default 3")
    shared.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="measurements of each; default 5")
    shared.add_argument("--json", type=Path, metavar="FILE", help="write every number to a file, too")
    train = commands.add_parser(
        "train",
        parents=[shared],
        help="how fast a configuration trains",
        description="Does updates of a configuration on noise (or --real images) and prints images/s, what the time of "
        "an update goes to, memory and the share of a matrix product's speed. With --baseline or --compare, two "
        "settings take turns and the ratio of each pair counts, so that other work on the machine falls on both. "
        "Needs torch, PyYAML and pydantic only.",
    )
    train.add_argument("--batch-size", type=at_least(1), metavar="N", help="images of an update over all processes")
    train.add_argument("--real", action="store_true", help="images of data.shards through the training's loader")
    other = train.add_mutually_exclusive_group()
    other.add_argument(
        "--baseline",
        action="store_true",
        help="beside it, the update as textbooks write it: float32, contiguous, torch's spectral norm",
    )
    other.add_argument("--compare", action="append", metavar="section.name=value", help="beside it, with this changed")
    train.add_argument("--trace", type=Path, metavar="FILE", help="write one update's trace for chrome://tracing")
    train.set_defaults(run=_train)
    scaling = commands.add_parser(
        "scaling",
        parents=[shared],
        help="what training costs as one thing grows",
        description="Runs `train` for one value after another, each in processes of its own, and prints a table: "
        "images/s, memory, share of a matrix product's speed. Ends early where the memory does not suffice.",
    )
    scaling.add_argument(
        "--vary",
        type=_growing,
        required=True,
        metavar="NAME=N,N,...",
        help="batch-size (images of a process), processes, or a key such as model.resolution",
    )
    scaling.add_argument(
        "--batch-size", type=at_least(1), default=4, metavar="N", help="images of one process's update; default 4"
    )
    scaling.add_argument("--plot", type=Path, metavar="FILE", help="draw images/s and memory, as PNG")
    scaling.set_defaults(run=_scaling)
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and options.run is _data):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest  # argparse takes positional arguments of a command only where the first of them stand
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


def _train(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks about GPUs that are not there
    from pipeline.config import ConfigError, load_config
    from pipeline.train_benchmark import measure, synthetic, table
    from pipeline.world import World, WorldSizeError

    overrides = list(options.overrides)
    overrides += [f"train.global_batch_size={options.batch_size}"] if options.batch_size else []
    overrides += [f"run.device={options.device}"] if options.device else []
    try:
        configs = {"as configured": load_config(options.config, overrides)}
        if options.compare:
            configs[" ".join(options.compare)] = load_config(options.config, overrides + options.compare)
        first = configs["as configured"]
        if options.baseline and (not first.model.num_classes or first.model.architecture != "resnet"):
            raise ConfigError(
                f"--baseline knows residual networks with classes only, got model.architecture="
                f"{first.model.architecture} with num_classes={first.model.num_classes}; use --compare"
            )
        world = World(first.run.device, first.run.expected_world_size)
        for config in configs.values():
            if config.train.global_batch_size % (config.train.accumulation_steps * world.size):
                raise ConfigError(
                    f"train.global_batch_size={config.train.global_batch_size} cannot be shared by {world.size} "
                    f"process(es) in {config.train.accumulation_steps} micro-batch(es); use a multiple"
                )
        if options.baseline and world.size > 1:
            raise ConfigError(
                "--baseline is one process's update; start it without accelerate launch, or use --compare"
            )
        batches = _real_batches if options.real else synthetic
        found = measure(
            configs,
            world,
            baseline=options.baseline,
            batches=lambda config: batches(config, world),
            updates=options.updates,
            repeats=options.repeats,
            trace=options.trace,
            say=(lambda text: print(text, file=sys.stderr, flush=True)) if world.is_main else (lambda text: None),
        )
    except (WorldSizeError, ValueError, OSError) as error:
        return report(error)
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):  # as a GPU and as a CPU says it
            return report(MemoryError(f"out of memory; use a smaller --batch-size ({str(error).splitlines()[0]})"))
        raise
    if world.is_main:
        print(table(found))
        if options.json:
            options.json.write_text(found.to_json() + "\n")
    world.shutdown()
    return 0


def _growing(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    try:
        numbers = [int(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like batch-size=1,2,4") from None
    if min(numbers) < 1 or not (name in ("batch-size", "processes") or "." in name):
        raise argparse.ArgumentTypeError(f"{text!r}: batch-size, processes or section.name, with numbers from 1 on")
    return name, numbers


def _scaling(options: argparse.Namespace) -> int:
    import torch

    from pipeline.config import ConfigError, load_config
    from pipeline.scaling import Point, plot, table

    name, values = options.vary
    points: list[Point] = []
    failure: Exception | None = None
    try:
        overrides = options.overrides + ([f"run.device={options.device}"] if options.device else [])
        device = load_config(options.config, overrides).run.device  # a mistyped key ends it here
        use_cpu = device == "cpu" or not torch.cuda.is_available()
        for value in values:
            print(f"{name}={value}", file=sys.stderr, flush=True)
            points.append(Point(value, _measured_apart(options, name, value, use_cpu)))
            if points[-1].found is None:
                break
    except (ConfigError, ChildProcessError) as error:
        failure = error  # what was measured before may have taken hours
    if points:
        print(table(name, points))
    if options.plot and len(points) > 1:
        batch = "" if name == "batch-size" else f", {options.batch_size} images of a process"
        plot(options.plot, name, " ".join([options.config.name, *options.overrides]) + batch, points)
    if options.json:
        options.json.write_text(json.dumps([vars(point) for point in points], indent=1) + "\n")
    return report(failure) if failure else 0


def _measured_apart(options: argparse.Namespace, name: str, value: int, use_cpu: bool) -> "dict[str, object] | None":
    """Runs `train` for one value; returns its JSON, or None where the memory did not suffice.

    Raises:
        ChildProcessError: it failed otherwise; its own message is above.
    """
    processes = value if name == "processes" else 1
    batch_size = processes * (value if name == "batch-size" else options.batch_size)
    overrides = options.overrides + ([f"{name}={value}"] if "." in name else [])
    start = [sys.executable]
    if processes > 1:
        file = "cpu_two_processes.yaml" if use_cpu else "one_machine.yaml"
        start += ["-m", "accelerate.commands.launch", "--config_file", str(_ROOT / "configs/accelerate" / file)]
        start += ["--num_processes", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        command = [*start, str(_ROOT / "launch/benchmark.py"), "train", str(options.config), *overrides]
        command += ["--batch-size", str(batch_size), "--updates", str(options.updates), "--json", str(found)]
        command += ["--repeats", str(options.repeats)] + (["--device", options.device] if options.device else [])
        # One thread for one process too, as launchers set it for several: otherwise more threads meet more processes.
        environment = ({"OMP_NUM_THREADS": "1"} if name == "processes" else {}) | os.environ
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stderr is not None
            said = []
            for line in child.stderr:
                said.append(line)
                sys.stderr.write(line)
        if child.returncode == 0:
            return dict(json.loads(found.read_text()))
    if child.returncode == -9 or any("out of memory" in line or "ALLOC_FAILED" in line for line in said):
        return None
    raise ChildProcessError(f"measuring {name}={value} ended with status {child.returncode}; its message is above")


def _real_batches(config: "Config", world: "World") -> "Iterator[Batch]":
    from pipeline.manifest import open_shard_set
    from pipeline.summary import check_data
    from pipeline.trainer import build_loader

    shard_set = open_shard_set(config.data.shards)
    check_data(config, shard_set, world.size)
    return build_loader(config, world, shard_set).batches(0)


if __name__ == "__main__":
    run(main)
