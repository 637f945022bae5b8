import pytest
import torch
from torch import nn

from pipeline import generated
from pipeline.config import config_from_dict
from pipeline.features import EvaluationError, Extractor, random_features
from pipeline.networks import build_generator

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
