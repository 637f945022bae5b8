"""The unconditional DCGAN-like pair for 64-pixel faces: plain 5x5 convolutions instead of residual blocks.

After DCGAN (Radford et al. 2016, arXiv 1511.06434), with the spectral norm, hinge loss and self-attention of SAGAN, and
with nearest upsampling and average pooling in place of strides. The attention block is SAGAN's, but its dot products
are divided by sqrt(d).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan.layers import (
    CrossReplicaBatchNorm2d,
    Init,
    SelfAttention,
    SNConv2d,
    SNLinear,
    check_labels,
    full_precision,
    initialize,
    without_autocast,
)

RESOLUTION = 64
ATTENTION_RESOLUTION = 32
_KERNEL = 5
_SLOPE = 0.2  # of LeakyReLU


class DcganGenerator(nn.Module):
    """Generator: noise to a 64x64 image.

    A linear layer to a 4x4 map of 8 x `channels`, three times (nearest upsampling, 5x5 convolution) to 4, 2 and 1 x
    `channels` at 32x32, each map with batch norm and ReLU; self-attention; upsampling, 5x5 convolution to RGB, tanh.
    Spectral norm on every convolution and linear layer.

    Args:
        channels: width unit.
        z_dim: size of the noise vector.
        attention: whether self-attention stands at 32x32.
        init: "xavier" or "orthogonal".
        spectral_norm_eps: lower bound of vector norms in the power iteration.
        batch_norm_eps: added to the variance.
        batch_norm_momentum: share of the batch in the running statistics.
        sync_batch_norm: whether batch statistics are taken over all ranks.
    """

    resolution = RESOLUTION
    num_classes = 0

    def __init__(
        self,
        channels: int = 64,
        z_dim: int = 128,
        attention: bool = True,
        *,
        init: Init = "xavier",
        spectral_norm_eps: float = 1e-8,
        batch_norm_eps: float = 1e-5,
        batch_norm_momentum: float = 0.1,
        sync_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.z_dim = z_dim
        widths = [channels * width for width in (8, 4, 2, 1)]
        self.linear = SNLinear(z_dim, widths[0] * 4 * 4)
        self.norms = nn.ModuleList(
            CrossReplicaBatchNorm2d(width, eps=batch_norm_eps, momentum=batch_norm_momentum, sync=sync_batch_norm)
            for width in widths
        )
        self.convs = nn.ModuleList(SNConv2d(*pair, _KERNEL) for pair in pairwise(widths))
        if attention:
            self.attention = SelfAttention(widths[-1], scaled=True)
        self.has_attention = attention
        self.final_conv = SNConv2d(widths[-1], 3, _KERNEL)
        initialize(self, init, spectral_norm_eps)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images.

        Args:
            z: (N, z_dim) noise, standard normal in training.
            labels: None.

        Returns:
            (N, 3, 64, 64) in [-1, 1]; float32 also under autocast, float64 from a float64 network.

        Raises:
            ValueError: z does not fit the network, or there are labels.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must have shape (N, {self.z_dim}), got {tuple(z.shape)}")
        check_labels(labels, 0, z.shape[0])
        x = F.relu(self.norms[0](self.linear(z).view(z.shape[0], -1, 4, 4)))
        for conv, norm in zip(self.convs, self.norms[1:], strict=True):
            x = F.relu(norm(conv(F.interpolate(x, scale_factor=2, mode="nearest"))))
        if self.has_attention:
            x = self.attention(x)
        x = self.final_conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return torch.tanh(full_precision(x))


class DcganDiscriminator(nn.Module):
    """Discriminator: a 64x64 image to a logit.

    Four times (5x5 convolution, LeakyReLU 0.2, 2x2 average pooling) to 1, 2, 4 and 8 x `channels` at 4x4, with
    self-attention after the first, at 32x32; a linear layer on all of it. Spectral norm on every layer, no batch norm.

    Args:
        channels: width unit.
        attention: whether self-attention stands at 32x32.
        init: "xavier" or "orthogonal".
        spectral_norm_eps: lower bound of vector norms in the power iteration.
    """

    resolution = RESOLUTION
    num_classes = 0

    def __init__(
        self, channels: int = 64, attention: bool = True, *, init: Init = "xavier", spectral_norm_eps: float = 1e-8
    ) -> None:
        super().__init__()
        widths = [3, *(channels * width for width in (1, 2, 4, 8))]
        self.convs = nn.ModuleList(SNConv2d(*pair, _KERNEL) for pair in pairwise(widths))
        if attention:
            self.attention = SelfAttention(widths[1], scaled=True)
        self.has_attention = attention
        self.linear = SNLinear(widths[-1] * 4 * 4, 1)
        initialize(self, init, spectral_norm_eps)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score images: the higher, the more real.

        Args:
            images: (N, 3, 64, 64) in [-1, 1].
            labels: None.

        Returns:
            (N,) logits; float32 also under autocast, float64 from a float64 network.

        Raises:
            ValueError: images do not fit the network, or there are labels.
        """
        if images.shape[1:] != (3, RESOLUTION, RESOLUTION):
            size = f"(N, 3, {RESOLUTION}, {RESOLUTION})"
            raise ValueError(f"images must have shape {size}, got {tuple(images.shape)}")
        check_labels(labels, 0, len(images))
        x = images
        for index, conv in enumerate(self.convs):
            x = F.avg_pool2d(F.leaky_relu(conv(x), _SLOPE), 2)
            if index == 0 and self.has_attention:
                x = self.attention(x)
        with without_autocast(x):
            logits: Tensor = self.linear(full_precision(x).flatten(1)).squeeze(1)
        return logits
