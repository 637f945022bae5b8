"""One small interface between the mathematics of an update and the processes that share it: DDP here.

A `World` is this process among the others; a `Player` is one of the two networks with its optimizer. The steps see
only players, so they read the same on one CPU and on many nodes.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.health import FiniteWatch

T = TypeVar("T")


class WorldSizeError(RuntimeError):
    """The processes that were started are not one training of the size that was asked for."""


class RanksDifferError(RuntimeError):
    """Ranks are about to do different things; the message says which."""


class World:
    """This process among the others: rank, size, device, and the few collectives the host needs.

    Args:
        device: "auto" takes CUDA where there is one; "cpu" and "cuda" insist.
        expected_world_size: number of processes that must be there; None takes what the launcher started.

    Raises:
        WorldSizeError: when the launcher started something other than one training of the asked size.
    """

    def __init__(self, device: str = "auto", expected_world_size: int | None = None):
        _refuse_separate_trainings()
        if device == "cuda" and not torch.cuda.is_available():
            raise WorldSizeError("run.device is cuda, but torch sees no CUDA device here; use run.device=auto or cpu")
        use_cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=use_cpu)
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.local_rank: int = state.local_process_index
        self.device: torch.device = torch.device(state.device)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.size:
            raise WorldSizeError(
                f"the launcher started WORLD_SIZE={started} processes, but Accelerate made a world of {self.size}: "
                "each would train on its own. Use a file of configs/accelerate/, such as "
                "`accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml ...`"
            )
        if expected_world_size is not None and expected_world_size != self.size:
            raise WorldSizeError(
                f"run.expected_world_size is {expected_world_size}, but {self.size} process(es) started; "
                "check the launcher's --num_processes and --num_machines, or change run.expected_world_size"
            )
        # Agreements between hosts go over gloo, so that they never wait for the GPUs' stream.
        self._host_group: dist.ProcessGroup | None = None
        if self.size > 1:
            self._host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.size > 1:
            dist.barrier(self._host_group)

    def broadcast(self, value: T) -> T:
        """Returns rank 0's `value` (anything picklable) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[T | None] = [None] * self.size
        dist.all_gather_object(box, value, group=self._host_group)
        return box  # type: ignore[return-value]  # all_gather_object fills every place

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Compares what every rank is about to do, so that a difference is an error on all of them and not a hang.

        Raises:
            RanksDifferError: names rank, fact and both values.
        """
        first, *others = self.gather(dict(facts))
        for rank, other in enumerate(others, start=1):
            names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
            if names:
                lines = [f"  {name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}" for name in names]
                raise RanksDifferError(
                    "\n".join(["the ranks were not started alike:", *lines])
                    + "\ngive every node the same command, configuration, shards and code"
                )

    def mean(self, values: Tensor) -> Tensor:
        """Returns the average of a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def start_any(self, flag: bool) -> "Agreement":
        """Starts to find out whether `flag` is true on any rank; `Agreement.result()` waits for it."""
        votes = torch.tensor(int(flag))
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, self._host_group, async_op=True) if self.size > 1 else None
        return Agreement(votes, work)

    def shutdown(self) -> None:
        """Leaves the process group, so that no rank is torn down while another still talks to it."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()


class Agreement:
    """A vote under way between the ranks."""

    def __init__(self, votes: Tensor, work: dist.Work | None):
        self._votes, self._work = votes, work

    def result(self) -> bool:
        """Returns the outcome, the same on every rank."""
        if self._work is not None:
            self._work.wait()
        return bool(self._votes)


def _refuse_separate_trainings() -> None:
    """`accelerate launch --cpu --num_processes 2` and its kin set MASTER_ADDR but start a single process."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise WorldSizeError(
            "MASTER_ADDR is set but WORLD_SIZE is not: the launcher was asked for several processes and silently "
            "started one (`accelerate launch --cpu --num_processes 2` does, and so does distributed_type: MULTI_CPU). "
            "Use `accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml ...`, torchrun, "
            "or unset MASTER_ADDR for a single process"
        )


class Player:
    """One of the two networks: the raw module, its DDP wrapper where there are several processes, its optimizer.

    Args:
        name: "generator" or "discriminator", for reports.
        module: network on its device, all parameters trainable, equal on every rank.
        optimizer: fused Adam over the module's parameters.
        world: the processes that share it.
    """

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, world: World):
        self.name, self.module, self.optimizer = name, module, optimizer
        self.watch = FiniteWatch(name, list(module.named_parameters()), world.device)
        self._ddp = _wrap(module, world) if world.size > 1 else None

    def __call__(self, *args: Tensor | None) -> Tensor:
        """Runs the network so that its gradients will be averaged over the ranks."""
        output: Tensor = (self._ddp or self.module)(*args)
        return output

    def accumulate(self, micro_batches: Sequence[T]) -> Iterator[T]:
        """Yields the micro-batches of one update; gradients travel between ranks at the last one only."""
        for micro_batch in micro_batches[:-1]:
            with self._without_sync():
                yield micro_batch
        yield micro_batches[-1]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Scores images without making or sending gradients of this network's own parameters."""
        self.module.requires_grad_(False)
        try:
            yield
        finally:
            self.module.requires_grad_(True)

    def update(self, step: int, loss: Tensor) -> Tensor:
        """Applies the accumulated gradients unless they or the loss are non-finite on any rank.

        Args:
            step: generator update this belongs to.
            loss: this rank's detached loss, a scalar.

        Returns:
            float32 scalar on the device, 1 if the update was skipped; the host does not wait for it.
        """
        skipped = self.watch.found_non_finite(step, loss)
        # Adam's fused kernel reads this flag on the device, as it does for torch.amp.GradScaler.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def _without_sync(self) -> AbstractContextManager[None]:
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()


def _wrap(module: nn.Module, world: World) -> DistributedDataParallel:
    """Wraps for gradient averaging only: buffers are equal by construction and are never broadcast again."""
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.data, src=0)
    # torch 2.13 renamed the switch and warns on the old name.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    switch: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **switch)


def configure_determinism(deterministic: bool, device: torch.device) -> None:
    """Makes CUDA bitwise repeatable when asked; elsewhere picks the fastest convolutions for fixed shapes."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads it at its first call; PyTorch's notes on reproducibility ask for this value.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
