"""The residual projection discriminator of SAGAN (official code: discriminator.py), from 16 to 256 pixels."""

import torch.nn.functional as F
from torch import Tensor, nn

from sagan.layers import (
    Init,
    SelfAttention,
    SNConv2d,
    SNEmbedding,
    SNLinear,
    attention_place,
    check_labels,
    full_precision,
    initialize,
    without_autocast,
)

# Width of each block's output, in units of `channels`, and how many blocks, from the first, halve H and W.
# 128: official code. 32, 64, 256: as StudioGAN (models/resnet.py) and BigGAN. 16: that of 32 less a block.
_LAYOUTS = {
    16: ((2, 2, 2), 1),
    32: ((2, 2, 2, 2), 2),
    64: ((1, 2, 4, 8, 16), 4),
    128: ((1, 2, 4, 8, 16, 16), 5),
    256: ((1, 2, 4, 8, 8, 16, 16), 6),
}


class FirstDiscriminatorBlock(nn.Module):
    """Residual block on images that halves H and W: 3x3, ReLU, 3x3, pool; shortcut pool, 1x1 ("optimized block")."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv1 = SNConv2d(3, out_channels, 3)
        self.conv2 = SNConv2d(out_channels, out_channels, 3)
        self.shortcut = SNConv2d(3, out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map `images` (N, 3, H, W) to (N, C_out, H/2, W/2)."""
        h = self.conv2(F.relu(self.conv1(images)))
        y: Tensor = self.shortcut(F.avg_pool2d(images, 2)) + F.avg_pool2d(h, 2)
        return y


class DiscriminatorBlock(nn.Module):
    """Residual block: ReLU, 3x3, ReLU, 3x3, and a pool if `downsample`; the inner width is the outer ("wide").

    The shortcut is a 1x1 convolution, or the identity where neither size nor width changes.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.conv1 = SNConv2d(in_channels, out_channels, 3)
        self.conv2 = SNConv2d(out_channels, out_channels, 3)
        self.shortcut = SNConv2d(in_channels, out_channels, 1) if downsample or in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (N, C_in, H, W) to (N, C_out, H, W), or half of H and W."""
        h: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        if self.downsample:
            # The official code pools the shortcut after its 1x1 convolution: the same numbers for four times the work.
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return x + h


class Discriminator(nn.Module):
    """Projection discriminator of SAGAN: image and class to a logit (Miyato & Koyama 2018, arXiv 1802.05637).

    Residual blocks down to 4x4 (8x8 for 16 and 32 pixels), self-attention after the first block whose output is
    `attention_resolution` pixels wide, ReLU, h = sum over pixels, logit = linear(h) + <embedding(label), h>. Spectral
    norm on every convolution, the linear layer and the embedding. No batch norm: images do not see each other.

    Args:
        resolution: H = W of the images: 16, 32, 64, 128 or 256.
        channels: width unit; the official 128-pixel network has 64 (maps of 64 to 1024 channels).
        num_classes: classes; 0 = unconditional, without projection.
        attention_resolution: 4 (8 for 16 and 32 pixels) to resolution / 2, where attention stands; None = no attention.
        init: "xavier" (official) or "orthogonal".
        spectral_norm_eps: lower bound of vector norms in the power iteration.

    Raises:
        ValueError: an argument has no such value.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 64,
        num_classes: int = 1000,
        attention_resolution: int | None = 64,
        *,
        init: Init = "xavier",
        spectral_norm_eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if resolution not in _LAYOUTS:
            raise ValueError(f"resolution must be one of {', '.join(map(str, _LAYOUTS))}, got {resolution}")
        for name, value, least in (("channels", channels, 1), ("num_classes", num_classes, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.resolution = resolution
        self.num_classes = num_classes
        units, num_downsamples = _LAYOUTS[resolution]
        widths = [channels * width for width in units]
        self.blocks = nn.ModuleList([FirstDiscriminatorBlock(widths[0])])
        for index in range(1, len(widths)):
            self.blocks.append(DiscriminatorBlock(widths[index - 1], widths[index], downsample=index < num_downsamples))
        block_resolutions = [resolution >> min(index + 1, num_downsamples) for index in range(len(widths))]
        self.attention_after = attention_place(attention_resolution, block_resolutions)
        if self.attention_after is not None:
            self.attention = SelfAttention(widths[self.attention_after])
        self.linear = SNLinear(widths[-1], 1)
        if num_classes:
            self.embedding = SNEmbedding(num_classes, widths[-1])
        initialize(self, init, spectral_norm_eps)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Score images: the higher, the more real.

        Args:
            images: (N, 3, resolution, resolution) in [-1, 1].
            labels: (N,) int64 classes; None if and only if the network is unconditional.

        Returns:
            (N,) logits; float32 also under autocast, float64 from a float64 network.

        Raises:
            ValueError: images or labels do not fit the network.
        """
        if images.shape[1:] != (3, self.resolution, self.resolution):
            size = f"(N, 3, {self.resolution}, {self.resolution})"
            raise ValueError(f"images must have shape {size}, got {tuple(images.shape)}")
        check_labels(labels, self.num_classes, len(images))

        x = images
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.attention_after:
                x = self.attention(x)
        with without_autocast(x):
            h = F.relu(full_precision(x)).sum((2, 3))  # (N, C)
            logits: Tensor = self.linear(h).squeeze(1)
            if self.num_classes:
                logits = logits + (self.embedding(labels) * h).sum(1)
        return logits
