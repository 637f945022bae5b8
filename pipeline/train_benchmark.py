"""How fast a configuration trains on this machine, what the time goes to, and how settings compare, in pairs.

Needs torch, PyYAML and pydantic only, unless real shards are read.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batch import Batch
from pipeline.config import Config
from pipeline.gan import Gan
from pipeline.host_memory import keep_freed_memory
from pipeline.networks import build_shapes
from pipeline.textbook import Textbook
from pipeline.world import World, configure_determinism

# Of an update: what is neither forward nor backward of the models.
_OUTSIDE = ("optimizer", "spectral norm", "finite check", "ema")
# Of an update: what a row of the table shows, and the profiler's names for it.
_PARTS = {
    "discriminator step": ("discriminator step",),
    "generator step": ("generator step",),
    "optimizer": ("Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"),
    "spectral norm": ("spectral norm", "_Normalize", "_NormalizeBackward"),
    "finite check": ("finite check",),
    "ema": ("ema",),
    "all-reduce": ("gloo:all_reduce", "nccl:all_reduce"),
}


class Updater(Protocol):
    """What can be measured: `Gan` and `Textbook`."""

    def update(self, step: int, batches: Sequence[Batch], attempt: int) -> dict[str, Tensor]:
        """Does one whole update."""


@dataclass
class Measured:
    """One setting's figures.

    Attributes:
        name: of the setting.
        images_per_second: of each measurement, over all processes.
        images_per_cpu_second: likewise, by the processor time of all processes; other work beside it matters less.
        parts_seconds: of one update, by `_PARTS`; overlapping: the steps hold the others but the average.
        host_seconds: of one update; on the CPU outside both steps and the average, on a GPU until the host is free.
        data_seconds: of one update, waiting for the batch.
        outside_share: of one update, all but the models' forward and backward and the all-reduce.
        memory_peak_bytes: of the device; on a CPU of this process, with all settings before it.
        flops_per_second: floating-point operations of `update_flops`, per second, over all processes.
        utilisation: flops_per_second over that of the matrix product.
    """

    name: str
    images_per_second: list[float]
    images_per_cpu_second: list[float]
    parts_seconds: dict[str, float]
    host_seconds: float
    data_seconds: float
    outside_share: float
    memory_peak_bytes: int
    flops_per_second: float
    utilisation: float

    @property
    def median(self) -> float:
        """Median of images_per_second."""
        return statistics.median(self.images_per_second)


@dataclass
class Found:
    """All figures of one run of the benchmark.

    Attributes:
        machine: device, threads, versions.
        images_per_update: real images that one update takes, over all processes and discriminator steps.
        update_flops: of one update, multiplications and additions, in our form.
        matrix_product_flops_per_second: of the precision of the first setting.
        convolution_flops_per_second: of a float32 3x3 convolution, 256 channels, 32x32, forward and backward.
        settings: the first is the configuration as it is.
        ratio: median of the paired ratios of the first setting's images/s to the second's, with their extremes.
    """

    machine: dict[str, Any]
    images_per_update: int
    update_flops: int
    matrix_product_flops_per_second: float
    convolution_flops_per_second: float
    settings: list[Measured]
    ratio: dict[str, float] | None

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=1)


def measure(
    configs: dict[str, Config],
    world: World,
    *,
    baseline: bool,
    batches: Callable[[Config], Iterator[Batch]],
    updates: int,
    repeats: int,
    trace: Path | None = None,
    say: Callable[[str], None] = print,
) -> Found:
    """Runs every setting in turn, `repeats` times.

    Args:
        configs: {name: configuration}; the first is the one that is traced.
        world: the processes that share it.
        baseline: whether the textbook update is measured beside it.
        batches: gives the images of a configuration.
        updates: of each measurement.
        repeats: measurements of each setting.
        trace: where a Chrome trace of one update goes.
        say: is told what is being done.
    """
    device, first = world.device, next(iter(configs.values()))
    if device.type == "cpu":
        keep_freed_memory()
    configure_determinism(first.run.deterministic, device)
    runners = {name: _Runner(config, Gan(config, world), batches(config), device) for name, config in configs.items()}
    if baseline:
        gan = runners[next(iter(configs))].updater
        assert isinstance(gan, Gan)
        book = Textbook(first, device, gan.generator.module, gan.discriminator.module)  # type: ignore[arg-type]  # players hold modules of any kind
        runners["baseline"] = _Runner(first, book, batches(first), device)
    peaks = {}
    for name, runner in runners.items():
        say(f"warming up: {name}")
        _forget_peak(device)
        runner.run(2)
        peaks[name] = _peak(device)
    rates: dict[str, list[float]] = {name: [] for name in runners}
    cpu_rates: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(repeats):
        # The order turns, so that none always follows the same.
        for name, runner in list(runners.items())[:: 1 if repeat % 2 == 0 else -1]:
            started = time.process_time()
            seconds = runner.run(updates)
            cpu_seconds = sum(world.gather(time.process_time() - started))
            rates[name].append(updates * runner.images / seconds)
            cpu_rates[name].append(updates * runner.images / cpu_seconds)
            say(f"{repeat + 1} of {repeats}: {name} {rates[name][-1]:.4g} images/s")
    flops, images = update_flops(first), next(iter(runners.values())).images
    product = matrix_product_flops(device, torch.bfloat16 if first.train.precision == "bf16" else torch.float32)
    product *= world.size
    settings = []
    for number, (name, runner) in enumerate(runners.items()):
        rate = statistics.median(rates[name])
        speed = flops * rate / images
        seconds, parts, host = runner.profile(trace if number == 0 else None)
        outside = sum(parts[part] for part in _OUTSIDE) + host * (device.type == "cpu")  # a GPU's host works beside it
        settings.append(
            Measured(
                name,
                rates[name],
                cpu_rates[name],
                parts,
                host,
                runner.data_seconds,
                (outside + runner.data_seconds) / (seconds + runner.data_seconds),
                peaks[name],
                speed,
                speed / product,
            )
        )
    return Found(
        machine={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processes": world.size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
            "global_batch_size": first.train.global_batch_size,
            "updates": updates,
        },
        images_per_update=images,
        update_flops=flops,
        matrix_product_flops_per_second=product,
        convolution_flops_per_second=convolution_flops(device, first.train.global_batch_size),
        settings=settings,
        ratio=_ratio(*(one.images_per_second for one in settings[:2])) if len(settings) > 1 else None,
    )


class _Runner:
    """One setting: its networks and its batches."""

    def __init__(self, config: Config, updater: Updater, batches: Iterator[Batch], device: torch.device):
        self.updater, self._batches, self._device = updater, batches, device
        self._num_d_steps = config.train.num_d_steps
        self.images = config.train.global_batch_size * self._num_d_steps
        self.step, self.data_seconds = 0, 0.0

    def run(self, updates: int) -> float:
        """Does some updates; returns their seconds, from an idle device to an idle device."""
        _wait(self._device)
        started, waited = time.perf_counter(), 0.0
        for _ in range(updates):
            asked = time.perf_counter()
            reals = [next(self._batches) for _ in range(self._num_d_steps)]
            waited += time.perf_counter() - asked
            self.step += 1
            self.updater.update(self.step, reals, 0)
        _wait(self._device)
        self.data_seconds = waited / updates
        return time.perf_counter() - started

    def profile(self, trace: Path | None) -> tuple[float, dict[str, float], float]:
        """Returns the seconds of one update, of its parts, and of the host."""
        reals = [next(self._batches) for _ in range(self._num_d_steps)]
        cuda = self._device.type == "cuda"
        _wait(self._device)
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
            started = time.perf_counter()
            self.updater.update(self.step + 1, reals, 0)
            host = time.perf_counter() - started
            _wait(self._device)
            seconds = time.perf_counter() - started
        totals: dict[str, float] = {}
        for event in profiled.key_averages():
            totals[event.key] = (event.device_time_total if cuda else event.cpu_time_total) / 1e6
        if trace:
            profiled.export_chrome_trace(str(trace))
        parts = {part: sum(totals.get(name, 0.0) for name in names) for part, names in _PARTS.items()}
        if not cuda:
            host -= parts["discriminator step"] + parts["generator step"] + parts["ema"]
        return seconds, parts, host


def synthetic(config: Config, world: World) -> Iterator[Batch]:
    """Yields one batch of noise again and again, of this rank's share."""
    model, rows = config.model, config.train.global_batch_size // world.size
    generator = torch.Generator().manual_seed(config.run.seed + world.rank)
    shape = (rows, 3, model.resolution, model.resolution)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        labels=torch.randint(max(1, model.num_classes), (rows,), generator=generator),
        sample_ids=torch.arange(rows),
        flip=torch.zeros(rows, dtype=torch.bool),
        number=0,
    )
    if world.device.type == "cuda":
        batch = batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())
    while True:
        yield batch


def update_flops(config: Config) -> int:
    """Counts the multiplications and additions of one update, forward and backward, on tensors without data.

    One discriminator update on real and fake images, whose fakes are made without graph, and one generator update
    through a frozen discriminator. Element-wise work is not counted.
    """
    model, count = config.model, config.train.global_batch_size
    generator, discriminator = build_shapes(config)
    # Attention as plain products: what a fused kernel computes again in its backward pass is no work of the model.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        # They now count as tensors of the CPU, still without memory: autocast and attention know no meta device.
        generator, discriminator = generator.to_empty(device="cpu"), discriminator.to_empty(device="cpu")
        z, labels = torch.empty(count, model.z_dim), torch.empty(count, dtype=torch.int64)
        both = torch.empty(2 * count, dtype=torch.int64)
        conditional = model.num_classes > 0
        for _ in range(config.train.num_d_steps):
            with torch.no_grad():
                fakes = generator(z, labels if conditional else None)
            discriminator(torch.cat([fakes, fakes]), both if conditional else None).sum().backward()
        discriminator.requires_grad_(False)
        fakes = generator(z, labels if conditional else None)
        discriminator(fakes, labels if conditional else None).sum().backward()
    return int(counter.get_total_flops())


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the floating-point operations per second of a square matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(5))


def convolution_flops(device: torch.device, batch_size: int) -> float:
    """Returns those of a float32 3x3 convolution, 256 channels, 32x32, contiguous, there and back, median of five."""
    x = torch.randn(batch_size, 256, 32, 32, device=device, requires_grad=True)
    weight = torch.randn(256, 256, 3, 3, device=device, requires_grad=True)

    def there_and_back() -> None:
        x.grad = weight.grad = None
        F.conv2d(x, weight, padding=1).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    seconds = statistics.median(_seconds(there_and_back, device) for _ in range(5))
    return 3 * 2 * batch_size * 32 * 32 * 256 * 256 * 9 / seconds


def table(found: Found) -> str:
    """The figures as text."""
    rows = [
        ("", [one.name for one in found.settings]),
        ("images/s, median", [f"{one.median:.4g}" for one in found.settings]),
        ("  least to most", [f"{min(r):.4g} - {max(r):.4g}" for r in (s.images_per_second for s in found.settings)]),
        ("images/CPU-second", [f"{statistics.median(one.images_per_cpu_second):.4g}" for one in found.settings]),
        ("update, s", [f"{found.images_per_update / one.median:.4g}" for one in found.settings]),
        *((f"  {part}, s", [_seconds_text(one.parts_seconds[part]) for one in found.settings]) for part in _PARTS),
        ("  host, s", [_seconds_text(one.host_seconds) for one in found.settings]),
        ("  data wait, s", [_seconds_text(one.data_seconds) for one in found.settings]),
        ("  outside the models", [f"{100 * one.outside_share:.1f} %" for one in found.settings]),
        ("memory peak, GB", [f"{one.memory_peak_bytes / 1e9:.2f}" for one in found.settings]),
        ("TFLOP/s", [f"{one.flops_per_second / 1e12:.4g}" for one in found.settings]),
        ("of a matrix product", [f"{100 * one.utilisation:.1f} %" for one in found.settings]),
    ]
    width = max(len(label) for label, _ in rows)
    columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(found.settings))]
    lines = [
        f"{label:<{width}}  " + "  ".join(f"{cell:>{columns[i]}}" for i, cell in enumerate(cells))
        for label, cells in rows
    ]
    product, convolution = found.matrix_product_flops_per_second, found.convolution_flops_per_second
    lines.append(
        f"one update is {found.update_flops / 1e12:.4g} TFLOP; a matrix product does {product / 1e12:.4g} TFLOP/s, "
        f"a float32 3x3 convolution {convolution / 1e12:.4g}"
    )
    if found.ratio:
        first, second = found.settings[0].name, found.settings[1].name
        lines.append(
            f"ratio  {found.ratio['median']:.3f} ({found.ratio['least']:.3f} - {found.ratio['most']:.3f}) of {first} "
            f"to {second}, in pairs"
        )
    return "\n".join(line.rstrip() for line in lines)


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds else "-"


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
