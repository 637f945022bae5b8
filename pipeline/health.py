"""Watches that training stays finite, without asking the device more than once per log interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class NonFiniteError(RuntimeError):
    """Training went non-finite and will not recover by itself; the message names step, network and tensors."""


@dataclass(frozen=True)
class NonFinite:
    """The first update of a network that was skipped because its loss or a gradient was NaN or infinite."""

    network: str
    step: int
    tensors: tuple[str, ...]  # parameters with a non-finite gradient; empty when it was the loss alone

    def __str__(self) -> str:
        names = ", ".join(self.tensors[:3]) + (f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else "")
        where = f"gradient of {names}" if self.tensors else "loss"
        return f"{self.network} went non-finite at step {self.step}: {where}"


class FiniteWatch:
    """Decides on the device whether an update may be applied, and remembers the first that may not.

    Args:
        network: name for the report.
        parameters: (name, parameter) of the network whose gradients are watched.
        device: where the flags live.
    """

    def __init__(self, network: str, parameters: Sequence[tuple[str, torch.nn.Parameter]], device: torch.device):
        self.network = network
        self.names = [name for name, _ in parameters]
        self.parameters = [parameter for _, parameter in parameters]
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.first_bad_tensors = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    @torch.no_grad()
    def found_non_finite(self, step: int, loss: Tensor) -> Tensor:
        """Returns a float32 scalar on the device: 1 where the update must be skipped, equal on every rank, else 0.

        Args:
            step: generator update this belongs to, for the report.
            loss: this rank's loss, a scalar.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), f"{self.network}: a parameter received no gradient"
        bad_tensors = ~torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite()
        bad = (bad_tensors.any() | ~loss.isfinite()).float()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        is_first = (bad > 0) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(is_first, step, self.first_bad_step))
        self.first_bad_tensors.copy_(torch.where(is_first, bad_tensors, self.first_bad_tensors))
        return bad

    def report(self) -> NonFinite | None:
        """Returns the first skipped update since `reset`, or None. Waits for the device."""
        step = int(self.first_bad_step)
        if step < 0:
            return None
        flags = self.first_bad_tensors.tolist()
        return NonFinite(self.network, step, tuple(n for n, bad in zip(self.names, flags, strict=True) if bad))

    def reset(self) -> None:
        """Forgets what was found, after a rollback."""
        self.first_bad_step.fill_(-1)
        self.first_bad_tensors.zero_()
