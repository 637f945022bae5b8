"""Layers of SAGAN: spectral norm, batch norm over all replicas and per class, self-attention.

Sources: Zhang et al. 2019, "Self-Attention Generative Adversarial Networks" (arXiv 1805.08318), and its official code
(github.com/brain-research/self-attention-gan: ops.py, non_local.py). Where paper and code differ, the code is followed.

Some numbers stay float32 whatever the autocast (float64 in a float64 model): spectral norm, batch statistics, attention
softmax. Comments give shapes with N images, C channels, H x W pixels.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _FusedBatchNorm  # semi-private; see _fused_normalize
from torch.nn.modules.batchnorm import _BatchNorm

Init = Literal["xavier", "orthogonal"]

# Power iterations that start u and v, as in torch.nn.utils.parametrizations.spectral_norm. A random pair would make
# u^T W v nearly 0, hence the first normalised weights huge.
_STARTING_ITERATIONS = 15


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32 if it is float16 or bfloat16, else as it is (float64 stays float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves operations on the device of `x` alone."""
    return torch.autocast(x.device.type, enabled=False)


class SpectralNorm(nn.Module):
    """The part shared by `SNConv2d`, `SNLinear` and `SNEmbedding`: a weight divided by its largest singular value.

    The singular value of the weight, seen as a matrix W of shape (weight.shape[0], rest), is estimated as
    sigma = u^T W v (Miyato et al. 2018, arXiv 1802.05957, Algorithm 1). The unit vectors `u` (rows,) and `v` (columns,)
    are buffers. A forward pass reads copies of them and never changes them; `advance_spectral_norm` does. Nothing is
    cached, so gradients always flow through sigma of the weight as it is now.

    Attributes:
        eps: lower bound of the vector norms in the power iteration.
    """

    weight: Tensor
    u: Tensor
    v: Tensor
    eps: float = 1e-8

    def reset_singular_vectors(self) -> None:
        """Start `u` and `v` at random (torch's global generator) and let them approach the current weight."""
        weight = self.weight
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        self.register_buffer("u", torch.empty(rows, dtype=weight.dtype, device=weight.device))
        self.register_buffer("v", torch.empty(columns, dtype=weight.dtype, device=weight.device))
        if weight.is_meta:
            return  # shapes only: the first operation on them imports torch._dynamo, for 3 s
        for vector in (self.u, self.v):
            vector.copy_(F.normalize(torch.randn_like(vector), dim=0, eps=self.eps))
        for _ in range(_STARTING_ITERATIONS):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Move `u` and `v`, in place, one step towards the first singular vectors of the weight."""
        matrix, v = _as_matrix(self.weight), _in_memory_order(self.v, self.weight)
        self.u.copy_(F.normalize(matrix @ v, dim=0, eps=self.eps))
        v = F.normalize(matrix.T @ self.u, dim=0, eps=self.eps)
        if _is_channels_last(self.weight):
            channels, height, width = self.weight.shape[1:]
            v = v.view(height, width, channels).permute(2, 0, 1).flatten()
        self.v.copy_(v)

    def normalized_weight(self) -> Tensor:
        """Return weight / sigma, of the weight's shape; u and v are constants to the gradient.

        Its dtype is that of the coming operation: the weight's, or autocast's.
        """
        weight = self.weight
        device_type = weight.device.type
        lowered = torch.is_autocast_enabled(device_type) and weight.dtype == torch.float32
        dtype = torch.get_autocast_dtype(device_type) if lowered else weight.dtype
        with without_autocast(weight):
            normalized: Tensor = _Normalize.apply(weight, self.u, self.v, dtype)
            return normalized

    @torch.no_grad()
    def sigma(self) -> Tensor:
        """Return the estimate of the weight's largest singular value, a scalar without graph."""
        return torch.vdot(self.u, _as_matrix(self.weight) @ _in_memory_order(self.v, self.weight))


class _Normalize(torch.autograd.Function):
    """W / sigma with sigma = u^T W v; the gradient is G / sigma - <G, W> / sigma^2 u v^T (Miyato et al., equation 12).

    Written out, as autograd takes twice the passes over weights of which a network has 160 MB.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        u, v = u.clone(), _in_memory_order(v, weight)  # clones: they may advance before the backward pass
        sigma = torch.vdot(u, _as_matrix(weight) @ v)
        ctx.save_for_backward(weight, u, v, sigma)
        return (weight / sigma).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, u, v, sigma = ctx.saved_tensors
        gradient = torch.empty_like(weight).copy_(gradients[0]).div_(sigma)
        matrix = _as_matrix(gradient)
        along = torch.dot(matrix.flatten(), _as_matrix(weight).flatten()) / sigma
        matrix.addr_(u, -along * v)
        return gradient, None, None, None


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous()


def _as_matrix(weight: Tensor) -> Tensor:
    """Return a view of `weight` (rows, ...) as (rows, columns), columns in the order of memory."""
    return (weight.permute(0, 2, 3, 1) if _is_channels_last(weight) else weight).flatten(1)


def _in_memory_order(v: Tensor, weight: Tensor) -> Tensor:
    """Return a copy of `v` (columns,) in the order of the columns of `_as_matrix(weight)`."""
    return v.view(weight.shape[1:]).permute(1, 2, 0).flatten() if _is_channels_last(weight) else v.clone()


class SNConv2d(SpectralNorm, nn.Conv2d):
    """Convolution with spectral norm, stride 1 and as much padding as keeps H and W (odd kernels)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.reset_singular_vectors()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` (N, C_in, H, W) to (N, C_out, H, W)."""
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class SNLinear(SpectralNorm, nn.Linear):
    """Linear layer with spectral norm."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Linear.__init__(self, in_features, out_features)
        self.reset_singular_vectors()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (N, in_features) to (N, out_features)."""
        return F.linear(x, self.normalized_weight(), self.bias)


class SNEmbedding(SpectralNorm, nn.Embedding):
    """Table of one vector per class with spectral norm over the whole table."""

    def __init__(self, num_classes: int, features: int) -> None:
        nn.Embedding.__init__(self, num_classes, features)
        self.reset_singular_vectors()

    def forward(self, labels: Tensor) -> Tensor:
        """Look up `labels` (N,) int64; returns (N, features)."""
        return F.embedding(labels, self.normalized_weight())


@torch.no_grad()
def advance_spectral_norm(module: nn.Module) -> None:
    """Do one power iteration on u and v of every spectrally normalised layer under `module`.

    To be called once per optimizer step, before its forward passes, on every rank alike. The layers of one model hold
    bitwise the same u and v on all ranks as long as the weights do.
    """
    for layer in module.modules():
        if isinstance(layer, SpectralNorm):
            with without_autocast(layer.weight):
                layer.power_iteration()


@torch.no_grad()
def initialize(module: nn.Module, init: Init, spectral_norm_eps: float) -> None:
    """Draw the weight of every spectrally normalised layer under `module`, zero its bias, start its u and v.

    All draws come from torch's global generator: equal seeds give equal models. Other layers (batch norm, class tables,
    attention gains) start at the constants of their constructors and are left alone.

    Args:
        module: the network.
        init: "xavier" = uniform, as the official code (tf.contrib default); "orthogonal" as BigGAN and StudioGAN.
        spectral_norm_eps: lower bound of the vector norms in the power iteration, from now on.

    Raises:
        ValueError: `init` has another value.
    """
    draw = {"xavier": nn.init.xavier_uniform_, "orthogonal": nn.init.orthogonal_}.get(init)
    if draw is None:
        raise ValueError(f"init must be 'xavier' or 'orthogonal', got {init!r}")
    for layer in module.modules():
        if isinstance(layer, SpectralNorm):
            layer.eps = spectral_norm_eps
            draw(layer.weight)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                layer.bias.zero_()
            layer.reset_singular_vectors()


class _NormalizeOverRanks(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) over N, H, W of all ranks, and its gradient (Ioffe & Szegedy 2015, section 3).

    One exchange there and one back. The ranks' means and variances are joined by count (Chan et al. 1979), as exact
    as one process; ranks may hold unequal N.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precise = full_precision(x)
        mean = precise.mean((0, 2, 3))
        variance = (precise - mean[:, None, None]).square_().mean((0, 2, 3))  # torch.var_mean takes five times as long
        here = torch.stack([mean, variance, torch.full_like(mean, x.numel() / x.shape[1])])
        everywhere = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, here)
        means, variances, counts = torch.stack(everywhere, dim=1)
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, mean, variance, count = ctx.saved_tensors
        normalized = F.batch_norm(full_precision(x), mean, variance, eps=ctx.eps)
        gradient = full_precision(gradients[0])
        sums = torch.stack([gradient.sum((0, 2, 3)), (gradient * normalized).sum((0, 2, 3))])
        dist.all_reduce(sums)
        level, slope = (sums / count)[:, :, None, None]
        along = normalized.mul_(-slope).add_(gradient).sub_(level)
        return along.mul_(torch.rsqrt(variance + ctx.eps)[:, None, None]).to(x.dtype), None


def _all_reduce_normalize(x: Tensor, mean: Tensor, variance: Tensor, momentum: float, eps: float) -> Tensor:
    """Normalise `x` (N, C, H, W) over N, H, W of all ranks and advance the running mean and variance, both (C,)."""
    y, batch_mean, batch_variance, count = _NormalizeOverRanks.apply(x, eps)
    with torch.no_grad():
        mean.lerp_(batch_mean, momentum)
        variance.lerp_(batch_variance * (count / (count - 1)), momentum)
    normalized: Tensor = y
    return normalized


def _fused_normalize(x: Tensor, mean: Tensor, variance: Tensor, momentum: float, eps: float) -> Tensor:
    """Do as `_all_reduce_normalize` with the CUDA kernels that torch.nn.SyncBatchNorm(affine=False) calls.

    Semi-private in torch; called as torch 2.15's nn.SyncBatchNorm.forward does. Statistics of a float16 or bfloat16 `x`
    are float32. Like there, each forward pass waits once for the device (it drops ranks without samples).
    """
    group = dist.group.WORLD
    y: Tensor = _FusedBatchNorm.apply(x, None, None, mean, variance, eps, momentum, group, dist.get_world_size())
    return y


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class CrossReplicaBatchNorm2d(_BatchNorm):
    """Batch norm whose training statistics are those of the whole batch of all ranks.

    In eval mode, in one process or with `sync=False` it is plain batch norm. In train mode over several ranks every
    rank must run the same forward and backward passes, or the others wait for ever. It is no nn.SyncBatchNorm because
    DistributedDataParallel refuses that class on CPU. In a float16 or bfloat16 pass the statistics are float32.

    Args:
        num_features: C of the input (N, C, H, W).
        eps: added to the variance.
        momentum: share of the batch in the running statistics (torch's convention: 1 - decay).
        affine: whether gain (from 1) and bias (from 0), both (C,), follow.
        sync: whether statistics are taken over all ranks.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True, sync: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.sync = sync

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim != 4:
            raise ValueError(f"batch norm expects (N, C, H, W), got shape {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C, H, W) per channel; returns its shape and dtype."""
        if not (self.training and self.sync and _is_distributed()):
            return super().forward(x)
        self._check_input_dim(x)
        self.num_batches_tracked.add_(1)
        normalize = _fused_normalize if x.is_cuda else _all_reduce_normalize
        y = normalize(x, self.running_mean, self.running_var, self.momentum, self.eps)
        if self.affine:
            y = (y * self.weight[:, None, None] + self.bias[:, None, None]).to(y.dtype)
        return y


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose gain and bias are rows of class tables (Dumoulin et al. 2017, Miyato & Koyama 2018).

    The tables start at 1 and 0 and have no spectral norm, as in the official code (ops.py, ConditionalBatchNorm):
    normalising a table of K classes bounds what all classes share to 1 / sqrt(K).

    Args:
        num_features: C of the input (N, C, H, W).
        num_classes: rows of the tables; 0 = plain affine batch norm, labels are ignored.
        eps: see `CrossReplicaBatchNorm2d`.
        momentum: see `CrossReplicaBatchNorm2d`.
        sync: see `CrossReplicaBatchNorm2d`.
        spectral_norm_tables: ablation: both tables are spectrally normalised, drawn like other weights, and the gain is
            1 + row, as in StudioGAN.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = True,
        spectral_norm_tables: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.gain_offset = 1.0 if spectral_norm_tables else 0.0
        self.norm = CrossReplicaBatchNorm2d(
            num_features, eps=eps, momentum=momentum, affine=num_classes == 0, sync=sync
        )
        if num_classes == 0:
            return
        table = SNEmbedding if spectral_norm_tables else nn.Embedding
        self.gain = table(num_classes, num_features)
        self.bias = table(num_classes, num_features)
        if not spectral_norm_tables:
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Normalise `x` (N, C, H, W), then scale and shift image i by the rows `labels[i]`; labels (N,) int64."""
        y: Tensor = self.norm(x)
        if self.num_classes == 0:
            return y
        gain: Tensor = self.gain_offset + self.gain(labels)[:, :, None, None]
        bias: Tensor = self.bias(labels)[:, :, None, None]
        return (y * gain + bias).to(y.dtype)


class SelfAttention(nn.Module):
    """Self-attention over all pixels of a map, added with a learned gain that starts at 0 (paper section 3).

    As the official non_local.py, which differs from the paper's formulas: keys and values are max-pooled 2x2, values
    have C/2 channels, the dot products are not divided by sqrt(d), and the four 1x1 convolutions have no bias.

    Args:
        channels: C of the map, a multiple of 8.
        scaled: whether the dot products are divided by sqrt(d), d = C/8, after all (arXiv 1706.03762).

    Raises:
        ValueError: `channels` is no multiple of 8.
    """

    def __init__(self, channels: int, scaled: bool = False) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(
                f"self-attention needs a map whose channels are a multiple of 8, got {channels}: use a wider network "
                "(channels) or another attention_resolution"
            )
        self.query = SNConv2d(channels, channels // 8, 1, bias=False)
        self.key = SNConv2d(channels, channels // 8, 1, bias=False)
        self.value = SNConv2d(channels, channels // 2, 1, bias=False)
        self.output = SNConv2d(channels // 2, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))
        self.scale = (channels // 8) ** -0.5 if scaled else 1.0

    def attention_map(self, x: Tensor) -> Tensor:
        """Return how much each pixel of `x` (N, C, H, W) takes from each 2x2 cell.

        Returns:
            (N, H*W, H*W/4), at least float32, each row sums to 1; pixels and cells in row-major order.
        """
        query = self.scale * self.query(x).flatten(2)  # (N, C/8, HW)
        key = F.max_pool2d(self.key(x), 2).flatten(2)  # (N, C/8, HW/4)
        with without_autocast(x):
            return torch.softmax(full_precision(query).transpose(1, 2) @ full_precision(key), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (N, C, H, W), H and W even, to the same shape."""
        query = _as_rows(self.query(x))  # (N, HW, C/8)
        key = _as_rows(F.max_pool2d(self.key(x), 2))  # (N, HW/4, C/8)
        value = _as_rows(F.max_pool2d(self.value(x), 2))  # (N, HW/4, C/2)
        # The kernels that never hold the whole map, and take its softmax in float32, want equal widths: zeros add none.
        missing = (0, value.shape[-1] - key.shape[-1])
        attended = F.scaled_dot_product_attention(F.pad(query, missing), F.pad(key, missing), value, scale=self.scale)
        maps = attended.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        y: Tensor = x + self.gain * self.output(maps)
        return y


def _as_rows(x: Tensor) -> Tensor:
    """Return a map (N, C, H, W) as one head's rows (N, 1, HW, C), contiguous; a view if it is channels last."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


@torch.no_grad()
def spectral_norms(module: nn.Module) -> dict[str, Tensor]:
    """Return sigma (scalar) of every spectrally normalised layer under `module`, by the layer's name."""
    return {name: layer.sigma() for name, layer in module.named_modules() if isinstance(layer, SpectralNorm)}


def attention_gains(module: nn.Module) -> dict[str, Tensor]:
    """Return the gain (scalar, detached) of every attention layer under `module`, by the layer's name."""
    return {name: layer.gain.detach() for name, layer in module.named_modules() if isinstance(layer, SelfAttention)}


def attention_place(attention_resolution: int | None, block_resolutions: list[int]) -> int | None:
    """Return the index of the first block whose output map has `attention_resolution` pixels; None for no attention.

    Raises:
        ValueError: no block has such an output.
    """
    if attention_resolution is None:
        return None
    if attention_resolution not in block_resolutions:
        places = ", ".join(map(str, sorted(set(block_resolutions))))
        raise ValueError(f"attention_resolution must be None or one of {places} here, got {attention_resolution}")
    return block_resolutions.index(attention_resolution)


def check_labels(labels: Tensor | None, num_classes: int, batch_size: int) -> None:
    """Check the labels given to a network of `num_classes` classes with `batch_size` images.

    Values are read on CPU only: elsewhere that would wait for the device, and the lookup itself fails there.

    Raises:
        ValueError: labels missing, given to an unconditional network, of another shape or dtype, or out of range.
    """
    if num_classes == 0:
        if labels is not None:
            raise ValueError("this network is unconditional (num_classes=0): pass labels=None")
        return
    if labels is None:
        raise ValueError(f"this network is conditional (num_classes={num_classes}): labels must be given, got None")
    if labels.shape != (batch_size,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({batch_size},), got {labels.dtype} {tuple(labels.shape)}")
    has_values = type(labels) is Tensor and not torch.compiler.is_compiling()  # torch's fake tensors have none
    if labels.device.type == "cpu" and has_values and batch_size and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}: "
            "does num_classes fit the data set?"
        )
