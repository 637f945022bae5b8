"""How fast a set can be read: our loader and stock webdataset in turn, on the same shards, workers and batches."""

import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch.utils.data import DataLoader

from pipeline import s3_store
from pipeline.bar import Bar
from pipeline.block_cache import BlockCache
from pipeline.loader import Loader
from pipeline.manifest import Encoding, ShardSet
from pipeline.object_store import is_remote, join
from pipeline.order import Plan
from pipeline.samples import decode

Batches = Generator[int]  # yields the number of images of each batch
CONSUMER_IMAGES_PER_SECOND = 500
IMAGENET = (1_281_167, 140)  # images; in a block of 4 MB at 128 px


@dataclass(frozen=True)
class Speed:
    """One stretch of reading."""

    images_per_second: float
    images_per_cpu_second: float  # of all processes that take part
    worker_megabytes: float  # memory that is its own (USS) of the largest worker; NaN without workers


@dataclass(frozen=True)
class DataReport:
    """What `measure` found; lists are in order of the repeats."""

    set: str
    encoding: str
    image_size: int
    batch_size: int
    num_workers: int
    seconds: float
    loader: list[Speed]
    webdataset: list[Speed]
    ratios: list[float]  # loader / webdataset, images per CPU-second, of each repeat
    plan_seconds: float  # to resume in the middle of an epoch of this set
    imagenet_plan_seconds: float  # the same on ImageNet's shape
    wait_percent: float  # of a consumer of CONSUMER_IMAGES_PER_SECOND

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it."""
        return asdict(self)


def measure(
    shard_set: ShardSet,
    *,
    image_size: int,
    batch_size: int = 256,
    num_workers: int = 2,
    seconds: float = 5.0,
    repeats: int = 5,
    against_webdataset: bool = True,
    cache: BlockCache | None = None,
) -> DataReport:
    """Reads the set by the loader and by webdataset in turn.

    Args:
        shard_set: The opened set.
        image_size: Side in pixels.
        batch_size: Images per batch; a set that is smaller gives smaller ones.
        num_workers: Decoding processes of each reader.
        seconds: Of each stretch, after a warm-up.
        repeats: Stretches of each reader, in turn.
        against_webdataset: Whether to read by stock webdataset, too.
        cache: For the blocks of a remote set; webdataset has none and fetches each shard anew.
    """
    batch_size = min(batch_size, shard_set.manifest.num_samples)
    readers: dict[str, Callable[[], Batches]] = {
        "loader": lambda: _loader_batches(shard_set, image_size, batch_size, num_workers, cache)
    }
    if against_webdataset:
        readers["webdataset"] = lambda: _webdataset_batches(shard_set, image_size, batch_size, num_workers)
    speeds: dict[str, list[Speed]] = {"loader": [], "webdataset": []}
    with Bar(repeats * len(readers) + 1, "measuring", "runs") as bar:
        for _ in range(repeats):
            for name, batches in readers.items():
                speeds[name].append(_speed(batches(), seconds))
                bar.update(1)
        wait_percent = _wait_percent(readers["loader"](), seconds)
        bar.update(1)
    pairs = zip(speeds["loader"], speeds["webdataset"], strict=False)
    blocks = np.append(np.arange(0, IMAGENET[0], IMAGENET[1]), IMAGENET[0])
    return DataReport(
        set=shard_set.location,
        encoding=shard_set.manifest.encoding,
        image_size=image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        seconds=seconds,
        loader=speeds["loader"],
        webdataset=speeds["webdataset"],
        ratios=[ours.images_per_cpu_second / theirs.images_per_cpu_second for ours, theirs in pairs],
        plan_seconds=_plan_seconds(shard_set.index.block_first_sample, batch_size),
        imagenet_plan_seconds=_plan_seconds(blocks, 256),
        wait_percent=wait_percent,
    )


def table(report: DataReport) -> str:
    """The report as lines for people."""
    lines = [
        f"{report.set}: {report.encoding}, {report.image_size} px, batches of {report.batch_size}, "
        f"{report.num_workers} worker(s), {len(report.loader)} x {report.seconds:g} s each, in turn",
        f"{'':14}{'images/s':>12}{'per worker':>12}{'per CPU-second':>24}{'MB per worker':>15}",
    ]
    for name, speeds in (("this loader", report.loader), ("webdataset", report.webdataset)):
        if speeds:
            rate = statistics.median(speed.images_per_second for speed in speeds)
            per_cpu = [speed.images_per_cpu_second for speed in speeds]
            spread = f"{statistics.median(per_cpu):,.0f} ({min(per_cpu):,.0f}-{max(per_cpu):,.0f})"
            memory = max(speed.worker_megabytes for speed in speeds)
            lines.append(
                f"{name:14}{rate:>12,.0f}{rate / max(report.num_workers, 1):>12,.0f}{spread:>24}{memory:>15,.0f}"
            )
    if report.ratios:
        low, high = min(report.ratios), max(report.ratios)
        lines.append(f"ratio          {statistics.median(report.ratios):.2f} per CPU-second ({low:.2f}-{high:.2f})")
    lines += [
        f"resume plan    {report.plan_seconds * 1000:.1f} ms; on ImageNet's shape "
        f"{report.imagenet_plan_seconds * 1000:.1f} ms",
        f"data wait      {report.wait_percent:.2f} % of a consumer of {CONSUMER_IMAGES_PER_SECOND} images/s",
    ]
    return "\n".join(lines)


def _loader_batches(
    shard_set: ShardSet, image_size: int, batch_size: int, num_workers: int, cache: BlockCache | None
) -> Batches:
    loader = Loader(
        shard_set, image_size=image_size, seed=0, global_batch_size=batch_size, num_workers=num_workers, cache=cache
    )
    for batch in loader.batches():
        yield len(batch.images)


def _webdataset_batches(shard_set: ShardSet, image_size: int, batch_size: int, num_workers: int) -> Batches:
    """As its documentation reads ImageNet: shards and samples shuffled, decoded and batched in the workers."""
    import webdataset

    dataset = (
        webdataset.WebDataset(_urls(shard_set), resampled=True, shardshuffle=False)
        .shuffle(1000)
        .map(_DecodeSample(shard_set.manifest.encoding, image_size))
        .batched(batch_size, collation_fn=_stack, partial=False)
    )
    workers = DataLoader(dataset, batch_size=None, num_workers=num_workers, prefetch_factor=2 if num_workers else None)
    for images in workers:
        yield len(images)


class _DecodeSample:
    """The decoder of our loader, so that readers are compared and not decoders."""

    def __init__(self, encoding: Encoding, image_size: int) -> None:
        self._encoding, self._image_size = encoding, image_size

    def __call__(self, sample: dict[str, bytes]) -> npt.NDArray[np.uint8]:
        data = next(value for key, value in sample.items() if key in ("webp", "bin", "png", "jpg", "jpeg"))
        return decode(data, self._encoding, self._image_size)


def _stack(images: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _urls(shard_set: ShardSet) -> list[str]:
    """Paths, or addresses that curl can read: webdataset does not know s3://."""
    names = [shard.name for shard in shard_set.manifest.shards]
    if not is_remote(shard_set.shards_location):
        return [str(Path(join(shard_set.shards_location, name)).absolute()) for name in names]
    where = s3_store.parse(shard_set.shards_location)
    client = s3_store.client(where)
    return [
        client.generate_presigned_url("get_object", {"Bucket": where.bucket, "Key": where.key(name)}) for name in names
    ]


def _speed(batches: Batches, seconds: float) -> Speed:
    for _ in itertools.islice(batches, 4):  # workers have started and caches are filled
        pass
    images, cpu, begin = 0, _cpu_seconds(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        images += next(batches)
    elapsed, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    memory = max((worker.memory_full_info().uss / 1e6 for worker in _workers()), default=float("nan"))
    batches.close()
    return Speed(images / elapsed, images / cpu, memory)


def _wait_percent(batches: Batches, seconds: float) -> float:
    """Share of its time that a consumer of a fixed speed waits, once the workers are ahead of it."""
    for images in itertools.islice(batches, 4):
        time.sleep(images / CONSUMER_IMAGES_PER_SECOND)
    waited, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        asked = time.perf_counter()
        images = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(images / CONSUMER_IMAGES_PER_SECOND)
    batches.close()
    return 100 * waited / (time.perf_counter() - begin)


def _cpu_seconds() -> float:
    """Of this process and all it started, ended ones included."""
    return sum(sum(process.cpu_times()[:4]) for process in _family())


def _family() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield this
    yield from this.children(recursive=True)


def _workers() -> list[psutil.Process]:
    """Processes that hold torch: not the fork server, the resource tracker or a curl."""
    return [child for child in psutil.Process().children(recursive=True) if child.num_threads() > 1]


def _plan_seconds(block_first_sample: np.ndarray[Any, np.dtype[np.int64]], batch_size: int) -> float:
    """Seconds from nothing to the sample ids of a batch in the middle of an epoch."""
    begin = time.perf_counter()
    plan = Plan(block_first_sample, int(time.time()), batch_size)  # a new seed, as orders are remembered
    plan.batch_sample_ids(plan.batches_per_epoch * 5 // 2)
    return time.perf_counter() - begin
