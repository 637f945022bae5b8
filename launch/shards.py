"""Builds, merges, adopts, uploads, shows and verifies shard sets.

python launch/shards.py build --source ILSVRC2012_img_train.tar --destination shards/imagenet128 --size 128
python launch/shards.py build --source ILSVRC2012_img_train.tar --destination s3://bucket/imagenet128 --size 128
python launch/shards.py build --source img_align_celeba --destination shards/celeba64 --size 64 --crop 178
python launch/shards.py build ... --destination DIR_OR_S3 --part $SLURM_ARRAY_TASK_ID --parts 8   # sbatch --array=0-7
python launch/shards.py merge DIR_OR_S3                                                           # when all are done
python launch/shards.py index s3://bucket/imagenet-wds --class-names imagenet_classes.txt --output shards/imagenet-wds
python launch/shards.py upload shards/imagenet128 s3://bucket/imagenet128
python launch/shards.py show shards/imagenet128
python launch/shards.py verify s3://bucket/imagenet128

The store of an s3:// address is that of the usual AWS variables and files, or is named in the address:
"s3://bucket/prefix?endpoint_url=https://host&region=R&profile=P&addressing_style=path&anonymous=true".
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import at_least
from launch.errors import run
from pipeline import shards
from pipeline.adopt import adopt
from pipeline.foreign_shard import AdoptError, Reading
from pipeline.ground_truth import LabelError
from pipeline.manifest import ShardSetError, open_shard_set
from pipeline.object_store import LocationError
from pipeline.publish import merge, ranges
from pipeline.set_summary import describe_set, in_numbers
from pipeline.sources import SourceError, list_source
from pipeline.tars import TarError
from pipeline.upload import upload
from pipeline.verify import verify
from pipeline.workers import WorkerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 1 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (
        SourceError,
        LabelError,
        TarError,
        shards.BuildError,
        AdoptError,
        ShardSetError,
        LocationError,
        WorkerError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; what is finished stays, the same command goes on from there", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shards.py", description="Builds, merges, adopts, uploads, shows and verifies sets of image shards."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser(
        "build",
        help="make a set from images",
        description="Makes a set of WebDataset shards from images. Run the same command again after an interruption: "
        "it goes on where it was. The result does not depend on --workers. Into s3:// shards are sent as they are "
        "finished, and at most two per worker lie on local disk. Nodes share the work by --part and --parts; `merge` "
        "then makes the same set.",
    )
    build.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="SRC",
        help="ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar as they are, one folder per class, one folder of "
        "images (no labels), or a tar of either; read in place",
    )
    build.add_argument(
        "--destination", required=True, metavar="DIR", help="new or empty directory, or s3://bucket/prefix"
    )
    build.add_argument("--size", type=at_least(1), required=True, metavar="PIXELS", help="side of the square images")
    build.add_argument(
        "--crop",
        type=at_least(1),
        metavar="PIXELS",
        help="side of the square that is cut out of the middle of each image before it is resized: 178 or 108 for "
        "CelebA's aligned faces; default: the shorter side of each",
    )
    build.add_argument(
        "--encoding",
        choices=["webp", "raw", "png", "jpeg444"],
        default="webp",
        help="webp (default) and png are lossless, raw is uint8 (largest, fastest), jpeg444 is lossy, quality 95",
    )
    build.add_argument("--samples-per-shard", type=at_least(1), default=2048, metavar="N", help="default 2048")
    build.add_argument(
        "--workers",
        type=at_least(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: the cores this process may use",
    )
    build.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the order of the images; default 0")
    build.add_argument(
        "--limit-per-class", type=at_least(1), metavar="N", help="at most N images of each class, drawn at random"
    )
    build.add_argument(
        "--split", metavar="NAME", help="default: train, val or test where the source's name says so, else all"
    )
    build.add_argument(
        "--ground-truth",
        type=Path,
        metavar="FILE",
        help="labels of ILSVRC2012_img_val.tar or another flat source: the devkit (folder or tar), or a text file of "
        "lines `FILE CLASS`, or of a line `CLASS` per image in the order of their names",
    )
    build.add_argument(
        "--class-names", type=Path, metavar="FILE", help="lines `CLASS title`: what a person calls each class"
    )
    build.add_argument(
        "--max-skipped", type=at_least(0), default=0, metavar="N", help="unreadable images to put up with; default 0"
    )
    build.add_argument(
        "--part",
        type=at_least(0),
        metavar="I",
        help="build only the shards whose number modulo N is I, I from 0 to N - 1: $SLURM_ARRAY_TASK_ID of a job array "
        "with --array=0-(N-1); what decides the bytes (source, size, encoding, seed, ...) must be equal in all parts. "
        "--max-skipped counts this part's images, that of `merge` all",
    )
    build.add_argument(
        "--parts",
        type=at_least(1),
        metavar="N",
        help="in how many parts; a fixed number, as $SLURM_ARRAY_TASK_COUNT is smaller when some tasks run again",
    )
    build.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="where shards for s3:// lie until they are sent; default: the directory for temporary files ($TMPDIR)",
    )
    build.set_defaults(run=_build)

    join = commands.add_parser(
        "merge",
        help="make a set of shards built with --part",
        description="Makes a set of the shards that `build --part` left at a destination: checks that each is there "
        "and writes index and manifest. Needs no source. Names the parts that are missing. `verify` checks the bytes.",
    )
    join.add_argument("set", metavar="SET", help="directory or s3://bucket/prefix")
    join.add_argument(
        "--max-skipped",
        type=at_least(0),
        default=0,
        metavar="N",
        help="unreadable images to put up with in all parts together; default 0",
    )
    join.set_defaults(run=_merge)

    index = commands.add_parser(
        "index",
        help="adopt WebDataset tars that others built",
        description="Makes manifest and index for WebDataset tars that others built (webdataset.ShardWriter, "
        "img2dataset, ImageNet sets of the hub), so that they can be trained on: reads each tar once, changes none; "
        "run the same command again after an interruption: it goes on where it was. "
        "A sample is consecutive members of one name up to its first dot, with one .jpg, .jpeg, .png or .webp of any "
        "size. Its label is a number or a name, in .cls or in .json under label, cls or class_id; a set without any "
        "is unconditional. Other members are passed over and counted. The result does not depend on --workers.",
    )
    index.add_argument("shards", metavar="SHARDS", help="directory or s3://bucket/prefix of the tars")
    index.add_argument(
        "--output",
        metavar="SET",
        help="directory or s3://bucket/prefix for manifest and index, which is then the address of the set; "
        "default: beside the tars",
    )
    index.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="lines `CLASS title` in the order of the labels, for labels that are such CLASSes or count these lines "
        "from 0; default: the numbers or names found, sorted",
    )
    index.add_argument("--label-key", metavar="KEY", help="of .json; default: .cls, else label, cls or class_id")
    index.add_argument("--image-key", metavar="EXTENSION", help="of the image, where samples have several")
    index.add_argument(
        "--check-images",
        action="store_true",
        help="decode every image; default: its header alone is read, so that an image damaged further on is found "
        "when a training first reads it",
    )
    index.add_argument(
        "--max-skipped",
        type=at_least(0),
        default=0,
        metavar="N",
        help="samples without a readable image to leave out; the manifest lists them; default 0",
    )
    index.add_argument(
        "--split", metavar="NAME", help="default: train, val or test where the address says so, else all"
    )
    index.add_argument(
        "--complete",
        action="store_true",
        help="the tars hold every image of this split, which they cannot tell themselves: without it no score "
        "against this set is called fid",
    )
    index.add_argument(
        "--workers",
        type=at_least(1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; default: the cores this process may use",
    )
    index.set_defaults(run=_index)

    send = commands.add_parser(
        "upload",
        help="copy a set to object storage",
        description="Copies a set to object storage, the manifest last. Run the same command again after an "
        "interruption: what is there and equal is kept. The store is that of the usual AWS variables and files, or is "
        'named in the address: "s3://bucket/prefix?endpoint_url=https://host&region=R&profile=P'
        '&addressing_style=path&anonymous=true".',
    )
    send.add_argument("set", type=Path, metavar="DIR")
    send.add_argument("destination", metavar="S3_ADDRESS", help="s3://bucket/prefix")
    send.add_argument("--workers", type=at_least(1), default=8, metavar="N", help="files sent at once; default 8")
    send.set_defaults(run=_upload)

    show = commands.add_parser("show", help="print what is in a set")
    show.add_argument("set", metavar="SET", help="directory or s3://bucket/prefix")
    show.set_defaults(run=_show)

    check = commands.add_parser("verify", help="hash everything in a set again")
    check.add_argument("set", metavar="SET", help="directory or s3://bucket/prefix")
    check.add_argument("--workers", type=at_least(1), default=8, metavar="N", help="shards read at once; default 8")
    check.set_defaults(run=_verify)
    return parser


def _build(options: argparse.Namespace) -> int:
    destination, built_as = options.destination, {"workers": options.workers, "max_skipped": options.max_skipped}
    shards.check_part(options.part, options.parts)
    shards.check_destination(destination, options.source, options.scratch)
    source = list_source(options.source, options.ground_truth, options.class_names)
    classes = f"{len(source.class_names):,} classes" if source.class_names else "no labels: an unconditional set"
    print(f"source: {source.layout}, {len(source):,} images, {classes}")
    if source.num_hidden:
        print(f"passed over: {source.num_hidden:,} hidden file(s), whose name or folder begins with a dot")
    plan = shards.plan(
        source,
        image_size=options.size,
        encoding=options.encoding,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        limit_per_class=options.limit_per_class,
        split=options.split,
        crop=options.crop,
    )
    if options.part is None:
        report = shards.build(plan, destination, **built_as, scratch=options.scratch)
        print(_what_was_built(report, options) + "\n")
        print(describe_set(report.shard_set))
    else:
        part = shards.build_part(plan, destination, options.part, options.parts, **built_as, scratch=options.scratch)
        print(f"part {options.part} of {options.parts}: {_what_was_built(part, options)}")
        if not part.was_there:
            print(_what_is_missing(part, options))
    return 0


def _what_was_built(report: shards.BuildReport | shards.PartReport, options: argparse.Namespace) -> str:
    if report.was_there:
        return f"{options.destination} holds this set already, nothing to do; `verify` checks its bytes"
    return (
        f"built {report.built_images:,} images in {report.seconds:,.1f} s "
        f"({report.built_images / report.seconds:,.0f} images/s, {options.workers} worker(s)), "
        f"{report.built_shards:,} shard(s) built, {report.kept_shards:,} kept"
    )


def _what_is_missing(report: shards.PartReport, options: argparse.Namespace) -> str:
    if not report.missing:
        merging = f"python launch/shards.py merge {shlex.quote(options.destination)}"
        return f"all {report.num_shards:,} shards are there; `{merging}` makes the set"
    parts = sorted({number % options.parts for number in report.missing})
    return (
        f"still missing: {len(report.missing):,} of {report.num_shards:,} shards ({ranges(list(report.missing))}), "
        f"of part(s) {ranges(parts)} of {options.parts}"
    )


def _merge(options: argparse.Namespace) -> int:
    report = merge(options.set, options.max_skipped)
    if report.was_there:
        print(f"{options.set} is a set already, nothing to do; `verify` checks its bytes\n")
    else:
        print(f"merged {len(report.shard_set.manifest.shards):,} shard(s)\n")
    print(describe_set(report.shard_set))
    return 0


def _index(options: argparse.Namespace) -> int:
    report = adopt(
        options.shards,
        options.output,
        reading=Reading(
            options.image_key and options.image_key.lstrip(".").lower(), options.label_key, options.check_images
        ),
        class_file=options.class_names,
        split=options.split,
        complete=options.complete,
        max_skipped=options.max_skipped,
        workers=options.workers,
    )
    if report.other_files:
        print(f"passed over beside the tars: {in_numbers(report.other_files)} file(s)")
    names = report.shard_set.manifest.class_names
    if names and options.class_names is None and names[-1].isdigit() and int(names[-1]) >= len(names):
        print(
            f"the labels found are {len(names):,} numbers up to {names[-1]}, so that some classes are not there: label "
            "k is the k-th of those found; --class-names FILE keeps the numbers as they are"
        )
    total_bytes = sum(shard.bytes for shard in report.shard_set.manifest.shards)
    print(
        f"indexed {report.shard_set.manifest.num_samples:,} images, {total_bytes:,} bytes in {report.seconds:,.1f} s "
        f"({total_bytes / 1e6 / report.seconds:,.1f} MB/s)"
        + (f"; {report.shard_set.location} held this very index already" if report.was_there else "")
        + "\n"
    )
    print(describe_set(report.shard_set))
    return 0


def _upload(options: argparse.Namespace) -> int:
    report = upload(options.set, options.destination, options.workers)
    print(
        f"sent {report.sent_files:,} file(s), {report.sent_bytes:,} bytes in {report.seconds:,.1f} s "
        f"({report.sent_bytes / 1e6 / report.seconds:,.1f} MB/s); {report.kept_files:,} were there and equal\n"
        f"{options.destination}: dataset id {report.shard_set.dataset_id}"
    )
    return 0


def _show(options: argparse.Namespace) -> int:
    print(describe_set(open_shard_set(options.set)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    faults = verify(options.set, options.workers)
    if faults:
        print(f"{options.set}: {len(faults)} fault(s)\n" + "\n".join(f"  {fault}" for fault in faults), file=sys.stderr)
        return 1
    shard_set = open_shard_set(options.set)
    manifest = shard_set.manifest
    print(
        f"{options.set}: sound; {len(manifest.shards):,} shard(s), {shard_set.index.num_blocks:,} block(s), "
        f"{manifest.num_samples:,} images, dataset id {shard_set.dataset_id}"
    )
    return 0


if __name__ == "__main__":
    run(main)
