"""The DCGAN-like pair of celeba64.yaml against hand counts and against the plain layers it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sagan import DcganDiscriminator, DcganGenerator, attention_gains, hinge_g


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("attention", [True, False])
def test_parameter_counts_by_hand(attention: bool) -> None:
    conv = {(a, b): 25 * a * b + b for a, b in [(512, 256), (256, 128), (128, 64), (64, 3), (3, 64)]}
    conv |= {(b, a): 25 * a * b + a for a, b in [(512, 256), (256, 128), (128, 64)]}
    block = 2 * 64 * 8 + 2 * 64 * 32 + 1 if attention else 0  # query and key, value and output, gain
    batch_norms = 2 * (512 + 256 + 128 + 64)
    generator = (128 * 8192 + 8192) + conv[512, 256] + conv[256, 128] + conv[128, 64] + conv[64, 3]
    assert count(DcganGenerator(64, 128, attention)) == generator + batch_norms + block
    discriminator = conv[3, 64] + conv[64, 128] + conv[128, 256] + conv[256, 512] + (512 * 4 * 4 + 1)
    assert count(DcganDiscriminator(64, attention)) == discriminator + block


def test_generator_is_dense_then_upsampled_convolutions() -> None:
    torch.manual_seed(0)
    generator = DcganGenerator(8, 12).double().eval()
    generator.attention.gain.data.fill_(0.7)
    z = torch.randn(3, 12, dtype=torch.float64)
    x = (z @ generator.linear.normalized_weight().T + generator.linear.bias).view(3, 64, 4, 4)
    x = F.relu(x / (1 + 1e-5) ** 0.5)  # running mean 0 and variance 1, gain 1, bias 0
    for conv in generator.convs:
        x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), conv.normalized_weight(), conv.bias, padding=2)
        x = F.relu(x / (1 + 1e-5) ** 0.5)
    assert x.shape == (3, 8, 32, 32)
    x = generator.attention(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    last = generator.final_conv
    expected = torch.tanh(F.conv2d(x, last.normalized_weight(), last.bias, padding=2))
    torch.testing.assert_close(generator(z), expected)


def test_discriminator_is_convolutions_and_pools() -> None:
    torch.manual_seed(0)
    discriminator = DcganDiscriminator(8).double()
    discriminator.attention.gain.data.fill_(0.7)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    x = images
    for index, conv in enumerate(discriminator.convs):
        x = F.conv2d(x, conv.normalized_weight(), conv.bias, padding=2)
        x = torch.where(x > 0, x, 0.2 * x).unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        if index == 0:
            assert x.shape == (2, 8, 32, 32)
            x = discriminator.attention(x)
    linear = discriminator.linear
    expected = (x.flatten(1) @ linear.normalized_weight().T + linear.bias)[:, 0]
    torch.testing.assert_close(discriminator(images), expected)


def test_dot_products_are_divided_by_the_root_of_their_length() -> None:
    torch.manual_seed(0)
    attention = DcganGenerator(32, 8).double().attention  # 32 channels: keys of 4
    x = torch.randn(1, 32, 6, 6, dtype=torch.float64)
    query = torch.einsum("oc,nchw->nohw", attention.query.normalized_weight()[:, :, 0, 0], x)[0].flatten(1)
    key = torch.einsum("oc,nchw->nohw", attention.key.normalized_weight()[:, :, 0, 0], x)
    key = key.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))[0].flatten(1)
    products = query.T @ key / 2
    by_hand = products.exp() / products.exp().sum(1, keepdim=True)
    torch.testing.assert_close(attention.attention_map(x)[0], by_hand)


def test_shapes_ranges_and_a_gradient_for_every_parameter() -> None:
    torch.manual_seed(0)
    generator, discriminator = DcganGenerator(8, 20), DcganDiscriminator(8)
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(2, 20))
        logits = discriminator(images)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert logits.shape == (2,) and logits.dtype == torch.float32
    hinge_g(logits).backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert attention_gains(generator) == {"attention": 0}


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        DcganGenerator(8, 20)(torch.zeros(2, 20), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"z must have shape \(N, 20\), got \(2, 21\)"):
        DcganGenerator(8, 20)(torch.zeros(2, 21))
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 64, 64\), got \(2, 3, 32, 32\)"):
        DcganDiscriminator(8)(torch.zeros(2, 3, 32, 32))
