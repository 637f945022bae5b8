"""From a configuration to its networks."""

import torch

from pipeline.config import Config
from sagan import Discriminator, Generator


def build_generator(config: Config) -> Generator:
    """Returns the generator of a configuration, initialised from the global torch RNG."""
    model = config.model
    return Generator(
        model.resolution,
        model.g_channels,
        model.num_classes,
        model.z_dim,
        model.attention_resolution,
        init=model.init,
        spectral_norm_eps=model.spectral_norm_eps,
        batch_norm_eps=model.batch_norm_eps,
        batch_norm_momentum=model.batch_norm_momentum,
        sync_batch_norm=model.sync_batch_norm,
        spectral_norm_on_class_tables=model.spectral_norm_on_class_tables,
    )


def build_discriminator(config: Config) -> Discriminator:
    """Returns the discriminator of a configuration, initialised from the global torch RNG."""
    model = config.model
    return Discriminator(
        model.resolution,
        model.d_channels,
        model.num_classes,
        model.attention_resolution,
        init=model.init,
        spectral_norm_eps=model.spectral_norm_eps,
    )


def count_parameters(config: Config) -> tuple[int, int]:
    """Returns the number of parameters of generator and discriminator, without building either."""
    with torch.device("meta"):
        networks = build_generator(config), build_discriminator(config)
    generator, discriminator = (sum(p.numel() for p in network.parameters()) for network in networks)
    return generator, discriminator
