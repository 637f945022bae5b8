"""The textbook update is the same mathematics as ours, in torch's own layers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pipeline.config import Config, config_from_dict
from pipeline.gan import Gan
from pipeline.textbook import Textbook
from pipeline.world import World
from sagan import advance_spectral_norm, hinge_d, hinge_g
from sagan.layers import SpectralNorm

CPU = torch.device("cpu")


def config() -> Config:
    return config_from_dict(
        {
            "run": {"name": "textbook", "device": "cpu"},
            "data": {"shards": "none"},
            "model": {"resolution": 32, "num_classes": 5, "attention_resolution": 16, "g_channels": 8,
                      "d_channels": 8, "z_dim": 6},
            "train": {"steps": 1, "global_batch_size": 4, "precision": "float64"},
        },
        "test",
    )  # fmt: skip


@pytest.fixture
def both() -> tuple[Gan, Textbook]:
    gan = Gan(config(), World("cpu"))
    for player in gan.players:
        player.module.attention.gain.data.fill_(0.5)
    return gan, Textbook(config(), CPU, gan.generator.module, gan.discriminator.module, torch.float64)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".parametrizations.weight.original", ".weight"): parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0 or name == "linear.bias", name  # real and fake cancel there, at the start
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-12, msg=name)


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    z = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 1, 2, 2]), z, torch.tensor([4, 3, 0, 0])


def test_the_discriminator_step_has_our_gradients(both: tuple[Gan, Textbook]) -> None:
    """With the power iterations that each does by itself: ours before the passes, torch's within them."""
    gan, book = both
    images, labels, z, fake_labels = inputs(0)
    expected = book.discriminator_step(images, labels, z, fake_labels)
    generator, discriminator = gan.generator.module, gan.discriminator.module
    advance_spectral_norm(generator)
    advance_spectral_norm(discriminator)
    with torch.no_grad():
        fakes = generator(z, fake_labels)
    logits = discriminator(torch.cat([images, fakes]), torch.cat([labels, fake_labels]))
    loss = hinge_d(*logits.chunk(2))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert_same(gradients(discriminator), gradients(book.discriminator))
    for name, layer in discriminator.named_modules():
        if isinstance(layer, SpectralNorm):
            theirs = book.discriminator.get_submodule(f"{name}.parametrizations.weight.0")
            torch.testing.assert_close(layer.u, theirs._u, rtol=1e-10, atol=1e-12)


def test_the_generator_step_has_our_gradients(both: tuple[Gan, Textbook]) -> None:
    """With equal u and v, which torch would move once more in this step and we do not."""
    gan, book = both
    *_, z, labels = inputs(1)
    for module in [*book.generator.modules(), *book.discriminator.modules()]:
        if isinstance(module, ParametrizationList):
            module.eval()
    generator, discriminator = copy.deepcopy(gan.generator.module), gan.discriminator.module
    expected = book.generator_step(z, labels)
    discriminator.requires_grad_(False)
    loss = hinge_g(discriminator(generator(z, labels), labels))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert_same(gradients(generator), gradients(book.generator))
    assert gradients(book.discriminator) == {}


def test_an_update_moves_everything(both: tuple[Gan, Textbook]) -> None:
    """So that what is timed is a whole update."""
    from pipeline.train_benchmark import synthetic

    gan, book = both
    before = [copy.deepcopy(module.state_dict()) for module in (book.generator, book.discriminator, book.ema)]
    losses = book.update(1, [next(synthetic(gan.config, gan.world))], 0)
    assert all(loss.isfinite() for loss in losses.values())
    for module, state in zip((book.generator, book.discriminator, book.ema), before, strict=True):
        moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, state[name])}
        assert {name for name, _ in module.named_parameters()} - moved <= {"linear.bias"}
