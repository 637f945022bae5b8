"""The demo's data and its judge: scikit-learn's 1,797 handwritten digits of 8x8 pixels.

*Pixels* are float64 (N, 64), grey 8x8 in row-major order, 0 (paper) to 16 (ink), as `load_digits` gives them.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances_argmin
from sklearn.svm import SVC

from pipeline import subject
from pipeline.config import load_config
from pipeline.manifest import open_shard_set
from pipeline.networks import build_generator
from pipeline.noise import draw_z
from pipeline.sampling import to_uint8

SIDE = 8
INK = 16.0
NUM_CLASSES = 10

Pixels = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def real_digits() -> tuple[Pixels, Labels]:
    """Returns all real digits: pixels (1797, 64) in 0..16 and their classes (1797,) in 0..9."""
    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.float64), labels.astype(np.int64)


def write_folders(directory: Path, size: int) -> int:
    """Writes the real digits as PNG files, a folder per class; returns how many.

    Args:
        directory: gets the folders 0 ... 9; made when absent.
        size: side in pixels, a multiple of 8. Pixels are repeated, not smoothed, which would cost the real digits
            themselves a sixth of their variety.
    """
    pixels, labels = real_digits()
    for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = directory / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = (row.reshape(SIDE, SIDE) * (255 / INK)).round().astype(np.uint8)
        cell = size // SIDE
        Image.fromarray(grey.repeat(cell, 0).repeat(cell, 1)).save(folder / f"{number:04d}.png")
    return len(pixels)


def to_pixels(images: npt.NDArray[np.uint8]) -> Pixels:
    """Averages RGB images down to the digits' own size and range.

    Args:
        images: (N, 3, R, R) uint8, R a multiple of 8.

    Returns:
        (N, 64) in 0..16: the mean over colours and over the R/8 x R/8 pixels of each cell.

    Raises:
        ValueError: images of another shape.
    """
    count, side = len(images), images.shape[-1]
    if images.shape[1:] != (3, side, side) or side % SIDE:
        raise ValueError(f"images must have shape (N, 3, R, R), R a multiple of {SIDE}, got {images.shape}")
    cell = side // SIDE
    cells = images.astype(np.float64).reshape(count, 3, SIDE, cell, SIDE, cell)
    means: Pixels = cells.mean(axis=(1, 3, 5)).reshape(count, SIDE * SIDE) * (INK / 255)
    return means


def fit_classifier(pixels: Pixels, labels: Labels) -> SVC:
    """Returns an RBF support vector classifier fitted on real digits; 99 % accurate on held-out ones."""
    return SVC(gamma=0.001).fit(pixels, labels)


def recognised_share(classifier: SVC, pixels: Pixels, asked: Labels) -> float:
    """Returns the share, 0 to 1, of samples that the classifier takes for the class that was asked for.

    Args:
        classifier: of `fit_classifier`.
        pixels: samples (N, 64).
        asked: (N,) classes they were made for.
    """
    return float((classifier.predict(pixels) == asked).mean())


def mean_pairwise_distance(pixels: Pixels) -> float:
    """Returns the mean Euclidean distance over all pairs of different rows of (N, 64), N at least 2."""
    squares = (pixels**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * pixels @ pixels.T, 0))
    np.fill_diagonal(distances, 0)
    return float(distances.sum() / (len(pixels) * (len(pixels) - 1)))


def variety_ratios(pixels: Pixels, asked: Labels, real_pixels: Pixels, real_labels: Labels) -> npt.NDArray[np.float64]:
    """Returns, per class, the samples' mean pairwise distance over that of the real digits.

    0 is one image for the whole class, 1 is as varied as the real digits.

    Args:
        pixels: samples (N, 64), at least two per class.
        asked: (N,) classes they were made for.
        real_pixels: (M, 64).
        real_labels: (M,).

    Returns:
        (10,).
    """
    return np.array(
        [
            mean_pairwise_distance(pixels[asked == label]) / mean_pairwise_distance(real_pixels[real_labels == label])
            for label in range(NUM_CLASSES)
        ]
    )


def nearest_neighbour_shares(
    pixels: Pixels, asked: Labels, real_pixels: Pixels
) -> tuple[float, npt.NDArray[np.float64]]:
    """Returns how much the samples crowd around single real images.

    Args:
        pixels: samples (N, 64), every class among them.
        asked: (N,) classes they were made for.
        real_pixels: (M, 64), of all classes.

    Returns:
        The largest share, 0 to 1, of all samples that have one and the same real image as their nearest; and the same
        within the samples of each class, (10,).
    """
    nearest = pairwise_distances_argmin(pixels, real_pixels)
    within = [np.bincount(nearest[asked == label]).max() / (asked == label).sum() for label in range(NUM_CLASSES)]
    return float(np.bincount(nearest).max() / len(nearest)), np.array(within)


def fastest_precision() -> list[str]:
    """Returns the overrides with which this machine trains the demo's small networks fastest.

    On a CPU that computes in bfloat16 they take 0.55 of float32's time; on one that does not, many times as long.
    """
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return ["train.precision=bf16", "train.channels_last=true"] if has_bfloat16 else []


def judge_run(run_dir: Path, num_images: int) -> tuple[float, npt.NDArray[np.float64]]:
    """Samples a run's averaged generator and judges what comes.

    Args:
        run_dir: a run on digits; its newest whole checkpoint is taken.
        num_images: how many samples, equally many of each class.

    Returns:
        Share of samples recognised as the asked class, 0 to 1; variety ratio of each class, (10,).
    """
    samples, asked = sample_run(run_dir, num_images)
    real_pixels, real_labels = real_digits()
    pixels = to_pixels(samples)
    recognised = recognised_share(fit_classifier(real_pixels, real_labels), pixels, asked)
    return recognised, variety_ratios(pixels, asked, real_pixels, real_labels)


def sample_run(run_dir: Path, num_images: int) -> tuple[npt.NDArray[np.uint8], Labels]:
    """Returns samples (N, 3, R, R) uint8 of a run's averaged generator, and the classes (N,) they were asked for."""
    config = load_config(run_dir / "config.yaml")
    generator = build_generator(config)
    [newest] = subject.choose(run_dir, "newest", config)
    generator.load_state_dict(subject.read(newest, config, open_shard_set(config.data.shards)).tensors)
    generator.eval()
    asked = torch.arange(num_images) % NUM_CLASSES
    z = draw_z(config.evaluation.seed, "eval_z", 0, 0, num_images, config.model.z_dim)
    with torch.no_grad():
        return to_uint8(generator(z, asked)).numpy(), asked.numpy()
