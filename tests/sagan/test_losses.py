"""Hinge losses by hand."""

import pytest
import torch

from sagan import hinge_d, hinge_g


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    # real: 0, 0.5, 2; fake: 0, 1, 2
    assert hinge_d(real, fake).item() == pytest.approx(2.5 / 3 + 3 / 3)
    assert hinge_g(fake).item() == pytest.approx(2 / 3)


def test_hinge_gradient_stops_beyond_the_margin() -> None:
    real, fake = torch.tensor([2.0, 0.5], requires_grad=True), torch.tensor([-3.0, 0.0], requires_grad=True)
    hinge_d(real, fake).backward()
    assert real.grad is not None and real.grad.tolist() == [0, -0.5]
    assert fake.grad is not None and fake.grad.tolist() == [0, 0.5]


def test_losses_keep_the_dtype_of_the_logits_under_autocast() -> None:
    logits = torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert hinge_d(logits, logits).dtype == hinge_g(logits).dtype == torch.float32
    assert hinge_d(logits.double(), logits.double()).dtype == torch.float64
