"""Folding spectral norm away, and what a folder says when it is none."""

import json

import pytest
import torch
from torch import nn

from sagan import DcganGenerator, Discriminator, Generator, fold_spectral_norm, load
from sagan.layers import SpectralNorm


@pytest.mark.parametrize(
    "network",
    [
        lambda: Generator(32, 8, 3, 12, 16),
        lambda: Generator(16, 8, 0, 12, None),
        lambda: DcganGenerator(8, 12),
        pytest.param(
            lambda: Generator(16, 8, 3, 12, 8, spectral_norm_on_class_tables=True),
            marks=pytest.mark.filterwarnings("ignore:spectral_norm_on_class_tables"),
        ),
    ],
)
def test_a_folded_network_computes_the_same_with_plain_layers(network) -> None:
    torch.manual_seed(0)
    source = network().eval()
    for parameter in source.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # sigma is not 1, gains are not 0
    folded = fold_spectral_norm(source)
    assert not any(isinstance(layer, SpectralNorm) for layer in folded.modules())
    z = torch.randn(4, 12)
    labels = torch.tensor([0, 1, 2, 1]) if source.num_classes else None
    torch.testing.assert_close(folded(z, labels), source(z, labels), rtol=0, atol=1e-5)
    assert any(isinstance(layer, SpectralNorm) for layer in source.modules()), "the source stays as it is"


def test_folded_weights_have_the_spectral_norm_that_was_estimated() -> None:
    torch.manual_seed(0)
    source = Discriminator(16, 8, 3, 8)
    folded = fold_spectral_norm(source)
    weights = [layer.weight.detach() for layer in folded.modules() if isinstance(layer, nn.Conv2d | nn.Embedding)]
    for weight in weights:  # after 15 power iterations about 1, by an independent decomposition
        assert torch.linalg.svdvals(weight.flatten(1))[0] == pytest.approx(1, abs=0.1)


def test_a_folder_that_is_no_export_is_told(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no exported generator"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 99, "architecture": "resnet"}))
    with pytest.raises(ValueError, match="format 99"):
        load(tmp_path)
