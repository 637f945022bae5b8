"""Under bfloat16 autocast the maps are bfloat16 and these stay float32: spectral norm, batch statistics, softmax, the
final projection, losses, gradients, the average of the weights. Each layer of both networks, on the CPU.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sagan import Discriminator, Ema, Generator, advance_spectral_norm, hinge_d, hinge_g
from sagan.layers import (
    CrossReplicaBatchNorm2d,
    SelfAttention,
    SNConv2d,
    SpectralNorm,
    _all_reduce_normalize,
)

LABELS = torch.tensor([0, 1, 2, 1])


def networks() -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    generator, discriminator = Generator(32, 8, 3, 4, 16), Discriminator(32, 8, 3, 16)
    for network in (generator, discriminator):
        network.attention.gain.data.fill_(0.5)
    return generator, discriminator


def layers_of(kind: type) -> list[tuple[str, nn.Module]]:
    both = zip(("generator", "discriminator"), networks(), strict=True)
    return [(f"{side}.{name}", m) for side, network in both for name, m in network.named_modules() if type(m) is kind]


@pytest.fixture(scope="module")
def training_pass() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """{layer: (module, input, output)} of one pass of both networks in training mode under autocast."""
    generator, discriminator = networks()
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def record(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda m, inputs, output: seen.update({name: (m, inputs[0], output)}))

    for side, network in (("generator", generator), ("discriminator", discriminator)):
        for name, module in network.named_modules():
            record(f"{side}.{name}", module)
    with torch.autocast("cpu", torch.bfloat16):
        discriminator(generator(torch.randn(4, 4), LABELS), LABELS)
    return seen


@pytest.mark.parametrize(
    ("name", "layer"), [pair for kind in SpectralNorm.__subclasses__() for pair in layers_of(kind)]
)
def test_each_spectral_norm_is_taken_in_float32_under_autocast(name: str, layer: SpectralNorm) -> None:
    """The normalised weight is rounded once, last; its gradient, u and v after a power iteration have the same bits."""
    results = []
    cotangent = torch.randn(layer.weight.shape).bfloat16()
    for enabled in (False, True):
        u, v = layer.u.clone(), layer.v.clone()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weight = layer.normalized_weight()
            advance_spectral_norm(layer)
        weight.backward(cotangent.to(weight.dtype))
        assert layer.weight.grad is not None
        results.append((weight.detach(), layer.weight.grad.clone(), layer.u.clone(), layer.v.clone()))
        layer.u.copy_(u)
        layer.v.copy_(v)
    assert results[1][0].dtype == torch.bfloat16
    assert torch.equal(results[0][0].bfloat16(), results[1][0])
    for plain, low in zip(results[0][1:], results[1][1:], strict=True):
        assert plain.dtype == low.dtype == torch.float32
        assert torch.equal(plain, low)


def test_every_convolution_gives_bfloat16_maps(training_pass: dict[str, tuple[nn.Module, Tensor, Tensor]]) -> None:
    """The saving that autocast is for: without this the other tests could pass in float32."""
    outputs = {name: output for name, (module, _, output) in training_pass.items() if isinstance(module, SNConv2d)}
    assert len(outputs) == 14 + 14, "with those of attention and the generator's last"
    assert {name for name, output in outputs.items() if output.dtype != torch.bfloat16} == set()


def test_every_batch_norm_takes_float32_statistics_of_its_bfloat16_map(
    training_pass: dict[str, tuple[nn.Module, Tensor, Tensor]],
) -> None:
    found = [(m, x, y) for m, x, y in training_pass.values() if isinstance(m, CrossReplicaBatchNorm2d)]
    assert len(found) == 7, "two in each of three blocks, and the last"
    for layer, x, y in found:
        assert (x.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16)
        assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
        # Momentum 0.1 from 0 and 1; float64 on the same bfloat16 values is the reference.
        mean, variance = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
        torch.testing.assert_close(layer.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronised_statistics_are_float32_of_a_bfloat16_map(one_process_group: None) -> None:
    """The path of several processes; 256 + noise of 0.5, where bfloat16 sums would be far off."""
    torch.manual_seed(0)
    x = (torch.randn(4, 3, 32, 32) / 2 + 256).bfloat16().requires_grad_()
    mean, variance = torch.zeros(3), torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = _all_reduce_normalize(x, mean, variance, 1.0, 1e-5)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3)), rtol=1e-4, atol=0)
    expected = F.batch_norm(x.detach().double(), None, None, training=True).bfloat16()
    torch.testing.assert_close(y.detach(), expected, rtol=2e-2, atol=2e-2)


class _RecordDtypes(TorchDispatchMode):
    """Keeps the dtypes of the tensors that each operation was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        dtypes = {argument.dtype for argument in args if isinstance(argument, Tensor)}
        self.given.setdefault(func.overloadpacket.__name__, set()).update(dtypes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "layer"), layers_of(SelfAttention))
def test_each_attention_uses_the_kernel_that_never_holds_the_map(name: str, layer: SelfAttention) -> None:
    x = torch.randn(2, layer.query.in_channels, 8, 8).bfloat16().requires_grad_()
    with _RecordDtypes() as recorded:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert recorded.given[kernel] == {torch.bfloat16}
    assert kernel + "_backward" in recorded.given
    assert torch.bfloat16 in recorded.given["convolution"]


def test_that_kernel_takes_its_softmax_in_float32_there_and_back() -> None:
    """Dot products of 1,000 and more, between which bfloat16 cannot tell apart what differs by less than 4."""
    torch.manual_seed(0)
    base = torch.full((1, 1, 1, 16), 8.0)
    query, key = ((base + torch.randn(1, 1, rows, 16) / 4).bfloat16() for rows in (64, 32))
    value = torch.randn(1, 1, 32, 16).bfloat16()
    outputs = []
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (x.to(dtype).requires_grad_() for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        y.backward(torch.ones_like(y) * v.detach()[:, :, :1])
        outputs.append((y.double(), v.grad))  # the backward pass takes the softmax again
    logits = query.double() @ key.double().transpose(2, 3)
    low = torch.softmax(logits.bfloat16(), -1).double() @ value.double()
    assert (low - outputs[0][0]).abs().max() > 0.3, "the data tell the two apart"
    for exact, found in zip(*outputs, strict=True):
        assert exact is not None and found is not None
        torch.testing.assert_close(found.double(), exact.double(), rtol=0.03, atol=0.03)


def test_the_final_projection_and_the_images_are_float32(
    training_pass: dict[str, tuple[nn.Module, Tensor, Tensor]],
) -> None:
    for name in ("discriminator.linear", "discriminator.embedding", "discriminator.", "generator."):
        assert training_pass[name][2].dtype == torch.float32, name
    assert training_pass["discriminator.linear"][1].dtype == torch.float32, "the sum over pixels is, too"
    module, h, output = training_pass["discriminator.linear"]
    assert isinstance(module, nn.Linear)
    expected = h.double() @ module.normalized_weight().double().T + module.bias.double()  # type: ignore[operator]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_losses_gradients_and_the_average_are_float32_and_close_to_those_without_autocast() -> None:
    results = []
    for enabled in (False, True):
        generator, discriminator = networks()
        ema = Ema(generator, decay=0.9, start_step=0)
        z = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = discriminator(generator(z, LABELS), LABELS)
            losses = hinge_g(logits), hinge_d(logits, logits)
            ema.update(generator, 1)
        losses[0].backward()
        dtypes = {loss.dtype for loss in losses} | {tensor.dtype for tensor in ema.module.parameters()}
        for network in (generator, discriminator):
            for parameter in network.parameters():
                assert parameter.grad is not None
                dtypes.add(parameter.grad.dtype)
        assert dtypes == {torch.float32}
        results.append(
            (losses, torch.cat([p.grad.flatten() for p in discriminator.parameters() if p.grad is not None]))
        )
    (plain_losses, plain), (low_losses, low) = results
    for a, b in zip(plain_losses, low_losses, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert F.cosine_similarity(plain, low, dim=0) > 0.99
