"""One small interface between the mathematics of an update and the processes that share it.

A `Player` is one of the two networks with its optimizer. The steps see only players, so they read the same on one
CPU, under DDP on many nodes, and under DeepSpeed's ZeRO-1 and ZeRO-2 (`pipeline/zero.py`).
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.health import FiniteWatch
from pipeline.world import World
from pipeline.zero import Zero, zero_stage

T = TypeVar("T")


class Player:
    """One of the two networks: the raw module, its optimizer, and how the processes share both.

    Args:
        name: "generator" or "discriminator", for reports.
        module: network on its device, all parameters trainable.
        optimizer: fused Adam over the module's parameters.
        world: the processes that share it; they take rank 0's parameters and buffers.

    Attributes:
        backend: "ddp", "zero1" or "zero2".

    Raises:
        ConfigError: the launcher asks for a DeepSpeed that does not fit; see `zero_stage`.
    """

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, world: World):
        self.name, self.module, self.optimizer = name, module, optimizer
        if world.size > 1:
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.data, src=0)
        stage = zero_stage()
        names = [key for key, _ in module.named_parameters()]
        self.watch = FiniteWatch(name, names, world.device, num_copies=1 if stage else world.size)
        self.backend = f"zero{stage}" if stage else "ddp"
        self._shared = Zero(module, optimizer, world, stage) if stage else _Replicated(module, optimizer, world)

    def __call__(self, *args: Tensor | None) -> Tensor:
        """Runs the network so that its gradients will be averaged over the ranks."""
        return self._shared(*args)

    def accumulate(self, micro_batches: Sequence[T]) -> Iterator[T]:
        """Yields the micro-batches of one update; gradients are complete after the last one's `backward`."""
        return self._shared.accumulate(micro_batches)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss."""
        self._shared.backward(loss)

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
        skipped = self.watch.found_non_finite(step, loss, *self._shared.gradients())
        # Adam's fused kernel reads this flag on the device, as it does for torch.amp.GradScaler.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # an attribute that GradScaler sets
        self._shared.apply()
        return skipped

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimizer's state dict for the whole network, the same form under every backend.

        Every rank must call it; under ZeRO the parts are gathered and only rank 0 gets them, others an empty dict.
        """
        return self._shared.optimizer_state()

    def restore(self, weights: dict[str, Tensor], optimizer_state: dict[str, Any]) -> None:
        """Takes parameters, buffers and the optimizer's moments and step counts of a checkpoint, on every rank.

        Learning rates, betas and eps stay those of the configuration.
        """
        self.module.load_state_dict(weights)
        self._shared.restore(optimizer_state["state"])


class _Replicated:
    """The whole network and its whole optimizer on every rank, gradients averaged by DDP; also a single process."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, world: World):
        self._module, self._optimizer = module, optimizer
        self._ddp = _wrap(module, world) if world.size > 1 else None

    def __call__(self, *args: Tensor | None) -> Tensor:
        output: Tensor = (self._ddp or self._module)(*args)
        return output

    def accumulate(self, micro_batches: Sequence[T]) -> Iterator[T]:
        for micro_batch in micro_batches[:-1]:
            with self._ddp.no_sync() if self._ddp is not None else nullcontext():
                yield micro_batch
        yield micro_batches[-1]

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def gradients(self) -> tuple[int, list[Tensor]]:
        parameters = list(self._module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters), "a parameter received no gradient"
        return 0, gradients

    def apply(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def restore(self, state: dict[int, dict[str, Tensor]]) -> None:
        parameters = list(self._module.parameters())
        placed = {
            index: {
                # Fused Adam pairs parameter and moment by memory, whose order channels_last and ZeRO change.
                key: value if key == "step" else torch.empty_like(parameters[index]).copy_(value)
                for key, value in entries.items()
            }
            for index, entries in state.items()
        }
        self._optimizer.load_state_dict({"state": placed, "param_groups": self._optimizer.state_dict()["param_groups"]})


def _wrap(module: nn.Module, world: World) -> DistributedDataParallel:
    """Wraps for gradient averaging only: buffers are equal by construction and are never broadcast again."""
    # torch 2.13 renamed the switch and warns on the old name.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    switch: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **switch)
