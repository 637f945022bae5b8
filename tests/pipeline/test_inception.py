"""Inception itself, with seeded random weights: scores and speed against torch-fidelity's own loop."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch.utils.data import Subset
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from pipeline import features, generated
from pipeline.config import config_from_dict, to_yaml
from pipeline.feature_pass import see, spread
from pipeline.networks import build_generator
from pipeline.provenance import compute_exactly
from pipeline.scores import compare

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("inception_worker.py")
CPU_PROCESSES = "configs/accelerate/cpu_two_processes.yaml"
BATCH_SIZES = (7, 16, 40)
NUM_FAKES, NUM_REALS = 40, 40
NAMES = {
    "fid": "frechet_inception_distance",
    "inception_score_mean": "inception_score_mean",
    "kid_mean": "kernel_inception_distance_mean",
}


def random_inception_weights(path: Path, images: torch.Tensor) -> None:
    """Writes a file of Inception's shape with seeded random values, its batch norm calibrated on some images."""
    kind = torch_fidelity.FeatureExtractorInceptionV3
    with patch.object(kind, "load_state_dict"), patch.object(torch, "load"):
        network = kind("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(20240601)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.data = 1 + 0.1 * torch.randn(module.weight.shape, generator=generator)
            # About 1, so that most units are alive, as in trained networks; around 0 the rounding of float32 grows from
            # layer to layer to 2e-5 of the features, and FID says more about that than about us.
            module.bias.data = 1 + 0.3 * torch.randn(module.bias.shape, generator=generator)
            module.reset_running_stats()
            module.momentum = None
            module.train()
        elif isinstance(module, nn.Linear):
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * 0.08
    with torch.no_grad():
        network(images)
    torch.save(network.eval().state_dict(), path)


@pytest.fixture(scope="module")
def inception(tmp_path_factory, on_ranks):
    """The weights file, our extractor of it, a generator that has learned nothing, real images and their statistics."""
    root = tmp_path_factory.mktemp("inception")
    values = {
        "run": {"name": "x", "device": "cpu"},
        "data": {"shards": "none"},
        "model": {"resolution": 16, "num_classes": 3, "z_dim": 8, "g_channels": 4, "attention_resolution": 8},
        "train": {"steps": 1, "global_batch_size": 6},
        "evaluation": {"num_images": NUM_FAKES, "kid_subset_size": 30, "allow_unofficial_weights": True,
                       "inception_weights": str(root / "weights.pth")},
    }  # fmt: skip
    config = config_from_dict(values, "test")
    torch.manual_seed(0)
    generator = build_generator(config).eval()
    others = replace(config, evaluation=replace(config.evaluation, seed=1, batch_size=NUM_REALS))
    smooth = nn.functional.interpolate(torch.rand(NUM_REALS, 3, 4, 4), 16, mode="bicubic").clamp(0, 1) * 255
    reals = torch.cat([generated.sample_block(generator, others, 0, CPU)[:14], smooth[14:].byte()])
    random_inception_weights(root / "weights.pth", reals[::2])
    compute_exactly(CPU)
    extractor = features.inception(features.read_weights(config.evaluation), CPU)

    def work(world):
        starts = range(world.rank * 20, NUM_REALS, world.size * 20)
        parts = [(start, reals[start : start + 20]) for start in starts]
        return see(parts, spread(NUM_REALS), extractor, world, "real", with_logits=False).statistics

    real = on_ranks(3, work)[0]
    return SimpleNamespace(root=root, config=config, generator=generator, reals=reals, extractor=extractor, real=real)


def as_dataset(images: torch.Tensor) -> Subset:
    """What torch-fidelity takes."""
    return Subset(images, range(len(images)))


@pytest.fixture(scope="module")
def by_processes(inception) -> dict:
    """{processes: {batch size: what rank 0 holds}}, from real `accelerate launch`es of 2 and of 3 processes."""
    (inception.root / "config.yaml").write_text(to_yaml(inception.config))
    torch.save(inception.generator.state_dict(), inception.root / "generator.pt")
    found = {}
    for world_size in (2, 3):
        out = inception.root / f"{world_size}.pt"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU_PROCESSES,
                   "--num_processes", str(world_size), WORKER, inception.root / "config.yaml",
                   inception.root / "generator.pt", out, *map(str, BATCH_SIZES)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=REPO, env=environment, check=True, timeout=900)
        left = torch.load(out, weights_only=False)
        assert left["world_size"] == world_size
        found[world_size] = left["found"]
    return found


def equal(one: torch.Tensor | np.ndarray, other: torch.Tensor | np.ndarray) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


@pytest.mark.slow  # Inception on a CPU, and its covariances
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_scores_are_those_of_calculate_metrics(inception, on_ranks, by_processes, batch_size):
    """With 1, 2 and 3 processes; where these see bit-equal features, the scores of one are the scores of all."""
    evaluation = replace(inception.config.evaluation, batch_size=batch_size)
    config, extractor, reals = replace(inception.config, evaluation=evaluation), inception.extractor, inception.reals
    blocks = range(-(-NUM_FAKES // batch_size))
    fakes = torch.cat([generated.sample_block(inception.generator, config, block, CPU) for block in blocks])
    expected = torch_fidelity.calculate_metrics(
        input1=as_dataset(fakes), input2=as_dataset(reals), isc=True, fid=True, kid=True, prc=True, kid_subset_size=30,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=evaluation.inception_weights,
        cuda=False, cache=True, cache_root=str(inception.root), input2_cache_name="reals", save_cpu_ram=True,
        verbose=False, batch_size=32,
    )  # fmt: skip

    def work(world):
        return generated.make_samples(inception.generator, config, extractor, world)

    [seen] = on_ranks(1, work)
    found = compare(seen, inception.real, evaluation, ("", ""))
    mean = expected["inception_score_mean"]
    print({name: found[name] / expected[theirs] - 1 for name, theirs in NAMES.items()})
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert found["inception_score_mean"] == pytest.approx(mean, rel=1e-6)
    assert found["inception_score_std"] == pytest.approx(expected["inception_score_std"], abs=1e-6 * mean)
    assert found["kid_mean"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    assert 0 < found["precision"] + found["recall"] < 2  # or the comparison says little
    for other in (found[batch_size] for found in by_processes.values()):
        assert equal(other.logits, seen.logits)
        assert equal(other.statistics.kept, seen.statistics.kept)
        np.testing.assert_allclose(other.statistics.mu, seen.statistics.mu, rtol=1e-12)
        np.testing.assert_allclose(other.statistics.sigma, seen.statistics.sigma, rtol=1e-9, atol=1e-14)


@pytest.mark.slow  # Inception on a CPU, eight times
@pytest.mark.timeout(900)
def test_the_feature_pass_is_1_3_times_as_fast_as_torch_fidelitys_own_loop(inception, on_ranks):
    """In CPU seconds of this process, pairs in turn, so that neither neighbours nor the order decide."""
    images = inception.reals[:16]
    theirs = create_feature_extractor(
        "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
        feature_extractor_weights_path=inception.config.evaluation.inception_weights,
    )  # fmt: skip

    def their_loop():
        get_featuresdict_from_dataset(as_dataset(images), theirs, 8, cuda=False, save_cpu_ram=True, verbose=False)

    def our_pass():
        parts = [(start, images[start : start + 8]) for start in (0, 8)]
        on_ranks(1, lambda world: see(parts, spread(16), inception.extractor, world, "images"))

    def seconds(work) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    ratios = [seconds(their_loop) / seconds(our_pass) for _ in range(4)]
    print(f"torch-fidelity's CPU seconds over ours: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    assert np.median(ratios) >= 1.3
