"""Hinge losses (Lim & Ye 2017, arXiv 1705.02894; SAGAN equation 4; official code: model.py)."""

import torch.nn.functional as F
from torch import Tensor


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the discriminator's loss, mean(max(0, 1 - real)) + mean(max(0, 1 + fake)), a scalar, of logits (N,)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_g(fake_logits: Tensor) -> Tensor:
    """Return the generator's loss, -mean(fake), a scalar, of logits (N,)."""
    return -fake_logits.mean()
