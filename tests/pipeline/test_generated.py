from dataclasses import replace

import pytest
import torch
import torch_fidelity
from torch import nn
from torch.utils.data import Subset

from pipeline import generated
from pipeline.config import config_from_dict
from pipeline.feature_pass import see, spread
from pipeline.features import EvaluationError, Extractor, random_features
from pipeline.networks import build_generator
from pipeline.noise import draw_z
from pipeline.scores import compare
from sagan.layers import CrossReplicaBatchNorm2d

CPU = torch.device("cpu")


def config_with(num_images: int, batch_size: int = 8, num_classes: int = 3, seed: int = 0):
    values = {
        "run": {"name": "x"},
        "data": {"shards": "none"},
        "model": {
            "resolution": 16, "num_classes": num_classes, "z_dim": 8, "g_channels": 4, "attention_resolution": 8,
        },
        "train": {"steps": 1, "global_batch_size": 6},
        "evaluation": {"num_images": num_images, "batch_size": batch_size, "seed": seed},
    }  # fmt: skip
    return config_from_dict(values, "test")


def generator_for(config) -> nn.Module:
    torch.manual_seed(0)
    return build_generator(config).eval()


class Recorder(nn.Module):
    """Keeps what it sees; the features are those of the random network."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = random_features(CPU).network, []

    def forward(self, images):
        self.seen.append(images)
        return self.network(images)


@pytest.mark.parametrize("num_classes", [3, 0])
def test_the_samples_are_bit_equal_for_every_world_size(on_ranks, num_classes):
    config = config_with(num_images=45, num_classes=num_classes)
    generator = generator_for(config)

    def work(world):
        recorder = Recorder()
        extractor = Extractor("recorder", "0" * 64, "random", recorder.network.num_features, recorder)
        return generated.make_samples(generator, config, extractor, world), recorder.seen

    [(alone, blocks)] = on_ranks(1, work)
    assert [len(block) for block in blocks] == [8, 8, 8, 8, 8, 5]
    assert len(torch.cat(blocks).flatten(1).unique(dim=0)) == 45
    for world_size in (2, 3):
        found = on_ranks(world_size, work)
        for rank, (samples, seen) in enumerate(found):
            assert all(torch.equal(*pair) for pair in zip(seen, blocks[rank::world_size], strict=True))
            assert torch.equal(samples.logits, alone.logits)
            assert samples.statistics.n == 45
            assert samples.statistics.mu == pytest.approx(alone.statistics.mu, rel=1e-12)


def test_the_samples_do_not_depend_on_the_number_of_threads():
    config = config_with(num_images=16, batch_size=16)
    generator, before = generator_for(config), torch.get_num_threads()
    try:
        images = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            images.append(generated.sample_block(generator, config, 0, CPU))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*images)


def test_samples_are_what_the_generator_makes_rounded(monkeypatch):
    config = config_with(num_images=12)
    generator = generator_for(config)
    drawn = []
    generator.register_forward_hook(lambda module, inputs, output: drawn.append(output))
    images = generated.sample_block(generator, config, 1, CPU)
    assert len(images) == 4  # 12 = 8 + 4
    assert ((images.float() / 127.5 - 1) - drawn[0][:4]).abs().max() <= 0.5 / 127.5 + 1e-6


def test_another_seed_makes_other_samples():
    blocks = [
        generated.sample_block(generator_for(config), config, 0, CPU)
        for config in (config_with(16, seed=0), config_with(16, seed=1))
    ]
    assert not torch.equal(*blocks)


class Painter(nn.Module):
    """Returns the images it was given."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def forward(self, z, labels):
        return self.images[: len(z)]


def noise() -> torch.Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_non_finite_samples_are_counted():
    images = noise()
    images[1, 0, 3, 3] = torch.nan
    images[5] = torch.inf
    with pytest.raises(EvaluationError, match=r"block 0 .*: 2 of 8 hold non-finite values"):
        generated.sample_block(Painter(images), config_with(16), 0, CPU)


def test_samples_of_one_colour_each_are_no_samples():
    with pytest.raises(EvaluationError, match="8 of 8 are of a single colour"):
        generated.sample_block(Painter(noise()[:, :, :1, :1].expand(-1, -1, 16, 16)), config_with(16), 0, CPU)


def test_samples_that_are_all_the_same_are_no_samples():
    with pytest.raises(EvaluationError, match="8 of 8 are the same picture"):
        generated.sample_block(Painter(noise()[:1].expand(8, -1, -1, -1)), config_with(16), 0, CPU)


def test_a_few_constant_samples_are_counted_and_scored(on_ranks):
    images = noise()
    images[2] = 0.5
    images[3] = -1
    config = config_with(16)
    [samples] = on_ranks(1, lambda world: generated.make_samples(Painter(images), config, random_features(CPU), world))
    assert samples.num_constant == 4  # two in each of the two blocks


@pytest.mark.parametrize("batch_norm", ["standing", "batch"])
def test_other_batch_norm_is_bit_equal_for_every_world_size_and_leaves_the_generator_alone(on_ranks, batch_norm):
    config = config_with(num_images=20)
    config = replace(config, evaluation=replace(config.evaluation, batch_norm=batch_norm, standing_batches=5))
    generator = generator_for(config)
    before = {name: value.clone() for name, value in generator.state_dict().items()}

    def work(world):
        prepared = generated.with_batch_norm(generator, config, world)
        return [generated.sample_block(prepared, config, block, CPU) for block in range(3)]

    [alone] = on_ranks(1, work)
    for found in on_ranks(3, work):
        assert all(torch.equal(*pair) for pair in zip(alone, found, strict=True))
    assert all(torch.equal(before[name], value) for name, value in generator.state_dict().items())
    assert not torch.equal(alone[0], generated.sample_block(generator, config, 0, CPU))


def test_standing_statistics_are_the_mean_of_those_of_the_batches(on_ranks):
    """Of the first batch norm, whose input only depends on the noise, by hand."""
    config = config_with(num_images=20, num_classes=0)
    config = replace(config, evaluation=replace(config.evaluation, batch_norm="standing", standing_batches=3))
    generator, inputs = generator_for(config), []
    norm = next(module for module in generator.modules() if isinstance(module, CrossReplicaBatchNorm2d))
    norm.register_forward_hook(lambda module, arguments, output: inputs.append(arguments[0]))
    with torch.no_grad():
        for batch in range(3):
            generator(draw_z(0, "eval_standing_z", 0, batch, 8, 8), None)
    [prepared] = on_ranks(1, lambda world: generated.with_batch_norm(generator, config, world))
    found = next(module for module in prepared.modules() if isinstance(module, CrossReplicaBatchNorm2d))
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs[:3]]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs[:3]]).mean(0)
    torch.testing.assert_close(found.running_mean, means, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.running_var, variances, rtol=1e-4, atol=1e-6)


def test_standing_statistics_are_taken_anew_for_each_truncation(on_ranks):
    config = config_with(num_images=10)
    config = replace(config, evaluation=replace(config.evaluation, batch_norm="standing", standing_batches=2))
    generator = generator_for(config)

    def running_means(truncation: float | None) -> torch.Tensor:
        [prepared] = on_ranks(1, lambda world: generated.with_batch_norm(generator, config, world, truncation))
        norms = [module for module in prepared.modules() if isinstance(module, CrossReplicaBatchNorm2d)]
        return torch.cat([norm.running_mean for norm in norms])

    found = [running_means(truncation) for truncation in (None, 1.0, 0.2)]
    assert not any(torch.equal(found[index], found[index - 1]) for index in range(3))
    assert torch.equal(found[1], running_means(1.0))


def test_balanced_labels_ask_for_every_class_equally_often():
    config = config_with(num_images=12)
    config = replace(config, evaluation=replace(config.evaluation, labels="balanced"))
    asked = []

    class Asked(Painter):
        def forward(self, z, labels):
            asked.extend(labels.tolist())
            return super().forward(z, labels)

    for block in range(2):
        generated.sample_block(Asked(noise()), config, block, CPU)
    assert asked == [number % 3 for number in range(16)]


def test_a_fault_on_one_rank_is_told_on_all(on_ranks):
    """Block 1, of rank 1, is broken; the others must not wait for it."""
    config = config_with(num_images=24)

    class Breaks(Painter):
        def forward(self, z, labels):
            broken = torch.equal(z, draw_z(0, "eval_z", 0, 1, 8, 8))
            return super().forward(z, labels) * (float("nan") if broken else 1)

    def work(world):
        with pytest.raises(EvaluationError, match=r"block 1 .* non-finite"):
            generated.make_samples(Breaks(noise()), config, random_features(CPU), world)
        return True

    assert on_ranks(3, work) == [True] * 3


class Registered(torch_fidelity.FeatureExtractorBase):
    """Our random network as torch-fidelity wants it."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = random_features(CPU).network

    @staticmethod
    def get_provided_features_list():
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, images):
        found = dict(zip(("features", "logits"), self.network(images), strict=True))
        return tuple(found[name] for name in self.features_list)


@pytest.mark.parametrize("batch_size", [7, 16, 64])
def test_scores_are_those_of_calculate_metrics_for_every_world_size(on_ranks, batch_size):
    """IS, FID, KID, precision and recall, on the images of our own generator."""
    config = config_with(num_images=150, batch_size=batch_size)
    evaluation = replace(config.evaluation, kid_subset_size=40)
    generator = generator_for(config)
    num_blocks = -(-150 // batch_size)
    fakes = torch.cat([generated.sample_block(generator, config, block, CPU) for block in range(num_blocks)])
    others = config_with(num_images=100, batch_size=100, seed=1)
    alike = generated.sample_block(generator, others, 0, CPU)
    reals = torch.cat([alike, torch.randint(0, 256, alike.shape, generator=torch.Generator().manual_seed(1)).byte()])
    torch_fidelity.register_feature_extractor(f"generated {batch_size}", Registered)
    expected = torch_fidelity.calculate_metrics(
        input1=Subset(fakes, range(len(fakes))), input2=Subset(reals, range(len(reals))),
        isc=True, fid=True, kid=True, prc=True, kid_subset_size=40,
        feature_extractor=f"generated {batch_size}", cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        batch_size=50,
    )  # fmt: skip
    extractor = random_features(CPU)

    def work(world):
        real_blocks = [(start, reals[start : start + 30]) for start in range(world.rank * 30, 200, world.size * 30)]
        real = see(real_blocks, spread(200), extractor, world, "real").statistics
        seen = generated.make_samples(generator, config, extractor, world)
        return compare(seen, real, evaluation, ("", ""))

    for world_size in (1, 2, 3):
        for found in on_ranks(world_size, work):
            assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
            assert found["inception_score_mean"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
            assert found["inception_score_std"] == pytest.approx(expected["inception_score_std"], rel=1e-5)
            assert found["kid_mean"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
            assert found["kid_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-5)
            assert (found["precision"], found["recall"]) == (expected["precision"], expected["recall"])
    assert 0 < expected["recall"] < 1  # or the comparison says little
