"""The weight average by hand."""

import pytest
import torch
from torch import Tensor, nn

from sagan import Ema, Generator


class Toy(nn.Module):
    """One parameter, one float buffer, one integer buffer."""

    weight: nn.Parameter
    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.mean.fill_(10 * value)
            self.count.fill_(int(value))


def state(toy: Toy) -> tuple[list[float], list[float], int]:
    return toy.weight.tolist(), toy.mean.tolist(), int(toy.count)


def test_copies_before_the_start_step_then_averages_parameters_and_copies_buffers() -> None:
    toy = Toy()
    ema: Ema = Ema(toy, decay=0.75, start_step=3)
    average = ema.module
    assert isinstance(average, Toy)
    for step, value in ((1, 4.0), (2, 8.0)):
        toy.become(value)
        ema.update(toy, step)
        assert state(average) == ([value] * 2, [10 * value] * 2, value)
    toy.become(12.0)
    ema.update(toy, 3)  # 0.75 * 8 + 0.25 * 12
    assert state(average) == ([9.0] * 2, [120.0] * 2, 12)
    toy.become(1.0)
    ema.update(toy, 4)  # 0.75 * 9 + 0.25 * 1
    assert state(average) == ([7.0] * 2, [10.0] * 2, 1)


@pytest.mark.parametrize("step", [1, 5])
def test_skip_leaves_average_and_buffers_even_of_broken_buffers(step: int) -> None:
    toy = Toy()
    toy.become(2.0)
    ema = Ema(toy, decay=0.9, start_step=3)
    toy.become(3.0)
    with torch.no_grad():
        toy.mean.fill_(float("nan"))  # the weights of a skipped update are those before it
    ema.update(toy, step, skip=torch.tensor(True))
    assert isinstance(ema.module, Toy) and state(ema.module) == ([2.0] * 2, [20.0] * 2, 2)
    toy.become(3.0)
    other = Ema(ema.module, decay=0.9, start_step=3)
    ema.update(toy, step, skip=torch.tensor(False))
    other.update(toy, step)
    assert isinstance(other.module, Toy) and state(ema.module) == state(other.module)


def test_module_is_an_independent_copy_in_eval_mode_without_gradients() -> None:
    generator = Generator(16, 8, num_classes=2, z_dim=4, attention_resolution=8).train()
    ema = Ema(generator, 0.999, 0)
    assert not ema.module.training and generator.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert ema.module.state_dict().keys() == generator.state_dict().keys()
    pointers = {tensor.data_ptr() for tensor in generator.state_dict().values()}
    assert not any(tensor.data_ptr() in pointers for tensor in ema.module.state_dict().values())


def test_generator_average_equals_the_formula() -> None:
    torch.manual_seed(0)
    generator = Generator(16, 8, num_classes=2, z_dim=4, attention_resolution=8)
    ema = Ema(generator, 0.9, 1)
    expected = {name: parameter.detach().clone() for name, parameter in generator.named_parameters()}
    for step in (1, 2, 3):
        generator(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))  # moves running statistics
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                parameter.add_(torch.randn_like(parameter))
                expected[name] = 0.9 * expected[name] + 0.1 * parameter
        ema.update(generator, step)
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(ema.module.named_buffers(), generator.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        Ema(Toy(), 1.0, 0)
    with pytest.raises(ValueError, match="start_step must be at least 0, got -1"):
        Ema(Toy(), 0.9, -1)
