"""The update as textbooks write it: what ours is measured against (`launch/benchmark.py train --baseline`).

float32, contiguous, torch's own spectral norm, layer by layer as in the official code
(github.com/brain-research/self-attention-gan), nothing kept between passes. Submodules have the names of ours, so that
`take_weights` can give both the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.profiler import record_function

from pipeline.batch import Batch
from pipeline.config import Config
from sagan import Discriminator, Generator
from sagan.layers import SpectralNorm


class Textbook:
    """The networks of a conditional configuration with two updates of their own.

    Args:
        config: of the run; read are model, optimizer, ema.decay and train.global_batch_size.
        device: of networks and updates.
        generator: ours, whose weights are copied.
        discriminator: likewise.
        dtype: float32; float64 for comparisons.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        generator: Generator,
        discriminator: Discriminator,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        self.generator, self.discriminator, self.ema = (
            _take_weights(module, source).to(device, dtype)
            for module, source in (
                (TextbookGenerator(generator, config), generator),
                (TextbookDiscriminator(discriminator, config), discriminator),
                (TextbookGenerator(generator, config), generator),
            )
        )
        settings = config.optimizer
        self.adam_g = torch.optim.Adam(self.generator.parameters(), settings.lr_g, settings.betas, settings.eps)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), settings.lr_d, settings.betas, settings.eps)

    def update(self, step: int, batches: Sequence[Batch], attempt: int) -> dict[str, Tensor]:
        """Updates discriminator, generator and average once; see `pipeline.gan.Gan.update`."""
        for batch in batches:
            images = batch.images.to(self.device).contiguous().to(self.dtype) / 127.5 - 1
            with record_function("discriminator step"):
                d_loss = self.discriminator_step(images, batch.labels.to(self.device), *self._noise())
        with record_function("generator step"):
            g_loss = self.generator_step(*self._noise())
        with record_function("ema"), torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                average.mul_(self.config.ema.decay).add_(parameter, alpha=1 - self.config.ema.decay)
            for buffer, new in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
                buffer.copy_(new)
        return {"d_loss": d_loss, "g_loss": g_loss}

    def discriminator_step(self, images: Tensor, labels: Tensor, z: Tensor, fake_labels: Tensor) -> Tensor:
        """Updates the discriminator by the hinge loss; gradients stay until the next call."""
        self.adam_d.zero_grad()
        with torch.no_grad():
            fakes = self.generator(z, fake_labels)
        real, fake = self.discriminator(torch.cat([images, fakes]), torch.cat([labels, fake_labels])).chunk(2)
        loss: Tensor = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.adam_d.step()
        return loss.detach()

    def generator_step(self, z: Tensor, labels: Tensor) -> Tensor:
        """Updates the generator; the discriminator is frozen."""
        self.adam_g.zero_grad()
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(self.generator(z, labels), labels).mean()
        loss.backward()
        self.discriminator.requires_grad_(True)
        self.adam_g.step()
        detached: Tensor = loss.detach()
        return detached

    def _noise(self) -> tuple[Tensor, Tensor]:
        model, count = self.config.model, self.config.train.global_batch_size
        z = torch.randn(count, model.z_dim, device=self.device, dtype=self.dtype)
        return z, torch.randint(model.num_classes, (count,), device=self.device)


def _take_weights(module: nn.Module, source: nn.Module) -> nn.Module:
    """Copies the weights, biases, u, v and batch norm state of one of our networks into its textbook form."""
    state = source.state_dict()
    for name, layer in source.named_modules():
        if isinstance(layer, SpectralNorm):
            for ours, theirs in (("weight", "original"), ("u", "0._u"), ("v", "0._v")):
                state[f"{name}.parametrizations.weight.{theirs}"] = state.pop(f"{name}.{ours}")
    module.load_state_dict(state)
    return module


class _Conv(nn.Conv2d):
    """As large as `like`, one of our layers, with torch's spectral norm."""

    def __init__(self, like: nn.Module, eps: float):
        assert isinstance(like, nn.Conv2d)
        size = like.kernel_size[0]
        super().__init__(like.in_channels, like.out_channels, size, padding=size // 2, bias=like.bias is not None)
        spectral_norm(self, eps=eps)


class _Norm(nn.Module):
    def __init__(self, features: int, config: Config):
        super().__init__()
        model = config.model
        self.norm = nn.BatchNorm2d(features, model.batch_norm_eps, model.batch_norm_momentum, affine=False)
        self.gain = nn.Embedding(model.num_classes, features)
        self.bias = nn.Embedding(model.num_classes, features)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        gain, bias = self.gain(labels)[:, :, None, None], self.bias(labels)[:, :, None, None]
        y: Tensor = gain * self.norm(x) + bias
        return y


class _Attention(nn.Module):
    def __init__(self, like: Any, eps: float):
        super().__init__()
        self.query, self.key = _Conv(like.query, eps), _Conv(like.key, eps)
        self.value, self.output = _Conv(like.value, eps), _Conv(like.output, eps)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        query = self.query(x).view(n, c // 8, h * w)
        key = F.max_pool2d(self.key(x), 2).view(n, c // 8, h * w // 4)
        value = F.max_pool2d(self.value(x), 2).view(n, c // 2, h * w // 4)
        weights = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
        attended = torch.bmm(value, weights.transpose(1, 2)).view(n, c // 2, h, w)
        y: Tensor = x + self.gain * self.output(attended)
        return y


class _GeneratorBlock(nn.Module):
    def __init__(self, like: Any, config: Config):
        super().__init__()
        eps = config.model.spectral_norm_eps
        self.norm1, self.norm2 = _Norm(like.conv1.in_channels, config), _Norm(like.conv1.out_channels, config)
        self.conv1, self.conv2 = _Conv(like.conv1, eps), _Conv(like.conv2, eps)
        self.shortcut = _Conv(like.shortcut, eps)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2))
        h = self.conv2(F.relu(self.norm2(h, labels)))
        y: Tensor = h + self.shortcut(F.interpolate(x, scale_factor=2))
        return y


class TextbookGenerator(nn.Module):
    """`sagan.Generator`, conditional: z (N, z_dim), labels (N,) int64 to images (N, 3, R, R) in [-1, 1].

    Args:
        like: gives the layers' sizes.
        config: gives eps and momentum.
    """

    def __init__(self, like: Generator, config: Config):
        super().__init__()
        model = config.model
        self.linear = spectral_norm(
            nn.Linear(like.linear.in_features, like.linear.out_features), eps=model.spectral_norm_eps
        )
        self.blocks = nn.ModuleList(_GeneratorBlock(block, config) for block in like.blocks)
        self.attention_after = like.attention_after
        if self.attention_after is not None:
            self.attention = _Attention(like.attention, model.spectral_norm_eps)
        self.final_norm = nn.BatchNorm2d(like.final_conv.in_channels, model.batch_norm_eps, model.batch_norm_momentum)
        self.final_conv = _Conv(like.final_conv, model.spectral_norm_eps)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Makes images."""
        x = self.linear(z).view(len(z), -1, 4, 4)
        for index, block in enumerate(self.blocks):
            x = block(x, labels)
            if index == self.attention_after:
                x = self.attention(x)
        return F.tanh(self.final_conv(F.relu(self.final_norm(x))))


class _DiscriminatorBlock(nn.Module):
    def __init__(self, like: Any, eps: float, first: bool):
        super().__init__()
        self.conv1, self.conv2 = _Conv(like.conv1, eps), _Conv(like.conv2, eps)
        self.shortcut = None if like.shortcut is None else _Conv(like.shortcut, eps)
        self.first, self.downsample = first, first or like.downsample

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        if self.downsample:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        y: Tensor = h + x
        return y


class TextbookDiscriminator(nn.Module):
    """`sagan.Discriminator`, conditional: images (N, 3, R, R), labels (N,) int64 to logits (N,).

    Args:
        like: gives the layers' sizes.
        config: gives eps.
    """

    def __init__(self, like: Discriminator, config: Config):
        super().__init__()
        eps = config.model.spectral_norm_eps
        self.blocks = nn.ModuleList(_DiscriminatorBlock(block, eps, i == 0) for i, block in enumerate(like.blocks))
        self.attention_after = like.attention_after
        if self.attention_after is not None:
            self.attention = _Attention(like.attention, eps)
        self.linear = spectral_norm(nn.Linear(like.linear.in_features, 1), eps=eps)
        self.embedding = spectral_norm(nn.Embedding(like.num_classes, like.linear.in_features), eps=eps)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Scores images."""
        x = images
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.attention_after:
                x = self.attention(x)
        h = F.relu(x).sum((2, 3))
        logits: Tensor = self.linear(h).squeeze(1) + (self.embedding(labels) * h).sum(1)
        return logits
