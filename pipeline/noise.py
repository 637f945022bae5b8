"""Random draws as pure functions of what they are for, so that no RNG state needs saving and no world size matters."""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal[
    "d_z", "d_labels", "g_z", "g_labels", "grid_z", "eval_z", "eval_labels", "eval_standing_z", "eval_standing_labels",
    "eval_class_z",
]  # fmt: skip


def _generator(seed: int, purpose: Purpose, step: int, index: int, attempt: int) -> torch.Generator:
    again = f"/{attempt}" if attempt else ""
    key = hashlib.sha256(f"{seed}/{purpose}/{step}/{index}{again}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def draw_z(seed: int, purpose: Purpose, step: int, index: int, num_images: int, z_dim: int, attempt: int = 0) -> Tensor:
    """Returns z ~ N(0, 1), (num_images, z_dim) float32 on the CPU, a function of the arguments alone.

    Args:
        seed: the run's seed.
        purpose: what the noise is for.
        step: generator update it belongs to.
        index: discriminator update within the step, 0 elsewhere.
        num_images: rows, of the whole global batch.
        z_dim: columns.
        attempt: how often this step was gone back on, so that other noise is drawn.
    """
    return torch.randn(num_images, z_dim, generator=_generator(seed, purpose, step, index, attempt))


def draw_truncated_z(
    seed: int, purpose: Purpose, step: int, index: int, num_images: int, z_dim: int, threshold: float
) -> Tensor:
    """Returns z ~ N(0, 1) given |z| < threshold for each number, (num_images, z_dim) float32 on the CPU.

    The truncation trick of BigGAN (arXiv 1809.11096, section 3.1), by the inverse of the distribution function.
    """
    uniform = torch.rand(
        num_images, z_dim, dtype=torch.float64, generator=_generator(seed, purpose, step, index, attempt=0)
    )
    z = math.sqrt(2) * torch.erfinv((2 * uniform - 1) * math.erf(threshold / math.sqrt(2)))
    return z.clamp(-threshold, threshold).float()


def draw_labels(
    seed: int, purpose: Purpose, step: int, index: int, num_images: int, num_classes: int, attempt: int = 0
) -> Tensor | None:
    """Returns uniform labels, (num_images,) int64 on the CPU; None for an unconditional model (num_classes 0)."""
    if num_classes == 0:
        return None
    return torch.randint(num_classes, (num_images,), generator=_generator(seed, purpose, step, index, attempt))


def rank_micro_batches(rows: Tensor, accumulation_steps: int, rank: int, world_size: int) -> list[Tensor]:
    """Cuts a global batch into micro-batches first, then ranks, and returns this rank's part of each micro-batch.

    With this order the images that share a BatchNorm statistic are the same for every world size.

    Args:
        rows: (B, ...) drawn for the whole global batch.
        accumulation_steps: number of micro-batches A.
        rank: this process.
        world_size: number of processes W; A * W divides B.

    Returns:
        A tensors of shape (B / (A * W), ...).
    """
    parts = rows.reshape(accumulation_steps, world_size, -1, *rows.shape[1:])
    return list(parts[:, rank])
