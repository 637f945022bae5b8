import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline import feature_pass, reference
from pipeline.config import Config, config_from_dict
from pipeline.feature_pass import Moments
from pipeline.features import EvaluationError, Extractor
from pipeline.manifest import ShardSet, ShardSetError, open_shard_set
from pipeline.world import World


class Corners(nn.Module):
    """Features are 12 pixels of the image as they are."""

    def forward(self, images):
        features = images[:, :, ::8, ::8].flatten(1).float()
        return features, features


class Forbidden(nn.Module):
    def forward(self, images):
        raise AssertionError("the extractor was used")


def corners(sha256: str = "c" * 64, network: nn.Module | None = None) -> Extractor:
    return Extractor("corners", sha256, "random", 12, network or Corners())


def config_for(shards: Path, **changes) -> Config:
    values = {
        "run": {"name": "x"},
        "data": {"shards": str(shards), "num_workers": changes.pop("num_workers", 0)},
        "model": {"resolution": 16, "num_classes": 3, "attention_resolution": None},
        "train": {"steps": 1, "global_batch_size": 6},
        "evaluation": {"batch_size": 7} | changes,
    }
    return config_from_dict(values, "test")


def pixels_of(shards: Path) -> np.ndarray:
    """All images of a set as the standard library and Pillow read them: (N, 3, H, W) uint8."""
    images = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".webp"):
                    image = Image.open(io.BytesIO(shard.extractfile(member).read()))
                    images.append(np.asarray(image).transpose(2, 0, 1))
    return np.stack(images)


@pytest.fixture
def shard_set(tiny_shards) -> ShardSet:
    return open_shard_set(str(tiny_shards))


def test_moments_of_parts_are_numpys_mean_and_covariance_of_the_whole(on_ranks):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 10

    def work(world):
        moments = Moments(6, world.device)
        for start in range(world.rank * 7, 50, world.size * 7):
            moments.add(rows[start : start + 7])
        return moments.reduce(world)

    for n, mu, sigma in on_ranks(3, work):
        assert n == 50
        np.testing.assert_allclose(mu, rows.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])  # 20: more ranks than batches
def test_every_sample_counts_once_whatever_the_world_size(shard_set, world_size, on_ranks):
    config = config_for(shard_set.location)
    expected = pixels_of(Path(shard_set.location))[:, :, ::8, ::8].reshape(90, 12).astype(np.float64)
    for found in on_ranks(world_size, lambda world: reference.compute(shard_set, corners(), config, world)):
        assert found.n == 90
        np.testing.assert_allclose(found.mu, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(expected, rowvar=False), rtol=1e-9)


@pytest.mark.slow  # starts worker processes
def test_workers_change_nothing(shard_set):
    world = World("cpu")
    alone = reference.compute(shard_set, corners(), config_for(shard_set.location), world)
    helped = reference.compute(shard_set, corners(), config_for(shard_set.location, num_workers=2), world)
    assert np.array_equal(alone.mu, helped.mu) and np.array_equal(alone.sigma, helped.sigma)


def test_statistics_are_computed_once_and_other_programs_can_read_them(shard_set, tmp_path):
    config, world = config_for(shard_set.location, reference_dir=str(tmp_path / "kept")), World("cpu")
    made, path = reference.obtain(shard_set, corners(), config, world)
    found, again = reference.obtain(shard_set, corners(network=Forbidden()), config, world)
    assert path == again
    assert found.n == made.n == 90 and np.array_equal(found.mu, made.mu) and np.array_equal(found.sigma, made.sigma)
    assert [entry.name for entry in (tmp_path / "kept").iterdir()] == [path.name]
    with np.load(path) as file:  # pytorch-fid's compute_statistics_of_path
        mu, sigma = file["mu"][:], file["sigma"][:]
        assert (mu.shape, sigma.shape, mu.dtype, sigma.dtype) == ((12,), (12, 12), np.float64, np.float64)
        assert json.loads(str(file["protocol_json"]))["dataset_id"] == shard_set.dataset_id


def test_statistics_lie_beside_the_set_unless_told_otherwise(shard_set):
    protocol = reference.protocol_of(shard_set, corners(), 16)
    assert reference.path_of(protocol, shard_set.location, None).parent == Path(shard_set.location) / "reference"


def test_another_extractor_or_size_is_another_file(shard_set):
    protocols = [
        reference.protocol_of(shard_set, corners(), 16),
        reference.protocol_of(shard_set, corners("d" * 64), 16),
        reference.protocol_of(shard_set, corners(), 32),
    ]
    assert len({reference.path_of(protocol, shard_set.location, None) for protocol in protocols}) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "other protocol", "not all"])
def test_a_damaged_or_foreign_file_is_no_reference(shard_set, tmp_path, damage):
    config, world = config_for(shard_set.location, reference_dir=str(tmp_path)), World("cpu")
    made, path = reference.obtain(shard_set, corners(), config, world)
    protocol = reference.protocol_of(shard_set, corners(), 16)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other protocol":
        reference.write(path, made, protocol | {"crop": "none"})
    else:
        reference.write(path, reference.Statistics(89, made.mu, made.sigma, made.kept), protocol)
    with pytest.raises(EvaluationError, match="and it will be computed again") as error:
        reference.obtain(shard_set, corners(), config, world)
    assert str(path) in str(error.value)


def test_a_directory_that_cannot_be_written_is_found_before_the_work(shard_set, tmp_path):
    (tmp_path / "file").write_text("")
    config = config_for(shard_set.location, reference_dir=str(tmp_path / "file" / "inside"))
    with pytest.raises(EvaluationError, match=r"evaluation\.reference_dir=DIR"):
        reference.obtain(shard_set, corners(network=Forbidden()), config, World("cpu"))


def test_an_error_on_rank_0_is_an_error_on_every_rank(on_ranks):
    seen = []

    def work(world):
        def fail():
            assert world.is_main
            raise EvaluationError("no weights")

        try:
            reference.on_rank_0(world, fail)
        except EvaluationError as error:
            seen.append(str(error))

    on_ranks(3, work)
    assert seen == ["no weights"] * 3


def test_damaged_data_is_named(shard_set, tmp_path):
    copy = tmp_path / "set"
    copy.mkdir()
    for path in Path(shard_set.location).iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ShardSetError, match=r"shard-000001\.tar"):
        reference.compute(open_shard_set(str(copy)), corners(), config_for(copy), World("cpu"))


def test_kept_features_are_those_of_a_fixed_random_part(shard_set, monkeypatch, on_ranks):
    monkeypatch.setattr(feature_pass, "MAX_KEPT", 25)
    config = config_for(shard_set.location)
    everything = pixels_of(Path(shard_set.location))[:, :, ::8, ::8].reshape(90, 12).astype(np.float32)
    for found in on_ranks(3, lambda world: reference.compute(shard_set, corners(), config, world)):
        np.testing.assert_array_equal(found.kept, everything[feature_pass.spread(90)])
    assert feature_pass.spread(90).sum() == 25


def test_features_of_all_samples_are_kept_in_their_order(shard_set, tmp_path):
    config = config_for(shard_set.location, reference_dir=str(tmp_path))
    everything = pixels_of(Path(shard_set.location))[:, :, ::8, ::8].reshape(90, 12).astype(np.float32)
    np.testing.assert_array_equal(reference.obtain_features(shard_set, corners(), config, World("cpu")), everything)
    found = reference.obtain_features(shard_set, corners(network=Forbidden()), config, World("cpu"))
    np.testing.assert_array_equal(found, everything)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def foreign(tmp_path):
    """A function that writes an npz file of 12 features."""

    def make(**arrays) -> Path:
        np.savez(tmp_path / "foreign.npz", **{"mu": np.zeros(12, np.float32), "sigma": np.eye(12)} | arrays)
        return tmp_path / "foreign.npz"

    return make


def test_statistics_of_others_are_taken_with_a_warning(foreign, shard_set):
    expected = reference.protocol_of(shard_set, corners(), 16)
    found = reference.read_foreign(foreign(), corners(), expected)
    assert found.statistics.mu.dtype == np.float64
    assert "does not say how it was made" in found.warning


def test_statistics_of_another_protocol_are_refused(foreign, shard_set):
    expected = reference.protocol_of(shard_set, corners(), 16)
    path = foreign(protocol_json=np.array(json.dumps(expected | {"dataset_id": "other"})))
    assert reference.read_foreign(path, corners(), expected).warning is None
    path = foreign(protocol_json=np.array(json.dumps(expected | {"interpolation": "bilinear"})))
    with pytest.raises(EvaluationError, match=r"another protocol.*\n  interpolation: bilinear in the file"):
        reference.read_foreign(path, corners(), expected)


def test_statistics_of_another_number_of_features_are_refused(foreign, shard_set):
    expected = reference.protocol_of(shard_set, corners(), 16)
    with pytest.raises(EvaluationError, match=r"corners makes 12 features"):
        reference.read_foreign(foreign(mu=np.zeros(2048)), corners(), expected)
    with pytest.raises(EvaluationError, match="must be an npz file with mu and sigma"):
        reference.read_foreign(Path(__file__), corners(), expected)


def test_our_statistics_are_read_as_pytorch_fid_reads_them(shard_set, tmp_path):
    """Its load is `with np.load(path) as f: m, s = f["mu"][:], f["sigma"][:]`; StudioGAN's is the same."""
    config = config_for(shard_set.location, reference_dir=str(tmp_path))
    made, path = reference.obtain(shard_set, corners(), config, World("cpu"))
    with np.load(path) as file:
        np.testing.assert_array_equal(file["mu"][:], made.mu)
        np.testing.assert_array_equal(file["sigma"][:], made.sigma)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
