"""From uint8 images to features, and from features to scores: the one door to torch-fidelity.

Its own drivers and caches stay unused: they key cached files by name alone, check no hash of the weights and crash on
class-conditional generators (torch-fidelity 0.4). Its extractor and its metric functions are what everyone compares by.
"""

import hashlib
import io
import urllib.request
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torch_fidelity.utils import create_feature_extractor

from pipeline.bar import Bar
from pipeline.config import EvaluationConfig
from pipeline.shard_file import write_file

WEIGHTS_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
OFFICIAL_SHA256 = "6726825d"  # how the hash of the published file begins, by the naming convention of torch.hub
IS_SPLITS = 10
IS_SHUFFLE_SEED = 2020  # torch-fidelity's default: it permutes the samples before it splits them
KID_SUBSETS, KID_SEED = 100, 2020  # torch-fidelity's defaults
NEIGHBOURS = 3  # of precision and recall
_ROWS_AT_ONCE = 1000  # of logits and distances, which for all samples would take gigabytes
_TIMEOUT_SECONDS = 30.0

Kind = Literal["official", "unofficial", "random", "own"]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class EvaluationError(ValueError):
    """An evaluation that cannot be made; the message says why and the way out."""


@dataclass(frozen=True)
class Weights:
    """Inception's weights, in memory on the CPU."""

    path: Path
    sha256: str  # of the file
    official: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network that sees images; `name` and `sha256` tell which, `kind` what its scores may be called."""

    name: str
    sha256: str  # of the weights file, or of the random weights
    kind: Kind
    num_features: int
    network: nn.Module

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps images (N, 3, H, W) uint8 to features (N, num_features) and class logits, or None, both float32."""
        found = self.network(images)
        features, logits = found if isinstance(found, tuple) else (found, None)
        return features, logits


def read_weights(config: EvaluationConfig) -> Weights:
    """Reads the Inception weights: `inception_weights`, else the file in the torch hub cache, else downloaded to there.

    Raises:
        EvaluationError: no such file and no download, or a file that is not the published one.
    """
    path = Path(config.inception_weights) if config.inception_weights else hub_path()
    if not path.exists():
        if config.inception_weights:
            raise EvaluationError(
                f"evaluation.inception_weights={path} does not exist; the published file is {WEIGHTS_URL}"
            )
        _download(path)
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    official = sha256.startswith(OFFICIAL_SHA256)
    if not official and not config.allow_unofficial_weights:
        raise EvaluationError(
            f"{path} ({len(data):,} bytes) has sha256 {sha256}; that of the published Inception weights begins with "
            f"{OFFICIAL_SHA256}. The file is damaged or another one, and its scores compare with nothing: put "
            f"{WEIGHTS_URL} in its place, or accept it with evaluation.allow_unofficial_weights=true, which names the "
            "scores so"
        )
    try:
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a file that is none may raise
        raise EvaluationError(f"{path} holds no PyTorch weights: {error}") from error
    return Weights(path, sha256, official, tensors)


def hub_path() -> Path:
    """Where torch.hub, torch-fidelity and this program keep the published weights; $TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rsplit("/", 1)[1]


def _download(path: Path) -> None:
    """Fetches the published weights to `path`, whole and of the right hash or not at all."""
    data = bytearray()
    try:
        with urllib.request.urlopen(WEIGHTS_URL, timeout=_TIMEOUT_SECONDS) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            with Bar(total, f"downloading {path.name}", "B", in_bytes=True) as bar:
                while chunk := response.read(1 << 20):
                    data += chunk
                    bar.update(len(chunk))
        sha256 = hashlib.sha256(data).hexdigest()
        if not sha256.startswith(OFFICIAL_SHA256):
            raise OSError(f"{len(data):,} bytes came, of sha256 {sha256}, which should begin with {OFFICIAL_SHA256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, bytes(data))
    except OSError as error:  # URLError is one
        raise EvaluationError(
            f"the Inception weights are not in {path} and could not be downloaded ({error}). Get {WEIGHTS_URL} on a "
            f"machine that reaches it and copy it to {path}, or name its place with evaluation.inception_weights=PATH. "
            "To try everything else without them: evaluation.features=random, whose scores compare with nothing"
        ) from error


def inception(weights: Weights, device: torch.device) -> Extractor:
    """Returns Inception v3 as TensorFlow's FID graph has it, in float32: TF 1 resize to 299 px, pool_3 and logits."""
    # Handed over as bytes that were loaded safely: torch-fidelity would unpickle anything from a path.
    file = io.BytesIO()
    torch.save(weights.tensors, file)
    file.seek(0)
    layers = ["2048", "logits_unbiased"]
    try:
        network = create_feature_extractor(
            "inception-v3-compat", layers, cuda=False, verbose=False, feature_extractor_weights_path=file
        )
    except RuntimeError as error:
        raise EvaluationError(f"{weights.path} holds the weights of another network: {error}") from error
    kind: Kind = "official" if weights.official else "unofficial"
    network = _fast_on_cpu(network) if device.type == "cpu" else network.to(device)
    return Extractor("inception-v3-compat", weights.sha256, kind, 2048, network)


def _fast_on_cpu(network: nn.Module) -> nn.Module:
    """Folds each batch norm into its convolution and lays images out by channel: 1.6 times as fast on a CPU.

    Sums then go in another order, which moves FID by some 1e-7 of its value, as another processor would.
    """
    for block in network.modules():
        if isinstance(norm := getattr(block, "bn", None), nn.BatchNorm2d):
            block.conv = fuse_conv_bn_eval(block.get_submodule("conv"), norm)  # type: ignore[type-var]  # a Conv2d
            block.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)


def random_features(device: torch.device) -> Extractor:
    """Returns a small network of seeded random weights for smoke runs: fast, and its scores compare with nothing."""
    network = RandomFeatures()
    content = b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())
    sha256 = hashlib.sha256(content).hexdigest()
    return Extractor("random-convolutions", sha256, "random", network.num_features, network.to(device))


class RandomFeatures(nn.Module):
    """Three strided convolutions on 32x32 pixels, with fixed random weights; features are a 2x2 map of 16 channels."""

    num_features = 64
    num_logits = 10

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(20240601)
        widths = [(3, 32), (32, 64), (64, 16)]
        # Normal weights of variance 2 / fan-in keep the scale of the activations through ReLUs (arXiv 1502.01852).
        for index, (width_in, width) in enumerate(widths):
            weight = torch.randn(width, width_in, 3, 3, generator=generator) * (2 / (9 * width_in)) ** 0.5
            self.register_buffer(f"convolution{index}", weight)
        weight = torch.randn(self.num_logits, self.num_features, generator=generator) * self.num_features**-0.5
        self.register_buffer("linear", weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images (N, 3, H, W) uint8 to features (N, 64) and logits (N, 10)."""
        x = F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 32)
        for index in range(3):
            x = F.relu(F.conv2d(x, self.get_buffer(f"convolution{index}"), stride=2, padding=1))
        features = F.adaptive_avg_pool2d(x, 2).flatten(1)
        # Normalised and scaled, or all classes would be nearly equally likely and every Inception Score 1.00.
        return features, 8 * F.layer_norm(features, features.shape[1:]) @ self.get_buffer("linear").T


def frechet_distance(mu_1: Float64, sigma_1: Float64, mu_2: Float64, sigma_2: Float64) -> float:
    """Returns FID, |mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1 sigma_2)^(1/2)) (arXiv 1706.08500, equation 6).

    Args:
        mu_1: (D,) float64 mean of the features.
        sigma_1: (D, D) float64 covariance.
        mu_2: as mu_1.
        sigma_2: as sigma_1.
    """
    statistics = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Returns mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))) (arXiv 1606.03498).

    Equal to torch-fidelity's function to rounding in float64, which for 50,000 samples takes 1.2 GB more.

    Args:
        logits: (N, classes) on the CPU, in the order of the samples, which are shuffled with a fixed seed.
        splits: equal parts that are scored apart.
    """
    order, n = torch.from_numpy(np.random.RandomState(IS_SHUFFLE_SEED).permutation(len(logits))), len(logits)
    bounds = [split * n // splits for split in range(splits + 1)]
    scores = [_exp_divergence(logits, order[start:stop]) for start, stop in pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _exp_divergence(logits: Tensor, rows: Tensor) -> float:
    """Returns exp of the mean of sum p log p, less sum q log q with q the mean of the p, over some rows."""
    sum_p, sum_p_log_p = torch.zeros(logits.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        log_p = logits[rows[start : start + _ROWS_AT_ONCE]].double().log_softmax(1)
        sum_p += log_p.exp().sum(0)
        sum_p_log_p += (log_p.exp() * log_p).sum()
    q = sum_p / len(rows)
    return float((sum_p_log_p / len(rows) - torch.xlogy(q, q).sum()).exp())


def kernel_distance(fakes: Float32, reals: Float32, subset_size: int) -> tuple[float, float]:
    """Returns mean and standard deviation of KID over random subsets (arXiv 1801.01401).

    Args:
        fakes: (N, D) features.
        reals: (M, D).
        subset_size: images of each subset, at most N and M.
    """
    pair = torch.from_numpy(fakes), torch.from_numpy(reals)
    found = kid_features_to_metric(
        *pair, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, rng_seed=KID_SEED, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def precision_recall(fakes: Float32, reals: Float32) -> tuple[float, float]:
    """Returns improved precision and recall (arXiv 1904.06991), in strips, so that it needs little memory.

    Args:
        fakes: (N, D) features.
        reals: (M, D).
    """
    pair = torch.from_numpy(fakes), torch.from_numpy(reals)
    found = prc_features_to_metric(
        *pair, prc_neighborhood=NEIGHBOURS, prc_batch_size=_ROWS_AT_ONCE, save_cpu_ram=True, verbose=False
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
