"""Figures of what a generator can do: grids, interpolations, truncation, neighbours; each is one function to a picture.

The noise is a function of the seed, so that two generators are shown on the same.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import attention, drawing
from pipeline.config import Config
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.noise import draw_truncated_z, draw_z
from pipeline.opened import Opened
from pipeline.sampling import GRID_ROWS, grid_classes, to_uint8
from sagan.layers import ConditionalBatchNorm2d

TRUNCATIONS = (2.0, 1.5, 1.0, 0.7, 0.4)
_IMAGES_PER_PASS = 64
_NEIGHBOURS = 5
_FEATURES_PER_PASS = 20_000
_MAX_FRAMES, _FRAME_WIDTH = 48, 512


class PictureError(ValueError):
    """A figure that this generator cannot give; the message says why and the way out."""


@dataclass(frozen=True)
class Wish:
    """What a person wants to see.

    Args:
        classes: labels; () for an unconditional generator.
        columns: images in a row.
        seed: of the noise.
        places: to look from, see `attention.draw_figure`.
        truncations: thresholds of |z|, one row each.
    """

    classes: tuple[int, ...]
    columns: int = 8
    seed: int = 0
    places: tuple[attention.Place, ...] = attention.QUERIES
    truncations: tuple[float, ...] = TRUNCATIONS


def choose_classes(opened: Opened, wanted: Sequence[str]) -> tuple[int, ...]:
    """Returns the labels of classes given by number or name; none given: those of the run's grids.

    Args:
        opened: knows the names: those of the folders and, if there are, what a person calls them.
        wanted: as a person typed them.

    Raises:
        PictureError: no such class.
    """
    if not wanted:
        return tuple(grid_classes(opened.num_classes))
    if not opened.num_classes:
        raise PictureError(f"{opened.path} is unconditional: it has no classes to choose; leave out --classes")
    return tuple(_label(opened, text) for text in wanted)


def _label(opened: Opened, text: str) -> int:
    words = [[word.strip().lower() for word in title.split(",")] for title in opened.class_titles]
    by_name = [label for label, name in enumerate(opened.class_names) if name == text]
    by_title = [label for label, found in enumerate(words) if text.lower() in found]
    if by_title or (by_name and not text.isdecimal()):
        return (by_name or by_title)[0]
    if text.isdecimal() and int(text) < opened.num_classes:
        return int(text)
    some = ", ".join(opened.title(label) for label in range(min(5, opened.num_classes)))
    raise PictureError(
        f"--classes {text}: there is no such class; there are 0 to {opened.num_classes - 1} ({some}, ...)"
    )


@torch.no_grad()
def _images(opened: Opened, z: Tensor, labels: Tensor | None) -> Tensor:
    """Returns (N, 3, R, R) uint8 on the CPU."""
    device = next(opened.generator.parameters()).device
    parts = [slice(start, start + _IMAGES_PER_PASS) for start in range(0, len(z), _IMAGES_PER_PASS)]
    found = [
        opened.generator(z[part].to(device), None if labels is None else labels[part].to(device)) for part in parts
    ]
    return torch.cat([to_uint8(images).cpu() for images in found])


def _rows(images: Tensor, columns: int) -> list[list[Image.Image]]:
    found = drawing.cells(images)
    return [found[start : start + columns] for start in range(0, len(found), columns)]


def _row_titles(opened: Opened, wish: Wish) -> list[str]:
    return [opened.title(label) for label in wish.classes]


def _repeated(classes: Sequence[int], times: int) -> Tensor | None:
    return torch.tensor(classes).repeat_interleave(times) if classes else None


def grid(opened: Opened, wish: Wish) -> Image.Image:
    """Returns samples, a row per class, with fixed noise."""
    rows = len(wish.classes) or GRID_ROWS
    z = draw_z(wish.seed, "grid_z", 0, 0, rows * wish.columns, opened.z_dim)
    images = _images(opened, z, _repeated(wish.classes, wish.columns))
    return drawing.tile(_rows(images, wish.columns), _row_titles(opened, wish))


def interpolation(opened: Opened, wish: Wish) -> Image.Image:
    """Returns ways from one noise to another on the sphere, a row per class."""
    rows = len(wish.classes) or GRID_ROWS
    ends = draw_z(wish.seed, "grid_z", 0, 0, 2 * rows, opened.z_dim).view(rows, 2, opened.z_dim)
    shares = torch.linspace(0, 1, wish.columns)
    z = torch.cat([slerp(start, stop, shares) for start, stop in ends])
    images = _images(opened, z, _repeated(wish.classes, wish.columns))
    return drawing.tile(_rows(images, wish.columns), _row_titles(opened, wish))


def slerp(start: Tensor, stop: Tensor, shares: Tensor) -> Tensor:
    """Returns points (n, D) on the arc between two vectors (D,), at `shares` (n,) of the angle, lengths between theirs.

    On a straight line noise would be too short halfway (White 2016, arXiv 1609.04468).
    """
    angle = torch.arccos((start / start.norm()).dot(stop / stop.norm()).clamp(-1, 1))
    if angle < 1e-4:
        return torch.lerp(start, stop, shares[:, None])
    weights = torch.stack([torch.sin((1 - shares) * angle), torch.sin(shares * angle)], 1) / torch.sin(angle)
    return weights @ torch.stack([start, stop])


def between_classes(opened: Opened, wish: Wish) -> Image.Image:
    """Returns ways from each class to the next with the same noise: gains and biases of batch norm are mixed.

    Raises:
        PictureError: fewer than two classes.
    """
    if len(wish.classes) < 2:
        raise PictureError("a way between classes needs two of them: name them with --classes")
    pairs = list(zip(wish.classes, wish.classes[1:], strict=False))
    z = draw_z(wish.seed, "grid_z", 0, 0, len(pairs), opened.z_dim).repeat_interleave(wish.columns, 0)
    shares = torch.linspace(0, 1, wish.columns)
    rows = []
    for row, (start, stop) in enumerate(pairs):
        noise = z[row * wish.columns : (row + 1) * wish.columns]
        with mixed_classes(opened.generator, start, stop, shares):
            images = _images(opened, noise, torch.full((wish.columns,), start))
        rows.append(drawing.cells(images))
    titles = [f"{opened.title(start)} to {opened.title(stop)}" for start, stop in pairs]
    return drawing.tile(rows, titles)


@contextlib.contextmanager
def mixed_classes(generator: nn.Module, start: int, stop: int, shares: Tensor) -> Iterator[None]:
    """Makes image i of a batch one of `shares[i]` between two classes, whatever its label.

    Args:
        generator: class-conditional.
        start: label of share 0.
        stop: label of share 1.
        shares: (N,) in [0, 1]; N is the batch's size.
    """

    def mix(table: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        both = torch.tensor([start, stop], device=output.device)
        rows: Tensor = table.forward(both)  # not table(both), which would come here again
        return torch.lerp(rows[:1], rows[1:], shares.to(output)[:, None])

    norms = [module for module in generator.modules() if isinstance(module, ConditionalBatchNorm2d)]
    handles = [table.register_forward_hook(mix) for norm in norms for table in (norm.gain, norm.bias)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def truncation(opened: Opened, wish: Wish) -> Image.Image:
    """Returns the same samples with noise kept nearer and nearer to zero, a row per threshold."""
    labels = torch.tensor([wish.classes[i % len(wish.classes)] for i in range(wish.columns)]) if wish.classes else None
    rows = []
    for threshold in wish.truncations:
        z = draw_truncated_z(wish.seed, "grid_z", 0, 0, wish.columns, opened.z_dim, threshold)
        rows.append(drawing.cells(_images(opened, z, labels)))
    titles = [] if labels is None else [opened.title(int(label)) for label in labels]
    return drawing.tile(rows, [f"|z| < {threshold:g}" for threshold in wish.truncations], titles)


def attention_figure(opened: Opened, discriminator: nn.Module | None, wish: Wish) -> Image.Image:
    """Returns where generator and discriminator look, a pair of rows per class; see `attention.draw_figure`.

    Raises:
        PictureError: the networks have no attention.
    """
    rows = len(wish.classes) or 4
    z = draw_z(wish.seed, "grid_z", 0, 0, rows, opened.z_dim)
    titles = _row_titles(opened, wish) or [""] * rows
    labels = torch.tensor(wish.classes) if wish.classes else None
    found = attention.draw_figure(opened.generator, discriminator, z, labels, titles, wish.places)
    if found is None:
        raise PictureError(f"{opened.path} has no attention to show (model.attention_resolution: null)")
    return found


def neighbours(opened: Opened, wish: Wish, features: str | None) -> Image.Image:
    """Returns samples, each followed by the real images nearest to it in feature space.

    The features of the training set are computed once and kept beside its reference statistics.

    Args:
        opened: from a run or checkpoint, whose shards are still there.
        wish: one sample of each class, or as many as rows of a grid.
        features: as `evaluation.features`; None: the run's.

    Raises:
        PictureError: an export, which knows no shards.
        ConfigError: the shards are others than the run's.
        ShardSetError: they are missing or damaged.
        EvaluationError: the extractor cannot be had.
    """
    from pipeline import comparison, reference  # heavy: torch-fidelity
    from pipeline.world import World

    if opened.config is None:
        raise PictureError("an export knows no training images; neighbours are for a run or a checkpoint")
    config = opened.config
    config = replace(config, evaluation=replace(config.evaluation, features=features or config.evaluation.features))
    shard_set = open_shard_set(config.data.shards)
    if shard_set.dataset_id != opened.dataset_id:
        raise PictureError(f"{config.data.shards} is another set than {opened.path} was trained on")
    world = World(next(opened.generator.parameters()).device.type)  # not run.device: this may be another machine
    extractor = comparison.open_extractor(config, world)
    real_features = reference.obtain_features(shard_set, extractor, config, world)
    rows = len(wish.classes) or GRID_ROWS
    z = draw_z(wish.seed, "grid_z", 0, 0, rows, opened.z_dim)
    samples = _images(opened, z, torch.tensor(wish.classes) if wish.classes else None)
    found, _ = extractor(samples.to(world.device))
    near = nearest(found.cpu().numpy(), real_features, _NEIGHBOURS)
    real = _read(shard_set, near.ravel().tolist(), config)
    pictures = drawing.cells(torch.cat([samples, real]))
    lines = [
        [pictures[row], *pictures[rows + row * near.shape[1] : rows + (row + 1) * near.shape[1]]] for row in range(rows)
    ]
    for line in lines:
        drawing.frame(line[0], attention.COLOURS[0])
    return drawing.tile(lines, _row_titles(opened, wish), ["sample", *(f"{i + 1}." for i in range(near.shape[1]))])


def nearest(queries: Any, rows: Any, count: int) -> Any:
    """Returns the numbers of the rows (N, D) nearest to each query (Q, D) by Euclidean distance, (Q, count), in order.

    In float64 and in strips of rows, so that a mapped file of any size will do.
    """
    queries = np.asarray(queries, np.float64)
    distances, numbers = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(rows), _FEATURES_PER_PASS):
        part = np.asarray(rows[start : start + _FEATURES_PER_PASS], np.float64)
        squares = (queries**2).sum(1)[:, None] + (part**2).sum(1) - 2 * queries @ part.T
        distances = np.concatenate([distances, squares], 1)
        numbers = np.concatenate([numbers, np.broadcast_to(np.arange(start, start + len(part)), squares.shape)], 1)
        best = np.argsort(distances, axis=1, kind="stable")[:, :count]
        distances, numbers = np.take_along_axis(distances, best, 1), np.take_along_axis(numbers, best, 1)
    return numbers


def _read(shard_set: ShardSet, numbers: list[int], config: Config) -> Tensor:
    """Returns images of a set by their numbers, (n, 3, R, R) uint8."""
    from pipeline import reference

    batches = [range(number, number + 1) for number in numbers]
    return torch.cat([pixels for _, pixels in reference.read_blocks(shard_set, batches, config)])


def animation(opened: Opened, path: Path) -> int:
    """Writes the run's sample grids, step by step, as an animated WebP; returns the number of frames.

    Of many grids evenly spread ones are taken, and large ones are made smaller.

    Raises:
        PictureError: there are no grids.
    """
    grids = sorted((opened.run_dir / "samples").glob("step-*.png")) if opened.run_dir else []
    if len(grids) < 2:
        raise PictureError("an animation needs two sample grids of a run at least (RUN/samples/step-*.png)")
    count = min(_MAX_FRAMES, len(grids))
    chosen = [grids[round(index * (len(grids) - 1) / (count - 1))] for index in range(count)]
    frames = []
    for grid_path in chosen:
        with Image.open(grid_path) as picture:
            picture.thumbnail((_FRAME_WIDTH, picture.height), Image.Resampling.LANCZOS)
            frames.append(drawing.caption(picture, f"step {int(grid_path.stem.split('-')[1]):,}"))
    milliseconds = [*[200] * (count - 1), 2000]  # the last one stays
    # A quarter of a GIF's bytes, in full colour.
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, quality=80)
    return count
