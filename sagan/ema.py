"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A network whose parameters are the moving average of another's and whose buffers are copies of the other's.

    Copied, not averaged: batch norm's running statistics are averages already, and u and v must stay unit vectors.
    Save and restore it by the state dict of `module`.

    Args:
        model: the network to follow, not wrapped; it is copied and may be float32 or float64.
        decay: share of the old average that an update keeps, in [0, 1).
        start_step: first step that averages; before it the parameters are copied.

    Attributes:
        module: the average, in eval mode, requiring no gradients.

    Raises:
        ValueError: decay or start_step out of range.
    """

    def __init__(self, model: nn.Module, decay: float, start_step: int) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {start_step}")
        self.decay = decay
        self.start_step = start_step
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skip: Tensor | None = None) -> None:
        """Follow `model` after its update number `step`; does not wait for the device.

        Args:
            model: the network given to the constructor, after its optimizer step.
            step: how many updates the model has had, this one included: 1 for the first (BigGAN-PyTorch counts so too).
            skip: bool scalar on the model's device; where true, the average and its buffers stay as they are.
        """
        share = 1.0 if step < self.start_step else 1 - self.decay
        keep = torch.zeros((), dtype=torch.bool, device=next(model.parameters()).device) if skip is None else skip
        weight = torch.where(keep, 0.0, share)
        for average, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, weight.to(average.dtype))
        for buffer, new in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(torch.where(keep, buffer, new))  # what is skipped may be NaN, which no weight of 0 undoes
