"""This process among the others: rank, size, device, the host's collectives, and what launchers get silently wrong."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class WorldSizeError(RuntimeError):
    """The processes that were started are not the one training that was asked for."""


class RanksDifferError(RuntimeError):
    """Ranks are about to do different things; the message says which."""


class World:
    """This process among the others: rank, size, device, and the few collectives the host needs.

    Args:
        device: "auto" takes CUDA where there is one; "cpu" and "cuda" insist.
        expected_world_size: number of processes that must be there; None takes what the launcher started.
        timeout_seconds: of collectives; longer than any watch that tells more.

    Raises:
        WorldSizeError: when the launcher started something other than one training of the asked size.
    """

    def __init__(self, device: str = "auto", expected_world_size: int | None = None, timeout_seconds: float = 3600.0):
        _refuse_separate_trainings()
        _refuse_ignored_settings()
        if device == "cuda" and not torch.cuda.is_available():
            raise WorldSizeError("run.device is cuda, but torch sees no CUDA device here; use run.device=auto or cpu")
        use_cpu = device == "cpu" or not torch.cuda.is_available()
        timeout = timedelta(seconds=timeout_seconds)
        self.rank, self.size, self.local_rank, self.device = _place(use_cpu, timeout)
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
            self._host_group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

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


def _place(use_cpu: bool, timeout: timedelta) -> tuple[int, int, int, torch.device]:
    """Returns rank, size, local rank and device of this process."""
    if not any(name == "WORLD_SIZE" or name.startswith("ACCELERATE_") for name in os.environ):
        return 0, 1, 0, torch.device("cpu" if use_cpu else "cuda:0")  # started without a launcher
    from accelerate import PartialState  # here, as it takes a second or two

    state = PartialState(cpu=use_cpu, timeout=timeout)
    return state.process_index, state.num_processes, state.local_process_index, torch.device(state.device)


def _refuse_separate_trainings(environment: Mapping[str, str] = os.environ) -> None:
    """Finds launches that start one process, or one training per task, where many should share one."""
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise WorldSizeError(
            "MASTER_ADDR is set but WORLD_SIZE is not: the launcher was asked for several processes and silently "
            "started one (`accelerate launch --cpu --num_processes 2` does, and so does distributed_type: MULTI_CPU). "
            "Use `accelerate launch --config_file configs/accelerate/cpu_two_processes.yaml ...`, torchrun, "
            "or unset MASTER_ADDR for a single process"
        )
    tasks, world = int(environment.get("SLURM_STEP_NUM_TASKS", 1)), environment.get("WORLD_SIZE", "1")
    if tasks > 1 and world == environment.get("LOCAL_WORLD_SIZE", "1"):
        raise WorldSizeError(
            f"srun started SLURM_STEP_NUM_TASKS={tasks} tasks, but the world of this one is WORLD_SIZE={world}, all "
            "its own: each task would train by itself. Start one launcher per node with a common rendezvous "
            "(accelerate launch --config_file configs/accelerate/multi_node.yaml --machine_rank $SLURM_NODEID "
            "--main_process_ip FIRST_NODE ...), or srun --ntasks=1"
        )


def _refuse_ignored_settings(environment: Mapping[str, str] = os.environ) -> None:
    """Finds what `accelerate launch` was asked for and this training would not do."""
    for name, kind in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM")):
        if environment.get(name) == "true":
            raise WorldSizeError(
                f"the launcher asks for distributed_type: {kind}, which this training does not use; use DDP "
                "(configs/accelerate/one_machine.yaml) or DeepSpeed (deepspeed_zero1.yaml, deepspeed_zero2.yaml)"
            )
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise WorldSizeError(
            f"the launcher asks for mixed_precision: {precision}, which would have no effect: train.precision decides "
            "(bf16 is our own autocast). Give accelerate launch --mixed_precision no"
        )


def configure_determinism(deterministic: bool, device: torch.device) -> None:
    """Makes CUDA bitwise repeatable when asked; elsewhere picks the fastest convolutions for fixed shapes."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads it at its first call; PyTorch's notes on reproducibility ask for this value.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
