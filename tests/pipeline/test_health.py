import pytest
import torch
from torch import nn

from pipeline.health import FiniteWatch


def watched(network: nn.Module) -> FiniteWatch:
    return FiniteWatch("generator", list(network.named_parameters()), torch.device("cpu"))


def with_gradients(network: nn.Module) -> None:
    network(torch.randn(4, 3)).sum().backward()


def test_finite_gradients_pass():
    network = nn.Linear(3, 2)
    with_gradients(network)
    watch = watched(network)
    assert float(watch.found_non_finite(1, torch.tensor(0.5))) == 0
    assert watch.report() is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_bad_update_is_named_and_later_ones_do_not_hide_it(value):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with_gradients(network)
    watch = watched(network)
    watch.found_non_finite(6, torch.tensor(0.0))
    network[1].bias.grad[0] = value
    assert float(watch.found_non_finite(7, torch.tensor(0.0))) == 1
    network[0].weight.grad.fill_(value)
    assert float(watch.found_non_finite(8, torch.tensor(0.0))) == 1
    assert str(watch.report()) == "generator went non-finite at step 7: gradient of 1.bias"
    watch.reset()
    assert watch.report() is None


def test_a_non_finite_loss_counts_although_relu_hides_it_from_the_gradients():
    network = nn.Linear(3, 2)
    with_gradients(network)
    watch = watched(network)
    assert float(watch.found_non_finite(2, torch.tensor(float("nan")))) == 1
    assert str(watch.report()) == "generator went non-finite at step 2: loss"


def test_fused_adam_skips_the_flagged_update():
    """The flag goes to the kernel, so the host never waits: parameters, moments and step count stay."""
    parameter = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([parameter], lr=0.1, fused=True)
    parameter.grad = torch.ones(3)
    adam.found_inf = torch.tensor(0.0)
    adam.step()
    before = (
        parameter.detach().clone(),
        adam.state[parameter]["exp_avg_sq"].clone(),
        float(adam.state[parameter]["step"]),
    )
    parameter.grad = torch.full((3,), float("nan"))
    adam.found_inf = torch.tensor(1.0)
    adam.step()
    assert torch.equal(parameter.detach(), before[0])
    assert torch.equal(adam.state[parameter]["exp_avg_sq"], before[1])
    assert float(adam.state[parameter]["step"]) == before[2]
