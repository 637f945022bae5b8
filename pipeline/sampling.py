"""Images from a generator: the fixed grid that shows a run's progress, and the one rounding to uint8."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.noise import draw_z

GRID_COLUMNS = 8
GRID_ROWS = 8
_IMAGES_PER_PASS = 16
_SMALLEST_GRID_WIDTH = 512  # pixels; grids of small images are enlarged by repeating pixels


def to_uint8(images: Tensor) -> Tensor:
    """Rounds images (N, 3, R, R) in [-1, 1] to uint8; truncation instead would shift every FID."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_classes(num_classes: int) -> list[int]:
    """Returns the classes of the grid's rows: all of a few, else `GRID_ROWS` evenly spaced ones; [] without classes."""
    if num_classes <= 10:
        return list(range(num_classes))
    return [row * num_classes // GRID_ROWS for row in range(GRID_ROWS)]


@torch.no_grad()
def sample_grid(generator: nn.Module, seed: int, z_dim: int, num_classes: int) -> Tensor:
    """Returns one picture, (3, H, W) uint8 on the CPU: a class per row, the same noise whenever it is called.

    Args:
        generator: in eval mode.
        seed: the run's seed.
        z_dim: size of the noise.
        num_classes: 0 for an unconditional generator.
    """
    classes = grid_classes(num_classes)
    rows = len(classes) or GRID_ROWS
    weight = next(generator.parameters())
    z = draw_z(seed, "grid_z", 0, 0, rows * GRID_COLUMNS, z_dim).to(weight)
    labels = torch.tensor(classes, device=weight.device).repeat_interleave(GRID_COLUMNS) if classes else None
    parts = [slice(start, start + _IMAGES_PER_PASS) for start in range(0, len(z), _IMAGES_PER_PASS)]
    images = torch.cat([generator(z[part], None if labels is None else labels[part]) for part in parts])
    size = images.shape[-1]
    cells = to_uint8(images).cpu().view(rows, GRID_COLUMNS, 3, size, size)
    grid = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * size, GRID_COLUMNS * size)
    enlarge = max(1, _SMALLEST_GRID_WIDTH // grid.shape[2])
    return grid.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)


def few(classes: list[int], count: int) -> list[int]:
    """Returns evenly spaced ones of the classes, `count` at most."""
    return [classes[index * len(classes) // count] for index in range(count)] if len(classes) > count else classes


def save_png(picture: Tensor, path: Path) -> None:
    """Writes (3, H, W) uint8 as PNG, complete or not at all."""
    save_picture(Image.fromarray(picture.permute(1, 2, 0).numpy()), path)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture as PNG, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    picture.save(partial, format="PNG")
    partial.rename(path)
