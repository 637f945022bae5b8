"""The residual generator of SAGAN (official code: generator.py), from 16 to 256 pixels."""

import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagan.layers import (
    ConditionalBatchNorm2d,
    CrossReplicaBatchNorm2d,
    Init,
    SelfAttention,
    SNConv2d,
    SNLinear,
    attention_place,
    check_labels,
    full_precision,
    initialize,
)

# Width of the first 4x4 map and of each block's output, in units of `channels`; every block doubles H and W.
# 128: official code. 32, 64, 256: as StudioGAN (models/resnet.py) and BigGAN. 16: that of 32 less a block.
_WIDTHS = {
    16: (4, 4, 4),
    32: (4, 4, 4, 4),
    64: (16, 8, 4, 2, 1),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class GeneratorBlock(nn.Module):
    """Residual block that doubles H and W: norm, ReLU, upsample, 3x3, norm, ReLU, 3x3, plus a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, norm: Callable[[int], ConditionalBatchNorm2d]) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = SNConv2d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = SNConv2d(out_channels, out_channels, 3)
        self.shortcut = SNConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Map `x` (N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        h = self.conv1(_upsample(F.relu(self.norm1(x, labels))))
        h = self.conv2(F.relu(self.norm2(h, labels)))
        # The official code upsamples before the 1x1 convolution: the same numbers for four times the work.
        y: Tensor = _upsample(self.shortcut(x)) + h
        return y


class Generator(nn.Module):
    """Generator of SAGAN: noise and class to image.

    A linear layer to a 4x4 map, residual blocks with class-conditional batch norm, self-attention after the block whose
    output is `attention_resolution` pixels wide, then batch norm, ReLU, 3x3 convolution, tanh. Spectral norm on every
    convolution and linear layer.

    Args:
        resolution: H = W of the images: 16, 32, 64, 128 or 256.
        channels: width unit; the official 128-pixel network has 64 (maps of 1024 to 64 channels).
        num_classes: classes; 0 = unconditional, with plain batch norm.
        z_dim: size of the noise vector.
        attention_resolution: 8 to `resolution` (a power of 2), where attention stands; None = no attention (SNGAN).
            Official 128-pixel code: 32; paper's best IS and mmgeneration: 64.
        init: "xavier" (official) or "orthogonal".
        spectral_norm_eps: lower bound of vector norms in the power iteration.
        batch_norm_eps: added to the variance.
        batch_norm_momentum: share of the batch in the running statistics.
        sync_batch_norm: whether batch statistics are taken over all ranks.
        spectral_norm_on_class_tables: ablation; warns.

    Raises:
        ValueError: an argument has no such value.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 64,
        num_classes: int = 1000,
        z_dim: int = 128,
        attention_resolution: int | None = 64,
        *,
        init: Init = "xavier",
        spectral_norm_eps: float = 1e-8,
        batch_norm_eps: float = 1e-5,
        batch_norm_momentum: float = 0.1,
        sync_batch_norm: bool = True,
        spectral_norm_on_class_tables: bool = False,
    ) -> None:
        super().__init__()
        if resolution not in _WIDTHS:
            raise ValueError(f"resolution must be one of {', '.join(map(str, _WIDTHS))}, got {resolution}")
        for name, value, least in (("channels", channels, 1), ("num_classes", num_classes, 0), ("z_dim", z_dim, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if spectral_norm_on_class_tables:
            warnings.warn(
                "spectral_norm_on_class_tables=True normalises the gain and bias tables of batch norm: with 1000 "
                "classes it holds what they share within 0.03, and published reproductions fell from FID 12.83 to "
                "34.8. Use it for ablation only.",
                UserWarning,
                stacklevel=2,
            )
        self.resolution = resolution
        self.num_classes = num_classes
        self.z_dim = z_dim
        norm = partial(
            ConditionalBatchNorm2d,
            num_classes=num_classes,
            eps=batch_norm_eps,
            momentum=batch_norm_momentum,
            sync=sync_batch_norm,
            spectral_norm_tables=spectral_norm_on_class_tables,
        )
        widths = [channels * width for width in _WIDTHS[resolution]]
        self.linear = SNLinear(z_dim, widths[0] * 4 * 4)
        self.blocks = nn.ModuleList(
            GeneratorBlock(in_channels, out_channels, norm) for in_channels, out_channels in pairwise(widths)
        )
        self.attention_after = attention_place(attention_resolution, [8 << i for i in range(len(self.blocks))])
        if self.attention_after is not None:
            self.attention = SelfAttention(widths[self.attention_after + 1])
        self.final_norm = CrossReplicaBatchNorm2d(
            widths[-1], eps=batch_norm_eps, momentum=batch_norm_momentum, sync=sync_batch_norm
        )
        self.final_conv = SNConv2d(widths[-1], 3, 3)
        initialize(self, init, spectral_norm_eps)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Make images.

        Args:
            z: (N, z_dim) noise, standard normal in training.
            labels: (N,) int64 classes; None if and only if the network is unconditional.

        Returns:
            (N, 3, resolution, resolution) in [-1, 1]; float32 also under autocast, float64 from a float64 network.

        Raises:
            ValueError: z or labels do not fit the network.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must have shape (N, {self.z_dim}), got {tuple(z.shape)}")
        check_labels(labels, self.num_classes, z.shape[0])

        # z.shape[0], not len(z): torch.export would take the latter for a constant.
        x = self.linear(z).view(z.shape[0], -1, 4, 4)
        for index, block in enumerate(self.blocks):
            x = block(x, labels)
            if index == self.attention_after:
                x = self.attention(x)
        x = self.final_conv(F.relu(self.final_norm(x)))
        return torch.tanh(full_precision(x))
