"""Watches that training stays finite, without asking the device more than once per log interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function


class NonFiniteError(RuntimeError):
    """Training went non-finite and will not recover by itself; the message names step, network and tensors."""


@dataclass(frozen=True)
class NonFinite:
    """The first update of a network whose loss or a gradient, or after which a buffer, was NaN or infinite."""

    network: str
    step: int
    tensors: tuple[str, ...]  # parameters with a non-finite gradient, or buffers; empty when it was the loss alone
    of: Literal["gradient", "buffer"] = "gradient"

    def __str__(self) -> str:
        names = ", ".join(self.tensors[:3]) + (f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else "")
        where = {"gradient": f"gradient of {names}", "buffer": f"buffer {names}"}[self.of] if self.tensors else "loss"
        return f"{self.network} went non-finite at step {self.step}: {where}"


class FiniteWatch:
    """Decides on the device whether an update may be applied, and remembers the first that may not.

    Attributes:
        gradient_norm: 2-norm over the last update's finite gradients, a float32 scalar on the device, equal on every
            rank.

    Args:
        network: name for the report.
        names: of the network's parameters.
        device: where the flags live.
        num_copies: how many ranks hold each gradient.
    """

    def __init__(self, network: str, names: Sequence[str], device: torch.device, num_copies: int = 1):
        self.network, self.names, self.num_copies = network, list(names), num_copies
        self.gradient_norm = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.first_bad_tensors = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    @torch.no_grad()
    @record_function("finite check")
    def found_non_finite(self, step: int, loss: Tensor, first: int, gradients: Sequence[Tensor]) -> Tensor:
        """Returns a float32 scalar on the device: 1 where the update must be skipped, equal on every rank, else 0.

        Args:
            step: generator update this belongs to, for the report.
            loss: this rank's loss, a scalar.
            first: number of the parameter that the first of `gradients` belongs to.
            gradients: of consecutive parameters, whole or in part; the ranks together hold all of them.
        """
        found = torch.zeros(len(self.names) + 2, device=self.first_bad_step.device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(list(gradients))).float()
            found[first : first + len(gradients)] = (~norms.isfinite()).float()
            found[-1] = torch.where(norms.isfinite(), norms, 0).square().sum() / self.num_copies
        found[-2] = (~loss.isfinite()).float()
        if dist.is_initialized():
            dist.all_reduce(found)
        self.gradient_norm = found[-1].sqrt()
        bad, bad_tensors = (found[:-1].max() > 0).float(), found[:-2] > 0
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


def non_finite_buffers(module: nn.Module) -> list[str]:
    """Returns the names of the buffers that hold a NaN or an infinity; waits for the device."""
    buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    if not buffers:
        return []
    bad = torch.stack([~buffer.isfinite().all() for buffer in buffers.values()]).tolist()
    return [name for name, is_bad in zip(buffers, bad, strict=True) if is_bad]
