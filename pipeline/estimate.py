"""What a training will need, for any number of processes, without a GPU and without weights."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Config
from pipeline.journal import JournalError, read_records
from pipeline.networks import build_shapes

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes per process unless said otherwise; exact but for `activation_bytes`."""

    weight_bytes: int  # parameters and buffers of both networks and the EMA
    gradient_bytes: int
    adam_bytes: int
    activation_bytes: int  # what autograd keeps in the larger of the two steps; workspaces of kernels come on top
    reduced_bytes: int  # of gradients and batch norm statistics, summed over ranks in one generator update
    checkpoint_bytes: int  # on disk, once
    snapshot_bytes: int  # of one for the evaluation


def estimate(config: Config, world_size: int) -> Estimate:
    """Adds up tensors of the networks and of one step, all without data (torch's FakeTensorMode).

    Args:
        config: of the run.
        world_size: processes; must share the batch evenly.
    """
    train = config.train
    images = train.global_batch_size // train.accumulation_steps // world_size
    generator, discriminator = build_shapes(config)
    dtype = torch.float64 if train.precision == "float64" else torch.float32
    generator.to(dtype), discriminator.to(dtype)
    activation_bytes = _activation_bytes(config, generator.train(), discriminator.train(), images)
    g_bytes, d_bytes = (_size(network.parameters()) for network in (generator, discriminator))
    g_state, d_state = (_size(network.state_dict().values()) for network in (generator, discriminator))
    item = 8 if train.precision == "float64" else _FLOAT_BYTES
    statistics = sum(2 * norm.num_features * item for norm in generator.modules() if isinstance(norm, _BatchNorm))
    passes = train.accumulation_steps * (train.num_d_steps + 2)  # forward for D and G, backward for G
    synchronised = statistics * passes if config.model.sync_batch_norm else 0
    return Estimate(
        weight_bytes=2 * g_state + d_state,
        gradient_bytes=g_bytes + d_bytes,
        adam_bytes=2 * (g_bytes + d_bytes),
        activation_bytes=activation_bytes,
        reduced_bytes=(train.num_d_steps * d_bytes + g_bytes + synchronised) if world_size > 1 else 0,
        checkpoint_bytes=2 * g_state + d_state + 2 * (g_bytes + d_bytes),
        snapshot_bytes=2 * g_state,
    )


def describe_needs(config: Config, world_size: int, num_samples: int) -> str:
    """Returns lines for people: memory, traffic, data, disk, and hours where the run's speed is known."""
    needs, train = estimate(config, world_size), config.train
    total = needs.weight_bytes + needs.gradient_bytes + needs.adam_bytes + needs.activation_bytes
    used = num_samples // train.global_batch_size * train.global_batch_size
    every_steps = config.evaluation.every_steps
    num_snapshots = -(-train.steps // every_steps) if every_steps else 0
    lines = [
        (
            "memory",
            f"about {_gigabytes(total)} per process: weights and EMA {_gigabytes(needs.weight_bytes)}, gradients "
            f"{_gigabytes(needs.gradient_bytes)}, Adam {_gigabytes(needs.adam_bytes)} (ZeRO divides Adam's, and adds "
            f"{_gigabytes(needs.gradient_bytes / world_size)}), activations about "
            f"{_gigabytes(needs.activation_bytes)}; workspaces of kernels come on top",
        ),
        (
            "traffic",
            f"{_gigabytes(needs.reduced_bytes)} all-reduced per step; a ring sends and receives "
            f"{_gigabytes(2 * (world_size - 1) / world_size * needs.reduced_bytes)} per process",
        ),
        (
            "epoch",
            f"{used:,} of {num_samples:,} images, {used // world_size:,} per process; the other "
            f"{num_samples - used:,} are left over, others each time",
        ),
        (
            "disk",
            f"{_gigabytes(needs.checkpoint_bytes)} per checkpoint, {train.keep_checkpoints} kept and the best by FID; "
            f"{_gigabytes(needs.snapshot_bytes)} per snapshot for the evaluation, {num_snapshots} kept",
        ),
        ("time", _time_left(config, world_size)),
    ]
    return "\n".join(f"{name:<8} {text}" for name, text in lines)


def _activation_bytes(config: Config, generator: nn.Module, discriminator: nn.Module, images: int) -> int:
    """Bytes that autograd keeps until the backward pass, of the larger of the two steps."""
    model = config.model
    autocast = torch.autocast("cpu", torch.bfloat16) if config.train.precision == "bf16" else nullcontext()
    with FakeTensorMode(), autocast:
        z = torch.empty(images, model.z_dim, dtype=next(generator.parameters()).dtype)
        labels = torch.zeros(images, dtype=torch.int64) if model.num_classes else None
        g, d, frozen_d = _tensors(generator), _tensors(discriminator), _tensors(discriminator, frozen=True)
        with torch.no_grad():
            fakes = functional_call(generator, g, (z, labels))
        with _Kept(d) as in_d_step:
            both = labels if labels is None else torch.cat([labels, labels])
            functional_call(discriminator, d, (torch.cat([fakes, fakes]), both))
        with _Kept(g, frozen_d) as in_g_step:
            functional_call(discriminator, frozen_d, (functional_call(generator, g, (z, labels)), labels))
        return max(in_d_step.bytes, in_g_step.bytes)


def _tensors(network: nn.Module, frozen: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers without data."""
    tensors = {name: torch.empty(b.shape, dtype=b.dtype) for name, b in network.named_buffers()}
    for name, parameter in network.named_parameters():
        tensors[name] = torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=not frozen)
    return tensors


class _Kept:
    """Counts the bytes that autograd keeps, each storage once, but for parameters and buffers."""

    def __init__(self, *networks: dict[str, Tensor]) -> None:
        self._own = {tensor.untyped_storage()._cdata for network in networks for tensor in network.values()}
        self._seen: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._own:
            self._seen[storage] = tensor
        return tensor

    def __enter__(self) -> "_Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _time_left(config: Config, world_size: int) -> str:
    """From the newest speed in the run's journal."""
    speed = _known_speed(config)
    if speed is None:
        return f"{config.train.steps:,} steps; hours are told once the run has logged a speed"
    images_per_second, processes, step = speed
    images = (config.train.steps - step) * config.train.global_batch_size * config.train.num_d_steps
    seconds = images / (images_per_second * world_size / processes)
    scaled = "" if world_size == processes else f", scaled from {processes}"
    return (
        f"{config.train.steps - step:,} of {config.train.steps:,} steps left, {seconds / 3600:,.1f} hours at "
        f"{images_per_second * world_size / processes:,.0f} images/s (the run's last{scaled})"
    )


def _known_speed(config: Config) -> tuple[float, int, int] | None:
    try:
        records, _ = read_records(config.run_dir / "journal.jsonl")
    except (FileNotFoundError, JournalError):
        return None
    processes, speed = 1, None
    for record in records:
        processes = int(record.get("tags", {}).get("world_size", processes))
        if "throughput/images_per_second" in record.get("metrics", {}):
            speed = record["metrics"]["throughput/images_per_second"], processes, record["step"]
    return speed


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
