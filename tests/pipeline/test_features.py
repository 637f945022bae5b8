from dataclasses import replace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from pipeline import features
from pipeline.config import EvaluationConfig
from pipeline.features import (
    EvaluationError,
    frechet_distance,
    inception_score,
    precision_recall,
    random_features,
    read_weights,
)

CPU = torch.device("cpu")


def random_images(num_images: int, size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_images, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def test_frechet_distance_of_independent_features_by_hand():
    mu_1, mu_2, var_1, var_2 = np.array([1.0, 2.0]), np.array([4.0, 2.0]), np.array([4.0, 9.0]), np.array([1.0, 16.0])
    # |mu|^2 = 9, and per feature (sigma_1 - sigma_2)^2 = (2 - 1)^2 + (3 - 4)^2
    assert frechet_distance(mu_1, np.diag(var_1), mu_2, np.diag(var_2)) == pytest.approx(11)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    logits = torch.nn.functional.one_hot(torch.arange(40) % 4, 4) * 100.0
    assert inception_score(logits, 1) == pytest.approx((4, 0))


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_in_parts_is_torch_fidelitys_of_the_whole(splits):
    """2,505 samples: parts and splits of unequal size."""
    logits = 3 * torch.randn(2505, 40, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=features.IS_SHUFFLE_SEED)
    found = inception_score(logits, splits)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-12)


def test_precision_and_recall_in_strips_are_torch_fidelitys():
    """2,505 and 1,999 features: strips of unequal size."""
    generator = torch.Generator().manual_seed(0)
    fakes, reals = (torch.randn(n, 8, generator=generator) * scale for n, scale in ((2505, 0.8), (1999, 1.2)))
    expected = prc_features_to_metric(fakes, reals, prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    found = precision_recall(fakes.numpy(), reals.numpy())
    assert found == (expected["precision"], expected["recall"])
    assert 0 < found[1] < found[0] < 1


def test_random_features_are_the_same_at_every_start():
    first, second = random_features(CPU), random_features(CPU)
    assert first.sha256 == second.sha256
    images = random_images(3, 48, 2)
    assert torch.equal(first(images)[0], second(images)[0])
    assert first(images)[0].shape == (3, first.num_features)


@pytest.fixture
def config(tmp_path) -> EvaluationConfig:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pth")
    return EvaluationConfig(inception_weights=str(tmp_path / "weights.pth"))


def test_weights_of_another_hash_are_refused_and_the_way_out_is_named(config):
    with pytest.raises(EvaluationError) as error:
        read_weights(config)
    for text in (config.inception_weights, "6726825d", features.WEIGHTS_URL, "allow_unofficial_weights=true"):
        assert text in str(error.value)


def test_weights_of_another_hash_are_used_when_asked_for_and_known_as_such(config):
    weights = read_weights(replace(config, allow_unofficial_weights=True))
    assert not weights.official
    assert torch.equal(weights.tensors["weight"], torch.ones(2))


def test_weights_of_the_published_hash_are_official(config, monkeypatch):
    sha256 = read_weights(replace(config, allow_unofficial_weights=True)).sha256
    monkeypatch.setattr(features, "OFFICIAL_SHA256", sha256[:8])
    assert read_weights(config).official


def test_weights_that_are_a_program_are_not_run(config, tmp_path):
    class Program:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Program(), config.inception_weights)
    with pytest.raises(EvaluationError, match="holds no PyTorch weights"):
        read_weights(replace(config, allow_unofficial_weights=True))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(config):
    weights = read_weights(replace(config, allow_unofficial_weights=True))
    with pytest.raises(EvaluationError, match="weights of another network"):
        features.inception(weights, CPU)


def test_a_named_file_that_is_missing(tmp_path):
    with pytest.raises(EvaluationError, match=r"nowhere\.pth does not exist"):
        read_weights(EvaluationConfig(inception_weights=str(tmp_path / "nowhere.pth")))


def serve(path, monkeypatch, tmp_path):
    """Makes `path` the published file and an empty folder the torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(features, "WEIGHTS_URL", path.as_uri())
    return features.hub_path()


def test_without_download_the_message_says_where_to_get_and_where_to_put_the_weights(tmp_path, monkeypatch):
    home = serve(tmp_path / "absent.pth", monkeypatch, tmp_path)
    with pytest.raises(EvaluationError) as error:
        read_weights(EvaluationConfig())
    for text in (features.WEIGHTS_URL, str(home), "evaluation.inception_weights=PATH", "evaluation.features=random"):
        assert text in str(error.value)


def test_a_download_of_another_hash_is_not_kept(config, tmp_path, monkeypatch):
    home = serve(tmp_path / "weights.pth", monkeypatch, tmp_path)
    with pytest.raises(EvaluationError, match="which should begin with 6726825d"):
        read_weights(EvaluationConfig())
    assert not home.exists()


def test_weights_are_downloaded_once(config, tmp_path, monkeypatch):
    sha256 = read_weights(replace(config, allow_unofficial_weights=True)).sha256
    home = serve(tmp_path / "weights.pth", monkeypatch, tmp_path)
    monkeypatch.setattr(features, "OFFICIAL_SHA256", sha256[:8])
    assert read_weights(EvaluationConfig()).path == home
    (tmp_path / "weights.pth").unlink()
    assert read_weights(EvaluationConfig()).sha256 == sha256


def test_the_published_name_ends_in_the_hash_we_check():
    assert features.WEIGHTS_URL.endswith(f"-{features.OFFICIAL_SHA256}.pth")
